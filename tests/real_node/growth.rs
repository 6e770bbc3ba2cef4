//! Growing: in place, by the kernel.

use std::fs;

use proxmox_csi::{
    host::error::GrowError,
    node::{Expand, ExpandError, MountPath, Publish, Stats},
    types::Bytes,
};

use crate::rig::{MIB, Rig, Volume};

pub(crate) fn expand(volume: &Volume, path: &MountPath, size: u64) -> Expand {
    let required = Some(Bytes::new(size));
    Expand { volume: volume.handle.clone(), path: path.clone(), required, limit: None, key: None }
}

pub(crate) async fn size_of(rig: &Rig, path: &MountPath) -> u64 {
    match rig.node.stats(path).await.expect("it is mounted") {
        Stats::Filesystem(usage) => usage.total_bytes,
        Stats::Block(size) => size.get(),
    }
}

/// Whether this process has the capability (`CAP_SYS_RESOURCE`) that the kernel wants for growing a mounted ext4.
fn may_grow_ext4() -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("our own status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("what we may do");
    let capabilities = u64::from_str_radix(effective.trim(), 16).expect("hex");
    capabilities >> 24 & 1 == 1
}

#[tokio::test(flavor = "multi_thread")]
async fn xfs_grows_online() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node.stage(&volume.stage("xfs")).await.expect("it is staged");
    let target = rig.path("pods/1/mount");
    let publish = Publish { readonly: true, ..volume.publish(&target) };
    rig.node.publish(&publish).await.expect("it is published");
    let before = size_of(&rig, &target).await;
    let early = rig.node.expand(&expand(&volume, &target, 1024 * MIB)).await;
    assert!(early.is_err(), "the disk has not grown");
    volume.resize(1024 * MIB);
    let size = rig.node.expand(&expand(&volume, &target, 1024 * MIB)).await.expect("it grows");
    assert_eq!(size, Bytes::GIB);
    assert!(size_of(&rig, &target).await > before + 400 * MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn ext4_grows_online_or_says_which_capability_is_missing() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node.stage(&volume.stage("ext4")).await.expect("it is staged");
    volume.resize(1024 * MIB);
    let expanded = rig.node.expand(&expand(&volume, &volume.staging, 1024 * MIB)).await;
    if may_grow_ext4() {
        assert_eq!(expanded.expect("it grows"), Bytes::GIB);
    } else {
        let missing = matches!(expanded, Err(ExpandError::Grow(GrowError::Capability { .. })));
        assert!(missing, "{expanded:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn file_systems_grow_at_stage() {
    let rig = Rig::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs")] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node.stage(&volume.stage(fs)).await.expect("it is staged");
        fs::write(volume.staged_file("data"), "mine").expect("it is mounted");
        let before = size_of(&rig, &volume.staging).await;
        rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
        volume.resize(1024 * MIB);
        rig.node.stage(&volume.stage(fs)).await.expect("it is staged");
        let after = size_of(&rig, &volume.staging).await;
        if fs == "xfs" || may_grow_ext4() {
            assert!(after > before + 400 * MIB, "{fs}");
        } else {
            // Never before it is mounted: what cuts that off makes the file system unmountable.
            assert_eq!(after, before, "an ext4 grows only while it is mounted");
        }
        assert_eq!(fs::read_to_string(volume.staged_file("data")).expect("the data"), "mine");
    }
}
