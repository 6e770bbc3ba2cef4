//! File locks of PVE: one holder, and an error for who waited too long (pve-common `Tools.pm:lock_file`,
//! pve-guest-common `AbstractConfig.pm:lock_config`, pve-storage `Plugin.pm:cluster_lock_storage`).

use super::rules::error::PveError;
use super::tasks::{TaskLog, WAITING};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

/// How long PVE waits for a lock.
const PATIENCE: Duration = Duration::from_secs(10);

/// Workers of a node's pvedaemon (`pvedaemon max_workers`).
const WORKERS: usize = 3;

/// A held lock.
pub type Held = OwnedMutexGuard<()>;

/// All locks of the cluster, made when first asked for.
#[derive(Debug, Default)]
pub struct Locks {
    files: Mutex<BTreeMap<String, Arc<AsyncMutex<()>>>>,
    workers: Mutex<BTreeMap<String, Arc<Semaphore>>>,
}

impl Locks {
    async fn take(
        &self,
        name: String,
        log: Option<&TaskLog>,
        timeout: impl FnOnce() -> String,
    ) -> Result<Held, PveError> {
        let lock = {
            let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(files.entry(name).or_default())
        };
        // Who waits says so (pve-common `Tools.pm:lock_file_full`).
        if let (Some(log), Err(_)) = (log, Arc::clone(&lock).try_lock_owned()) {
            log.line(WAITING);
            let held = tokio::time::timeout(PATIENCE, lock.lock_owned()).await;
            let held = held.map_err(|_| PveError::die(timeout()))?;
            log.append(" OK");
            return Ok(held);
        }
        tokio::time::timeout(PATIENCE, lock.lock_owned()).await.map_err(|_| PveError::die(timeout()))
    }

    /// The lock of a VM's config on its node.
    pub async fn vm(&self, vmid: u32) -> Result<Held, PveError> {
        self.vm_in(vmid, None).await
    }

    /// The same, for a task with a log.
    pub async fn vm_in(&self, vmid: u32, log: Option<&TaskLog>) -> Result<Held, PveError> {
        self.take(format!("vm/{vmid}"), log, || {
            format!("can't lock file '/var/lock/qemu-server/lock-{vmid}.conf' - got timeout")
        })
        .await
    }

    /// The lock of a storage: on the node, or over the cluster for a shared one.
    pub async fn storage(&self, node: Option<&str>, id: &str) -> Result<Held, PveError> {
        self.storage_in(node, id, None).await
    }

    /// The same, for a task with a log. The lock over the cluster says nothing while it waits.
    pub async fn storage_in(
        &self,
        node: Option<&str>,
        id: &str,
        log: Option<&TaskLog>,
    ) -> Result<Held, PveError> {
        let log = log.filter(|_| node.is_some());
        self.take(format!("storage/{}/{id}", node.unwrap_or("*")), log, || match node {
            Some(_) => format!("can't lock file '/var/lock/pve-manager/pve-storage-{id}' - got timeout"),
            None => format!("cfs-lock 'storage-{id}' error: got lock request timeout"),
        })
        .await
    }

    /// The lock of this name, `vm/100` or `storage/pve1/local`, as another process would hold it.
    pub async fn hold(&self, name: &str) -> Result<Held, PveError> {
        self.take(name.to_owned(), None, || format!("`{name}` is held")).await
    }

    /// The same at once, `None` where somebody has it.
    pub fn try_hold(&self, name: &str) -> Option<Held> {
        let lock = {
            let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(files.entry(name.to_owned()).or_default())
        };
        lock.try_lock_owned().ok()
    }

    /// A worker of the node's pvedaemon, of which there are three.
    pub async fn worker(&self, node: &str) -> Option<OwnedSemaphorePermit> {
        let workers = {
            let mut nodes = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(nodes.entry(node.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(WORKERS))))
        };
        // It fails only on a closed semaphore, and nobody closes these.
        workers.acquire_owned().await.ok()
    }
}
