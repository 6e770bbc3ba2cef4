//! Create: one blank volume for each name.
//!
//! The name of the disk is made of the name of the volume, so a repeated request finds what the first one made. Nothing is
//! remembered elsewhere. Local disks of two nodes don't exclude each other, so before a name is allocated it is looked for wherever it may be
//! (see [`lookup`](super::lookup)).

use std::sync::Arc;

use super::{
    Dated, RegionState, UnknownRegion, Volumes,
    candidates::{Candidate, Choice, candidates},
    disk::{disk_name, filename, size_within},
    placement::storages_seen,
};
use crate::{
    pve::{ApiError, cluster::Resources},
    types::{Bytes, NodeName, StorageId, VolumeHandle, params::Parameters, topology},
};

/// A volume to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVolume {
    /// The name Kubernetes gave it, unique for ever.
    pub name: String,
    /// What is asked for at least.
    pub required: Option<Bytes>,
    /// What is allowed at most.
    pub limit: Option<Bytes>,
    /// The parameters of its StorageClass.
    pub parameters: Parameters,
    /// Whether several nodes are to use it at once, which a local storage can't give.
    pub for_many: bool,
    /// Where it may be, the preferred places first; empty where it may be anywhere.
    pub places: Vec<topology::Place>,
}

/// A volume that was made, by this request or an equal one before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedVolume {
    /// Its handle.
    pub handle: VolumeHandle,
    /// Its size.
    pub size: Bytes,
    /// From where it can be reached.
    pub places: Vec<topology::Place>,
}

/// A volume can't be made, or it can't be told that it was.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The StorageClass names no storage.
    #[error(
        "the StorageClass names no storage; hint: set its parameter `storage` to the id of a Proxmox storage"
    )]
    NoStorage,
    /// Replication is asked for.
    #[error(
        "replicated volumes (`replicate: true`) can not be made yet; hint: use a StorageClass without `replicate`"
    )]
    Replicated,
    /// The plugin is not supported for new volumes.
    #[error("storage `{storage}` is of type {plugin}, on which no volumes can be made yet: {why}")]
    Plugin {
        /// The storage.
        storage: StorageId,
        /// Its type.
        plugin: String,
        /// What is missing.
        why: &'static str,
    },
    /// Several nodes are to use it, but the storage is local to each.
    #[error(
        "storage `{storage}` is local to each Proxmox node: its volumes can not be given to several nodes; hint: ReadOnlyMany needs a shared storage"
    )]
    Local {
        /// The storage.
        storage: StorageId,
    },
    /// The size can't be had.
    #[error(
        "no size is at least {required} and at most {limit}: sizes go in steps of {}",
        Bytes::VOLUME_STEP
    )]
    Range {
        /// What is asked for at least.
        required: Bytes,
        /// What is allowed at most.
        limit: Bytes,
    },
    /// None of the places is in a configured region.
    #[error("volume `{name}` can not be placed")]
    Region {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: UnknownRegion,
    },
    /// Several regions are configured and nothing says which.
    #[error(
        "volume `{name}` may be in any of several regions; hint: set `volumeBindingMode: WaitForFirstConsumer` or `allowedTopologies`"
    )]
    NoRegion {
        /// The name.
        name: String,
    },
    /// The token sees no such storage.
    #[error(
        "the token sees no storage `{storage}` in {regions}; hint: check the StorageClass, and Datastore.Audit on /storage/{storage} (seen: {seen})"
    )]
    NoSuchStorage {
        /// The storage.
        storage: StorageId,
        /// The regions that were looked through.
        regions: String,
        /// The storages the token sees.
        seen: String,
    },
    /// The storage is not where the volume must be, or has no room there.
    #[error("storage `{storage}` can not take {size} where volume `{name}` must be: {reasons}")]
    NoRoom {
        /// The name.
        name: String,
        /// The storage.
        storage: StorageId,
        /// The size.
        size: Bytes,
        /// For each place, why not.
        reasons: String,
    },
    /// A volume of that name is there with another size.
    #[error("volume `{handle}` exists with {size}, which is not at least {required} and at most {limit}")]
    Exists {
        /// Its handle.
        handle: VolumeHandle,
        /// Its size.
        size: Bytes,
        /// What is asked for at least.
        required: Bytes,
        /// What is allowed at most.
        limit: Bytes,
    },
    /// A volume of that name is there in the other image format.
    #[error("volume `{handle}` exists, and it is not of the format that is asked for")]
    OtherFormat {
        /// Its handle.
        handle: VolumeHandle,
    },
    /// A volume of that name is there, where this one must not be.
    #[error(
        "volume `{name}` exists as `{handle}`, which is not where or on what it is asked for; hint: ask for that place and storage, or delete it if nobody uses it"
    )]
    Elsewhere {
        /// The name.
        name: String,
        /// Its handle.
        handle: VolumeHandle,
    },
    /// A place where an earlier request may have made it can't be looked at.
    #[error(
        "volume `{name}` may be on storage `{storage}` of node `{node}`, which can not be looked at now; hint: bring it back, or take the node out of the storage's `nodes` if it has it no more; with `volumeBindingMode: WaitForFirstConsumer` and `--strict-topology` of the provisioner only the node of the pod is asked for"
    )]
    Away {
        /// The name.
        name: String,
        /// The storage.
        storage: StorageId,
        /// The node.
        node: NodeName,
    },
    /// The answer to an allocation got lost, and what became of it can't be told now: it is not final, whatever the reason is.
    #[error("volume `{name}` may have been allocated on node `{node}`, and that can not be looked into now")]
    InDoubt {
        /// The volume's name.
        name: String,
        /// The node.
        node: NodeName,
        /// Why.
        #[source]
        source: Box<CreateError>,
    },
    /// An allocation of which nothing is known was sent to a place that is not asked for now, or can't be asked.
    #[error(
        "volume `{name}` may have been allocated on storage `{storage}` of node `{node}`, which can not be asked now"
    )]
    Doubtful {
        /// The name.
        name: String,
        /// The storage.
        storage: StorageId,
        /// The node.
        node: NodeName,
    },
    /// The token may not allocate.
    #[error(
        "cannot allocate volume `{name}` on storage `{storage}`; hint: the token needs Datastore.AllocateSpace on /storage/{storage}"
    )]
    Forbidden {
        /// The name.
        name: String,
        /// The storage.
        storage: StorageId,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// The storage has no room after all.
    #[error("storage `{storage}` has no room for volume `{name}` of {size}")]
    NoSpace {
        /// The name.
        name: String,
        /// The storage.
        storage: StorageId,
        /// The size.
        size: Bytes,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// A request gave no good answer.
    #[error("cannot allocate volume `{name}`")]
    Api {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: ApiError,
    },
}

impl CreateError {
    /// What it may come of: nodes and storages come and go, and fill.
    fn dated(&self) -> Option<Dated> {
        match self {
            Self::NoSuchStorage { .. }
            | Self::NoRoom { .. }
            | Self::Away { .. }
            | Self::Doubtful { .. }
            | Self::Api { source: ApiError::Unreachable { .. }, .. } => Some(Dated::Region),
            _ => None,
        }
    }
}

/// What is asked for, worked out.
pub(super) struct Wanted<'a> {
    pub(super) new: &'a NewVolume,
    pub(super) storage: &'a StorageId,
    /// The name of its disk, without the ending that file storages want.
    pub(super) disk: String,
    required: Bytes,
    limit: Bytes,
    /// The size it gets.
    size: Bytes,
}

/// Where an allocation was sent of which nothing is known.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    region: crate::types::Region,
    storage: StorageId,
    node: NodeName,
}

impl Sent {
    fn to(candidate: &Candidate<'_>) -> Self {
        let (storage, node) = (candidate.row.storage.clone(), candidate.row.node.clone());
        Self { region: candidate.region().clone(), storage, node }
    }

    /// Whether it would show there.
    fn shows_at(&self, candidate: &Candidate<'_>) -> bool {
        *candidate.region() == self.region
            && candidate.row.storage == self.storage
            && (candidate.row.shared || candidate.row.node == self.node)
    }
}

impl Volumes {
    /// Makes a blank volume, or finds the one that an equal request made.
    pub async fn create(&self, new: &NewVolume) -> Result<CreatedVolume, CreateError> {
        let mut created = self.find_or_allocate(new).await;
        if let Err(error) = &created
            && let Some(dated) = error.dated()
            && let Ok(regions) = self.regions_of(new)
        {
            let mut may_help = false;
            for state in regions {
                may_help |= self.look_again(state.client.region(), Some(dated)).await;
            }
            if may_help {
                created = self.find_or_allocate(new).await;
            }
        }
        let created = created.map_err(|error| self.in_doubt(new, error))?;
        self.forget_deleted(&created.handle);
        let text = created.handle.to_string();
        super::lock(&self.inner.kept).retain(|kept| *kept != text);
        Ok(created)
    }

    /// An error behind an allocation whose answer got lost.
    fn in_doubt(&self, new: &NewVolume, error: CreateError) -> CreateError {
        use CreateError as E;
        let disk = disk_name(self.inner.settings.owner, &new.name);
        // It was looked for and not found, or refused by Proxmox; or they say the same themselves.
        let stands =
            matches!(&error, E::NoRoom { .. } | E::NoSpace { .. } | E::Away { .. } | E::Doubtful { .. })
                || matches!(&error, E::Api { source, .. } if source.is_unknown());
        match super::lock(&self.inner.doubtful).get(&disk) {
            Some(sent) if !stands => CreateError::InDoubt {
                name: new.name.clone(),
                node: sent.node.clone(),
                source: Box::new(error),
            },
            _ => error,
        }
    }

    async fn find_or_allocate(&self, new: &NewVolume) -> Result<CreatedVolume, CreateError> {
        let storage = new.parameters.storage.as_ref().ok_or(CreateError::NoStorage)?;
        if new.parameters.replicate {
            return Err(CreateError::Replicated);
        }
        let required =
            new.required.unwrap_or(Bytes::VOLUME_DEFAULT.min(new.limit.unwrap_or(Bytes::VOLUME_DEFAULT)));
        let limit = new.limit.unwrap_or(Bytes::new(u64::MAX));
        let size = size_within(required, new.limit).ok_or(CreateError::Range { required, limit })?;
        let disk = disk_name(self.inner.settings.owner, &new.name);
        let wanted = Wanted { new, storage, disk, required, limit, size };

        let mut seen: Vec<(&RegionState, Arc<Resources>)> = Vec::new();
        for state in self.regions_of(new)? {
            let places = new.places.iter().filter(|place| place.region == *state.client.region());
            let zones: Vec<&NodeName> = places.filter_map(|place| place.zone.as_ref()).collect();
            match state.poll.recent(&state.client).await {
                Ok(resources) => seen.push((state, resources)),
                // What can't be looked at is not taken for empty, but for what it was when it was listed.
                Err(error) if state.inventory.lacks(storage, &zones, &wanted.disk) => {
                    tracing::warn!(region = %state.client.region(), %error, "a region is out of reach");
                }
                Err(source) => return Err(wanted.api(source)),
            }
        }
        let mut reasons = Vec::new();
        let Choice { usable, away } = wanted.candidates(&seen, &mut reasons)?;
        let Some(first) = usable.iter().chain(&away).next() else { return Err(wanted.no_room(&reasons)) };
        // What the storage can't do is said before anything is looked for.
        wanted.filename(&first.row.plugin)?;

        let doubtful = super::lock(&self.inner.doubtful).get(&wanted.disk).cloned();
        let is_asked =
            |candidate: &Candidate<'_>| doubtful.as_ref().is_none_or(|sent: &Sent| sent.shows_at(candidate));
        if let Some(Sent { storage, node, .. }) = &doubtful
            && !usable.iter().any(is_asked)
        {
            let (name, storage) = (new.name.clone(), storage.clone());
            return Err(CreateError::Doubtful { name, storage, node: node.clone() });
        }
        if let Some(found) = self.find_made(&wanted, &usable, &away, doubtful.is_some()).await? {
            super::lock(&self.inner.doubtful).remove(&wanted.disk);
            return wanted.checked(found);
        }
        for (state, resources) in &seen {
            self.list_all_soon(state, storage, resources);
        }
        // Where an allocation may still be under way, no other place is tried.
        for candidate in usable.iter().filter(|candidate| is_asked(candidate)) {
            if size > candidate.row.free() {
                reasons.push(format!("{} free on node `{}`", candidate.row.free(), candidate.row.node));
                continue;
            }
            return self.allocate(&wanted, candidate).await;
        }
        Err(wanted.no_room(&reasons))
    }

    async fn allocate(
        &self,
        wanted: &Wanted<'_>,
        candidate: &Candidate<'_>,
    ) -> Result<CreatedVolume, CreateError> {
        let (node, storage, size) = (&candidate.row.node, wanted.storage, wanted.size);
        let (name, storage) = (wanted.new.name.clone(), storage.clone());
        let filename = wanted.filename(&candidate.row.plugin)?;
        let kib = size.as_kib().expect("a size within is a multiple of 4 MiB");
        tracing::info!(volume = filename, %node, %storage, %size, "allocating a volume");
        super::lock(&self.inner.doubtful).insert(wanted.disk.clone(), Sent::to(candidate));
        let owner = self.inner.settings.owner;
        let allocated = candidate.state.client.allocate(node, &storage, owner, &filename, kib).await;
        if !matches!(&allocated, Err(error) if error.is_unknown()) {
            super::lock(&self.inner.doubtful).remove(&wanted.disk);
        }
        match allocated {
            Ok(volid) => {
                let places = candidate.places.clone();
                candidate.state.inventory.note(&candidate.store(), volid.name.clone(), Some(size));
                let handle = candidate.handle(volid);
                super::lock(&self.inner.attributes).remove(&handle.to_string());
                Ok(CreatedVolume { handle, size, places })
            }
            Err(error) if error.is_already_exists() => match self.look(wanted, candidate, true).await? {
                Some(found) => wanted.checked(found),
                None => Err(wanted.api(error)),
            },
            Err(source) if source.is_forbidden() => Err(CreateError::Forbidden { name, storage, source }),
            Err(source) if source.is_no_space() => Err(CreateError::NoSpace { name, storage, size, source }),
            Err(source) => Err(wanted.api(source)),
        }
    }

    /// The regions in which a new volume may be, preferred ones first.
    fn regions_of(&self, new: &NewVolume) -> Result<Vec<&RegionState>, CreateError> {
        let mut all = self.inner.regions.values();
        let Some(first) = new.places.first() else {
            return match (all.next(), all.next()) {
                (Some(only), None) => Ok(vec![only]),
                _ => Err(CreateError::NoRegion { name: new.name.clone() }),
            };
        };
        let mut regions: Vec<&RegionState> = Vec::new();
        for place in &new.places {
            let known = regions.iter().any(|state| *state.client.region() == place.region);
            match self.inner.regions.get(&place.region) {
                Some(state) if !known => regions.push(state),
                _ => {}
            }
        }
        if regions.is_empty() {
            let unknown = |source| CreateError::Region { name: new.name.clone(), source };
            self.region(&first.region).map_err(unknown)?;
        }
        Ok(regions)
    }
}

impl Wanted<'_> {
    /// What the disk is to be called when it is allocated.
    pub(super) fn filename(&self, plugin: &str) -> Result<String, CreateError> {
        filename(&self.disk, plugin, self.new.parameters.format).map_err(|why| CreateError::Plugin {
            storage: self.storage.clone(),
            plugin: plugin.to_owned(),
            why,
        })
    }

    /// Where the volume could go, preferred places first.
    fn candidates<'a>(
        &self,
        seen: &'a [(&'a RegionState, Arc<Resources>)],
        reasons: &mut Vec<String>,
    ) -> Result<Choice<'a>, CreateError> {
        let mut all = Choice::default();
        let mut is_seen = false;
        for (state, resources) in seen {
            let rows: Vec<_> = resources.storages.iter().filter(|row| row.storage == *self.storage).collect();
            is_seen |= !rows.is_empty();
            if self.new.for_many && rows.iter().any(|row| !row.shared) {
                return Err(CreateError::Local { storage: self.storage.clone() });
            }
            let places = self.new.places.iter().filter(|place| place.region == *state.client.region());
            let places: Vec<_> = places.collect();
            let Choice { usable, away } = candidates(state, resources, &rows, &places, reasons);
            all.usable.extend(usable);
            all.away.extend(away);
        }
        if is_seen {
            return Ok(all);
        }
        let regions = seen.iter().map(|(state, _)| format!("region `{}`", state.client.region()));
        let names = seen.iter().map(|(_, resources)| storages_seen(resources));
        Err(CreateError::NoSuchStorage {
            storage: self.storage.clone(),
            regions: regions.collect::<Vec<_>>().join(" or "),
            seen: names.collect::<Vec<_>>().join("; "),
        })
    }

    pub(super) fn api(&self, source: ApiError) -> CreateError {
        CreateError::Api { name: self.new.name.clone(), source }
    }

    fn no_room(&self, reasons: &[String]) -> CreateError {
        CreateError::NoRoom {
            name: self.new.name.clone(),
            storage: self.storage.clone(),
            size: self.size,
            reasons: if reasons.is_empty() { "no node has it".to_owned() } else { reasons.join(", ") },
        }
    }

    /// A volume that was found, if it is as large as is asked for.
    fn checked(&self, found: CreatedVolume) -> Result<CreatedVolume, CreateError> {
        let (required, limit) = (self.required, self.limit);
        if found.size < required || found.size > limit {
            return Err(CreateError::Exists { handle: found.handle, size: found.size, required, limit });
        }
        Ok(found)
    }
}
