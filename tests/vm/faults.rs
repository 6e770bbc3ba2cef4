//! What goes wrong below and beside a volume: disks that are pulled, guests and QEMUs that hang, machines that lose their
//! power, disks that fail, storages that are full, mounts that leak.

use proxmox_csi::sim::clock::Profile;
use serde_json::json;
use tonic::Code;

use crate::rig::{Pvc, Rig, STAGING, Setup};
use crate::support;

/// Writes and syncs a file, and another one that is never synced.
async fn write(rig: &Rig, vmid: u32) -> String {
    rig.guest(vmid)
        .sh(&format!(
            "cd {STAGING}; head -c 4000000 /dev/urandom >data; sync; sha256sum data; echo late >late"
        ))
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn p8_a_disk_that_was_pulled_while_mounted_is_let_go_and_its_log_is_replayed() {
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut pvc = rig.volume("pvc-1", "data").await;
    rig.attach(&mut pvc, 101).await;
    guest.stage(&pvc).await;
    let sum = write(&rig, 101).await;
    rig.bench.admin("PUT", "/nodes/pve1/qemu/101/unlink", &format!("idlist={}", pvc.slot())).await;
    let (status, said) = guest.run(&format!("sync -f {STAGING} || ls {STAGING}")).await.expect("it runs");
    assert!(
        status != 0 && said.contains("Input/output error"),
        "a real disk fails where it was pulled: {said}"
    );
    guest.unstage(&pvc).await;
    assert_eq!(guest.sh(&format!("grep -c {STAGING} /proc/mounts || true")).await, "0");
    rig.detach(&pvc, 101).await;
    rig.attach(&mut pvc, 101).await;
    guest.stage(&pvc).await;
    assert_eq!(guest.sh(&format!("cd {STAGING}; sha256sum data")).await, sum);
    guest.unstage(&pvc).await;
    rig.detach(&pvc, 101).await;
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_a_controller_that_a_paused_guest_keeps_is_no_detach() {
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut pvc = rig.volume("pvc-1", "data").await;
    rig.attach(&mut pvc, 101).await;
    guest.stage(&pvc).await;
    guest.sh(&format!("echo mine >{STAGING}/data")).await;
    guest.unstage(&pvc).await;
    rig.bench.admin("POST", "/nodes/pve1/qemu/101/status/suspend", "").await;
    let refused = rig.bench.detach(&pvc.volume.volume_id, "worker-101").await;
    support::assert_refused(refused, Code::Internal, &["still busy in guest?"]);
    rig.bench.admin("POST", "/nodes/pve1/qemu/101/status/resume", "").await;
    rig.detach(&pvc, 101).await;
    rig.attach(&mut pvc, 101).await;
    guest.stage(&pvc).await;
    assert_eq!(guest.sh(&format!("cat {STAGING}/data")).await, "mine");
    guest.unstage(&pvc).await;
    rig.detach(&pvc, 101).await;
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_a_qemu_that_is_stopped_is_not_known_to_have_or_lack_a_disk() {
    let rig = Setup::of(&[101]).boot().await;
    let mut pvc = rig.volume("pvc-1", "data").await;
    rig.attach(&mut pvc, 101).await;
    rig.bench.fault(json!({ "fault": "hang_qemu", "vmid": 101 }));
    let status = rig.bench.admin("GET", "/nodes/pve1/qemu/101/status/current", "").await;
    assert_eq!((&status["data"]["status"], &status["data"]["blockstat"]), (&json!("running"), &json!(null)));
    let refused = rig.bench.detach(&pvc.volume.volume_id, "worker-101").await.expect_err("nobody knows");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    rig.bench.fault(json!({ "fault": "hang_qemu", "vmid": 101, "on": false }));
    rig.detach(&pvc, 101).await;
    let status = rig.bench.admin("GET", "/nodes/pve1/qemu/101/status/current", "").await;
    assert_eq!(status["data"]["blockstat"].as_object().expect("it answers").len(), 1);
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_of_a_machine_that_lost_its_power_is_recovered_on_another() {
    let rig = Setup::of(&[101, 102]).boot().await;
    for kind in ["xfs", "ext4"] {
        let mut pvc = rig.volume(&format!("pvc-{kind}"), "shared").await.formatted_as(kind);
        rig.attach(&mut pvc, 101).await;
        rig.guest(101).stage(&pvc).await;
        let sum = write(&rig, 101).await;
        assert!(rig.sim().stop_vm(101).await, "its power is cut while it writes");
        rig.detach(&pvc, 101).await;
        rig.attach(&mut pvc, 102).await;
        let second = rig.guest(102);
        second.stage(&pvc).await;
        assert_eq!(second.sh(&format!("cd {STAGING}; sha256sum data")).await, sum, "{kind}");
        let replayed = second.sh("dmesg | grep -ciE 'recovery|orphan|recovering' || true").await;
        assert_ne!(replayed, "0", "{kind}: the log was replayed");
        second.unstage(&pvc).await;
        rig.detach(&pvc, 102).await;
        if kind == "xfs" {
            rig.start(101).await;
        }
    }
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p8_a_mount_that_leaked_into_another_namespace_keeps_the_disk_and_is_named() {
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut pvc = rig.volume("pvc-1", "data").await;
    rig.attach(&mut pvc, 101).await;
    guest.stage(&pvc).await;
    guest.sh(&format!("echo mine >{STAGING}/data")).await;
    guest.sh("/usr/sbin/unshare --mount --propagation private sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >/tmp/holder; sleep 1").await;
    let holder = guest.sh("cat /tmp/holder").await;
    let refused = guest.try_unstage(&pvc).await.expect_err("somebody still has it");
    assert!(refused.message().contains(&holder), "process {holder} is not named: {refused}");
    assert_eq!(guest.disks().await.lines().count(), 1, "the kernel keeps the disk");
    guest.sh(&format!("kill {holder}; sleep 0.3")).await;
    guest.unstage(&pvc).await;
    assert_eq!(guest.disks().await, "");
    rig.detach(&pvc, 101).await;
    rig.sim().shutdown().await;
}

/// The node of the image's format, below the limits of the drive.
async fn format_node(rig: &Rig, pvc: &Pvc) -> String {
    let nodes =
        rig.sim().qmp(101, "query-named-block-nodes", json!({ "flat": true })).await.expect("QEMU answers");
    let image = rig.image(pvc);
    let is_its = |node: &&serde_json::Value| node["drv"] == "raw" && image.to_str() == node["file"].as_str();
    let node = nodes.as_array().expect("a list").iter().find(is_its).expect("the image is open");
    node["node-name"].as_str().expect("a name").to_owned()
}

/// Puts something between a disk and its image: errors that QEMU's `blkdebug` makes.
async fn make_fail(rig: &Rig, pvc: &Pvc, kind: &str, errno: i32) {
    let fails = json!({
        "driver": "blkdebug", "node-name": "fails", "image": format_node(rig, pvc).await, "discard": "unmap",
        "inject-error": [{ "event": "none", "iotype": kind, "errno": errno, "once": false, "immediately": false }],
    });
    rig.sim().qmp(101, "blockdev-add", fails).await.expect("a node");
    reopen(rig, &pvc.slot(), "fails").await;
}

async fn reopen(rig: &Rig, slot: &str, file: &str) {
    let options = json!([{
        "driver": "throttle", "node-name": format!("drive-{slot}"), "throttle-group": format!("throttle-drive-{slot}"),
        "file": file, "discard": "ignore", "detect-zeroes": "on", "read-only": false,
    }]);
    rig.sim().qmp(101, "blockdev-reopen", json!({ "options": options })).await.expect("it is reopened");
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_disk_that_fails_to_read_is_never_formatted_by_a_real_kernel() {
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut pvc = rig.volume("pvc-1", "data").await;
    rig.attach(&mut pvc, 101).await;
    make_fail(&rig, &pvc, "read", 5).await;
    let refused = guest.try_stage(&pvc).await.expect_err("nobody knows what is on it");
    assert!(refused.message().contains("os error 5"), "{refused}");
    let image = rig.image(&pvc);
    let blocks = |path: &std::path::Path| {
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).expect("an image"))
    };
    assert_eq!(blocks(&image), 0, "nothing was written");
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_is_full_halts_the_guest_and_loses_nothing() {
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut pvc = rig.volume("pvc-1", "data").await;
    rig.attach(&mut pvc, 101).await;
    guest.stage(&pvc).await;
    let below = format_node(&rig, &pvc).await;
    make_fail(&rig, &pvc, "write", 28).await;
    guest
        .sh(&format!(
            "(cd {STAGING}; head -c 4000000 /dev/urandom >data; sync; sha256sum data) </dev/null >/tmp/sum 2>&1 &"
        ))
        .await;
    // QEMU halts a VM whose storage has no room (`werror=enospc`), and Proxmox says so.
    rig.qmp_status(101, "io-error").await;
    reopen(&rig, &pvc.slot(), &below).await;
    rig.bench.admin("POST", "/nodes/pve1/qemu/101/status/resume", "").await;
    rig.qmp_status(101, "running").await;
    let sum = guest
        .sh(&format!("while ! grep -q data /tmp/sum; do sleep 0.2; done; cd {STAGING}; sync; sha256sum data"))
        .await;
    assert_eq!(guest.sh("cat /tmp/sum").await, sum);
    guest.unstage(&pvc).await;
    rig.detach(&pvc, 101).await;
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pauses_of_proxmox_are_kept_with_a_real_qemu() {
    let rig = Setup { time: Profile::Recorded, ..Setup::of(&[101]) }.boot().await;
    let mut pvc = rig.volume("pvc-1", "data").await;
    rig.attach(&mut pvc, 101).await;
    let started = tokio::time::Instant::now();
    rig.detach(&pvc, 101).await;
    // It looks for the disk, and then for its controller, a second after it has asked for their removal.
    assert!(started.elapsed() >= std::time::Duration::from_secs(1), "{:?}", started.elapsed());
    rig.sim().shutdown().await;
}
