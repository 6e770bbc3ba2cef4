//! File systems that are damaged, or stop to work while they are mounted.

use proxmox_csi::{
    csi::{
        node::NodeService,
        proto::{self, node_server::Node as _, node_service_capability as capability},
    },
    host::error::{CheckError, MountError},
    node::{Publish, PublishError, StageError, Trouble},
    runtime::Operations,
};
use tonic::{Code, Status};

use super::{MIB, Rig, Volume};

async fn stats(rig: &impl Rig, volume: &Volume) -> proto::NodeGetVolumeStatsResponse {
    let service = NodeService::new(rig.node().clone(), Operations::default());
    let request = proto::NodeGetVolumeStatsRequest {
        volume_id: volume.handle.clone(),
        volume_path: volume.staging.to_string(),
        ..proto::NodeGetVolumeStatsRequest::default()
    };
    let answer = service.node_get_volume_stats(tonic::Request::new(request)).await;
    answer.expect("a volume in trouble is reported, not failed").into_inner()
}

async fn condition(rig: &impl Rig, volume: &Volume) -> (bool, String) {
    let condition = stats(rig, volume).await.volume_condition.expect("the driver says that it knows");
    (condition.abnormal, condition.message)
}

/// Nobody gets a volume that does not work, and unstaging it is the way out.
async fn is_refused(rig: &impl Rig, volume: &Volume, fs: &str) {
    let target = rig.path("pods/new/mount");
    let published = rig.node().publish(&volume.publish(&target)).await.expect_err("it is refused");
    assert!(matches!(published, PublishError::Trouble(_)), "{published:?}");
    let status = Status::from(published);
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("delete the pods"), "{status}");
    assert!(!rig.exists(&target));
    let staged = rig.node().stage(&volume.stage(fs)).await;
    assert!(matches!(staged, Err(StageError::Trouble { .. })), "{staged:?}");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.mounts().is_empty() && rig.kernel_disks().is_empty());
}

pub(crate) async fn an_xfs_that_has_shut_itself_down_is_reported_and_refused<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage("xfs")).await.expect("it is staged");
    rig.write(&volume.staging, "mine").expect("it takes writes");
    rig.sync();
    assert_eq!(condition(&rig, &volume).await, (false, "nothing is wrong".to_owned()));
    assert_eq!(stats(&rig, &volume).await.usage.len(), 2);

    rig.fail_filesystem(&volume, "xfs");
    let (abnormal, message) = condition(&rig, &volume).await;
    assert!(abnormal && message.contains("has shut itself down"), "{message}");
    is_refused(&rig, &volume, "xfs").await;
    rig.node().stage(&volume.stage("xfs")).await.expect("its log is replayed");
    assert_eq!(rig.read(&volume.staging).expect("the data"), "mine");
    assert!(!condition(&rig, &volume).await.0);
}

pub(crate) async fn an_ext4_that_went_read_only_is_reported_and_refused_and_checked_when_it_is_staged_again<
    R: Rig,
>() {
    let rig = R::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    rig.mkfs(&volume, "ext4");
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    assert!(!condition(&rig, &volume).await.0);

    rig.fail_filesystem(&volume, "ext4");
    let (abnormal, message) = condition(&rig, &volume).await;
    assert!(abnormal && message.contains("went read-only after an error"), "{message}");
    is_refused(&rig, &volume, "ext4").await;
    rig.node().stage(&volume.stage("ext4")).await.expect("e2fsck takes the mark of the error off");
    rig.write(&volume.staging, "mine").expect("it takes writes again");
    assert!(!condition(&rig, &volume).await.0);
}

pub(crate) async fn a_read_only_target_of_a_sound_volume_is_no_trouble<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let target = rig.path("pods/1/mount");
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    let publish = Publish { readonly: true, ..volume.publish(&target) };
    rig.node().publish(&publish).await.expect("it is published");
    assert_eq!(rig.node().condition(&target).await.expect("it is known"), None);
}

pub(crate) async fn a_disk_that_is_gone_or_given_up_is_reported<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.set_state(&volume, "offline");
    let (abnormal, message) = condition(&rig, &volume).await;
    assert!(abnormal && message.contains("`offline`"), "{message}");
    rig.set_state(&volume, "running");
    assert!(!condition(&rig, &volume).await.0);
    rig.detach(&volume);
    let trouble = rig.node().condition(&volume.staging).await.expect("it is known");
    assert_eq!(trouble, Some(Trouble::Gone));
    assert!(condition(&rig, &volume).await.0);

    let raw = rig.attach("pvc-2", 2, 64 * MIB);
    let target = rig.path("pods/2/volume");
    rig.node().stage(&raw.stage_block()).await.expect("it is staged");
    let publish = raw.publish_block(&target);
    rig.node().publish(&publish).await.expect("it is published");
    assert_eq!(rig.node().condition(&target).await.expect("it is known"), None);
    rig.detach(&raw);
    assert_eq!(rig.node().condition(&target).await.expect("it is known"), Some(Trouble::Gone));
}

pub(crate) async fn the_capability_and_the_answers_agree<R: Rig>() {
    let rig = R::new().await;
    let service = NodeService::new(rig.node().clone(), Operations::default());
    let request = tonic::Request::new(proto::NodeGetCapabilitiesRequest {});
    let capabilities = service.node_get_capabilities(request).await.expect("it answers").into_inner();
    let rpc = capability::Rpc { r#type: capability::rpc::Type::VolumeCondition.into() };
    let says = capabilities.capabilities.iter().any(|one| one.r#type == Some(capability::Type::Rpc(rpc)));
    assert!(says, "every answer has a condition");
}

pub(crate) async fn an_ext4_is_repaired_before_it_is_mounted_where_that_needs_no_answer<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    rig.mkfs(&volume, "ext4");
    rig.damage(&volume, "ext4", false, true);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.is_clean(&volume));
}

pub(crate) async fn a_damaged_file_system_is_not_mounted_and_the_reason_is_told<R: Rig>() {
    let rig = R::new().await;
    let ext4 = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    rig.mkfs(&ext4, "ext4");
    rig.damage(&ext4, "ext4", true, false);
    let unseen = rig.node().stage(&ext4.stage("ext4")).await.expect_err("e2fsck takes the word of its mark");
    assert!(matches!(unseen, StageError::Mount(MountError::Damaged { .. })), "{unseen:?}");
    rig.damage(&ext4, "ext4", true, true);
    let damaged = rig.node().stage(&ext4.stage("ext4")).await.expect_err("it is damaged");
    assert!(matches!(damaged, StageError::Check(CheckError::Damaged { .. })), "{damaged:?}");
    let status = Status::from(damaged);
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("e2fsck -n") && status.message().contains("oot"), "{status}");
    let xfs = rig.attach_unseen("pvc-2", 2, 512 * MIB);
    rig.mkfs(&xfs, "xfs");
    rig.damage(&xfs, "xfs", true, false);
    let status = Status::from(rig.node().stage(&xfs.stage("xfs")).await.expect_err("it is damaged"));
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("xfs_repair -n"), "{status}");
    assert!(rig.mounts().is_empty());
}

pub(crate) async fn a_log_that_waits_on_a_disk_that_takes_no_writes_is_told_and_not_passed_over<R: Rig>() {
    let rig = R::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let name = format!("pvc-{lun}");
        let volume = rig.attach(&name, lun, 512 * MIB);
        rig.node().stage(&volume.stage(fs)).await.expect("it is staged");
        rig.write(&volume.staging, "mine").expect("it takes writes");
        rig.sync();
        // A copy of the disk as a power loss leaves it.
        let copy = rig.copy(&volume);
        rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
        rig.detach(&volume);
        rig.put_back(&volume, copy);
        let dirty = rig.attach(&name, lun, 512 * MIB);
        rig.write_protect(&dirty);
        let status =
            Status::from(rig.node().stage(&dirty.stage(fs)).await.expect_err("it can not be replayed"));
        assert_eq!(status.code(), Code::FailedPrecondition, "{fs}: {status}");
        assert!(status.message().contains("ReadWriteOnce"), "{fs}: {status}");
    }
    assert!(rig.mounts().is_empty());
}
