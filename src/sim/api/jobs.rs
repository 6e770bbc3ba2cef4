//! Backup and replication jobs: configuration that others read, and that never runs (pve-manager `API2/Backup.pm`,
//! `API2/ReplicationConfig.pm`).

use super::ha::{change, digest, refuse_stale, section, with};
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::{Conf, Values};
use crate::sim::rules::drive::{Drive, in_order};
use crate::sim::rules::error::PveError;
use crate::sim::rules::plugin::{self, feature, feature::Feature};
use crate::sim::rules::schema::split_list;
use crate::sim::state::{State, Vm};
use serde_json::{Map, Value, json};

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

/// Whether the job covers the VM (pve-manager `VZDump.pm:get_included_guests`).
fn covers(job: &Map<String, Value>, vmid: u32, vm: &Vm, pool: Option<&str>) -> bool {
    let text = |key: &str| job.get(key).and_then(Value::as_str);
    let lists = |key: &str| text(key).is_some_and(|list| split_list(list).any(|id| id == vmid.to_string()));
    let all = job.get("all").is_some_and(|all| *all == 1);
    let chosen = match text("pool") {
        Some(wanted) => pool == Some(wanted),
        None => lists("vmid") || (all && !lists("exclude")),
    };
    chosen && text("node").is_none_or(|node| node == vm.node)
}

/// A disk as the tree shows it. A `backup` that is written down says "no" whatever it is
/// (qemu-server `QemuConfig.pm:get_backup_volumes`).
fn disk(vmid: u32, key: &str, drive: &Drive, bios: Option<&str>) -> Value {
    let mut included = drive.options.get("backup").is_none_or(|value| value == "1");
    let mut reason = if drive.options.contains_key("backup") { "backup=no" } else { "backup=yes" };
    if key.starts_with("efidisk") && bios != Some("ovmf") {
        included = false;
        reason = "efidisk but no OVMF BIOS";
    }
    json!({
        "id": format!("{vmid}:{key}"), "name": drive.file, "included": u8::from(included), "reason": reason, "leaf": 1,
    })
}

/// `GET /cluster/backup/{id}/included_volumes` (`Backup.pm:get_volume_backup_included`): VMs that the caller may not
/// see are left out.
pub(super) fn included_volumes(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.read(|state| {
        let job =
            state.jobs.get(id).ok_or_else(|| PveError::parameter("id", format!("No such job '{id}'")))?;
        let covered = state.vms.iter().filter(|(vmid, vm)| {
            let pool = state.access.pools.get(*vmid).map(String::as_str);
            covers(job, **vmid, vm, pool)
                && state.access.has(&call.user, &format!("/vms/{vmid}"), &["VM.Audit"])
        });
        let children: Vec<Value> = covered
            .map(|(vmid, vm)| {
                let current = &vm.conf.current;
                let mut disks: Vec<(&str, Drive)> = Conf::disks(current).collect();
                disks.sort_by_key(|(key, _)| in_order(key));
                let bios = current.get("bios").map(String::as_str);
                let volumes: Vec<Value> =
                    disks.iter().map(|(key, drive)| disk(*vmid, key, drive, bios)).collect();
                json!({
                    "id": vmid, "type": "qemu", "name": current.get("name"),
                    "leaf": u8::from(volumes.is_empty()), "children": volumes,
                })
            })
            .collect();
        Ok(json!({ "children": children }).into())
    })
}

/// The VM of a replication job's id, `100-0` (pve-guest-common `ReplicationConfig.pm:parse_replication_job_id`).
fn guest_of(id: &str) -> u32 {
    id.split('-').next().and_then(|vmid| vmid.parse().ok()).unwrap_or_default()
}

/// `GET /cluster/replication`: jobs of VMs that the caller may see (`API2/ReplicationConfig.pm:index`).
pub(super) fn replications(call: &Call) -> Reply {
    call.sim.read(|state| {
        let seen = state
            .replications
            .iter()
            .filter(|(id, _)| state.access.has(&call.user, &format!("/vms/{}", guest_of(id)), &["VM.Audit"]));
        let jobs: Vec<Value> = seen
            .map(|(id, job)| {
                let mut job = job.clone();
                job.insert("id".to_owned(), json!(id));
                Value::Object(job)
            })
            .collect();
        json!(jobs).into()
    })
}

/// Refuses a VM with a volume that cannot be replicated, or without one that can; volumes of other owners, on shared
/// storages and with `replicate=0` are passed over (qemu-server `QemuConfig.pm:get_replicatable_volumes`).
fn check_replicatable(state: &State, vmid: u32, node: &str, values: &Values) -> Result<(), PveError> {
    let mut found = false;
    for (_, drive) in Conf::disks(values) {
        if drive.options.get("replicate").is_some_and(|value| value == "0") {
            continue;
        }
        let key = state.volume_key(node, &drive.file)?;
        let config = state.config_of(&key)?;
        let name = plugin::parse(config, &key.name)?;
        if config.shared || name.owner != vmid {
            continue;
        }
        if !feature::has(config, &name, false, Feature::Replicate) {
            return Err(PveError::die(format!("missing replicate feature on volume '{}'", drive.file)));
        }
        found = true;
    }
    if found { Ok(()) } else { Err(PveError::die("No replicatable volumes found")) }
}

/// `POST /cluster/replication` (`ReplicationConfig.pm:create`).
pub(super) fn add_replication(call: &Call) -> Result<Reply, PveError> {
    let (id, target) = (call.text("id").to_owned(), call.text("target").to_owned());
    let vmid = guest_of(&id);
    call.check(&format!("/vms/{vmid}"), &["VM.Replicate"])?;
    let mut job = section(call, &["disable"], &["id"]);
    call.sim.change(|state| {
        let vm =
            state.vms.get(&vmid).ok_or_else(|| PveError::die(format!("Guest '{vmid}' does not exist.")))?;
        if !state.nodes.contains_key(&target) {
            return Err(PveError::die(format!("Target '{target}' does not exist.")));
        }
        if vm.node == target {
            return Err(PveError::die("Source and target must not be identical"));
        }
        check_replicatable(state, vmid, &vm.node, &vm.conf.current)?;
        if state.replications.contains_key(&id) {
            return Err(PveError::die(format!("replication job '{id}' already exists")));
        }
        job.insert("guest".to_owned(), json!(vmid));
        job.insert("source".to_owned(), json!(vm.node));
        state.replications.insert(id, job);
        Ok(Reply::null())
    })
}

/// `DELETE /cluster/replication/{id}`: at once, as no job of the simulator has anything to clean up
/// (`ReplicationConfig.pm:delete`).
pub(super) fn remove_replication(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.check(&format!("/vms/{}", guest_of(id)), &["VM.Replicate"])?;
    call.sim.change(|state| match state.replications.remove(id) {
        Some(_) => Ok(Reply::null()),
        None => Err(PveError::die(format!("no such job '{id}'"))),
    })
}

/// Refuses a drive that cannot be replicated in a VM that is (qemu-server `API2/Qemu.pm:$update_vm_api`,
/// `$check_replication`).
pub(super) fn check_drive(state: &State, node: &str, vmid: u32, drive: &Drive) -> Result<(), PveError> {
    let passed = drive.is_cdrom() || drive.options.get("replicate").is_some_and(|value| value == "0");
    if passed || !is_replicated(state, vmid) {
        return Ok(());
    }
    let refused = || PveError::die("cannot add non-replicatable volume to a replicated VM");
    let (storage, format) = if let Some((storage, _)) = drive.new_disk() {
        let config = &state.storage(node, storage)?.config;
        let asked = drive.options.get("format").map(String::as_str);
        (config, asked.unwrap_or_else(|| plugin::default_format(config)))
    } else {
        let key = state.volume_key(node, &drive.file)?;
        let config = state.config_of(&key)?;
        (config, plugin::format_of(config, &key.name))
    };
    if storage.shared || feature::can_replicate(storage, format) { Ok(()) } else { Err(refused()) }
}

/// Whether the VM has a replication job (pve-guest-common `ReplicationConfig.pm:check_for_existing_jobs`).
pub(super) fn is_replicated(state: &State, vmid: u32) -> bool {
    state.replications.keys().any(|id| guest_of(id) == vmid)
}

/// Refuses what a replicated VM must not be asked for (`ReplicationConfig.pm:check_for_existing_jobs`).
pub(super) fn refuse_replicated(state: &State, vmid: u32) -> Result<(), PveError> {
    match state.replications.keys().find(|id| guest_of(id) == vmid) {
        Some(id) => Err(PveError::die(format!(
            "There is a replication job '{id}' for guest '{vmid}' - Please remove that first."
        ))),
        None => Ok(()),
    }
}

/// Takes a VM out of all jobs; a backup job that names nobody else goes (`ReplicationConfig.pm:remove_vmid_jobs`,
/// pve-guest-common `VZDump/Plugin.pm:remove_vmid_from_backup_jobs`).
pub(super) fn forget(state: &mut State, vmid: u32) {
    state.replications.retain(|id, _| guest_of(id) != vmid);
    let gone = vmid.to_string();
    state.jobs.retain(|_, job| {
        for key in ["vmid", "exclude"] {
            let Some(named) = job.get(key).and_then(Value::as_str) else { continue };
            let others: Vec<&str> = split_list(named).filter(|id| *id != gone).collect();
            let others = others.join(",");
            if !others.is_empty() {
                job.insert(key.to_owned(), json!(others));
            } else if key == "vmid" {
                return false;
            } else {
                job.remove(key);
            }
        }
        true
    });
}

/// `GET /cluster/replication/{id}` (`ReplicationConfig.pm:read`).
pub(super) fn replication(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.read(|state| {
        let job = state.replications.get(id).ok_or_else(|| PveError::die(format!("no such job '{id}'")))?;
        Ok(with(job, "digest", &digest(&state.replications)).into())
    })
}

/// `PUT /cluster/replication/{id}` (`ReplicationConfig.pm:update`).
pub(super) fn change_replication(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("id");
    call.sim.change(|state| {
        let now = digest(&state.replications);
        refuse_stale(call, &now, "update replication job failed")?;
        let job =
            state.replications.get_mut(id).ok_or_else(|| PveError::die(format!("no such job '{id}'")))?;
        change(job, call, &["disable"], &["id"]);
        Ok(Reply::null())
    })
}

/// `GET /nodes/{node}/replication` (`Replication.pm:status`): the jobs that begin on the node; none has run.
pub(super) fn node_replications(call: &Call) -> Reply {
    call.sim.read(|state| {
        let here = state.replications.values().filter(|job| {
            job.get("source").is_some_and(|node| node == call.node())
                && call
                    .get("guest")
                    .is_none_or(|guest| job.get("guest").and_then(Value::as_u64) == guest.parse().ok())
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
