//! The config file of a VM: current values, `[PENDING]`, snapshots, and the digest over all of it
//! (qemu-server `QemuServer.pm:write_vm_config`, `parse_vm_config`).

use super::drive::{Drive, is_drive_key};
use super::{cloudinit, pending};
use sha1::{Digest as _, Sha1};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Key and value pairs of a section.
pub type Values = BTreeMap<String, String>;

/// A VM config.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Conf {
    /// What the VM has.
    pub current: Values,
    /// What it is to have at its next start.
    pub pending: Values,
    /// Keys it is to lose at its next start; `true` where the volume is to be destroyed too.
    pub pending_delete: BTreeMap<String, bool>,
    /// What the cloud-init drive has where it differs from the current values, and under `added` what it lacks.
    #[serde(default)]
    pub cloudinit: Values,
    /// Snapshot sections by name.
    pub snapshots: BTreeMap<String, Values>,
}

/// PVE's escape for the description (pve-common `Tools.pm:encode_text`): `%`, control characters and colons.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '%' || c == ':' || c.is_control() {
            let mut buffer = [0; 4];
            for byte in c.encode_utf8(&mut buffer).bytes() {
                let _ = write!(out, "%{byte:02X}");
            }
        } else {
            out.push(c);
        }
    }
    out
}

fn decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn write_section(out: &mut String, values: &Values, description_as_comment: bool) {
    if let Some(description) = values.get("description") {
        if description_as_comment {
            for line in description.split('\n') {
                let _ = writeln!(out, "#{}", encode(line));
            }
        } else {
            let _ = writeln!(out, "description: {}", encode(description));
        }
    }
    for (key, value) in values.iter().filter(|(key, _)| *key != "description") {
        let _ = writeln!(out, "{key}: {value}");
    }
}

impl Conf {
    /// The file's text (`QemuServer.pm:write_vm_config`).
    pub fn render(&self) -> String {
        let mut out = String::new();
        write_section(&mut out, &self.current, true);
        if self.has_pending() {
            out.push_str("\n[PENDING]\n");
            let mut values = self.pending.clone();
            if !self.pending_delete.is_empty() {
                values.insert("delete".to_owned(), pending::print_delete(&self.pending_delete));
            }
            write_section(&mut out, &values, false);
        }
        if !self.cloudinit.is_empty() && cloudinit::drive_of(&self.current, None).is_some() {
            out.push_str("\n[special:cloudinit]\n");
            write_section(&mut out, &self.cloudinit, false);
        }
        for (name, values) in &self.snapshots {
            let _ = write!(out, "\n[{name}]\n");
            write_section(&mut out, values, true);
        }
        out
    }

    /// Reads what `render` wrote (`QemuServer.pm:parse_vm_config`).
    pub fn parse(text: &str) -> Self {
        enum Section {
            Current,
            Pending,
            CloudInit,
            Snapshot(String),
        }
        let mut conf = Self::default();
        let mut section = Section::Current;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                section = match name {
                    "PENDING" => Section::Pending,
                    "special:cloudinit" => Section::CloudInit,
                    name => {
                        conf.snapshots.entry(name.to_owned()).or_default();
                        Section::Snapshot(name.to_owned())
                    }
                };
                continue;
            }
            let values = match &section {
                Section::Current => &mut conf.current,
                Section::Pending => &mut conf.pending,
                Section::CloudInit => &mut conf.cloudinit,
                Section::Snapshot(name) => conf.snapshots.entry(name.clone()).or_default(),
            };
            if let Some(comment) = line.strip_prefix('#') {
                let comment = decode(comment);
                values
                    .entry("description".to_owned())
                    .and_modify(|text| {
                        text.push('\n');
                        text.push_str(&comment);
                    })
                    .or_insert(comment);
            } else if let Some((key, value)) = line.split_once(": ") {
                let value = if key == "description" { decode(value) } else { value.to_owned() };
                values.insert(key.to_owned(), value);
            }
        }
        if let Some(list) = conf.pending.remove("delete") {
            conf.pending_delete = pending::parse_delete(&list);
        }
        conf
    }

    /// SHA-1 of the file, the compare-and-swap token of every config call (`QemuServer.pm:parse_vm_config`).
    pub fn digest(&self) -> String {
        Sha1::digest(self.render()).iter().fold(String::with_capacity(40), |mut out, byte| {
            let _ = write!(out, "{byte:02x}");
            out
        })
    }

    /// Whether anything waits for the next start.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty() || !self.pending_delete.is_empty()
    }

    /// The config as `GET config` shows it: pending values on top, keys with a pending delete gone
    /// (pve-guest-common `AbstractConfig.pm:load_current_config`).
    pub fn merged(&self) -> Values {
        let mut values = self.current.clone();
        values.retain(|key, _| !self.pending_delete.contains_key(key));
        values.extend(self.pending.iter().map(|(key, value)| (key.clone(), value.clone())));
        values
    }

    /// The disks of a section by key, without CD-ROMs and unused volumes (pve-guest-common
    /// `AbstractConfig.pm:foreach_volume`).
    pub fn disks(values: &Values) -> impl Iterator<Item = (&str, Drive)> {
        values.iter().filter(|(key, _)| is_drive_key(key) && !key.starts_with("unused")).filter_map(
            |(key, value)| {
                Drive::stored(key, value).filter(|drive| !drive.is_cdrom()).map(|drive| (key.as_str(), drive))
            },
        )
    }

    /// Drops `unusedN` keys whose volume is in use again, as every write does (`QemuServer.pm:write_vm_config`).
    pub fn tidy(&mut self) {
        let mut used: Vec<String> = Self::disks(&self.current).map(|(_, drive)| drive.file).collect();
        used.extend(Self::disks(&self.pending).map(|(_, drive)| drive.file));
        self.current.retain(|key, value| !(key.starts_with("unused") && used.contains(value)));
    }

    /// Whether a snapshot other than `except` holds the volume (`QemuServer/Drive.pm:is_volume_in_use`).
    pub fn in_snapshot(&self, file: &str) -> bool {
        self.snapshots.values().any(|values| Self::disks(values).any(|(_, drive)| drive.file == file))
    }

    /// The boot order, from `boot: order=scsi0;net0` (`QemuServer.pm:$boot_fmt`).
    pub fn boot_order(&self) -> Vec<String> {
        self.current
            .get("boot")
            .and_then(|boot| boot.strip_prefix("order="))
            .map(|order| order.split(';').filter(|part| !part.is_empty()).map(str::to_owned).collect())
            .unwrap_or_default()
    }

    /// The SMBIOS uuid of the VM.
    pub fn uuid(&self) -> Option<&str> {
        self.current.get("smbios1")?.split(',').find_map(|part| part.strip_prefix("uuid="))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values() -> impl Strategy<Value = Values> {
        let value = "[a-zA-Z0-9=,;:./@-]{1,30}";
        let described = proptest::option::of("[a-z%: \n]{0,20}");
        (proptest::collection::btree_map("(name|memory|scsi[0-9]|net0|tags)", value, 0..5), described)
            .prop_map(|(mut values, description)| {
                values.extend(description.map(|text| ("description".to_owned(), text)));
                values
            })
    }

    fn conf() -> impl Strategy<Value = Conf> {
        let deletes = proptest::collection::btree_map("scsi[0-9]", any::<bool>(), 0..3);
        let snapshots = proptest::collection::btree_map("[a-z][a-z0-9]{1,6}", values(), 0..2);
        let notes = proptest::collection::btree_map("(ciuser|added|ipconfig0)", "[a-z0-9=.,]{1,9}", 0..3);
        (values(), values(), deletes, notes, snapshots).prop_map(
            |(mut current, pending, pending_delete, cloudinit, snapshots)| {
                if !cloudinit.is_empty() {
                    current
                        .insert("ide2".to_owned(), "local:100/vm-100-cloudinit.qcow2,media=cdrom".to_owned());
                }
                Conf { current, pending, pending_delete, cloudinit, snapshots }
            },
        )
    }

    proptest! {
        #[test]
        fn a_config_written_is_a_config_read(conf in conf()) {
            prop_assert_eq!(Conf::parse(&conf.render()), conf);
        }

        #[test]
        fn the_digest_changes_with_the_file_only(a in conf(), b in conf()) {
            prop_assert_eq!(a.digest() == b.digest(), a == b);
            prop_assert_eq!(a.digest(), Conf::parse(&a.render()).digest());
        }
    }

    #[test]
    fn pending_changes_change_the_digest() {
        let mut conf = Conf::default();
        conf.current.insert("name".to_owned(), "w1".to_owned());
        let before = conf.digest();
        conf.pending_delete.insert("scsi1".to_owned(), false);
        assert_ne!(conf.digest(), before);
        conf.pending_delete.clear();
        assert_eq!(conf.digest(), before);
    }
}
