//! Tasks: work that goes on after its call was answered (pve-common `RESTEnvironment.pm:fork_worker`).

use super::Sim;
use super::faults::Fault;
use super::rules::error::PveError;
use super::rules::upid::Upid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::future::Future;
use std::time::Duration;

/// A task, running or ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Saved")]
pub struct Task {
    /// Its id.
    pub upid: String,
    /// The parts of it.
    #[serde(skip)]
    pub parts: Upid,
    /// Exit status once it ended.
    pub status: Option<String>,
    /// Seconds since 1970.
    pub endtime: Option<u64>,
    /// Lines of the log.
    pub log: Vec<String>,
    /// Ends it before it is done.
    #[serde(skip)]
    pub interrupt: std::sync::Arc<tokio::sync::Notify>,
}

/// A task as it was saved; the parts of its id are in the id.
#[derive(Deserialize)]
struct Saved {
    upid: String,
    status: Option<String>,
    endtime: Option<u64>,
    log: Vec<String>,
}

impl TryFrom<Saved> for Task {
    type Error = String;

    fn try_from(saved: Saved) -> Result<Self, String> {
        let Saved { upid, status, endtime, log } = saved;
        let parts = Upid::parse(&upid).ok_or_else(|| format!("`{upid}` is no task id"))?;
        Ok(Self { upid, parts, status, endtime, log, interrupt: std::sync::Arc::default() })
    }
}

impl Task {
    /// User without the token's name, and that name.
    fn owner(&self) -> (&str, Option<&str>) {
        match self.parts.user.split_once('!') {
            Some((user, token)) => (user, Some(token)),
            None => (&self.parts.user, None),
        }
    }

    fn common(&self) -> Value {
        let (user, token) = self.owner();
        let mut value = json!({
            "upid": self.upid,
            "node": self.parts.node,
            "pid": self.parts.pid,
            "pstart": self.parts.pstart,
            "starttime": self.parts.starttime,
            "type": self.parts.worker,
            "id": self.parts.id,
            "user": user,
        });
        if let Some(token) = token {
            value["tokenid"] = json!(token);
        }
        value
    }

    /// `GET tasks/{upid}/status` (pve-manager `API2/Tasks.pm:read_task_status`).
    pub fn status_json(&self) -> Value {
        let mut value = self.common();
        value["status"] = json!(if self.status.is_some() { "stopped" } else { "running" });
        if let Some(status) = &self.status {
            value["exitstatus"] = json!(status);
        }
        value
    }

    /// An entry of `GET tasks` (`API2/Tasks.pm:node_tasks`).
    pub fn list_json(&self) -> Value {
        let mut value = self.common();
        match (&self.status, self.endtime) {
            (Some(status), Some(endtime)) => {
                value["status"] = json!(status);
                value["endtime"] = json!(endtime);
            }
            _ => value["status"] = json!("RUNNING"),
        }
        value
    }
}

/// Hands lines to the log of a task, or nowhere in a synchronous call.
#[derive(Debug, Clone)]
pub struct TaskLog {
    sim: Sim,
    upid: Option<String>,
}

impl TaskLog {
    /// A log nobody reads.
    pub fn nowhere(sim: &Sim) -> Self {
        Self { sim: sim.clone(), upid: None }
    }

    /// What the copy call prints around its work.
    pub fn begin(&self) {
        self.line(format!("DEBUG: starting worker {}", self.upid.clone().unwrap_or_default()));
    }

    /// The same at its end.
    pub fn end(&self) {
        self.line(format!("DEBUG: end worker {}", self.upid.clone().unwrap_or_default()));
    }

    /// Adds to the last line.
    pub fn append(&self, text: &str) {
        let Some(upid) = &self.upid else { return };
        self.sim.change(|state| {
            if let Some(task) = state.tasks.get_mut(upid)
                && let Some(line) = task.log.last_mut()
            {
                line.push_str(text);
            }
        });
    }

    /// Adds lines.
    pub fn lines(&self, lines: impl IntoIterator<Item = String>) {
        for line in lines {
            self.line(line);
        }
    }

    /// Adds a line.
    pub fn line(&self, text: impl Into<String>) {
        let Some(upid) = &self.upid else { return };
        let text = text.into();
        self.sim.change(|state| {
            if let Some(task) = state.tasks.get_mut(upid) {
                task.log.push(text);
            }
        });
    }
}

/// How a task ends that is told to stop: where it waits for a lock, that is what fails
/// (pve-common `Tools.pm:lock_file_full`, `RESTEnvironment.pm:fork_worker`).
fn interrupted(sim: &Sim, upid: &str) -> PveError {
    let waiting = sim.read(|state| {
        let task = state.tasks.get(upid)?;
        (task.log.last()? == WAITING).then(|| task.parts.id.clone())
    });
    PveError::die(match waiting {
        Some(vmid) => {
            format!("can't lock file '/var/lock/qemu-server/lock-{vmid}.conf' - received interrupt")
        }
        None => "received interrupt".to_owned(),
    })
}

/// What a task says while it waits for a lock.
pub(crate) const WAITING: &str = "trying to acquire lock...";

impl Sim {
    /// Starts a task on `node` and returns its id at once.
    pub fn start_task<F, Fut>(&self, node: &str, worker: &str, id: &str, user: &str, work: F) -> String
    where
        F: FnOnce(TaskLog) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), PveError>> + Send + 'static,
    {
        let elapsed = self.clock().elapsed();
        let starttime = self.clock().now();
        let interrupt = std::sync::Arc::new(tokio::sync::Notify::new());
        let (upid, faults) = self.change(|state| {
            state.counter += 1;
            let parts = Upid {
                node: node.to_owned(),
                pid: 0x4000 + state.counter,
                pstart: u64::try_from(elapsed.as_millis() / 10).unwrap_or(u64::MAX) + 0x2_0000,
                starttime,
                worker: worker.to_owned(),
                id: id.to_owned(),
                user: user.to_owned(),
            };
            let upid = parts.to_string();
            state.tasks.push(Task {
                upid: upid.clone(),
                parts,
                status: None,
                endtime: None,
                log: Vec::new(),
                interrupt: std::sync::Arc::clone(&interrupt),
            });
            (upid, state.faults.hit_task(worker))
        });
        let log = TaskLog { sim: self.clone(), upid: Some(upid.clone()) };
        let sim = self.clone();
        let ended = upid.clone();
        tokio::spawn(async move {
            let mut failure = None;
            for fault in faults {
                match fault {
                    Fault::DelayTask { ms, .. } => tokio::time::sleep(Duration::from_millis(ms)).await,
                    Fault::FailTask { text, after, .. } => failure = Some((text, after)),
                    _ => {}
                }
            }
            let result = match failure {
                Some((text, false)) => Err(PveError::die(text)),
                Some((text, true)) => {
                    let _ = work(log).await;
                    Err(PveError::die(text))
                }
                None => {
                    tokio::select! {
                        biased;
                        () = interrupt.notified() => Err(interrupted(&sim, &ended)),
                        result = work(log) => result,
                    }
                }
            };
            let status = result.map_or_else(|error| error.task_status(), |()| "OK".to_owned());
            let now = sim.clock().now();
            sim.change(|state| {
                if let Some(task) = state.tasks.get_mut(&ended) {
                    let ok = status == "OK" || status.starts_with("WARNINGS");
                    task.log.push(format!("TASK {}{status}", if ok { "" } else { "ERROR: " }));
                    task.endtime = Some(now);
                    task.status = Some(status);
                }
            });
            sim.save().await;
            sim.task_ended();
        });
        upid
    }

    /// Waits until the task ends, at most `limit`. Returns its exit status, `None` when it still runs.
    pub async fn wait_task(&self, upid: &str, limit: Duration) -> Option<String> {
        let ended = async {
            loop {
                let notified = self.task_notification();
                if let Some(status) = self.task_status(upid) {
                    return status;
                }
                notified.await;
            }
        };
        tokio::time::timeout(limit, ended).await.ok()
    }

    /// Exit status of a task, `None` while it runs or when there is none.
    pub fn task_status(&self, upid: &str) -> Option<String> {
        self.read(|state| state.tasks.get(upid)?.status.clone())
    }
}
