//! A simulated Proxmox VE cluster: the API's answers, errors, tasks, locks and pending changes, over disks that are
//! real where this machine lets them be.
//!
//! `world` says what the cluster consists of, `state` is what becomes of it, `rules` decide as PVE decides (pure
//! functions, each with its source), `api` carries the calls out, `http` speaks to clients, `guest` shows disks to a
//! VM that stands for this machine, `qemu` runs those that are real. `replay` holds all of it against recordings of a real one. Time is tokio's (`clock`), so a test may pause it. Nothing here imports the
//! driver: the two readings of the API must not share a mistake. Read `Sim` first, then `api`.

mod api;
pub mod clock;
mod contents;
mod derived;
pub mod faults;
pub mod guest;
mod hamanager;
pub mod http;
mod inject;
pub mod locks;
mod machines;
#[doc(hidden)]
pub mod misreading;
pub mod qemu;
pub mod records;
pub mod replay;
mod resume;
pub mod rules;
mod save;
mod space;
mod start;
pub mod state;
pub mod tasks;
mod tasktable;
mod tickets;
pub mod tracked;
pub mod version;
mod view;
pub mod world;

pub use contents::Image;
pub use inject::UnknownTarget;
pub use qemu::{GuestAccess, QmpError};
pub use save::SaveError;
pub use start::{Options, StartError};
pub use view::{GuestDisk, VmView, VolumeInfo};
pub use world::World;

use clock::Clock;
use contents::Contents;
use guest::Guests;
use locks::Locks;
use state::{LogEntry, State};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// VMs as Linux nodes in memory, each with the uuid of the VM that it is.
type Machines = BTreeMap<u32, (Option<uuid::Uuid>, guest::memory::Machine)>;

/// A running cluster; clones are handles to the same one.
#[derive(Clone)]
pub struct Sim {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    clock: Clock,
    locks: Locks,
    /// Locks that a fault holds, by name.
    held: Mutex<BTreeMap<String, locks::Held>>,
    guests: Option<Arc<Guests>>,
    real: Option<Arc<qemu::Machines>>,
    images: Option<PathBuf>,
    contents: Contents,
    machines: Mutex<Machines>,
    tasks: Notify,
    nodes: Notify,
    journal: OnceLock<Arc<save::Journal>>,
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sim").finish_non_exhaustive()
    }
}

impl Sim {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in a closure below leaves plain data behind, which is as good as before.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the state. The closure must not wait.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.lock())
    }

    /// Changes the state. The closure must not wait.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.lock())
    }

    /// The cluster's clock.
    pub fn clock(&self) -> &Clock {
        &self.inner.clock
    }

    pub(crate) fn locks(&self) -> &Locks {
        &self.inner.locks
    }

    pub(crate) fn guests(&self) -> Option<&Arc<Guests>> {
        self.inner.guests.as_ref()
    }

    pub(crate) fn task_notification(&self) -> Notified<'_> {
        self.inner.tasks.notified()
    }

    /// Ends when the state of a node may have changed.
    pub(crate) fn node_notification(&self) -> Notified<'_> {
        self.inner.nodes.notified()
    }

    pub(crate) fn node_changed(&self) {
        self.inner.nodes.notify_waiters();
    }

    pub(crate) fn task_ended(&self) {
        self.inner.tasks.notify_waiters();
    }

    /// What the volumes hold.
    pub(crate) fn contents(&self) -> &Contents {
        &self.inner.contents
    }

    /// The file with the contents of a volume, where they are files.
    pub(crate) fn image_of(&self, key: &state::VolumeKey) -> Option<PathBuf> {
        self.inner.images.is_some().then(|| self.place_of(key))
    }

    /// A path for something of a storage: below the directory with all volumes, or one that only names it in memory.
    fn in_storage(&self, key: &state::VolumeKey, kind: &str) -> PathBuf {
        let scope = key.node.as_deref().unwrap_or("shared");
        let root = self.inner.images.clone().unwrap_or_default();
        root.join(scope).join(&key.storage).join(kind)
    }

    /// Where the contents of a volume are.
    pub(crate) fn place_of(&self, key: &state::VolumeKey) -> PathBuf {
        self.in_storage(key, "images").join(&key.name)
    }

    /// Where the blocks of a volume that goes are kept.
    pub(crate) fn freed_file(&self, key: &state::VolumeKey, number: u32) -> PathBuf {
        self.in_storage(key, "freed").join(number.to_string())
    }

    /// Where the contents of a volume's snapshots are kept: a directory with a file for each.
    pub(crate) fn snapshots_of(&self, key: &state::VolumeKey) -> PathBuf {
        self.in_storage(key, "snapshots").join(&key.name)
    }

    /// Requests the API has seen.
    pub fn log(&self) -> Vec<LogEntry> {
        self.read(|state| state.log.iter().cloned().collect())
    }

    /// Forgets the requests seen so far.
    pub fn clear_log(&self) {
        self.change(|state| state.log.clear());
    }

    /// Calls that were answered 501: what a test must not leave behind.
    pub fn unmodelled(&self) -> Vec<String> {
        self.read(|state| state.unmodelled.keys().cloned().collect())
    }

    /// Takes all disks out of the guests, removes their trees and ends every QEMU. The cluster itself goes with its last
    /// handle.
    pub async fn shutdown(&self) {
        let (guests, machines) = (self.inner.guests.clone(), self.inner.real.clone());
        let down = move || {
            if let Some(guests) = guests {
                guests.shutdown();
            }
            if let Some(machines) = machines {
                machines.shutdown();
            }
        };
        // The join fails only if the closure panicked, and then there is nothing left to do here.
        let _ = tokio::task::spawn_blocking(down).await;
    }
}
