//! The mount table, `/proc/self/mountinfo` (proc(5)).

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::AsFd,
        unix::{
            ffi::OsStringExt as _,
            fs::{FileTypeExt as _, MetadataExt as _},
        },
    },
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, StatxFlags, statx};

use super::device::device_number;
use crate::host::{Condition, DeviceNumber, Mount};

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

/// Every mount of the table, in its order, each with the device it is of. A line that is none is passed over.
pub fn mounts(table: &[u8]) -> Vec<Mount> {
    lines(table).map(Line::with_device).collect()
}

/// A line of the table, and what it was mounted from.
struct Line {
    mount: Mount,
    source: PathBuf,
}

impl Line {
    /// A btrfs shows the number of its first subvolume, and the path of a device of it: the path is where it was mounted from, or what a
    /// later scan made of it.
    fn with_device(self) -> Mount {
        let Self { mut mount, source } = self;
        if mount.fs == "btrfs" && mount.number.major == 0 {
            let node = fs::metadata(source).ok().filter(|node| node.file_type().is_block_device());
            mount.number = node.map_or(mount.number, |node| device_number(node.rdev()));
        }
        mount
    }
}

/// Parses the table. A line that is not one is passed over: the kernel may add forms, and no decision rests on such a line.
fn lines(table: &[u8]) -> impl Iterator<Item = Line> {
    table.split(|byte| *byte == b'\n').filter_map(line)
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime shared:7 master:1 - ext3 /dev/root rw,errors=continue`
fn line(line: &[u8]) -> Option<Line> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device: DeviceNumber = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    let readonly = options(fields.next()?).any(|option| option == b"ro");
    let mut peers = None;
    for tag in fields.by_ref().take_while(|field| *field != b"-") {
        peers = peers.or_else(|| number(tag.strip_prefix(b"shared:")?));
    }
    let fs = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next().unwrap_or_default());
    let condition = options(fields.next().unwrap_or_default()).fold(Condition::Writable, condition);
    let mount = Mount { id, parent, peers, number: device, root, target, readonly, fs, condition };
    Some(Line { mount, source })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn options(field: &[u8]) -> impl Iterator<Item = &[u8]> {
    field.split(|byte| *byte == b',')
}

/// Since Linux 6.15 an ext4 with an error is not `ro` but `emergency_ro`, and one that was shut down says so
/// (`fs/ext4/super.c`, `_ext4_show_options`).
fn condition(so_far: Condition, option: &[u8]) -> Condition {
    match option {
        b"shutdown" => Condition::ShutDown,
        b"ro" | b"emergency_ro" if so_far == Condition::Writable => Condition::Readonly,
        _ => so_far,
    }
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
        if mounts(&table).iter().any(|mount| mount.number == number) {
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
    lines(table).any(|line| line.mount.target == path)
}

/// The device of what an open path is on; a mount of a btrfs is looked up in the table, since its files have numbers of their own.
pub(super) fn device_of(opened: &impl AsFd) -> io::Result<DeviceNumber> {
    let device = device_number(rustix::fs::fstat(opened)?.st_dev);
    if device.major != 0 {
        return Ok(device);
    }
    let seen = statx(opened, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    if !StatxFlags::from_bits_retain(seen.stx_mask).contains(StatxFlags::MNT_ID) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a btrfs needs Linux 5.8"));
    }
    let table = read(Path::new(OURS))?;
    let line = lines(&table).find(|line| line.mount.id == seen.stx_mnt_id);
    Ok(line.map_or(device, |line| line.with_device().number))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_table_is_read() {
        let table = b"63 43 7:0 / /tmp/a\\040b rw,relatime shared:5 master:1 - ext4 /dev/loop0 rw\n\
            64 63 0:6 /sdb /pods/x/dev ro,nosuid - devtmpfs devtmpfs rw,size=1k\nnonsense\n";
        let read = mounts(table);
        assert_eq!(read.len(), 2);
        assert_eq!(
            (read[0].target.as_path(), read[0].fs.as_str(), read[0].readonly, read[0].peers),
            (Path::new("/tmp/a b"), "ext4", false, Some(5))
        );
        assert_eq!(
            (read[1].root.as_path(), read[1].readonly, read[1].number.minor, read[1].peers),
            (Path::new("/sdb"), true, 6, None)
        );
        assert_eq!((read[0].id, read[0].parent, read[1].parent), (63, 43, 63));
        assert!(is_mount_point(table, Path::new("/tmp/a b")));
    }

    #[test]
    fn the_condition_of_a_file_system_is_told_apart_from_the_rights_of_a_mount() {
        let of = |options: &str| {
            let table = format!("63 43 7:0 / /a ro,relatime - ext4 /dev/loop0 {options}");
            mounts(table.as_bytes())[0].condition
        };
        assert_eq!(of("rw,errors=remount-ro"), Condition::Writable);
        assert_eq!(of("ro,errors=remount-ro"), Condition::Readonly);
        assert_eq!(of("rw,emergency_ro"), Condition::Readonly);
        assert_eq!(of("rw,emergency_ro,shutdown"), Condition::ShutDown);
    }

    proptest! {
        #[test]
        fn no_table_panics(table in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = mounts(&table);
        }
    }
}
