//! Backup jobs and replication jobs: configuration that others read; neither runs (pve-manager `API2/Backup.pm`,
//! `API2/ReplicationConfig.pm`, `API2/Replication.pm`).

use super::ha::{change, digest, refuse_stale, section, with};
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::split_list;
use serde_json::{Value, json};

const BACKUP_FLAGS: &[&str] =
    &["all", "enabled", "remove", "quiet", "repeat-missed", "stdexcludes", "protected"];

/// `GET /cluster/backup` (`Backup.pm:index`).
pub(super) fn backups(call: &Call) -> Reply {
    call.sim.read(|state| json!(state.jobs.values().collect::<Vec<_>>()).into())
}

fn no_backup(id: &str) -> PveError {
    PveError::parameter("id", format!("No such job '{id}'"))
}

/// `GET /cluster/backup/{id}` (`Backup.pm:read_job`).
pub(super) fn backup(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.read(|state| state.jobs.get(id).map(|job| json!(job).into()).ok_or_else(|| no_backup(id)))
}

/// `POST /cluster/backup`: an id is made where none is given (`Backup.pm:create_job`).
pub(super) fn add_backup(call: &Call) -> Reply {
    call.sim.change(|state| {
        state.counter += 1;
        let made = format!("backup-{:08x}-{:04x}", state.counter, state.counter % 0xffff);
        let id = call.get("id").map_or(made, str::to_owned);
        let mut entry = section(call, BACKUP_FLAGS, &["delete"]);
        entry.insert("id".to_owned(), json!(id));
        entry.insert("type".to_owned(), json!("vzdump"));
        entry.entry("enabled").or_insert(json!(1));
        state.jobs.insert(id, entry);
    });
    Reply::null()
}

/// `PUT /cluster/backup/{id}` (`Backup.pm:update_job`).
pub(super) fn change_backup(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.change(|state| {
        let job = state.jobs.get_mut(id).ok_or_else(|| no_backup(id))?;
        change(job, call, BACKUP_FLAGS, &[]);
        Ok(Reply::null())
    })
}

/// `DELETE /cluster/backup/{id}` (`Backup.pm:delete_job`).
pub(super) fn remove_backup(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.change(|state| state.jobs.remove(id).map(|_| Reply::null()).ok_or_else(|| no_backup(id)))
}

/// `GET /cluster/backup/{id}/included_volumes` (`Backup.pm:get_volume_backup_included`): of every guest of the job, which
/// disks go into a backup and why (qemu-server `QemuConfig.pm:get_backup_volumes`).
pub(super) fn included_volumes(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.read(|state| {
        let job = state.jobs.get(id).ok_or_else(|| no_backup(id))?;
        let list = |key: &str| -> Vec<u32> {
            let text = job.get(key).and_then(Value::as_str).unwrap_or_default();
            split_list(text).filter_map(|id| id.parse().ok()).collect()
        };
        let all = job.get("all").is_some_and(|all| *all == json!(1) || *all == json!("1"));
        let (wanted, without) = (list("vmid"), list("exclude"));
        let pool = job.get("pool").and_then(Value::as_str);
        let guests = state.vms.iter().filter(|(vmid, _)| {
            let in_pool = pool.is_some_and(|pool| state.access.pools.get(vmid).is_some_and(|of| of == pool));
            (in_pool || if all { !without.contains(vmid) } else { wanted.contains(vmid) })
                && state.access.has(&call.user, &format!("/vms/{vmid}"), &["VM.Audit"])
        });
        let guests: Vec<Value> = guests
            .map(|(vmid, vm)| {
                let disks: Vec<Value> = Conf::disks(&vm.conf.current)
                    .map(|(slot, drive)| {
                        let option = drive.options.get("backup").map(String::as_str);
                        let included = option != Some("0");
                        json!({
                            "id": slot, "name": drive.file, "included": u8::from(included),
                            "reason": match option { Some("0") => "backup=no", Some(_) => "backup=yes", None => "enabled" },
                        })
                    })
                    .collect();
                let name = vm.conf.current.get("name").cloned().unwrap_or_default();
                json!({ "id": vmid, "name": name, "type": "qemu", "children": disks })
            })
            .collect();
        Ok(json!({ "children": guests }).into())
    })
}

const REPLICATION_FLAGS: &[&str] = &["disable"];

/// `GET /cluster/replication` (`ReplicationConfig.pm:index`): the jobs of guests that the caller may see.
pub(super) fn replications(call: &Call) -> Reply {
    call.sim.read(|state| {
        let digest = digest(&state.replications);
        let seen = |guest: &Value| {
            let path = format!("/vms/{}", guest.as_u64().unwrap_or_default());
            state.access.has(&call.user, &path, &["VM.Audit"])
        };
        let jobs = state.replications.values().filter(|job| seen(&job["guest"]));
        let all: Vec<Value> = jobs.map(|job| with(job, "digest", &digest)).collect();
        json!(all).into()
    })
}

fn no_job(id: &str) -> PveError {
    PveError::die(format!("no such replication job '{id}'"))
}

/// `GET /cluster/replication/{id}` (`ReplicationConfig.pm:read`).
pub(super) fn replication(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.read(|state| {
        let job = state.replications.get(id).ok_or_else(|| no_job(id))?;
        Ok(with(job, "digest", &digest(&state.replications)).into())
    })
}

/// `POST /cluster/replication` (`ReplicationConfig.pm:create`): the id is `GUEST-NUMBER`, the target another node.
pub(super) fn add_replication(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id").to_owned();
    let failed = |text: String| PveError::die(format!("create replication job failed: {text}"));
    let (guest, number) = id.split_once('-').unwrap_or((&id, "0"));
    let (guest, number): (u32, u32) = (guest.parse().unwrap_or(0), number.parse().unwrap_or(0));
    call.sim.change(|state| {
        let vm = state.vms.get(&guest).ok_or_else(|| failed(format!("no such guest '{guest}'")))?;
        let target = call.text("target");
        if !state.nodes.contains_key(target) {
            return Err(failed(format!("no such cluster node '{target}'")));
        }
        if vm.node == target {
            return Err(failed("source and target node are the same".to_owned()));
        }
        if state.replications.contains_key(&id) {
            return Err(failed(format!("replication job '{id}' already exists")));
        }
        let mut entry = section(call, REPLICATION_FLAGS, &[]);
        let source = vm.node.clone();
        let more = [
            ("guest", json!(guest)),
            ("jobnum", json!(number)),
            ("source", json!(source)),
            ("type", json!("local")),
        ];
        entry.extend(more.into_iter().map(|(key, value)| (key.to_owned(), value)));
        entry.entry("schedule").or_insert(json!("*/15"));
        state.replications.insert(id.clone(), entry);
        Ok(Reply::null())
    })
}

/// `PUT /cluster/replication/{id}` (`ReplicationConfig.pm:update`).
pub(super) fn change_replication(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.change(|state| {
        let now = digest(&state.replications);
        refuse_stale(call, &now, "update replication job failed")?;
        let job = state.replications.get_mut(id).ok_or_else(|| no_job(id))?;
        change(job, call, REPLICATION_FLAGS, &["id"]);
        Ok(Reply::null())
    })
}

/// `DELETE /cluster/replication/{id}`: it goes at once, where PVE marks it for removal by the next run
/// (`ReplicationConfig.pm:delete`).
pub(super) fn remove_replication(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.change(|state| state.replications.remove(id).map(|_| Reply::null()).ok_or_else(|| no_job(id)))
}

/// `GET /nodes/{node}/replication` (`Replication.pm:status`): the jobs that begin on the node; none has run.
pub(super) fn node_replications(call: &Call) -> Reply {
    call.sim.read(|state| {
        let here = state.replications.values().filter(|job| {
            job["source"] == call.node()
                && call.get("guest").is_none_or(|guest| job["guest"].to_string() == guest)
        });
        let all: Vec<Value> = here
            .map(|job| {
                let mut entry = Value::Object(job.clone());
                for key in ["fail_count", "last_sync", "last_try", "next_sync"] {
                    entry[key] = json!(0);
                }
                entry
            })
            .collect();
        json!(all).into()
    })
}
