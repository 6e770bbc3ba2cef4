//! Block devices of the kernel: a SCSI disk over the contents of a volume, or the mapping of an encrypted one over such a disk.

use std::io::Result;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use crate::host::{DeviceNumber, blank::ReadAt};
use crate::sim::contents::Image;

/// Something that can be written at any place as well.
pub(super) trait Storage: ReadAt {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()>;
}

/// The contents of a volume that no VM has plugged in.
pub(super) struct Loose<'a> {
    pub(super) image: &'a Image,
    pub(super) size: u64,
}

impl ReadAt for Loose<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        within(self.size, offset, buffer.len())?;
        self.image.read(buffer, offset);
        Ok(())
    }
}

impl Storage for Loose<'_> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        within(self.size, offset, bytes.len()).map_err(|_| Errno::NOSPC)?;
        self.image.write(bytes, offset);
        Ok(())
    }
}

fn within(size: u64, offset: u64, length: usize) -> Result<()> {
    let end = u64::try_from(length).ok().and_then(|length| offset.checked_add(length));
    if end.is_some_and(|end| end <= size) { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

/// What a device's bytes are.
#[derive(Debug)]
enum Under {
    Disk(Image),
    /// What lies behind the header of another device, in cipher.
    Mapping {
        over: Arc<Device>,
        offset: u64,
        key: u64,
    },
}

/// A block device that the kernel has, or had as long as somebody holds it.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) number: DeviceNumber,
    under: Under,
    alive: AtomicBool,
    readonly: AtomicBool,
    size: AtomicU64,
    /// Places that answer with an error.
    broken: Mutex<Vec<Range<u64>>>,
    /// Counts those that have its node open.
    opens: Mutex<Arc<()>>,
}

impl Device {
    pub(super) fn disk(name: String, number: DeviceNumber, image: Image, size: u64, readonly: bool) -> Self {
        Self::new(name, number, Under::Disk(image), size, readonly)
    }

    /// The mapping over a device, from `offset` of it on.
    pub(super) fn mapping(
        name: String,
        number: DeviceNumber,
        over: Arc<Self>,
        offset: u64,
        key: u64,
    ) -> Self {
        let (size, readonly) = (over.size().saturating_sub(offset), over.is_readonly());
        Self::new(name, number, Under::Mapping { over, offset, key }, size, readonly)
    }

    fn new(name: String, number: DeviceNumber, under: Under, size: u64, readonly: bool) -> Self {
        Self {
            name,
            number,
            under,
            alive: AtomicBool::new(true),
            readonly: AtomicBool::new(readonly),
            size: AtomicU64::new(size),
            broken: Mutex::default(),
            opens: Mutex::default(),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    pub(super) fn is_readonly(&self) -> bool {
        self.readonly.load(Ordering::Relaxed)
    }

    pub(super) fn set_readonly(&self) {
        self.readonly.store(true, Ordering::Relaxed);
    }

    /// Whether it still answers: the kernel has it, and what is under it.
    pub(super) fn answers(&self) -> bool {
        self.is_there()
            && match &self.under {
                Under::Disk(_) => true,
                Under::Mapping { over, .. } => over.answers(),
            }
    }

    /// Whether the kernel has it.
    pub(super) fn is_there(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }

    pub(super) fn goes(&self) {
        self.alive.store(false, Ordering::Relaxed);
    }

    /// The device under a mapping, and where the mapping begins there.
    pub(super) fn over(&self) -> Option<(&Arc<Self>, u64)> {
        match &self.under {
            Under::Disk(_) => None,
            Under::Mapping { over, offset, .. } => Some((over, *offset)),
        }
    }

    /// Makes a range of it answer with an error from now on.
    pub(super) fn break_at(&self, range: Range<u64>) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).push(range);
    }

    pub(super) fn repair(&self) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether a process has its node open.
    pub(super) fn is_open(&self) -> bool {
        Arc::strong_count(&self.opens.lock().unwrap_or_else(PoisonError::into_inner)) > 1
    }

    /// Everybody who has its node open ends.
    pub(super) fn close_all(&self) {
        *self.opens.lock().unwrap_or_else(PoisonError::into_inner) = Arc::default();
    }

    fn usable(&self, offset: u64, length: usize) -> Result<()> {
        if !self.is_there() {
            return Err(Errno::IO.into());
        }
        let end = offset.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        if broken.iter().any(|range| range.start < end && offset < range.end) {
            return Err(Errno::IO.into());
        }
        Ok(())
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.usable(offset, buffer.len())?;
        within(self.size(), offset, buffer.len())?;
        match &self.under {
            Under::Disk(image) => image.read(buffer, offset),
            Under::Mapping { over, offset: start, key } => {
                over.read(buffer, offset.saturating_add(*start))?;
                cipher(buffer, offset, *key);
            }
        }
        Ok(())
    }
}

impl ReadAt for Device {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.read(buffer, offset)
    }
}

impl Storage for Device {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.usable(offset, bytes.len())?;
        if self.is_readonly() {
            return Err(Errno::PERM.into());
        }
        within(Self::size(self), offset, bytes.len()).map_err(|_| Errno::NOSPC)?;
        match &self.under {
            Under::Disk(image) => image.write(bytes, offset),
            Under::Mapping { over, offset: start, key } => {
                let mut bytes = bytes.to_vec();
                cipher(&mut bytes, offset, *key);
                over.write_at(&bytes, offset.saturating_add(*start))?;
            }
        }
        Ok(())
    }
}

/// What stands for a cipher: each byte is mixed with one that the key and its place give, so that zeros look like noise and the same
/// again gives back what was there. It hides nothing from anybody.
fn cipher(bytes: &mut [u8], offset: u64, key: u64) {
    let mut at = offset;
    for byte in bytes {
        let word = mix(key ^ (at / 8)).to_le_bytes();
        *byte ^= word.get(usize::try_from(at % 8).unwrap_or_default()).copied().unwrap_or_default();
        at = at.saturating_add(1);
    }
}

/// The finalizer of `SplitMix64`.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// An opened device: what stands in an [`crate::host::OpenDisk`].
#[derive(Debug)]
pub(super) struct Pin {
    pub(super) device: Arc<Device>,
    size: u64,
    _open: Arc<()>,
}

impl Pin {
    pub(super) fn new(device: Arc<Device>) -> Self {
        let open = Arc::clone(&device.opens.lock().unwrap_or_else(PoisonError::into_inner));
        Self { size: device.size(), device, _open: open }
    }
}

impl ReadAt for Pin {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.device.read(buffer, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_through_a_mapping_is_noise_below_it() {
        let image = Image::default();
        let number = |minor| DeviceNumber { major: 8, minor };
        let disk = Arc::new(Device::disk("sda".to_owned(), number(0), image.clone(), 1 << 20, false));
        let inside = Device::mapping("dm-0".to_owned(), number(1), Arc::clone(&disk), 65536, 7);
        assert_eq!(Device::size(&inside), (1 << 20) - 65536);
        inside.write_at(b"secret", 4093).expect("it takes writes");
        let mut read = [0; 6];
        inside.read_exact_at(&mut read, 4093).expect("it can be read");
        assert_eq!(&read, b"secret");
        disk.read_exact_at(&mut read, 65536 + 4093).expect("it can be read");
        assert_ne!(&read, b"secret");
        inside.read_exact_at(&mut read, 100).expect("it can be read");
        assert_ne!(read, [0; 6], "zeros come out as noise");
        disk.goes();
        assert!(inside.is_there() && !inside.answers());
        assert!(inside.read_exact_at(&mut read, 100).is_err());
    }
}
