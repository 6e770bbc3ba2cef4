//! Encrypted volumes. Of loop devices there is no mapping to be made where the kernel has no device mapper: see the rig.

use proxmox_csi::{
    csi::{
        node::NodeService,
        proto::{self, node_server::Node as _},
    },
    host::{
        Place,
        error::FormatError,
        luks::{GrowMappingError, Passphrase},
    },
    node::{Access, Expand, ExpandError, Publish, PublishError, Stage, StageError, Stats, UnstageError},
    runtime::Operations,
    types::{Bytes, publish::Contents},
};
use tonic::{Code, Status};

use super::{
    KEY, MIB, Rig, assert_clean,
    formatting::{SWAP, Writes},
    growth::size_of,
};

pub(crate) async fn p9_an_encrypted_volume_lives_with_its_passphrase_on_no_command_line<R: Rig>() {
    let rig = R::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs"), (3, "btrfs")] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        let target = rig.path(&format!("pods/{lun}/mount"));
        for _ in 0..2 {
            rig.node().stage(&volume.stage_encrypted(fs, KEY)).await.expect("it is staged");
            rig.node().publish(&volume.publish(&target)).await.expect("it is published");
        }
        rig.write(&target, "mine").expect("it takes writes");
        assert_eq!(rig.mapped().len(), 1, "{fs}");
        rig.inspect_encrypted(&volume, true);
        rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
        rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
        assert!(rig.mapped().is_empty() && rig.kernel_disks().is_empty(), "{fs}: nothing stays open");

        assert!(rig.opens(&volume, KEY) && !rig.opens(&volume, KEY.trim_end()), "{fs}: byte for byte");
        rig.inspect_encrypted(&volume, false);
        rig.node().stage(&volume.stage_encrypted(fs, KEY)).await.expect("it is opened and not formatted");
        assert_eq!(rig.read(&volume.staging).expect("the data"), "mine");
        rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    }
    assert_clean(&rig);
}

pub(crate) async fn a_wrong_passphrase_is_unauthenticated_and_leaves_nothing<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage_encrypted("ext4", KEY)).await.expect("it is staged");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    let wrong = rig.node().stage(&volume.stage_encrypted("ext4", "guess")).await.expect_err("it is wrong");
    let status = Status::from(wrong);
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(!status.message().contains("guess"), "{status}");
    let missing = Status::from(rig.node().stage(&volume.stage("ext4")).await.expect_err("there is none"));
    assert_eq!(missing.code(), Code::FailedPrecondition);
    assert!(missing.message().contains("node-stage-secret-name") && !missing.message().contains("wipe"));
    assert!(rig.mapped().is_empty() && rig.mounts().is_empty());
    rig.node().stage(&volume.stage_encrypted("ext4", KEY)).await.expect("it is as it was");
}

pub(crate) async fn p9_an_empty_passphrase_is_none<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let service = NodeService::new(rig.node().clone(), Operations::default());
    let secrets = [("encryption-passphrase".to_owned(), String::new())].into();
    let request = proto::NodeStageVolumeRequest { secrets, ..volume.stage_request("ext4") };
    let refused = service.node_stage_volume(tonic::Request::new(request)).await.expect_err("it is refused");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(rig.is_blank(&volume), "nothing was written");
}

pub(crate) async fn p4_a_volume_that_holds_anything_is_never_encrypted<R: Rig>() {
    let rig = R::new().await;
    let size = 256 * MIB;
    let cases: [(&str, Writes<'_>); 4] = [
        ("a file system in plain text", &[]),
        ("swap", &SWAP),
        ("a byte in the head", &[(5 * MIB, b"x")]),
        ("a byte in the tail", &[(256 * MIB - 1, b"x")]),
    ];
    for (index, (what, writes)) in cases.iter().enumerate() {
        let volume = rig.attach_unseen(&format!("pvc-{index}"), 1, size);
        writes.iter().for_each(|(offset, bytes)| rig.poke(&volume, *offset, bytes));
        if writes.is_empty() {
            rig.mkfs(&volume, "ext4");
        }
        let copy = rig.copy(&volume);
        let refused = rig.node().stage(&volume.stage_encrypted("ext4", KEY)).await;
        assert!(
            matches!(refused, Err(StageError::Refused { .. } | StageError::Format(_))),
            "{what}: {refused:?}"
        );
        assert!(rig.is_same(&volume, &copy), "{what}");
        rig.detach(&volume);
    }
    for contents in [Contents::Unwiped, Contents::Unknown] {
        let mut volume = rig.attach("pvc-9", 9, size);
        volume.published.contents = contents;
        let refused = rig.node().stage(&volume.stage_encrypted("ext4", KEY)).await;
        assert!(matches!(refused, Err(StageError::Refused { .. })), "{refused:?}");
        assert!(rig.is_blank(&volume));
        rig.detach(&volume);
    }
    assert!(rig.mapped().is_empty());
}

pub(crate) async fn p4_what_is_inside_is_formatted_only_while_nothing_was_written_through_the_mapping<
    R: Rig,
>() {
    let rig = R::new().await;
    // Cut off between the header and the file system.
    let volume = rig.attach_unseen("pvc-1", 1, 512 * MIB);
    rig.encrypt(&volume);
    rig.node().stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it goes on where it was");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");

    // Written to, if only noise: the first place that is read, and one that is a sample.
    for (lun, place) in [(2, 16 * MIB), (3, 512 * MIB - 1), (4, 16 * MIB + 128 * MIB)] {
        let volume = rig.attach_unseen(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.encrypt(&volume);
        rig.poke(&volume, place, b"x");
        let refused = rig.node().stage(&volume.stage_encrypted("xfs", KEY)).await;
        let not_blank = matches!(refused, Err(StageError::Format(FormatError::NotBlank { .. })));
        assert!(not_blank, "{place}: {refused:?}");
        assert!(rig.mapped().is_empty(), "a stage that fails leaves nothing open");
    }

    // Allocated blank by nobody's word.
    let mut volume = rig.attach_unseen("pvc-5", 5, 512 * MIB);
    rig.encrypt(&volume);
    volume.published.contents = Contents::Unknown;
    let refused = rig.node().stage(&volume.stage_encrypted("xfs", KEY)).await;
    assert!(matches!(refused, Err(StageError::Refused { .. })), "{refused:?}");
    assert!(rig.mapped().is_empty() && rig.mounts().is_empty());
}

pub(crate) async fn an_encrypted_raw_block_volume_is_its_mapping<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let target = rig.path("pods/1/volume");
    let stage = Stage { access: Access::Block, ..volume.stage_encrypted("ext4", KEY) };
    let publish = Publish { access: Access::Block, encrypted: true, ..volume.publish(&target) };
    let early = rig.node().publish(&publish).await;
    assert!(matches!(early, Err(PublishError::Locked { .. })), "{early:?}");
    for _ in 0..2 {
        rig.node().stage(&stage).await.expect("it is staged");
        rig.node().publish(&publish).await.expect("it is published");
    }
    let place = rig.host().look(target.as_path()).await.expect("it is there");
    assert!(matches!(place, Place::BlockDevice(_)), "{place:?}");
    let inside = 48 * MIB;
    assert_eq!(rig.node().stats(&target).await.expect("it is there"), Stats::Block(Bytes::new(inside)));
    rig.write_disk(&target, 4096, b"raw").expect("it takes writes");
    rig.resize(&volume, 128 * MIB);
    let size = rig.node().expand(&volume.expand(&target, 128 * MIB)).await.expect("it has grown");
    assert_eq!(size, Bytes::new(128 * MIB));
    let now = rig.node().stats(&target).await.expect("it is there");
    assert_eq!(now, Stats::Block(Bytes::new(inside + 64 * MIB)));

    let used = rig.node().unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "{used:?}");
    rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.mapped().is_empty() && rig.kernel_disks().is_empty());
    assert_ne!(rig.peek(&volume, 16 * MIB + 4096, 3), [0; 3], "behind the header");

    // Without its key it is not given away as a raw disk, which a pod would write over.
    let mut back = volume.clone();
    back.published.size = None;
    let plain = rig.node().stage(&back.stage_block()).await;
    assert!(matches!(plain, Err(StageError::Refused { .. })), "{plain:?}");
    let plain = rig.node().publish(&back.publish_block(&target)).await;
    assert!(matches!(plain, Err(PublishError::Locked { .. })), "{plain:?}");
}

pub(crate) async fn what_a_pod_encrypts_in_its_raw_block_volume_is_its_own<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    rig.encrypt(&volume);
    let target = rig.path("pods/1/volume");
    rig.node().stage(&volume.stage_block()).await.expect("it is staged");
    rig.node().publish(&volume.publish_block(&target)).await.expect("as it is");
    assert_eq!(rig.node().stats(&target).await.expect("it is there"), Stats::Block(Bytes::new(64 * MIB)));
    assert!(rig.mapped().is_empty());
}

pub(crate) async fn an_encrypted_file_system_grows_online_and_at_stage<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    let before = size_of(&rig, &volume.staging).await;
    rig.resize(&volume, 1024 * MIB);
    rig.node().expand(&volume.expand(&volume.staging, 1024 * MIB)).await.expect("no key is needed");
    let online = size_of(&rig, &volume.staging).await;
    assert!(online > before + 400 * MIB);
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    rig.resize(&volume, 1536 * MIB);
    rig.node().stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    assert!(size_of(&rig, &volume.staging).await > online + 400 * MIB);
}

pub(crate) async fn a_mapping_of_the_driver_before_is_served_grown_and_closed<R: Rig>() {
    let rig = R::new().await;
    let mut volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    // As that driver attached, opened and mounted it.
    volume.published.wwn = "0x5056432d49443031".parse().expect("a name");
    volume.published.size = None;
    volume.published.contents = Contents::Unknown;
    rig.rename(&volume, volume.published.wwn);
    rig.node().stage(&volume.stage_block()).await.expect_err("it is found, and encrypted");
    let disk = rig.disk_of(&volume);
    rig.open_as_before(&volume).await;
    assert_eq!(rig.mapped(), [format!("{disk}-encrypted")]);

    let target = rig.path("pods/1/mount");
    rig.node().stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged already");
    rig.node().publish(&volume.publish(&target)).await.expect("it is published");
    let before = size_of(&rig, &target).await;
    rig.resize(&volume, 1024 * MIB);
    let grow = volume.expand(&target, 1024 * MIB);
    let locked = rig.node().expand(&grow).await;
    let wants = matches!(locked, Err(ExpandError::Mapping(GrowMappingError::Passphrase { .. })));
    assert!(wants, "{locked:?}");
    let grow = Expand { key: Some(Passphrase::new(KEY)), ..grow };
    rig.node().expand(&grow).await.expect("with its key it grows");
    assert!(size_of(&rig, &target).await > before + 400 * MIB);

    rig.node().unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.mapped().is_empty() && rig.kernel_disks().is_empty() && rig.mounts().is_empty());
}

pub(crate) async fn an_encrypted_disk_that_was_pulled_is_staged_again<R: Rig>() {
    let rig = R::new().await;
    for mounted in [true, false] {
        let volume = rig.attach("pvc-1", 1, 512 * MIB);
        rig.node().stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
        if mounted {
            rig.write(&volume.staging, "mine").expect("it is mounted");
            rig.sync();
        } else {
            rig.unmount(&volume.staging);
        }
        rig.detach(&volume);
        let back = rig.attach("pvc-1", 1, 512 * MIB);
        rig.node().stage(&back.stage_encrypted("xfs", KEY)).await.expect("what is dead gives way");
        assert_eq!(rig.read(&back.staging).expect("the data"), "mine");
        assert_eq!((rig.mapped().len(), rig.mounts().len()), (1, 1));
        rig.detach(&back);
        rig.node().unstage(&back.unstage()).await.expect("nothing is left to lose");
        assert!(rig.mapped().is_empty() && rig.mounts().is_empty());
    }
}

pub(crate) async fn a_stage_that_fails_inside_closes_what_it_opened<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    let other = rig.node().stage(&volume.stage_encrypted("ext4", KEY)).await.expect_err("it holds xfs");
    assert!(Status::from(other).message().contains("`xfs` and `ext4` was asked for"));
    assert!(rig.mapped().is_empty(), "the kubelet never unstages what failed");
    let restarted = rig.restarted();
    restarted.stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    rig.node().unstage(&volume.unstage()).await.expect("whoever staged it");
    assert!(rig.mapped().is_empty());
}

pub(crate) async fn p8_the_mapping_of_a_raw_disk_that_was_pulled_and_came_back_goes_with_unstage<R: Rig>() {
    let rig = R::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let stage = Stage { access: Access::Block, ..volume.stage_encrypted("ext4", KEY) };
    rig.node().stage(&stage).await.expect("it is staged");
    rig.detach(&volume);
    let back = rig.attach("pvc-1", 1, 64 * MIB);
    rig.node().unstage(&back.unstage()).await.expect("it is unstaged");
    assert_clean(&rig);
}
