//! The proof that a disk holds nothing.
//!
//! [`prove`] reads, it never guesses: all of the first 8 MiB and the last 1 MiB, every place where a file system or a volume
//! manager is known to keep a copy of its superblock, and samples spread over the whole disk. One byte that is not zero, one
//! read that fails or ends early, and there is no proof. Signatures are somebody else's business ([`super::Found`]): the
//! proof is the stronger of the two, since what reads as zeros has no signature.
//!
//! What it can't see is data at none of these places: a disk whose every superblock was wiped by hand.

use std::io;

/// Something that can be read at any place.
pub trait ReadAt {
    /// The size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffer from `offset` on. An end before the buffer is full is an error.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// The proof. Only [`prove`] makes one.
#[derive(Debug)]
pub struct Blank(());

/// Why there is no proof.
#[derive(Debug, thiserror::Error)]
pub enum NotBlank {
    /// There is data.
    #[error("there is data at byte {0}")]
    Data(u64),
    /// A place could not be read.
    #[error("cannot read {length} bytes at byte {offset}")]
    Unreadable {
        /// Where.
        offset: u64,
        /// How much.
        length: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is nothing to read.
    #[error("it has no size")]
    Empty,
}

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const HEAD: u64 = 8 * MIB;
const TAIL: u64 = MIB;
/// How much is read at the place of a superblock copy.
const PROBE: u64 = 4096;
/// Volumes are a multiple of 512 MiB and mkfs.xfs makes four allocation groups of them, so the copies of an XFS superblock
/// lie at multiples of 128 MiB whatever size the volume once had. Backup superblocks of ext4 with blocks of 4 KiB do as well.
const STRIDE: u64 = 128 * MIB;
/// As far as every multiple of [`STRIDE`] is read; beyond it, where XFS groups have 1 TiB, every multiple of that.
const STRIDE_END: u64 = 4 * TIB;
/// Samples spread evenly, for data that has no known place. At the quarters of a disk of an odd size are XFS groups.
const SAMPLES: u64 = 256;
const BUFFER: usize = 1 << 20;

/// Proves that the device holds nothing, as far as reading the places named above can.
pub fn prove(device: &dyn ReadAt) -> Result<Blank, NotBlank> {
    let size = device.size();
    if size == 0 {
        return Err(NotBlank::Empty);
    }
    let mut buffer = vec![0; BUFFER];
    for (start, end) in places(size) {
        zeros(device, start, end, &mut buffer)?;
    }
    Ok(Blank(()))
}

/// The ranges that are read, each within the device. The head and the tail come first: where there is data, it is there.
fn places(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let head = [(0, HEAD), (size.saturating_sub(TAIL), size)];
    // A block group of ext4 has 8 · b² bytes for blocks of b bytes; groups 1, 3, 5, 7 and 9 are the first that keep copies.
    // With blocks of 1 KiB the copy is in the group's second block, and reading 4 KiB sees that one too.
    let ext4 = (10..=16)
        .flat_map(|bits: u32| [1, 3, 5, 7, 9].map(|group: u64| group << (3 + 2 * bits)))
        .map(|start| (start, start + PROBE));
    let strides = (1..=STRIDE_END / STRIDE).map(|n| n * STRIDE);
    let far = (STRIDE_END / TIB..size.div_ceil(TIB)).map(|n| n * TIB);
    // The copies of btrfs; the one at 256 GiB is at a stride.
    let btrfs = [64 * MIB, 1 << 50];
    let samples = (0..SAMPLES).map(move |n| size / SAMPLES * n / PROBE * PROBE);
    let probes = strides
        .take_while(move |start| *start < size)
        .chain(far)
        .chain(btrfs)
        .map(|start| (start, start + PROBE));
    // A little before and a lot behind the point, for the rounding of mkfs.
    let around = samples.map(|start| (start.saturating_sub(PROBE), start + 2 * PROBE));
    head.into_iter()
        .chain(ext4)
        .chain(probes)
        .chain(around)
        .map(move |(start, end)| (start, end.min(size)))
        .filter(|(start, end)| start < end)
}

fn zeros(device: &dyn ReadAt, start: u64, end: u64, buffer: &mut [u8]) -> Result<(), NotBlank> {
    let mut offset = start;
    while offset < end {
        let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
        let length = left.min(buffer.len());
        let part = &mut buffer[..length];
        device.read_exact_at(part, offset).map_err(|source| NotBlank::Unreadable {
            offset,
            length,
            source,
        })?;
        let place = |index: usize| offset.saturating_add(u64::try_from(index).unwrap_or(u64::MAX));
        if let Some(index) = first_set(part) {
            return Err(NotBlank::Data(place(index)));
        }
        offset = place(length);
    }
    Ok(())
}

/// Where the first byte that is not zero is. Pieces are compared with zeros first, which memcmp does many bytes at a time.
fn first_set(bytes: &[u8]) -> Option<usize> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let piece = bytes.chunks(ZEROS.len()).position(|piece| *piece != ZEROS[..piece.len()])?;
    let start = piece * ZEROS.len();
    bytes.get(start..)?.iter().position(|byte| *byte != 0).map(|index| start + index)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// A disk of zeros with some bytes that are not, and a place that can't be read.
    #[derive(Default)]
    struct Image {
        size: u64,
        bytes: BTreeMap<u64, u8>,
        broken: Option<u64>,
    }

    impl ReadAt for Image {
        fn size(&self) -> u64 {
            self.size
        }

        fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            let end = offset + u64::try_from(buffer.len()).expect("a length is a u64");
            if end > self.size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if self.broken.is_some_and(|broken| (offset..end).contains(&broken)) {
                return Err(io::Error::from_raw_os_error(5));
            }
            buffer.fill(0);
            for (place, byte) in self.bytes.range(offset..end) {
                buffer[usize::try_from(place - offset).expect("within the buffer")] = *byte;
            }
            Ok(())
        }
    }

    const GIB: u64 = 1 << 30;

    fn with(size: u64, place: u64) -> Image {
        Image { size, bytes: BTreeMap::from([(place, 1)]), broken: None }
    }

    #[test]
    fn superblock_copies_are_seen() {
        let size = 300 * GIB;
        for (what, place) in [
            ("xfs, ext4, LUKS, LVM, GPT at the head", 0),
            ("btrfs", 65536 + 64),
            ("btrfs, second copy", 64 * MIB + 64),
            ("btrfs, third copy", 256 * GIB + 64),
            ("LUKS2, second header at its last place", 0x0040_0000),
            ("ext4, blocks of 1 KiB, copy of group 1", 8193 * 1024 + 56),
            ("ext4, blocks of 2 KiB, copy of group 1", 16384 * 2048 + 56),
            ("ext4, blocks of 4 KiB, copy of group 3", 3 * 32768 * 4096 + 56),
            ("xfs, second group", size / 4),
            ("xfs, made when the volume had 512 MiB", 128 * MIB),
            ("xfs, made when the volume had 1 TiB less a bit", 5 * 128 * MIB),
            ("md 1.0, ZFS, GPT at the tail", size - 1),
            ("ZFS, label 2", size - 512 * 1024 + 16 * 1024),
        ] {
            let image = with(size, place);
            assert!(matches!(prove(&image), Err(NotBlank::Data(at)) if at == place), "{what}");
        }
    }

    #[test]
    fn a_place_that_cannot_be_read_is_no_proof() {
        for broken in [0, 5 * MIB, 128 * MIB, 2 * GIB - 1] {
            let image = Image { size: 2 * GIB, broken: Some(broken), ..Image::default() };
            assert!(matches!(prove(&image), Err(NotBlank::Unreadable { .. })), "{broken}");
        }
        assert!(matches!(prove(&Image::default()), Err(NotBlank::Empty)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn zeros_of_any_size_are_blank(size in 1u64..3 * TIB) {
            let blank = prove(&Image { size, ..Image::default() }).is_ok();
            prop_assert!(blank);
        }

        #[test]
        fn data_in_the_head_or_the_tail_is_never_blank(size in 1u64..64 * GIB, back: bool, at in 0u64..MIB) {
            let at = at % size;
            let place = if back { size - 1 - at } else { at };
            prop_assert!(matches!(prove(&with(size, place)), Err(NotBlank::Data(found)) if found == place));
        }

        #[test]
        fn small_disks_are_read_whole(size in 1u64..9 * MIB, at: u64) {
            let found = prove(&with(size, at % size));
            prop_assert!(matches!(found, Err(NotBlank::Data(found)) if found == at % size));
        }
    }
}
