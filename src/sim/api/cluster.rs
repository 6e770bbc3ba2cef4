//! `/version`, `/cluster` and `/nodes` (pve-manager `API2/Cluster.pm`, `API2/Nodes.pm`).

use super::status::vm_totals;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::state::{State, Vm};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
/// Seconds after which the status of a dead node's VMs is no longer shown.
const STATUS_EXPIRES: u64 = 300;

/// The version whose behaviour is modelled (`API2.pm:version`).
pub(super) fn version(call: &Call) -> Reply {
    let version = call.sim.read(|state| state.version);
    json!({ "release": version.short(), "repoid": version.repository(), "version": version.release() }).into()
}

fn node_entry(call: &Call, node: &str, alive: bool) -> Value {
    let mut entry = json!({
        "id": format!("node/{node}"),
        "node": node,
        "type": "node",
        "status": if alive { "online" } else { "offline" },
        "level": "",
    });
    if alive && call.may(&format!("/nodes/{node}"), &["Sys.Audit"]) {
        let metrics = json!({
            "cpu": 0.05, "maxcpu": 8, "mem": 4 * GIB, "maxmem": 32 * GIB, "disk": 10 * GIB, "maxdisk": 100 * GIB,
            "uptime": call.sim.clock().elapsed().as_secs(),
        });
        merge(&mut entry, &metrics);
    }
    entry
}

pub(super) fn merge(into: &mut Value, from: &Value) {
    for (key, value) in from.as_object().into_iter().flatten() {
        into[key] = value.clone();
    }
}

fn node_names(call: &Call) -> Vec<String> {
    call.sim.read(|state| state.nodes.keys().cloned().collect())
}

/// A made-up certificate fingerprint, another one for every node.
fn fingerprint(node: &str) -> String {
    use sha2::{Digest as _, Sha256};
    Sha256::digest(node).iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
}

/// `GET /nodes`: names and status for everyone, metrics with `Sys.Audit` (`API2/Nodes.pm:index`).
pub(super) fn nodes(call: &Call) -> Reply {
    let entries: Vec<Value> = node_names(call)
        .iter()
        .map(|node| {
            let mut entry = node_entry(call, node, call.hears(node));
            entry["ssl_fingerprint"] = json!(fingerprint(node));
            entry
        })
        .collect();
    entries.into()
}

/// `GET /cluster/resources`: what the caller may see (`API2/Cluster.pm:resources`).
pub(super) fn resources(call: &Call) -> Reply {
    let wanted = |kind: &str| call.get("type").is_none_or(|only| only == kind);
    let mut entries = Vec::new();
    if wanted("vm") {
        let now = call.sim.clock().elapsed().as_secs();
        call.sim.read(|state| {
            let seen = |vmid: &u32| state.access.has(&call.user, &format!("/vms/{vmid}"), &["VM.Audit"]);
            let vms = state.vms.iter().filter(|(vmid, _)| seen(vmid));
            entries.extend(vms.map(|(vmid, vm)| vm_entry(state, *vmid, vm, now)));
        });
    }
    if wanted("node") {
        for node in &node_names(call) {
            let mut entry = node_entry(call, node, call.hears(node));
            entry["cgroup-mode"] = json!(2);
            entries.push(entry);
        }
    }
    if wanted("storage") {
        let storages = call.sim.read(|state| state.storages.clone());
        for (id, storage) in &storages {
            if !call.may(&format!("/storage/{id}"), &["Datastore.Audit"]) {
                continue;
            }
            entries.extend(storage_entries(call, id, storage));
        }
    }
    entries.into()
}

/// A storage, once for every node that has it.
fn storage_entries(call: &Call, id: &str, storage: &crate::sim::state::Storage) -> Vec<Value> {
    let mut entries = Vec::new();
    for node in &node_names(call) {
        let alive = call.hears(node);
        if !storage.config.enabled || !storage.config.is_on(node) {
            continue;
        }
        // What a dead node said of it last is shown for a while.
        let heard = call.sim.read(|state| {
            let now = call.sim.clock().elapsed().as_secs();
            state.died.get(node).is_some_and(|died| now - died <= STATUS_EXPIRES)
        });
        let mut entry = json!({
            "id": format!("storage/{node}/{id}"),
            "type": "storage",
            "storage": id,
            "node": node,
            "plugintype": storage.config.kind.word(),
            "content": storage.config.content,
            "shared": u8::from(storage.config.shared),
            "status": if alive || heard { "available" } else { "unknown" },
        });
        if alive || heard {
            let used = if storage.full { storage.total } else { call.sim.read(|state| state.used(node, id)) };
            entry["disk"] = json!(used);
            entry["maxdisk"] = json!(storage.total);
        }
        entries.push(entry);
    }
    entries
}

fn vm_entry(state: &State, vmid: u32, vm: &Vm, now: u64) -> Value {
    let mut entry = vm_totals(vm, vmid, now);
    // A dead node's VMs keep what was last heard of them for a while (pmxcfs `status.c`).
    if state.died.get(&vm.node).is_some_and(|died| now - died > STATUS_EXPIRES) {
        entry["status"] = json!("unknown");
    }
    entry["maxcpu"] = entry["cpus"].take();
    if let Some(entry) = entry.as_object_mut() {
        entry.remove("cpus");
        entry.remove("serial");
    }
    let template = vm.conf.current.get("template").is_some_and(|value| value == "1");
    entry["template"] = json!(u8::from(template));
    entry["id"] = json!(format!("qemu/{vmid}"));
    entry["type"] = json!("qemu");
    entry["node"] = json!(vm.node);
    entry["diskread"] = json!(0);
    entry["diskwrite"] = json!(0);
    if let Some(pool) = state.access.pools.get(&vmid) {
        entry["pool"] = json!(pool);
    }
    if let Some(hastate) = &vm.hastate {
        entry["hastate"] = json!(hastate);
    }
    entry
}

/// `GET /cluster/options` (`Cluster.pm:get_options`).
pub(super) fn options() -> Reply {
    json!({ "mac_prefix": "BC:24:11", "allowed-tags": [], "description": "" }).into()
}

/// The members of a pool as the resources show them (`API2/Pool.pm:read_pool`).
pub(super) fn members(call: &Call, pool: &str) -> Vec<Value> {
    let now = call.sim.clock().elapsed().as_secs();
    let mut members: Vec<Value> = call.sim.read(|state| {
        let vms = state.access.pools.iter().filter(|(_, of)| *of == pool).map(|(vmid, _)| *vmid);
        vms.filter_map(|vmid| Some(vm_entry(state, vmid, state.vms.get(&vmid)?, now))).collect()
    });
    for member in &mut members {
        if let Some(member) = member.as_object_mut() {
            member.remove("pool");
        }
    }
    let storages = call.sim.read(|state| state.storages.clone());
    let mine = call.sim.read(|state| state.access.pool_storages.clone());
    for (id, storage) in storages.iter().filter(|(id, _)| mine.contains(&(pool.to_owned(), (*id).clone()))) {
        members.extend(storage_entries(call, id, storage));
    }
    members
}

/// `GET /cluster/nextid`: says for any id whether a VM has it, to every user (`API2/Cluster.pm:nextid`).
pub(super) fn next_id(call: &Call) -> Result<Reply, PveError> {
    if let Some(wanted) = call.get("vmid") {
        if call.sim.read(|state| state.vms.contains_key(&call.vmid())) {
            return Err(PveError::parameter("vmid", format!("VM {wanted} already exists")));
        }
        return Ok(json!(wanted).into());
    }
    let free = call.sim.read(|state| (100..1_000_000).find(|id| !state.vms.contains_key(id)));
    free.map(|id| json!(id.to_string()).into()).ok_or_else(|| PveError::die("unable to get any free VMID"))
}

/// `GET /cluster/status` (`API2/Cluster.pm:get_status`).
pub(super) fn status(call: &Call) -> Result<Reply, PveError> {
    call.check("/", &["Sys.Audit"])?;
    let nodes = node_names(call);
    let alive = nodes.iter().filter(|node| call.hears(node)).count();
    let here = call.here();
    let (name, quorate) = call.sim.read(|state| (state.cluster.clone(), state.is_quorate(&here)));
    let mut entries = Vec::new();
    if !name.is_empty() {
        entries.push(json!({
            "id": "cluster", "type": "cluster", "name": name, "version": 1, "nodes": nodes.len(),
            "quorate": u8::from(alive * 2 > nodes.len() && quorate),
        }));
    }
    let first = u8::from(!name.is_empty());
    for (index, node) in nodes.iter().enumerate() {
        entries.push(json!({
            "id": format!("node/{node}"), "type": "node", "name": node, "nodeid": index + usize::from(first),
            "ip": call.sim.read(|state| state.address(node)), "online": u8::from(call.hears(node)),
            "local": u8::from(*node == here),
            "level": "",
        }));
    }
    Ok(entries.into())
}
