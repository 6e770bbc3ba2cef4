//! The two system calls that no crate we have wraps. All `unsafe` code of the node is here.
#![allow(unsafe_code, reason = "system calls without a safe wrapper, see each SAFETY comment")]

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use nix::libc;

mod ioctl {
    // BLKFLSBUF, <linux/fs.h>: `_IO(0x12, 97)`.
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
}

/// Writes out and drops the kernel's buffers of a block device.
pub(super) fn flush_buffers(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: BLKFLSBUF takes no argument and touches no memory of ours; the descriptor is open for the whole call.
    unsafe { ioctl::blkflsbuf(device.as_raw_fd()) }?;
    Ok(())
}

/// Makes a detached mount read-only (`mount_setattr(2)`, Linux 5.12).
pub(super) fn make_mount_readonly(tree: BorrowedFd<'_>) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is an empty string that ends with NUL, as AT_EMPTY_PATH wants; `attributes` lives through the call, the
    // size is its own, and the kernel only reads it; the descriptor is open for the whole call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOSYS) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a read-only target needs Linux 5.12"));
    }
    Err(error)
}
