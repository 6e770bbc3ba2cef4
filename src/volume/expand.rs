//! Expand: through the VM that has the volume, or through a holder where none has.

use std::sync::Arc;

use super::{
    Volumes,
    attach::MAX_STEPS,
    attachments::{Hold, Holder, Need, SweepError},
    delete::PresenceError,
    holder::HolderError,
    placement::{Machine, Place, PlaceError},
    step::{Carried, Step},
    vmerror::VmError,
    vmqueue::machine_now,
};
use crate::{
    pve::{
        Client,
        qemu::{Drive, VmConfig},
    },
    types::{Bytes, VmId, VolumeHandle},
};

/// A volume can't be expanded, or it can't be told that it is.
#[derive(Debug, thiserror::Error)]
pub enum ExpandError {
    /// The size can't be had.
    #[error(
        "cannot expand `{handle}` to at least {required} and at most {limit}: sizes go in steps of {}",
        Bytes::VOLUME_STEP
    )]
    Range {
        /// The handle.
        handle: VolumeHandle,
        /// What is asked for at least.
        required: Bytes,
        /// What is allowed at most.
        limit: Bytes,
    },
    /// The volume is larger than the limit already, and no volume shrinks.
    #[error("`{handle}` has {size} already, more than the limit of {limit}")]
    Shrink {
        /// The handle.
        handle: VolumeHandle,
        /// Its size.
        size: Bytes,
        /// The limit.
        limit: Bytes,
    },
    /// The volume can't be reached.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The volume is not there, or it can't be told.
    #[error(transparent)]
    Presence(#[from] PresenceError),
    /// It can't be told who holds the volume.
    #[error("cannot expand `{handle}`")]
    Sweep {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: SweepError,
    },
    /// Several VMs hold it.
    #[error("cannot expand `{handle}`: it is held by {first} and by {second}")]
    Shared {
        /// The handle.
        handle: VolumeHandle,
        /// One of them.
        first: Holder,
        /// Another one.
        second: Holder,
    },
    /// The VM that has it in its config is not where the volume is: what it has there, if anything, is another volume of that name.
    #[error(
        "cannot expand `{handle}`: it is held by {holder}, away from the volume; hint: migrate the VM back, or detach the volume"
    )]
    Elsewhere {
        /// The handle.
        handle: VolumeHandle,
        /// The VM.
        holder: Holder,
    },
    /// The VM that has it can't be read or changed.
    #[error("cannot expand `{handle}`")]
    Vm {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: VmError,
    },
    /// The storage has no room.
    #[error("cannot expand `{handle}` to {size}: the storage has no room")]
    NoSpace {
        /// The handle.
        handle: VolumeHandle,
        /// The size.
        size: Bytes,
        /// Why.
        #[source]
        source: VmError,
    },
    /// The holder can't be made, used or removed.
    #[error("cannot expand `{handle}`")]
    Holder {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: HolderError,
    },
    /// The growth was reported done but does not show.
    #[error("`{handle}` was to be grown to {wanted}, and Proxmox reported that it was, but it has {size}")]
    NotGrown {
        /// The handle.
        handle: VolumeHandle,
        /// What was asked for.
        wanted: Bytes,
        /// What it has.
        size: Bytes,
    },
}

impl Volumes {
    /// Grows a volume to at least `required` and returns the size it has then. One that is as large is left alone.
    pub async fn expand(
        &self,
        handle: &VolumeHandle,
        required: Bytes,
        limit: Option<Bytes>,
    ) -> Result<Bytes, ExpandError> {
        let (place, size) = self.grow(handle, required, limit).await?;
        self.note(&place, Some(size));
        Ok(size)
    }

    async fn grow(
        &self,
        handle: &VolumeHandle,
        required: Bytes,
        limit: Option<Bytes>,
    ) -> Result<(Place, Bytes), ExpandError> {
        let wanted = super::disk::size_within(required, limit).ok_or_else(|| ExpandError::Range {
            handle: handle.clone(),
            required,
            limit: limit.unwrap_or(Bytes::new(u64::MAX)),
        })?;
        let (place, _) = self.place(handle).await?;
        let client = self
            .client(&place.region)
            .map_err(|source| PlaceError::Region { handle: handle.clone(), source })?;
        let sizes = Sizes { required, wanted, limit };
        // Who is known to have it needs no sweep: the VM itself says whether it has. That nobody has it must be seen anew.
        if let Some(machine) = self.known_user(&place) {
            match self.grow_attached(client, &place, handle, machine, sizes).await {
                Ok(Some(size)) => return Ok((place, size)),
                Ok(None) => {}
                Err(ExpandError::Vm { source, .. }) if source.dated().is_some() => {}
                Err(error) => return Err(error),
            }
        }
        let sweep = |source| ExpandError::Sweep { handle: handle.clone(), source };
        let now = self.require_present(client, &place, handle).await?.size;
        if let Some(limit) = limit
            && now > limit
        {
            return Err(ExpandError::Shrink { handle: handle.clone(), size: now, limit });
        }
        let need = Need::Fresh(self.ask(&place.region));
        let holders = self.holders(&place, None, need).await.map_err(sweep)?;
        let stray = holders.iter().find_map(|holder| match &holder.hold {
            Hold::Stray { key } => Some(VmError::Stray { vmid: holder.vmid, key: key.clone() }),
            _ => None,
        });
        let mut holders: Vec<Holder> =
            holders.into_iter().filter(|holder| matches!(holder.hold, Hold::Config { .. })).collect();
        if let [first, second] = holders.as_slice() {
            let vm = |source| ExpandError::Vm { handle: handle.clone(), source };
            // It is grown where it runs.
            if self.is_placeholder(client, &place, first).await.map_err(vm)? {
                holders.remove(0);
            } else if self.is_placeholder(client, &place, second).await.map_err(vm)? {
                holders.remove(1);
            }
        }
        let through_holder = |source| ExpandError::Holder { handle: handle.clone(), source };
        match holders.as_slice() {
            [] if now >= required => return Ok((place, now)),
            // A QEMU may have the volume: put into a second VM and grown there, it would be larger than that QEMU knows.
            [] if let Some(source) = stray => return Err(ExpandError::Vm { handle: handle.clone(), source }),
            [] => self
                .grow_through_holder(client, &place, None, wanted.max(now))
                .await
                .map_err(through_holder)?,
            [left_over] if self.is_own_holder(left_over) => self
                .grow_through_holder(client, &place, Some(left_over), wanted.max(now))
                .await
                .map_err(through_holder)?,
            [holder] if place.zone.as_ref().is_some_and(|zone| *zone != holder.node) => {
                return Err(ExpandError::Elsewhere { handle: handle.clone(), holder: holder.clone() });
            }
            [holder] => {
                let vm = |source| ExpandError::Vm { handle: handle.clone(), source };
                let machine =
                    machine_now(client, &place.region, holder.vmid, &holder.node).await.map_err(vm)?;
                let vmid = machine.vmid;
                let grown = self.grow_attached(client, &place, handle, machine, sizes).await?;
                let left = || VmError::NoProgress { vmid, detail: "the volume left it meanwhile".to_owned() };
                return Ok((place, grown.ok_or_else(|| vm(left()))?));
            }
            [first, second, ..] => {
                return Err(ExpandError::Shared {
                    handle: handle.clone(),
                    first: first.clone(),
                    second: second.clone(),
                });
            }
        }
        let size = self.require_present(client, &place, handle).await?.size;
        if size < required {
            return Err(ExpandError::NotGrown { handle: handle.clone(), wanted, size });
        }
        Ok((place, size))
    }

    /// The one VM that is known to use a volume.
    fn known_user(&self, place: &Place) -> Option<Machine> {
        let state = self.inner.regions.get(&place.region)?;
        let volid = place.volid.to_string();
        let mut users = state.sweeps.index.all().into_iter().filter_map(|(vmid, known)| {
            let here = place.zone.as_ref().is_none_or(|zone| *zone == known.node);
            let seen = known.seen.ok().filter(|_| here)?;
            let uses = seen.holds(&volid, None).iter().any(|hold| matches!(hold, Hold::Config { .. }));
            let uuid = seen.config.uuid();
            uses.then(|| Machine {
                node_name: known.name,
                region: place.region.clone(),
                vmid,
                uuid,
                node: known.node,
            })
        });
        let first = users.next().filter(|_| users.next().is_none())?;
        (!self.inner.settings.holders.contains(&first.vmid.get())).then_some(first)
    }

    /// Grows a volume through the VM that has it, and returns the size it has then; `None` where the VM does not have it.
    async fn grow_attached(
        &self,
        client: &Client,
        place: &Place,
        handle: &VolumeHandle,
        machine: Machine,
        Sizes { required, wanted, limit }: Sizes,
    ) -> Result<Option<Bytes>, ExpandError> {
        let vmid = machine.vmid;
        let vm = |source| ExpandError::Vm { handle: handle.clone(), source };
        let mut turn = self.turn(client, machine).await;
        let told = |config: &VmConfig| {
            let (_, entry) = config.holders_of(&place.volid).next()?;
            entry.current.as_deref().and_then(Drive::read).and_then(|drive| drive.size())
        };
        // What is remembered answers nothing and refuses nothing.
        let kept = turn.recall_seen();
        let recalled = kept.as_ref().map(|seen| Arc::clone(&seen.config));
        let mut recalled = recalled
            .filter(|config| config.lock().is_none() && told(config).is_some_and(|told| told < required));
        let mut stored = None;
        for _ in 0..MAX_STEPS {
            let config = match recalled.take() {
                Some(config) => config,
                None => turn.read_config(kept.as_ref()).await.map_err(vm)?,
            };
            let Some((key, _)) = config.holders_of(&place.volid).next() else { return Ok(None) };
            if told(&config).is_some_and(|told| told >= required) {
                let size = self.require_present(client, place, handle).await?.size;
                match limit {
                    Some(limit) if size > limit => {
                        return Err(ExpandError::Shrink { handle: handle.clone(), size, limit });
                    }
                    _ if size >= required => return Ok(Some(size)),
                    _ => stored = Some(size),
                }
            }
            if let Some(lock) = config.lock() {
                return Err(vm(VmError::Locked { vmid, lock: lock.to_owned() }));
            }
            // Where the storage has grown already and QEMU was not told, Proxmox answers OK to a resize to that same size and does
            // nothing, and refuses a smaller one (qemu-server `API2/Qemu.pm:resize_vm`). A strictly larger size reaches QEMU. What was
            // grown stays so, so that is not tried while QEMU would not hear of it either.
            let size = match stored {
                Some(stored) if stored >= wanted => {
                    turn.check_answers().await.map_err(vm)?;
                    larger(stored, limit).ok_or_else(|| vm(not_told(vmid, place, wanted)))?
                }
                _ => wanted,
            };
            let step = Step::Grow { key: key.to_owned(), size };
            let carried = turn.change(&step, config.digest()).await;
            match carried {
                Ok(Carried::Out) if stored.is_none() => {
                    let config = turn.read_config(kept.as_ref()).await.map_err(vm)?;
                    if told(&config).is_none_or(|told| told < required) {
                        stored = Some(self.require_present(client, place, handle).await?.size);
                    }
                    recalled = Some(config);
                }
                // The next reading tells.
                Ok(Carried::Out | Carried::NotOut) => {}
                Err(source) if is_no_space(&source) => {
                    return Err(ExpandError::NoSpace { handle: handle.clone(), size, source });
                }
                Err(source) if stored.is_none() && source.is_final() && source.dated().is_none() => {
                    let size = self.require_present(client, place, handle).await?.size;
                    if size < wanted {
                        return Err(vm(source));
                    }
                    stored = Some(size);
                }
                Err(source) => return Err(vm(source)),
            }
        }
        Err(vm(not_told(vmid, place, wanted)))
    }
}

/// The storage may have grown, and QEMU has not.
fn not_told(vmid: VmId, place: &Place, wanted: Bytes) -> VmError {
    let detail = format!(
        "`{}` did not grow to {wanted}; hint: detach it and attach it again, and it has its new size",
        place.volid
    );
    VmError::NoProgress { vmid, detail }
}

/// What is asked for at least, what it comes to in steps, and what is allowed at most.
#[derive(Clone, Copy)]
struct Sizes {
    required: Bytes,
    wanted: Bytes,
    limit: Option<Bytes>,
}

/// The next size above another, where the limit allows one.
fn larger(size: Bytes, limit: Option<Bytes>) -> Option<Bytes> {
    super::disk::size_within(Bytes::new(size.get().checked_add(1)?), limit)
}

fn is_no_space(error: &VmError) -> bool {
    match error {
        VmError::Task { source, .. } => source.exit_status().is_some_and(|text| {
            ["No space left", "nsufficient free space", "out of space"].iter().any(|part| text.contains(part))
        }),
        VmError::Request { source, .. } => source.is_no_space(),
        _ => false,
    }
}
