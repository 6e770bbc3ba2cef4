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
) -> Vec<Candidate<'a>> {
    let Some(first) = rows.first() else { return Vec::new() };
    let mut usable: Vec<&'a StorageRow> = Vec::new();
    for row in rows {
        if row.available && resources.is_online(&row.node) {
            usable.push(row);
        } else {
            reasons.push(format!("not available on node `{}`", row.node));
        }
    }
    // Where nothing says otherwise, the node with the most room.
    usable.sort_by_key(|row| Reverse(row.free()));
    let anywhere = wanted.is_empty() || wanted.iter().any(|place| place.zone.is_none());
    let zones = || wanted.iter().filter_map(|place| place.zone.as_ref());
    let at = |row: &'a StorageRow| Candidate {
        state,
        row,
        places: places_of(state.client.region(), resources, row),
    };

    if first.shared {
        if !anywhere && !zones().any(|zone| rows.iter().any(|row| row.node == *zone)) {
            reasons.extend(zones().map(|zone| format!("not on node `{zone}`")));
            return Vec::new();
        }
        // Any node that has it can make the volume.
        usable.sort_by_key(|row| zones().position(|zone| row.node == *zone).unwrap_or(usize::MAX));
        return usable.into_iter().take(1).map(at).collect();
    }
    if anywhere {
        return usable.into_iter().map(at).collect();
    }
    let mut chosen: Vec<Candidate<'a>> = Vec::new();
    for zone in zones() {
        match usable.iter().find(|row| row.node == *zone) {
            Some(row) if chosen.iter().all(|c| c.row.node != row.node) => chosen.push(at(row)),
            Some(_) => {}
            None => reasons.push(format!("not on node `{zone}`")),
        }
    }
    chosen
}
