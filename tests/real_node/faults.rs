//! Disks and mounts that are not as they should be.

use std::{fs, os::unix::fs::FileExt as _, time::Duration};

use proxmox_csi::{
    csi::{
        node::NodeService,
        proto::{self, node_server::Node as _},
    },
    host::{
        DeviceNumber, Host as _,
        error::{FormatError, MountError, ReleaseError},
        linux::{LinuxHost, LinuxOptions},
    },
    node::{FindError, StageError, UnstageError},
    runtime::Operations,
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

#[tokio::test(flavor = "multi_thread")]
async fn p4_an_xfs_whose_mkfs_was_cut_off_is_named_and_left_alone() {
    let rig = Rig::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 512 * MIB);
    run("mkfs.xfs", &["-q", volume.image.to_str().expect("UTF-8")]);
    let image = fs::File::options().write(true).open(&volume.image).expect("the image");
    image.write_all_at(&[1], 126).expect("it can be written");
    let refused = rig.node.stage(&volume.stage("xfs")).await.expect_err("it is not whole");
    let status = Status::from(refused);
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("was cut off"), "{status}");
    assert!(mounts_below(&rig.root).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_xfs_that_an_older_kernel_could_not_mount_is_not_made() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    let page = u32::try_from(rustix::param::page_size()).expect("a page is small");
    let mut stage = volume.stage("xfs");
    stage.options.block_size = Some(2 * page);
    let status = Status::from(rig.node.stage(&stage).await.expect_err("its blocks are too large"));
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("Linux before 6.12"), "{status}");
    let blank =
        std::process::Command::new("blkid").arg("-p").arg(&volume.image).output().expect("blkid runs");
    assert_eq!(blank.status.code(), Some(2), "nothing was written");
    stage.options.block_size = Some(page);
    rig.node.stage(&stage).await.expect("it is staged");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_no_writes_is_mounted_read_only() {
    let rig = Rig::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let name = format!("pvc-{lun}");
        let made = rig.attach_unseen(&name, lun, 512 * MIB);
        run(&format!("mkfs.{fs}"), &["-q", made.image.to_str().expect("UTF-8")]);
        rig.detach(&made);
        let volume = rig.attach(&name, lun, 512 * MIB);
        rig.write_protect(&volume);
        for _ in 0..2 {
            rig.node.stage(&volume.stage(fs)).await.expect("it is staged");
        }
        let target = rig.path(&format!("pods/{lun}/mount"));
        rig.node.publish(&volume.publish(&target)).await.expect("it is published");
        let refused = fs::write(target.as_path().join("data"), "mine").expect_err("it takes no writes");
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        rig.node.unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
        rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    }
    assert!(mounts_below(&rig.root).is_empty());
    assert!(rig.kernel_disks().is_empty());

    let blank = rig.attach("pvc-3", 3, 64 * MIB);
    rig.write_protect(&blank);
    let refused = Status::from(rig.node.stage(&blank.stage("ext4")).await.expect_err("it is blank"));
    assert!(refused.message().contains("it is used read-only"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_an_attachment_of_another_volume_is_refused() {
    let rig = Rig::new().await;
    let mut volume = rig.attach("pvc-1", 1, 64 * MIB);
    let other = rig.attach("pvc-2", 2, 64 * MIB);
    volume.published = other.published.clone();
    let mixed = rig.node.stage(&volume.stage("ext4")).await;
    assert!(matches!(mixed, Err(StageError::Find(FindError::OtherVolume { .. }))), "{mixed:?}");
    let image = fs::read(&other.image).expect("the image");
    assert!(image.iter().all(|byte| *byte == 0), "nothing was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn p6_both_handle_forms_of_a_volume_exclude_each_other() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    let operations = Operations::default();
    let service = NodeService::new(rig.node.clone(), operations.clone());
    let request = crate::stage_request(&volume, "xfs");
    let call = service.node_stage_volume(tonic::Request::new(request.clone()));
    tokio::time::timeout(Duration::from_millis(1), call).await.expect_err("the caller gives up");
    let zoned = volume.handle.replacen("//", "/pve-1/", 1);
    let other = proto::NodeStageVolumeRequest { volume_id: zoned, ..request };
    let busy = service.node_stage_volume(tonic::Request::new(other)).await.expect_err("it is one disk");
    assert_eq!(busy.code(), Code::Aborted);
    assert!(operations.drain(Duration::from_secs(30)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_the_proof_reads_the_disk_and_not_what_the_kernel_remembers() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let place = 5 * MIB + 1;
    // The kernel has read zeros and keeps them as long as somebody holds the disk; the disk is written to meanwhile.
    let holder = fs::File::open(rig.root.join("dev/sda")).expect("the disk opens");
    let mut byte = [1];
    holder.read_exact_at(&mut byte, place).expect("it reads");
    let image = fs::File::options().write(true).open(&volume.image).expect("the image");
    image.write_all_at(b"x", place).expect("it can be written");
    holder.read_exact_at(&mut byte, place).expect("it reads");
    assert_eq!(byte, [0], "the kernel does not know yet");
    let staged = rig.node.stage(&volume.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Format(FormatError::NotBlank { .. }))), "{staged:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_whose_node_comes_late_is_waited_for() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let (node, away) = (rig.root.join("dev/sda"), rig.root.join("sda"));
    fs::rename(&node, &away).expect("the tree is writable");
    let missing = rig.node.stage(&volume.stage("ext4")).await.expect_err("it has no node");
    assert!(missing.to_string().contains("is the host's `/dev` mounted"), "{missing}");
    let stage = volume.stage("ext4");
    let late = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        fs::rename(&away, &node).expect("the tree is writable");
    };
    let (staged, ()) = tokio::join!(rig.node.stage(&stage), late);
    staged.expect("it is found in the end");
}
