//! The guard before a disk is formatted, as far as it is one decision on every kind of host: what signatures mean, and what may not be
//! formatted. The proof itself is [`super::blank`].

use super::{
    Format, Found, FsKind,
    blank::{Blank, NotBlank},
    error::FormatError,
    luks,
};

/// What a look at a disk's signatures gave, in the words of blkid(8), `-p`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Signs {
    /// `TYPE`
    pub kind: Option<String>,
    /// `USAGE`
    pub usage: Option<String>,
    /// `PTTYPE`
    pub table: Option<String>,
    /// `UUID`
    pub uuid: Option<String>,
    /// `SUBSYSTEM`
    pub subsystem: Option<String>,
}

impl Signs {
    /// What that means. Signs there are: where there are none nobody asks.
    pub fn found(self) -> Found {
        match (self.kind, self.usage, self.table) {
            (Some(name), Some(usage), None) if usage == "filesystem" => {
                Found::Filesystem { name, uuid: self.uuid }
            }
            (Some(name), _, None) if name == "crypto_LUKS" => {
                Found::Luks { ours: self.subsystem.as_deref() == Some(luks::SUBSYSTEM) }
            }
            (Some(name), _, None) => Found::Other(format!("`{name}`")),
            (None, _, Some(table)) => Found::Other(format!("a partition table (`{table}`)")),
            (Some(name), _, Some(table)) => {
                Found::Other(format!("`{name}` and a partition table (`{table}`)"))
            }
            (None, _, None) => Found::Other("something that blkid does not name".to_owned()),
        }
    }
}

/// What was found, in words.
pub fn describe(found: &Found) -> String {
    match found {
        Found::NoSignature => "nothing".to_owned(),
        Found::Filesystem { name, .. } => format!("the file system `{name}`"),
        Found::Unfinished(kind) => format!("{kind} whose mkfs was cut off"),
        Found::Luks { .. } => "an encrypted volume (`crypto_LUKS`)".to_owned(),
        Found::Other(what) => what.clone(),
    }
}

/// Refuses a disk on which there is a signature of anything.
pub fn unsigned(name: &str, found: &Found) -> Result<(), FormatError> {
    match found {
        Found::NoSignature => Ok(()),
        found => Err(FormatError::Holds { name: name.to_owned(), found: describe(found) }),
    }
}

/// Refuses a disk that is not proven to be blank.
pub fn proven(name: &str, proof: Result<Blank, NotBlank>) -> Result<(), FormatError> {
    proof.map(drop).map_err(|source| FormatError::NotBlank { name: name.to_owned(), source })
}

/// Refuses what mkfs has made if it is not what was asked for.
pub fn made(name: &str, kind: FsKind, found: &Found) -> Result<(), FormatError> {
    match found {
        Found::Filesystem { name, .. } if name == kind.as_str() => Ok(()),
        found => Err(FormatError::Vanished { name: name.to_owned(), kind, found: describe(found) }),
    }
}

/// Refuses an XFS that a kernel before 6.12 can't mount: its blocks have to fit into a page there (`fs/xfs/xfs_super.c`,
/// `xfs_fs_fill_super`, ENOSYS). Whatever this kernel can do: once made it is formatted for ever, and a pod of it may go to
/// another node.
pub fn mountable(name: &str, format: &Format, page_size: usize) -> Result<(), FormatError> {
    let above = |size: &u32| usize::try_from(*size).is_ok_and(|size| size > page_size);
    match format.options.block_size.filter(above) {
        Some(block_size) if format.kind == FsKind::Xfs => {
            Err(FormatError::BlockSize { name: name.to_owned(), block_size, page_size })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::params::FilesystemOptions;

    #[test]
    fn an_xfs_whose_blocks_are_above_the_page_size_is_not_made() {
        let refusal = |kind, size| {
            let options = FilesystemOptions { block_size: Some(size), ..FilesystemOptions::default() };
            mountable("sdb", &Format { kind, options }, 4096).err().map(|error| error.to_string())
        };
        assert_eq!(refusal(FsKind::Xfs, 4096), None);
        assert_eq!(refusal(FsKind::Ext4, 8192), None);
        let text = refusal(FsKind::Xfs, 8192).expect("it is refused");
        assert!(text.contains("Linux before 6.12"), "{text}");
    }
}
