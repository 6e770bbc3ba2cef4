//! Contents of volumes in memory: what was written, in blocks, and zeros everywhere else. A copy shares its blocks until one side writes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a block.
const BLOCK: usize = 4096;

/// The contents of one volume; clones are handles to the same contents, as open files are. Reading beyond what was written gives zeros:
/// how long the volume is is said elsewhere.
#[derive(Debug, Clone, Default)]
pub struct Image(Arc<Mutex<Blocks>>);

/// Blocks that hold anything but zeros, by number.
type Blocks = BTreeMap<u64, Arc<[u8; BLOCK]>>;

fn place(offset: u64) -> (u64, usize) {
    let block = u64::try_from(BLOCK).unwrap_or(u64::MAX);
    (offset / block, usize::try_from(offset % block).unwrap_or_default())
}

impl Image {
    fn lock(&self) -> MutexGuard<'_, Blocks> {
        // Blocks are replaced whole: a panic elsewhere leaves them as good as before.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills the buffer with what is at the offset.
    pub fn read(&self, buffer: &mut [u8], offset: u64) {
        buffer.fill(0);
        let blocks = self.lock();
        let (first, skip) = place(offset);
        let (last, _) = place(offset.saturating_add(u64::try_from(buffer.len()).unwrap_or(u64::MAX)));
        for (number, block) in blocks.range(first..=last) {
            // Where the block begins in the buffer; the first one may begin before it.
            let begin = usize::try_from((number - first).saturating_mul(4096)).unwrap_or(usize::MAX);
            let (to, from) = if begin < skip { (0, skip - begin) } else { (begin - skip, 0) };
            let Some(to) = buffer.get_mut(to..) else { break };
            let length = to.len().min(BLOCK - from);
            to[..length].copy_from_slice(&block[from..from + length]);
        }
    }

    /// Writes bytes at the offset.
    pub fn write(&self, bytes: &[u8], offset: u64) {
        let mut blocks = self.lock();
        let (mut number, mut skip) = place(offset);
        let mut rest = bytes;
        while !rest.is_empty() {
            let (part, more) = rest.split_at(rest.len().min(BLOCK - skip));
            let mut block = blocks.get(&number).map_or([0; BLOCK], |block| **block);
            block[skip..skip + part.len()].copy_from_slice(part);
            if block.iter().all(|byte| *byte == 0) {
                blocks.remove(&number);
            } else {
                blocks.insert(number, Arc::new(block));
            }
            (number, skip, rest) = (number + 1, 0, more);
        }
    }

    /// Makes it hold, from the offset on, what another one holds in its first `count` bytes.
    pub fn put(&self, at: u64, from: &Self, count: u64) {
        let blocks = from.lock().clone();
        let size = u64::try_from(BLOCK).unwrap_or(u64::MAX);
        for (number, block) in blocks {
            let offset = number.saturating_mul(size);
            let left = usize::try_from(count.saturating_sub(offset)).unwrap_or(BLOCK).min(BLOCK);
            self.write(&block[..left], at.saturating_add(offset));
        }
    }

    /// Drops what is at the offset and beyond.
    pub fn truncate(&self, size: u64) {
        let (number, keep) = place(size);
        let mut blocks = self.lock();
        let mut beyond = blocks.split_off(&number);
        if keep > 0
            && let Some(mut block) = beyond.remove(&number).map(|block| *block)
        {
            block[keep..].fill(0);
            if block.iter().any(|byte| *byte != 0) {
                blocks.insert(number, Arc::new(block));
            }
        }
    }

    /// Whether everything is zero.
    pub fn is_blank(&self) -> bool {
        self.lock().is_empty()
    }

    /// A copy of what is there now, which changes no more with it.
    #[must_use]
    pub fn snapshot(&self) -> Self {
        Self(Arc::new(Mutex::new(self.lock().clone())))
    }

    /// Makes it hold what another one holds.
    pub fn restore(&self, from: &Self) {
        let blocks = from.lock().clone();
        *self.lock() = blocks;
    }

    /// Whether both hold the same.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || {
            let theirs = other.lock().clone();
            *self.lock() == theirs
        }
    }
}

/// The contents of all volumes of a cluster, by the path that a file with them would have. What was never opened or copied has no entry
/// and holds zeros.
#[derive(Debug, Default)]
pub(crate) struct Memory(Mutex<BTreeMap<PathBuf, Image>>);

impl Memory {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Image>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The contents at a path, to be read and written. Who has them keeps them when they get another name or none.
    pub(crate) fn open(&self, path: &Path) -> Image {
        self.lock().entry(path.to_owned()).or_default().clone()
    }

    pub(super) fn copy(&self, from: &Path, to: &Path, size: u64) {
        let mut images = self.lock();
        let source = images.get(from).cloned();
        match (source, images.get(to).cloned()) {
            (None, None) => {}
            (None, Some(target)) => target.truncate(0),
            (Some(source), target) => {
                let target = target.unwrap_or_default();
                target.restore(&source);
                target.truncate(size);
                images.insert(to.to_owned(), target);
            }
        }
    }

    /// Gives what is at a path, and below it, another name.
    pub(super) fn rename(&self, from: &Path, to: &Path) {
        let mut images = self.lock();
        for path in below(&images, from) {
            let new = path.strip_prefix(from).map(|rest| to.join(rest)).unwrap_or_default();
            // Joined with nothing, a path gets a slash at its end, which compares equal to none.
            if let Some(image) = images.remove(&path) {
                images.insert(new, image);
            }
        }
    }

    pub(super) fn exchange(&self, one: &Path, other: &Path) {
        let mut images = self.lock();
        let (first, second) = (images.remove(one), images.remove(other));
        images.extend(first.map(|image| (other.to_owned(), image)));
        images.extend(second.map(|image| (one.to_owned(), image)));
    }

    pub(super) fn remove(&self, path: &Path) {
        let mut images = self.lock();
        for path in below(&images, path) {
            images.remove(&path);
        }
    }

    /// The contents at a path, if it has any.
    pub(super) fn get(&self, path: &Path) -> Option<Image> {
        self.lock().get(path).cloned()
    }
}

/// The paths at and below one.
fn below(images: &BTreeMap<PathBuf, Image>, path: &Path) -> Vec<PathBuf> {
    let from = images.range(path.to_owned()..).map(|(path, _)| path);
    from.take_while(|other| other.starts_with(path)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_open_stays_open_under_every_name() {
        let memory = Memory::default();
        let [a, b] = ["s/a", "s/b"].map(Path::new);
        let open = memory.open(a);
        open.write(b"mine", 10);
        memory.copy(a, Path::new("s/snapshots/a/one"), 1 << 20);
        memory.rename(a, b);
        open.write(b"more", 20);
        let mut read = [0; 14];
        memory.open(b).read(&mut read, 10);
        assert_eq!(&read, b"mine\0\0\0\0\0\0more");
        memory.copy(Path::new("s/snapshots/a/one"), b, 1 << 20);
        open.read(&mut read, 10);
        assert_eq!(&read, b"mine\0\0\0\0\0\0\0\0\0\0", "rolled back under the one who has it open");
        memory.remove(Path::new("s/snapshots/a"));
        assert!(memory.get(Path::new("s/snapshots/a/one")).is_none());
        memory.exchange(b, a);
        assert!(memory.get(b).is_none() && memory.open(a).is_same(&open));
        memory.remove(a);
        assert!(!open.is_blank() && memory.open(a).is_blank());
    }

    proptest! {
        #[test]
        fn an_image_reads_as_a_flat_file_would(
            acts in proptest::collection::vec((0u64..20_000, proptest::collection::vec(0u8..3, 0..9000), any::<bool>()), 0..12),
            at in 0u64..20_000,
            length in 0usize..12_000,
        ) {
            let (image, mut flat) = (Image::default(), vec![0u8; 64 << 10]);
            for (offset, bytes, cut) in acts {
                let start = usize::try_from(offset).expect("small");
                if cut {
                    image.truncate(offset);
                    flat[start..].fill(0);
                } else {
                    image.write(&bytes, offset);
                    flat[start..start + bytes.len()].copy_from_slice(&bytes);
                }
            }
            let start = usize::try_from(at).expect("small");
            let mut read = vec![1; length];
            image.read(&mut read, at);
            prop_assert_eq!(&read, &flat[start..start + length]);
            prop_assert_eq!(image.is_blank(), flat.iter().all(|byte| *byte == 0));
        }
    }
}
