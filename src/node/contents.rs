//! What carries a volume's data: its disk, or the mapping over it where the volume is encrypted.
//!
//! Which mapping is a volume's is read from the kernel: it lies over the volume's disk and has the name that this driver, or the one
//! before it, gives. A mapping of another name is a pod's own business: it encrypts a raw block volume by itself.

use super::{Node, Stage, StageError, find, stage};
use crate::{
    host::{
        Disk, Found, OpenDisk,
        error::{DisksError, OpenError},
        luks::{Mapping, Passphrase},
    },
    types::{Wwn, publish::Contents},
};

/// The name of a volume's mapping: made of the name that its disk has, or where that is of the driver before this one, and only
/// names a slot, of the one that it would have.
pub(super) fn mapping_name(volume: &str, wwn: Wwn) -> String {
    let own = if wwn.is_ours() { wwn } else { find::names(volume).first().copied().unwrap_or(wwn) };
    format!("proxmox-csi-{}", own.to_string().trim_start_matches("0x"))
}

/// Whether a mapping has a name that the volume's would have.
pub(super) fn is_named_for(mapping: &Mapping, volume: &str) -> bool {
    find::names(volume).into_iter().any(|wwn| mapping_name(volume, wwn) == mapping.name)
}

/// Whether a mapping over the disk has a name of this driver or of the one before it (`sdb-encrypted`).
pub(super) fn is_ours(mapping: &Mapping, volume: &str, disk: &Disk) -> bool {
    mapping.over == Some(disk.number)
        && (is_named_for(mapping, volume) || mapping.name == format!("{}-encrypted", disk.name))
}

/// What carries a volume's data, as the kernel lists it.
#[derive(Debug, Clone)]
pub(super) enum Carrier {
    /// The disk itself.
    Disk(Disk),
    /// The mapping over it.
    Mapping(Mapping),
}

impl Carrier {
    pub(super) fn device(&self) -> &Disk {
        match self {
            Self::Disk(disk) => disk,
            Self::Mapping(mapping) => &mapping.device,
        }
    }
}

/// The device to mount, and what was done to have it.
pub(super) struct Opened {
    pub(super) device: OpenDisk,
    /// The mapping, where it was opened just now.
    pub(super) fresh: Option<Mapping>,
}

impl Node {
    /// What carries the data of the volume on the disk.
    pub(super) async fn carrier(&self, volume: &str, disk: &Disk) -> Result<Carrier, DisksError> {
        let mut mappings = self.host.mappings().await?.into_iter();
        let mapping = mappings.find(|mapping| is_ours(mapping, volume, disk));
        Ok(mapping.map_or_else(|| Carrier::Disk(disk.clone()), Carrier::Mapping))
    }

    /// Opens what carries the data.
    pub(super) async fn open_carrier(&self, carrier: &Carrier) -> Result<OpenDisk, OpenError> {
        match carrier {
            Carrier::Disk(disk) => self.host.open(disk).await,
            Carrier::Mapping(mapping) => self.host.open_mapping(mapping).await,
        }
    }

    /// Whether what carries the data is in use: see [`crate::host::Host::in_use`].
    pub(super) async fn is_in_use(&self, carrier: &Carrier) -> Result<bool, OpenError> {
        let open = self.open_carrier(carrier).await?;
        self.host.in_use(&open).await
    }

    /// Opens the volume: decrypts it where a key came along, after encrypting it where it is blank. A volume is used encrypted or not as
    /// it is and was asked for; where the two differ it is refused.
    pub(super) async fn unlocked(
        &self,
        disk: &OpenDisk,
        carrier: &Carrier,
        command: &Stage,
        readonly: bool,
    ) -> Result<Opened, StageError> {
        let refused =
            |source| StageError::Refused { disk: disk.disk().name.clone(), source: Box::new(source) };
        match (&command.key, carrier) {
            (None, Carrier::Mapping(_)) => Err(refused(stage::Refusal::Encrypted)),
            (None, Carrier::Disk(_)) => Ok(Opened { device: disk.clone(), fresh: None }),
            (Some(_), Carrier::Mapping(mapping)) => {
                Ok(Opened { device: self.host.open_mapping(mapping).await?, fresh: None })
            }
            (Some(key), Carrier::Disk(_)) => {
                self.close_stale(command).await?;
                let found = self.host.probe(disk).await?;
                let encrypt = to_encrypt(command.disk.contents, &found, readonly).map_err(refused)?;
                if encrypt {
                    self.host.encrypt_blank(disk, key, &self.options.key_cost).await?;
                }
                self.unlock(disk, command, key).await
            }
        }
    }

    async fn unlock(&self, disk: &OpenDisk, command: &Stage, key: &Passphrase) -> Result<Opened, StageError> {
        let name = mapping_name(&command.volume, command.disk.wwn);
        let mapping = self.host.unlock(disk, key, &name).await?;
        match self.host.open_mapping(&mapping).await {
            Ok(device) => Ok(Opened { device, fresh: Some(mapping) }),
            Err(error) => {
                self.lock_again(&mapping, &command.volume).await;
                Err(error.into())
            }
        }
    }

    /// Closes a mapping that a stage opened which failed after that: nobody would unstage it.
    pub(super) async fn lock_again(&self, mapping: &Mapping, volume: &str) {
        if let Err(error) = self.host.lock(mapping).await {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(volume, mapping = mapping.name, error, "a mapping stays open");
        }
    }

    /// Closes what is left of the volume's mapping after its disk was pulled.
    async fn close_stale(&self, command: &Stage) -> Result<(), StageError> {
        let disks = self.host.disks().await?;
        for mapping in self.host.mappings().await? {
            let over_a_disk = disks.iter().any(|disk| mapping.over == Some(disk.number));
            if is_named_for(&mapping, &command.volume) && !over_a_disk {
                tracing::warn!(
                    volume = command.volume,
                    mapping = mapping.name,
                    "a mapping over a disk that is gone"
                );
                self.host.lock(&mapping).await?;
            }
        }
        Ok(())
    }
}

/// Whether a volume that is to be encrypted has yet to be. Only one that was allocated blank; the proof is still to come.
fn to_encrypt(contents: Contents, found: &Found, readonly: bool) -> Result<bool, stage::Refusal> {
    use stage::Refusal;
    match (found, contents) {
        (Found::Luks { .. }, _) => Ok(false),
        (Found::Filesystem { name, .. }, _) => Err(Refusal::Plain(name.clone())),
        (Found::Unfinished(there), _) => Err(Refusal::Plain(there.to_string())),
        (Found::Other(what), _) => Err(Refusal::Foreign(what.clone())),
        (Found::NoSignature, _) if readonly => Err(Refusal::Readonly),
        (Found::NoSignature, Contents::Blank) => Ok(true),
        (Found::NoSignature, Contents::Unwiped | Contents::Unknown) => Err(Refusal::NotEncrypted),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mapping_is_named_for_its_volume_in_both_handle_forms() {
        let legacy = "0x5056432d49443031".parse().expect("a name");
        let [shared, zoned] = ["region//rbd/vm-9999-pvc-1", "region/pve-1/rbd/vm-9999-pvc-1"];
        assert_eq!(mapping_name(shared, legacy), mapping_name(zoned, legacy));
        let own = find::names(zoned)[1];
        assert_eq!(
            mapping_name(zoned, own),
            format!("proxmox-csi-{}", own.to_string().trim_start_matches("0x"))
        );
        assert_ne!(mapping_name(zoned, own), mapping_name("region/pve-1/rbd/vm-9999-pvc-2", legacy));
    }

    proptest! {
        #[test]
        fn p4_only_an_empty_volume_that_was_allocated_blank_may_be_encrypted(
            contents in prop_oneof![Just(Contents::Blank), Just(Contents::Unwiped), Just(Contents::Unknown)],
            found in prop_oneof![
                Just(Found::NoSignature),
                any::<bool>().prop_map(|ours| Found::Luks { ours }),
                "[a-z0-9]{1,8}".prop_map(|name| Found::Filesystem { name, uuid: None }),
                ".*".prop_map(Found::Other),
            ],
            readonly: bool,
        ) {
            if to_encrypt(contents, &found, readonly) == Ok(true) {
                prop_assert_eq!((contents, &found, readonly), (Contents::Blank, &Found::NoSignature, false));
            }
        }
    }
}
