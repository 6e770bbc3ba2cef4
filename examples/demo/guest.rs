//! Workers that are VMs of their own: what runs in them, and what their kernels say.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use proxmox_csi::sim::{World, world};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{Fail, stack::REGION};

/// The port of the node plugin in the guest, and that of a shell (`tests/guest-image/init`).
const CSI: u16 = 7000;
const SHELL: u16 = 7001;

/// A guest that runs.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Where its node plugin is reached.
    pub csi: String,
    shell: u16,
}

impl Guest {
    /// By the ports on this machine of those in the guest.
    pub fn at(ports: &BTreeMap<String, u16>) -> Result<Self, Fail> {
        let port =
            |inner: u16| ports.get(&inner.to_string()).ok_or("a guest without a shell or a node plugin");
        Ok(Self { csi: format!("http://127.0.0.1:{}", port(CSI)?), shell: *port(SHELL)? })
    }

    /// Runs a script in the guest; returns what it said, or that as the error.
    pub async fn sh(&self, script: &str) -> Result<String, Fail> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.shell)).await?;
        let script = format!("exec 2>&1\n({script}\n)\nstatus=$?; echo; echo status $status\nexit\n");
        stream.write_all(script.as_bytes()).await?;
        stream.shutdown().await?;
        let mut said = String::new();
        stream.read_to_string(&mut said).await?;
        match said.trim_end().rsplit_once("\nstatus ") {
            Some((text, "0")) => Ok(text.trim().to_owned()),
            _ => Err(said.into()),
        }
    }

    /// The disks of the guest but the boot disk, as one line each.
    pub async fn disks(&self) -> Result<Vec<String>, Fail> {
        let script = "cd /sys/block; for d in sd*; do [ -e $d ] && grep -q ^naa $d/device/wwid 2>/dev/null && \
                      echo \"$d: $(($(cat $d/size) / 2048)) MiB, $(cat $d/device/wwid), SCSI $(basename $(readlink -f $d/device)), \
                      block device $(cat $d/dev)\"; done; true";
        Ok(self.sh(script).await?.lines().map(str::to_owned).collect())
    }

    /// A mount as the guest's kernel lists it.
    pub async fn mount(&self, target: &Path) -> Result<String, Fail> {
        let target = target.display();
        let script = format!(
            "set -- $(grep ' {target} ' /proc/mounts | tail -n1); [ -n \"$1\" ] || {{ echo nothing is mounted there; exit; }}; \
             echo \"$3 of $(($(stat -f -c '%S * %b' {target}) >> 20)) MiB on $1, $4\""
        );
        self.sh(&script).await
    }

    /// What the kernel has said since it was asked the last time.
    pub async fn news(&self) -> Result<Vec<String>, Fail> {
        Ok(self.sh("dmesg -c").await?.lines().map(str::to_owned).collect())
    }
}

/// The built-in world with VMs that boot what `tests/guest-image/build.sh` has made in the directory.
pub fn world(image: &Path) -> Result<World, Fail> {
    let mut world = World::builtin();
    world.vms.truncate(2);
    for vm in &mut world.vms {
        vm.guest = world::Guest::Qemu;
        vm.config.extend(
            [("memory", "256"), ("cores", "1")].map(|(key, value)| (key.to_owned(), value.to_owned())),
        );
    }
    let file = |name: &str| -> Result<PathBuf, Fail> { Ok(image.join(name).canonicalize()?) };
    world.qemu = Some(serde_json::from_value(serde_json::json!({
        "kernel": file("vmlinux")?,
        "initrd": file("initrd")?,
        "root": file("root.img")?,
        "append": format!("console=ttyS0 quiet panic=-1 mitigations=off csi.node=worker-{{vmid}} csi.region={REGION} csi.zone={{node}}"),
        "ports": [CSI, SHELL],
    }))?);
    Ok(world)
}
