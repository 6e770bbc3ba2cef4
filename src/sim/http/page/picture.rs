//! Who holds what, as lines from VMs to volumes.

use crate::sim::rules::conf::Conf;
use crate::sim::state::{State, Vm, VolumeKey};
use std::collections::{BTreeMap, BTreeSet};

/// Disks that are drawn; a picture of more is none.
const MOST: usize = 120;
/// Height of a volume's box and the gap below it.
const ROW: u32 = 22;
const GAP: u32 = 8;

/// A box with a text.
#[derive(Debug)]
pub(super) struct Box {
    pub(super) y: u32,
    pub(super) height: u32,
    pub(super) text_y: u32,
    pub(super) text: String,
    pub(super) class: &'static str,
}

/// A disk.
#[derive(Debug)]
pub(super) struct Edge {
    pub(super) from: u32,
    pub(super) to: u32,
    pub(super) label: u32,
    pub(super) slot: String,
    pub(super) class: &'static str,
    pub(super) title: String,
}

/// The whole of it.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) edges: Vec<Edge>,
    pub(super) left: Vec<Box>,
    pub(super) right: Vec<Box>,
    pub(super) height: u32,
    /// Disks that are not in it.
    pub(super) left_out: usize,
}

/// How a VM has a volume in a slot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Holding {
    pub(super) slot: String,
    pub(super) key: VolumeKey,
    /// Style of its line.
    pub(super) class: &'static str,
    /// What is to be said of it.
    pub(super) note: &'static str,
}

/// What a VM holds: by its config, by what is pending, and by its QEMU.
pub(super) fn holdings(state: &State, vm: &Vm) -> Vec<Holding> {
    let key = |file: &str| state.volume_key(&vm.node, file).ok();
    let has = |slot: &str, key: &VolumeKey| vm.drives.get(slot).is_some_and(|drive| drive.volume == *key);
    let mut all = BTreeSet::new();
    for (slot, drive) in Conf::disks(&vm.conf.current) {
        let Some(key) = key(&drive.file) else { continue };
        let (class, note) = match (vm.running, has(slot, &key)) {
            _ if vm.conf.pending_delete.contains_key(slot) => ("pending", "to be taken out"),
            (true, true) => ("", ""),
            (true, false) => ("qemu", "QEMU lacks it"),
            (false, _) => ("config", ""),
        };
        all.insert(Holding { slot: slot.to_owned(), key, class, note });
    }
    for (slot, drive) in Conf::disks(&vm.conf.pending) {
        if let Some(key) = key(&drive.file) {
            all.insert(Holding { slot: slot.to_owned(), key, class: "pending", note: "pending" });
        }
    }
    for (slot, drive) in &vm.drives {
        if !all.iter().any(|held| held.slot == *slot && held.key == drive.volume) {
            let (class, note) = ("qemu", "only QEMU has it");
            all.insert(Holding { slot: slot.clone(), key: drive.volume.clone(), class, note });
        }
    }
    all.into_iter().collect()
}

fn text_in(y: u32, height: u32) -> u32 {
    y + height / 2 + 4
}

impl Picture {
    /// The picture of the state.
    pub(super) fn of(state: &State) -> Self {
        let mut held: Vec<(u32, Vec<Holding>)> = Vec::new();
        let (mut drawn, mut left_out) = (0, 0);
        for (vmid, vm) in &*state.vms {
            let all = holdings(state, vm);
            if all.is_empty() {
                continue;
            }
            if drawn + all.len() > MOST {
                left_out += all.len();
                continue;
            }
            drawn += all.len();
            held.push((*vmid, all));
        }
        // Volumes stand in the order in which VMs hold them, so that few lines cross.
        let mut places: BTreeMap<&VolumeKey, u32> = BTreeMap::new();
        let mut right = Vec::new();
        let mut y = GAP;
        for holding in held.iter().flat_map(|(_, all)| all) {
            if places.contains_key(&holding.key) {
                continue;
            }
            places.insert(&holding.key, y + ROW / 2);
            let node = holding.key.node.as_deref().map_or(String::new(), |node| format!(" on {node}"));
            right.push(Box {
                y,
                height: ROW,
                text_y: text_in(y, ROW),
                text: shortened(&format!("{}{node}", holding.key.volid()), 60),
                class: if holding.key.node.is_none() { "shared" } else { "" },
            });
            y += ROW + GAP;
        }
        let bottom = y;
        let (mut left, mut edges) = (Vec::new(), Vec::new());
        let mut y = GAP;
        for (vmid, all) in &held {
            let Some(vm) = state.vms.get(vmid) else { continue };
            let rows = u32::try_from(all.len()).unwrap_or(1);
            let height = rows * (ROW + GAP) - GAP;
            let name = vm.conf.current.get("name").map_or("", String::as_str);
            let text = shortened(&format!("{vmid} {name} on {}", vm.node), 38);
            left.push(Box { y, height, text_y: text_in(y, height), text, class: "" });
            for (index, holding) in (0..).zip(all) {
                let from = y + index * (ROW + GAP) + ROW / 2;
                edges.push(Edge {
                    from,
                    to: places.get(&holding.key).copied().unwrap_or_default(),
                    label: from - 4,
                    slot: holding.slot.clone(),
                    class: holding.class,
                    title: format!("VM {vmid} {} {} {}", holding.slot, holding.key.volid(), holding.note),
                });
            }
            y += height + GAP;
        }
        Self { edges, left, right, height: bottom.max(y) + GAP, left_out }
    }
}

/// The text, or its beginning and its end.
fn shortened(text: &str, most: usize) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    let head: String = text.chars().take(most / 2).collect();
    let tail: String = text.chars().skip(count - most / 2 + 1).collect();
    format!("{head}…{tail}")
}
