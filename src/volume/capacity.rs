//! Capacity: what is free, from the one request that tells of all storages of a region.

use super::{UnknownRegion, Volumes, disk::filename};
use crate::{
    pve::{ApiError, cluster::StorageRow},
    types::{Bytes, StorageId, params::Parameters, topology::Place},
};

/// What is free for new volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capacity {
    /// In all places together.
    pub available: Bytes,
    /// The largest volume that one place can take, whole steps of sizes: what is asked for is rounded up to one.
    pub largest_volume: Bytes,
}

/// It can't be told what is free.
#[derive(Debug, thiserror::Error)]
pub enum CapacityError {
    /// The region is not configured.
    #[error(transparent)]
    Region(#[from] UnknownRegion),
    /// Proxmox could not be asked.
    #[error("cannot read the storages of region `{region}`")]
    Api {
        /// The region.
        region: crate::types::Region,
        /// Why.
        #[source]
        source: ApiError,
    },
}

impl Volumes {
    /// What is free for volumes of these parameters in a place, or anywhere: on their storage where they name one, for volumes that several
    /// nodes are to use (`for_many`) on shared storages only. A storage that is not there, not active, or on which
    /// [`create`](Volumes::create) makes no such volume has nothing free.
    pub async fn capacity(
        &self,
        parameters: &Parameters,
        place: Option<&Place>,
        for_many: bool,
    ) -> Result<Capacity, CapacityError> {
        if parameters.replicate {
            return Ok(Capacity::default());
        }
        let storage = parameters.storage.as_ref();
        let regions = match place {
            Some(place) => vec![place.region.clone()],
            None => self.regions().cloned().collect(),
        };
        let mut capacity = Capacity::default();
        for region in regions {
            let state = self.region(&region)?;
            let resources = state.poll.recent(&state.client).await;
            let resources = resources.map_err(|source| CapacityError::Api { region, source })?;
            let zone = place.and_then(|place| place.zone.as_ref());
            let mut shared: Vec<&StorageId> = Vec::new();
            let usable = |row: &&StorageRow| {
                row.available
                    && (row.shared || !for_many)
                    && resources.is_online(&row.node)
                    && storage.is_none_or(|storage| row.storage == *storage)
                    && filename("", &row.plugin, parameters.format).is_ok()
                    && zone.is_none_or(|zone| row.node == *zone)
            };
            for row in resources.storages.iter().filter(usable) {
                // A shared storage has one row for each node and is one storage all the same.
                if row.shared && shared.contains(&&row.storage) {
                    continue;
                }
                if row.shared {
                    shared.push(&row.storage);
                }
                capacity.available = Bytes::new(capacity.available.get().saturating_add(row.free().get()));
                let free = row.free().get();
                let volume = Bytes::new(free - free % Bytes::VOLUME_STEP.get());
                capacity.largest_volume = capacity.largest_volume.max(volume);
            }
        }
        Ok(capacity)
    }
}
