//! Finding the disk of a volume: by what the disk itself answers, never by a name or a link.
//!
//! No match: the kernel is made to look at exactly the disk's LUN, then for controllers it never heard of, and the disk is waited for.
//! More than one match, or a disk that is too small: refused.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Node;
use crate::{
    host::{
        Disk, OpenDisk,
        error::{DisksError, OpenError, ScanError},
    },
    types::{Bytes, ScsiSlot, VolumeHandle, Wwn, publish::PublishedDisk},
};

/// Why the disk of a volume was not found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The disks can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// No disk answers with the name.
    #[error(
        "no disk with WWN {wwn} appeared within {waited:?}; is the volume attached to this VM, and are hot-plug and a `virtio-scsi` controller on?"
    )]
    Absent {
        /// The name.
        wwn: Wwn,
        /// How long it was waited for.
        waited: Duration,
        /// Why the last scan failed, where it did.
        #[source]
        scan: Option<ScanError>,
    },
    /// The name that the attachment states is another volume's.
    #[error(
        "the attachment names WWN {wwn}, which is not that of volume `{volume}`; detach the volume and attach it again"
    )]
    OtherVolume {
        /// The name.
        wwn: Wwn,
        /// The volume.
        volume: String,
    },
    /// Several disks answer with the name.
    #[error("disks {disks} all have WWN {wwn}: which is the volume can't be told; detach one of them")]
    Several {
        /// The name.
        wwn: Wwn,
        /// The disks.
        disks: String,
    },
    /// A disk that was attached by the driver before this one is not in the slot that the attachment names.
    #[error(
        "disk {disk} has the WWN {wwn} of a slot, not of a volume, and is not at {expected}; detach the volume and attach it again"
    )]
    OtherSlot {
        /// The disk.
        disk: String,
        /// Its name.
        wwn: Wwn,
        /// The slot of the attachment, in words.
        expected: String,
    },
    /// The disk is smaller than the volume.
    #[error("disk {disk} is smaller than the volume, which has {volume}")]
    TooSmall {
        /// The disk.
        disk: String,
        /// The size of the volume.
        volume: Bytes,
    },
    /// The disk can't be opened, or is not what it was a moment ago.
    #[error(transparent)]
    Open(#[from] OpenError),
}

const POLL: Duration = Duration::from_millis(100);
/// How long a hot-plugged disk usually takes to appear by itself after a scan of its LUN. Then the bus is scanned as well.
const BUS_AFTER: Duration = Duration::from_secs(2);

impl Node {
    /// Finds the disk of an attachment, waits for it if need be, and opens it.
    pub(super) async fn find(&self, volume: &str, published: &PublishedDisk) -> Result<OpenDisk, FindError> {
        named_for(volume, published.wwn)?;
        let started = Instant::now();
        let deadline = started + self.options.find_timeout;
        let mut scan = Ok(());
        let (mut lun_scanned, mut bus_scanned) = (false, false);
        loop {
            if let Some(disk) = choose(&self.host.disks().await?, published)? {
                match self.take(disk, published.size).await {
                    Err(FindError::Open(error)) if passes(&error) && Instant::now() < deadline => {
                        sleep(POLL).await;
                        continue;
                    }
                    taken => return taken,
                }
            }
            if Instant::now() >= deadline {
                let waited = self.options.find_timeout;
                return Err(FindError::Absent { wwn: published.wwn, waited, scan: scan.err() });
            }
            if let (Some(slot), false) = (published.slot, lun_scanned) {
                lun_scanned = true;
                scan = self.host.scan(slot).await;
            } else if !bus_scanned && started.elapsed() >= BUS_AFTER {
                // A controller that appears now brings its disk along, and its LUN has to be looked at again if not.
                (bus_scanned, lun_scanned) = (true, false);
                scan = self.host.scan_bus().await;
            } else {
                sleep(POLL).await;
            }
        }
    }

    /// Opens the disk once it has the size.
    async fn take(&self, disk: Disk, size: Option<Bytes>) -> Result<OpenDisk, FindError> {
        let disk = self.at_least(disk, size).await?;
        Ok(self.host.open(&disk).await?)
    }

    /// The disk, once it has the size; the kernel is made to ask the device where it has not.
    async fn at_least(&self, disk: Disk, size: Option<Bytes>) -> Result<Disk, FindError> {
        let Some(size) = size else { return Ok(disk) };
        if disk.size >= size {
            return Ok(disk);
        }
        let disk = self.host.refresh(&disk).await?;
        if disk.size >= size {
            return Ok(disk);
        }
        Err(FindError::TooSmall { disk: disk.to_string(), volume: size })
    }
}

/// Whether the disk may only be on its way: sysfs shows it before `/dev` has its node, or has another's of its name.
fn passes(error: &OpenError) -> bool {
    matches!(error, OpenError::NoNode { .. } | OpenError::Number { .. } | OpenError::Changed { .. })
}

/// The one disk of an attachment among the disks of the node.
fn choose(disks: &[Disk], published: &PublishedDisk) -> Result<Option<Disk>, FindError> {
    let wwn = published.wwn;
    let Some(disk) = only(disks, wwn)? else { return Ok(None) };
    if wwn.legacy_slot().is_some()
        && published.slot.is_none_or(|slot| Some(u64::from(slot.index())) != disk.lun)
    {
        let expected = published.slot.map_or_else(|| "a slot that is known".to_owned(), of_slot);
        return Err(FindError::OtherSlot { disk: disk.to_string(), wwn, expected });
    }
    Ok(Some(disk.clone()))
}

fn of_slot(slot: ScsiSlot) -> String {
    format!("LUN {}", slot.index())
}

/// The one disk that answers with the name, or none.
pub(super) fn only(disks: &[Disk], wwn: Wwn) -> Result<Option<&Disk>, FindError> {
    let mut matches = disks.iter().filter(|disk| disk.wwn == Some(wwn));
    let Some(disk) = matches.next() else { return Ok(None) };
    if matches.next().is_none() {
        return Ok(Some(disk));
    }
    let all: Vec<_> = disks.iter().filter(|disk| disk.wwn == Some(wwn)).map(ToString::to_string).collect();
    Err(FindError::Several { wwn, disks: all.join(", ") })
}

/// The names that the volume's disk may have: the zone of a handle counts on local storages only, and whether a storage is shared
/// the node does not know.
pub(super) fn names(volume: &str) -> Vec<Wwn> {
    let Ok(handle) = volume.parse::<VolumeHandle>() else { return Vec::new() };
    let name = |zone| Wwn::of_volume(&handle.region, zone, &handle.volid);
    let mut names = vec![name(None)];
    names.extend(handle.zone.as_ref().map(|zone| name(Some(zone))));
    names
}

/// Refuses a name of ours that is another volume's: a publish context that was mixed up would have this volume's data written there.
pub(super) fn named_for(volume: &str, wwn: Wwn) -> Result<(), FindError> {
    if wwn.is_ours() && !names(volume).contains(&wwn) {
        return Err(FindError::OtherVolume { wwn, volume: volume.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{host::DeviceNumber, types::publish::Contents};

    fn disk(name: &str, wwn: &str, lun: u64) -> Disk {
        Disk {
            name: name.to_owned(),
            number: DeviceNumber { major: 8, minor: 0 },
            wwn: wwn.parse().ok(),
            lun: Some(lun),
            size: Bytes::GIB,
            readonly: false,
            virtio: true,
        }
    }

    fn published(wwn: &str, lun: u8) -> PublishedDisk {
        let wwn = wwn.parse().expect("a name");
        PublishedDisk { wwn, slot: ScsiSlot::new(lun), size: None, contents: Contents::Unknown }
    }

    #[test]
    fn both_names_of_a_handle_are_looked_for() {
        assert_eq!(names("region//rbd/vm-9999-pvc-1").len(), 1);
        let both = names("region/pve-1/rbd/vm-9999-pvc-1");
        assert_eq!(both.len(), 2);
        assert_eq!(both[0], names("region//rbd/vm-9999-pvc-1")[0]);
        assert!(names("fake-vol-id").is_empty());
    }

    #[test]
    fn p3_a_name_of_ours_must_be_the_volumes_own() {
        let [shared, local] = ["region//rbd/vm-9999-pvc-1", "region/pve-1/rbd/vm-9999-pvc-1"];
        for wwn in names(local) {
            assert!(named_for(local, wwn).is_ok());
        }
        assert!(named_for(shared, names(local)[1]).is_err(), "that of a local storage's volume");
        assert!(named_for("region//rbd/vm-9999-pvc-2", names(shared)[0]).is_err());
        assert!(named_for(shared, "0x5056432d49443031".parse().expect("a name")).is_ok());
    }

    #[test]
    fn a_name_of_the_driver_before_counts_only_at_its_lun() {
        let disks = [disk("sda", "0x5056432d49443031", 1), disk("sdb", "0x3c51aabbccddeeff", 2)];
        let legacy = published("0x5056432d49443031", 1);
        assert_eq!(choose(&disks, &legacy).expect("no error").map(|disk| disk.name).as_deref(), Some("sda"));
        let moved = published("0x5056432d49443031", 3);
        assert!(matches!(choose(&disks, &moved), Err(FindError::OtherSlot { .. })));
        // A name of ours is the volume's, wherever it is plugged in.
        assert!(choose(&disks, &published("0x3c51aabbccddeeff", 7)).expect("no error").is_some());
        assert!(choose(&disks, &published("0x3c51aabbccddee00", 7)).expect("no error").is_none());
        let twins = [disk("sda", "0x3c51aabbccddeeff", 1), disk("sdb", "0x3c51aabbccddeeff", 2)];
        let several = choose(&twins, &published("0x3c51aabbccddeeff", 1));
        assert!(matches!(several, Err(FindError::Several { .. })));
    }
}
