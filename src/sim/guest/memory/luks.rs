//! Encrypted volumes: a LUKS2 header in the real form as far as the driver and a probe read it, and mappings of device mapper.
//!
//! LUKS2 On-Disk Format Specification 1.1, section 2: the binary part, the text behind it, and a second copy. The passphrase stands in
//! it as a salted hash; the cipher is none ([`super::device`]).

use std::io::Result;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::device::{Device, Loose, Storage};
use super::kernel::Kernel;
use crate::host::{
    DeviceNumber, Disk,
    blank::ReadAt,
    luks::{Mapping, Passphrase, SUBSYSTEM, data_offset},
};
use crate::sim::contents::Image;
use crate::types::Bytes;

/// An opened volume.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) name: String,
    pub(super) device: Arc<Device>,
}

const HEADER: u64 = 16 << 10;
const DATA: u64 = 16 << 20;

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn check_of(uuid: &str, key: &Passphrase) -> String {
    hex(&Sha256::new().chain_update(uuid).chain_update(key.as_bytes()).finalize())
}

/// What luksFormat writes first: key material, and the second header.
pub(super) fn begin(disk: &dyn Storage, uuid: &str, key: &Passphrase, ours: bool) -> Result<()> {
    disk.write_at(check_of(uuid, key).as_bytes(), 2 * HEADER)?;
    disk.write_at(&header(b"SKUL\xba\xbe", uuid, key, ours), HEADER)
}

/// What luksFormat writes last.
pub(super) fn finish(disk: &dyn Storage, uuid: &str, key: &Passphrase, ours: bool) -> Result<()> {
    disk.write_at(&header(b"LUKS\xba\xbe", uuid, key, ours), 0)
}

fn header(magic: &[u8], uuid: &str, key: &Passphrase, ours: bool) -> Vec<u8> {
    let mut header = vec![0; usize::try_from(HEADER).unwrap_or_default()];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, magic);
    put(6, &2u16.to_be_bytes());
    put(8, &HEADER.to_be_bytes());
    put(168, uuid.as_bytes());
    if ours {
        put(208, SUBSYSTEM.as_bytes());
    }
    let text = serde_json::json!({
        "keyslots": { "0": { "type": "luks2", "check": check_of(uuid, key) } },
        "segments": { "0": {
            "type": "crypt", "offset": DATA.to_string(), "size": "dynamic", "encryption": "aes-xts-plain64",
        } },
    });
    put(4096, text.to_string().as_bytes());
    header
}

/// Why a volume does not open.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    WrongPassphrase,
    NoHeader,
}

/// Where the data begins and the key to it, if the passphrase is the volume's.
fn key_of(disk: &dyn ReadAt, key: &Passphrase) -> std::result::Result<(u64, u64), Refused> {
    let offset = data_offset(disk).map_err(|_| Refused::NoHeader)?;
    let mut head = vec![0; usize::try_from(HEADER).unwrap_or_default()];
    disk.read_exact_at(&mut head, 0).map_err(|_| Refused::NoHeader)?;
    let uuid = head.get(168..204).map(|uuid| String::from_utf8_lossy(uuid).into_owned()).unwrap_or_default();
    let text = head.get(4096..).and_then(|text| text.split(|byte| *byte == 0).next()).unwrap_or_default();
    let text: serde_json::Value = serde_json::from_slice(text).map_err(|_| Refused::NoHeader)?;
    let check = check_of(&uuid, key);
    if text["keyslots"]["0"]["check"] != check.as_str() {
        return Err(Refused::WrongPassphrase);
    }
    let word = check.get(..16).and_then(|word| u64::from_str_radix(word, 16).ok()).unwrap_or_default();
    Ok((offset, word))
}

/// Encrypts the contents of a volume that no VM has plugged in; `ours`: as this driver does it.
pub(super) fn encrypt(image: &Image, size: u64, passphrase: &[u8], ours: bool) -> Result<()> {
    let (disk, key) = (Loose { image, size }, Passphrase::new(passphrase));
    let uuid = "6d1f2c3a-0000-4000-8000-0123456789ab";
    begin(&disk, uuid, &key, ours)?;
    finish(&disk, uuid, &key, ours)
}

/// Whether the passphrase opens the contents of a volume.
pub(super) fn opens(image: &Image, size: u64, passphrase: &[u8]) -> bool {
    key_of(&Loose { image, size }, &Passphrase::new(passphrase)).is_ok()
}

impl Kernel {
    /// The opened volumes.
    pub(super) fn opened(&self) -> Vec<Mapping> {
        self.mappings.iter().map(Self::as_mapping).collect()
    }

    fn as_mapping(opened: &Opened) -> Mapping {
        let device = &opened.device;
        Mapping {
            name: opened.name.clone(),
            over: device.over().filter(|(over, _)| over.is_there()).map(|(over, _)| over.number),
            device: Disk {
                name: device.name.clone(),
                number: device.number,
                wwn: None,
                lun: None,
                size: Bytes::new(device.size()),
                readonly: device.is_readonly(),
                virtio: false,
            },
        }
    }

    /// Opens an encrypted device under a name that is free.
    pub(super) fn unlock(
        &mut self,
        disk: &Arc<Device>,
        key: &Passphrase,
        name: &str,
    ) -> std::result::Result<Mapping, Refused> {
        let (offset, key) = key_of(&**disk, key)?;
        let taken = |index: &u32| self.mappings.iter().any(|other| other.device.number.minor == *index);
        let index = (0..u32::MAX).find(|index| !taken(index)).unwrap_or_default();
        let number = DeviceNumber { major: 253, minor: index };
        let dm = format!("dm-{index}");
        self.nodes.insert(dm.clone(), number);
        let device = Arc::new(Device::mapping(dm, number, Arc::clone(disk), offset, key));
        let opened = Opened { name: name.to_owned(), device };
        let mapping = Self::as_mapping(&opened);
        self.mappings.push(opened);
        Ok(mapping)
    }

    /// The mapping, if it is still the one that was listed.
    pub(super) fn same_mapping(&self, mapping: &Mapping) -> Option<&Opened> {
        let same = |own: &&Opened| own.name == mapping.name && own.device.number == mapping.device.number;
        self.mappings.iter().find(same)
    }

    /// Closes a mapping.
    pub(super) fn close(&mut self, name: &str) {
        if let Some(at) = self.mappings.iter().position(|mapping| mapping.name == name) {
            let closed = self.mappings.remove(at);
            closed.device.goes();
            self.nodes.remove(&closed.device.name);
        }
    }
}
