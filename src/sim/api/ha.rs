//! HA resources, rules and groups (pve-ha-manager `API2/HA/*.pm`). What the manager makes of them is in `hamanager`.

use super::hacommand;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::{flag, split_list};
use crate::sim::state::State;
use serde_json::{Map, Value, json};
use sha1::{Digest as _, Sha1};
use std::fmt::Write as _;

/// Sections of a configuration file by id.
pub(crate) type Sections = std::collections::BTreeMap<String, Map<String, Value>>;

pub(super) fn digest(sections: &Sections) -> String {
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

/// `GET /cluster/ha/resources` (`Resources.pm:index`).
pub(super) fn resources(call: &Call) -> Reply {
    call.sim.read(|state| {
        let digest = digest(&state.ha);
        let all: Vec<Value> = state.ha.values().map(|section| with(section, "digest", &digest)).collect();
        json!(all).into()
    })
}

pub(super) fn with(section: &Map<String, Value>, key: &str, value: &str) -> Value {
    let mut section = section.clone();
    section.insert(key.to_owned(), json!(value));
    Value::Object(section)
}

/// `GET /cluster/ha/resources/{sid}` (`Resources.pm:read`).
pub(super) fn resource(call: &Call) -> Result<Reply, PveError> {
    let sid = sid_of(call)?;
    call.sim.read(|state| {
        let section = state.ha.get(&sid).ok_or_else(|| PveError::die(format!("no such resource '{sid}'")))?;
        Ok(with(section, "digest", &digest(&state.ha)).into())
    })
}

/// `POST /cluster/ha/resources` (`Resources.pm:create`, `Resources/PVEVM.pm:exists`).
pub(super) fn add(call: &Call) -> Result<Reply, PveError> {
    let sid = sid_of(call)?;
    call.sim.change(|state| {
        check_group(state, call)?;
        if !vmid_of(&sid).is_some_and(|vmid| state.vms.contains_key(&vmid)) {
            return Err(PveError::die(format!("resource '{sid}' does not exist in cluster")));
        }
        if state.ha.contains_key(&sid) {
            return Err(PveError::die(format!(
                "create resource failed: resource ID '{sid}' already defined"
            )));
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

/// `status/current` and the resources show what the manager makes of a resource; an ignored one is none of its
/// (`HA/Config.pm:get_service_status`).
pub(super) fn set_state(state: &mut State, sid: &str, wanted: Option<&str>) {
    if let Some(vm) = vmid_of(sid).and_then(|vmid| state.vms.get_mut(&vmid)) {
        vm.hastate = wanted.map(str::to_owned);
    }
}

/// The VM that a resource is.
pub(super) fn vmid_of(sid: &str) -> Option<u32> {
    sid.strip_prefix("vm:")?.parse().ok()
}

/// The resource that a call names, by its id or by that of its VM (pve-ha-manager `HA/Config.pm:parse_sid`).
fn sid_of(call: &Call) -> Result<String, PveError> {
    let sid = call.text("sid");
    if sid.contains(':') {
        return Ok(sid.to_owned());
    }
    let known = sid.parse().is_ok_and(|vmid: u32| call.sim.read(|state| state.vms.contains_key(&vmid)));
    if known {
        return Ok(format!("vm:{sid}"));
    }
    Err(PveError::die(match sid.parse::<u32>() {
        Ok(_) => format!("unable to detect SID from VMID - VM/CT {sid} does not exist"),
        Err(_) => format!("unable to parse service id '{sid}'"),
    }))
}

/// `PUT /cluster/ha/resources/{sid}` (`Resources.pm:update`).
pub(super) fn update(call: &Call) -> Result<Reply, PveError> {
    let sid = sid_of(call)?;
    call.sim.change(|state| {
        check_group(state, call)?;
        if call.get("state") != Some("disabled") {
            hacommand::check_service(state, &sid)?;
        }
        let now = digest(&state.ha);
        let what = "update resources config failed";
        refuse_stale(call, &now, what)?;
        let section = state.ha.get_mut(&sid);
        let section = section.ok_or_else(|| PveError::die(format!("{what}: no such resource '{sid}'")))?;
        change(section, call, &[], &["sid", "type"]);
        Ok(Reply::null())
    })
}

/// A resource names no group where groups have become rules, and only one that there is elsewhere.
fn check_group(state: &State, call: &Call) -> Result<(), PveError> {
    match call.get("group") {
        Some(_) if !state.version.is_eight() => {
            Err(PveError::die("invalid parameter 'group': ha groups have been migrated to rules"))
        }
        Some(group) if !state.ha_groups.contains_key(group) => {
            Err(PveError::die(format!("HA group '{group}' does not exist")))
        }
        _ => Ok(()),
    }
}

/// `POST /cluster/ha/resources/{sid}/migrate` and `relocate`: what the manager is asked to do
/// (`Resources.pm:migrate`).
pub(super) fn motion(call: &Call, how: &str) -> Result<Reply, PveError> {
    let (sid, node) = (sid_of(call)?, call.text("node").to_owned());
    call.sim.change(|state| {
        if !vmid_of(&sid).is_some_and(|vmid| hacommand::is_managed(state, vmid)) {
            return Err(PveError::die(format!("resource '{sid}' is not HA managed")));
        }
        hacommand::check_service(state, &sid)?;
        state.ha_requests.insert(sid.clone(), format!("{how} {node}"));
        Ok(json!({ "sid": sid, "requested-node": node }).into())
    })
}

/// `DELETE /cluster/ha/resources/{sid}` (`Resources.pm:delete`).
pub(super) fn remove(call: &Call) -> Result<Reply, PveError> {
    let sid = sid_of(call)?;
    let purge = call.get("purge").is_none() || call.flag("purge");
    call.sim.change(|state| {
        if !state.ha.contains_key(&sid) {
            return Err(PveError::die(format!("cannot delete service '{sid}', not HA managed!")));
        }
        forget(state, &sid, purge);
        Ok(Reply::null())
    })
}

/// Takes a resource away, and out of the rules that name it; a rule of this resource alone goes
/// (`HA/Config.pm:delete_service_from_config`).
pub(super) fn forget(state: &mut State, sid: &str, purge: bool) {
    state.ha.remove(sid);
    state.ha_requests.remove(sid);
    set_state(state, sid, None);
    if !purge {
        return;
    }
    state.ha_rules.retain(|_, rule| {
        let named = rule.get("resources").and_then(Value::as_str).unwrap_or_default();
        let others: Vec<&str> = split_list(named).filter(|other| *other != sid).collect();
        let others = others.join(",");
        rule.insert("resources".to_owned(), json!(others));
        !others.is_empty()
    });
}

/// `GET /cluster/ha/rules` (`Rules.pm:index`).
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

/// `GET /cluster/ha/rules/{rule}` (`Rules.pm:read_rule`).
pub(super) fn rule(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("rule");
    call.sim.read(|state| {
        let section = state.ha_rules.get(id);
        let section = section.ok_or_else(|| PveError::die(format!("no such ha rule '{id}'")))?;
        Ok(with(section, "digest", &digest(&state.ha_rules)).into())
    })
}

/// `PUT /cluster/ha/rules/{rule}` (`Rules.pm:update_rule`).
pub(super) fn change_rule(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("rule");
    call.sim.change(|state| {
        let now = digest(&state.ha_rules);
        refuse_stale(call, &now, "update HA rules failed")?;
        if state.ha_rules.contains_key(id) {
            check_rule(state, call, "update HA rules failed")?;
        }
        let section = state.ha_rules.get_mut(id);
        let section = section
            .ok_or_else(|| PveError::die(format!("update HA rules failed: HA rule '{id}' does not exist")))?;
        change(section, call, &["strict", "disable"], &["rule"]);
        Ok(Reply::null())
    })
}

/// Refuses a change that was made to another state of the file (pve-common `SectionConfig.pm:assert_if_modified`).
pub(super) fn refuse_stale(call: &Call, now: &str, what: &str) -> Result<(), PveError> {
    match call.get("digest").filter(|digest| !digest.is_empty() && *digest != now) {
        Some(_) => Err(PveError::die(format!(
            "{what}: detected modified configuration - file changed by other user? Try again."
        ))),
        None => Ok(()),
    }
}

/// Puts what a call sets into a section, and takes out what its `delete` names.
pub(super) fn change(into: &mut Map<String, Value>, call: &Call, flags: &[&str], without: &[&str]) {
    let mut more = vec!["digest", "delete"];
    more.extend(without);
    into.extend(section(call, flags, &more));
    for key in call.get("delete").into_iter().flat_map(split_list) {
        into.remove(key);
    }
}

/// Refuses a rule over what is no resource or no node (`Rules.pm:$assert_valid_resources_param`,
/// `$assert_valid_nodes_param`).
fn check_rule(state: &State, call: &Call, what: &str) -> Result<(), PveError> {
    let named = |name: &str| call.get(name).into_iter().flat_map(split_list);
    let resources: Vec<&str> = named("resources").filter(|sid| !state.ha.contains_key(*sid)).collect();
    if !resources.is_empty() {
        return Err(PveError::die(format!(
            "{what}: cannot use unmanaged resource(s) {}.",
            resources.join(", ")
        )));
    }
    let nodes = named("nodes").map(|node| node.split_once(':').map_or(node, |(node, _)| node));
    let nodes: Vec<&str> = nodes.filter(|node| !state.nodes.contains_key(*node)).collect();
    if !nodes.is_empty() {
        return Err(PveError::die(format!("{what}: cannot use non-existent node(s) {}.", nodes.join(", "))));
    }
    Ok(())
}

/// `POST /cluster/ha/rules` (`Rules.pm:create_rule`).
pub(super) fn add_rule(call: &Call) -> Result<Reply, PveError> {
    super::check_quorum(call)?;
    let id = call.text("rule").to_owned();
    call.sim.change(|state| {
        let what = "create ha rule failed";
        if state.ha_rules.contains_key(&id) {
            return Err(PveError::die(format!("{what}: HA rule '{id}' already defined")));
        }
        check_rule(state, call, what)?;
        state.ha_rules.insert(id, section(call, &["strict", "disable"], &[]));
        Ok(Reply::null())
    })
}

/// `DELETE /cluster/ha/rules/{rule}` (`Rules.pm:delete_rule`).
pub(super) fn remove_rule(call: &Call) -> Reply {
    call.sim.change(|state| state.ha_rules.remove(call.text("rule")));
    Reply::null()
}

/// `GET /cluster/ha/status/current` (`Status.pm:status`). Where the manager runs, it is on the first node that lives.
pub(super) fn status(call: &Call) -> Reply {
    let node = call.here();
    let version = call.sim.read(|state| state.version);
    let (quorate, active) =
        call.sim.read(|state| (state.is_quorate(&node), state.ha_acts && !state.ha.is_empty()));
    let mut list = vec![json!({
        "id": "quorum", "type": "quorum", "node": node,
        "status": if quorate { "OK".to_owned() } else { format!("No quorum on node '{node}'!") },
        "quorate": u8::from(quorate),
    })];
    let time = call.sim.clock().now();
    if active {
        let status = format!("{node} (active, {})", call.sim.clock().local());
        list.push(
            json!({ "id": "master", "type": "master", "node": node, "status": status, "timestamp": time }),
        );
    }
    if !version.is_eight() {
        let (armed, watchdog) = if active { ("armed", "active") } else { ("standby", "standby") };
        list.push(json!({
            "id": "fencing", "type": "fencing", "node": node,
            "status": format!("{armed} (CRM watchdog {watchdog})"), "armed-state": armed,
        }));
    }
    if active {
        call.sim.read(|state| {
            for node in state.nodes.keys().filter(|node| state.hears(call.via.as_deref(), node)) {
                let status = format!("{node} (active, {})", call.sim.clock().local());
                let id = format!("lrm:{node}");
                list.push(json!({ "id": id, "type": "lrm", "node": node, "status": status, "timestamp": time }));
            }
            for (sid, section) in &state.ha {
                let Some(vm) = vmid_of(sid).and_then(|vmid| state.vms.get(&vmid)) else { continue };
                let said = vm.hastate.as_deref().unwrap_or("queued");
                list.push(json!({
                    "id": format!("service:{sid}"), "type": "service", "sid": sid, "node": vm.node, "state": said,
                    "crm_state": said, "request_state": section.get("state"),
                    "status": format!("{sid} ({}, {said})", vm.node),
                }));
            }
        });
    }
    json!(list).into()
}

/// Groups as they are in the file, and the refusal of a release that has rules in their place (`Groups.pm`).
fn groups_of<'a>(state: &'a mut State, what: &str) -> Result<&'a mut Sections, PveError> {
    if state.version.is_eight() {
        return Ok(&mut state.ha_groups);
    }
    Err(PveError::die(format!("cannot {what}: ha groups have been migrated to rules")))
}

/// `GET /cluster/ha/groups` (`Groups.pm:index`).
pub(super) fn groups(call: &Call) -> Result<Reply, PveError> {
    call.sim.change(|state| {
        let groups = groups_of(state, "index groups")?;
        let digest = digest(groups);
        let all: Vec<Value> = groups.values().map(|section| with(section, "digest", &digest)).collect();
        Ok(json!(all).into())
    })
}

/// `GET /cluster/ha/groups/{group}` (`Groups.pm:read`).
pub(super) fn group(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("group");
    call.sim.change(|state| {
        let groups = groups_of(state, "read group")?;
        let digest = digest(groups);
        let section = groups.get(id).ok_or_else(|| PveError::die(format!("no such ha group '{id}'")))?;
        Ok(with(section, "digest", &digest).into())
    })
}

/// `POST /cluster/ha/groups` (`Groups.pm:create`).
pub(super) fn add_group(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("group").to_owned();
    call.sim.change(|state| {
        let groups = groups_of(state, "create group")?;
        if groups.contains_key(&id) {
            return Err(PveError::die(format!("create ha group failed: ha group ID '{id}' already defined")));
        }
        let mut entry = section(call, &["nofailback", "restricted"], &[]);
        entry.insert("type".to_owned(), json!("group"));
        groups.insert(id, entry);
        Ok(Reply::null())
    })
}

/// `PUT /cluster/ha/groups/{group}` (`Groups.pm:update`).
pub(super) fn change_group(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("group");
    call.sim.change(|state| {
        let groups = groups_of(state, "update group")?;
        let now = digest(groups);
        refuse_stale(call, &now, "update ha group failed")?;
        let section = groups.get_mut(id);
        let section = section
            .ok_or_else(|| PveError::die(format!("update ha group failed: no such ha group '{id}'")))?;
        change(section, call, &["nofailback", "restricted"], &["group", "type"]);
        Ok(Reply::null())
    })
}

/// `DELETE /cluster/ha/groups/{group}` (`Groups.pm:delete`): not one that a resource names.
pub(super) fn remove_group(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("group");
    call.sim.change(|state| {
        let user = state.ha.iter().find(|(_, section)| section.get("group").is_some_and(|of| of == id));
        let user = user.map(|(sid, _)| sid.clone());
        let groups = groups_of(state, "delete group")?;
        if let Some(sid) = user {
            return Err(PveError::die(format!(
                "delete ha group failed: ha group is used by service '{sid}'"
            )));
        }
        groups.remove(id);
        Ok(Reply::null())
    })
}
