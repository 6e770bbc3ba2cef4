//! Who may use a volume at once, and mounts that only look like a second use.

use proxmox_csi::{
    node::{Access, Publish, PublishError, Stage, StageError, UnstageError},
    types::sharing::Sharing,
};
use tonic::{Code, Status};

use super::{MIB, Rig};

pub(crate) async fn a_volume_for_one_pod_has_one_target<R: Rig>() {
    let rig = R::new().await;
    let alone = |publish: Publish| Publish { sharing: Sharing::OnePlace, ..publish };
    let (volume, raw) = (rig.attach("pvc-1", 1, 64 * MIB), rig.attach("pvc-2", 2, 64 * MIB));
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.node().stage(&raw.stage_block()).await.expect("it is staged");
    for (name, volume, access) in [("fs", &volume, None), ("raw", &raw, Some(Access::Block))] {
        let (first, second) = (rig.path(&format!("{name}/1")), rig.path(&format!("{name}/2")));
        let publish = |target| {
            let publish = volume.publish(target);
            Publish { access: access.clone().unwrap_or(publish.access.clone()), ..publish }
        };
        for _ in 0..2 {
            rig.node().publish(&alone(publish(&first))).await.expect("the one place");
        }
        let taken = rig.node().publish(&alone(publish(&second))).await.expect_err("it is for one pod");
        assert!(matches!(taken, PublishError::Taken { .. }), "{name}: {taken:?}");
        assert_eq!(Status::from(taken).code(), Code::FailedPrecondition);
        assert!(!rig.exists(&second));
        for sharing in [Sharing::ManyPlaces, Sharing::OneNode] {
            rig.node().publish(&Publish { sharing, ..publish(&second) }).await.expect("it is for many");
        }
        rig.node().unpublish(&volume.unpublish(&first)).await.expect("it is unpublished");
        rig.node().unpublish(&volume.unpublish(&second)).await.expect("it is unpublished");
        rig.node().publish(&alone(publish(&second))).await.expect("the place is free");
    }
}

pub(crate) async fn p1_a_disk_that_several_nodes_read_is_never_one_that_could_be_written_to<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    rig.mkfs(&volume, "ext4");
    let stage = Stage { sharing: Sharing::ManyReaders, ..volume.stage("ext4") };
    let writable = rig.node().stage(&stage).await.expect_err("mounting alone may write");
    assert!(matches!(writable, StageError::Writable { .. }), "{writable:?}");
    assert_eq!(Status::from(writable).code(), Code::FailedPrecondition);
    assert!(rig.mounts().is_empty());
    rig.write_protect(&volume);
    rig.node().stage(&stage).await.expect("it is staged");
    for name in ["pods/1/mount", "pods/2/mount"] {
        let target = rig.path(name);
        let publish = Publish { sharing: Sharing::ManyReaders, ..volume.publish(&target) };
        rig.node().publish(&publish).await.expect("it is published");
        let refused = rig.write(&target, "mine").expect_err("it takes no writes");
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }
}

pub(crate) async fn a_volume_for_one_reader_is_mounted_read_only<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    rig.mkfs(&volume, "ext4");
    let target = rig.path("pods/1/mount");
    let stage = Stage { sharing: Sharing::OneReader, ..volume.stage("ext4") };
    let publish = Publish { sharing: Sharing::OneReader, ..volume.publish(&target) };
    for _ in 0..2 {
        rig.node().stage(&stage).await.expect("it is staged");
        rig.node().publish(&publish).await.expect("it is published");
    }
    let refused = rig.write(&target, "mine").expect_err("it takes no writes");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(rig.node().condition(&target).await.expect("it is known"), None);
}

pub(crate) async fn p8_a_mount_that_is_seen_twice_is_unstaged_once<R: Rig>() {
    let rig = R::new().await;
    // As the kubelet's directory is where an installer bound it at a second path.
    let (kubelet, second) = (rig.path("kubelet"), rig.path("second"));
    for directory in [&kubelet, &second] {
        rig.make_directory(directory);
    }
    rig.mount_tmpfs(&kubelet);
    rig.set_shared(&kubelet, true);
    rig.bind(&kubelet, &second);

    let mut volume = rig.attach("pvc-1", 1, 64 * MIB);
    volume.staging = rig.path("kubelet/globalmount");
    let target = rig.path("kubelet/pods/1/mount");
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    let alone = Publish { sharing: Sharing::OnePlace, ..volume.publish(&target) };
    for _ in 0..2 {
        rig.node().publish(&alone).await.expect("its twin is no second pod");
    }
    rig.write(&rig.path("second/pods/1/mount"), "mine").expect("it is seen there too");
    assert_eq!(rig.mounts().len(), 6);
    let used = rig.node().unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "a bind is no twin: {used:?}");
    rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    rig.node().unstage(&volume.unstage()).await.expect("both go");
    assert_eq!(rig.mounts().len(), 2, "the directory and its second path");
    assert!(rig.kernel_disks().is_empty());

    // The same file system mounted at the second path by another hand is no twin.
    rig.set_shared(&second, false);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.bind(&volume.staging, &rig.path("second/globalmount"));
    let used = rig.node().unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "{used:?}");
}
