//! Finding the disk of a volume.

use std::time::Duration;

use proxmox_csi::{
    host::error::OpenError,
    node::{FindError, StageError},
    types::{Bytes, ScsiSlot, publish::Contents},
};

use super::{MIB, Rig};

pub(crate) async fn p3_a_volume_is_found_by_what_the_device_answers<R: Rig>() {
    let rig = R::new().await;
    let other = rig.attach("pvc-1", 1, 64 * MIB);
    let volume = rig.attach("pvc-2", 2, 64 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is found");
    rig.write(&volume.staging, "mine").expect("it is mounted");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(!rig.is_blank(&volume) && rig.is_blank(&other), "the other disk is untouched");
}

pub(crate) async fn a_disk_the_kernel_never_heard_of_is_found_by_a_scan_of_its_lun<R: Rig>() {
    let rig = R::new().await;
    let other = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    let volume = rig.attach_unseen("pvc-2", 2, 64 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is found");
    assert_eq!(rig.kernel_disks().len(), 1, "only its LUN was scanned");
    rig.detach(&other);
    let missing = rig.node().stage(&other.stage("ext4")).await;
    assert!(matches!(missing, Err(StageError::Find(FindError::Absent { .. }))), "{missing:?}");
}

pub(crate) async fn p3_two_disks_with_one_wwn_are_refused<R: Rig>() {
    let rig = R::new().await;
    let twin = rig.attach("pvc-1", 1, 64 * MIB);
    let volume = rig.attach("pvc-2", 2, 64 * MIB);
    rig.rename(&twin, volume.published.wwn);
    let staged = rig.node().stage(&volume.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Find(FindError::Several { .. }))), "{staged:?}");
    assert!(rig.mounts().is_empty());
}

pub(crate) async fn p3_a_disk_of_another_size_is_refused<R: Rig>() {
    let rig = R::new().await;
    let mut volume = rig.attach("pvc-1", 1, 64 * MIB);
    volume.published.size = Some(Bytes::new(65 * MIB));
    let staged = rig.node().stage(&volume.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Find(FindError::TooSmall { .. }))), "{staged:?}");

    // The tree says another size than the device has.
    volume.published.size = None;
    rig.list_size(&volume, 2 * MIB);
    let staged = rig.node().stage(&volume.stage("ext4")).await;
    let size = matches!(staged, Err(StageError::Find(FindError::Open(OpenError::Size { .. }))));
    assert!(size, "{staged:?}");
}

pub(crate) async fn p3_a_node_that_is_another_device_is_refused<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let other = rig.attach("pvc-2", 2, 64 * MIB);
    rig.move_node(&rig.disk_of(&other), &rig.disk_of(&volume));
    let staged = rig.node().stage(&volume.stage("ext4")).await;
    let number = matches!(staged, Err(StageError::Find(FindError::Open(OpenError::Number { .. }))));
    assert!(number, "{staged:?}");
    assert!(rig.is_blank(&volume) && rig.is_blank(&other), "nothing was written");
}

pub(crate) async fn p3_a_disk_of_the_driver_before_is_accepted_at_its_lun_only<R: Rig>() {
    let rig = R::new().await;
    let mut volume = rig.attach("pvc-1", 3, 64 * MIB);
    volume.published.wwn = "0x5056432d49443033".parse().expect("a name");
    volume.published.contents = Contents::Unknown;
    volume.published.size = None;
    rig.rename(&volume, volume.published.wwn);
    rig.mkfs(&volume, "ext4");
    rig.node().stage(&volume.stage("ext4")).await.expect("it is mounted");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.kernel_disks().is_empty());
    volume.published.slot = ScsiSlot::new(3);
    rig.node().stage(&volume.stage("ext4")).await.expect("a scan brings it back");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");

    rig.node().stage(&volume.stage("ext4")).await.expect("it is back");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    let mut moved = volume.clone();
    moved.published.slot = ScsiSlot::new(4);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is back");
    let staged = rig.node().stage(&moved.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Find(FindError::OtherSlot { .. }))), "{staged:?}");
}

pub(crate) async fn p3_an_attachment_of_another_volume_is_refused<R: Rig>() {
    let rig = R::new().await;
    let mut volume = rig.attach("pvc-1", 1, 64 * MIB);
    let other = rig.attach("pvc-2", 2, 64 * MIB);
    volume.published = other.published.clone();
    let mixed = rig.node().stage(&volume.stage("ext4")).await;
    assert!(matches!(mixed, Err(StageError::Find(FindError::OtherVolume { .. }))), "{mixed:?}");
    assert!(rig.is_blank(&other), "nothing was written");
}

pub(crate) async fn a_disk_whose_node_comes_late_is_waited_for<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let node = rig.disk_of(&volume);
    rig.move_node(&node, "away");
    let missing = rig.node().stage(&volume.stage("ext4")).await.expect_err("it has no node");
    assert!(missing.to_string().contains("is the host's `/dev` mounted"), "{missing}");
    let stage = volume.stage("ext4");
    let late = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        rig.move_node("away", &node);
    };
    let (staged, ()) = tokio::join!(rig.node().stage(&stage), late);
    staged.expect("it is found in the end");
}
