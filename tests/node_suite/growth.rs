//! Growing: in place, by the kernel.

use proxmox_csi::{
    host::error::GrowError,
    node::{ExpandError, MountPath, Publish, Stats},
    types::Bytes,
};

use super::{MIB, Rig};

pub(crate) async fn size_of(rig: &impl Rig, path: &MountPath) -> u64 {
    match rig.node().stats(path).await.expect("it is mounted") {
        Stats::Filesystem(usage) => usage.total_bytes,
        Stats::Block(size) => size.get(),
    }
}

pub(crate) async fn xfs_grows_online<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage("xfs")).await.expect("it is staged");
    let target = rig.path("pods/1/mount");
    let publish = Publish { readonly: true, ..volume.publish(&target) };
    rig.node().publish(&publish).await.expect("it is published");
    let before = size_of(&rig, &target).await;
    let early = rig.node().expand(&volume.expand(&target, 1024 * MIB)).await;
    assert!(early.is_err(), "the disk has not grown");
    rig.resize(&volume, 1024 * MIB);
    let size = rig.node().expand(&volume.expand(&target, 1024 * MIB)).await.expect("it grows");
    assert_eq!(size, Bytes::GIB);
    assert!(size_of(&rig, &target).await > before + 400 * MIB);
}

pub(crate) async fn ext4_grows_online_or_says_which_capability_is_missing<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.resize(&volume, 1024 * MIB);
    let expanded = rig.node().expand(&volume.expand(&volume.staging, 1024 * MIB)).await;
    if rig.may_grow_ext4() {
        assert_eq!(expanded.expect("it grows"), Bytes::GIB);
    } else {
        let missing = matches!(expanded, Err(ExpandError::Grow(GrowError::Capability { .. })));
        assert!(missing, "{expanded:?}");
    }
}

pub(crate) async fn file_systems_grow_at_stage<R: Rig>() {
    let rig = R::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node().stage(&volume.stage(fs)).await.expect("it is staged");
        rig.write(&volume.staging, "mine").expect("it is mounted");
        let before = size_of(&rig, &volume.staging).await;
        rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
        rig.resize(&volume, 1024 * MIB);
        rig.node().stage(&volume.stage(fs)).await.expect("it is staged");
        let after = size_of(&rig, &volume.staging).await;
        if fs == "xfs" || rig.may_grow_ext4() {
            assert!(after > before + 400 * MIB, "{fs}");
        } else {
            // Never before it is mounted: what cuts that off makes the file system unmountable.
            assert_eq!(after, before, "an ext4 grows only while it is mounted");
        }
        assert_eq!(rig.read(&volume.staging).expect("the data"), "mine");
    }
}
