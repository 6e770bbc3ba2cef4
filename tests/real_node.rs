//! The node over real disks: loop devices, mkfs, mounts and data of this machine's kernel.
//!
//! Needs root and a mount namespace of its own; run it with
//! `unshare --mount --propagation private cargo test --test real_node`.

#[path = "real_node/encrypted.rs"]
mod encrypted;
#[path = "real_node/faults.rs"]
mod faults;
#[path = "real_node/growth.rs"]
mod growth;
#[path = "real_node/health.rs"]
mod health;
#[path = "real_node/kinds.rs"]
mod kinds;
#[path = "real_node/rig.rs"]
mod rig;
#[path = "real_node/sharing.rs"]
mod sharing;

use std::{
    fs,
    os::unix::fs::{FileExt as _, FileTypeExt as _},
    time::Duration,
};

use growth::{expand, size_of};
use proxmox_csi::{
    csi::{
        node::NodeService,
        proto::{self, node_server::Node as _},
    },
    host::error::OpenError,
    node::{Access, FindError, PublishError, StageError, Stats, UnstageError},
    runtime::Operations,
    types::{Bytes, ScsiSlot, publish::Contents},
};
use rig::{MIB, Rig, Volume, mounts_below, run};

#[tokio::test(flavor = "multi_thread")]
async fn p3_a_volume_is_found_by_what_the_device_answers() {
    let rig = Rig::new().await;
    let other = rig.attach("pvc-1", 1, 64 * MIB);
    let volume = rig.attach("pvc-2", 2, 64 * MIB);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is found");
    fs::write(volume.staged_file("data"), "mine").expect("it is mounted");
    let blkid = |volume: &Volume| {
        std::process::Command::new("blkid").arg("-p").arg(&volume.image).output().expect("blkid runs")
    };
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    assert_eq!(blkid(&volume).status.code(), Some(0));
    assert_eq!(blkid(&other).status.code(), Some(2), "the other disk is untouched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_the_kernel_never_heard_of_is_found_by_a_scan_of_its_lun() {
    let rig = Rig::new().await;
    let other = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    let volume = rig.attach_unseen("pvc-2", 2, 64 * MIB);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is found");
    assert_eq!(rig.kernel_disks().len(), 1, "only its LUN was scanned");
    rig.detach(&other);
    let missing = rig.node.stage(&other.stage("ext4")).await;
    assert!(matches!(missing, Err(StageError::Find(FindError::Absent { .. }))), "{missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_two_disks_with_one_wwn_are_refused() {
    let rig = Rig::new().await;
    let twin = rig.attach("pvc-1", 1, 64 * MIB);
    let volume = rig.attach("pvc-2", 2, 64 * MIB);
    rig.rename(&twin, volume.published.wwn);
    let staged = rig.node.stage(&volume.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Find(FindError::Several { .. }))), "{staged:?}");
    assert!(mounts_below(&rig.root).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_a_disk_of_another_size_is_refused() {
    let rig = Rig::new().await;
    let mut volume = rig.attach("pvc-1", 1, 64 * MIB);
    volume.published.size = Some(Bytes::new(65 * MIB));
    let staged = rig.node.stage(&volume.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Find(FindError::TooSmall { .. }))), "{staged:?}");

    // The tree says another size than the device has.
    volume.published.size = None;
    fs::write(rig.root.join("sys/block/sda/size"), "4096\n").expect("a file");
    let staged = rig.node.stage(&volume.stage("ext4")).await;
    let size = matches!(staged, Err(StageError::Find(FindError::Open(OpenError::Size { .. }))));
    assert!(size, "{staged:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_a_node_that_is_another_device_is_refused() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let _other = rig.attach("pvc-2", 2, 64 * MIB);
    fs::rename(rig.root.join("dev/sdb"), rig.root.join("dev/sda")).expect("a swap");
    let staged = rig.node.stage(&volume.stage("ext4")).await;
    let number = matches!(staged, Err(StageError::Find(FindError::Open(OpenError::Number { .. }))));
    assert!(number, "{staged:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_a_disk_of_the_driver_before_is_accepted_at_its_lun_only() {
    let rig = Rig::new().await;
    let mut volume = rig.attach("pvc-1", 3, 64 * MIB);
    volume.published.wwn = "0x5056432d49443033".parse().expect("a name");
    volume.published.contents = Contents::Unknown;
    volume.published.size = None;
    rig.rename(&volume, volume.published.wwn);
    run("mkfs.ext4", &["-q", volume.image.to_str().expect("UTF-8")]);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is mounted");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.kernel_disks().is_empty());
    volume.published.slot = ScsiSlot::new(3);
    rig.node.stage(&volume.stage("ext4")).await.expect("a scan brings it back");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");

    let _back = rig.node.stage(&volume.stage("ext4")).await;
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    let mut moved = volume.clone();
    moved.published.slot = ScsiSlot::new(4);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is back");
    let staged = rig.node.stage(&moved.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Find(FindError::OtherSlot { .. }))), "{staged:?}");
}

/// Puts something on the image at a path.
type Write = Box<dyn Fn(&str)>;

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_disk_that_holds_data_is_never_formatted() {
    let rig = Rig::new().await;
    let size = 256 * MIB;
    let bytes = |offset: u64, bytes: &'static [u8]| {
        move |path: &str| {
            let file = fs::File::options().write(true).open(path).expect("the image");
            file.write_all_at(bytes, offset).expect("it can be written");
        }
    };
    let partition = b"\x00\x02\x03\x00\x83\x10\x10\x10\x00\x08\x00\x00\x00\x40\x00\x00";
    let cases: Vec<(&str, Write)> = vec![
        ("xfs or ext4 asked, btrfs there", Box::new(bytes(65536 + 64, b"_BHRfS_M"))),
        ("swap", Box::new(|path| drop(run("mkswap", &[path])))),
        ("a LUKS header", Box::new(bytes(0, b"LUKS\xba\xbe\x00\x02"))),
        (
            "a partition table",
            Box::new(move |path| {
                bytes(446, partition)(path);
                bytes(510, b"\x55\xaa")(path);
            }),
        ),
        ("a byte in the head", Box::new(bytes(5 * MIB + 1, b"x"))),
        ("a backup superblock of ext4", Box::new(bytes(128 * MIB + 56, b"\x53\xef"))),
        ("a byte in the tail", Box::new(bytes(size - 1, b"x"))),
    ];
    for (index, (what, write)) in cases.iter().enumerate() {
        let name = format!("pvc-{index}");
        let volume = rig.attach_unseen(&name, 1, size);
        let image = volume.image.to_str().expect("UTF-8");
        write(image);
        let copy = format!("{image}.copy");
        run("cp", &["--sparse=always", image, &copy]);
        for fs in ["ext4", "xfs"] {
            let staged = rig.node.stage(&volume.stage(fs)).await;
            let refused = matches!(staged, Err(StageError::Refused { .. } | StageError::Format(_)));
            assert!(refused, "{what}, {fs}: {staged:?}");
        }
        run("cmp", &[image, &copy]);
        assert!(mounts_below(&rig.root).is_empty(), "{what}");
        rig.detach(&volume);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_another_file_system_is_neither_mounted_nor_formatted_over() {
    let rig = Rig::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    run("mkfs.ext4", &["-q", volume.image.to_str().expect("UTF-8")]);
    let staged = rig.node.stage(&volume.stage("xfs")).await.expect_err("it is ext4");
    assert!(std::error::Error::source(&staged).expect("why").to_string().contains("`ext4`"));
    rig.node.stage(&volume.stage("ext4")).await.expect("what is there is mounted");
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_volume_that_was_not_allocated_blank_is_never_formatted() {
    let rig = Rig::new().await;
    for contents in [Contents::Unwiped, Contents::Unknown] {
        let mut volume = rig.attach("pvc-1", 1, 64 * MIB);
        volume.published.contents = contents;
        let staged = rig.node.stage(&volume.stage("ext4")).await;
        assert!(matches!(staged, Err(StageError::Refused { .. })), "{staged:?}");
        rig.detach(&volume);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_an_unreadable_disk_is_never_formatted() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 256 * MIB);
    // A loop device whose file ends early answers with EIO behind that end.
    volume.resize(128 * MIB - 4096);
    let staged = rig.node.stage(&volume.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Format(_) | StageError::Probe(_))), "{staged:?}");
    let image = fs::read(&volume.image).expect("the image");
    assert!(image.iter().all(|byte| *byte == 0), "nothing was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn stage_is_idempotent() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node.stage(&volume.stage("xfs")).await.expect("it is staged");
    fs::write(volume.staged_file("data"), "mine").expect("it is mounted");
    for _ in 0..3 {
        rig.node.stage(&volume.stage("xfs")).await.expect("it is staged already");
    }
    assert_eq!(mounts_below(&rig.root).len(), 1);
    assert_eq!(fs::read_to_string(volume.staged_file("data")).expect("the data"), "mine");
    let differs = rig.node.stage(&volume.stage("ext4")).await;
    assert!(matches!(differs, Err(StageError::Differs { .. })), "{differs:?}");
    let mut other = rig.attach("pvc-2", 2, 64 * MIB);
    other.staging = volume.staging.clone();
    let occupied = rig.node.stage(&other.stage("ext4")).await;
    assert!(matches!(occupied, Err(StageError::Occupied { .. })), "{occupied:?}");
    let foreign = rig.node.unstage(&other.unstage()).await;
    assert!(matches!(foreign, Err(UnstageError::OtherVolume { .. })), "{foreign:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn p8_data_survives_unstage_and_stage_without_a_detach() {
    let rig = Rig::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node.stage(&volume.stage(fs)).await.expect("it is staged");
        fs::write(volume.staged_file("data"), "mine").expect("it is mounted");
        rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
        assert!(rig.kernel_disks().is_empty(), "the kernel let go");
        rig.node.stage(&volume.stage(fs)).await.expect("it is found again");
        assert_eq!(fs::read_to_string(volume.staged_file("data")).expect("the data"), "mine");
        rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p8_unstage_leaves_nothing_behind() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let target = rig.path("pods/1/mount");
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.node.publish(&volume.publish(&target)).await.expect("it is published");
    let used = rig.node.unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "{used:?}");
    assert_eq!(mounts_below(&rig.root).len(), 2, "a pod's volume is never taken away");

    rig.node.unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    assert!(!target.as_path().exists());
    for _ in 0..3 {
        rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
        rig.node.unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    }
    assert!(mounts_below(&rig.root).is_empty());
    assert!(rig.kernel_disks().is_empty());
    assert_eq!(fs::read_dir(volume.staging.as_path()).expect("the kubelet's directory").count(), 0);
    let loops = run("losetup", &["--associated", volume.image.to_str().expect("UTF-8")]);
    assert_eq!(loops, "", "nothing in the kernel holds the disk");
}

#[tokio::test(flavor = "multi_thread")]
async fn p8_a_disk_that_something_else_holds_is_not_taken_out() {
    let rig = Rig::alone().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    // A process in another mount namespace keeps the file system mounted.
    let mut holder = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sleep", "60"])
        .spawn()
        .expect("unshare runs");
    let namespace = || fs::read_link(format!("/proc/{}/ns/mnt", holder.id())).ok();
    let ours = fs::read_link("/proc/self/ns/mnt").ok();
    while namespace() == ours {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let held = rig.node.unstage(&volume.unstage()).await;
    holder.kill().expect("it can be killed");
    holder.wait().expect("and reaped");
    let error = held.expect_err("the disk is held").to_string();
    assert!(error.contains("mounted in the namespace of process"), "{error}");
    rig.node.unstage(&volume.unstage()).await.expect("now it goes");
    assert!(rig.kernel_disks().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn p8_a_late_unstage_accepts_a_missing_disk() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.detach(&volume);
    rig.node.unstage(&volume.unstage()).await.expect("there is nothing to lose");
    assert!(mounts_below(&rig.root).is_empty());
    rig.node.unstage(&volume.unstage()).await.expect("nor now");
}

#[tokio::test(flavor = "multi_thread")]
async fn p6_a_dropped_stage_call_runs_to_its_end() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    let operations = Operations::default();
    let service = NodeService::new(rig.node.clone(), operations.clone());
    let request = stage_request(&volume, "xfs");
    let call = service.node_stage_volume(tonic::Request::new(request.clone()));
    tokio::time::timeout(Duration::from_millis(1), call).await.expect_err("the caller gives up");
    assert!(mounts_below(&rig.root).is_empty());
    let mut other = request.clone();
    other.volume_capability = stage_request(&volume, "ext4").volume_capability;
    let busy = service.node_stage_volume(tonic::Request::new(other)).await.expect_err("it is busy");
    assert_eq!(busy.code(), tonic::Code::Aborted);
    service.node_stage_volume(tonic::Request::new(request)).await.expect("the retry joins");
    assert!(operations.drain(Duration::from_secs(30)).await);
    fs::write(volume.staged_file("data"), "mine").expect("it is mounted");
}

fn stage_request(volume: &Volume, fs: &str) -> proto::NodeStageVolumeRequest {
    use proto::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
    let mount = MountVolume { fs_type: fs.to_owned(), ..MountVolume::default() };
    proto::NodeStageVolumeRequest {
        volume_id: volume.handle.clone(),
        publish_context: volume.published.to_context(),
        staging_target_path: volume.staging.to_string(),
        volume_capability: Some(proto::VolumeCapability {
            access_type: Some(AccessType::Mount(mount)),
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        }),
        ..proto::NodeStageVolumeRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_block_volume_is_the_disk_itself() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let target = rig.path("pods/1/volume");
    rig.node.stage(&volume.stage_block()).await.expect("it is staged");
    let publish = proxmox_csi::node::Publish { access: Access::Block, ..volume.publish(&target) };
    for _ in 0..2 {
        rig.node.publish(&publish).await.expect("it is published");
    }
    assert!(fs::metadata(target.as_path()).expect("it is there").file_type().is_block_device());
    assert_eq!(rig.node.stats(&target).await.expect("it is there"), Stats::Block(Bytes::new(64 * MIB)));
    let file = fs::File::options().write(true).open(target.as_path()).expect("it opens");
    file.write_all_at(b"raw", 4096).expect("it takes writes");
    drop(file);
    volume.resize(128 * MIB);
    let size = rig.node.expand(&expand(&volume, &target, 128 * MIB)).await.expect("it has grown");
    assert_eq!(size, Bytes::new(128 * MIB));

    let readonly = proxmox_csi::node::Publish { readonly: true, ..publish.clone() };
    let refused = rig.node.publish(&readonly).await;
    assert!(matches!(refused, Err(PublishError::ReadonlyBlock)), "{refused:?}");
    let used = rig.node.unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "{used:?}");
    rig.node.unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    assert!(!target.as_path().exists());
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.kernel_disks().is_empty(), "the handle tells which disk it was");
    let mut bytes = [0; 3];
    let image = fs::File::open(&volume.image).expect("the image");
    image.read_exact_at(&mut bytes, 4096).expect("it can be read");
    assert_eq!(&bytes, b"raw");
}

#[tokio::test(flavor = "multi_thread")]
async fn readonly_publish_is_read_only() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    let (writable, readonly) = (rig.path("pods/1/mount"), rig.path("pods/2/mount"));
    rig.node.publish(&volume.publish(&writable)).await.expect("it is published");
    let publish = proxmox_csi::node::Publish { readonly: true, ..volume.publish(&readonly) };
    for _ in 0..2 {
        rig.node.publish(&publish).await.expect("it is published");
    }
    fs::write(writable.as_path().join("data"), "mine").expect("this one takes writes");
    assert_eq!(fs::read_to_string(readonly.as_path().join("data")).expect("it reads"), "mine");
    let refused = fs::write(readonly.as_path().join("data"), "other").expect_err("this one does not");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let differs = rig.node.publish(&volume.publish(&readonly)).await;
    assert!(matches!(differs, Err(PublishError::Differs { .. })), "{differs:?}");
    let third = rig.path("pods/3/mount");
    rig.node.publish(&volume.publish(&third)).await.expect("the node may have several targets");
    assert_eq!(fs::read_to_string(third.as_path().join("data")).expect("it reads"), "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_staged_is_not_published() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let other = rig.attach("pvc-2", 2, 64 * MIB);
    let target = rig.path("pods/1/mount");
    let missing = rig.node.publish(&volume.publish(&target)).await;
    assert!(matches!(missing, Err(PublishError::NotStaged(_))), "{missing:?}");
    rig.node.stage(&other.stage("ext4")).await.expect("it is staged");
    let publish = proxmox_csi::node::Publish { staging: other.staging.clone(), ..volume.publish(&target) };
    let wrong = rig.node.publish(&publish).await;
    assert!(matches!(wrong, Err(PublishError::OtherStaged { .. })), "{wrong:?}");
    assert!(!target.as_path().exists());
    assert!(rig.node.stats(&target).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_pulled_while_mounted_is_staged_again() {
    let rig = Rig::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node.stage(&volume.stage(fs)).await.expect("it is staged");
        fs::write(volume.staged_file("data"), "mine").expect("it is mounted");
        run("sync", &[]);
        rig.detach(&volume);
        let back = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node.stage(&back.stage(fs)).await.expect("the dead mount gives way");
        assert_eq!(fs::read_to_string(back.staged_file("data")).expect("the data"), "mine");
        assert_eq!(mounts_below(back.staging.as_path()).len(), 1);
        rig.node.unstage(&back.unstage()).await.expect("it is unstaged");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_may_lead_through_links() {
    let rig = Rig::new().await;
    let mut volume = rig.attach("pvc-1", 1, 64 * MIB);
    fs::create_dir(rig.root.join("data")).expect("a directory");
    std::os::unix::fs::symlink(rig.root.join("data"), rig.root.join("kubelet")).expect("a link");
    volume.staging = rig.path("kubelet/globalmount");
    let target = rig.path("kubelet/pods/1/mount");
    for _ in 0..2 {
        rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
        rig.node.publish(&volume.publish(&target)).await.expect("it is published");
    }
    assert_eq!(mounts_below(&rig.root).len(), 2);
    size_of(&rig, &target).await;
    rig.node.unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(mounts_below(&rig.root).is_empty() && rig.kernel_disks().is_empty());
}
