//! The command line of a QEMU, and the devices on it and in a hotplug: what Proxmox VE makes of the same config
//! (qemu-server `QemuServer.pm:config_to_command`, `QemuServer/DriveDevice.pm`, `QemuServer/Blockdev.pm`,
//! `QemuServer/PCI.pm`), with the world's kernel in place of a boot disk's, software emulation in place of KVM, and a
//! network of its own that leads nowhere but to the forwarded ports.

use crate::sim::rules::conf::Conf;
use crate::sim::rules::drive::Drive;
use crate::sim::world::Qemu;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{Error, Result};
use std::path::{Path, PathBuf};

/// A disk in a SCSI slot.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    pub(crate) slot: u32,
    pub(crate) image: PathBuf,
    pub(crate) drive: Drive,
}

/// The VM that is started.
#[derive(Debug)]
pub(crate) struct Vm<'a> {
    pub(crate) vmid: u32,
    pub(crate) node: &'a str,
    pub(crate) conf: &'a Conf,
}

/// The SCSI controller of a slot (`DriveDevice.pm:scsihw_infos`, `PCI.pm:get_pci_addr_map`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Controller {
    pub(super) id: String,
    bus: &'static str,
    address: u32,
    /// Whether it is the slot's alone.
    pub(super) is_own: bool,
}

impl Controller {
    pub(super) fn of(conf: &Conf, slot: u32) -> Result<Self> {
        match conf.current.get("scsihw").map(String::as_str) {
            Some("virtio-scsi-single") => {
                Ok(Self { id: format!("virtioscsi{slot}"), bus: "pci.3", address: slot + 1, is_own: true })
            }
            Some("virtio-scsi-pci") => {
                Ok(Self { id: "scsihw0".to_owned(), bus: "pci.0", address: 5, is_own: false })
            }
            other => Err(Error::other(format!(
                "a QEMU of the simulator has `virtio-scsi-single` or `virtio-scsi-pci`, not `{}`",
                other.unwrap_or("lsi")
            ))),
        }
    }

    /// What follows `device_add` or `-device` (`QemuServer.pm:vm_deviceplug`).
    pub(super) fn device(&self) -> String {
        format!("virtio-scsi-pci,id={},bus={},addr={:#x}", self.id, self.bus, self.address)
    }
}

fn is_q35(conf: &Conf) -> bool {
    conf.current.get("machine").is_some_and(|machine| machine.contains("q35"))
}

/// QEMU's escape for a comma in a value.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

/// What follows `device_add` or `-device` for a disk (`DriveDevice.pm:print_drivedevice_full`).
pub(super) fn scsi_disk(controller: &Controller, disk: &Disk) -> String {
    let (slot, option) = (disk.slot, |name: &str| disk.drive.options.get(name));
    let mut device = format!(
        "scsi-hd,bus={}.0,channel=0,scsi-id=0,lun={slot},drive=drive-scsi{slot},id=scsi{slot},device_id=drive-scsi{slot}",
        controller.id
    );
    if disk.drive.flag("ssd") {
        device.push_str(",rotation_rate=1");
    }
    for name in ["wwn", "vendor", "product", "serial"] {
        if let Some(value) = option(name) {
            // Writing to a string cannot fail.
            let _ = write!(device, ",{name}={}", escaped(value));
        }
    }
    let through = matches!(option("cache").map(String::as_str), Some("writethrough" | "directsync"));
    device.push_str(if through { ",write-cache=off" } else { ",write-cache=on" });
    for name in ["rerror", "werror"] {
        if let Some(value) = option(name) {
            let _ = write!(device, ",{name}={value}");
        }
    }
    device
}

/// The id of the group that limits a disk (`Blockdev.pm:throttle_group_id`).
pub(super) fn throttle_group(slot: u32) -> String {
    format!("throttle-drive-scsi{slot}")
}

/// The limits of a disk (`Blockdev.pm:generate_throttle_group`).
pub(super) fn limits(drive: &Drive) -> Value {
    let mut limits = serde_json::Map::new();
    for (ours, theirs) in [("", "-total"), ("_rd", "-read"), ("_wr", "-write")] {
        let number = |name: String| drive.options.get(&name)?.parse::<f64>().ok();
        for most in ["", "_max"] {
            let suffix = if most.is_empty() { "" } else { "-max" };
            if let Some(mebibytes) = number(format!("mbps{ours}{most}")) {
                let bytes: u64 = format!("{:.0}", (mebibytes * 1_048_576.0).floor()).parse().unwrap_or(0);
                limits.insert(format!("bps{theirs}{suffix}"), json!(bytes));
            }
            if let Some(count) =
                drive.options.get(&format!("iops{ours}{most}")).and_then(|v| v.parse::<u64>().ok())
            {
                limits.insert(format!("iops{theirs}{suffix}"), json!(count));
            }
        }
    }
    Value::Object(limits)
}

/// `Blockdev.pm:get_node_name`.
fn node_name(prefix: char, disk: &Disk) -> String {
    let hash = Sha256::digest(format!("drive=scsi{},volid={}", disk.slot, disk.drive.file));
    let digits = hash.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    });
    format!("{prefix}{}", digits.get(..30).unwrap_or_default())
}

/// The block nodes of a disk: throttle over format over file (`Blockdev.pm:generate_drive_blockdev`).
///
/// Three options are not as Proxmox sets them on a directory: `aio` is the plain one, `direct` is off, since nothing
/// here survives by it, and `no-flush` is on, since the simulator's machine does not lose its power. `locking` is off
/// as in Proxmox's QEMU (pve-qemu `block/file`: changed default): it guards nothing, and neither may the simulator.
pub(super) fn blockdev(disk: &Disk) -> Value {
    let cache = json!({ "direct": false, "no-flush": true });
    let common = json!({
        "discard": if disk.drive.options.get("discard").is_some_and(|value| value == "on") { "unmap" } else { "ignore" },
        "detect-zeroes": if disk.drive.options.get("detect_zeroes").is_some_and(|value| value == "0") { "off" } else { "on" },
        "read-only": disk.drive.flag("ro"),
    });
    let with = |mut node: Value| {
        if let (Some(node), Some(common)) = (node.as_object_mut(), common.as_object()) {
            node.extend(common.clone());
        }
        node
    };
    let file = with(json!({
        "driver": "file", "filename": disk.image, "node-name": node_name('e', disk), "cache": cache, "locking": "off",
        "aio": "threads",
    }));
    let format =
        with(json!({ "driver": "raw", "node-name": node_name('f', disk), "cache": cache, "file": file }));
    with(json!({
        "driver": "throttle", "node-name": format!("drive-scsi{}", disk.slot),
        "throttle-group": throttle_group(disk.slot), "file": format,
    }))
}

/// The whole command line.
pub(super) fn line(
    settings: &Qemu,
    vm: &Vm<'_>,
    disks: &[Disk],
    socket: &Path,
    console: &Path,
) -> Result<Vec<OsString>> {
    let conf = vm.conf;
    let key =
        |name: &str, default: &str| conf.current.get(name).cloned().unwrap_or_else(|| default.to_owned());
    let mut words: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: String| words.extend([OsString::from(option), OsString::from(value)]);
    let q35 = is_q35(conf);
    add("-name", format!("{},debug-threads=on", escaped(&key("name", "vm"))));
    add("-accel", settings.accel.clone());
    add("-machine", if q35 { "q35".to_owned() } else { "pc".to_owned() });
    add("-cpu", settings.cpu.clone());
    add("-m", key("memory", "512"));
    add("-smp", key("cores", "1"));
    add("-display", "none".to_owned());
    add("-qmp", format!("unix:{},server=on,wait=off", escaped(&socket.display().to_string())));
    add("-serial", format!("file:{}", escaped(&console.display().to_string())));
    add("-smbios", format!("type=1,{}", smbios(&key("smbios1", ""))));
    add("-kernel", settings.kernel.display().to_string());
    if let Some(initrd) = &settings.initrd {
        add("-initrd", initrd.display().to_string());
    }
    let append =
        [("{name}", key("name", "vm")), ("{node}", vm.node.to_owned()), ("{vmid}", vm.vmid.to_string())];
    add(
        "-append",
        append.iter().fold(settings.append.clone(), |text, (mark, value)| text.replace(mark, value)),
    );
    if let Some(root) = &settings.root {
        let path = escaped(&root.display().to_string());
        add("-drive", format!("if=none,id=root,format=raw,readonly=on,file.locking=off,file={path}"));
    }
    if q35 {
        // The bridges of `pve-q35-4.0.cfg`.
        add("-device", "i82801b11-bridge,id=pcidmi,bus=pcie.0,addr=1e.0".to_owned());
        add("-device", "pci-bridge,id=pci.0,bus=pcidmi,addr=1.0,chassis_nr=1".to_owned());
        add("-device", "pci-bridge,id=pci.3,bus=pcidmi,addr=4.0,chassis_nr=4".to_owned());
        if hides_hotplug(conf) {
            add("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off".to_owned());
        }
    } else if conf.current.get("scsihw").is_some_and(|hardware| hardware == "virtio-scsi-single") {
        add("-device", "pci-bridge,id=pci.3,chassis_nr=3,bus=pci.0,addr=0x5".to_owned());
    }
    if settings.root.is_some() {
        // Where the first virtio disk of a VM is.
        add("-device", "virtio-blk-pci,drive=root,bus=pci.0,addr=0xa".to_owned());
    }
    let forward = |port: &u16| format!(",hostfwd=tcp:127.0.0.1:0-:{port}");
    add(
        "-netdev",
        format!("user,id=net0,restrict=on{}", settings.ports.iter().map(forward).collect::<String>()),
    );
    add("-device", "virtio-net-pci,netdev=net0,id=net0,bus=pci.0,addr=0x12,romfile=".to_owned());
    let mut controllers = Vec::new();
    for disk in disks {
        let controller = Controller::of(conf, disk.slot)?;
        let mut group = json!({ "qom-type": "throttle-group", "id": throttle_group(disk.slot) });
        group["limits"] = limits(&disk.drive);
        add("-object", group.to_string());
        add("-blockdev", blockdev(disk).to_string());
        if !controllers.contains(&controller) {
            add("-device", controller.device());
            controllers.push(controller.clone());
        }
        add("-device", scsi_disk(&controller, disk));
    }
    words.extend(["-nodefaults", "-no-user-config"].map(OsString::from));
    words.extend(settings.arguments.iter().map(OsString::from));
    Ok(words)
}

/// Whether the guest is not told of devices behind bridges: a q35 machine of a Linux guest that no QEMU of 6.1 or later
/// made (`QemuServer.pm:qemu_created_version_fixups`).
fn hides_hotplug(conf: &Conf) -> bool {
    let made_by = conf.current.get("meta").and_then(|meta| {
        let version = meta.split(',').find_map(|part| part.strip_prefix("creation-qemu="))?;
        let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
        Some((numbers.next()?, numbers.next().unwrap_or(0)))
    });
    let versioned = conf.current.get("machine").is_some_and(|machine| machine != "q35");
    let linux = conf.current.get("ostype").is_some_and(|kind| kind == "l26");
    !versioned && linux && made_by.is_none_or(|version| version < (6, 1))
}

/// The properties of `smbios1` that QEMU knows too; `base64=1` says that the others are encoded.
fn smbios(text: &str) -> String {
    use base64::Engine as _;
    let parts: Vec<(&str, &str)> = text.split(',').filter_map(|part| part.split_once('=')).collect();
    let encoded = parts.contains(&("base64", "1"));
    let value = |name: &str, value: &str| {
        let engine = base64::engine::general_purpose::STANDARD;
        let plain = engine.decode(value).ok().filter(|_| encoded && name != "uuid");
        plain.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_else(|| value.to_owned())
    };
    let known = ["uuid", "serial", "manufacturer", "product", "version", "sku", "family"];
    let wanted = parts.iter().filter(|(name, _)| known.contains(name));
    wanted.map(|(name, text)| format!("{name}={}", escaped(&value(name, text)))).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(keys: &[(&str, &str)]) -> Conf {
        let mut conf = Conf::default();
        conf.current.extend(keys.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        conf
    }

    #[test]
    fn a_disk_is_the_device_that_proxmox_makes() {
        let conf = conf(&[("scsihw", "virtio-scsi-single")]);
        let controller = Controller::of(&conf, 3).expect("a kind there is");
        assert_eq!(controller.device(), "virtio-scsi-pci,id=virtioscsi3,bus=pci.3,addr=0x4");
        let drive =
            Drive::parse("scsi3", "data:9999/vm-9999-x.raw,ssd=1,wwn=0x3c51aabbccddeeff").expect("a drive");
        let disk = Disk { slot: 3, image: "/images/x.raw".into(), drive };
        assert_eq!(
            scsi_disk(&controller, &disk),
            "scsi-hd,bus=virtioscsi3.0,channel=0,scsi-id=0,lun=3,drive=drive-scsi3,id=scsi3,device_id=drive-scsi3,\
             rotation_rate=1,wwn=0x3c51aabbccddeeff,write-cache=on"
        );
        let node = blockdev(&disk);
        assert_eq!(node["node-name"], "drive-scsi3");
        assert_eq!(node["file"]["file"]["filename"], "/images/x.raw");
        assert!(node["file"]["node-name"].as_str().is_some_and(|name| name.len() == 31), "{node}");
    }

    #[test]
    fn old_q35_machines_hide_their_hotplug() {
        let old = [("machine", "q35"), ("ostype", "l26")];
        assert!(hides_hotplug(&conf(&old)));
        let made = |version| conf(&[old[0], old[1], ("meta", version)]);
        assert!(hides_hotplug(&made("creation-qemu=5.2.0,ctime=1")));
        assert!(!hides_hotplug(&made("creation-qemu=10.0.2,ctime=1")));
        assert!(!hides_hotplug(&conf(&[("machine", "pc-q35-9.0"), old[1]])));
    }

    #[test]
    fn smbios_values_are_told_as_they_are() {
        assert_eq!(smbios("uuid=8b3f,serial=YSxi,base64=1"), "uuid=8b3f,serial=a,,b");
        assert_eq!(smbios("uuid=8b3f"), "uuid=8b3f");
    }
}
