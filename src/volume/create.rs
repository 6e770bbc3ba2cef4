//! Create: one blank volume for each name.
//!
//! The name of the disk is made of the name of the volume, so a repeated request finds what the first one made. Nothing is
//! remembered elsewhere.

use super::{
    Dated, UnknownRegion, Volumes,
    disk::{disk_name, keeps_files, size_within},
    placement::storages_seen,
};
use crate::{
    pve::{
        ApiError, Client,
        cluster::{Resources, StorageRow},
    },
    types::{
        Bytes, NodeName, Region, StorageId, VolId, VolumeHandle,
        params::{ImageFormat, Parameters},
        topology,
    },
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
    pub place: topology::Place,
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
        "the token sees no storage `{storage}` in region `{region}`; hint: check the StorageClass, and Datastore.Audit on /storage/{storage} (seen: {seen})"
    )]
    NoSuchStorage {
        /// The storage.
        storage: StorageId,
        /// The region.
        region: Region,
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
    /// An allocation of which nothing is known was sent to a node that can't be asked now.
    #[error("volume `{name}` may have been allocated on node `{node}`, which can not be asked now")]
    Doubtful {
        /// The name.
        name: String,
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
            | Self::Doubtful { .. }
            | Self::Api { source: ApiError::Unreachable { .. }, .. } => Some(Dated::Region),
            _ => None,
        }
    }
}

/// Where a new volume could go.
struct Candidate<'a> {
    row: &'a StorageRow,
    place: topology::Place,
}

impl Volumes {
    /// Makes a blank volume, or finds the one that an equal request made.
    pub async fn create(&self, new: &NewVolume) -> Result<CreatedVolume, CreateError> {
        let mut created = self.find_or_allocate(new).await;
        if let Err(error) = &created
            && let Ok(region) = self.region_of(new)
            && self.look_again(&region, error.dated()).await
        {
            created = self.find_or_allocate(new).await;
        }
        let created = created?;
        self.forget_deleted(&created.handle);
        Ok(created)
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
        let region = self.region_of(new)?;
        let unknown = |source| CreateError::Region { name: new.name.clone(), source };
        let state = self.region(&region).map_err(unknown)?;
        let client = &state.client;
        let api = |source| CreateError::Api { name: new.name.clone(), source };
        let resources = state.poll.recent(client).await.map_err(api)?;
        if new.for_many && resources.storage(storage).any(|row| !row.shared) {
            return Err(CreateError::Local { storage: storage.clone() });
        }
        let (candidates, mut reasons) = candidates(new, storage, &region, &resources)?;
        let Some(first) = candidates.first() else { return Err(no_room(new, storage, size, &reasons)) };
        let plugin = first.row.plugin.as_str();
        let filename = self.filename(new, storage, plugin)?;
        let guess = self.guess(storage, plugin, &filename);

        // An equal request before this one may have made a disk in any of the places: local disks of two nodes don't exclude each
        // other. What can't be looked at is not taken for absent.
        let key = format!("{region}/{storage}/{filename}");
        let doubtful = super::lock(&self.inner.doubtful).get(&key).cloned();
        if let Some(node) = &doubtful
            && !candidates
                .iter()
                .any(|candidate| candidate.place.zone.is_none() || candidate.row.node == *node)
        {
            return Err(CreateError::Doubtful { name: new.name.clone(), node: node.clone() });
        }
        if let Some(volid) = &guess {
            for candidate in &candidates {
                match client.volume(&candidate.row.node, volid).await {
                    Ok(info) => {
                        super::lock(&self.inner.doubtful).remove(&key);
                        return found(volid, info.size, candidate, required, limit);
                    }
                    Err(error) if error.is_volume_unreadable() => {}
                    Err(source) => return Err(api(source)),
                }
            }
        }

        for candidate in &candidates {
            let node = &candidate.row.node;
            // Where an allocation may still be under way, no other place is tried.
            if candidate.place.zone.is_some() && doubtful.as_ref().is_some_and(|asked| asked != node) {
                continue;
            }
            if size > candidate.row.free() {
                reasons.push(format!("{} free on node `{node}`", candidate.row.free()));
                continue;
            }
            let kib = size.as_kib().expect("a size within is a multiple of 4 MiB");
            tracing::info!(volume = filename, %node, %storage, %size, "allocating a volume");
            super::lock(&self.inner.doubtful).insert(key.clone(), node.clone());
            let allocated = client.allocate(node, storage, self.inner.settings.owner, &filename, kib).await;
            if !matches!(&allocated, Err(error) if error.is_unknown()) {
                super::lock(&self.inner.doubtful).remove(&key);
            }
            let volid = match allocated {
                Ok(volid) => volid,
                Err(error) if error.is_already_exists() => {
                    return self
                        .existing(client, guess.as_ref(), candidate, new, required, limit, error)
                        .await;
                }
                Err(source) if source.is_forbidden() => {
                    return Err(CreateError::Forbidden {
                        name: new.name.clone(),
                        storage: storage.clone(),
                        source,
                    });
                }
                Err(source) if source.is_no_space() => {
                    return Err(CreateError::NoSpace {
                        name: new.name.clone(),
                        storage: storage.clone(),
                        size,
                        source,
                    });
                }
                Err(source) => return Err(api(source)),
            };
            return Ok(CreatedVolume {
                handle: handle(candidate, volid),
                size,
                place: candidate.place.clone(),
            });
        }
        Err(no_room(new, storage, size, &reasons))
    }

    /// The volume that is in the way of an allocation: it is the one, if its size fits.
    #[expect(
        clippy::too_many_arguments,
        reason = "the request's own values, which belong to no type of their own"
    )]
    async fn existing(
        &self,
        client: &Client,
        guess: Option<&VolId>,
        candidate: &Candidate<'_>,
        new: &NewVolume,
        required: Bytes,
        limit: Bytes,
        error: ApiError,
    ) -> Result<CreatedVolume, CreateError> {
        let Some(volid) = guess else {
            return Err(CreateError::Api { name: new.name.clone(), source: error });
        };
        let info = client.volume(&candidate.row.node, volid).await;
        let info = info.map_err(|source| CreateError::Api { name: new.name.clone(), source })?;
        found(volid, info.size, candidate, required, limit)
    }

    fn region_of(&self, new: &NewVolume) -> Result<Region, CreateError> {
        let mut regions = self.regions();
        match (new.places.first(), regions.next(), regions.next()) {
            (Some(first), ..) => Ok(new
                .places
                .iter()
                .find(|place| self.inner.regions.contains_key(&place.region))
                .unwrap_or(first)
                .region
                .clone()),
            (None, Some(only), None) => Ok(only.clone()),
            (None, ..) => Err(CreateError::NoRegion { name: new.name.clone() }),
        }
    }

    fn filename(&self, new: &NewVolume, storage: &StorageId, plugin: &str) -> Result<String, CreateError> {
        let refuse = |why| CreateError::Plugin { storage: storage.clone(), plugin: plugin.to_owned(), why };
        let disk = disk_name(self.inner.settings.owner, &new.name);
        if keeps_files(plugin) {
            if plugin == "btrfs" && new.parameters.format == ImageFormat::Qcow2 {
                return Err(refuse("btrfs storages take raw images only"));
            }
            return Ok(format!("{disk}.{}", new.parameters.format));
        }
        match plugin {
            // Its blocks are not wiped, so a new volume can't be told from one with data.
            "lvm" => Err(refuse("it hands out blocks that still hold what was there before")),
            _ if new.parameters.format == ImageFormat::Qcow2 => {
                Err(refuse("qcow2 images need a file storage"))
            }
            _ => Ok(disk),
        }
    }

    /// The volid that the storages of Proxmox itself give; a plugin of others may give another one.
    fn guess(&self, storage: &StorageId, plugin: &str, filename: &str) -> Option<VolId> {
        let name = if keeps_files(plugin) {
            format!("{}/{filename}", self.inner.settings.owner)
        } else {
            filename.to_owned()
        };
        Some(VolId { storage: storage.clone(), name: name.parse().ok()? })
    }
}

/// The places a volume could go to, preferred ones first, and why others are out.
fn candidates<'a>(
    new: &NewVolume,
    storage: &'a StorageId,
    region: &Region,
    resources: &'a Resources,
) -> Result<(Vec<Candidate<'a>>, Vec<String>), CreateError> {
    let rows: Vec<&StorageRow> = resources.storage(storage).collect();
    let Some(first) = rows.first().copied() else {
        return Err(CreateError::NoSuchStorage {
            storage: storage.clone(),
            region: region.clone(),
            seen: storages_seen(resources),
        });
    };
    let mut reasons = Vec::new();
    let mut usable: Vec<&StorageRow> = Vec::new();
    for row in rows {
        if row.available && resources.is_online(&row.node) {
            usable.push(row);
        } else {
            reasons.push(format!("not available on node `{}`", row.node));
        }
    }
    // Where nothing says otherwise, the node with the most room.
    usable.sort_by_key(|row| std::cmp::Reverse(row.free()));
    let wanted: Vec<&topology::Place> = new.places.iter().filter(|place| place.region == *region).collect();
    if first.shared {
        let near = wanted.iter().find_map(|place| place.zone.as_ref());
        usable.sort_by_key(|row| Some(&row.node) != near);
        let place = topology::Place { region: region.clone(), zone: None };
        let rows = usable.into_iter().take(1);
        return Ok((rows.map(|row| Candidate { row, place: place.clone() }).collect(), reasons));
    }
    let at = |row: &'a StorageRow| Candidate {
        row,
        place: topology::Place { region: region.clone(), zone: Some(row.node.clone()) },
    };
    if new.places.is_empty() || wanted.iter().any(|place| place.zone.is_none()) {
        return Ok((usable.into_iter().map(at).collect(), reasons));
    }
    let mut chosen: Vec<Candidate<'a>> = Vec::new();
    for zone in wanted.iter().filter_map(|place| place.zone.as_ref()) {
        match usable.iter().find(|row| row.node == *zone) {
            Some(row) if chosen.iter().all(|c| c.row.node != row.node) => chosen.push(at(row)),
            Some(_) => {}
            None => reasons.push(format!("not on node `{zone}`")),
        }
    }
    Ok((chosen, reasons))
}

fn no_room(new: &NewVolume, storage: &StorageId, size: Bytes, reasons: &[String]) -> CreateError {
    CreateError::NoRoom {
        name: new.name.clone(),
        storage: storage.clone(),
        size,
        reasons: if reasons.is_empty() { "no node has it".to_owned() } else { reasons.join(", ") },
    }
}

fn handle(candidate: &Candidate<'_>, volid: VolId) -> VolumeHandle {
    VolumeHandle { region: candidate.place.region.clone(), zone: candidate.place.zone.clone(), volid }
}

fn found(
    volid: &VolId,
    size: Bytes,
    candidate: &Candidate<'_>,
    required: Bytes,
    limit: Bytes,
) -> Result<CreatedVolume, CreateError> {
    let handle = handle(candidate, volid.clone());
    if size < required || size > limit {
        return Err(CreateError::Exists { handle, size, required, limit });
    }
    Ok(CreatedVolume { handle, size, place: candidate.place.clone() })
}
