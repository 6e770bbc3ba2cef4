//! Encrypted volumes: LUKS2 on the disk, a mapping of device mapper over it, a file system or a pod's data inside.
//!
//! [`Luks`] is the part of [`super::Host`] that does it. Its model: a blank disk gets a header and is opened; nothing writes through
//! the mapping but mkfs and pods. So behind the header the disk itself stays zero until the first write, since zeros that are
//! written come out as noise. That makes the proof of blankness of an encrypted volume: read what lies behind the header on the
//! disk ([`Behind`]), not what the mapping makes of it.

use std::io;

use super::{
    Answer, DeviceNumber, Disk, Format, OpenDisk,
    blank::{NotBlank, ReadAt},
    error::{DisksError, FormatError, OpenError, ProbeError, ToolError},
};

/// What a header of ours says of who made it. Another one's header in a volume is a pod's own business.
pub const SUBSYSTEM: &str = "proxmox-csi";

/// The key of a volume: bytes as they came, of which none is added, dropped or printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Passphrase(Vec<u8>);

impl Passphrase {
    /// The key.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

/// How a key is made of a passphrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pbkdf {
    /// Takes time and memory; what LUKS2 has by default.
    Argon2id,
    /// Takes time only.
    Pbkdf2,
}

impl Pbkdf {
    /// The name, as cryptsetup says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Argon2id => "argon2id",
            Self::Pbkdf2 => "pbkdf2",
        }
    }
}

/// What it costs to try a passphrase, whoever does it. Written into the header when a volume is encrypted, so that each opening costs
/// the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyCost {
    /// The function.
    pub pbkdf: Pbkdf,
    /// Memory in KiB, of Argon2 only. A container with less than that is killed when it opens the volume.
    pub memory_kib: u32,
    /// How long it is to take, in milliseconds, measured where the volume is encrypted.
    pub time_ms: u32,
    /// Rounds, instead of a measurement.
    pub iterations: Option<u32>,
}

impl Default for KeyCost {
    /// 64 MiB and a second: cryptsetup's own default of up to 1 GiB does not fit into a usual container.
    fn default() -> Self {
        Self { pbkdf: Pbkdf::Argon2id, memory_kib: 64 * 1024, time_ms: 1000, iterations: None }
    }
}

/// An opened encrypted volume: a device over a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Its name in device mapper.
    pub name: String,
    /// The disk under it; `None` where that is gone.
    pub over: Option<DeviceNumber>,
    /// The device: `dm-0`.
    pub device: Disk,
}

/// Encrypted volumes of a node.
pub trait Luks: Send + Sync {
    /// The opened LUKS volumes of the node, whoever opened them.
    fn mappings(&self) -> Answer<'_, Vec<Mapping>, DisksError>;

    /// Writes a LUKS2 header on the disk after proving that the disk holds nothing. Once begun it runs to its end.
    fn encrypt_blank<'a>(
        &'a self,
        disk: &'a OpenDisk,
        key: &'a Passphrase,
        cost: &'a KeyCost,
    ) -> Answer<'a, (), FormatError>;

    /// Opens the encrypted disk under a name.
    fn unlock<'a>(
        &'a self,
        disk: &'a OpenDisk,
        key: &'a Passphrase,
        name: &'a str,
    ) -> Answer<'a, Mapping, UnlockError>;

    /// Opens the device of a mapping, and proves that it is still that mapping's.
    fn open_mapping<'a>(&'a self, mapping: &'a Mapping) -> Answer<'a, OpenDisk, OpenError>;

    /// Makes a file system in the mapping after proving that nothing was ever written through it; as
    /// [`super::Host::format_blank`] else.
    fn format_inside<'a>(
        &'a self,
        disk: &'a OpenDisk,
        mapping: &'a OpenDisk,
        format: &'a Format,
    ) -> Answer<'a, (), FormatError>;

    /// Writes the mapping out and closes it, once nothing in the kernel holds it any more. Succeeds where it is gone.
    fn lock<'a>(&'a self, mapping: &'a Mapping) -> Answer<'a, (), LockError>;

    /// Grows the mapping to its disk's size. The key is needed only for one that keeps it in the kernel's keyring, as the driver before
    /// this one opened them.
    fn grow_mapping<'a>(
        &'a self,
        mapping: &'a Mapping,
        key: Option<&'a Passphrase>,
    ) -> Answer<'a, (), GrowMappingError>;
}

/// Why an encrypted volume was not opened.
#[derive(Debug, thiserror::Error)]
pub enum UnlockError {
    /// The passphrase is not the volume's.
    #[error("the passphrase does not open the encrypted disk `{name}`")]
    WrongPassphrase {
        /// The disk.
        name: String,
    },
    /// cryptsetup failed.
    #[error(
        "cannot open the encrypted disk `{name}`; has the kernel of this VM device mapper and dm-crypt, and the container the host's `/dev`?"
    )]
    Tool {
        /// The disk.
        name: String,
        /// How.
        source: ToolError,
    },
    /// cryptsetup said that all went well, and the mapping is not there, or over another disk.
    #[error("cryptsetup opened disk `{name}`, and `{mapping}` is not there or is over another disk")]
    Vanished {
        /// The disk.
        name: String,
        /// The mapping.
        mapping: String,
    },
    /// The mappings can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
}

/// Why a mapping was not closed.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Something has it mounted or claimed, maybe in another mount namespace.
    #[error("mapping `{name}` is still mounted or claimed after {after:?}{by}")]
    Busy {
        /// The mapping.
        name: String,
        /// How long it was waited for.
        after: std::time::Duration,
        /// Who has it mounted, where that can be seen; begins with a colon.
        by: String,
    },
    /// What was written could not be flushed.
    #[error("cannot flush mapping `{name}`")]
    Flush {
        /// The mapping.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// cryptsetup failed.
    #[error("cannot close mapping `{name}`")]
    Tool {
        /// The mapping.
        name: String,
        /// How.
        source: ToolError,
    },
    /// The mappings can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// It is still there.
    #[error("mapping `{name}` is still there after it was closed")]
    Stays {
        /// The mapping.
        name: String,
    },
}

/// Why a mapping was not grown.
#[derive(Debug, thiserror::Error)]
pub enum GrowMappingError {
    /// The key is in the kernel's keyring and was not given, or is wrong.
    #[error(
        "mapping `{name}` grows with its passphrase only: set `csi.storage.k8s.io/node-expand-secret-name` and `-namespace` for the volume, or delete the pod, which opens the volume anew and in its full size"
    )]
    Passphrase {
        /// The mapping.
        name: String,
        /// What cryptsetup said.
        source: ToolError,
    },
    /// cryptsetup failed.
    #[error("cannot grow mapping `{name}`")]
    Tool {
        /// The mapping.
        name: String,
        /// How.
        source: ToolError,
    },
}

/// Why a LUKS header tells nothing of where the data begins.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It can't be read.
    #[error("cannot read the LUKS header")]
    Read(#[source] io::Error),
    /// It is of another version, or damaged.
    #[error("the LUKS header is not one of LUKS2, or it is damaged")]
    NotLuks2,
    /// What it says is not what cryptsetup writes for a whole disk.
    #[error("the LUKS header does not describe one encrypted segment up to the end of the disk")]
    Segments,
}

impl HeaderError {
    /// The error as one of a proof that failed.
    pub fn no_proof(self, name: &str) -> FormatError {
        let source = io::Error::new(io::ErrorKind::InvalidData, self);
        FormatError::Probe(ProbeError::Superblock { name: name.to_owned(), source })
    }
}

/// Where the binary part ends and the text begins (LUKS2 On-Disk Format Specification 1.1, section 2).
const TEXT_AT: u64 = 4096;
/// The longest header that the specification knows.
const LONGEST: u64 = 4 << 20;

/// Where the data of an encrypted disk begins, in bytes. Only for a header with one segment, of type `crypt` and up to the end.
pub fn data_offset(device: &dyn ReadAt) -> Result<u64, HeaderError> {
    let mut head = [0; 16];
    device.read_exact_at(&mut head, 0).map_err(HeaderError::Read)?;
    if head[..8] != *b"LUKS\xba\xbe\x00\x02" {
        return Err(HeaderError::NotLuks2);
    }
    let length = u64::from_be_bytes([8, 9, 10, 11, 12, 13, 14, 15].map(|n| head[n]));
    if !(TEXT_AT..=LONGEST).contains(&length) {
        return Err(HeaderError::NotLuks2);
    }
    let mut text = vec![0; usize::try_from(length - TEXT_AT).map_err(|_| HeaderError::NotLuks2)?];
    device.read_exact_at(&mut text, TEXT_AT).map_err(HeaderError::Read)?;
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let header: serde_json::Value = serde_json::from_slice(text).map_err(|_| HeaderError::NotLuks2)?;
    let segments = header.get("segments").and_then(|segments| segments.as_object());
    let only = segments.filter(|segments| segments.len() == 1).and_then(|segments| segments.values().next());
    let field = |key| only.and_then(|segment| segment.get(key)).and_then(|value| value.as_str());
    match (field("type"), field("size"), field("offset").map(str::parse)) {
        (Some("crypt"), Some("dynamic"), Some(Ok(offset))) if offset > 0 && offset < device.size() => {
            Ok(offset)
        }
        _ => Err(HeaderError::Segments),
    }
}

/// What lies behind the header of an encrypted disk.
pub struct Behind<'a> {
    device: &'a dyn ReadAt,
    offset: u64,
}

impl<'a> Behind<'a> {
    /// The device from an offset within it on.
    pub fn new(device: &'a dyn ReadAt, offset: u64) -> Self {
        Self { device, offset }
    }
}

impl ReadAt for Behind<'_> {
    fn size(&self) -> u64 {
        self.device.size().saturating_sub(self.offset)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.device.read_exact_at(buffer, offset.saturating_add(self.offset))
    }
}

/// Proves that nothing was ever written through a mapping over the device.
pub fn prove_untouched(device: &dyn ReadAt, name: &str) -> Result<super::blank::Blank, FormatError> {
    let offset = data_offset(device).map_err(|error| error.no_proof(name))?;
    let unproven = |source: NotBlank| FormatError::NotBlank { name: name.to_owned(), source };
    super::blank::prove(&Behind::new(device, offset)).map_err(unproven)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Image(Vec<u8>);

    impl ReadAt for Image {
        fn size(&self) -> u64 {
            u64::try_from(self.0.len()).expect("a length is a u64")
        }

        fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            let start = usize::try_from(offset).expect("a small image");
            let part = self.0.get(start..start + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buffer.copy_from_slice(part);
            Ok(())
        }
    }

    fn image(text: &str) -> Image {
        let mut bytes = vec![0; 1 << 20];
        bytes[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x02");
        bytes[8..16].copy_from_slice(&16384u64.to_be_bytes());
        bytes[4096..4096 + text.len()].copy_from_slice(text.as_bytes());
        Image(bytes)
    }

    const WHOLE: &str = r#"{"segments":{"0":{"type":"crypt","offset":"65536","size":"dynamic"}}}"#;

    #[test]
    fn the_data_of_a_whole_disk_begins_where_the_header_says() {
        assert_eq!(data_offset(&image(WHOLE)).expect("a header"), 65536);
        for other in [
            "",
            "{}",
            r#"{"segments":{}}"#,
            r#"{"segments":{"0":{"type":"crypt","offset":"65536","size":"4096"}}}"#,
            r#"{"segments":{"0":{"type":"linear","offset":"65536","size":"dynamic"}}}"#,
            r#"{"segments":{"0":{"type":"crypt","offset":"1048576","size":"dynamic"}}}"#,
            r#"{"segments":{"0":{"type":"crypt","offset":"65536","size":"dynamic"},"1":{}}}"#,
        ] {
            assert!(data_offset(&image(other)).is_err(), "{other}");
        }
        let mut old = image(WHOLE);
        old.0[7] = 1;
        assert!(matches!(data_offset(&old), Err(HeaderError::NotLuks2)));
    }

    #[test]
    fn p4_a_byte_behind_the_header_is_a_write_through_the_mapping() {
        let mut written = image(WHOLE);
        assert!(prove_untouched(&written, "sda").is_ok());
        written.0[70000] = 1;
        let found = prove_untouched(&written, "sda");
        assert!(
            matches!(found, Err(FormatError::NotBlank { source: NotBlank::Data(4464), .. })),
            "{found:?}"
        );
    }

    #[test]
    fn p9_a_passphrase_is_never_printed() {
        let printed = format!("{:?}", Passphrase::new("s3cret"));
        assert!(!printed.contains("s3cret"), "{printed}");
    }

    proptest! {
        #[test]
        fn no_header_panics(length: u64, text in ".{0,200}") {
            let mut image = image(&text);
            image.0[8..16].copy_from_slice(&length.to_be_bytes());
            let _ = data_offset(&image);
        }
    }
}
