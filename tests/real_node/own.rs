//! What only loop devices show: what the kernel itself remembers of a disk, real tools, and a tree that says what no kernel in memory says.

use std::{fs, os::unix::fs::FileExt as _, sync::Arc, time::Duration};

use proxmox_csi::{
    csi::{
        node::NodeService,
        proto::{NodeGetInfoRequest, node_server::Node as _},
    },
    host::error::{FormatError, ReleaseError},
    node::{MountPath, Publish, StageError, UnstageError},
    runtime::Operations,
};
use tonic::{Code, Request};

use crate::{
    node_suite::{MIB, Rig as _},
    rig::{Loops, run},
};

#[tokio::test(flavor = "multi_thread")]
async fn p8_a_disk_that_something_is_made_of_is_not_taken_out() {
    let rig = Loops::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.set_state(&volume, "offline");
    let holders = rig.root.join("sys/block/sda/holders/dm-0");
    fs::create_dir_all(&holders).expect("the tree is writable");
    let held = rig.node().unstage(&volume.unstage()).await;
    assert!(matches!(held, Err(UnstageError::Release(ReleaseError::Held { .. }))), "{held:?}");
    fs::remove_dir(&holders).expect("the tree is writable");
    rig.node().unstage(&volume.unstage()).await.expect("it is let go");
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_a_device_that_is_no_disk_and_holds_a_file_system_stays_mounted() {
    let rig = Loops::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.make_directory(&volume.staging);
    let mapped = rig.attach("pvc-2", 2, 64 * MIB);
    rig.mkfs(&mapped, "ext4");
    let device = rig.mount_elsewhere(&mapped, &volume.staging);
    let number = rig.root.join("sys/dev/block").join(&device);
    fs::create_dir_all(&number).expect("the tree is writable");
    let foreign = rig.node().unstage(&volume.unstage()).await.expect_err("it is not the volume");
    assert!(matches!(foreign, UnstageError::OtherVolume { .. }) && foreign.to_string().contains(&device));
    assert_eq!(rig.mounts().len(), 1);
    fs::remove_dir(&number).expect("the tree is writable");
    rig.node().unstage(&volume.unstage()).await.expect("a dead mount goes");
    assert!(rig.mounts().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_the_proof_reads_the_disk_and_not_what_the_kernel_remembers() {
    let rig = Loops::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let place = 5 * MIB + 1;
    // The kernel has read zeros and keeps them as long as somebody holds the disk; the disk is written to meanwhile.
    let holder = fs::File::open(rig.root.join("dev/sda")).expect("the disk opens");
    let mut byte = [1];
    holder.read_exact_at(&mut byte, place).expect("it reads");
    rig.poke(&volume, place, b"x");
    holder.read_exact_at(&mut byte, place).expect("it reads");
    assert_eq!(byte, [0], "the kernel does not know yet");
    let staged = rig.node().stage(&volume.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Format(FormatError::NotBlank { .. }))), "{staged:?}");
}

/// An mkfs.xfs that is newer than any kernel: what it makes has a feature that no kernel knows, unless it is told to leave out one that
/// stands for it.
const NEWER: &str = r#"#!/bin/bash
PATH=/usr/sbin:/usr/bin:/sbin:/bin
echo "$*" >>@ROOT@/mkfs.xfs.log
[[ $* == -V ]] && { echo "mkfs.xfs version 999.0.0"; exit; }
mkfs.xfs "$@" || exit
[[ $* == *nrext64=0* ]] || xfs_db -x -c 'sb 0' -c 'write -d features_incompat 0x8000000' "${@: -1}" >/dev/null
"#;

#[tokio::test(flavor = "multi_thread")]
async fn an_xfs_is_made_without_what_this_kernel_can_not_mount() {
    let rig = Loops::new().await;
    rig.tool("mkfs.xfs", &NEWER.replace("@ROOT@", rig.root.to_str().expect("UTF-8")));
    for lun in [1, 2] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node().stage(&volume.stage("xfs")).await.expect("it is staged");
    }
    let calls = fs::read_to_string(rig.root.join("mkfs.xfs.log")).expect("it was called");
    let calls: Vec<&str> = calls.lines().collect();
    assert_eq!(calls.iter().filter(|call| call.contains("/fd/0")).count(), 2, "{calls:?}");
    assert!(calls.iter().filter(|call| call.contains("/fd/0")).all(|call| call.contains("-i nrext64=0")));
    assert_eq!(calls.iter().filter(|call| call.contains("image")).count(), 3, "tried once: {calls:?}");
    assert_eq!(rig.mounts().len(), 2);
    run("sync", &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_that_hangs_for_one_volume_holds_up_no_other_and_no_probe() {
    let rig = Loops::new().await;
    let (hung, other) = (rig.attach("pvc-1", 1, 64 * MIB), rig.attach("pvc-2", 2, 64 * MIB));
    let (began, go) = (rig.root.join("began"), rig.root.join("go"));
    rig.tool(
        "mkfs.ext4",
        &format!(
            "#!/bin/sh\nif mkdir '{}' 2>/dev/null; then while ! [ -e '{}' ]; do sleep 0.02; done; fi\nPATH=/sbin:/usr/sbin:$PATH exec mkfs.ext4 \"$@\"\n",
            began.display(),
            go.display()
        ),
    );
    let operations = Operations::default();
    let service = Arc::new(NodeService::new(rig.node().clone(), operations.clone()));
    let request = hung.stage_request("ext4");
    let staging = {
        let (service, request) = (Arc::clone(&service), request.clone());
        tokio::spawn(async move { service.node_stage_volume(Request::new(request)).await })
    };
    while !began.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let meanwhile = async {
        service.node_stage_volume(Request::new(other.stage_request("ext4"))).await.expect("it is staged");
        rig.node().stats(&other.staging).await.expect("it is told");
        service.node_get_info(Request::new(NodeGetInfoRequest {})).await.expect("it is told");
        let mut another = request.clone();
        another.volume_capability = hung.stage_request("xfs").volume_capability;
        let busy = service.node_stage_volume(Request::new(another)).await.expect_err("it is busy");
        assert_eq!(busy.code(), Code::Aborted);
        rig.node().unstage(&other.unstage()).await.expect("it is let go");
    };
    tokio::time::timeout(Duration::from_secs(20), meanwhile).await.expect("nothing waits for the tool");
    assert!(!staging.is_finished());
    let retry = service.node_stage_volume(Request::new(request));
    fs::write(&go, "").expect("a file");
    retry.await.expect("the retry joins");
    staging.await.expect("it does not panic").expect("it is staged");
    rig.write(&hung.staging, "mine").expect("it is mounted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_mount_was_never_writable_in_any_place_where_it_is_seen() {
    let rig = Loops::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    // Mounts below `pods` appear in `twin` as well, as those of a kubelet's directory do on its host.
    let (pods, twin) = (rig.root.join("pods"), rig.root.join("twin"));
    for directory in [&pods, &twin] {
        fs::create_dir_all(directory).expect("a directory");
    }
    let (pods, twin) = (pods.to_str().expect("UTF-8"), twin.to_str().expect("UTF-8"));
    run("mount", &["--bind", pods, pods]);
    run("mount", &["--make-shared", pods]);
    run("mount", &["--bind", pods, twin]);
    let target = MountPath::new(&format!("{pods}/1/mount")).expect("a legal path");
    let publish = Publish { readonly: true, ..volume.publish(&target) };
    rig.node().publish(&publish).await.expect("it is published");
    // A bind that is made read-only afterwards has been writable here, and stays so.
    for seen in [format!("{pods}/1/mount/data"), format!("{twin}/1/mount/data")] {
        let refused = fs::write(&seen, "mine").expect_err("it takes no writes");
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{seen}");
    }
    rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    assert!(!fs::exists(format!("{twin}/1/mount/lost+found")).expect("a directory"));
    run("umount", &[twin]);
    run("umount", &[pods]);
    rig.node().unstage(&volume.unstage()).await.expect("it is let go");
}
