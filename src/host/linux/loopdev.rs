//! Loop devices: a file as a block device (`loop(4)`, `linux/loop.h`). rustix wraps `ioctl` but not these requests, so
//! their unsafe halves are here and nowhere else.
//!
//! A device is configured with `LO_FLAGS_AUTOCLEAR`: the kernel takes it away when its last user closes it, so a
//! killed process leaves nothing behind. `attach` is the function to read first.
#![expect(
    unsafe_code,
    reason = "ioctl requests of loop(4) that no crate wraps; each invariant stands at its use"
)]

use rustix::fd::{AsRawFd as _, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags, fstat, makedev, mknodat, open};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, NoArg, Opcode, Setter, ioctl};
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_SET_CAPACITY: Opcode = 0x4C07;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// How often a device that someone else took first is replaced by the next free one.
const ATTEMPTS: u32 = 64;

/// `struct loop_info64`
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `LOOP_CTL_GET_FREE`: the number is the return value itself.
struct GetFree;

// SAFETY: LOOP_CTL_GET_FREE (linux/loop.h) takes no argument and writes no memory; its result is the return value.
unsafe impl Ioctl for GetFree {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<IoctlOutput> {
        Ok(out)
    }
}

/// A loop device. The kernel frees it when this and every other user has closed it.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    device: u64,
    handle: OwnedFd,
}

impl LoopDevice {
    /// Makes the file at `image` a block device.
    pub fn attach(image: &Path, read_only: bool) -> std::io::Result<Self> {
        let backing = OpenOptions::new().read(true).write(!read_only).open(image)?;
        let control = File::open("/dev/loop-control")?;
        let mut last = Errno::BUSY;
        for _ in 0..ATTEMPTS {
            // SAFETY: GetFree describes LOOP_CTL_GET_FREE, and `control` is the loop control device.
            let number = unsafe { ioctl(&control, GetFree) }?;
            let number = u32::try_from(number).map_err(|_| Errno::RANGE)?;
            match Self::configure(&backing, number, read_only) {
                Ok(device) => return Ok(device),
                // Between the two calls another process took it.
                Err(error @ (Errno::BUSY | Errno::NXIO | Errno::NODEV)) => last = error,
                Err(error) => return Err(error.into()),
            }
        }
        Err(last.into())
    }

    fn configure(backing: &File, number: u32, read_only: bool) -> Result<Self, Errno> {
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let flags = if read_only { OFlags::RDONLY } else { OFlags::RDWR } | OFlags::CLOEXEC;
        let handle = match open(&path, flags, Mode::empty()) {
            // A container's /dev is not the kernel's own, and shows no devices made later.
            Err(Errno::NOENT) => {
                let mode = Mode::RUSR | Mode::WUSR;
                match mknodat(rustix::fs::CWD, &path, FileType::BlockDevice, mode, makedev(7, number)) {
                    Ok(()) | Err(Errno::EXIST) => open(&path, flags, Mode::empty())?,
                    Err(error) => return Err(error),
                }
            }
            other => other?,
        };
        let mut lo_flags = LO_FLAGS_AUTOCLEAR;
        if read_only {
            lo_flags |= LO_FLAGS_READ_ONLY;
        }
        let info = LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: lo_flags,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        };
        let fd = u32::try_from(backing.as_raw_fd()).map_err(|_| Errno::BADF)?;
        let config = LoopConfig { fd, block_size: 512, info, reserved: [0; 8] };
        // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which LoopConfig mirrors field by field, and keeps
        // no pointer to it. `fd` is open for the duration of the call; the kernel takes its own reference.
        unsafe { ioctl(&handle, Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) }?;
        let device = fstat(&handle)?.st_rdev;
        Ok(Self { path, device, handle })
    }

    /// The device node, `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Major and minor number.
    pub fn number(&self) -> (u32, u32) {
        (rustix::fs::major(self.device), rustix::fs::minor(self.device))
    }

    /// Takes the file's new size over.
    pub fn refresh_size(&self) -> std::io::Result<()> {
        // SAFETY: LOOP_SET_CAPACITY takes no argument and touches no memory of ours.
        unsafe { ioctl(&self.handle, NoArg::<LOOP_SET_CAPACITY>::new()) }?;
        Ok(())
    }
}
