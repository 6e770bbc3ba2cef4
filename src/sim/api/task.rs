//! Tasks of a node (pve-manager `API2/Tasks.pm`).

use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::split_list;
use crate::sim::rules::upid::Upid;
use crate::sim::tasks::Task;
use serde_json::{Value, json};

/// Finds the task and refuses who may not see it: one's own, or `Sys.Audit` on the node
/// (`API2/Tasks.pm:check_task_user`).
fn find(call: &Call) -> Result<Task, PveError> {
    let text = call.text("upid");
    let parts =
        Upid::parse(text).ok_or_else(|| PveError::parameter("upid", "unable to parse worker upid"))?;
    let user = call.user.split('!').next().unwrap_or_default();
    // A token may see its own tasks, a user those of all their tokens.
    if parts.user != call.user && parts.user.split('!').next() != Some(&call.user) {
        let audit = call.check(&format!("/nodes/{}", call.node()), &["Sys.Audit"]);
        if user != "root@pam" {
            audit?;
        }
    }
    call.sim
        .read(|state| state.tasks.get(text).filter(|task| task.parts.node == call.node()).cloned())
        .ok_or_else(|| PveError::parameter("upid", "no such task"))
}

/// `GET tasks/{upid}/status`.
pub(super) fn status(call: &Call) -> Result<Reply, PveError> {
    Ok(find(call)?.status_json().into())
}

fn number(call: &Call, name: &str, default: usize) -> usize {
    call.get(name).and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// `GET tasks/{upid}/log`: `{n, t}` per line.
pub(super) fn log(call: &Call) -> Result<Reply, PveError> {
    let task = find(call)?;
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

/// `GET tasks`: ended ones, newest first; running ones with `source=active` or `all`.
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
            .filter(|task| task.parts.node == call.node() && (audit || task.parts.user == call.user))
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
    find(call)?.interrupt.notify_one();
    Ok(Reply::null())
}

/// `GET /cluster/tasks`: the latest of all nodes (`API2/Cluster.pm:tasks`).
pub(super) fn recent(call: &Call) -> Reply {
    let audit = call.may("/", &["Sys.Audit"]);
    let list: Vec<Value> = call.sim.read(|state| {
        let seen = state.tasks.iter().rev().filter(|task| audit || task.parts.user == call.user);
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
    json!(list).into()
}
