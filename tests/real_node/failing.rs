//! Disks that fail on demand: a loop device over a file of a file system in user space (FUSE), which answers with EIO where it is told to.

use std::{
    ffi::OsStr,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr,
    ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, Request, WriteFlags,
};
use proxmox_csi::{host::error::FormatError, node::StageError, sim::Image};

use crate::{
    node_suite::{KEY, MIB, Rig as _, Volume},
    rig::Loops,
};

/// What the file holds, and where it fails.
#[derive(Clone, Default)]
struct Disk {
    image: Image,
    size: Arc<AtomicU64>,
    unreadable: Arc<Mutex<Option<Range<u64>>>>,
    unwritable: Arc<Mutex<Option<Range<u64>>>>,
    written: Arc<AtomicU64>,
}

fn fails(range: &Mutex<Option<Range<u64>>>, offset: u64, length: usize) -> bool {
    let end = offset + u64::try_from(length).expect("a length");
    range.lock().expect("no panic").as_ref().is_some_and(|range| range.start < end && offset < range.end)
}

impl Disk {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let is_root = inode == INodeNo::ROOT;
        let size = if is_root { 0 } else { self.size.load(Ordering::Relaxed) };
        FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_root { FileType::Directory } else { FileType::RegularFile },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

const IMAGE: INodeNo = INodeNo(2);
/// Attributes are asked for each time.
const TTL: Duration = Duration::ZERO;

impl Filesystem for Disk {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "image" {
            reply.entry(&TTL, &self.attributes(IMAGE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<fuser::TimeOrNow>,
        _: Option<fuser::TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size {
            self.size.store(size, Ordering::Relaxed);
        }
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = self.size.load(Ordering::Relaxed).saturating_sub(offset).min(u64::from(size));
        let mut bytes = vec![0; usize::try_from(left).expect("a length")];
        if fails(&self.unreadable, offset, bytes.len()) {
            return reply.error(Errno::EIO);
        }
        self.image.read(&mut bytes, offset);
        reply.data(&bytes);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if fails(&self.unwritable, offset, data.len()) {
            return reply.error(Errno::EIO);
        }
        self.written.fetch_add(1, Ordering::Relaxed);
        self.image.write(data, offset);
        reply.written(u32::try_from(data.len()).expect("a length"));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// A rig whose one volume is on a disk that fails; taken apart in this order.
struct Failing {
    rig: Loops,
    disk: Disk,
    volume: Volume,
    _session: fuser::BackgroundSession,
    _mount: tempfile::TempDir,
}

impl Failing {
    async fn new(size: u64, unreadable: Option<Range<u64>>) -> Self {
        let rig = Loops::new().await;
        let mount = tempfile::tempdir().expect("a directory");
        let disk = Disk::default();
        disk.size.store(size, Ordering::Relaxed);
        *disk.unreadable.lock().expect("no panic") = unreadable;
        let session = fuser::spawn_mount(disk.clone(), mount.path(), &fuser::Config::default())
            .expect("these tests need /dev/fuse, and root");
        std::os::unix::fs::symlink(mount.path().join("image"), rig.root.join("pvc-1.img")).expect("a link");
        let volume = rig.attach("pvc-1", 1, size);
        Self { rig, disk, volume, _session: session, _mount: mount }
    }

    fn writes(&self) -> u64 {
        self.disk.written.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_real_disk_that_answers_eio_anywhere_is_never_formatted() {
    let size = 512 * MIB;
    // The first sector; where blkid looks; in the head; at the place of a superblock's copy; a sample in between; the end.
    for at in
        [0, 65536, 5 * MIB, 8 * MIB - 4096, 128 * MIB, 384 * MIB, size / 256 * 77, size - MIB, size - 4096]
    {
        let failing = Failing::new(size, Some(at..at + 4096)).await;
        let node = failing.rig.node();
        let staged = node.stage(&failing.volume.stage("xfs")).await;
        assert!(matches!(staged, Err(StageError::Format(_) | StageError::Probe(_))), "{at}: {staged:?}");
        let staged = node.stage(&failing.volume.stage_encrypted("ext4", KEY)).await;
        assert!(matches!(staged, Err(StageError::Format(_) | StageError::Probe(_))), "{at}: {staged:?}");
        assert_eq!(failing.writes(), 0, "{at}: it was written to");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_an_mkfs_that_the_disk_fails_under_is_told_and_never_repeated_over_what_it_left() {
    for fs in ["ext4", "xfs", "btrfs"] {
        let failing = Failing::new(512 * MIB, None).await;
        let node = failing.rig.node();
        // What is written last fails: all that comes before it is there.
        let superblock = match fs {
            "btrfs" => 65536..65536 + 4096,
            _ => 0..4096,
        };
        *failing.disk.unwritable.lock().expect("no panic") = Some(superblock);
        let staged = node.stage(&failing.volume.stage(fs)).await;
        assert!(
            matches!(
                staged,
                Err(StageError::Format(
                    FormatError::Mkfs { .. } | FormatError::Vanished { .. } | FormatError::Probe(_)
                ))
            ),
            "{fs}: {staged:?}"
        );
        assert!(failing.rig.mounts().is_empty());
        failing.disk.unwritable.lock().expect("no panic").take();
        let left = failing.disk.image.snapshot();
        let again = node.stage(&failing.volume.stage(fs)).await;
        if left.is_blank() {
            again.expect("nothing was left, and it is formatted now");
        } else {
            assert!(again.is_err(), "{fs}: {again:?}");
            assert!(failing.disk.image.is_same(&left), "{fs}: it was written over");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_what_was_written_out_outlives_a_disk_that_fails_at_the_end() {
    for fs in ["ext4", "xfs"] {
        let failing = Failing::new(512 * MIB, None).await;
        let node = failing.rig.node();
        node.stage(&failing.volume.stage(fs)).await.expect("it is staged");
        failing.rig.write(&failing.volume.staging, "mine").expect("it takes writes");
        failing.rig.sync();
        *failing.disk.unwritable.lock().expect("no panic") = Some(0..u64::MAX);
        // What comes of it is told by the kernel as it likes: the disk may be gone from it by then.
        let first = node.unstage(&failing.volume.unstage()).await.map_err(|error| error.to_string());
        failing.disk.unwritable.lock().expect("no panic").take();
        node.unstage(&failing.volume.unstage()).await.expect("it goes in the end");
        assert!(failing.rig.mounts().is_empty() && failing.rig.kernel_disks().is_empty(), "{fs}: {first:?}");
        node.stage(&failing.volume.stage(fs)).await.expect("its log is replayed, and it is not formatted");
        let data = failing.rig.read(&failing.volume.staging);
        assert_eq!(data.expect("the data"), "mine", "{fs}: {first:?}");
    }
}
