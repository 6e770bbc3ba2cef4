//! What the superblock of a file system says of its size.

use std::io;

use super::{FsKind, blank::ReadAt};
use crate::types::Bytes;

/// Where the superblock of a btrfs is.
const BTRFS_AT: u64 = 65536;

/// The head of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Which file system.
    pub kind: FsKind,
    /// Its size.
    pub size: Bytes,
    /// Whether its mkfs has not ended. Only XFS says.
    pub unfinished: bool,
}

impl Superblock {
    /// Reads the superblock at the head of a device; `None` where it is of no file system we format with.
    ///
    /// Source: Linux `fs/ext4/ext4.h` (`struct ext4_super_block`), `fs/xfs/libxfs/xfs_format.h` (`struct xfs_dsb`),
    /// `include/uapi/linux/btrfs_tree.h` (`struct btrfs_super_block`).
    pub fn read(device: &dyn ReadAt) -> io::Result<Option<Self>> {
        let mut head = [0; 4096];
        device.read_exact_at(&mut head, 0)?;
        let found = Self::parse(&head)?;
        if found.is_some() || device.size() < BTRFS_AT + 4096 {
            return Ok(found);
        }
        device.read_exact_at(&mut head, BTRFS_AT)?;
        Ok(Self::parse_btrfs(&head))
    }

    fn parse_btrfs(head: &[u8; 4096]) -> Option<Self> {
        if head[0x40..0x48] != *b"_BHRfS_M" {
            return None;
        }
        let size = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n| head[0x70 + n]));
        Some(Self { kind: FsKind::Btrfs, size: Bytes::new(size), unfinished: false })
    }

    fn parse(head: &[u8; 4096]) -> io::Result<Option<Self>> {
        let little = |offset: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| head[1024 + offset + n]));
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "the superblock states an impossible size");
        if head.starts_with(b"XFSB") {
            let block = u64::from(u32::from_be_bytes([4, 5, 6, 7].map(|n| head[n])));
            let blocks = u64::from_be_bytes([8, 9, 10, 11, 12, 13, 14, 15].map(|n| head[n]));
            let size = blocks.checked_mul(block).ok_or_else(wrong)?;
            return Ok(Some(Self { kind: FsKind::Xfs, size: Bytes::new(size), unfinished: head[126] == 1 }));
        }
        if head[1024 + 0x38..1024 + 0x3a] == [0x53, 0xef] {
            let bits = little(0x18).saturating_add(10);
            if bits > 16 {
                return Err(wrong());
            }
            let wide = little(0x60) & 0x80 != 0;
            let blocks = u64::from(little(0x4)) | if wide { u64::from(little(0x150)) << 32 } else { 0 };
            let size = blocks.checked_mul(1 << bits).ok_or_else(wrong)?;
            return Ok(Some(Self { kind: FsKind::Ext4, size: Bytes::new(size), unfinished: false }));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_size_of_every_kind_is_read() {
        let mut xfs = [0; 4096];
        xfs[..4].copy_from_slice(b"XFSB");
        xfs[4..8].copy_from_slice(&4096u32.to_be_bytes());
        xfs[8..16].copy_from_slice(&262_144u64.to_be_bytes());
        let read = Superblock::parse(&xfs).expect("a legal superblock").expect("xfs");
        assert_eq!((read.kind, read.size, read.unfinished), (FsKind::Xfs, Bytes::GIB, false));
        xfs[126] = 1;
        assert!(Superblock::parse(&xfs).expect("a legal superblock").expect("xfs").unfinished);

        let mut ext4 = [0; 4096];
        ext4[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
        ext4[1024 + 0x4..1024 + 0x8].copy_from_slice(&262_144u32.to_le_bytes());
        ext4[1024 + 0x18] = 2;
        let read = Superblock::parse(&ext4).expect("a legal superblock").expect("ext4");
        assert_eq!((read.kind, read.size), (FsKind::Ext4, Bytes::GIB));

        let mut btrfs = [0; 4096];
        btrfs[0x40..0x48].copy_from_slice(b"_BHRfS_M");
        btrfs[0x70..0x78].copy_from_slice(&(1u64 << 30).to_le_bytes());
        let read = Superblock::parse_btrfs(&btrfs).expect("btrfs");
        assert_eq!((read.kind, read.size), (FsKind::Btrfs, Bytes::GIB));
    }

    proptest! {
        #[test]
        fn no_superblock_panics(bytes in proptest::collection::vec(any::<u8>(), 1024), xfs: bool) {
            let mut head = [0; 4096];
            head[..1024].copy_from_slice(&bytes);
            head[1024..2048].copy_from_slice(&bytes);
            head[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
            if xfs {
                head[..4].copy_from_slice(b"XFSB");
            }
            let _ = Superblock::parse(&head);
        }
    }
}
