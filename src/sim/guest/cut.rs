//! A host whose calls can be counted, and one of them cut: it fails, hangs, or the process that asked ends around it.
//!
//! [`Scissors`] wraps any [`Host`]. What calls an operation makes is recorded in an undisturbed run ([`Scissors::disarm`]), so that a new
//! one is covered without a change of whoever goes through all of them. Read [`Scissors::arm`] first.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

use crate::host::{
    Answer, DeviceNumber, Disk, Format, Found, FsKind, Host, Identity, Mount, MountOptions, OpenDisk, Place,
    PlaceKind, Usage,
    error::{
        CheckError, DisksError, FormatError, GrowError, IdentityError, MountError, OpenError, PathError,
        ProbeError, ReleaseError, ScanError, ToolError, UnmountError, UsageError,
    },
    luks::{GrowMappingError, KeyCost, LockError, Luks, Mapping, Passphrase, UnlockError},
};
use crate::types::ScsiSlot;

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// It fails and has done nothing.
    Fail,
    /// It fails and has done its work.
    FailAfter,
    /// It hangs. One that reads is given up after its deadline; one that changes something ends in the end.
    Hang,
    /// The process ends before it has done anything.
    DieBefore,
    /// The process ends in the midst of it.
    DieMidway,
    /// The process ends after it has done its work.
    DieAfter,
    /// The caller of the operation gives up while it is under way.
    CallerGone,
}

impl Cut {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Fail,
        Self::FailAfter,
        Self::Hang,
        Self::DieBefore,
        Self::DieMidway,
        Self::DieAfter,
        Self::CallerGone,
    ];

    /// Whether the process ends by it.
    pub fn is_deadly(self) -> bool {
        matches!(self, Self::DieBefore | Self::DieMidway | Self::DieAfter)
    }
}

/// The deadline of what only reads (`LinuxOptions::call_timeout`).
const READ_DEADLINE: Duration = Duration::from_secs(30);
/// How long a change hangs before it ends.
const HANGS: Duration = Duration::from_mins(3);
/// When in a call its process ends, if it takes that long.
const MIDWAY: Duration = Duration::from_millis(100);
/// How long a call goes on after its caller has given up.
const GOES_ON: Duration = Duration::from_secs(3);

/// A host with cuts; clones are handles to the same one.
#[derive(Clone)]
pub struct Scissors {
    host: Arc<dyn Host>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    struck: Notify,
}

#[derive(Default)]
struct State {
    armed: bool,
    seen: Vec<&'static str>,
    plan: Option<(usize, Cut)>,
}

/// Whether a call changes something.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reads,
    Changes,
}

use Kind::{Changes, Reads};

impl Scissors {
    /// A host over another, whose calls pass until it is armed.
    pub fn new(host: Arc<dyn Host>) -> Self {
        Self { host, shared: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts calls from now on, and cuts the one of this number, from 0.
    pub fn arm(&self, plan: Option<(usize, Cut)>) {
        *self.state() = State { armed: true, seen: Vec::new(), plan };
    }

    /// Stops counting; returns the names of the calls that came.
    pub fn disarm(&self) -> Vec<&'static str> {
        let mut state = self.state();
        state.armed = false;
        state.plan = None;
        std::mem::take(&mut state.seen)
    }

    /// Ends when a cut has struck that ends the process or its caller.
    pub async fn struck(&self) {
        self.shared.struck.notified().await;
    }

    fn next(&self, what: &'static str) -> Option<Cut> {
        let mut state = self.state();
        if !state.armed {
            return None;
        }
        let number = state.seen.len();
        state.seen.push(what);
        state.plan.take_if(|(at, _)| *at == number).map(|(_, cut)| cut)
    }

    async fn run<T, E>(
        &self,
        what: &'static str,
        kind: Kind,
        call: Answer<'_, T, E>,
        error: impl FnOnce(io::Error) -> E,
    ) -> Result<T, E> {
        let failed = || io::Error::other("cut");
        match self.next(what) {
            None => call.await,
            Some(Cut::Fail) => Err(error(failed())),
            Some(Cut::FailAfter) => {
                let _ = call.await;
                Err(error(failed()))
            }
            Some(Cut::Hang) if kind == Reads => {
                sleep(READ_DEADLINE).await;
                Err(error(io::Error::new(io::ErrorKind::TimedOut, "it did not end")))
            }
            Some(Cut::Hang) => {
                sleep(HANGS).await;
                call.await
            }
            Some(Cut::CallerGone) => {
                self.shared.struck.notify_one();
                sleep(GOES_ON).await;
                call.await
            }
            Some(cut) => {
                match cut {
                    Cut::DieMidway => drop(tokio::time::timeout(MIDWAY, call).await),
                    Cut::DieAfter => drop(call.await),
                    _ => drop(call),
                }
                self.shared.struck.notify_one();
                std::future::pending().await
            }
        }
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PathError {
    move |source| PathError { what: "use", path: path.to_owned(), source }
}

fn sysfs(source: io::Error) -> PathError {
    PathError { what: "use", path: "/sys".into(), source }
}

fn tool(source: io::Error) -> ToolError {
    ToolError::Run { tool: "a tool", source }
}

fn disks(source: io::Error) -> DisksError {
    DisksError::Read(sysfs(source))
}

fn open(disk: &Disk) -> impl FnOnce(io::Error) -> OpenError {
    let name = disk.name.clone();
    move |source| OpenError::Io { name, source: sysfs(source) }
}

fn format(disk: &OpenDisk, format: &Format) -> impl FnOnce(io::Error) -> FormatError {
    let (name, kind) = (disk.disk().name.clone(), format.kind);
    move |source| FormatError::Mkfs { name, kind, source: tool(source) }
}

fn mount(target: &Path) -> impl FnOnce(io::Error) -> MountError {
    move |source| MountError::Kernel { what: "it".to_owned(), target: target.to_owned(), source }
}

impl Host for Scissors {
    fn disks(&self) -> Answer<'_, Vec<Disk>, DisksError> {
        Box::pin(self.run("disks", Reads, self.host.disks(), disks))
    }

    fn exists(&self, number: DeviceNumber) -> Answer<'_, bool, DisksError> {
        Box::pin(self.run("exists", Reads, self.host.exists(number), disks))
    }

    fn scan(&self, lun: ScsiSlot) -> Answer<'_, (), ScanError> {
        Box::pin(self.run("scan", Reads, self.host.scan(lun), |source| ScanError::Write(sysfs(source))))
    }

    fn scan_bus(&self) -> Answer<'_, (), ScanError> {
        Box::pin(self.run("scan_bus", Reads, self.host.scan_bus(), |source| ScanError::Write(sysfs(source))))
    }

    fn open<'a>(&'a self, disk: &'a Disk) -> Answer<'a, OpenDisk, OpenError> {
        Box::pin(self.run("open", Reads, self.host.open(disk), open(disk)))
    }

    fn in_use<'a>(&'a self, disk: &'a OpenDisk) -> Answer<'a, bool, OpenError> {
        Box::pin(self.run("in_use", Reads, self.host.in_use(disk), open(disk.disk())))
    }

    fn refresh<'a>(&'a self, disk: &'a Disk) -> Answer<'a, Disk, OpenError> {
        Box::pin(self.run("refresh", Reads, self.host.refresh(disk), open(disk)))
    }

    fn probe<'a>(&'a self, disk: &'a OpenDisk) -> Answer<'a, Found, ProbeError> {
        let name = disk.disk().name.clone();
        let error = |source| ProbeError::Tool { name, source: tool(source) };
        Box::pin(self.run("probe", Reads, self.host.probe(disk), error))
    }

    fn format_blank<'a>(&'a self, disk: &'a OpenDisk, asked: &'a Format) -> Answer<'a, (), FormatError> {
        Box::pin(self.run("format_blank", Changes, self.host.format_blank(disk, asked), format(disk, asked)))
    }

    fn check<'a>(&'a self, disk: &'a OpenDisk, kind: FsKind) -> Answer<'a, (), CheckError> {
        let name = disk.disk().name.clone();
        let error = |source| CheckError::Tool { name, source: tool(source) };
        Box::pin(self.run("check", Changes, self.host.check(disk, kind), error))
    }

    fn grow<'a>(&'a self, disk: &'a OpenDisk, mounted_at: &'a Path) -> Answer<'a, (), GrowError> {
        let name = disk.disk().name.clone();
        let error = |source| GrowError::Tool { name, source: tool(source) };
        Box::pin(self.run("grow", Changes, self.host.grow(disk, mounted_at), error))
    }

    fn mounts(&self) -> Answer<'_, Vec<Mount>, PathError> {
        Box::pin(self.run("mounts", Reads, self.host.mounts(), sysfs))
    }

    fn mount<'a>(
        &'a self,
        disk: &'a OpenDisk,
        target: &'a Path,
        options: &'a MountOptions,
    ) -> Answer<'a, (), MountError> {
        Box::pin(self.run("mount", Changes, self.host.mount(disk, target, options), mount(target)))
    }

    fn bind<'a>(
        &'a self,
        source: &'a Path,
        device: DeviceNumber,
        target: &'a Path,
        readonly: bool,
    ) -> Answer<'a, (), MountError> {
        Box::pin(self.run("bind", Changes, self.host.bind(source, device, target, readonly), mount(target)))
    }

    fn bind_disk<'a>(&'a self, disk: &'a OpenDisk, target: &'a Path) -> Answer<'a, (), MountError> {
        Box::pin(self.run("bind_disk", Changes, self.host.bind_disk(disk, target), mount(target)))
    }

    fn sync<'a>(&'a self, mounted_at: &'a Path) -> Answer<'a, (), PathError> {
        Box::pin(self.run("sync", Changes, self.host.sync(mounted_at), at(mounted_at)))
    }

    fn unmount<'a>(&'a self, target: &'a Path) -> Answer<'a, (), UnmountError> {
        let error = |source| UnmountError::Kernel { target: target.to_owned(), source };
        Box::pin(self.run("unmount", Changes, self.host.unmount(target), error))
    }

    fn release(&self, disk: OpenDisk) -> Answer<'_, (), ReleaseError> {
        let name = disk.disk().name.clone();
        let error = |source| ReleaseError::Flush { name, source };
        Box::pin(self.run("release", Changes, self.host.release(disk), error))
    }

    fn discard<'a>(&'a self, disk: &'a Disk) -> Answer<'a, (), ReleaseError> {
        let name = disk.name.clone();
        let error = |source| ReleaseError::Flush { name, source };
        Box::pin(self.run("discard", Changes, self.host.discard(disk), error))
    }

    fn resolve<'a>(&'a self, path: &'a Path) -> Answer<'a, std::path::PathBuf, PathError> {
        Box::pin(self.run("resolve", Reads, self.host.resolve(path), at(path)))
    }

    fn look<'a>(&'a self, path: &'a Path) -> Answer<'a, Place, PathError> {
        Box::pin(self.run("look", Reads, self.host.look(path), at(path)))
    }

    fn make_place<'a>(&'a self, path: &'a Path, kind: PlaceKind) -> Answer<'a, (), PathError> {
        Box::pin(self.run("make_place", Changes, self.host.make_place(path, kind), at(path)))
    }

    fn remove_place<'a>(&'a self, path: &'a Path) -> Answer<'a, (), PathError> {
        Box::pin(self.run("remove_place", Changes, self.host.remove_place(path), at(path)))
    }

    fn responds<'a>(&'a self, path: &'a Path) -> Answer<'a, bool, PathError> {
        Box::pin(self.run("responds", Reads, self.host.responds(path), at(path)))
    }

    fn usage<'a>(&'a self, path: &'a Path) -> Answer<'a, Usage, UsageError> {
        let error = |source| UsageError::Read(at(path)(source));
        Box::pin(self.run("usage", Reads, self.host.usage(path), error))
    }

    fn identity(&self) -> Answer<'_, Identity, IdentityError> {
        let error = |source| IdentityError::Read(sysfs(source));
        Box::pin(self.run("identity", Reads, self.host.identity(), error))
    }
}

impl Luks for Scissors {
    fn mappings(&self) -> Answer<'_, Vec<Mapping>, DisksError> {
        Box::pin(self.run("mappings", Reads, self.host.mappings(), disks))
    }

    fn encrypt_blank<'a>(
        &'a self,
        disk: &'a OpenDisk,
        key: &'a Passphrase,
        cost: &'a KeyCost,
    ) -> Answer<'a, (), FormatError> {
        let name = disk.disk().name.clone();
        let error = |source| FormatError::Encrypt { name, source: tool(source) };
        Box::pin(self.run("encrypt_blank", Changes, self.host.encrypt_blank(disk, key, cost), error))
    }

    fn unlock<'a>(
        &'a self,
        disk: &'a OpenDisk,
        key: &'a Passphrase,
        name: &'a str,
    ) -> Answer<'a, Mapping, UnlockError> {
        let disk_name = disk.disk().name.clone();
        let error = |source| UnlockError::Tool { name: disk_name, source: tool(source) };
        Box::pin(self.run("unlock", Changes, self.host.unlock(disk, key, name), error))
    }

    fn open_mapping<'a>(&'a self, mapping: &'a Mapping) -> Answer<'a, OpenDisk, OpenError> {
        Box::pin(self.run("open_mapping", Reads, self.host.open_mapping(mapping), open(&mapping.device)))
    }

    fn format_inside<'a>(
        &'a self,
        disk: &'a OpenDisk,
        mapping: &'a OpenDisk,
        asked: &'a Format,
    ) -> Answer<'a, (), FormatError> {
        let call = self.host.format_inside(disk, mapping, asked);
        Box::pin(self.run("format_inside", Changes, call, format(mapping, asked)))
    }

    fn lock<'a>(&'a self, mapping: &'a Mapping) -> Answer<'a, (), LockError> {
        let name = mapping.name.clone();
        let error = |source| LockError::Flush { name, source };
        Box::pin(self.run("lock", Changes, self.host.lock(mapping), error))
    }

    fn grow_mapping<'a>(
        &'a self,
        mapping: &'a Mapping,
        key: Option<&'a Passphrase>,
    ) -> Answer<'a, (), GrowMappingError> {
        let name = mapping.name.clone();
        let error = |source| GrowMappingError::Tool { name, source: tool(source) };
        Box::pin(self.run("grow_mapping", Changes, self.host.grow_mapping(mapping, key), error))
    }
}
