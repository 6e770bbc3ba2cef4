//! What volumes there are: the last listing of each storage, kept true by our own writes.
//!
//! Listing a storage is slow (a directory with 500 raw files takes 9.5 s) and holds one of the three workers of its PVE node, so a
//! region lists one storage at a time, a late listing is used again, and no operation waits for one but [`Volumes::list`].
//! Only this driver makes volumes under its owner's VMID, so a listing of any age, with what was made since, says which names are new.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Volumes,
    disk::{is_named_by_proxmox, is_volume},
    placement::Place,
};
use crate::{
    pve::{
        ApiError, Client,
        cluster::{Resources, StorageRow},
    },
    types::{Bytes, NodeName, Region, StorageId, VmId, VolumeHandle, VolumeName},
};

/// How old a listing may be that is shown.
pub(super) const LISTING_AGE: Duration = Duration::from_mins(1);

/// Types of storages that hold no disks of VMs in the way of this driver.
const WITHOUT_DISKS: [&str; 4] = ["pbs", "iscsi", "iscsidirect", "esxi"];

/// Where volumes are listed: a storage, and the node of a local one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shelf {
    pub(super) storage: StorageId,
    pub(super) zone: Option<NodeName>,
}

/// The volumes of a region. Clones share what they know.
#[derive(Clone, Default)]
pub(super) struct Inventory {
    known: Arc<Mutex<Known>>,
    /// Held while a storage is being listed.
    listing: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
struct Known {
    shelves: BTreeMap<Shelf, Listing>,
    /// What was written to the shelf that is being listed, since that began.
    journal: Option<(Shelf, Vec<Change>)>,
    /// Shelves that the background is about to list.
    asked: BTreeSet<Shelf>,
}

struct Listing {
    began: Instant,
    volumes: BTreeMap<VolumeName, Bytes>,
}

/// A volume is there with this size, or is not there any more.
type Change = (VolumeName, Option<Bytes>);

/// What is known of a name on a shelf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing: the shelf was not listed yet.
    Unlisted,
    /// It is new.
    Absent,
    /// It was there.
    Present(VolumeName),
}

impl Shelf {
    pub(super) fn of_row(row: &StorageRow) -> Self {
        Self { storage: row.storage.clone(), zone: (!row.shared).then(|| row.node.clone()) }
    }
}

impl Inventory {
    /// A volume is there with this size, or is not there any more.
    pub(super) fn note(&self, shelf: Shelf, name: VolumeName, size: Option<Bytes>) {
        let change = (name, size);
        let mut known = super::lock(&self.known);
        if let Some(listing) = known.shelves.get_mut(&shelf) {
            listing.apply(change.clone());
        }
        if let Some((listed, journal)) = &mut known.journal
            && *listed == shelf
        {
            journal.push(change);
        }
    }

    /// What is known of a disk that was or would be named like this.
    pub(super) fn entry(&self, shelf: &Shelf, plugin: &str, name: &VolumeName) -> Entry {
        let known = super::lock(&self.known);
        let Some(listing) = known.shelves.get(shelf) else { return Entry::Unlisted };
        if listing.volumes.contains_key(name) {
            return Entry::Present(name.clone());
        }
        // A plugin of others may have put its own parts around the name.
        let holds = |listed: &&VolumeName| {
            !is_named_by_proxmox(plugin) && contains_word(listed.as_str(), name.as_str())
        };
        listing.volumes.keys().find(holds).map_or(Entry::Absent, |name| Entry::Present(name.clone()))
    }

    /// Whether a storage was listed, and a disk of this name, whatever its ending, is on no shelf of it.
    pub(super) fn lacks(&self, storage: &StorageId, disk: &str) -> bool {
        let known = super::lock(&self.known);
        let mut shelves = known.shelves.iter().filter(|(shelf, _)| shelf.storage == *storage).peekable();
        shelves.peek().is_some()
            && shelves
                .all(|(_, listing)| listing.volumes.keys().all(|name| !contains_word(name.as_str(), disk)))
    }

    /// Lists a shelf, through `node`; one shelf at a time.
    pub(super) async fn list(
        &self,
        client: &Client,
        shelf: &Shelf,
        node: &NodeName,
        owner: VmId,
    ) -> Result<(), ApiError> {
        let _turn = self.listing.lock().await;
        self.list_in_turn(client, shelf, node, owner).await
    }

    /// The same, unless a listing not older than `age` is there when the turn has come.
    async fn list_within(
        &self,
        client: &Client,
        shelf: &Shelf,
        node: &NodeName,
        owner: VmId,
        age: Duration,
    ) -> Result<(), ApiError> {
        let _turn = self.listing.lock().await;
        if self.age(shelf).is_some_and(|now| now < age) {
            return Ok(());
        }
        self.list_in_turn(client, shelf, node, owner).await
    }

    async fn list_in_turn(
        &self,
        client: &Client,
        shelf: &Shelf,
        node: &NodeName,
        owner: VmId,
    ) -> Result<(), ApiError> {
        let began = Instant::now();
        super::lock(&self.known).journal = Some((shelf.clone(), Vec::new()));
        // Cancelled here, it leaves a journal that the next one replaces.
        let listed = client.list_owned(node, &shelf.storage, owner).await;
        let mut known = super::lock(&self.known);
        let journal = known.journal.take().map(|(_, journal)| journal).unwrap_or_default();
        let mut listing = Listing {
            began,
            volumes: listed?.into_iter().filter(|(name, _)| is_volume(owner, name)).collect(),
        };
        // What was written while the storage was listed may be in the answer or not.
        journal.into_iter().for_each(|change| listing.apply(change));
        let (elapsed_ms, volumes) = (began.elapsed().as_millis(), listing.volumes.len());
        tracing::debug!(storage = %shelf.storage, %node, volumes, elapsed_ms, "listed a storage");
        known.shelves.insert(shelf.clone(), listing);
        Ok(())
    }

    /// How long ago the last listing of a shelf began.
    fn age(&self, shelf: &Shelf) -> Option<Duration> {
        super::lock(&self.known).shelves.get(shelf).map(|listing| listing.began.elapsed())
    }

    /// Lists a shelf in the background, unless that is under way.
    pub(super) fn list_soon(&self, client: &Client, shelf: &Shelf, node: &NodeName, owner: VmId) {
        if !super::lock(&self.known).asked.insert(shelf.clone()) {
            return;
        }
        let (inventory, client, shelf, node) = (self.clone(), client.clone(), shelf.clone(), node.clone());
        tokio::spawn(async move {
            if let Err(error) = inventory.list_within(&client, &shelf, &node, owner, LISTING_AGE).await {
                // Whoever needs it next asks again.
                tracing::debug!(storage = %shelf.storage, %node, %error, "cannot list a storage yet");
            }
            super::lock(&inventory.known).asked.remove(&shelf);
        });
    }
}

impl Listing {
    fn apply(&mut self, (name, size): Change) {
        match size {
            Some(size) => self.volumes.insert(name, size),
            None => self.volumes.remove(&name),
        };
    }
}

/// Whether `text` has `word` in it with no letter, digit or `-` on either side.
fn contains_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

/// A volume of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedVolume {
    /// Its handle.
    pub handle: VolumeHandle,
    /// Its size; zero where the storage tells none.
    pub size: Bytes,
    /// From where it can be reached.
    pub places: Vec<crate::types::topology::Place>,
}

/// Volumes can't be listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// Proxmox could not be asked.
    #[error("cannot list the storages of region `{region}`")]
    Region {
        /// The region.
        region: Region,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// A storage can't be listed.
    #[error("cannot list storage `{storage}` on node `{node}`")]
    Storage {
        /// The storage.
        storage: StorageId,
        /// The node.
        node: NodeName,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// A storage is not active, and was never seen.
    #[error(
        "storage `{storage}` is not available on node `{node}`, so that not all volumes can be listed; hint: check it with `pvesm status --storage {storage}` there"
    )]
    Inactive {
        /// The storage.
        storage: StorageId,
        /// The node.
        node: NodeName,
    },
    /// The token would see no volume.
    #[error(
        "the token may allocate on storage `{storage}` but not see what is there; hint: grant Datastore.Allocate on /storage/{storage}"
    )]
    Hidden {
        /// The storage.
        storage: StorageId,
    },
}

impl Volumes {
    /// A volume is there with this size, or is not there any more.
    pub(super) fn note(&self, place: &Place, size: Option<Bytes>) {
        if let Some(state) = self.inner.regions.get(&place.region)
            && is_volume(self.inner.settings.owner, &place.volid.name)
        {
            let shelf = Shelf { storage: place.volid.storage.clone(), zone: place.zone.clone() };
            state.inventory.note(shelf, place.volid.name.clone(), size);
        }
    }

    /// All volumes of the driver in all regions, in the order of their handles, as listings show them that are at most a minute old.
    ///
    /// A storage that can't be listed now shows what it last had; one that was never seen makes the listing fail, since what is
    /// missing from it would be taken for deleted.
    pub async fn list(&self) -> Result<Vec<ListedVolume>, ListError> {
        let mut all = Vec::new();
        for (region, state) in &self.inner.regions {
            let failed = |source| ListError::Region { region: region.clone(), source };
            let resources = state.client.resources().await.map_err(failed)?;
            let permissions = state.permissions().await.map_err(failed)?;
            for (shelf, rows) in shelves(&resources) {
                let path = format!("/storage/{}", shelf.storage);
                if !permissions.allow(&path, "Datastore.AllocateSpace") {
                    // Nothing of ours can be there.
                    continue;
                }
                // Without it Proxmox leaves out what the token could not use (pve-storage `Storage.pm:check_volume_access`).
                if !permissions.allow(&path, "Datastore.Allocate") {
                    return Err(ListError::Hidden { storage: shelf.storage });
                }
                self.refresh(state, &shelf, &rows, &resources).await?;
                let places = super::candidates::places_of(region, &resources, rows[0]);
                let known = super::lock(&state.inventory.known);
                let listed = known.shelves.get(&shelf).map(|listing| &listing.volumes).into_iter().flatten();
                all.extend(listed.map(|(name, size)| ListedVolume {
                    handle: VolumeHandle {
                        region: region.clone(),
                        zone: shelf.zone.clone(),
                        volid: crate::types::VolId { storage: shelf.storage.clone(), name: name.clone() },
                    },
                    size: *size,
                    places: places.clone(),
                }));
            }
        }
        all.sort_by(|a, b| a.handle.cmp(&b.handle));
        Ok(all)
    }

    async fn refresh(
        &self,
        state: &super::RegionState,
        shelf: &Shelf,
        rows: &[&StorageRow],
        resources: &Resources,
    ) -> Result<(), ListError> {
        let storage = shelf.storage.clone();
        let seen = state.inventory.age(shelf).is_some();
        let Some(row) = rows.iter().find(|row| row.available && resources.is_online(&row.node)) else {
            return if seen {
                Ok(())
            } else {
                Err(ListError::Inactive { storage, node: rows[0].node.clone() })
            };
        };
        let owner = self.inner.settings.owner;
        match state.inventory.list_within(&state.client, shelf, &row.node, owner, LISTING_AGE).await {
            Err(error) if seen => {
                tracing::warn!(%storage, node = %row.node, %error, "cannot list a storage; what it last had is shown");
                Ok(())
            }
            listed => listed.map_err(|source| ListError::Storage { storage, node: row.node.clone(), source }),
        }
    }
}

/// The shelves of a region with the rows of their storages.
fn shelves(resources: &Resources) -> BTreeMap<Shelf, Vec<&StorageRow>> {
    let mut shelves: BTreeMap<Shelf, Vec<&StorageRow>> = BTreeMap::new();
    for row in resources.storages.iter().filter(|row| !WITHOUT_DISKS.contains(&row.plugin.as_str())) {
        shelves.entry(Shelf::of_row(row)).or_default().push(row);
    }
    shelves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_a_plugin_put_its_own_parts_around_is_found_and_no_other() {
        for (listed, found) in [
            ("vm-9999-pvc-1", true),
            ("pool/vm-9999-pvc-1.abc", true),
            ("vm-9999-pvc-1_x", true),
            ("vm-9999-pvc-10", false),
            ("xvm-9999-pvc-1", false),
            ("vm-9999-pvc-1-2", false),
        ] {
            assert_eq!(contains_word(listed, "vm-9999-pvc-1"), found, "{listed}");
        }
    }
}
