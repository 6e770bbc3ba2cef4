//! The keys of a VM config: their types, and which privilege changes them
//! (qemu-server `QemuServer.pm:$confdesc`, `API2/Qemu.pm:$check_vm_modify_config_perm`).

use super::cloudinit;
use super::drive::{Drive, index_of, is_drive_key};
use super::error::PveError;
use serde_json::Value;

/// How a value is checked and in which JSON type it comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 0 or 1, answered as a number.
    Boolean,
    /// Answered as a number.
    Integer,
    /// Answered as a string.
    Text,
    /// Answered as a string, one of these.
    OneOf(&'static [&'static str]),
    /// A drive string.
    Drive,
}

const SCSI_CONTROLLERS: &[&str] =
    &["lsi", "lsi53c810", "virtio-scsi-pci", "virtio-scsi-single", "megasas", "pvscsi"];
const LOCKS: &[&str] = &[
    "backup",
    "clone",
    "create",
    "migrate",
    "rollback",
    "snapshot",
    "snapshot-delete",
    "suspending",
    "suspended",
];
const BIOSES: &[&str] = &["seabios", "ovmf"];

/// Every numbered key the simulator knows, with the number of its indices.
const NUMBERED: &[(&str, u32)] = &[
    ("net", 32),
    ("serial", 4),
    ("usb", 14),
    ("hostpci", 16),
    ("ipconfig", 32),
    ("numa", 8),
    ("parallel", 3),
];

/// The kind of `key`, `None` for a key PVE's schema does not have (`QemuServer.pm:option_exists`).
pub fn kind_of(key: &str) -> Option<Kind> {
    Some(match key {
        "acpi" | "autostart" | "ciupgrade" | "freeze" | "keephugepages" | "kvm" | "localtime" | "numa"
        | "onboot" | "protection" | "reboot" | "tablet" | "tdf" | "template" | "allow-ksm" => Kind::Boolean,
        "balloon" | "cores" | "cpuunits" | "migrate_speed" | "shares" | "smp" | "sockets" | "vcpus" => {
            Kind::Integer
        }
        "scsihw" => Kind::OneOf(SCSI_CONTROLLERS),
        "lock" => Kind::OneOf(LOCKS),
        "bios" => Kind::OneOf(BIOSES),
        "affinity" | "agent" | "args" | "arch" | "audio0" | "boot" | "bootdisk" | "cicustom"
        | "cipassword" | "citype" | "ciuser" | "cpu" | "cpulimit" | "description" | "hookscript"
        | "hotplug" | "hugepages" | "keyboard" | "machine" | "memory" | "meta" | "migrate_downtime"
        | "name" | "nameserver" | "ostype" | "rng0" | "searchdomain" | "smbios1" | "sshkeys"
        | "startdate" | "startup" | "tags" | "vga" | "vmgenid" | "vmstatestorage" | "watchdog" => Kind::Text,
        _ if is_drive_key(key) => Kind::Drive,
        _ if NUMBERED.iter().any(|(prefix, count)| index_of(key, prefix).is_some_and(|i| i < *count)) => {
            Kind::Text
        }
        _ => return None,
    })
}

/// Checks an API value of `key` and returns it as the config keeps it (pve-common `JSONSchema.pm:check_prop`,
/// `check_format`).
pub fn check(key: &str, kind: Kind, value: &str) -> Result<String, String> {
    match kind {
        Kind::Boolean => match value.to_ascii_lowercase().as_str() {
            "1" | "on" | "yes" | "true" => Ok("1".to_owned()),
            "0" | "off" | "no" | "false" => Ok("0".to_owned()),
            _ => Err(format!("type check ('boolean') failed - got '{value}'")),
        },
        Kind::Integer if value.parse::<i64>().is_err() => {
            Err(format!("type check ('integer') failed - got '{value}'"))
        }
        Kind::OneOf(values) if !values.contains(&value) => {
            Err(format!("value '{value}' does not have a value in the enumeration '{}'", values.join(", ")))
        }
        Kind::Drive => Drive::parse(key, value).map(|drive| drive.to_string()),
        Kind::Text if key == "name" && !is_dns_name(value) => {
            Err("invalid format - value does not look like a valid DNS name\n".to_owned())
        }
        Kind::Text if key == "hotplug" => check_hotplug(value).map(|()| value.to_owned()),
        Kind::Integer | Kind::OneOf(_) | Kind::Text => Ok(value.to_owned()),
    }
}

fn is_dns_name(name: &str) -> bool {
    !name.is_empty()
        && name.split('.').all(|label| {
            !label.is_empty()
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

/// `QemuServer.pm:parse_hotplug_features`.
fn check_hotplug(value: &str) -> Result<(), String> {
    for feature in value.split(',') {
        if !matches!(feature, "0" | "1" | "network" | "disk" | "cpu" | "memory" | "usb" | "cloudinit") {
            return Err("invalid format - unable to parse hotplug option\n".to_owned());
        }
    }
    Ok(())
}

/// Whether a running VM takes and gives disks: feature `disk` of the `hotplug` key, on when the key is unset
/// (`QemuServer.pm:parse_hotplug_features`).
pub fn hotplugs_disks(hotplug: Option<&str>) -> bool {
    hotplugs(hotplug, "disk")
}

/// Whether a feature of hotplug is on, by the key: `network`, `disk` and `usb` are where it is unset
/// (`QemuServer.pm:parse_hotplug_features`).
pub fn hotplugs(hotplug: Option<&str>, feature: &str) -> bool {
    match hotplug.unwrap_or("1") {
        "0" => false,
        "1" => matches!(feature, "network" | "disk" | "usb"),
        features => features.split(',').any(|on| on == feature),
    }
}

/// A stored value in the JSON type PVE gives it (`QemuServer.pm:parse_vm_config` through `check_type`).
pub fn to_json(key: &str, value: &str) -> Value {
    match kind_of(key) {
        None if key == "snaptime" => value.parse::<i64>().map_or_else(|_| value.into(), Value::from),
        Some(Kind::Boolean | Kind::Integer) => {
            value.parse::<i64>().map_or_else(|_| value.into(), Value::from)
        }
        _ => value.into(),
    }
}

/// Whether a change of `key` reaches a running VM at once (`QemuServer.pm:$fast_plug_option`).
pub fn is_fast(key: &str) -> bool {
    cloudinit::is_option(key)
        || matches!(
            key,
            "description"
                | "hookscript"
                | "lock"
                | "migrate_downtime"
                | "migrate_speed"
                | "name"
                | "onboot"
                | "protection"
                | "shares"
                | "startup"
                | "tags"
                | "vmstatestorage"
        )
}

/// What changing a key takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// One of these privileges on the VM.
    Any(&'static [&'static str]),
    /// `VM.Config.Options` on the VM, and `Sys.Modify` on `/`: it changes what the host does.
    Startup,
    /// Depends on the value, and is looked at when the value is written.
    ByValue,
    /// Nothing helps but to be root@pam, with a ticket.
    Root,
}

/// What changing a key takes (`API2/Qemu.pm:$check_vm_modify_config_perm`).
pub fn right(key: &str) -> Right {
    let numbered = |stem: &str| index_of(key, stem).is_some();
    match key {
        _ if is_drive_key(key) || ["serial", "usb", "hostpci", "virtiofs"].into_iter().any(numbered) => {
            Right::ByValue
        }
        "tags" => Right::ByValue,
        "cores" | "cpu" | "runningcpu" | "cpulimit" | "cpuunits" | "numa" | "smp" | "sockets" | "vcpus" => {
            Right::Any(&["VM.Config.CPU"])
        }
        _ if numbered("numa") => Right::Any(&["VM.Config.CPU"]),
        "memory" | "balloon" | "shares" | "allow-ksm" => Right::Any(&["VM.Config.Memory"]),
        "acpi" | "hotplug" | "kvm" | "machine" | "runningmachine" | "scsihw" | "smbios1" | "tablet"
        | "vga" | "watchdog" | "audio0" | "rng0" => Right::Any(&["VM.Config.HWType"]),
        "startup" => Right::Startup,
        "agent" | "autostart" | "bios" | "description" | "keyboard" | "localtime" | "migrate_downtime"
        | "migrate_speed" | "name" | "onboot" | "ostype" | "protection" | "reboot" | "startdate" | "tdf"
        | "template" => Right::Any(&["VM.Config.Options"]),
        "freeze" => Right::Any(&["VM.PowerMgmt"]),
        "boot" | "bootdisk" | "vmstatestorage" => Right::Any(&["VM.Config.Disk"]),
        _ if numbered("net") => Right::Any(&["VM.Config.Network"]),
        _ if cloudinit::is_option(key) => Right::Any(&["VM.Config.Cloudinit", "VM.Config.Network"]),
        _ => Right::Root,
    }
}

/// What a value takes whose right depends on it; `Err` where only root may (`API2/Qemu.pm:$check_drive_perms`,
/// `check_usb_perm`, `check_hostpci_perm`, pve-guest-common `GuestHelpers.pm:assert_tag_permissions`). All are needed.
pub fn right_of_value(key: &str, value: &str) -> Result<&'static [&'static str], PveError> {
    let numbered = |stem: &str| index_of(key, stem).is_some();
    let property = |name: &str| value.split(',').any(|part| part.starts_with(name));
    if key.starts_with("unused") {
        return Ok(&["VM.Config.Disk"]);
    }
    if is_drive_key(key) {
        let drive = Drive::stored(key, value);
        return Ok(match drive {
            Some(drive) if cloudinit::is_drive(&drive.file) => &["VM.Config.Cloudinit", "VM.Config.CDROM"],
            Some(drive) if drive.is_cdrom() => &["VM.Config.CDROM"],
            _ => &["VM.Config.Disk"],
        });
    }
    if key == "tags" {
        return Ok(&["VM.Config.Options"]);
    }
    let virtual_device = (numbered("serial") && value == "socket")
        || (numbered("usb") && (property("host=spice") || property("spice") || property("mapping=")))
        || (numbered("hostpci") && property("mapping="))
        || numbered("virtiofs");
    if virtual_device {
        return Ok(&["VM.Config.HWType"]);
    }
    let what = if numbered("hostpci") { "non-mapped" } else { "real" };
    Err(PveError::die(format!("only root can set '{key}' config for {what} devices")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_ends_at_scsi30() {
        assert_eq!(kind_of("scsi30"), Some(Kind::Drive));
        assert_eq!(kind_of("scsi31"), None);
        assert_eq!(kind_of("scsi01"), None);
        assert_eq!(kind_of("scsi99"), None);
    }

    #[test]
    fn rights_are_those_of_the_key_or_of_its_value() {
        assert_eq!(right("bios"), Right::Any(&["VM.Config.Options"]));
        assert_eq!(right("ipconfig0"), Right::Any(&["VM.Config.Cloudinit", "VM.Config.Network"]));
        for key in ["args", "lock", "hookscript", "vmgenid", "affinity"] {
            assert_eq!(right(key), Right::Root, "{key}");
        }
        let of = |key, value| right_of_value(key, value).map_err(|error| error.message().to_owned());
        assert_eq!(of("ide2", "none,media=cdrom"), Ok(&["VM.Config.CDROM"][..]));
        assert_eq!(of("ide2", "local:cloudinit"), Ok(&["VM.Config.Cloudinit", "VM.Config.CDROM"][..]));
        assert_eq!(of("scsi1", "local:9999/x.raw"), Ok(&["VM.Config.Disk"][..]));
        assert_eq!(of("serial0", "socket"), Ok(&["VM.Config.HWType"][..]));
        assert!(of("serial0", "/dev/ttyS0").is_err());
    }

    #[test]
    fn hotplug_of_disks_is_on_unless_taken_away() {
        assert!(hotplugs_disks(None));
        assert!(hotplugs_disks(Some("network,disk,usb")));
        assert!(!hotplugs_disks(Some("0")));
        assert!(!hotplugs_disks(Some("network,usb")));
    }
}
