//! What the controller tells the node about an attached disk: the publish context.

use std::collections::BTreeMap;

use super::{Bytes, ParseError, ScsiSlot, Wwn};

/// `/dev/disk/by-id/wwn-0x…`: the key and the form that the driver before this one used and stored in `VolumeAttachments`.
pub const DEVICE_PATH_KEY: &str = "DevicePath";
/// The SCSI index of the slot, which is the LUN in the guest.
pub const LUN_KEY: &str = "lun";
/// The size of the volume in bytes, which the device must have at least.
pub const SIZE_KEY: &str = "csi.proxmox.sinextra.dev/size-bytes";
/// What an unwritten block of the volume reads as: see [`Contents`].
pub const CONTENTS_KEY: &str = "csi.proxmox.sinextra.dev/contents";
/// Prefix of [`DEVICE_PATH_KEY`]'s value.
const BY_ID_WWN: &str = "/dev/disk/by-id/wwn-";

/// What a volume holds where nobody has written yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// Zeros: a volume that was allocated blank on a storage that hands out zeroed blocks. It may be formatted once
    /// it is proven blank.
    Blank,
    /// Whatever the blocks held before: thick LVM hands out unwiped extents.
    Unwiped,
    /// Not said: an attachment of the driver before this one, or a volume made from a source. It is mounted if it
    /// holds a file system, and never formatted.
    Unknown,
}

impl Contents {
    fn as_str(self) -> &'static str {
        match self {
            Self::Blank => "blank",
            Self::Unwiped => "unwiped",
            Self::Unknown => "unknown",
        }
    }
}

/// An attached disk as the node has to find it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedDisk {
    /// What the device answers when it is asked who it is.
    pub wwn: Wwn,
    /// The LUN; absent in contexts that are older than the key.
    pub slot: Option<ScsiSlot>,
    /// The size the device must have at least; absent in contexts of the driver before this one.
    pub size: Option<Bytes>,
    /// Whether the disk may be blank, and what that looks like.
    pub contents: Contents,
}

impl PublishedDisk {
    /// The disk as a publish context. The driver before this one can use it as well.
    pub fn to_context(&self) -> BTreeMap<String, String> {
        let mut context = BTreeMap::from([
            (DEVICE_PATH_KEY.to_owned(), format!("{BY_ID_WWN}{}", self.wwn)),
            (CONTENTS_KEY.to_owned(), self.contents.as_str().to_owned()),
        ]);
        if let Some(slot) = self.slot {
            context.insert(LUN_KEY.to_owned(), slot.index().to_string());
        }
        if let Some(size) = self.size {
            context.insert(SIZE_KEY.to_owned(), size.get().to_string());
        }
        context
    }

    /// Reads a publish context, also one that the driver before this one wrote.
    pub fn from_context(context: &BTreeMap<String, String>) -> Result<Self, ParseError> {
        let path = context.get(DEVICE_PATH_KEY).map_or("", String::as_str);
        let wwn = path
            .strip_prefix(BY_ID_WWN)
            .ok_or_else(|| {
                ParseError::new("publish context", path, "`DevicePath` must be /dev/disk/by-id/wwn-0x…")
            })?
            .parse()?;
        let slot = match context.get(LUN_KEY) {
            Some(lun) => Some(
                lun.parse()
                    .ok()
                    .and_then(ScsiSlot::new)
                    .ok_or_else(|| ParseError::new("publish context", lun, "`lun` must be 0 to 30"))?,
            ),
            None => None,
        };
        let size = match context.get(SIZE_KEY) {
            Some(size) => Some(size.parse()?),
            None => None,
        };
        let contents = match context.get(CONTENTS_KEY).map(String::as_str) {
            Some("blank") => Contents::Blank,
            Some("unwiped") => Contents::Unwiped,
            _ => Contents::Unknown,
        };
        Ok(Self { wwn, slot, size, contents })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_read_back() {
        let disk = PublishedDisk {
            wwn: "0x3c51aabbccddeeff".parse().expect("a name"),
            slot: ScsiSlot::new(3),
            size: Some(Bytes::GIB),
            contents: Contents::Blank,
        };
        assert_eq!(PublishedDisk::from_context(&disk.to_context()), Ok(disk));
    }

    #[test]
    fn a_context_of_the_driver_before_is_served() {
        let context = BTreeMap::from([
            ("DevicePath".to_owned(), "/dev/disk/by-id/wwn-0x5056432d49443031".to_owned()),
            ("lun".to_owned(), "1".to_owned()),
        ]);
        let disk = PublishedDisk::from_context(&context).expect("an old context");
        assert_eq!(
            (disk.wwn.legacy_slot(), disk.size, disk.contents),
            (ScsiSlot::new(1), None, Contents::Unknown)
        );
        assert!(PublishedDisk::from_context(&BTreeMap::new()).is_err());
    }
}
