//! Where the volume of a name may be already: looked through before the name is allocated.
//!
//! Read [`Volumes::find_made`] first. The [inventory](super::inventory) answers where a storage has been listed since the start, and
//! a request to the place itself where it has not. A place that can't be looked at is empty only where that is proven: by a listing
//! from before, or by its node, which says itself that it has no such storage.

use super::{
    Volumes,
    candidates::Candidate,
    create::{CreateError, CreatedVolume, Wanted},
    disk::{is_named_by_proxmox, keeps_files},
    inventory::{Entry, Store},
    outcome::Outcome,
};
use crate::{
    pve::{
        ApiError,
        cluster::{Resources, StorageRow},
    },
    types::{NodeName, StorageId, VolId, VolumeHandle, VolumeName},
};

impl Volumes {
    /// The volume that an equal request before this one made in a place that will do. Refused where it may be in a place that can't be
    /// looked at (`away`), and where it is in a place or on a storage that is not asked for, as far as those have been listed.
    /// `ask`: what is known is not enough, an allocation of which nothing is known may have made it since.
    pub(super) async fn find_made(
        &self,
        wanted: &Wanted<'_>,
        usable: &[Candidate<'_>],
        away: &[Candidate<'_>],
        ask: bool,
    ) -> Result<Option<CreatedVolume>, CreateError> {
        for candidate in usable {
            if let Some(found) = self.look(wanted, candidate, ask).await? {
                return Ok(Some(found));
            }
        }
        for candidate in away {
            if let Some(found) = self.look_away(wanted, candidate).await? {
                return Ok(Some(found));
            }
        }
        let looked: Vec<_> =
            usable.iter().chain(away).map(|candidate| (candidate.region(), candidate.store())).collect();
        for (region, state) in &self.inner.regions {
            for (store, name) in state.inventory.having(&wanted.disk) {
                if looked.iter().all(|(at, store_there)| *at != region || *store_there != store) {
                    self.refuse_elsewhere(wanted, state, &store, name).await?;
                }
            }
        }
        Ok(None)
    }

    /// The volume that an equal request before this one made in a place, if it did.
    pub(super) async fn look(
        &self,
        wanted: &Wanted<'_>,
        candidate: &Candidate<'_>,
        ask: bool,
    ) -> Result<Option<CreatedVolume>, CreateError> {
        let (inventory, client) = (&candidate.state.inventory, &candidate.state.client);
        let (store, plugin, node) = (candidate.store(), candidate.row.plugin.as_str(), &candidate.row.node);
        let owner = self.inner.settings.owner;
        let expected = self.expected(wanted, plugin)?;
        let volid = |name| VolId { storage: wanted.storage.clone(), name };
        let by_name = is_named_by_proxmox(plugin);
        let mut entry = inventory.entry(&store, plugin, &expected);
        if !by_name && (entry == Entry::Unlisted || (ask && entry == Entry::Absent)) {
            // The plugin may call the volume something else: only a listing shows it.
            inventory.list(client, &store, node, owner).await.map_err(|source| wanted.api(source))?;
            entry = inventory.entry(&store, plugin, &expected);
        }
        if keeps_files(plugin)
            && let Some(other) = other_format(&expected)
            && matches!(inventory.entry(&store, plugin, &other), Entry::Present(_))
        {
            return Err(CreateError::OtherFormat { handle: candidate.handle(volid(other)) });
        }
        let name = match entry {
            Entry::Absent if !ask || !by_name => return Ok(None),
            Entry::Present(name) => name,
            Entry::Absent => expected,
            Entry::Unlisted => {
                inventory.list_soon(client, &store, node, owner);
                expected
            }
        };
        let volid = volid(name);
        let info = match client.volume(node, &volid).await {
            Ok(info) => info,
            Err(error) if error.is_volume_unreadable() => {
                // Proxmox says the same of what it can't see (pve-storage `Storage.pm:volume_size_info` activates nothing), and what the
                // cluster tells of a storage may be minutes old.
                let status = client.storage_status(node, wanted.storage).await;
                let status = status.map_err(|source| wanted.api(source))?;
                if !(status.enabled && status.active) {
                    return Err(away(wanted, wanted.storage, node));
                }
                // It was never made, or somebody deleted it.
                inventory.note(&store, volid.name, None);
                return Ok(None);
            }
            Err(source) => return Err(wanted.api(source)),
        };
        let (handle, places) = (candidate.handle(volid), candidate.places.clone());
        Ok(Some(CreatedVolume { handle, size: info.size, places }))
    }

    /// The same in a place where nothing can be made now: its node is not online, or its storage not active there.
    async fn look_away(
        &self,
        wanted: &Wanted<'_>,
        candidate: &Candidate<'_>,
    ) -> Result<Option<CreatedVolume>, CreateError> {
        let (inventory, client) = (&candidate.state.inventory, &candidate.state.client);
        let (store, node) = (candidate.store(), &candidate.row.node);
        let Ok(expected) = self.expected(wanted, &candidate.row.plugin) else {
            // No volume of this kind was ever made there.
            return Ok(None);
        };
        let entry = inventory.entry(&store, &candidate.row.plugin, &expected);
        if entry == Entry::Absent {
            return Ok(None);
        }
        if !candidate.online {
            return Err(away(wanted, &store.storage, node));
        }
        // A listing activates the storage, or says why that can't be (pve-storage `Storage.pm:volume_list`). What the cluster tells of
        // it may be minutes old, and of a node that has just started nothing is told.
        match inventory.list(client, &store, node, self.inner.settings.owner).await {
            Ok(()) => self.look(wanted, candidate, false).await,
            Err(error) if entry == Entry::Unlisted && is_refused(&error) => {
                tracing::warn!(storage = %store.storage, %node, %error, "a node has no such storage, though the storage is defined for it");
                Ok(None)
            }
            Err(error) if is_refused(&error) => Err(away(wanted, &store.storage, node)),
            Err(source) => Err(wanted.api(source)),
        }
    }

    /// Refuses a name that is in a place, or on a storage, that is not asked for. What was listed is looked at before it stands in the way.
    async fn refuse_elsewhere(
        &self,
        wanted: &Wanted<'_>,
        state: &super::RegionState,
        store: &Store,
        name: VolumeName,
    ) -> Result<(), CreateError> {
        let resources = state.poll.recent(&state.client).await.map_err(|source| wanted.api(source))?;
        let rows: Vec<&StorageRow> = rows_of(&resources, store).collect();
        let Some(first) = rows.first() else {
            tracing::warn!(storage = %store.storage, volume = %name, "a storage that had a volume of this name is there no more");
            return Ok(());
        };
        if is_named_by_proxmox(&first.plugin) && !is_disk(&name, &wanted.disk) {
            return Ok(());
        }
        let usable = rows.iter().find(|row| row.available && resources.is_online(&row.node));
        let Some(row) = usable else { return Err(away(wanted, &store.storage, &first.node)) };
        let volid = VolId { storage: store.storage.clone(), name };
        match state.client.volume(&row.node, &volid).await {
            Ok(_) => {
                let (region, zone) = (state.client.region().clone(), store.zone.clone());
                let handle = VolumeHandle { region, zone, volid };
                Err(CreateError::Elsewhere { name: wanted.new.name.clone(), handle })
            }
            // Somebody else deleted it.
            Err(error) if error.is_volume_unreadable() => {
                state.inventory.note(store, volid.name, None);
                Ok(())
            }
            Err(source) => Err(wanted.api(source)),
        }
    }

    /// Has the storage listed on every node of the region that has it, in the background and once: when one of them is away later, it
    /// is known what it has.
    pub(super) fn list_all_soon(
        &self,
        state: &super::RegionState,
        storage: &StorageId,
        resources: &Resources,
    ) {
        let rows = resources.storage(storage);
        for row in rows.filter(|row| row.available && resources.is_online(&row.node)) {
            let store = Store::of_row(row);
            if !state.inventory.is_listed(&store) {
                state.inventory.list_soon(&state.client, &store, &row.node, self.inner.settings.owner);
            }
        }
    }

    /// The name that the storages of Proxmox itself give; a plugin of others may give another one.
    fn expected(&self, wanted: &Wanted<'_>, plugin: &str) -> Result<VolumeName, CreateError> {
        let filename = wanted.filename(plugin)?;
        let owner = self.inner.settings.owner;
        let name = if keeps_files(plugin) { format!("{owner}/{filename}") } else { filename };
        Ok(name.parse().expect("the name of a disk is the legal name of a volume"))
    }
}

fn away(wanted: &Wanted<'_>, storage: &StorageId, node: &NodeName) -> CreateError {
    CreateError::Away { name: wanted.new.name.clone(), storage: storage.clone(), node: node.clone() }
}

/// Whether the node itself said no, and not for want of a privilege.
fn is_refused(error: &ApiError) -> bool {
    Outcome::from(error) == Outcome::Final && !error.is_forbidden() && !error.is_unauthenticated()
}

/// The rows of a store.
fn rows_of<'a>(resources: &'a Resources, store: &'a Store) -> impl Iterator<Item = &'a StorageRow> {
    resources.storage(&store.storage).filter(|row| Store::of_row(row) == *store)
}

/// The same disk in the other image format.
fn other_format(name: &VolumeName) -> Option<VolumeName> {
    let (stem, format) = name.as_str().rsplit_once('.')?;
    let other = if format == "raw" { "qcow2" } else { "raw" };
    format!("{stem}.{other}").parse().ok()
}

/// Whether a volume is this disk, in whatever format.
fn is_disk(name: &VolumeName, disk: &str) -> bool {
    let last = name.as_str().rsplit('/').next().unwrap_or_default();
    last.strip_prefix(disk).is_some_and(|ending| matches!(ending, "" | ".raw" | ".qcow2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_known_in_every_format_and_no_other_disk_is_taken_for_it() {
        for (name, same) in [
            ("vm-9999-pvc-1", true),
            ("9999/vm-9999-pvc-1.raw", true),
            ("9999/vm-9999-pvc-1.qcow2", true),
            ("9999/vm-9999-pvc-1.1.raw", false),
            ("vm-9999-pvc-1_2", false),
            ("vm-9999-pvc-10", false),
        ] {
            assert_eq!(is_disk(&name.parse().expect("a name"), "vm-9999-pvc-1"), same, "{name}");
        }
    }
}
