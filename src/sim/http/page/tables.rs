//! The rows of the page's tables.

use super::picture::holdings;
use crate::sim::clock::date_of;
use crate::sim::state::{NodeState, State};
use crate::sim::tasks;
use std::collections::BTreeMap;

/// Rows of a table; what is beyond is in `/_sim/state`.
const MOST: usize = 500;
/// Tasks that are shown.
const TASKS: usize = 25;

pub(super) struct Node {
    pub(super) name: String,
    pub(super) state: &'static str,
    pub(super) class: &'static str,
    pub(super) address: String,
    pub(super) vms: usize,
    pub(super) running: usize,
}

pub(super) struct Slot {
    pub(super) name: String,
    pub(super) volume: String,
    pub(super) note: &'static str,
    pub(super) class: &'static str,
}

pub(super) struct Vm {
    pub(super) vmid: u32,
    pub(super) name: String,
    pub(super) node: String,
    pub(super) status: String,
    pub(super) class: &'static str,
    pub(super) ha: String,
    pub(super) slots: Vec<Slot>,
}

pub(super) struct Storage {
    pub(super) id: String,
    pub(super) kind: &'static str,
    pub(super) node: String,
    pub(super) percent: u64,
    pub(super) used: String,
    pub(super) total: String,
    pub(super) volumes: usize,
    pub(super) note: &'static str,
}

pub(super) struct Volume {
    pub(super) volid: String,
    pub(super) node: String,
    pub(super) size: String,
    pub(super) format: &'static str,
    pub(super) holders: String,
}

pub(super) struct Task {
    pub(super) begun: String,
    pub(super) node: String,
    pub(super) what: String,
    pub(super) user: String,
    pub(super) status: String,
    pub(super) class: &'static str,
}

pub(super) struct Unmodelled {
    pub(super) times: u64,
    pub(super) text: String,
}

fn size(bytes: u64) -> String {
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].into_iter();
    let (mut whole, mut tenths, mut unit) = (bytes, 0, units.next().unwrap_or_default());
    while whole >= 1024 {
        tenths = (whole % 1024) * 10 / 1024;
        whole /= 1024;
        unit = units.next().unwrap_or("PiB");
    }
    format!("{whole}.{tenths} {unit}")
}

pub(super) fn nodes(state: &State) -> Vec<Node> {
    let node = |(name, fares): (&String, &NodeState)| {
        let (word, class) = match fares {
            NodeState::Online => ("online", "good"),
            NodeState::Dead => ("dead", "bad"),
            NodeState::Cut => ("cut off", "odd"),
            NodeState::Rebooting => ("rebooting", "odd"),
        };
        let here = || state.vms.values().filter(|vm| vm.node == *name);
        Node {
            name: name.clone(),
            state: word,
            class,
            address: state.address(name),
            vms: here().count(),
            running: here().filter(|vm| vm.running).count(),
        }
    };
    state.nodes.iter().map(node).collect()
}

pub(super) fn vms(state: &State) -> Vec<Vm> {
    let row = |(vmid, vm): (&u32, &crate::sim::state::Vm)| {
        let key = |key: &str| vm.conf.current.get(key).cloned();
        let (status, class) = match (vm.running, vm.hung, vm.paused) {
            (true, true, _) => ("QEMU hangs", "bad"),
            (true, _, true) => ("paused", "odd"),
            (true, ..) => ("running", "good"),
            (false, ..) => ("stopped", "soft"),
        };
        let slots = holdings(state, vm).into_iter().map(|held| Slot {
            name: held.slot,
            volume: held.key.volid(),
            note: held.note,
            class: if held.class == "qemu" { "bad" } else { "odd" },
        });
        Vm {
            vmid: *vmid,
            name: key("name").unwrap_or_default(),
            node: vm.node.clone(),
            status: key("lock").map_or_else(|| status.to_owned(), |lock| format!("{status}, locked: {lock}")),
            class,
            ha: vm.hastate.clone().unwrap_or_default(),
            slots: slots.collect(),
        }
    };
    state.vms.iter().take(MOST).map(row).collect()
}

pub(super) fn storages(state: &State) -> Vec<Storage> {
    let mut rows = Vec::new();
    for (id, storage) in &state.storages {
        let nodes: Vec<&String> = state.nodes.keys().filter(|node| storage.config.is_on(node)).collect();
        let shown =
            if storage.config.shared { nodes.get(..1.min(nodes.len())).unwrap_or_default() } else { &nodes };
        for node in shown {
            let used = if storage.full { storage.total } else { state.used(node, id).min(storage.total) };
            let of = |key: &crate::sim::state::VolumeKey| {
                key.storage == *id && key.node.as_deref().is_none_or(|of| of == *node)
            };
            rows.push(Storage {
                id: id.clone(),
                kind: storage.config.kind.word(),
                node: if storage.config.shared { "all".to_owned() } else { (*node).clone() },
                percent: (used.saturating_mul(100)).checked_div(storage.total).unwrap_or(0),
                used: size(used),
                total: size(storage.total),
                volumes: state.volumes.keys().filter(|key| of(key)).count(),
                note: match (storage.full, storage.config.enabled, state.unmounted.contains_key(id)) {
                    (true, ..) => "full",
                    (_, false, _) => "disabled",
                    (_, _, true) => "not mounted",
                    _ => "",
                },
            });
        }
    }
    rows
}

pub(super) fn volumes(state: &State) -> Vec<Volume> {
    let mut holders: BTreeMap<crate::sim::state::VolumeKey, Vec<String>> = BTreeMap::new();
    for (vmid, vm) in &*state.vms {
        for held in holdings(state, vm) {
            holders.entry(held.key).or_default().push(format!("{vmid} {}", held.slot));
        }
    }
    let volumes = state.volumes.iter().take(MOST);
    volumes
        .map(|(key, volume)| Volume {
            volid: key.volid(),
            node: key.node.clone().unwrap_or_else(|| "all".to_owned()),
            size: size(volume.size),
            format: volume.format,
            holders: holders.get(key).map(|all| all.join(", ")).unwrap_or_default(),
        })
        .collect()
}

pub(super) fn tasks(state: &State) -> Vec<Task> {
    let row = |task: &tasks::Task| {
        let (status, class) = match task.status.as_deref() {
            None => ("running".to_owned(), "odd"),
            Some("OK") => ("OK".to_owned(), "good"),
            Some(status) => (status.to_owned(), "bad"),
        };
        Task {
            begun: date_of(task.parts.starttime),
            node: task.parts.node.clone(),
            what: format!("{} {}", task.parts.worker, task.parts.id),
            user: task.parts.user.clone(),
            status,
            class,
        }
    };
    state.tasks.iter().rev().take(TASKS).map(row).collect()
}

pub(super) fn unmodelled(state: &State) -> Vec<Unmodelled> {
    let row = |(text, times): (&String, &u64)| Unmodelled { times: *times, text: text.clone() };
    state.unmodelled.iter().take(MOST).map(row).collect()
}

pub(super) fn faults(state: &State) -> Vec<String> {
    state.faults.all().iter().filter_map(|fault| serde_json::to_string(fault).ok()).collect()
}
