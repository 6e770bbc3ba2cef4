//! What volumes hold, one contents for each volume and one for each snapshot, by path: sparse files where the cluster
//! has a directory, blocks in memory where it has none.

mod blocks;
mod files;
mod memory;

pub(crate) use blocks::own;
pub use memory::Image;

use memory::Memory;
use std::io::Result;
use std::path::Path;

/// The contents of a cluster's volumes.
#[derive(Debug)]
pub(crate) enum Contents {
    /// In files. Every call blocks.
    Files,
    /// In memory. No call blocks.
    Memory(Memory),
}

impl Contents {
    /// Contents that need no directory.
    pub(crate) fn in_memory() -> Self {
        Self::Memory(Memory::default())
    }

    /// The contents at a path, where they are in memory.
    pub(crate) fn open(&self, path: &Path) -> Option<Image> {
        match self {
            Self::Files => None,
            Self::Memory(memory) => Some(memory.open(path)),
        }
    }

    /// Makes zeros, or leaves what is there.
    pub(crate) fn make(&self, path: &Path, size: u64) -> Result<()> {
        match self {
            Self::Files => files::make(path, size),
            // What has no entry is zeros.
            Self::Memory(_) => Ok(()),
        }
    }

    /// Makes `to` hold what `from` holds, and zeros behind it up to `size`. What is there is written in place: who has it
    /// open sees the new contents.
    pub(crate) fn copy(&self, from: &Path, to: &Path, size: u64) -> Result<()> {
        match self {
            Self::Files => files::copy(from, to, size),
            Self::Memory(memory) => {
                memory.copy(from, to, size);
                Ok(())
            }
        }
    }

    /// Gives a file or directory another name; one that is not there stays so.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        match self {
            Self::Files => files::rename(from, to),
            Self::Memory(memory) => {
                memory.rename(from, to);
                Ok(())
            }
        }
    }

    /// Makes two files change places.
    pub(crate) fn exchange(&self, one: &Path, other: &Path) -> Result<()> {
        match self {
            Self::Files => files::exchange(one, other),
            Self::Memory(memory) => {
                memory.exchange(one, other);
                Ok(())
            }
        }
    }

    /// Removes a file or a whole directory; returns whether it was there, or may have been.
    pub(crate) fn remove(&self, path: &Path) -> Result<bool> {
        match self {
            Self::Files => files::remove(path),
            Self::Memory(memory) => {
                memory.remove(path);
                Ok(true)
            }
        }
    }

    /// Does to old contents of this size what `lvcreate -Wy --yes` does: the first 4 KiB become zero and signatures go. All
    /// else stays.
    pub(crate) fn wipe_signatures(&self, path: &Path, size: u64) -> Result<()> {
        match self {
            Self::Files => files::wipe_signatures(path),
            Self::Memory(memory) => {
                if let Some(image) = memory.get(path) {
                    signature_spans(size).for_each(|(at, count)| image.write(&vec![0; count], at));
                }
                Ok(())
            }
        }
    }

    /// Writes what `from` holds into `to`, from the offset `at` on and at most `count` bytes of it.
    pub(crate) fn give(&self, from: &Path, to: &Path, at: u64, count: u64) -> Result<()> {
        match self {
            Self::Files => blocks::give(from, to, at, count),
            Self::Memory(memory) => {
                if let Some(source) = memory.get(from) {
                    memory.open(to).put(at, &source, count);
                }
                Ok(())
            }
        }
    }

    /// Sets the size: what is beyond goes, what is missing is zero.
    pub(crate) fn resize(&self, path: &Path, size: u64) -> Result<()> {
        match self {
            Self::Files => files::resize(path, size),
            Self::Memory(memory) => {
                if let Some(image) = memory.get(path) {
                    image.truncate(size);
                }
                Ok(())
            }
        }
    }
}

/// Where signatures of filesystems and the like stand behind the first 4 KiB, counted from the start: md, OCFS2, JFS,
/// reiserfs, btrfs; the backup of a GPT is in the last 512 bytes (util-linux `libblkid/src`).
const SIGNATURES: &[u64] = &[0x1000, 0x2000, 0x8000, 0x10034, 0x10040];

/// The places and lengths that wiping signatures zeroes.
fn signature_spans(end: u64) -> impl Iterator<Item = (u64, usize)> {
    let spans = [(0, 4096), (end.saturating_sub(512), 512)];
    let all = spans.into_iter().chain(SIGNATURES.iter().map(|at| (*at, 16)));
    all.map(move |(at, count)| (at, usize::try_from(end.saturating_sub(at)).unwrap_or(count).min(count)))
}
