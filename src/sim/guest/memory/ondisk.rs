//! File systems as bytes on a disk: superblocks at the real places with the real fields as far as a probe reads them, and behind them the
//! files, in a form of our own.
//!
//! What stands where: Linux `fs/ext4/ext4.h` (`struct ext4_super_block`), `fs/xfs/libxfs/xfs_format.h` (`struct xfs_dsb`),
//! `include/uapi/linux/btrfs_tree.h` (`struct btrfs_super_block`).

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::path::PathBuf;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha1::{Digest as _, Sha1};

use super::device::Storage;
use crate::host::{FsKind, blank::ReadAt, superblock::Superblock};

/// What is at a path of a file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Entry {
    /// A directory.
    Directory,
    /// A file and what it holds.
    File(Vec<u8>),
    /// A symbolic link and where it leads.
    Link(PathBuf),
}

/// Files and directories by their paths within the file system; the root needs no entry.
pub(super) type Tree = BTreeMap<PathBuf, Entry>;

/// All of a file system but what its superblock says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Body {
    /// It was mounted for writing and not unmounted: there is a log to replay.
    pub(super) dirty: bool,
    /// It has the mark of an error.
    pub(super) errors: bool,
    /// It is damaged beyond what is repaired without asking.
    pub(super) damaged: bool,
    pub(super) tree: Tree,
}

/// A file system on a disk.
#[derive(Debug, Clone)]
pub(super) struct OnDisk {
    pub(super) kind: FsKind,
    pub(super) size: u64,
    pub(super) unfinished: bool,
    pub(super) uuid: uuid::Uuid,
    /// An error where it can't be read or makes no sense.
    pub(super) body: std::result::Result<Body, ErrorKind>,
}

/// Where the files are.
const BODY_AT: u64 = 1 << 20;
/// How long they may get.
const BODY_MOST: usize = 6 << 20;
const BODY_MAGIC: &[u8; 8] = b"SIMTREE1";
/// The smallest of each kind that its mkfs makes: mkfs.xfs(8) 300 MB, mkfs.btrfs(8) about 109 MiB, and what the files need.
const fn smallest(kind: FsKind) -> u64 {
    match kind {
        FsKind::Ext4 => 8 << 20,
        FsKind::Xfs => 300 << 20,
        FsKind::Btrfs => 109 << 20,
    }
}

/// Where the superblock of a kind is, where in it the uuid, and where copies of it are on a device of a size.
fn places(kind: FsKind, size: u64) -> (u64, usize, Vec<u64>) {
    const GROUP: u64 = 128 << 20;
    match kind {
        // Groups of 128 MiB with blocks of 4 KiB; the odd ones up to 9 keep copies.
        FsKind::Ext4 => (1024, 0x68, [1, 3, 5, 7, 9].map(|group| group * GROUP).into()),
        // Four allocation groups.
        FsKind::Xfs => (0, 32, [1, 2, 3].map(|group| size / 4 / 4096 * 4096 * group).into()),
        FsKind::Btrfs => (65536, 0x20, vec![64 << 20, 256 << 30]),
    }
}

/// The superblock.
fn head(kind: FsKind, size: u64, uuid: uuid::Uuid, block: u32, unfinished: bool) -> Vec<u8> {
    let (_, at, _) = places(kind, size);
    let mut head = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    let blocks = size / u64::from(block);
    match kind {
        FsKind::Ext4 => {
            let low = u32::try_from(blocks & 0xffff_ffff).unwrap_or_default();
            let high = u32::try_from(blocks >> 32).unwrap_or_default();
            put(0x0, &u32::try_from(size / 16384).unwrap_or(u32::MAX).to_le_bytes());
            put(0x4, &low.to_le_bytes());
            put(0x18, &block.trailing_zeros().saturating_sub(10).to_le_bytes());
            put(0x38, &[0x53, 0xef]);
            put(0x4c, &1u32.to_le_bytes());
            // A journal; extents and 64 bits.
            put(0x5c, &4u32.to_le_bytes());
            put(0x60, &0xc0u32.to_le_bytes());
            put(0x150, &high.to_le_bytes());
        }
        FsKind::Xfs => {
            put(0, b"XFSB");
            put(4, &block.to_be_bytes());
            put(8, &blocks.to_be_bytes());
            put(102, &512u16.to_be_bytes());
            put(126, &[u8::from(unfinished)]);
        }
        FsKind::Btrfs => {
            put(0x40, if unfinished { b"!BHRfS_M" } else { b"_BHRfS_M" });
            put(0x70, &size.to_le_bytes());
        }
    }
    put(at, uuid.as_bytes());
    head
}

/// What mkfs writes first: everything but what makes it a file system. Of an XFS that is a superblock that says so.
pub(super) fn begin(disk: &dyn Storage, kind: FsKind, uuid: uuid::Uuid, block: u32) -> Result<()> {
    let size = disk.size();
    if size < smallest(kind) {
        return Err(Error::new(ErrorKind::InvalidInput, "the device is too small for this file system"));
    }
    let unfinished = head(kind, size, uuid, block, true);
    let (at, _, copies) = places(kind, size);
    for copy in copies.into_iter().filter(|copy| copy + 1024 <= size) {
        disk.write_at(&unfinished, copy)?;
    }
    write_body(disk, &Body::default())?;
    if kind == FsKind::Ext4 { Ok(()) } else { disk.write_at(&unfinished, at) }
}

/// What mkfs writes last.
pub(super) fn finish(disk: &dyn Storage, kind: FsKind, uuid: uuid::Uuid, block: u32) -> Result<()> {
    disk.write_at(&head(kind, disk.size(), uuid, block, false), places(kind, disk.size()).0)
}

/// Makes the file system in its superblock as large as the disk.
pub(super) fn grow(disk: &dyn Storage, found: &OnDisk) -> Result<()> {
    disk.write_at(&head(found.kind, disk.size(), found.uuid, 4096, false), places(found.kind, 0).0)
}

/// The file system on the disk; `None` where there is none.
pub(super) fn read(disk: &dyn ReadAt) -> Result<Option<OnDisk>> {
    let Some(Superblock { kind, size, unfinished }) = Superblock::read(disk)? else { return Ok(None) };
    let (at, uuid_at, _) = places(kind, 0);
    let mut uuid = [0; 16];
    disk.read_exact_at(&mut uuid, at + u64::try_from(uuid_at).unwrap_or_default())?;
    let body = read_body(disk).map_err(|error| error.kind());
    Ok(Some(OnDisk { kind, size: size.get(), unfinished, uuid: uuid::Uuid::from_bytes(uuid), body }))
}

fn read_body(disk: &dyn ReadAt) -> Result<Body> {
    let mut head = [0; 36];
    disk.read_exact_at(&mut head, BODY_AT)?;
    let length = u64::from_le_bytes([8, 9, 10, 11, 12, 13, 14, 15].map(|n| head[n]));
    let length = usize::try_from(length).ok().filter(|length| *length <= BODY_MOST);
    let (Some(length), true) = (length, head.starts_with(BODY_MAGIC)) else {
        return Err(ErrorKind::InvalidData.into());
    };
    let mut text = vec![0; length];
    disk.read_exact_at(&mut text, BODY_AT + 36)?;
    if Sha1::digest(&text)[..] != head[16..] {
        return Err(ErrorKind::InvalidData.into());
    }
    Ok(serde_json::from_slice(&text)?)
}

/// Writes the files and the marks.
pub(super) fn write_body(disk: &dyn Storage, body: &Body) -> Result<()> {
    let text = serde_json::to_vec(body)?;
    if text.len() > BODY_MOST {
        return Err(Errno::NOSPC.into());
    }
    let mut bytes = BODY_MAGIC.to_vec();
    bytes.extend(u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes());
    bytes.extend(Sha1::digest(&text));
    bytes.extend(text);
    disk.write_at(&bytes, BODY_AT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::blank;
    use crate::sim::contents::Image;
    use crate::sim::guest::memory::device::Loose;

    #[test]
    fn what_mkfs_makes_is_read_back_by_the_drivers_own_reader_and_half_of_it_is_no_blank_disk() {
        for kind in [FsKind::Ext4, FsKind::Xfs, FsKind::Btrfs] {
            let image = Image::default();
            let disk = Loose { image: &image, size: 512 << 20 };
            let uuid = uuid::Uuid::from_u128(7);
            begin(&disk, kind, uuid, 4096).expect("it is large enough");
            assert!(blank::prove(&disk).is_err(), "{kind}: half of it is something");
            let half = read(&disk).expect("it can be read");
            assert_eq!(half.map(|half| half.unfinished), (kind == FsKind::Xfs).then_some(true), "{kind}");
            finish(&disk, kind, uuid, 4096).expect("it takes writes");
            let made = read(&disk).expect("it can be read").expect("a file system");
            assert_eq!((made.kind, made.size, made.unfinished, made.uuid), (kind, 512 << 20, false, uuid));
            let mut body = made.body.clone().expect("no files");
            body.tree.insert("/data".into(), Entry::File(b"mine".to_vec()));
            write_body(&disk, &body).expect("it takes writes");
            let larger = Loose { image: &image, size: 1 << 30 };
            grow(&larger, &made).expect("it takes writes");
            let grown = read(&larger).expect("it can be read").expect("a file system");
            assert_eq!((grown.size, grown.body), (1 << 30, Ok(body)));
            image.write(b"x", BODY_AT + 40);
            let torn = read(&larger).expect("it can be read").expect("a file system");
            assert_eq!(torn.body, Err(ErrorKind::InvalidData));
        }
    }
}
