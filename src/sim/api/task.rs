//! Tasks of a node (pve-manager `API2/Tasks.pm`).

use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::split_list;
use crate::sim::rules::upid::Upid;
use crate::sim::tasks::Task;
use serde_json::{Value, json};

/// Whether a task is the caller's: a token has its own, a user those of all their tokens too
/// (`API2/Tasks.pm:$check_task_user`).
fn is_own(task: &Task, user: &str) -> bool {
    task.parts.user == user || task.parts.user.split_once('!').is_some_and(|(owner, _)| owner == user)
}

/// Finds the task and refuses who may not touch it: who has not started it needs a privilege on the node
/// (`API2/Tasks.pm:read_task_status`, `stop_task`).
fn find(call: &Call, privilege: &str) -> Result<Task, PveError> {
    let text = call.text("upid");
    Upid::parse(text).ok_or_else(|| PveError::parameter("upid", "unable to parse worker upid"))?;
    let task = call
        .sim
        .read(|state| state.tasks.get(text).filter(|task| task.parts.node == call.node()).cloned())
        .ok_or_else(|| PveError::parameter("upid", "no such task"))?;
    if !is_own(&task, &call.user) {
        call.check(&format!("/nodes/{}", call.node()), &[privilege])?;
    }
    Ok(task)
}

/// `GET tasks/{upid}/status` (`API2/Tasks.pm:read_task_status`).
pub(super) fn status(call: &Call) -> Result<Reply, PveError> {
    Ok(find(call, "Sys.Audit")?.status_json().into())
}

fn number(call: &Call, name: &str, default: usize) -> usize {
    call.get(name).and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// `GET tasks/{upid}/log`: `{n, t}` per line (`API2/Tasks.pm:read_task_log`).
pub(super) fn log(call: &Call) -> Result<Reply, PveError> {
    let task = find(call, "Sys.Audit")?;
    let total = task.log.len();
    let limit = match number(call, "limit", 50) {
        0 => usize::MAX,
        limit => limit,
    };
    let lines: Vec<Value> = task
        .log
        .iter()
        .enumerate()
        .skip(number(call, "start", 0))
        .take(limit)
        .map(|(index, line)| json!({ "n": index + 1, "t": line }))
        .collect();
    // A running worker that has said nothing yet.
    let lines = if total == 0 { vec![json!({ "n": 1, "t": "no content" })] } else { lines };
    Ok(Reply { data: json!(lines), total: Some(total.max(1)) })
}

/// `GET tasks`: ended ones, newest first; running ones with `source=active` or `all` (`API2/Tasks.pm:node_tasks`).
pub(super) fn list(call: &Call) -> Reply {
    let source = call.get("source").unwrap_or("archive");
    let audit = call.may(&format!("/nodes/{}", call.node()), &["Sys.Audit"]);
    let vmid = call.get("vmid");
    let types: Option<Vec<&str>> = call.get("typefilter").map(|types| split_list(types).collect());
    let user_filter = call.get("userfilter");
    let moment = |name: &str| call.get(name).and_then(|value| value.parse::<u64>().ok());
    let (since, until) = (moment("since"), moment("until"));
    let found: Vec<Value> = call.sim.read(|state| {
        state
            .tasks
            .iter()
            .rev()
            .filter(|task| task.parts.node == call.node() && (audit || is_own(task, &call.user)))
            .filter(|task| match source {
                "active" => task.status.is_none(),
                "all" => true,
                _ => task.status.is_some(),
            })
            .filter(|task| vmid.is_none_or(|vmid| task.parts.id == vmid))
            .filter(|task| types.as_ref().is_none_or(|types| types.contains(&task.parts.worker.as_str())))
            .filter(|task| user_filter.is_none_or(|part| task.parts.user.contains(part)))
            .filter(|task| {
                !call.flag("errors") || task.status.as_deref().is_some_and(|status| status != "OK")
            })
            .filter(|task| since.is_none_or(|since| task.parts.starttime >= since))
            .filter(|task| until.is_none_or(|until| task.parts.starttime <= until))
            .map(Task::list_json)
            .collect()
    });
    let total = found.len();
    let page: Vec<Value> =
        found.into_iter().skip(number(call, "start", 0)).take(number(call, "limit", 50)).collect();
    Reply { data: json!(page), total: Some(total) }
}

/// `DELETE tasks/{upid}`: tells the task to stop (`API2/Tasks.pm:stop_task`).
pub(super) fn stop(call: &Call) -> Result<Reply, PveError> {
    find(call, "Sys.Modify")?.interrupt.notify_one();
    Ok(Reply::null())
}

/// Stops the running tasks of a kind for a VM that the caller may stop, and returns their ids (pve-guest-common
/// `GuestHelpers.pm:abort_guest_tasks`).
pub(super) fn abort(call: &Call, worker: &str, vmid: u32) -> Vec<String> {
    let all = call.may(&format!("/nodes/{}", call.node()), &["Sys.Modify"]);
    let id = vmid.to_string();
    call.sim.read(|state| {
        let running = state.tasks.iter().filter(|task| {
            task.status.is_none()
                && task.parts.worker == worker
                && task.parts.id == id
                && task.parts.node == call.node()
        });
        let own = |task: &&Task| all || is_own(task, &call.user);
        running
            .filter(own)
            .inspect(|task| task.interrupt.notify_one())
            .map(|task| task.upid.clone())
            .collect()
    })
}

/// `GET /cluster/tasks`: the latest of all nodes (`API2/Cluster.pm:tasks`).
pub(super) fn recent(call: &Call) -> Reply {
    let audit = call.may("/", &["Sys.Audit"]);
    let list: Vec<Value> = call.sim.read(|state| {
        // A token is no user here, so it does not even see its own.
        let own = |task: &&Task| task.parts.user.split('!').next() == Some(&call.user);
        let seen = state.tasks.iter().rev().filter(|task| audit || own(task));
        seen.take(25)
            .map(|task| {
                let mut entry = task.list_json();
                if let Some(entry) = entry.as_object_mut() {
                    entry.remove("pid");
                    entry.remove("pstart");
                    if task.status.is_some() {
                        entry.insert("saved".to_owned(), json!("1"));
                    } else {
                        entry.remove("status");
                    }
                }
                entry
            })
            .collect()
    });
    list.into()
}
