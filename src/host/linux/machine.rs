//! What machine this is: by its SMBIOS tables, and by its kernel.

use std::path::Path;

use super::disks::{self, Tree};
use crate::{
    host::{
        Identity,
        error::{IdentityError, PathError},
    },
    types::VmId,
};

/// The release of the running kernel.
const RELEASE: &str = "/proc/sys/kernel/osrelease";

/// Who made the firmware of a VM of Proxmox: `SeaBIOS`, or OVMF as Proxmox and as others build it.
const FIRMWARE: [&str; 4] =
    ["SeaBIOS", "Proxmox distribution of EDK II", "EFI Development Kit II / OVMF", "EDK II"];

/// What the SMBIOS tables say of the machine; empty where they say nothing.
#[derive(Debug, Default)]
struct Dmi {
    vendor: String,
    product: String,
    chassis: String,
    firmware: String,
}

impl Tree {
    fn dmi(&self, file: &str) -> Result<Option<String>, PathError> {
        disks::read(&self.sysfs.join("class/dmi/id").join(file))
    }

    /// What the machine says of itself. The files are absent where it says nothing.
    pub(super) fn identity(&self) -> Result<Identity, IdentityError> {
        let uuid = match self.dmi("product_uuid")? {
            Some(text) => Some(text.trim().parse().map_err(|_| IdentityError::Uuid(text))?),
            None => None,
        };
        let read = |file| Ok::<_, PathError>(self.dmi(file)?.unwrap_or_default().trim().to_owned());
        let dmi = Dmi {
            vendor: read("sys_vendor")?,
            product: read("product_name")?,
            chassis: read("chassis_vendor")?,
            firmware: read("bios_vendor")?,
        };
        // Another tree is that of another machine, and the kernel is this one's.
        let own = self.sysfs == Path::new("/sys");
        let release = own.then(|| disks::read(Path::new(RELEASE))).transpose()?.flatten();
        let vmid = self.dmi("product_serial")?.as_deref().and_then(vmid_of);
        Ok(Identity { uuid, vmid, no_vm: no_vm(&dmi, release.as_deref()) })
    }
}

/// The VMID in a serial of cloud-init's form `ds=nocloud;i=105`: Proxmox writes none, but some who make templates do.
fn vmid_of(serial: &str) -> Option<VmId> {
    serial.split(';').find_map(|option| option.trim().strip_prefix("i=")?.parse().ok())
}

/// Why the machine can't be a VM of Proxmox, in words; `None` also where it does not say what it is. Proxmox lets its users set the
/// maker of the system, not that of the chassis (qemu-server `QemuServer.pm`, `smbios1`; QEMU `hw/smbios/smbios.c`,
/// `smbios_set_defaults`).
fn no_vm(dmi: &Dmi, release: Option<&str>) -> Option<String> {
    if let Some(release) = release.filter(|release| release.ends_with("-pve")) {
        return Some(format!(
            "its kernel `{release}` is that of a Proxmox node: it is one, or a container on one"
        ));
    }
    let silent = [&dmi.vendor, &dmi.product, &dmi.chassis, &dmi.firmware].iter().all(|text| text.is_empty());
    let qemu = dmi.vendor == "QEMU" || dmi.chassis == "QEMU" || FIRMWARE.contains(&dmi.firmware.as_str());
    if silent || qemu {
        return None;
    }
    Some(format!("its firmware says that it is `{} {}`", dmi.vendor, dmi.product))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dmi(vendor: &str, product: &str, chassis: &str, firmware: &str) -> Dmi {
        let [vendor, product, chassis, firmware] = [vendor, product, chassis, firmware].map(str::to_owned);
        Dmi { vendor, product, chassis, firmware }
    }

    #[test]
    fn a_vm_of_proxmox_is_told_from_a_proxmox_node_and_from_a_container() {
        let kernel = Some("6.12.111-cloud-amd64");
        let pc = dmi("QEMU", "Standard PC (i440FX + PIIX, 1996)", "QEMU", "SeaBIOS");
        assert_eq!(no_vm(&pc, kernel), None);
        let named = dmi("ACME", "Worker", "QEMU", "Proxmox distribution of EDK II");
        assert_eq!(no_vm(&named, kernel), None, "smbios1 may say anything of the system");
        assert_eq!(no_vm(&Dmi::default(), kernel), None, "it does not say what it is");

        let server = dmi("Dell Inc.", "PowerEdge R640", "Dell Inc.", "Dell Inc.");
        let why = no_vm(&server, kernel).expect("it is none");
        assert!(why.contains("Dell Inc. PowerEdge R640"), "{why}");
        // A container sees the tables and the kernel of its host, and that may be a VM itself.
        let why = no_vm(&pc, Some("6.8.12-4-pve")).expect("it is none");
        assert!(why.contains("`6.8.12-4-pve`"), "{why}");
    }

    #[test]
    fn a_vmid_is_read_from_a_serial_that_has_one() {
        assert_eq!(vmid_of("ds=nocloud;i=105"), "105".parse().ok());
        assert_eq!(vmid_of("h=worker-1;i=105;s=x"), "105".parse().ok());
        for other in ["", "105", "i=", "i=no", "Abc-Def-01", "hi=105"] {
            assert_eq!(vmid_of(other), None, "{other}");
        }
    }
}
