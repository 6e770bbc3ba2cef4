//! What is formatted, and above all what is not.

use proxmox_csi::{node::StageError, types::publish::Contents};
use tonic::{Code, Status};

use super::{MIB, Rig};

/// What to write where.
pub(crate) type Writes<'a> = &'a [(u64, &'a [u8])];

/// A swap area as far as blkid looks at it: version, last page, signature (util-linux `superblocks/swap.c`).
pub(crate) const SWAP: [(u64, &[u8]); 2] =
    [(1024, b"\x01\x00\x00\x00\xff\x0f\x00\x00"), (4086, b"SWAPSPACE2")];

pub(crate) async fn p4_a_disk_that_holds_data_is_never_formatted<R: Rig>() {
    let rig = R::new().await;
    let size = 256 * MIB;
    let partition: &[u8] = b"\x00\x02\x03\x00\x83\x10\x10\x10\x00\x08\x00\x00\x00\x40\x00\x00";
    let cases: [(&str, Writes<'_>); 7] = [
        ("xfs or ext4 asked, btrfs there", &[(65536 + 64, b"_BHRfS_M")]),
        ("swap", &SWAP),
        ("a LUKS header", &[(0, b"LUKS\xba\xbe\x00\x02")]),
        ("a partition table", &[(446, partition), (510, b"\x55\xaa")]),
        ("a byte in the head", &[(5 * MIB + 1, b"x")]),
        ("a backup superblock of ext4", &[(128 * MIB + 56, b"\x53\xef")]),
        ("a byte in the tail", &[(256 * MIB - 1, b"x")]),
    ];
    for (index, (what, writes)) in cases.iter().enumerate() {
        let volume = rig.attach_unseen(&format!("pvc-{index}"), 1, size);
        writes.iter().for_each(|(offset, bytes)| rig.poke(&volume, *offset, bytes));
        let copy = rig.copy(&volume);
        for fs in ["ext4", "xfs"] {
            let staged = rig.node().stage(&volume.stage(fs)).await;
            let refused = matches!(staged, Err(StageError::Refused { .. } | StageError::Format(_)));
            assert!(refused, "{what}, {fs}: {staged:?}");
        }
        assert!(rig.is_same(&volume, &copy), "{what}");
        assert!(rig.mounts().is_empty(), "{what}");
        rig.detach(&volume);
    }
}

pub(crate) async fn p4_another_file_system_is_neither_mounted_nor_formatted_over<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    rig.mkfs(&volume, "ext4");
    let staged = rig.node().stage(&volume.stage("xfs")).await.expect_err("it is ext4");
    assert!(std::error::Error::source(&staged).expect("why").to_string().contains("`ext4`"));
    rig.node().stage(&volume.stage("ext4")).await.expect("what is there is mounted");
}

pub(crate) async fn p4_a_volume_that_was_not_allocated_blank_is_never_formatted<R: Rig>() {
    let rig = R::new().await;
    for contents in [Contents::Unwiped, Contents::Unknown] {
        let mut volume = rig.attach("pvc-1", 1, 64 * MIB);
        volume.published.contents = contents;
        let staged = rig.node().stage(&volume.stage("ext4")).await;
        assert!(matches!(staged, Err(StageError::Refused { .. })), "{staged:?}");
        rig.detach(&volume);
    }
}

pub(crate) async fn p4_an_unreadable_disk_is_never_formatted<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 256 * MIB);
    rig.break_from(&volume, 128 * MIB - 4096);
    let staged = rig.node().stage(&volume.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Format(_) | StageError::Probe(_))), "{staged:?}");
    assert!(rig.is_blank(&volume), "nothing was written");
}

pub(crate) async fn p4_an_xfs_whose_mkfs_was_cut_off_is_named_and_left_alone<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 512 * MIB);
    rig.mkfs(&volume, "xfs");
    rig.poke(&volume, 126, &[1]);
    let refused = rig.node().stage(&volume.stage("xfs")).await.expect_err("it is not whole");
    let status = Status::from(refused);
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("was cut off"), "{status}");
    assert!(rig.mounts().is_empty());
}

pub(crate) async fn an_xfs_that_an_older_kernel_could_not_mount_is_not_made<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    let page = u32::try_from(rustix::param::page_size()).expect("a page is small");
    let mut stage = volume.stage("xfs");
    stage.options.block_size = Some(2 * page);
    let status = Status::from(rig.node().stage(&stage).await.expect_err("its blocks are too large"));
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("Linux before 6.12"), "{status}");
    assert!(rig.is_blank(&volume), "nothing was written");
    stage.options.block_size = Some(page);
    rig.node().stage(&stage).await.expect("it is staged");
}
