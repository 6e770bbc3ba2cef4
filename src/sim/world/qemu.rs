//! What VMs run that are real, as it stands in a world file.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What a VM runs whose `guest` is `qemu`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Qemu {
    /// The kernel: a bzImage, or an uncompressed one, which starts sooner.
    pub kernel: PathBuf,
    /// Its initramfs.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// An image that every guest gets as a read-only virtio disk, beside the disks of its config.
    #[serde(default)]
    pub root: Option<PathBuf>,
    /// The kernel's command line. `{name}`, `{node}` and `{vmid}` stand for those of the VM.
    #[serde(default)]
    pub append: String,
    /// Ports of the guest that are reached on a port of this machine's loopback.
    #[serde(default)]
    pub ports: Vec<u16>,
    /// The program.
    #[serde(default = "default_qemu")]
    pub program: String,
    /// `tcg` needs nothing, `kvm` needs `/dev/kvm`.
    #[serde(default = "default_accel")]
    pub accel: String,
    /// The processor that the guest sees.
    #[serde(default = "default_cpu")]
    pub cpu: String,
    /// Further arguments.
    #[serde(default)]
    pub arguments: Vec<String>,
}

fn default_qemu() -> String {
    "qemu-system-x86_64".to_owned()
}

fn default_accel() -> String {
    "tcg".to_owned()
}

/// Close to Proxmox's `x86-64-v2-AES`.
fn default_cpu() -> String {
    "Westmere".to_owned()
}
