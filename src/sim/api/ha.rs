//! HA resources and rules, and pools: configuration that others read (pve-ha-manager `API2/HA/*.pm`, pve-manager
//! `API2/Pool.pm`).

use super::cluster;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::{flag, split_list};
use serde_json::{Map, Value, json};
use sha1::{Digest as _, Sha1};
use std::fmt::Write as _;

/// Sections of a configuration file by id.
pub(crate) type Sections = std::collections::BTreeMap<String, Map<String, Value>>;

fn digest(sections: &Sections) -> String {
    let text = format!("{sections:?}");
    Sha1::digest(text).iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// The parameters of a call as a section: numbers for flags and numbers.
pub(super) fn section(call: &Call, flags: &[&str], without: &[&str]) -> Map<String, Value> {
    let keep = call.params.iter().filter(|(key, _)| !without.contains(&key.as_str()));
    keep.map(|(key, value)| {
        let value = if flags.contains(&key.as_str()) {
            json!(u8::from(flag(&call.params, key)))
        } else {
            json!(value)
        };
        (key.clone(), value)
    })
    .collect()
}

/// `GET /cluster/ha/resources`.
pub(super) fn resources(call: &Call) -> Reply {
    call.sim.read(|state| {
        let digest = digest(&state.ha);
        let all: Vec<Value> = state.ha.values().map(|section| with(section, "digest", &digest)).collect();
        json!(all).into()
    })
}

fn with(section: &Map<String, Value>, key: &str, value: &str) -> Value {
    let mut section = section.clone();
    section.insert(key.to_owned(), json!(value));
    Value::Object(section)
}

/// `GET /cluster/ha/resources/{sid}`.
pub(super) fn resource(call: &Call) -> Result<Reply, PveError> {
    let sid = call.text("sid");
    call.sim.read(|state| {
        let section = state.ha.get(sid).ok_or_else(|| PveError::die(format!("no such resource '{sid}'")))?;
        Ok(with(section, "digest", &digest(&state.ha)).into())
    })
}

/// `POST /cluster/ha/resources`.
pub(super) fn add(call: &Call) -> Result<Reply, PveError> {
    let sid = call.text("sid").to_owned();
    let sid = if sid.contains(':') { sid } else { format!("vm:{sid}") };
    call.sim.change(|state| {
        if state.ha.contains_key(&sid) {
            return Err(PveError::die(format!("resource ID '{sid}' already defined")));
        }
        let mut entry = section(call, &[], &["sid"]);
        entry.insert("sid".to_owned(), json!(sid));
        entry.insert("type".to_owned(), json!(sid.split(':').next().unwrap_or("vm")));
        let wanted = entry.get("state").and_then(Value::as_str).unwrap_or("started").to_owned();
        entry.insert("state".to_owned(), json!(wanted));
        state.ha.insert(sid.clone(), entry);
        set_state(state, &sid, Some(&wanted));
        Ok(Reply::null())
    })
}

/// `status/current` and the resources show what the manager makes of a resource; an ignored one is none of its.
fn set_state(state: &mut crate::sim::state::State, sid: &str, wanted: Option<&str>) {
    let vmid = sid.strip_prefix("vm:").and_then(|id| id.parse().ok());
    if let Some(vm) = vmid.and_then(|vmid: u32| state.vms.get_mut(&vmid)) {
        vm.hastate = wanted.map(str::to_owned);
    }
}

/// `DELETE /cluster/ha/resources/{sid}`.
pub(super) fn remove(call: &Call) -> Result<Reply, PveError> {
    let sid = call.text("sid").to_owned();
    call.sim.change(|state| match state.ha.remove(&sid) {
        Some(_) => {
            set_state(state, &sid, None);
            Ok(Reply::null())
        }
        None => Err(PveError::die(format!("cannot delete service '{sid}', not HA managed!"))),
    })
}

/// `GET /cluster/ha/rules`.
pub(super) fn rules(call: &Call) -> Reply {
    call.sim.read(|state| {
        let digest = digest(&state.ha_rules);
        let all: Vec<Value> = state
            .ha_rules
            .values()
            .enumerate()
            .map(|(index, section)| {
                let mut entry = with(section, "digest", &digest);
                entry["order"] = json!(index + 1);
                entry
            })
            .collect();
        json!(all).into()
    })
}

/// `POST /cluster/ha/rules`.
pub(super) fn add_rule(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("rule").to_owned();
    call.sim.change(|state| {
        if state.ha_rules.contains_key(&id) {
            return Err(PveError::die(format!("HA rule '{id}' already defined")));
        }
        state.ha_rules.insert(id, section(call, &["strict", "disable"], &[]));
        Ok(Reply::null())
    })
}

/// `DELETE /cluster/ha/rules/{rule}`.
pub(super) fn remove_rule(call: &Call) -> Reply {
    call.sim.change(|state| state.ha_rules.remove(call.text("rule")));
    Reply::null()
}

/// `GET /cluster/ha/status/current`: no resource manager runs.
pub(super) fn status(call: &Call) -> Reply {
    let node = call.here();
    let quorate = call.sim.read(|state| state.is_quorate(&node));
    json!([
        { "id": "quorum", "type": "quorum", "node": node, "status": if quorate { "OK" } else { "No quorum on node" },
          "quorate": u8::from(quorate) },
        { "id": "fencing", "type": "fencing", "node": node, "status": "standby (CRM watchdog standby)",
          "armed-state": "standby" },
    ])
    .into()
}

/// `GET` and `POST /cluster/ha/groups`: gone in PVE 9.
pub(super) fn groups(what: &str) -> Result<Reply, PveError> {
    Err(PveError::die(format!("cannot {what}: ha groups have been migrated to rules")))
}

/// `POST /pools`.
pub(super) fn add_pool(call: &Call) -> Result<Reply, PveError> {
    let pool = call.text("poolid").to_owned();
    call.sim.change(|state| {
        if !state.pools.insert(pool.clone()) {
            return Err(PveError::die(format!("create pool failed: pool '{pool}' already exists")));
        }
        Ok(Reply::null())
    })
}

/// `PUT /pools`: members come, or go with `delete=1`.
pub(super) fn change_pool(call: &Call) -> Result<Reply, PveError> {
    let pool = call.text("poolid").to_owned();
    let vms: Vec<u32> =
        call.get("vms").into_iter().flat_map(split_list).filter_map(|id| id.parse().ok()).collect();
    let storages: Vec<String> =
        call.get("storage").into_iter().flat_map(split_list).map(str::to_owned).collect();
    call.sim.change(|state| {
        if !state.pools.contains(&pool) {
            return Err(PveError::die(format!("update pool failed: pool '{pool}' does not exist")));
        }
        for vmid in vms {
            if call.flag("delete") {
                state.access.pools.remove(&vmid);
            } else {
                state.access.pools.insert(vmid, pool.clone());
            }
        }
        for storage in storages {
            if call.flag("delete") {
                state.access.pool_storages.remove(&(pool.clone(), storage));
            } else {
                state.access.pool_storages.insert((pool.clone(), storage));
            }
        }
        Ok(Reply::null())
    })
}

/// `GET /pools`, with members where one is asked for.
pub(super) fn pools(call: &Call) -> Reply {
    let pools = call.sim.read(|state| state.pools.clone());
    let wanted = call.get("poolid");
    let list: Vec<Value> = pools
        .iter()
        .filter(|pool| wanted.is_none_or(|wanted| wanted == *pool))
        .filter(|pool| call.may(&format!("/pool/{pool}"), &["Pool.Audit", "Pool.Allocate"]))
        .map(|pool| match wanted {
            Some(_) => json!({ "poolid": pool, "members": cluster::members(call, pool) }),
            None => json!({ "poolid": pool }),
        })
        .collect();
    json!(list).into()
}

/// `GET /pools/{poolid}`.
pub(super) fn pool(call: &Call) -> Result<Reply, PveError> {
    let pool = call.text("poolid");
    if !call.sim.read(|state| state.pools.contains(pool)) {
        return Err(PveError::die(format!("pool '{pool}' does not exist")));
    }
    Ok(json!({ "poolid": pool, "members": cluster::members(call, pool) }).into())
}
