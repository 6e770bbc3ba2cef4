//! The mount table, `/proc/self/mountinfo` (proc(5)).

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

use crate::host::{DeviceNumber, Mount};

/// Reads a table that did not change meanwhile: before Linux 5.8 a mount that goes while the table is read can hide another.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut table = fs::read(path)?;
    for _ in 0..10 {
        let again = fs::read(path)?;
        if again == table {
            break;
        }
        table = again;
    }
    Ok(table)
}

/// Parses the table. A line that is not one is passed over: the kernel may add forms, and no decision rests on such a line.
pub(super) fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number: DeviceNumber = std::str::from_utf8(fields.nth(2)?).ok()?.parse().ok()?;
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    let options = fields.next()?;
    let readonly = options.split(|byte| *byte == b',').any(|option| option == b"ro");
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let fs = String::from_utf8_lossy(rest.next()?).into_owned();
    Some(Mount { number, root, target, readonly, fs })
}

/// Blank, tab, newline and backslash are printed as `\` and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let code = (*first == b'\\').then(|| tail.get(..3)).flatten().and_then(octal);
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

/// The processes that have the device mounted in a mount namespace that is not ours, as far as this process may see them.
pub(super) fn foreign_holders(number: DeviceNumber) -> Vec<u32> {
    let ours = fs::read_link("/proc/self/ns/mnt").ok();
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let mut holders = Vec::new();
    for process in processes.filter_map(Result::ok) {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if fs::read_link(process.path().join("ns/mnt")).ok() == ours {
            continue;
        }
        let table = fs::read(process.path().join("mountinfo")).unwrap_or_default();
        if parse(&table).iter().any(|mount| mount.number == number) {
            holders.push(pid);
        }
        if holders.len() == 3 {
            break;
        }
    }
    holders
}

/// Our own table.
pub(super) const OURS: &str = "/proc/self/mountinfo";

/// Whether something is mounted at exactly this path.
pub(super) fn is_mount_point(table: &[u8], path: &Path) -> bool {
    parse(table).iter().any(|mount| mount.target == path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_table_is_read() {
        let table = b"63 43 7:0 / /tmp/a\\040b rw,relatime shared:5 master:1 - ext4 /dev/loop0 rw\n\
            64 43 0:6 /sdb /pods/x/dev ro,nosuid - devtmpfs devtmpfs rw,size=1k\nnonsense\n";
        let mounts = parse(table);
        assert_eq!(mounts.len(), 2);
        assert_eq!(
            (mounts[0].target.as_path(), mounts[0].fs.as_str(), mounts[0].readonly),
            (Path::new("/tmp/a b"), "ext4", false)
        );
        assert_eq!(
            (mounts[1].root.as_path(), mounts[1].readonly, mounts[1].number.minor),
            (Path::new("/sdb"), true, 6)
        );
        assert!(is_mount_point(table, Path::new("/tmp/a b")));
    }

    proptest! {
        #[test]
        fn no_table_panics(table in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&table);
        }
    }
}
