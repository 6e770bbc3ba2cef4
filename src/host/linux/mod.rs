//! The real node: sysfs, `/dev`, system calls and tools.
//!
//! Every call that can block runs on a thread for blocking work. One that reads has a deadline, and the caller is told that it did
//! not end. One that changes something is awaited to its end, however long that takes: the volume stays locked meanwhile, so that
//! nobody concludes anything from what is half done (see [`call`]).

mod call;
mod check;
mod device;
mod disks;
mod exec;
mod fs;
pub mod loopdev;
mod luks;
mod machine;
mod mount;
pub mod mountinfo;
mod release;
mod scan;
mod sys;
mod xfs;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::time::{Instant, sleep};

use self::{
    call::{Calls, limited, to_its_end},
    device::Device,
    disks::Tree,
    exec::Tools,
    fs::Formats,
    mount::Unmounted,
    release::{held_by, same},
    scan::Scans,
    xfs::XfsFeatures,
};
use super::{
    Answer, DeviceNumber, Disk, Format, Found, FsKind, Host, Identity, Mount, MountOptions, OpenDisk, Place,
    PlaceKind, Usage,
    error::{
        CheckError, DisksError, FormatError, GrowError, IdentityError, MountError, OpenError, PathError,
        ProbeError, ReleaseError, ScanError, UnmountError, UsageError,
    },
};
use crate::types::ScsiSlot;

/// Where the node's trees are, and how long to wait for what.
#[derive(Debug, Clone)]
pub struct LinuxOptions {
    /// Where sysfs is mounted: `/sys`.
    pub sysfs_root: PathBuf,
    /// Where the device nodes are: `/dev`.
    pub dev_root: PathBuf,
    /// How long one system call may take: a scan, opening, mounting. One that changes something is awaited beyond that, with a
    /// warning.
    pub call_timeout: Duration,
    /// How long unmounting and writing out may take without a warning: there may be a lot to write.
    pub flush_timeout: Duration,
    /// How long to wait for what is in use: a mount, a disk.
    pub busy_timeout: Duration,
    /// How long a removed disk may take to go.
    pub gone_timeout: Duration,
    /// Where the tools are looked for, in this order: `mkfs.xfs`, `blkid`, `cryptsetup` and others.
    pub tool_directories: Vec<PathBuf>,
}

impl Default for LinuxOptions {
    fn default() -> Self {
        Self {
            sysfs_root: "/sys".into(),
            dev_root: "/dev".into(),
            call_timeout: Duration::from_secs(30),
            flush_timeout: Duration::from_secs(90),
            busy_timeout: Duration::from_secs(5),
            gone_timeout: Duration::from_secs(10),
            tool_directories: exec::DIRECTORIES.map(PathBuf::from).into(),
        }
    }
}

const POLL: Duration = Duration::from_millis(50);

/// This machine.
#[derive(Debug, Clone)]
pub struct LinuxHost {
    tree: Tree,
    options: LinuxOptions,
    scans: Scans,
    calls: Calls,
    tools: Tools,
    xfs: XfsFeatures,
}

/// How many reads of all the trees may be out at once.
const TREE_READS: usize = 64;

impl LinuxHost {
    /// This machine, with its trees at the roots that the options name.
    pub fn new(options: LinuxOptions) -> Self {
        let tree = Tree { sysfs: options.sysfs_root.clone(), dev: options.dev_root.clone() };
        let calls = Calls::default();
        let tools = Tools::new(&options.tool_directories, calls.clone());
        Self { tree, options, scans: Scans::default(), calls, tools, xfs: XfsFeatures::default() }
    }

    fn formats(&self) -> Formats<'_> {
        Formats { tools: &self.tools, xfs: &self.xfs }
    }

    /// Runs work that reads at a place.
    async fn read<T: Send + 'static>(
        &self,
        what: &'static str,
        at: &Path,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        self.calls.blocking(what, at, self.options.call_timeout, work).await
    }

    /// Claims a device: see [`Device::claim`].
    async fn claim(&self, device: &Arc<Device>) -> io::Result<std::fs::File> {
        let claimed = Arc::clone(device);
        self.read("claim", device.node(), move || claimed.claim()).await?
    }

    /// Runs work on the trees.
    async fn on_tree<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Tree) -> T + Send + 'static,
    ) -> io::Result<T> {
        let tree = self.tree.clone();
        let running = self.calls.begin("use", &tree.sysfs, TREE_READS)?;
        limited(running, self.options.call_timeout, move || work(&tree)).await
    }

    /// Runs work that reads on a path.
    async fn on_path<T: Send + 'static>(
        &self,
        what: &'static str,
        path: &Path,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, PathError> {
        let owned = path.to_owned();
        let result = self.read(what, path, move || work(&owned)).await.flatten();
        result.map_err(|source| PathError { what, path: path.to_owned(), source })
    }

    /// Runs work that changes something on a path.
    async fn change_path<T: Send + 'static>(
        &self,
        what: &'static str,
        path: &Path,
        usual: Duration,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, PathError> {
        let owned = path.to_owned();
        let result = to_its_end(what, path, usual, move || work(&owned)).await.and_then(|result| result);
        result.map_err(|source| PathError { what, path: path.to_owned(), source })
    }

    fn sysfs_error(&self, source: io::Error) -> PathError {
        PathError { what: "use", path: self.options.sysfs_root.clone(), source }
    }

    async fn mount_with(
        &self,
        what: String,
        target: &Path,
        work: impl FnOnce(&Path) -> io::Result<bool> + Send + 'static,
    ) -> Result<(), MountError> {
        let owned = target.to_owned();
        let done = to_its_end("mount at", target, self.options.call_timeout, move || work(&owned)).await;
        match done.and_then(|result| result) {
            Ok(true) => Ok(()),
            Ok(false) => Err(MountError::Wrong { what, target: target.to_owned() }),
            Err(source) => {
                let target = target.to_owned();
                Err(match source.raw_os_error() {
                    Some(nix::libc::EUCLEAN) => MountError::Damaged { what, target, source },
                    Some(nix::libc::EROFS) => MountError::Unreplayed { what, target, source },
                    _ => MountError::Kernel { what, target, source },
                })
            }
        }
    }
}

/// What an opened disk of this host is held by. Every [`OpenDisk`] that reaches a method was made by `open` of this type.
fn device_of(disk: &OpenDisk) -> Arc<Device> {
    disk.pin().expect("an open disk goes back to the host that opened it")
}

impl Host for LinuxHost {
    fn disks(&self) -> Answer<'_, Vec<Disk>, DisksError> {
        Box::pin(async { self.on_tree(Tree::disks).await.map_err(|source| self.sysfs_error(source))? })
    }

    fn exists(&self, number: DeviceNumber) -> Answer<'_, bool, DisksError> {
        Box::pin(async move {
            let read = self.on_tree(move |tree| tree.exists(number)).await;
            Ok(read.map_err(|source| self.sysfs_error(source))??)
        })
    }

    fn scan(&self, lun: ScsiSlot) -> Answer<'_, (), ScanError> {
        Box::pin(async move {
            let files = self.on_tree(Tree::scan_files).await.map_err(|source| self.sysfs_error(source))??;
            self.scans.run(files, lun, self.options.call_timeout, disks::scan).await
        })
    }

    fn scan_bus(&self) -> Answer<'_, (), ScanError> {
        Box::pin(async { self.on_tree(Tree::scan_bus).await.map_err(|source| self.sysfs_error(source))? })
    }

    fn open<'a>(&'a self, disk: &'a Disk) -> Answer<'a, OpenDisk, OpenError> {
        Box::pin(async {
            let (listed, tree) = (disk.clone(), self.tree.clone());
            let opened = self.read("open", &self.tree.node(&disk.name), move || tree.open(&listed)).await;
            let fail = |source| OpenError::Io { name: disk.name.clone(), source: self.sysfs_error(source) };
            Ok(OpenDisk::new(disk.clone(), Arc::new(opened.map_err(fail)??)))
        })
    }

    fn in_use<'a>(&'a self, disk: &'a OpenDisk) -> Answer<'a, bool, OpenError> {
        Box::pin(async {
            let device = device_of(disk);
            let path = device.path();
            match self.claim(&device).await {
                Ok(_) => Ok(false),
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(true),
                Err(source) => Err(OpenError::Io {
                    name: disk.disk().name.clone(),
                    source: PathError { what: "claim", path, source },
                }),
            }
        })
    }

    fn refresh<'a>(&'a self, disk: &'a Disk) -> Answer<'a, Disk, OpenError> {
        Box::pin(async {
            let fail = |source| OpenError::Io { name: disk.name.clone(), source };
            let name = disk.name.clone();
            let work = move |tree: &Tree| tree.rescan(&name).and_then(|()| tree.disk(&name));
            let read = self.on_tree(work).await.map_err(|source| self.sysfs_error(source));
            let now = read.and_then(|read| read).map_err(fail)?;
            match now {
                Some(now) if same(&now, disk) => Ok(now),
                now => Err(OpenError::Changed {
                    name: disk.name.clone(),
                    listed: disk.wwn,
                    answered: now.and_then(|now| now.wwn),
                }),
            }
        })
    }

    fn probe<'a>(&'a self, disk: &'a OpenDisk) -> Answer<'a, Found, ProbeError> {
        Box::pin(async { fs::probe(&self.tools, &disk.disk().name, &device_of(disk)).await })
    }

    fn format_blank<'a>(&'a self, disk: &'a OpenDisk, format: &'a Format) -> Answer<'a, (), FormatError> {
        Box::pin(async { self.formats().format_blank(&disk.disk().name, &device_of(disk), format).await })
    }

    fn check<'a>(&'a self, disk: &'a OpenDisk, kind: FsKind) -> Answer<'a, (), CheckError> {
        Box::pin(async move {
            match kind {
                FsKind::Ext4 => check::ext4(&self.tools, &disk.disk().name, &device_of(disk)).await,
                FsKind::Xfs | FsKind::Btrfs => Ok(()),
            }
        })
    }

    fn grow<'a>(&'a self, disk: &'a OpenDisk, mounted_at: &'a Path) -> Answer<'a, (), GrowError> {
        Box::pin(async move { fs::grow(&self.tools, &disk.disk().name, &device_of(disk), mounted_at).await })
    }

    fn mounts(&self) -> Answer<'_, Vec<Mount>, PathError> {
        Box::pin(async {
            let path = Path::new(mountinfo::OURS);
            let table = self.on_path("read", path, mountinfo::read);
            Ok(mountinfo::mounts(&table.await?))
        })
    }

    fn mount<'a>(
        &'a self,
        disk: &'a OpenDisk,
        target: &'a Path,
        options: &'a MountOptions,
    ) -> Answer<'a, (), MountError> {
        Box::pin(async move {
            let what = format!("{} on disk `{}`", options.kind, disk.disk().name);
            let (device, tree, listed) = (device_of(disk), self.tree.clone(), disk.disk().clone());
            let options = options.clone();
            let work =
                move |target: &Path| mount::mount(&device, &tree.mount_source(&listed), target, &options);
            self.mount_with(what, target, work).await
        })
    }

    fn bind<'a>(
        &'a self,
        source: &'a Path,
        device: DeviceNumber,
        target: &'a Path,
        readonly: bool,
    ) -> Answer<'a, (), MountError> {
        Box::pin(async move {
            let what = format!("`{}`", source.display());
            let source = source.to_owned();
            let work = move |target: &Path| mount::bind(&source, device, target, readonly);
            self.mount_with(what, target, work).await
        })
    }

    fn bind_disk<'a>(&'a self, disk: &'a OpenDisk, target: &'a Path) -> Answer<'a, (), MountError> {
        Box::pin(async {
            let what = format!("disk `{}`", disk.disk().name);
            let device = device_of(disk);
            self.mount_with(what, target, move |target| mount::bind_device(&device, target)).await
        })
    }

    fn sync<'a>(&'a self, mounted_at: &'a Path) -> Answer<'a, (), PathError> {
        Box::pin(self.change_path("write out", mounted_at, self.options.flush_timeout, mount::sync))
    }

    fn unmount<'a>(&'a self, target: &'a Path) -> Answer<'a, (), UnmountError> {
        Box::pin(async {
            let deadline = Instant::now() + self.options.busy_timeout;
            loop {
                let path = target.to_owned();
                let work = move || mount::unmount(&path);
                let tried = to_its_end("unmount", target, self.options.flush_timeout, work).await;
                match tried.and_then(|tried| tried) {
                    Ok(Unmounted::Gone) => return Ok(()),
                    Ok(Unmounted::Busy) if Instant::now() < deadline => sleep(POLL).await,
                    Ok(Unmounted::Busy) => {
                        let after = self.options.busy_timeout;
                        return Err(UnmountError::Busy { target: target.to_owned(), after });
                    }
                    Err(source) => return Err(UnmountError::Kernel { target: target.to_owned(), source }),
                }
            }
        })
    }

    fn release(&self, disk: OpenDisk) -> Answer<'_, (), ReleaseError> {
        Box::pin(self.release_disk(disk))
    }

    fn discard<'a>(&'a self, disk: &'a Disk) -> Answer<'a, (), ReleaseError> {
        Box::pin(self.discard_disk(disk))
    }

    fn resolve<'a>(&'a self, path: &'a Path) -> Answer<'a, PathBuf, PathError> {
        Box::pin(self.on_path("resolve", path, mount::resolve))
    }

    fn look<'a>(&'a self, path: &'a Path) -> Answer<'a, Place, PathError> {
        Box::pin(self.on_path("look at", path, |path| Ok(mount::look(path))))
    }

    fn make_place<'a>(&'a self, path: &'a Path, kind: PlaceKind) -> Answer<'a, (), PathError> {
        let work = move |path: &Path| mount::make_place(path, kind);
        Box::pin(self.change_path("make", path, self.options.call_timeout, work))
    }

    fn remove_place<'a>(&'a self, path: &'a Path) -> Answer<'a, (), PathError> {
        Box::pin(self.change_path("remove", path, self.options.call_timeout, mount::remove_place))
    }

    fn responds<'a>(&'a self, path: &'a Path) -> Answer<'a, bool, PathError> {
        Box::pin(self.on_path("open", path, mount::responds))
    }

    fn usage<'a>(&'a self, path: &'a Path) -> Answer<'a, Usage, UsageError> {
        Box::pin(async {
            let work = |path: &Path| rustix::fs::statvfs(path).map_err(io::Error::from);
            // One at a time: it is asked for again and again, also while the file system answers nothing.
            let owned = path.to_owned();
            let measured = match self.calls.begin("measure", path, 1) {
                Ok(running) => {
                    limited(running, self.options.call_timeout, move || work(&owned)).await.flatten()
                }
                Err(error) => Err(error),
            };
            let read =
                measured.map_err(|source| PathError { what: "measure", path: path.to_owned(), source })?;
            let bytes = |blocks: u64| blocks.saturating_mul(read.f_frsize);
            Ok(Usage {
                total_bytes: bytes(read.f_blocks),
                used_bytes: bytes(read.f_blocks.saturating_sub(read.f_bfree)),
                available_bytes: bytes(read.f_bavail),
                total_inodes: read.f_files,
                used_inodes: read.f_files.saturating_sub(read.f_ffree),
                free_inodes: read.f_ffree,
            })
        })
    }

    fn identity(&self) -> Answer<'_, Identity, IdentityError> {
        Box::pin(async {
            let read = self.on_tree(Tree::identity).await;
            read.map_err(|source| IdentityError::Read(self.sysfs_error(source)))?
        })
    }
}
