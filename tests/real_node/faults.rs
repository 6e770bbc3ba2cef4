//! Disks and mounts that are not as they should be.

use std::fs;

use proxmox_csi::{
    host::{
        DeviceNumber, Host as _,
        error::{MountError, ReleaseError},
        linux::{LinuxHost, LinuxOptions},
    },
    node::UnstageError,
};
use tonic::{Code, Status};

use crate::rig::{MIB, Rig, mounts_below, run};

#[tokio::test(flavor = "multi_thread")]
async fn p8_a_disk_that_the_kernel_has_given_up_is_unstaged() {
    let rig = Rig::alone().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.set_state(1, "blocked");
    let blocked = rig.node.unstage(&volume.unstage()).await.expect_err("it may come back");
    assert_eq!(Status::from(blocked).code(), Code::Unavailable);

    rig.set_state(1, "offline");
    let target = rig.path("pods/1/mount");
    let published = rig.node.publish(&volume.publish(&target)).await.expect_err("it is offline");
    assert!(Status::from(published).message().contains("delete the pod"));
    let holders = rig.root.join("sys/block/sda/holders/dm-0");
    fs::create_dir_all(&holders).expect("the tree is writable");
    let held = rig.node.unstage(&volume.unstage()).await;
    assert!(matches!(held, Err(UnstageError::Release(ReleaseError::Held { .. }))), "{held:?}");
    fs::remove_dir(&holders).expect("the tree is writable");
    rig.node.unstage(&volume.unstage()).await.expect("it is let go");
    assert!(mounts_below(&rig.root).is_empty() && rig.kernel_disks().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_what_is_mounted_at_the_staging_path_and_is_no_volume_stays() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    fs::create_dir_all(volume.staging.as_path()).expect("a directory");
    let staging = volume.staging.to_string();
    run("mount", &["-t", "tmpfs", "tmpfs", &staging]);
    let foreign = rig.node.unstage(&volume.unstage()).await.expect_err("it is no volume");
    assert!(matches!(foreign, UnstageError::OtherVolume { .. }) && foreign.to_string().contains("`tmpfs`"));
    run("umount", &[&staging]);

    // A device that is no disk and holds a file system, as a mapping does.
    let mapped = rig.attach("pvc-2", 2, 64 * MIB);
    run("mkfs.ext4", &["-q", mapped.image.to_str().expect("UTF-8")]);
    let device = rig.mount_elsewhere(&mapped, &volume.staging);
    let number = rig.root.join("sys/dev/block").join(&device);
    fs::create_dir_all(&number).expect("the tree is writable");
    let foreign = rig.node.unstage(&volume.unstage()).await.expect_err("it is not the volume");
    assert!(matches!(foreign, UnstageError::OtherVolume { .. }) && foreign.to_string().contains(&device));
    assert_eq!(mounts_below(&rig.root).len(), 1);
    fs::remove_dir(&number).expect("the tree is writable");
    rig.node.unstage(&volume.unstage()).await.expect("a dead mount goes");
    assert!(mounts_below(&rig.root).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_a_directory_that_lost_its_mount_is_not_bound_for_a_pod() {
    let rig = Rig::new().await;
    let host = LinuxHost::new(LinuxOptions::default());
    let (staging, target) = (rig.root.join("staging"), rig.root.join("target"));
    for directory in [&staging, &target] {
        fs::create_dir(directory).expect("a directory");
    }
    let volume = DeviceNumber { major: 8, minor: 16 };
    for readonly in [false, true] {
        let bound = host.bind(&staging, volume, &target, readonly).await;
        assert!(matches!(bound, Err(MountError::Wrong { .. })), "{bound:?}");
        assert!(mounts_below(&rig.root).is_empty(), "nothing stays");
    }
}
