//! The keys of a VM config: their types, and which privilege changes them
//! (qemu-server `QemuServer.pm:$confdesc`, `API2/Qemu.pm:$check_vm_modify_config_perm`).

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

/// Checks an API value of `key` and returns it as the config keeps it.
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

/// Whether a running VM takes and gives disks: feature `disk` of the `hotplug` key, on when the key is unset.
pub fn hotplugs_disks(hotplug: Option<&str>) -> bool {
    match hotplug.unwrap_or("1") {
        "0" => false,
        "1" => true,
        features => features.split(',').any(|feature| feature == "disk"),
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
    matches!(
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

/// The privilege that changing `key` takes; drives and unused volumes are checked on their own, `Err` for keys only
/// root may set.
pub fn privilege(key: &str) -> Result<Option<&'static str>, PveError> {
    Ok(Some(match key {
        _ if is_drive_key(key) => return Ok(None),
        "boot" | "bootdisk" | "vmstatestorage" => "VM.Config.Disk",
        "cpu" | "cores" | "sockets" | "vcpus" | "cpulimit" | "cpuunits" | "numa" | "smp" | "affinity" => {
            "VM.Config.CPU"
        }
        "memory" | "balloon" | "shares" | "hugepages" | "keephugepages" | "allow-ksm" => "VM.Config.Memory",
        "acpi" | "hotplug" | "kvm" | "machine" | "scsihw" | "smbios1" | "tablet" | "vga" | "watchdog"
        | "audio0" | "bios" | "vmgenid" | "arch" | "rng0" => "VM.Config.HWType",
        "args" | "lock" | "hookscript" => {
            return Err(PveError::Status(500, format!("only root can set '{key}' config")));
        }
        "cipassword" | "citype" | "ciuser" | "ciupgrade" | "cicustom" | "nameserver" | "searchdomain"
        | "sshkeys" => "VM.Config.Cloudinit",
        _ if key.starts_with("net") || key.starts_with("ipconfig") => "VM.Config.Network",
        _ => "VM.Config.Options",
    }))
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
    fn hotplug_of_disks_is_on_unless_taken_away() {
        assert!(hotplugs_disks(None));
        assert!(hotplugs_disks(Some("network,disk,usb")));
        assert!(!hotplugs_disks(Some("0")));
        assert!(!hotplugs_disks(Some("network,usb")));
    }
}
