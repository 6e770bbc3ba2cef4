//! A simulated Proxmox VE cluster: the API's answers, errors, tasks, locks and pending changes, over disks that are
//! real where this machine lets them be.
//!
//! `world` says what the cluster consists of, `state` is what becomes of it, `rules` decide as PVE decides (pure
//! functions, each with its source), `api` carries the calls out, `http` speaks to clients, `guest` shows disks to a
//! VM that stands for this machine. `replay` holds all of it against recordings of a real one. Time is tokio's (`clock`), so a test may pause it. Nothing here imports the
//! driver: the two readings of the API must not share a mistake. Read `Sim` first, then `api`.

mod api;
pub mod clock;
mod contents;
pub mod faults;
pub mod guest;
pub mod http;
pub mod locks;
pub mod replay;
pub mod rules;
mod start;
pub mod state;
pub mod tasks;
mod tickets;
mod view;
pub mod world;

pub use start::{Options, StartError};
pub use view::{GuestDisk, VmView, VolumeInfo};
pub use world::World;

use clock::Clock;
use faults::Fault;
use guest::Guests;
use locks::Locks;
use state::{LogEntry, State};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// A running cluster; clones are handles to the same one.
#[derive(Clone)]
pub struct Sim {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    clock: Clock,
    locks: Locks,
    guests: Option<Arc<Guests>>,
    images: Option<PathBuf>,
    tasks: Notify,
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

    pub(crate) fn task_ended(&self) {
        self.inner.tasks.notify_waiters();
    }

    /// Where the contents of a volume are kept, if they are.
    pub(crate) fn image_of(&self, key: &state::VolumeKey) -> Option<PathBuf> {
        let scope = key.node.as_deref().unwrap_or("shared");
        Some(self.inner.images.as_ref()?.join(scope).join(&key.storage).join("images").join(&key.name))
    }

    /// Where the contents of a volume's snapshots are kept: a directory with a file for each.
    pub(crate) fn snapshots_of(&self, key: &state::VolumeKey) -> Option<PathBuf> {
        let scope = key.node.as_deref().unwrap_or("shared");
        Some(self.inner.images.as_ref()?.join(scope).join(&key.storage).join("snapshots").join(&key.name))
    }

    /// Plays a fault: one that changes the cluster at once, any other on the requests or tasks it names.
    pub fn inject(&self, fault: Fault) -> Result<(), UnknownTarget> {
        let unknown = |what: String| Err(UnknownTarget(what));
        if let Fault::BlindGuest { vmid, on } = fault {
            return match self.guests().filter(|guests| guests.set_blind(vmid, on)) {
                Some(_) => Ok(()),
                None => unknown(format!("guest of VM {vmid}")),
            };
        }
        let now = self.clock().elapsed().as_secs();
        self.change(|state| {
            match fault {
                Fault::HangUnplug { vmid, on } => match state.vms.get_mut(&vmid) {
                    Some(vm) => vm.busy = on,
                    None => return unknown(format!("VM {vmid}")),
                },
                Fault::HangQemu { vmid, on } => match state.vms.get_mut(&vmid) {
                    Some(vm) => {
                        vm.hung = on;
                        vm.stuck = false;
                    }
                    None => return unknown(format!("VM {vmid}")),
                },
                Fault::KillNode { node, on } => match state.nodes.get_mut(&node) {
                    Some(alive) => {
                        *alive = !on;
                        state.died.remove(&node);
                        state.died.extend(on.then_some((node, now)));
                    }
                    None => return unknown(format!("node `{node}`")),
                },
                Fault::Unmount { storage, on } => {
                    if on {
                        state.unmounted.insert(storage);
                    } else {
                        state.unmounted.remove(&storage);
                    }
                }
                Fault::LoseQuorum { on } => state.quorum_lost = on,
                Fault::SilentAgent { vmid, on } => {
                    if on {
                        state.silent_agents.insert(vmid);
                    } else {
                        state.silent_agents.remove(&vmid);
                    }
                }
                Fault::FillStorage { storage, on } => match state.storages.get_mut(&storage) {
                    Some(storage) => storage.full = on,
                    None => return unknown(format!("storage `{storage}`")),
                },
                Fault::ExpireToken { token, on } => {
                    let Some(secret) = state.tokens.get_mut(&token) else {
                        return unknown(format!("token `{token}`"));
                    };
                    if on {
                        state.expired.extend(secret.take().map(|secret| (token, secret)));
                    } else if let Some(old) = state.expired.remove(&token) {
                        *secret = Some(old);
                    }
                }
                Fault::SetKey { vmid, key, value } => match state.vms.get_mut(&vmid) {
                    Some(vm) => match value {
                        Some(value) => drop(vm.conf.current.insert(key, value)),
                        None => drop(vm.conf.current.remove(&key)),
                    },
                    None => return unknown(format!("VM {vmid}")),
                },
                waiting => state.faults.push(waiting),
            }
            Ok(())
        })
    }

    /// Takes every fault back, those of the cluster's state too; keys that were set stay.
    pub fn clear_faults(&self) {
        for vmid in self.vmids() {
            if let Some(guests) = self.guests() {
                guests.set_blind(vmid, false);
            }
        }
        self.change(|state| {
            state.faults.clear();
            state.nodes.values_mut().for_each(|alive| *alive = true);
            state.died.clear();
            state.quorum_lost = false;
            state.silent_agents.clear();
            state.unmounted.clear();
            state.storages.values_mut().for_each(|storage| storage.full = false);
            for vm in state.vms.values_mut() {
                vm.busy = false;
                vm.hung = false;
            }
            for (token, secret) in std::mem::take(&mut state.expired) {
                state.tokens.insert(token, Some(secret));
            }
        });
    }

    /// Requests the API has seen.
    pub fn log(&self) -> Vec<LogEntry> {
        self.read(|state| state.log.clone())
    }

    /// Forgets the requests seen so far.
    pub fn clear_log(&self) {
        self.change(|state| state.log.clear());
    }

    /// Calls that were answered 501: what a test must not leave behind.
    pub fn unmodelled(&self) -> Vec<String> {
        self.read(|state| state.unmodelled.clone())
    }

    /// Takes all disks out of the guests and removes their trees. The cluster itself goes with its last handle.
    pub async fn shutdown(&self) {
        if let Some(guests) = self.inner.guests.clone() {
            // The join fails only if the closure panicked, and then there is nothing left to do here.
            let _ = tokio::task::spawn_blocking(move || guests.shutdown()).await;
        }
    }
}

/// A fault names something the cluster does not have.
#[derive(Debug, thiserror::Error)]
#[error("the simulated cluster has no {0}")]
pub struct UnknownTarget(String);
