//! What volumes there are: the last listing of each storage, kept true by our own writes.
//!
//! Listing a storage is slow (a directory with 500 raw files takes 9.5 s) and holds one of the three workers of its PVE node, so a
//! region lists one storage at a time, a late listing is used again, and no operation waits for one but [`Volumes::list`], and a new
//! volume where nothing else would tell whether it was made before.
//! Only this driver makes volumes under its owner's VMID, so a listing of any age, with what was made since, says which names are new.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;
use tracing::Instrument as _;

use super::{
    Dated, Volumes,
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
pub(super) struct Store {
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
    stores: BTreeMap<Store, Listing>,
    /// What was written to the store that is being listed, since that began.
    journal: Option<(Store, Vec<Change>)>,
    /// Stores that the background is about to list.
    asked: BTreeSet<Store>,
}

struct Listing {
    began: Instant,
    volumes: BTreeMap<VolumeName, Bytes>,
}

/// A volume is there with this size, or is not there any more.
type Change = (VolumeName, Option<Bytes>);

/// What is known of a name on a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing: the store was not listed yet.
    Unlisted,
    /// It is new.
    Absent,
    /// It was there.
    Present(VolumeName),
}

impl Store {
    pub(super) fn of_row(row: &StorageRow) -> Self {
        Self { storage: row.storage.clone(), zone: (!row.shared).then(|| row.node.clone()) }
    }
}

impl Inventory {
    /// A volume is there with this size, or is not there any more.
    pub(super) fn note(&self, store: &Store, name: VolumeName, size: Option<Bytes>) {
        let change = (name, size);
        let mut known = super::lock(&self.known);
        if let Some(listing) = known.stores.get_mut(store) {
            listing.apply(change.clone());
        }
        if let Some((listed, journal)) = &mut known.journal
            && listed == store
        {
            journal.push(change);
        }
    }

    /// What is known of a disk that was or would be named like this.
    pub(super) fn entry(&self, store: &Store, plugin: &str, name: &VolumeName) -> Entry {
        let known = super::lock(&self.known);
        let Some(listing) = known.stores.get(store) else { return Entry::Unlisted };
        if listing.volumes.contains_key(name) {
            return Entry::Present(name.clone());
        }
        // A plugin of others may have put its own parts around the name.
        let holds = |listed: &&VolumeName| {
            !is_named_by_proxmox(plugin) && contains_word(listed.as_str(), name.as_str())
        };
        listing.volumes.keys().find(holds).map_or(Entry::Absent, |name| Entry::Present(name.clone()))
    }

    /// Whether a storage was listed, in each of these zones where it is local, and a disk of this name, whatever its ending, is on no
    /// store of it.
    pub(super) fn lacks(&self, storage: &StorageId, zones: &[&NodeName], disk: &str) -> bool {
        let known = super::lock(&self.known);
        let stores: Vec<_> = known.stores.iter().filter(|(store, _)| store.storage == *storage).collect();
        let is_listed = |zone: &NodeName| {
            stores.iter().any(|(store, _)| store.zone.as_ref().is_none_or(|listed| listed == zone))
        };
        !stores.is_empty()
            && zones.iter().all(|zone| is_listed(zone))
            && stores
                .iter()
                .all(|(_, listing)| listing.volumes.keys().all(|name| !contains_word(name.as_str(), disk)))
    }

    /// Whether a store was listed since the start.
    pub(super) fn is_listed(&self, store: &Store) -> bool {
        super::lock(&self.known).stores.contains_key(store)
    }

    /// Volumes of all stores listed so far that have the name of this disk in theirs.
    pub(super) fn having(&self, disk: &str) -> Vec<(Store, VolumeName)> {
        let known = super::lock(&self.known);
        let of_store = |(store, listing): (&Store, &Listing)| {
            let names = listing.volumes.keys().filter(|name| contains_word(name.as_str(), disk));
            names.map(|name| (store.clone(), name.clone())).collect::<Vec<_>>()
        };
        known.stores.iter().flat_map(of_store).collect()
    }

    /// Lists a store, through `node`; one store at a time.
    pub(super) async fn list(
        &self,
        client: &Client,
        store: &Store,
        node: &NodeName,
        owner: VmId,
    ) -> Result<(), ApiError> {
        let _turn = self.listing.lock().await;
        self.list_in_turn(client, store, node, owner).await
    }

    /// The same, unless a listing not older than `age` is there when the turn has come.
    async fn list_within(
        &self,
        client: &Client,
        store: &Store,
        node: &NodeName,
        owner: VmId,
        age: Duration,
    ) -> Result<(), ApiError> {
        let _turn = self.listing.lock().await;
        if self.age(store).is_some_and(|now| now < age) {
            return Ok(());
        }
        self.list_in_turn(client, store, node, owner).await
    }

    async fn list_in_turn(
        &self,
        client: &Client,
        store: &Store,
        node: &NodeName,
        owner: VmId,
    ) -> Result<(), ApiError> {
        let began = Instant::now();
        super::lock(&self.known).journal = Some((store.clone(), Vec::new()));
        // Cancelled here, it leaves a journal that the next one replaces.
        let listed = listed_whole(client, store, node, owner).await;
        let mut known = super::lock(&self.known);
        let journal = known.journal.take().map(|(_, journal)| journal).unwrap_or_default();
        let mut listing = Listing {
            began,
            volumes: listed?.into_iter().filter(|(name, _)| is_volume(owner, name)).collect(),
        };
        // What was written while the storage was listed may be in the answer or not.
        for change in journal {
            listing.apply(change);
        }
        let (elapsed_ms, volumes) = (began.elapsed().as_millis(), listing.volumes.len());
        tracing::debug!(storage = %store.storage, %node, volumes, elapsed_ms, "listed a storage");
        known.stores.insert(store.clone(), listing);
        Ok(())
    }

    /// How long ago the last listing of a store began.
    fn age(&self, store: &Store) -> Option<Duration> {
        super::lock(&self.known).stores.get(store).map(|listing| listing.began.elapsed())
    }

    /// Lists a store in the background, unless that is under way.
    pub(super) fn list_soon(&self, client: &Client, store: &Store, node: &NodeName, owner: VmId) {
        if !super::lock(&self.known).asked.insert(store.clone()) {
            return;
        }
        let (inventory, client, store, node) = (self.clone(), client.clone(), store.clone(), node.clone());
        let listing = async move {
            if let Err(error) = inventory.list_within(&client, &store, &node, owner, LISTING_AGE).await {
                // Whoever needs it next asks again.
                tracing::debug!(storage = %store.storage, %node, %error, "cannot list a storage yet");
            }
            super::lock(&inventory.known).asked.remove(&store);
        };
        // In the log it belongs to the call that made it necessary.
        tokio::spawn(listing.in_current_span());
    }
}

/// The volumes of an owner on a store, where the token sees them all. Without the privilege Proxmox leaves out what the token could not use
/// (pve-storage `Storage.pm:check_volume_access`), and says so nowhere. It is asked for behind the listing: one that was just taken away
/// has not made that incomplete.
async fn listed_whole(
    client: &Client,
    store: &Store,
    node: &NodeName,
    owner: VmId,
) -> Result<Vec<(VolumeName, Bytes)>, ApiError> {
    let listed = client.list_owned(node, &store.storage, owner).await?;
    let path = format!("/storage/{}", store.storage);
    if client.permissions().await?.allow(&path, "Datastore.Allocate") {
        return Ok(listed);
    }
    let what = format!("the volumes on storage `{}`", store.storage);
    Err(ApiError::unreadable(
        &what,
        &format!("the token does not see them all; hint: grant Datastore.Allocate on {path}"),
    ))
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
        /// The region.
        region: Region,
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
            let store = Store { storage: place.volid.storage.clone(), zone: place.zone.clone() };
            state.inventory.note(&store, place.volid.name.clone(), size);
        }
    }

    /// All volumes of the driver in all regions, in the order of their handles, as listings show them that are at most a minute old.
    ///
    /// A storage that can't be listed now shows what it last had; one that was never seen makes the listing fail, since what is
    /// missing from it would be taken for deleted.
    pub async fn list(&self) -> Result<Vec<ListedVolume>, ListError> {
        match self.list_all().await {
            // Where storages are may be known from some seconds ago.
            Err(ListError::Inactive { region, .. })
                if self.look_again(&region, Some(Dated::Region)).await =>
            {
                self.list_all().await
            }
            listed => listed,
        }
    }

    async fn list_all(&self) -> Result<Vec<ListedVolume>, ListError> {
        let mut all = Vec::new();
        for (region, state) in &self.inner.regions {
            let failed = |source| ListError::Region { region: region.clone(), source };
            let resources = state.poll.recent(&state.client).await.map_err(failed)?;
            let permissions = state.permissions().await.map_err(failed)?;
            for (store, rows) in stores(&resources) {
                let path = format!("/storage/{}", store.storage);
                if !permissions.allow(&path, "Datastore.AllocateSpace") {
                    // Nothing of ours can be there.
                    continue;
                }
                // Without it Proxmox leaves out what the token could not use (pve-storage `Storage.pm:check_volume_access`).
                if !permissions.allow(&path, "Datastore.Allocate") {
                    return Err(ListError::Hidden { storage: store.storage });
                }
                self.refresh(state, &store, &rows, &resources).await?;
                let places = super::candidates::places_of(region, &resources, rows[0]);
                let known = super::lock(&state.inventory.known);
                let listed = known.stores.get(&store).map(|listing| &listing.volumes).into_iter().flatten();
                all.extend(listed.map(|(name, size)| ListedVolume {
                    handle: VolumeHandle {
                        region: region.clone(),
                        zone: store.zone.clone(),
                        volid: crate::types::VolId { storage: store.storage.clone(), name: name.clone() },
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
        store: &Store,
        rows: &[&StorageRow],
        resources: &Resources,
    ) -> Result<(), ListError> {
        let storage = store.storage.clone();
        let seen = state.inventory.age(store).is_some();
        let Some(row) = rows.iter().find(|row| row.available && resources.is_online(&row.node)) else {
            return if seen {
                Ok(())
            } else {
                Err(ListError::Inactive {
                    region: state.client.region().clone(),
                    storage,
                    node: rows[0].node.clone(),
                })
            };
        };
        let owner = self.inner.settings.owner;
        match state.inventory.list_within(&state.client, store, &row.node, owner, LISTING_AGE).await {
            Err(error) if seen => {
                tracing::warn!(%storage, node = %row.node, %error, "cannot list a storage; what it last had is shown");
                Ok(())
            }
            listed => listed.map_err(|source| ListError::Storage { storage, node: row.node.clone(), source }),
        }
    }
}

/// The stores of a region with the rows of their storages.
fn stores(resources: &Resources) -> BTreeMap<Store, Vec<&StorageRow>> {
    let mut stores: BTreeMap<Store, Vec<&StorageRow>> = BTreeMap::new();
    for row in resources.storages.iter().filter(|row| !WITHOUT_DISKS.contains(&row.plugin.as_str())) {
        stores.entry(Store::of_row(row)).or_default().push(row);
    }
    stores
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
