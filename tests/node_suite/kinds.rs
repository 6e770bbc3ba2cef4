//! btrfs.

use proxmox_csi::node::{Publish, PublishError, StageError, Stats, Unstage, UnstageError};

use super::{MIB, Rig, growth::size_of};

pub(crate) async fn a_btrfs_lives_like_the_others<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    let (writable, readonly) = (rig.path("pods/1/mount"), rig.path("pods/2/mount"));
    for _ in 0..2 {
        rig.node().stage(&volume.stage("btrfs")).await.expect("it is staged");
        rig.node().publish(&volume.publish(&writable)).await.expect("it is published");
        let publish = Publish { readonly: true, ..volume.publish(&readonly) };
        rig.node().publish(&publish).await.expect("it is published");
    }
    assert_eq!(rig.mounts().len(), 3);
    rig.write(&writable, "mine").expect("this one takes writes");
    let refused = rig.write(&readonly, "other").expect_err("this one does not");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);

    assert_eq!(rig.node().condition(&writable).await.expect("it is known"), None);
    let Stats::Filesystem(usage) = rig.node().stats(&writable).await.expect("it is mounted") else {
        panic!("it is a file system")
    };
    assert_eq!(usage.total_inodes, 0, "btrfs has no number of them");
    rig.resize(&volume, 1024 * MIB);
    rig.node().expand(&volume.expand(&readonly, 1024 * MIB)).await.expect("it grows");
    assert!(size_of(&rig, &writable).await > usage.total_bytes + 400 * MIB);

    let used = rig.node().unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "{used:?}");
    for target in [&writable, &readonly] {
        rig.node().unpublish(&volume.unpublish(target)).await.expect("it is unpublished");
    }
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.mounts().is_empty() && rig.kernel_disks().is_empty());

    rig.resize(&volume, 1536 * MIB);
    rig.node().stage(&volume.stage("btrfs")).await.expect("it is mounted and not formatted");
    assert!(size_of(&rig, &volume.staging).await > usage.total_bytes + 900 * MIB, "it grows at stage");
    assert_eq!(rig.read(&volume.staging).expect("the data"), "mine");
    let other = rig.node().stage(&volume.stage("xfs")).await;
    assert!(matches!(other, Err(StageError::Differs { .. })), "{other:?}");
}

pub(crate) async fn p3_two_btrfs_are_told_apart_and_a_dead_one_gives_way<R: Rig>() {
    let rig = R::new().await;
    let (volume, other) = (rig.attach("pvc-1", 1, 512 * MIB), rig.attach("pvc-2", 2, 512 * MIB));
    rig.node().stage(&volume.stage("btrfs")).await.expect("it is staged");
    rig.node().stage(&other.stage("btrfs")).await.expect("it is staged");
    let target = rig.path("pods/1/mount");
    let mixed = Publish { staging: other.staging.clone(), ..volume.publish(&target) };
    let mixed = rig.node().publish(&mixed).await;
    assert!(matches!(mixed, Err(PublishError::OtherStaged { .. })), "{mixed:?}");
    let mixed = Unstage { staging: other.staging.clone(), ..volume.unstage() };
    let foreign = rig.node().unstage(&mixed).await;
    assert!(matches!(foreign, Err(UnstageError::OtherVolume { .. })), "{foreign:?}");

    rig.write(&volume.staging, "mine").expect("it takes writes");
    rig.sync();
    rig.detach(&volume);
    let back = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&back.stage("btrfs")).await.expect("the dead mount gives way");
    assert_eq!(rig.read(&back.staging).expect("the data"), "mine");
    assert_eq!(rig.mounts_below(&back.staging).len(), 1);
    rig.node().unstage(&back.unstage()).await.expect("it is unstaged");
    rig.detach(&other);
    rig.node().unstage(&other.unstage()).await.expect("a late unstage accepts a missing disk");
    assert!(rig.mounts().is_empty());
}
