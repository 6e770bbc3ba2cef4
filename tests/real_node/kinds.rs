//! btrfs, and the features of XFS.

use std::fs;

use proxmox_csi::node::{Publish, PublishError, StageError, Stats, Unstage, UnstageError};

use crate::{
    growth::{expand, size_of},
    rig::{MIB, Rig, mounts_below, run},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_btrfs_lives_like_the_others() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    let (writable, readonly) = (rig.path("pods/1/mount"), rig.path("pods/2/mount"));
    for _ in 0..2 {
        rig.node.stage(&volume.stage("btrfs")).await.expect("it is staged");
        rig.node.publish(&volume.publish(&writable)).await.expect("it is published");
        let publish = Publish { readonly: true, ..volume.publish(&readonly) };
        rig.node.publish(&publish).await.expect("it is published");
    }
    assert_eq!(mounts_below(&rig.root).len(), 3);
    fs::write(writable.as_path().join("data"), "mine").expect("this one takes writes");
    let refused = fs::write(readonly.as_path().join("data"), "other").expect_err("this one does not");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);

    assert_eq!(rig.node.condition(&writable).await.expect("it is known"), None);
    let Stats::Filesystem(usage) = rig.node.stats(&writable).await.expect("it is mounted") else {
        panic!("it is a file system")
    };
    assert_eq!(usage.total_inodes, 0, "btrfs has no number of them");
    volume.resize(1024 * MIB);
    rig.node.expand(&expand(&volume, &readonly, 1024 * MIB)).await.expect("it grows");
    assert!(size_of(&rig, &writable).await > usage.total_bytes + 400 * MIB);

    let used = rig.node.unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "{used:?}");
    for target in [&writable, &readonly] {
        rig.node.unpublish(&volume.unpublish(target)).await.expect("it is unpublished");
    }
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(mounts_below(&rig.root).is_empty() && rig.kernel_disks().is_empty());

    volume.resize(1536 * MIB);
    rig.node.stage(&volume.stage("btrfs")).await.expect("it is mounted and not formatted");
    assert!(size_of(&rig, &volume.staging).await > usage.total_bytes + 900 * MIB, "it grows at stage");
    assert_eq!(fs::read_to_string(volume.staged_file("data")).expect("the data"), "mine");
    let other = rig.node.stage(&volume.stage("xfs")).await;
    assert!(matches!(other, Err(StageError::Differs { .. })), "{other:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_two_btrfs_are_told_apart_and_a_dead_one_gives_way() {
    let rig = Rig::new().await;
    let (volume, other) = (rig.attach("pvc-1", 1, 512 * MIB), rig.attach("pvc-2", 2, 512 * MIB));
    rig.node.stage(&volume.stage("btrfs")).await.expect("it is staged");
    rig.node.stage(&other.stage("btrfs")).await.expect("it is staged");
    let target = rig.path("pods/1/mount");
    let mixed = Publish { staging: other.staging.clone(), ..volume.publish(&target) };
    let mixed = rig.node.publish(&mixed).await;
    assert!(matches!(mixed, Err(PublishError::OtherStaged { .. })), "{mixed:?}");
    let mixed = Unstage { staging: other.staging.clone(), ..volume.unstage() };
    let foreign = rig.node.unstage(&mixed).await;
    assert!(matches!(foreign, Err(UnstageError::OtherVolume { .. })), "{foreign:?}");

    fs::write(volume.staged_file("data"), "mine").expect("it takes writes");
    run("sync", &[]);
    rig.detach(&volume);
    let back = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node.stage(&back.stage("btrfs")).await.expect("the dead mount gives way");
    assert_eq!(fs::read_to_string(back.staged_file("data")).expect("the data"), "mine");
    assert_eq!(mounts_below(back.staging.as_path()).len(), 1);
    rig.node.unstage(&back.unstage()).await.expect("it is unstaged");
    rig.detach(&other);
    rig.node.unstage(&other.unstage()).await.expect("a late unstage accepts a missing disk");
    assert!(mounts_below(&rig.root).is_empty());
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
    let rig = Rig::new().await;
    rig.tool("mkfs.xfs", &NEWER.replace("@ROOT@", rig.root.to_str().expect("UTF-8")));
    for lun in [1, 2] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node.stage(&volume.stage("xfs")).await.expect("it is staged");
    }
    let calls = fs::read_to_string(rig.root.join("mkfs.xfs.log")).expect("it was called");
    let calls: Vec<&str> = calls.lines().collect();
    assert_eq!(calls.iter().filter(|call| call.contains("/fd/0")).count(), 2, "{calls:?}");
    assert!(calls.iter().filter(|call| call.contains("/fd/0")).all(|call| call.contains("-i nrext64=0")));
    assert_eq!(calls.iter().filter(|call| call.contains("image")).count(), 3, "tried once: {calls:?}");
    assert_eq!(mounts_below(&rig.root).len(), 2);
}
