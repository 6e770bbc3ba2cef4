//! What needs a kernel that does as it is told.

use std::time::Duration;

use proxmox_csi::{
    host::error::{GrowError, ReleaseError},
    node::{ExpandError, StageError, UnstageError},
};

use crate::{
    node_suite::{KEY, MIB, Rig as _, assert_clean},
    rig::Memory,
};

#[tokio::test(start_paused = true)]
async fn an_ext4_that_may_not_be_grown_says_which_capability_is_missing() {
    let rig = Memory::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage("ext4")).await.expect("it is staged");
    rig.machine.forbid_growing_ext4();
    rig.resize(&volume, 1024 * MIB);
    let expanded = rig.node().expand(&volume.expand(&volume.staging, 1024 * MIB)).await;
    assert!(matches!(expanded, Err(ExpandError::Grow(GrowError::Capability { .. }))), "{expanded:?}");
}

#[tokio::test(start_paused = true)]
async fn p8_a_disk_that_is_still_unlocked_is_not_taken_out() {
    let rig = Memory::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.encrypt(&volume);
    // Under a name that a pod would give: it is its own business, and nothing to be closed.
    assert!(rig.machine.unlock_by_hand(&rig.disk_of(&volume), KEY.as_bytes(), "vault"));
    let held = rig.node().unstage(&volume.unstage()).await;
    assert!(matches!(held, Err(UnstageError::Release(ReleaseError::Held { .. }))), "{held:?}");
}

#[tokio::test(start_paused = true)]
async fn p8_what_is_open_in_a_staged_volume_is_waited_for_and_never_torn_away() {
    let rig = Memory::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage("xfs")).await.expect("it is staged");
    rig.write(&volume.staging, "mine").expect("it takes writes");
    rig.machine.hold(volume.staging.as_path());
    let busy = rig.node().unstage(&volume.unstage()).await;
    assert!(matches!(busy, Err(UnstageError::Unmount(_))), "{busy:?}");
    assert_eq!(rig.mounts().len(), 1);
    let later = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        rig.machine.let_go(volume.staging.as_path());
    };
    let unstage = volume.unstage();
    let (unstaged, ()) = tokio::join!(rig.node().unstage(&unstage), later);
    unstaged.expect("it goes as soon as it is let go");
    rig.node().stage(&volume.stage("xfs")).await.expect("it is staged");
    assert_eq!(rig.read(&volume.staging).expect("the data"), "mine");
}

#[tokio::test(start_paused = true)]
async fn what_was_written_out_outlives_a_power_loss_and_the_log_is_replayed() {
    let rig = Memory::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs"), (3, "btrfs")] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        rig.node().stage(&volume.stage(fs)).await.expect("it is staged");
        rig.write(&volume.staging, "mine").expect("it takes writes");
        rig.sync();
        rig.write(&volume.staging, "lost").expect("it takes writes");
        rig.machine.restart();
        assert!(rig.mounts().is_empty(), "{fs}");
        rig.node().stage(&volume.stage(fs)).await.expect("the log is replayed");
        assert_eq!(rig.read(&volume.staging).expect("the data"), "mine", "{fs}");
    }
}

#[tokio::test(start_paused = true)]
async fn p3_a_disk_that_got_the_name_and_number_of_one_that_was_pulled_is_not_taken_for_it() {
    let rig = Memory::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&volume.stage("xfs")).await.expect("it is staged");
    let target = rig.path("pods/1/mount");
    let name = rig.disk_of(&volume);
    rig.detach(&volume);
    let other = rig.attach("pvc-2", 2, 512 * MIB);
    assert_eq!(rig.disk_of(&other), name, "the kernel gives the name again at once");
    rig.node().publish(&volume.publish(&target)).await.expect_err("its disk is gone");
    let mut mixed = other.clone();
    mixed.staging = volume.staging.clone();
    rig.node().publish(&mixed.publish(&target)).await.expect_err("nothing of it is mounted there");
    let staged = rig.node().stage(&mixed.stage("xfs")).await;
    assert!(matches!(staged, Ok(()) | Err(StageError::Occupied { .. })), "{staged:?}");
    rig.node().unstage(&volume.unstage()).await.ok();
    rig.node().stage(&other.stage("xfs")).await.expect("it is a volume of its own");
    rig.write(&other.staging, "other").expect("it takes writes");
    assert!(!rig.exists(&target));
}

#[tokio::test(start_paused = true)]
async fn two_runs_of_the_same_calls_are_the_same() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let rig = Memory::new().await;
        let volumes = [rig.attach("pvc-1", 1, 512 * MIB), rig.attach("pvc-2", 2, 512 * MIB)];
        let (one, other) = (volumes[0].stage("btrfs"), volumes[1].stage_encrypted("ext4", KEY));
        let (one, other) = tokio::join!(rig.node().stage(&one), rig.node().stage(&other));
        one.and(other).expect("both are staged");
        rig.write(&volumes[0].staging, "mine").expect("it takes writes");
        rig.sync();
        runs.push((rig.machine.table(), volumes.map(|volume| rig.image(&volume).0)));
    }
    let [(first, one), (second, other)] = &runs[..] else { panic!("two runs") };
    assert_eq!(first, second);
    assert!(one.iter().zip(other).all(|(one, other)| one.is_same(other)), "byte for byte");
}

#[tokio::test(start_paused = true)]
async fn p8_a_dead_mount_whose_number_another_disk_has_by_now_holds_up_neither_volume() {
    for (encrypted, first) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
        let rig = Memory::new().await;
        let dead = rig.attach("pvc-1", 1, 512 * MIB);
        rig.node().stage(&dead.stage("xfs")).await.expect("it is staged");
        let name = rig.disk_of(&dead);
        rig.detach(&dead);
        let other = rig.attach("pvc-2", 2, 512 * MIB);
        assert_eq!(rig.disk_of(&other), name, "the kernel gives the name again at once");
        let stage = if encrypted { other.stage_encrypted("xfs", KEY) } else { other.stage("xfs") };
        rig.node().stage(&stage).await.expect("it is staged");
        rig.write(&other.staging, "other").expect("it takes writes");
        let mut both = [&dead, &other];
        both.rotate_left(first);
        for volume in both {
            let unstaged = rig.node().unstage(&volume.unstage()).await;
            assert!(unstaged.is_ok(), "encrypted {encrypted}, first {first}: {unstaged:?}");
        }
        assert_clean(&rig);
        rig.node().stage(&stage).await.expect("it is staged");
        assert_eq!(rig.read(&other.staging).expect("the data"), "other");
    }
}

#[tokio::test(start_paused = true)]
async fn p8_two_dead_mounts_of_one_number_do_not_hold_up_each_other() {
    let rig = Memory::new().await;
    let first = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node().stage(&first.stage("btrfs")).await.expect("it is staged");
    rig.detach(&first);
    let second = rig.attach("pvc-2", 2, 512 * MIB);
    rig.node().stage(&second.stage("btrfs")).await.expect("it is staged");
    rig.detach(&second);
    let back = rig.attach("pvc-1", 1, 512 * MIB);
    for volume in [&back, &second] {
        rig.node().unstage(&volume.unstage()).await.expect("it is unstaged");
    }
    assert_clean(&rig);
}
