//! What only loop devices show: what the kernel itself remembers of a disk, real tools, and a tree that says what no kernel in memory says.

use std::{fs, os::unix::fs::FileExt as _};

use proxmox_csi::{
    host::error::{FormatError, ReleaseError},
    node::{StageError, UnstageError},
};

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
