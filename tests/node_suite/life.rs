//! The life of a volume on a node.

use std::time::Duration;

use proxmox_csi::{
    csi::{
        node::NodeService,
        proto::{self, node_server::Node as _},
    },
    host::Place,
    node::{Publish, PublishError, StageError, Stats, UnstageError},
    runtime::Operations,
    types::Bytes,
};
use tonic::Code;

use super::{MIB, Rig, growth::size_of};

pub(crate) async fn stage_is_idempotent<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage("xfs")).await.expect("it is staged");
    rig.write(&volume.staging, "mine").expect("it is mounted");
    for _ in 0..3 {
        rig.node().stage(&volume.stage("xfs")).await.expect("it is staged already");
    }
    assert_eq!(rig.mounts().len(), 1);
    assert_eq!(rig.read(&volume.staging).expect("the data"), "mine");
    let differs = rig.node().stage(&volume.stage("ext4")).await;
    assert!(matches!(differs, Err(StageError::Differs { .. })), "{differs:?}");
    let mut other = rig.attach("pvc-2", 2, 64 * MIB);
    other.staging = volume.staging.clone();
    let occupied = rig.node().stage(&other.stage("ext4")).await;
    assert!(matches!(occupied, Err(StageError::Occupied { .. })), "{occupied:?}");
    let foreign = rig.node().unstage(&other.unstage()).await;
    assert!(matches!(foreign, Err(UnstageError::OtherVolume { .. })), "{foreign:?}");
}

pub(crate) async fn p8_data_survives_unstage_and_stage_without_a_detach<R: Rig>() {
    let rig = R::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node().stage(&volume.stage(fs)).await.expect("it is staged");
        rig.write(&volume.staging, "mine").expect("it is mounted");
        rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
        assert!(rig.kernel_disks().is_empty(), "the kernel let go");
        rig.node().stage(&volume.stage(fs)).await.expect("it is found again");
        assert_eq!(rig.read(&volume.staging).expect("the data"), "mine");
        rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    }
}

pub(crate) async fn p8_unstage_leaves_nothing_behind<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let target = rig.path("pods/1/mount");
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.node().publish(&volume.publish(&target)).await.expect("it is published");
    let used = rig.node().unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "{used:?}");
    assert_eq!(rig.mounts().len(), 2, "a pod's volume is never taken away");

    rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    assert!(!rig.exists(&target));
    for _ in 0..3 {
        rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
        rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    }
    assert!(rig.mounts().is_empty());
    assert!(rig.kernel_disks().is_empty());
    assert!(rig.is_free(&volume), "nothing in the kernel holds the disk");
}

pub(crate) async fn p8_a_disk_that_something_else_holds_is_not_taken_out<R: Rig>() {
    let rig = R::alone().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    let holder = rig.hold_all_mounts().await;
    let held = rig.node().unstage(&volume.unstage()).await;
    drop(holder);
    let error = held.expect_err("the disk is held").to_string();
    assert!(error.contains("mounted in the namespace of process"), "{error}");
    rig.node().unstage(&volume.unstage()).await.expect("now it goes");
    assert!(rig.kernel_disks().is_empty());
}

pub(crate) async fn p8_a_late_unstage_accepts_a_missing_disk<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.detach(&volume);
    rig.node().unstage(&volume.unstage()).await.expect("there is nothing to lose");
    assert!(rig.mounts().is_empty());
    rig.node().unstage(&volume.unstage()).await.expect("nor now");
}

pub(crate) async fn p6_a_dropped_stage_call_runs_to_its_end<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    let operations = Operations::default();
    let service = NodeService::new(rig.node().clone(), operations.clone());
    let request = volume.stage_request("xfs");
    let call = service.node_stage_volume(tonic::Request::new(request.clone()));
    tokio::time::timeout(Duration::from_millis(1), call).await.expect_err("the caller gives up");
    assert!(rig.mounts().is_empty());
    let mut other = request.clone();
    other.volume_capability = volume.stage_request("ext4").volume_capability;
    let busy = service.node_stage_volume(tonic::Request::new(other)).await.expect_err("it is busy");
    assert_eq!(busy.code(), tonic::Code::Aborted);
    service.node_stage_volume(tonic::Request::new(request)).await.expect("the retry joins");
    assert!(operations.drain(Duration::from_secs(30)).await);
    rig.write(&volume.staging, "mine").expect("it is mounted");
}

pub(crate) async fn a_raw_block_volume_is_the_disk_itself<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let target = rig.path("pods/1/volume");
    rig.node().stage(&volume.stage_block()).await.expect("it is staged");
    let publish = volume.publish_block(&target);
    for _ in 0..2 {
        rig.node().publish(&publish).await.expect("it is published");
    }
    let place = rig.host().look(target.as_path()).await.expect("it is there");
    assert!(matches!(place, Place::BlockDevice(_)), "{place:?}");
    assert_eq!(rig.node().stats(&target).await.expect("it is there"), Stats::Block(Bytes::new(64 * MIB)));
    rig.write_disk(&target, 4096, b"raw").expect("it takes writes");
    rig.resize(&volume, 128 * MIB);
    let size = rig.node().expand(&volume.expand(&target, 128 * MIB)).await.expect("it has grown");
    assert_eq!(size, Bytes::new(128 * MIB));

    let readonly = Publish { readonly: true, ..publish.clone() };
    let refused = rig.node().publish(&readonly).await;
    assert!(matches!(refused, Err(PublishError::ReadonlyBlock)), "{refused:?}");
    let used = rig.node().unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "{used:?}");
    rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    assert!(!rig.exists(&target));
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.kernel_disks().is_empty(), "the handle tells which disk it was");
    assert_eq!(rig.peek(&volume, 4096, 3), b"raw");
}

pub(crate) async fn readonly_publish_is_read_only<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    let (writable, readonly) = (rig.path("pods/1/mount"), rig.path("pods/2/mount"));
    rig.node().publish(&volume.publish(&writable)).await.expect("it is published");
    let publish = Publish { readonly: true, ..volume.publish(&readonly) };
    for _ in 0..2 {
        rig.node().publish(&publish).await.expect("it is published");
    }
    rig.write(&writable, "mine").expect("this one takes writes");
    assert_eq!(rig.read(&readonly).expect("it reads"), "mine");
    let refused = rig.write(&readonly, "other").expect_err("this one does not");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let differs = rig.node().publish(&volume.publish(&readonly)).await;
    assert!(matches!(differs, Err(PublishError::Differs { .. })), "{differs:?}");
    let third = rig.path("pods/3/mount");
    rig.node().publish(&volume.publish(&third)).await.expect("the node may have several targets");
    assert_eq!(rig.read(&third).expect("it reads"), "mine");
}

pub(crate) async fn what_is_not_staged_is_not_published<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let other = rig.attach("pvc-2", 2, 64 * MIB);
    let target = rig.path("pods/1/mount");
    let missing = rig.node().publish(&volume.publish(&target)).await;
    assert!(matches!(missing, Err(PublishError::NotStaged(_))), "{missing:?}");
    rig.node().stage(&other.stage("ext4")).await.expect("it is staged");
    let publish = Publish { staging: other.staging.clone(), ..volume.publish(&target) };
    let wrong = rig.node().publish(&publish).await;
    assert!(matches!(wrong, Err(PublishError::OtherStaged { .. })), "{wrong:?}");
    assert!(!rig.exists(&target));
    assert!(rig.node().stats(&target).await.is_err());
}

pub(crate) async fn a_disk_that_was_pulled_while_mounted_is_staged_again<R: Rig>() {
    let rig = R::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node().stage(&volume.stage(fs)).await.expect("it is staged");
        rig.write(&volume.staging, "mine").expect("it is mounted");
        rig.sync();
        rig.detach(&volume);
        let back = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node().stage(&back.stage(fs)).await.expect("the dead mount gives way");
        assert_eq!(rig.read(&back.staging).expect("the data"), "mine");
        assert_eq!(rig.mounts_below(&back.staging).len(), 1);
        rig.node().unstage(&back.unstage()).await.expect("it is unstaged");
    }
}

pub(crate) async fn paths_may_lead_through_links<R: Rig>() {
    let rig = R::new().await;
    let mut volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.make_directory(&rig.path("data"));
    rig.link(&rig.path("kubelet"), &rig.path("data"));
    volume.staging = rig.path("kubelet/globalmount");
    let target = rig.path("kubelet/pods/1/mount");
    for _ in 0..2 {
        rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
        rig.node().publish(&volume.publish(&target)).await.expect("it is published");
    }
    assert_eq!(rig.mounts().len(), 2);
    size_of(&rig, &target).await;
    rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.mounts().is_empty() && rig.kernel_disks().is_empty());
}

pub(crate) async fn p6_both_handle_forms_of_a_volume_exclude_each_other<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    let operations = Operations::default();
    let service = NodeService::new(rig.node().clone(), operations.clone());
    let request = volume.stage_request("xfs");
    let call = service.node_stage_volume(tonic::Request::new(request.clone()));
    tokio::time::timeout(Duration::from_millis(1), call).await.expect_err("the caller gives up");
    let zoned = volume.handle.replacen("//", "/pve-1/", 1);
    let other = proto::NodeStageVolumeRequest { volume_id: zoned, ..request };
    let busy = service.node_stage_volume(tonic::Request::new(other)).await.expect_err("it is one disk");
    assert_eq!(busy.code(), Code::Aborted);
    assert!(operations.drain(Duration::from_secs(30)).await);
}
