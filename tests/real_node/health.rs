//! File systems that are damaged, or stop to work while they are mounted.

use std::fs;

use proxmox_csi::{
    csi::{
        node::NodeService,
        proto::{self, node_server::Node as _, node_service_capability as capability},
    },
    host::error::{CheckError, MountError},
    node::{PublishError, StageError, Trouble},
    runtime::Operations,
};
use tonic::{Code, Status};

use crate::rig::{MIB, Rig, Volume, mounts_below, run};

async fn stats(rig: &Rig, volume: &Volume) -> proto::NodeGetVolumeStatsResponse {
    let service = NodeService::new(rig.node.clone(), Operations::default());
    let request = proto::NodeGetVolumeStatsRequest {
        volume_id: volume.handle.clone(),
        volume_path: volume.staging.to_string(),
        ..proto::NodeGetVolumeStatsRequest::default()
    };
    let answer = service.node_get_volume_stats(tonic::Request::new(request)).await;
    answer.expect("a volume in trouble is reported, not failed").into_inner()
}

async fn condition(rig: &Rig, volume: &Volume) -> (bool, String) {
    let condition = stats(rig, volume).await.volume_condition.expect("the driver says that it knows");
    (condition.abnormal, condition.message)
}

/// Nobody gets a volume that does not work, and unstaging it is the way out.
async fn is_refused(rig: &Rig, volume: &Volume, fs: &str) {
    let target = rig.path("pods/new/mount");
    let published = rig.node.publish(&volume.publish(&target)).await.expect_err("it is refused");
    assert!(matches!(published, PublishError::Trouble(_)), "{published:?}");
    let status = Status::from(published);
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("delete the pods"), "{status}");
    assert!(!target.as_path().exists());
    let staged = rig.node.stage(&volume.stage(fs)).await;
    assert!(matches!(staged, Err(StageError::Trouble { .. })), "{staged:?}");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(mounts_below(&rig.root).is_empty() && rig.kernel_disks().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_xfs_that_has_shut_itself_down_is_reported_and_refused() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node.stage(&volume.stage("xfs")).await.expect("it is staged");
    fs::write(volume.staged_file("data"), "mine").expect("it takes writes");
    run("sync", &[]);
    assert_eq!(condition(&rig, &volume).await, (false, "nothing is wrong".to_owned()));
    assert_eq!(stats(&rig, &volume).await.usage.len(), 2);

    run("xfs_io", &["-x", "-c", "shutdown", &volume.staging.to_string()]);
    let (abnormal, message) = condition(&rig, &volume).await;
    assert!(abnormal && message.contains("has shut itself down"), "{message}");
    is_refused(&rig, &volume, "xfs").await;
    rig.node.stage(&volume.stage("xfs")).await.expect("its log is replayed");
    assert_eq!(fs::read_to_string(volume.staged_file("data")).expect("the data"), "mine");
    assert!(!condition(&rig, &volume).await.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ext4_that_went_read_only_is_reported_and_refused_and_checked_when_it_is_staged_again() {
    let rig = Rig::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    run("mkfs.ext4", &["-q", "-e", "remount-ro", volume.image.to_str().expect("UTF-8")]);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    assert!(!condition(&rig, &volume).await.0);

    let device = rig.device(&volume);
    let name = device.file_name().expect("a name").to_str().expect("UTF-8");
    fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "on purpose").expect("the kernel has it");
    let (abnormal, message) = condition(&rig, &volume).await;
    assert!(abnormal && message.contains("went read-only after an error"), "{message}");
    is_refused(&rig, &volume, "ext4").await;
    rig.node.stage(&volume.stage("ext4")).await.expect("e2fsck takes the mark of the error off");
    fs::write(volume.staged_file("data"), "mine").expect("it takes writes again");
    assert!(!condition(&rig, &volume).await.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_target_of_a_sound_volume_is_no_trouble() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let target = rig.path("pods/1/mount");
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    let publish = proxmox_csi::node::Publish { readonly: true, ..volume.publish(&target) };
    rig.node.publish(&publish).await.expect("it is published");
    assert_eq!(rig.node.condition(&target).await.expect("it is known"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_gone_or_given_up_is_reported() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.set_state(1, "offline");
    let (abnormal, message) = condition(&rig, &volume).await;
    assert!(abnormal && message.contains("`offline`"), "{message}");
    rig.set_state(1, "running");
    assert!(!condition(&rig, &volume).await.0);
    rig.detach(&volume);
    let trouble = rig.node.condition(&volume.staging).await.expect("it is known");
    assert_eq!(trouble, Some(Trouble::Gone));
    assert!(condition(&rig, &volume).await.0);

    let raw = rig.attach("pvc-2", 2, 64 * MIB);
    let target = rig.path("pods/2/volume");
    rig.node.stage(&raw.stage_block()).await.expect("it is staged");
    let publish =
        proxmox_csi::node::Publish { access: proxmox_csi::node::Access::Block, ..raw.publish(&target) };
    rig.node.publish(&publish).await.expect("it is published");
    assert_eq!(rig.node.condition(&target).await.expect("it is known"), None);
    rig.detach(&raw);
    assert_eq!(rig.node.condition(&target).await.expect("it is known"), Some(Trouble::Gone));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_capability_and_the_answers_agree() {
    let rig = Rig::new().await;
    let service = NodeService::new(rig.node.clone(), Operations::default());
    let request = tonic::Request::new(proto::NodeGetCapabilitiesRequest {});
    let capabilities = service.node_get_capabilities(request).await.expect("it answers").into_inner();
    let rpc = capability::Rpc { r#type: capability::rpc::Type::VolumeCondition.into() };
    let says = capabilities.capabilities.iter().any(|one| one.r#type == Some(capability::Type::Rpc(rpc)));
    assert!(says, "every answer has a condition");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ext4_is_repaired_before_it_is_mounted_where_that_needs_no_answer() {
    let rig = Rig::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    let image = volume.image.to_str().expect("UTF-8");
    run("mkfs.ext4", &["-q", image]);
    // Free blocks that are miscounted, and the mark of an error.
    run("debugfs", &["-w", "-R", "set_super_value free_blocks_count 7", image]);
    run("debugfs", &["-w", "-R", "set_super_value state 2", image]);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    let state = run("dumpe2fs", &["-h", image]);
    assert!(state.contains("Filesystem state:         clean\n"), "{state}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_system_is_not_mounted_and_the_reason_is_told() {
    let rig = Rig::new().await;
    let ext4 = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    let image = ext4.image.to_str().expect("UTF-8");
    run("mkfs.ext4", &["-q", image]);
    // The root directory is gone, which takes a person's answer.
    run("debugfs", &["-w", "-R", "clri <2>", image]);
    let unseen = rig.node.stage(&ext4.stage("ext4")).await.expect_err("e2fsck takes the word of its mark");
    assert!(matches!(unseen, StageError::Mount(MountError::Damaged { .. })), "{unseen:?}");
    run("debugfs", &["-w", "-R", "set_super_value state 2", image]);
    let damaged = rig.node.stage(&ext4.stage("ext4")).await.expect_err("it is damaged");
    assert!(matches!(damaged, StageError::Check(CheckError::Damaged { .. })), "{damaged:?}");
    let status = Status::from(damaged);
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("e2fsck -n") && status.message().contains("oot"), "{status}");
    let xfs = rig.attach_unseen("pvc-2", 2, 512 * MIB);
    let image = xfs.image.to_str().expect("UTF-8");
    run("mkfs.xfs", &["-q", image]);
    // Of the root inode the kernel reads a checksum that is wrong.
    let root = run("xfs_db", &["-r", "-c", "sb 0", "-c", "p rootino", image]);
    let inode = format!("inode {}", root.trim().rsplit(' ').next().expect("a number"));
    run("xfs_db", &["-x", "-c", &inode, "-c", "write -c core.magic 0", image]);
    let status = Status::from(rig.node.stage(&xfs.stage("xfs")).await.expect_err("it is damaged"));
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("xfs_repair -n"), "{status}");
    assert!(mounts_below(&rig.root).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_waits_on_a_disk_that_takes_no_writes_is_told_and_not_passed_over() {
    let rig = Rig::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let name = format!("pvc-{lun}");
        let volume = rig.attach(&name, lun, 512 * MIB);
        rig.node.stage(&volume.stage(fs)).await.expect("it is staged");
        fs::write(volume.staged_file("data"), "mine").expect("it takes writes");
        run("sync", &[]);
        // A copy of the disk as a power loss leaves it.
        let copy = format!("{}.copy", volume.image.display());
        run("cp", &["--sparse=always", volume.image.to_str().expect("UTF-8"), &copy]);
        rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
        rig.detach(&volume);
        fs::rename(&copy, &volume.image).expect("a file");
        let dirty = rig.attach(&name, lun, 512 * MIB);
        rig.write_protect(&dirty);
        let status =
            Status::from(rig.node.stage(&dirty.stage(fs)).await.expect_err("it can not be replayed"));
        assert_eq!(status.code(), Code::FailedPrecondition, "{fs}: {status}");
        assert!(status.message().contains("ReadWriteOnce"), "{fs}: {status}");
    }
    assert!(mounts_below(&rig.root).is_empty());
}
