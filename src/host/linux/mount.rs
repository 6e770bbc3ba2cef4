//! Mounting, binding and unmounting.
//!
//! A file system is mounted from the disk's node in `/dev`, not from `/proc/self/fd/N`: the kernel keeps the source's path in the
//! mount table for all to see, and `xfs_growfs`, `resize2fs` and cAdvisor look the device up by it. That is as safe as the
//! descriptor: while the disk is open its number belongs to no other device, the node is checked to have that number before, and
//! what got mounted is checked after. Binds leave no such trace and go through the descriptor.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags},
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree},
};
use sys_mount::MountFlags;

use super::{
    device::{Device, device_number},
    mountinfo, sys,
};
use crate::host::{DeviceNumber, MountOptions, Place, PlaceKind};

/// Mounts the file system on the device. `Ok(false)`: the node is, or what got mounted was, another device.
pub(super) fn mount(device: &Device, node: &Path, target: &Path, options: &MountOptions) -> io::Result<bool> {
    let number = device.number()?;
    let metadata = fs::metadata(node)?;
    if !metadata.file_type().is_block_device() || Some(device_number(metadata.rdev())) != number {
        return Ok(false);
    }
    let (mut flags, data) = split(&options.flags);
    flags.set(MountFlags::RDONLY, options.readonly);
    let builder = sys_mount::Mount::builder().fstype(options.kind.as_str()).flags(flags);
    let builder = if data.is_empty() { builder } else { builder.data(&data) };
    builder.mount(node, target)?;
    let mounted = open_path(target).and_then(|mounted| mountinfo::device_of(&mounted));
    keep(target, mounted.map(|mounted| Some(mounted) == number))
}

/// Makes the device appear at a file.
pub(super) fn bind_device(device: &Device, target: &Path) -> io::Result<bool> {
    let number = device.number()?;
    sys_mount::Mount::builder().fstype("none").flags(MountFlags::BIND).mount(device.path(), target)?;
    let right = fs::metadata(target).map(|metadata| {
        metadata.file_type().is_block_device() && Some(device_number(metadata.rdev())) == number
    });
    keep(target, right)
}

/// Takes a mount away again that is not what was meant.
fn keep(target: &Path, right: io::Result<bool>) -> io::Result<bool> {
    if !matches!(right, Ok(true)) {
        take_off(target)?;
    }
    right
}

/// The place at a path, without asking the file system there.
fn open_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// Binds a directory. Read-only by making the detached copy read-only before it appears anywhere: with a bind that is remounted,
/// the copy that propagates to the host stays writable. `Ok(false)`: what is at the source is not on the device.
pub(super) fn bind(source: &Path, number: DeviceNumber, target: &Path, readonly: bool) -> io::Result<bool> {
    // What is bound is what was looked at: a mount that goes meanwhile stays reachable through the descriptor.
    let opened = open_path(source)?;
    if mountinfo::device_of(&opened)? != number {
        return Ok(false);
    }
    if !readonly {
        let opened = format!("/proc/self/fd/{}", opened.as_raw_fd());
        sys_mount::Mount::builder().fstype("none").flags(MountFlags::BIND).mount(opened, target)?;
        return Ok(true);
    }
    let clone =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(&opened, "", clone)?;
    sys::make_mount_readonly(tree.as_fd())?;
    move_mount(tree.as_fd(), "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(true)
}

/// umount2(2) without following a link at the end of the path. Not by sys-mount: 3.1.1 gives the kernel `O_NOFOLLOW` where it
/// wants `UMOUNT_NOFOLLOW`, and gets EINVAL.
pub(super) fn take_off(target: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(target, UnmountFlags::NOFOLLOW)?)
}

/// What came of one try to unmount.
pub(super) enum Unmounted {
    /// Nothing is mounted there any more, or nothing was.
    Gone,
    /// It is in use.
    Busy,
}

pub(super) fn unmount(target: &Path) -> io::Result<Unmounted> {
    use nix::libc::{EBUSY, EINVAL, ENOENT};
    match take_off(target) {
        Ok(()) => Ok(Unmounted::Gone),
        Err(error) => match error.raw_os_error() {
            Some(EBUSY) => Ok(Unmounted::Busy),
            Some(ENOENT) => Ok(Unmounted::Gone),
            // EINVAL says that it is no mount point, and a few other things: the table tells which.
            Some(EINVAL) if !mountinfo::is_mount_point(&fs::read(mountinfo::OURS)?, target) => {
                Ok(Unmounted::Gone)
            }
            _ => Err(error),
        },
    }
}

/// Whether the file system at the path answers. XFS opens nothing any more once it has shut itself down (`xfs_file_open`, EIO), and so
/// does ext4 (`ext4_file_open`).
pub(super) fn responds(path: &Path) -> io::Result<bool> {
    use nix::libc::{EIO, ENODEV, ENXIO, ESHUTDOWN};
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOATIME | OFlags::NONBLOCK;
    let opened = rustix::fs::open(path, flags, Mode::empty()).and_then(|opened| rustix::fs::fstat(&opened));
    match opened {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), EIO | ENODEV | ENXIO | ESHUTDOWN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Writes out the file system mounted at the path.
pub(super) fn sync(mounted_at: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(fs::File::open(mounted_at)?)?)
}

/// The path with the directories above it resolved, as far down as there are any.
pub(super) fn resolve(path: &Path) -> io::Result<PathBuf> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(path.to_owned()) };
    match fs::canonicalize(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(resolve(parent)?.join(name)),
        parent => Ok(parent?.join(name)),
    }
}

pub(super) fn look(path: &Path) -> Place {
    match fs::symlink_metadata(path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Place::Absent
        }
        Ok(metadata) if metadata.is_dir() => Place::Directory,
        Ok(metadata) if metadata.is_file() => Place::File,
        Ok(metadata) if metadata.file_type().is_block_device() => {
            Place::BlockDevice(device_number(metadata.rdev()))
        }
        _ => Place::Other,
    }
}

pub(super) fn make_place(path: &Path, kind: PlaceKind) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    let mut directories = fs::DirBuilder::new();
    directories.recursive(true).mode(0o750);
    match kind {
        PlaceKind::Directory => directories.create(path),
        PlaceKind::File => {
            if let Some(parent) = path.parent() {
                directories.create(parent)?;
            }
            let created = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
            match created {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && look(path) == Place::File => {
                    Ok(())
                }
                result => result.map(drop),
            }
        }
    }
}

pub(super) fn remove_place(path: &Path) -> io::Result<()> {
    let removed = match look(path) {
        Place::Absent => Ok(()),
        // The file that a disk was bound onto is empty; one that is not is none of ours.
        Place::File if fs::symlink_metadata(path)?.len() > 0 => {
            Err(io::Error::other("it is a file with contents, which this driver did not make"))
        }
        Place::File => fs::remove_file(path),
        // Fails where something is inside, or where it is no directory.
        _ => fs::remove_dir(path),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// `MS_NOSYMFOLLOW`, Linux 5.10, `<linux/mount.h>`; sys-mount has no name for it.
const NOSYMFOLLOW: MountFlags = MountFlags::from_bits_retain(256);

/// Parts the options into the kernel's own flags and what the file system reads.
fn split(options: &[String]) -> (MountFlags, String) {
    let (mut flags, mut data) = (MountFlags::empty(), Vec::new());
    for option in options {
        match option.as_str() {
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "strictatime" => flags |= MountFlags::STRICTATIME,
            "nodev" => flags |= MountFlags::NODEV,
            "nosuid" => flags |= MountFlags::NOSUID,
            "noexec" => flags |= MountFlags::NOEXEC,
            "nosymfollow" => flags |= NOSYMFOLLOW,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_the_kernel_and_of_the_file_system_are_told_apart() {
        let options = ["noatime", "nouuid", "nosuid", "nosymfollow", "logbsize=256k"].map(str::to_owned);
        let (flags, data) = split(&options);
        assert_eq!(flags, MountFlags::NOATIME | MountFlags::NOSUID | NOSYMFOLLOW);
        assert_eq!(data, "nouuid,logbsize=256k");
    }
}
