//! The HA manager, where the world has it act: it keeps its resources in the state they are to be in, and brings them
//! back on another node when theirs is gone (pve-ha-manager `Manager.pm:manage`, `next_state_started`, `next_state_recovery`, `NodeStatus.pm`).
//!
//! One round every two seconds, on the cluster's clock. A node that is not heard of for a minute is fenced; its
//! resources go from `fence` through `recovery` to another node that a rule or group allows and that sees all their
//! disks. What has none is in `error`.

use super::Sim;
use super::rules::conf::Conf;
use super::rules::schema::split_list;
use super::state::{NodeState, State};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Time between two rounds. PVE's manager takes ten seconds.
const ROUND: Duration = Duration::from_secs(2);
/// How long a node may be silent before it counts as fenced (`NodeStatus.pm:$fence_delay`).
const FENCE_DELAY: u64 = 60;

/// What a round has found to do, outside of the state's lock.
enum Deed {
    Start(u32),
    Stop(u32),
    Migrate(u32, String),
    /// Its node was fenced, and its guest is gone with it.
    Fenced(u32),
}

impl Sim {
    /// Acts until the last handle of the cluster is gone.
    pub(super) fn run_ha_manager(&self) {
        let inner = std::sync::Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(ROUND).await;
                let Some(inner) = inner.upgrade() else { return };
                Self { inner }.ha_round().await;
            }
        });
    }

    /// One round.
    async fn ha_round(&self) {
        let now = self.clock().elapsed().as_secs();
        let deeds: Vec<Deed> = self.change(|state| {
            if !state.ha_acts || !state.has_quorum() {
                return Vec::new();
            }
            watch_nodes(state, now);
            let resources: Vec<String> = state.ha.keys().cloned().collect();
            resources.iter().filter_map(|sid| next(state, sid, now)).collect()
        });
        for deed in deeds {
            self.do_deed(deed);
        }
        self.save_if_dirty().await;
    }

    fn do_deed(&self, deed: Deed) {
        let (vmid, worker) = match &deed {
            Deed::Start(vmid) => (*vmid, "qmstart"),
            Deed::Stop(vmid) => (*vmid, "qmshutdown"),
            Deed::Migrate(vmid, _) => (*vmid, "qmigrate"),
            Deed::Fenced(vmid) => return self.power_off_in_memory(*vmid),
        };
        let Some(node) = self.read(|state| state.vms.get(&vmid).map(|vm| vm.node.clone())) else { return };
        let sim = self.clone();
        self.start_task(&node, worker, &vmid.to_string(), "root@pam", move |_| async move {
            match deed {
                Deed::Start(vmid) => super::api::power::power_on(&sim, vmid).await,
                Deed::Stop(vmid) => {
                    let _lock = sim.locks().vm(vmid).await?;
                    super::api::power::cut(&sim, vmid).await;
                    Ok(())
                }
                Deed::Migrate(vmid, target) => {
                    let _lock = sim.locks().vm(vmid).await?;
                    sim.move_vm(vmid, &target);
                    Ok(())
                }
                // Nothing that a task is made for.
                Deed::Fenced(_) => Ok(()),
            }
        });
    }
}

/// Nodes that are no longer heard of, and those that are again.
fn watch_nodes(state: &mut State, now: u64) {
    for (node, fares) in &state.nodes {
        if *fares == NodeState::Online {
            state.fencing.remove(node);
        } else {
            state.fencing.entry(node.clone()).or_insert(now);
        }
    }
}

/// Brings one resource a step further.
fn next(state: &mut State, sid: &str, now: u64) -> Option<Deed> {
    let vmid: u32 = sid.strip_prefix("vm:")?.parse().ok()?;
    let wanted = state.ha.get(sid)?.get("state").and_then(Value::as_str).unwrap_or("started").to_owned();
    let vm = state.vms.get(&vmid)?;
    let (node, running, is_locked) = (vm.node.clone(), vm.running, vm.conf.current.contains_key("lock"));
    let before = vm.hastate.clone();
    if wanted == "ignored" {
        set(state, vmid, "ignored");
        return None;
    }
    if let Some(since) = state.fencing.get(&node).copied() {
        if now.saturating_sub(since) < FENCE_DELAY {
            set(state, vmid, "fence");
            return None;
        }
        // The watchdog has cut its power by now.
        return recover(state, sid, vmid, &wanted);
    }
    if before.as_deref() == Some("error") && wanted != "disabled" {
        return None;
    }
    let request = state.ha_requests.remove(sid);
    if request.as_deref() == Some("stop") {
        // The request becomes the resource's own state (`Manager.pm:next_state_started`, `HA/Env.pm:update_service_config`).
        state.ha.get_mut(sid)?.insert("state".to_owned(), json!("stopped"));
        set(state, vmid, "request_stop");
        return running.then_some(Deed::Stop(vmid));
    }
    if let Some(target) = request.and_then(|request| request.split_once(' ').map(|(_, node)| node.to_owned()))
    {
        let known = state.nodes.get(&target) == Some(&NodeState::Online) && target != node;
        if known && may_run_on(state, vmid, &target) {
            set(state, vmid, if running { "migrate" } else { "relocate" });
            return Some(Deed::Migrate(vmid, target));
        }
    }
    match (wanted.as_str(), running) {
        ("started", true) => set(state, vmid, "started"),
        ("started", false) if !is_locked => {
            // A start that has been asked for and is under way is not asked for again.
            let asked = before.as_deref() == Some("starting");
            set(state, vmid, if asked { "started" } else { "starting" });
            return (!asked).then_some(Deed::Start(vmid));
        }
        ("stopped" | "disabled", true) => {
            let asked = before.as_deref() == Some("request_stop");
            set(state, vmid, "request_stop");
            return (!asked).then_some(Deed::Stop(vmid));
        }
        ("stopped" | "disabled", false) => set(state, vmid, "stopped"),
        _ => {}
    }
    None
}

fn set(state: &mut State, vmid: u32, said: &str) {
    if state.vms.get(&vmid).is_some_and(|vm| vm.hastate.as_deref() != Some(said))
        && let Some(vm) = state.vms.get_mut(&vmid)
    {
        vm.hastate = Some(said.to_owned());
    }
}

/// A resource of a fenced node: first it is said to recover, in the next round it is on another node.
fn recover(state: &mut State, sid: &str, vmid: u32, wanted: &str) -> Option<Deed> {
    if state.vms.get(&vmid)?.hastate.as_deref() != Some("recovery") {
        if let Some(vm) = state.vms.get_mut(&vmid) {
            vm.running = false;
            vm.drives.clear();
        }
        set(state, vmid, "recovery");
        return Some(Deed::Fenced(vmid));
    }
    let online = state.nodes.iter().filter(|(_, fares)| **fares == NodeState::Online);
    let online: Vec<String> = online.map(|(node, _)| node.clone()).collect();
    let target = candidates(state, sid, online).into_iter().next()?;
    if !may_run_on(state, vmid, &target) {
        // The config has moved, but the disks have not (`Manager.pm:next_state_recovery`, then a start that fails).
        if let Some(vm) = state.vms.get_mut(&vmid) {
            vm.node = target;
        }
        set(state, vmid, "error");
        return None;
    }
    if let Some(vm) = state.vms.get_mut(&vmid) {
        vm.node = target;
    }
    set(state, vmid, if wanted == "started" { "started" } else { "stopped" });
    None
}

/// The nodes a rule or group names, those with the highest priority first, and without one all
/// (pve-ha-manager `Rules/NodeAffinity.pm`, `Groups.pm`). One that is not strict, or restricted, allows all others after.
fn candidates(state: &State, sid: &str, online: Vec<String>) -> Vec<String> {
    let names = |section: &Map<String, Value>| {
        let resources = section.get("resources").and_then(Value::as_str).unwrap_or_default();
        split_list(resources).any(|resource| resource == sid)
    };
    let affinity = state.ha_rules.values().find(|rule| {
        rule.get("type") == Some(&json!("node-affinity"))
            && rule.get("disable") != Some(&json!(1))
            && names(rule)
    });
    let group = || state.ha_groups.get(state.ha.get(sid)?.get("group")?.as_str()?);
    let Some(section) = affinity.or_else(group) else { return online };
    let listed = section.get("nodes").and_then(Value::as_str).unwrap_or_default();
    let mut found: Vec<(i64, String)> = split_list(listed)
        .map(|entry| {
            let (node, priority) = entry.split_once(':').unwrap_or((entry, "0"));
            (-priority.parse::<i64>().unwrap_or(0), node.to_owned())
        })
        .filter(|(_, node)| online.contains(node))
        .collect();
    found.sort();
    let mut nodes: Vec<String> = found.into_iter().map(|(_, node)| node).collect();
    let bound = ["strict", "restricted"].iter().any(|key| section.get(*key) == Some(&json!(1)));
    if !bound {
        nodes.extend(online.into_iter().filter(|node| !listed.contains(node.as_str())));
    }
    nodes
}

/// Whether all disks of a VM are where `node` sees them.
fn may_run_on(state: &State, vmid: u32, node: &str) -> bool {
    state.vms.get(&vmid).is_some_and(|vm| {
        Conf::disks(&vm.conf.current).all(|(_, drive)| {
            let id = drive.file.split(':').next().unwrap_or_default();
            state.storages.get(id).is_some_and(|storage| storage.config.shared && storage.config.is_on(node))
        })
    })
}
