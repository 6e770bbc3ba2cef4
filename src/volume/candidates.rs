//! Where a new volume could go, and from where it can be reached then.

use std::{cmp::Reverse, collections::BTreeSet};

use super::{RegionState, inventory::Store};
use crate::{
    pve::cluster::{Resources, StorageRow},
    types::{Region, VolId, VolumeHandle, topology::Place},
};

/// A storage on a node that could take a new volume.
pub(super) struct Candidate<'a> {
    pub(super) state: &'a RegionState,
    pub(super) row: &'a StorageRow,
    /// Whether its node is online.
    pub(super) online: bool,
    /// From where the volume could be reached.
    pub(super) places: Vec<Place>,
}

impl Candidate<'_> {
    pub(super) fn store(&self) -> Store {
        Store::of_row(self.row)
    }

    pub(super) fn region(&self) -> &Region {
        self.state.client.region()
    }

    /// The handle of a volume there.
    pub(super) fn handle(&self, volid: VolId) -> VolumeHandle {
        VolumeHandle { region: self.region().clone(), zone: self.store().zone, volid }
    }
}

/// Where a new volume could go, preferred places first, and where an earlier request may have put it but nothing can be put now.
#[derive(Default)]
pub(super) struct Choice<'a> {
    pub(super) usable: Vec<Candidate<'a>>,
    /// On a node that is not online, or with a storage that is not active there.
    pub(super) away: Vec<Candidate<'a>>,
}

/// From where volumes of a storage can be reached: from its node where it is local, and else from the whole region, or from those nodes
/// that have it, one place each.
pub(super) fn places_of(region: &Region, resources: &Resources, row: &StorageRow) -> Vec<Place> {
    let at = |zone| Place { region: region.clone(), zone };
    if !row.shared {
        return vec![at(Some(row.node.clone()))];
    }
    let having: BTreeSet<_> = resources.storage(&row.storage).map(|row| &row.node).collect();
    if resources.nodes.iter().all(|node| having.contains(&node.node)) {
        return vec![at(None)];
    }
    having.into_iter().map(|node| at(Some(node.clone()))).collect()
}

/// The candidates of a region among the rows of one storage, preferred ones first. `wanted` are the places of that region that will do,
/// in the order of preference; none means any. `reasons` is told why others are out.
pub(super) fn candidates<'a>(
    state: &'a RegionState,
    resources: &'a Resources,
    rows: &[&'a StorageRow],
    wanted: &[&Place],
    reasons: &mut Vec<String>,
) -> Choice<'a> {
    let Some(first) = rows.first() else { return Choice::default() };
    let (mut usable, away): (Vec<&'a StorageRow>, Vec<&'a StorageRow>) =
        rows.iter().partition(|row| row.available && resources.is_online(&row.node));
    reasons.extend(away.iter().map(|row| format!("not available on node `{}`", row.node)));
    // Where nothing says otherwise, the node with the most room.
    usable.sort_by_key(|row| Reverse(row.free()));
    let anywhere = wanted.is_empty() || wanted.iter().any(|place| place.zone.is_none());
    let zones = || wanted.iter().filter_map(|place| place.zone.as_ref());
    let at = |row: &'a StorageRow| Candidate {
        state,
        row,
        online: resources.is_online(&row.node),
        places: places_of(state.client.region(), resources, row),
    };

    if first.shared {
        if !anywhere && !zones().any(|zone| rows.iter().any(|row| row.node == *zone)) {
            reasons.extend(zones().map(|zone| format!("not on node `{zone}`")));
            return Choice::default();
        }
        // Any node that has it can make the volume, and shows it.
        usable.sort_by_key(|row| zones().position(|zone| row.node == *zone).unwrap_or(usize::MAX));
        let away = if usable.is_empty() { away.into_iter().take(1).map(at).collect() } else { Vec::new() };
        return Choice { usable: usable.into_iter().take(1).map(at).collect(), away };
    }
    if anywhere {
        return Choice {
            usable: usable.into_iter().map(at).collect(),
            away: away.into_iter().map(at).collect(),
        };
    }
    let mut choice = Choice::default();
    for zone in zones() {
        let known = |chosen: &[Candidate<'a>]| chosen.iter().any(|candidate| candidate.row.node == *zone);
        if known(&choice.usable) || known(&choice.away) {
            continue;
        }
        let on_zone = |row: &&&'a StorageRow| row.node == *zone;
        if let Some(row) = usable.iter().find(on_zone) {
            choice.usable.push(at(row));
        } else if let Some(row) = away.iter().find(on_zone) {
            choice.away.push(at(row));
        } else {
            reasons.push(format!("not on node `{zone}`"));
        }
    }
    choice
}
