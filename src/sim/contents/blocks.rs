//! Blocks of volumes' files as their storage sees them: those that a snapshot of thin LVM keeps for itself, and old ones
//! that a volume of thick LVM is given as it grows. Everything here blocks.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::Result;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Bytes of a block of a thin pool (lvmthin(7), `--chunksize`).
const CHUNK: u64 = 64 << 10;

/// The spans of a file that hold data, as offset and end, cut to whole blocks.
fn data(file: &File) -> Result<Vec<(u64, u64)>> {
    let end = file.metadata()?.len();
    let (mut spans, mut at) = (Vec::<(u64, u64)>::new(), 0);
    while at < end {
        let from = match seek(file, SeekFrom::Data(at)) {
            Ok(from) => from / CHUNK * CHUNK,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let to = seek(file, SeekFrom::Hole(from.max(at)))?.div_ceil(CHUNK).saturating_mul(CHUNK);
        match spans.last_mut() {
            Some(last) if from <= last.1 => last.1 = to,
            _ => spans.push((from, to)),
        }
        at = to;
    }
    Ok(spans)
}

/// One block, with zeros behind the end of the file.
fn read(file: &File, at: u64, into: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    while let Some(rest) = into.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + u64::try_from(filled).unwrap_or(u64::MAX))? {
            0 => {
                rest.fill(0);
                break;
            }
            count => filled += count,
        }
    }
    Ok(())
}

fn buffer() -> Vec<u8> {
    vec![0; usize::try_from(CHUNK).unwrap_or_default()]
}

/// Bytes of the blocks that `old` has and `new` no longer shares with it.
pub(crate) fn own(old: &Path, new: &Path) -> Result<u64> {
    let (old, new) = (File::open(old)?, File::open(new)?);
    let (mut before, mut after, mut bytes) = (buffer(), buffer(), 0);
    for (from, to) in data(&old)? {
        for at in (from..to).step_by(buffer().len()) {
            read(&old, at, &mut before)?;
            read(&new, at, &mut after)?;
            bytes += if before == after { 0 } else { CHUNK };
        }
    }
    Ok(bytes)
}

/// Writes what `from` holds into `to`, from the offset `at` on and at most `count` bytes of it.
pub(super) fn give(from: &Path, to: &Path, at: u64, count: u64) -> Result<()> {
    let (source, target) = (File::open(from)?, OpenOptions::new().write(true).open(to)?);
    let mut block = buffer();
    for (start, end) in data(&source)? {
        for offset in (start..end.min(count)).step_by(block.len()) {
            read(&source, offset, &mut block)?;
            let left = usize::try_from(count - offset).unwrap_or(usize::MAX).min(block.len());
            if let Some(piece) = block.get(..left) {
                target.write_all_at(piece, at + offset)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(directory: &Path, name: &str, size: u64, writes: &[(u64, &[u8])]) -> std::path::PathBuf {
        let path = directory.join(name);
        let file = File::create(&path).expect("a file");
        file.set_len(size).expect("a size");
        for (at, bytes) in writes {
            file.write_all_at(bytes, *at).expect("a write");
        }
        path
    }

    #[test]
    fn a_snapshot_keeps_the_blocks_that_were_written_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let size = 64 << 20;
        let old = file(directory.path(), "old", size, &[(0, b"head"), (10 << 20, b"body")]);
        let same = file(directory.path(), "same", size, &[(0, b"head"), (10 << 20, b"body")]);
        assert_eq!(own(&old, &same).expect("readable"), 0);
        let more = [(0, &b"head"[..]), (10 << 20, b"BODY"), (20 << 20, b"new")];
        let new = file(directory.path(), "new", 2 * size, &more);
        assert_eq!(own(&old, &new).expect("readable"), CHUNK);
        let short = file(directory.path(), "short", 4096, &[]);
        assert_eq!(own(&old, &short).expect("readable"), 2 * CHUNK);
    }

    #[test]
    fn what_is_given_stands_behind_what_was_there_and_no_further() {
        let directory = tempfile::tempdir().expect("a directory");
        let old =
            file(directory.path(), "old", 1 << 20, &[(0, b"stale"), (CHUNK, b"cut"), (1 << 19, b"far")]);
        let to = file(directory.path(), "to", 1 << 20, &[(0, b"mine")]);
        File::options().write(true).open(&to).and_then(|file| file.set_len(2 << 20)).expect("it grows");
        give(&old, &to, 1 << 20, CHUNK + 1).expect("writable");
        let bytes = std::fs::read(&to).expect("readable");
        let at = |at: u64, count: usize| {
            let at = usize::try_from(at).expect("small");
            &bytes[at..at + count]
        };
        assert_eq!((at(0, 4), at(1 << 20, 5)), (&b"mine"[..], &b"stale"[..]));
        assert_eq!(at((1 << 20) + CHUNK, 3), b"c\0\0");
        assert_eq!(at((1 << 20) + (1 << 19), 3), [0; 3]);
        assert_eq!(bytes.len(), 2 << 20);
    }
}
