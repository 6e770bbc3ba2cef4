//! Tasks: what Proxmox does after it has answered.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use http::Method;
use serde::Deserialize;
use tokio::time::{Instant, sleep};

use super::{
    ApiError,
    client::{Call, Client},
    error::DIGEST_MISMATCH,
};
use crate::types::{NodeName, Upid, VmId};

/// A task that did not end well, as far as is known.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// It ended with an error.
    #[error("task `{upid}` failed: {exit_status}")]
    Failed {
        /// The task.
        upid: Upid,
        /// Proxmox's own words.
        exit_status: String,
    },
    /// It still runs, or its state can't be read.
    #[error("the outcome of task `{upid}` is not known")]
    Unknown {
        /// The task.
        upid: Upid,
        /// Why it can't be read.
        #[source]
        source: ApiError,
    },
    /// It still runs after the time it was given.
    #[error("task `{upid}` still runs after {} s", waited.as_secs())]
    StillRunning {
        /// The task.
        upid: Upid,
        /// How long it was waited for.
        waited: Duration,
    },
}

impl TaskError {
    /// Whether the task may still run or have succeeded.
    pub fn is_unknown(&self) -> bool {
        match self {
            Self::Failed { .. } => false,
            Self::Unknown { .. } | Self::StillRunning { .. } => true,
        }
    }

    /// The exit status, where the task ended with an error.
    pub fn exit_status(&self) -> Option<&str> {
        match self {
            Self::Failed { exit_status, .. } => Some(exit_status),
            Self::Unknown { .. } | Self::StillRunning { .. } => None,
        }
    }

    /// Whether the task did its work and warned about something.
    pub fn is_warnings(&self) -> bool {
        self.exit_status().is_some_and(|text| text.starts_with("WARNINGS"))
    }

    /// Whether the task failed because the config changed since its digest was read: then it changed nothing.
    pub fn is_digest_mismatch(&self) -> bool {
        self.exit_status().is_some_and(|text| text.contains(DIGEST_MISMATCH))
    }
}

#[derive(Deserialize)]
struct RawStatus {
    status: String,
    #[serde(default)]
    exitstatus: Option<String>,
}

#[derive(Deserialize)]
struct RawTask {
    upid: String,
}

/// First pause between two looks at a task, and the longest one.
const POLL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// How long acts of each kind took lately, so that most are found ended at the first look.
#[derive(Debug, Default)]
pub(super) struct Pace(Mutex<BTreeMap<&'static str, Duration>>);

impl Pace {
    fn of(&self, act: &'static str) -> Duration {
        let paces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        paces.get(act).copied().unwrap_or(POLL.0)
    }

    /// Notes that an act was seen running after `running`, and ended after `ended`: the next is looked at between the two, or a little sooner
    /// where one look was enough.
    fn note(&self, act: &'static str, running: Duration, ended: Duration) {
        let pace = if running.is_zero() {
            ended.mul_f64(0.85)
        } else {
            running + ended.saturating_sub(running) * 3 / 4
        };
        let mut paces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        paces.insert(act, pace.clamp(POLL.0 / 2, 3 * POLL.1));
    }
}

/// Kinds of tasks that change a VM's drives (qemu-server `API2/Qemu.pm`, each `fork_worker`).
const CHANGES: [&str; 9] = [
    "qmconfig",
    "resize",
    "qmcreate",
    "qmclone",
    "qmdestroy",
    "qmmove",
    "qmsnapshot",
    "qmdelsnapshot",
    "qmrollback",
];

impl Client {
    /// Sends a request that starts a task, and gives the task's id, which ties the log of the driver to that of Proxmox. `what` is for the
    /// error where the answer is no id.
    pub(super) async fn start(&self, call: Call, what: &str) -> Result<Upid, ApiError> {
        let request = call.request();
        let upid: String = self.call(call).await?;
        let upid: Upid = upid
            .parse()
            .map_err(|error: crate::types::ParseError| ApiError::unreadable(what, &error.to_string()))?;
        tracing::info!(region = %self.region(), %request, %upid, "proxmox task started");
        Ok(upid)
    }

    /// Waits until a task has ended well. `WARNINGS` counts as an error: what was warned about has to be looked at. `act` names what it does:
    /// of acts of one name the next is looked at when the last one had ended.
    pub async fn wait(&self, act: &'static str, upid: &Upid, patience: Duration) -> Result<(), TaskError> {
        let started = Instant::now();
        let ended = self.poll(act, upid, patience).await;
        let result = match &ended {
            Ok(()) => "ok",
            Err(error) if error.is_unknown() => "unknown",
            Err(_) => "failed",
        };
        self.metrics().pve().task(upid.kind(), started.elapsed(), result);
        ended
    }

    async fn poll(&self, act: &'static str, upid: &Upid, patience: Duration) -> Result<(), TaskError> {
        let started = Instant::now();
        let (mut pause, mut following) = (self.pace.of(act), POLL.0);
        let (mut lost, mut running) = (0, Duration::ZERO);
        loop {
            sleep(pause).await;
            (pause, following) = (following, (following * 2).min(POLL.1));
            let call =
                Call::new("task_status", Method::GET, &[&"nodes", upid.node(), &"tasks", upid, &"status"]);
            match self.call::<RawStatus>(call).await {
                Ok(state) if state.status == "stopped" => {
                    let exit_status = state.exitstatus.unwrap_or_else(|| "no exit status".to_owned());
                    self.pace.note(act, running, started.elapsed());
                    let elapsed_ms = started.elapsed().as_millis();
                    if exit_status == "OK" {
                        tracing::debug!(%upid, exit_status, elapsed_ms, "proxmox task ended");
                        return Ok(());
                    }
                    tracing::info!(%upid, exit_status, elapsed_ms, "proxmox task did not end well");
                    return Err(TaskError::Failed { upid: upid.clone(), exit_status });
                }
                Ok(_) => (lost, running) = (0, started.elapsed()),
                // A read may be sent again; three in a row that fail are more than a passing fault.
                Err(error) if error.is_unknown() && lost < 2 => lost += 1,
                Err(source) => return Err(TaskError::Unknown { upid: upid.clone(), source }),
            }
            if started.elapsed() > patience {
                return Err(TaskError::StillRunning { upid: upid.clone(), waited: patience });
            }
        }
    }

    /// The running tasks of a node that may change the config of one of its VMs, or of one VM, and that this token may see: at least
    /// its own. Consoles, backups and the like are left out. Source: pve-manager `API2/Tasks.pm`, `node_tasks`.
    pub async fn running_changes(&self, node: &NodeName, vmid: Option<VmId>) -> Result<Vec<Upid>, ApiError> {
        let mut call =
            Call::new("running_tasks", Method::GET, &[&"nodes", node, &"tasks"]).with("source", "active");
        if let Some(vmid) = vmid {
            call = call.with("vmid", vmid);
        }
        let rows: Vec<RawTask> = self.call(call).await?;
        // A task id that can't be read is one more reason to be careful: it is an error, not passed over.
        let read = |row: RawTask| {
            row.upid.parse().map_err(|e: crate::types::ParseError| {
                ApiError::unreadable("the list of tasks", &e.to_string())
            })
        };
        let upids = rows.into_iter().map(read).collect::<Result<Vec<Upid>, _>>()?;
        Ok(upids.into_iter().filter(|upid| CHANGES.contains(&upid.kind())).collect())
    }
}
