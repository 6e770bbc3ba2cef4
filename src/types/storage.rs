//! Storages and the volumes on them, as Proxmox names them.

use std::{fmt, str::FromStr};

use super::{ParseError, VmId};

/// The id of a Proxmox storage, such as `local-lvm` (pve-storage `Storage/Plugin.pm:parse_storage_id`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorageId(String);

impl StorageId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StorageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for StorageId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let first = text.chars().next().is_some_and(|c| c.is_ascii_alphabetic());
        let last = text.chars().last().is_some_and(|c| c.is_ascii_alphanumeric());
        if text.len() < 2 || text.len() > 100 || !first || !last || !text.chars().all(legal) {
            return Err(ParseError::new(
                "storage id",
                text,
                "it must begin with a letter, end with a letter or digit, and hold letters, digits, `-`, `_`, `.`",
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// The name of a volume on its storage: what stands behind `storage:` in a volid, such as
/// `vm-9999-pvc-1` or `9999/vm-9999-pvc-1.raw`. Slashes are allowed, nothing that could end a
/// property string, a URL or a path component is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName(String);

impl VolumeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The VM that Proxmox takes for the owner of the volume: `9999` of `9999/vm-9999-x.raw` and of `vm-9999-x`, and of linked clones
    /// (`100/base-100-disk-0.raw/9999/vm-9999-x.qcow2`, `base-100-disk-0/vm-9999-x`), which begin with what they were cloned from;
    /// `None` where the name follows no pattern of Proxmox.
    /// Source: pve-storage `parse_volname` of `Storage/Plugin.pm`, `LVMPlugin.pm`, `ZFSPoolPlugin.pm`, `RBDPlugin.pm`.
    pub fn owner(&self) -> Option<VmId> {
        let (directories, last) =
            self.0.rsplit_once('/').map_or((None, self.0.as_str()), |(d, l)| (Some(d), l));
        if let Some(directory) = directories.and_then(|directories| directories.rsplit('/').next()) {
            if let Ok(owner) = directory.parse() {
                return Some(owner);
            }
            // Only a clone of a block volume has its source before it.
            ["base-", "basevol-"].iter().find_map(|prefix| directory.strip_prefix(prefix))?;
        }
        let prefixes = ["vm-", "base-", "subvol-", "basevol-"];
        let rest = prefixes.iter().find_map(|prefix| last.strip_prefix(prefix))?;
        rest.split('-').next()?.parse().ok()
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for VolumeName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = |why| Err(ParseError::new("volume name", text, why));
        let legal =
            |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '+' | '@' | ':');
        if text.is_empty() || text.len() > 255 {
            return err("it must have 1 to 255 characters");
        }
        if !text.chars().all(legal) {
            return err("it may hold letters, digits and `- _ . / + @ :` only");
        }
        if text.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return err("its parts between slashes must not be empty, `.` or `..`");
        }
        Ok(Self(text.to_owned()))
    }
}

/// A volume as Proxmox names it: `storage:name`.
///
/// Two volids of one text on a local storage of two nodes are two volumes; the node is not part of a volid.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolId {
    /// The storage.
    pub storage: StorageId,
    /// The name on that storage.
    pub name: VolumeName,
}

impl fmt::Display for VolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.storage, self.name)
    }
}

impl FromStr for VolId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (storage, name) = text
            .split_once(':')
            .ok_or_else(|| ParseError::new("volid", text, "it must have the form `storage:name`"))?;
        Ok(Self { storage: storage.parse()?, name: name.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_found_in_every_form() {
        for (name, owner) in [
            ("vm-9999-pvc-1", Some(9999)),
            ("9999/vm-9999-pvc-1.raw", Some(9999)),
            ("9999/pvc-1.raw", Some(9999)),
            ("base-100-disk-0", Some(100)),
            ("100/base-100-disk-0.raw/9999/vm-9999-pvc-1.qcow2", Some(9999)),
            ("base-100-disk-0/vm-9999-pvc-1", Some(9999)),
            ("basevol-100-disk-0/subvol-101-disk-0", Some(101)),
            ("pool/vm-9999-pvc-1", None),
            ("my-own-name", None),
            ("vm-x-1", None),
        ] {
            let name: VolumeName = name.parse().expect("a legal name");
            assert_eq!(name.owner().map(VmId::get), owner, "{name}");
        }
    }

    #[test]
    fn names_that_could_leave_their_place_are_refused() {
        for bad in
            ["", "a,b", "a b", "a=b", "../x", "9999/../x", "a//b", "/a", "a/", "a%2f", "a?b", "a#b", "a\nb"]
        {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
        for bad in ["a", "1a", "a b", "a-", "a/b", "a:b", ""] {
            assert!(bad.parse::<StorageId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn volids_print_and_parse() {
        for text in ["local:9999/vm-9999-pvc-1.raw", "thin:vm-9999-pvc-1"] {
            assert_eq!(text.parse::<VolId>().expect("a volid").to_string(), text);
        }
        assert!("local".parse::<VolId>().is_err());
    }
}
