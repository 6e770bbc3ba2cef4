//! Contents in sparse files, one for each volume and one for each snapshot. Everything here blocks, and touches no more
//! than the data there is: holes stay holes, and a filesystem with reflinks shares what is copied.

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Result};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;

fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), std::fs::create_dir_all)
}

/// Makes a file of zeros, or leaves the one that is there.
pub(super) fn make(path: &Path, size: u64) -> Result<()> {
    make_parent(path)?;
    match File::create_new(path) {
        Ok(file) => file.set_len(size),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes `to` hold what `from` holds, and zeros behind it up to `size`. A file that is there is written in place: who
/// has it open sees the new contents.
pub(super) fn copy(from: &Path, to: &Path, size: u64) -> Result<()> {
    let source = File::open(from)?;
    make_parent(to)?;
    let target = OpenOptions::new().write(true).create(true).truncate(false).open(to)?;
    target.set_len(0)?;
    if ioctl_ficlone(&target, &source).is_err() {
        copy_data(&source, &target)?;
    }
    target.set_len(size)
}

/// Copies all that is not zero into an empty file.
fn copy_data(source: &File, target: &File) -> Result<()> {
    let end = source.metadata()?.len();
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < end {
        let data = match seek(source, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = seek(source, SeekFrom::Hole(data))?;
        at = data;
        while at < hole {
            let most = usize::try_from(hole - at).map_or(PIECE, |left| left.min(PIECE));
            let Some(piece) = buffer.get_mut(..most) else { break };
            source.read_exact_at(piece, at)?;
            if piece.iter().any(|byte| *byte != 0) {
                target.write_all_at(piece, at)?;
            }
            at += u64::try_from(most).unwrap_or(u64::MAX);
        }
    }
    Ok(())
}

/// Gives a file or directory another name; one that is not there stays so.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    make_parent(to)?;
    match std::fs::rename(from, to) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes two files change places.
pub(super) fn exchange(one: &Path, other: &Path) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

/// Removes a file or a whole directory; returns whether it was there.
pub(super) fn remove(path: &Path) -> Result<bool> {
    let result = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) fn wipe_signatures(path: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    for (at, count) in super::signature_spans(file.metadata()?.len()) {
        file.write_all_at(&vec![0; count], at)?;
    }
    Ok(())
}

/// Sets the size: what is beyond goes, what is missing is zero.
pub(super) fn resize(path: &Path, size: u64) -> Result<()> {
    OpenOptions::new().write(true).open(path)?.set_len(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn a_copy_holds_the_same_and_takes_no_more_room() {
        let directory = tempfile::tempdir().expect("a directory");
        let (from, to) = (directory.path().join("a/from"), directory.path().join("b/to"));
        make(&from, 1 << 30).expect("a file");
        let source = File::options().write(true).open(&from).expect("the file");
        source.write_all_at(b"head", 0).expect("a write");
        source.write_all_at(b"far", (1 << 30) - 3).expect("a write");
        std::fs::create_dir_all(to.parent().expect("a parent")).expect("a directory");
        std::fs::write(&to, b"what was there before").expect("a file");
        copy(&from, &to, (1 << 30) + 4096).expect("a copy");
        let copied = File::open(&to).expect("the copy");
        let mut bytes = [0; 5];
        copied.read_exact_at(&mut bytes, 0).expect("a read");
        assert_eq!(&bytes, b"head\0");
        copied.read_exact_at(&mut bytes, (1 << 30) - 3).expect("a read");
        assert_eq!(&bytes, b"far\0\0");
        let metadata = copied.metadata().expect("a file");
        assert_eq!(metadata.len(), (1 << 30) + 4096);
        assert!(metadata.blocks() * 512 < 16 << 20, "{} blocks", metadata.blocks());
    }
}
