//! Disks and mounts that are not as they should be.

use proxmox_csi::{
    host::{DeviceNumber, error::MountError},
    node::UnstageError,
};
use tonic::{Code, Status};

use super::{MIB, Rig};

pub(crate) async fn p8_a_disk_that_the_kernel_has_given_up_is_unstaged<R: Rig>() {
    let rig = R::alone().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.set_state(&volume, "blocked");
    let blocked = rig.node().unstage(&volume.unstage()).await.expect_err("it may come back");
    assert_eq!(Status::from(blocked).code(), Code::Unavailable);

    rig.set_state(&volume, "offline");
    let target = rig.path("pods/1/mount");
    let published = rig.node().publish(&volume.publish(&target)).await.expect_err("it is offline");
    assert!(Status::from(published).message().contains("delete the pod"));
    rig.node().unstage(&volume.unstage()).await.expect("it is let go");
    assert!(rig.mounts().is_empty() && rig.kernel_disks().is_empty());
}

pub(crate) async fn p7_what_is_mounted_at_the_staging_path_and_is_no_volume_stays<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.make_directory(&volume.staging);
    rig.mount_tmpfs(&volume.staging);
    let foreign = rig.node().unstage(&volume.unstage()).await.expect_err("it is no volume");
    assert!(matches!(foreign, UnstageError::OtherVolume { .. }) && foreign.to_string().contains("`tmpfs`"));
    assert_eq!(rig.mounts().len(), 1, "it stays");
    rig.unmount(&volume.staging);
}

pub(crate) async fn p3_a_directory_that_lost_its_mount_is_not_bound_for_a_pod<R: Rig>() {
    let rig = R::new().await;
    let (staging, target) = (rig.path("staging"), rig.path("target"));
    for directory in [&staging, &target] {
        rig.make_directory(directory);
    }
    let volume = DeviceNumber { major: 8, minor: 16 };
    for readonly in [false, true] {
        let bound = rig.host().bind(staging.as_path(), volume, target.as_path(), readonly).await;
        assert!(matches!(bound, Err(MountError::Wrong { .. })), "{bound:?}");
        assert!(rig.mounts().is_empty(), "nothing stays");
    }
}

pub(crate) async fn a_disk_that_takes_no_writes_is_mounted_read_only<R: Rig>() {
    let rig = R::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let name = format!("pvc-{lun}");
        let made = rig.attach_unseen(&name, lun, 512 * MIB);
        rig.mkfs(&made, fs);
        rig.detach(&made);
        let volume = rig.attach(&name, lun, 512 * MIB);
        rig.write_protect(&volume);
        for _ in 0..2 {
            rig.node().stage(&volume.stage(fs)).await.expect("it is staged");
        }
        let target = rig.path(&format!("pods/{lun}/mount"));
        rig.node().publish(&volume.publish(&target)).await.expect("it is published");
        let refused = rig.write(&target, "mine").expect_err("it takes no writes");
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
        rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    }
    assert!(rig.mounts().is_empty());
    assert!(rig.kernel_disks().is_empty());

    let blank = rig.attach("pvc-3", 3, 64 * MIB);
    rig.write_protect(&blank);
    let refused = Status::from(rig.node().stage(&blank.stage("ext4")).await.expect_err("it is blank"));
    assert!(refused.message().contains("it is used read-only"), "{refused}");
}
