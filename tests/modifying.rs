//! What may change of a volume while it exists, and what the cluster says of its end: over the simulator in process, on a paused clock.

mod support;

use proxmox_csi::csi::proto::{controller_server::Controller as _, volume_capability::access_mode::Mode};
use serde_json::json;
use support::{Bench, CSI, GIB, assert_refused, new_volume, of_all_types, strings};
use tonic::{Code, Request};

/// The options of a volume's drive in a VM that may be changed, and how many options there are in all.
fn options(bench: &Bench, vmid: u32, volume_id: &str) -> (Vec<String>, usize) {
    let slots = bench.slots(vmid, volume_id);
    assert_eq!((slots.current.len(), slots.pending.len(), slots.qemu), (1, 0, 1), "{slots:?}");
    let drive = bench.sim.vm(vmid).expect("a vm").current(&slots.current[0]).expect("a drive").to_owned();
    let mutable = |option: &&str| ["backup=", "iops", "mbps"].iter().any(|start| option.starts_with(start));
    (drive.split(',').filter(mutable).map(str::to_owned).collect(), drive.split(',').count())
}

#[tokio::test(start_paused = true)]
async fn a_change_shows_in_the_drive_at_once_and_can_be_repeated_and_taken_back() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    let (before, all) = options(&bench, 101, &volume);
    assert_eq!(before, ["backup=0"]);
    for _ in 0..2 {
        bench.modify(&volume, &[("diskIOPS", "1000"), ("diskMBps", "50")]).await.expect("changed");
        let (now, count) = options(&bench, 101, &volume);
        assert_eq!(now, ["backup=0", "iops_rd=1000", "iops_wr=1000", "mbps_rd=50", "mbps_wr=50"]);
        assert_eq!(count, all + 4, "nothing else has changed");
    }
    // What is not named stays.
    bench.modify(&volume, &[("diskMBps", "0"), ("backup", "true")]).await.expect("changed");
    assert_eq!(options(&bench, 101, &volume).0, ["backup=1", "iops_rd=1000", "iops_wr=1000"]);
    bench.modify(&volume, &[("diskIOPS", "0"), ("backup", "false")]).await.expect("changed");
    assert_eq!(options(&bench, 101, &volume), (before, all));
    bench.sim.clear_log();
    bench.modify(&volume, &[("diskIOPS", "0")]).await.expect("nothing to change");
    assert!(bench.sim.log().iter().all(|entry| entry.method == "GET"));
}

#[tokio::test(start_paused = true)]
async fn a_change_survives_detach_attach_and_a_new_controller() {
    let bench = Bench::new();
    let mut request = new_volume("pvc-1", "shared");
    request.parameters.insert("diskIOPS".into(), "10".into());
    let volume = bench.create(request.clone()).await.expect("a volume").volume_id;
    // Changed while it is attached nowhere, and once more while it is.
    bench.modify(&volume, &[("diskIOPS", "1000")]).await.expect("changed");
    bench.attach(&volume, "worker-101").await.expect("attached");
    bench.modify(&volume, &[("backup", "1")]).await.expect("changed");
    let changed = ["backup=1", "iops_rd=1000", "iops_wr=1000"];
    assert_eq!(options(&bench, 101, &volume).0, changed);
    bench.detach(&volume, "worker-101").await.expect("detached");
    // A repeated create is no new volume.
    bench.create(request).await.expect("the same volume");
    for bench in [&bench, &bench.restarted()] {
        bench.attach(&volume, "worker-103").await.expect("attached");
        assert_eq!(options(bench, 103, &volume).0, changed);
        bench.detach(&volume, "worker-103").await.expect("detached");
    }
    // It goes with the volume.
    bench.delete(&volume).await.expect("deleted");
    bench.records.lock().expect("no panic").clear();
    let again = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach(&again, "worker-101").await.expect("attached");
    assert_eq!(options(&bench, 101, &again).0, ["backup=0"]);
}

#[tokio::test(start_paused = true)]
async fn what_can_not_be_changed_is_refused_and_nothing_of_it_is_applied() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    let before = bench.sim.vm(101).expect("a vm").conf;
    for (key, value) in [
        ("colour", "red"),
        ("cache", "unsafe"),
        ("storage", "local"),
        ("replicateSchedule", "*/15"),
        ("diskMBps", "fast"),
        ("diskMBps", "-1"),
        ("diskMBps", "5,backup=1"),
        ("backup", "yes"),
    ] {
        let refused = bench.modify(&volume, &[("diskIOPS", "1000"), (key, value)]).await;
        assert_refused(refused, Code::InvalidArgument, &[key]);
        let mut new = new_volume("pvc-2", "shared");
        new.mutable_parameters = strings(&[("diskIOPS", "1000"), (key, value)]);
        assert_refused(bench.create(new).await, Code::InvalidArgument, &[key]);
    }
    assert_refused(bench.modify(&volume, &[]).await, Code::InvalidArgument, &["mutable_parameters"]);
    assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);
    assert!(bench.records.lock().expect("no panic").is_empty());
    for missing in ["test//shared/9999/vm-9999-pvc-9.raw", "non-existing-volume-id"] {
        assert_refused(bench.modify(missing, &[("backup", "1")]).await, Code::NotFound, &[missing]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_drive_that_can_not_be_changed_leaves_all_as_it_was() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    bench.modify(&volume, &[("diskIOPS", "10")]).await.expect("changed");
    let before = options(&bench, 101, &volume);
    let kept = bench.records.lock().expect("no panic").clone();
    bench.sim.set_vm_key(101, "lock", Some("backup"));
    let refused = bench.modify(&volume, &[("diskIOPS", "1000")]).await;
    assert_refused(refused, Code::Unavailable, &["VM 101", "backup"]);
    bench.sim.set_vm_key(101, "lock", None);
    let text = "no such throttle";
    bench.fault(json!({"fault": "fail_task", "worker": "qmconfig", "text": text}));
    assert_refused(bench.modify(&volume, &[("diskIOPS", "1000")]).await, Code::Internal, &[text, "scsi1"]);
    assert_eq!(options(&bench, 101, &volume), before);
    assert_eq!(*bench.records.lock().expect("no panic"), kept);
    bench.modify(&volume, &[("diskIOPS", "1000")]).await.expect("changed");
}

#[tokio::test(start_paused = true)]
async fn p7_options_that_an_administrator_left_pending_are_not_lost() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    let drive = bench.sim.vm(101).expect("a vm").current("scsi1").expect("a drive").to_owned();
    bench.admin("PUT", "/nodes/pve1/qemu/101/config", &format!("scsi1={drive},cache=writeback")).await;
    let before = bench.sim.vm(101).expect("a vm").conf;
    assert!(before.pending.contains_key("scsi1"), "the cache waits for the next start");
    let refused = bench.modify(&volume, &[("diskIOPS", "1000")]).await;
    assert_refused(refused, Code::FailedPrecondition, &["scsi1", "--revert scsi1"]);
    assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_to_a_change_is_asked_again() {
    for fault in ["lose_request", "lose_answer"] {
        let bench = Bench::new();
        let volume = bench.volume("pvc-1", "shared").await.volume_id;
        bench.attach(&volume, "worker-101").await.expect("attached");
        bench.fault(json!({"fault": fault, "method": "POST", "path": "qemu/101/config"}));
        let lost = bench.modify(&volume, &[("diskIOPS", "1000")]).await;
        assert_refused(lost, Code::Unavailable, &["scsi1"]);
        bench.modify(&volume, &[("diskIOPS", "1000")]).await.expect("changed");
        assert_eq!(options(&bench, 101, &volume).0, ["backup=0", "iops_rd=1000", "iops_wr=1000"], "{fault}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_class_wins_over_the_storageclass_of_a_new_volume() {
    let bench = Bench::new();
    let mut request = new_volume("pvc-1", "shared");
    request.parameters.extend(strings(&[("diskIOPS", "10"), ("iops_rd", "11"), ("diskMBps", "5")]));
    request.mutable_parameters = strings(&[("diskIOPS", "1000"), ("backup", "true")]);
    let volume = bench.create(request).await.expect("a volume");
    let mut publish = support::publish(&volume.volume_id, "worker-101");
    publish.volume_context = volume.volume_context;
    bench.controller.controller_publish_volume(Request::new(publish)).await.expect("attached");
    assert_eq!(
        options(&bench, 101, &volume.volume_id).0,
        ["backup=1", "iops_rd=1000", "iops_wr=1000", "mbps_rd=5", "mbps_wr=5"]
    );
}

/// A volume that VM 101 and 103 read.
async fn read_by_two() -> (Bench, String) {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    for node in ["worker-101", "worker-103"] {
        bench.attach_as(&volume, node, Mode::MultiNodeReaderOnly, true).await.expect("attached");
    }
    (bench, volume)
}

#[tokio::test(start_paused = true)]
async fn of_vms_that_read_a_volume_none_is_changed_where_one_can_not_be() {
    let (bench, volume) = read_by_two().await;
    bench.modify(&volume, &[("diskIOPS", "10")]).await.expect("changed");
    let confs = || [101, 103].map(|vmid| bench.sim.vm(vmid).expect("a vm").conf);
    let kept = || bench.records.lock().expect("no panic").clone();
    let (before, record) = (confs(), kept());
    let change = [("diskIOPS", "1000"), ("diskMBps", "7"), ("backup", "1")];

    for locked in [101, 103] {
        bench.sim.set_vm_key(locked, "lock", Some("backup"));
        let refused = bench.modify(&volume, &change).await;
        assert_refused(refused, Code::Unavailable, &[&format!("VM {locked}"), "backup"]);
        bench.sim.set_vm_key(locked, "lock", None);
        assert_eq!((confs(), kept()), (before.clone(), record.clone()));
    }
    // What only shows when it is tried: the QEMU of the second does not answer.
    for hung in [103, 101] {
        bench.fault(json!({"fault": "hang_qemu", "vmid": hung}));
        let refused = bench.modify(&volume, &change).await;
        let names = ["query-machines", &format!("VM {hung}"), "(the pending change was taken back)"];
        assert_refused(refused, Code::Unavailable, &names);
        bench.fault(json!({"fault": "hang_qemu", "vmid": hung, "on": false}));
        assert_eq!((confs(), kept()), (before.clone(), record.clone()));
    }
    let drive = bench.sim.vm(103).expect("a vm").current("scsi1").expect("a drive").to_owned();
    bench.admin("PUT", "/nodes/pve2/qemu/103/config", &format!("scsi1={drive},cache=writeback")).await;
    let waiting = confs();
    assert_refused(bench.modify(&volume, &change).await, Code::FailedPrecondition, &["VM 103", "scsi1"]);
    assert_eq!((confs(), kept()), (waiting, record));
}

#[tokio::test(start_paused = true)]
async fn all_vms_that_read_a_volume_are_changed() {
    let (bench, volume) = read_by_two().await;
    bench.modify(&volume, &[("diskMBps", "7")]).await.expect("changed");
    for vmid in [101, 103] {
        assert_eq!(options(&bench, vmid, &volume).0, ["backup=0", "mbps_rd=7", "mbps_wr=7"]);
    }
}

#[tokio::test(start_paused = true)]
async fn compat_19_a_disk_is_kept_where_the_pv_says_so() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.records.lock().expect("no panic").entry(volume.clone()).or_default().keep = true;
    bench.sim.clear_log();
    bench.delete(&volume).await.expect("deleted, as far as Kubernetes is concerned");
    // The PV is gone now, and the call is repeated because its answer was lost.
    bench.records.lock().expect("no panic").clear();
    bench.delete(&volume).await.expect("deleted");
    assert!(bench.sim.volumes().iter().any(|v| v.key.name.contains("pvc-1")), "the disk is kept");
    assert!(bench.sim.log().is_empty(), "and not even looked at");
    let other = bench.volume("pvc-2", "shared").await.volume_id;
    bench.delete(&other).await.expect("deleted");
    assert!(!bench.sim.volumes().iter().any(|v| v.key.name.contains("pvc-2")));
}

// --- Size ---

fn guest_size(bench: &Bench, vmid: u32) -> i64 {
    let disks = bench.sim.vm(vmid).expect("a vm").guest_disks();
    let disk = disks.into_iter().find(|disk| disk.slot == 1).expect("the guest has the disk");
    i64::try_from(disk.size).expect("a size")
}

fn stored_size(bench: &Bench, volume: &str) -> i64 {
    let volumes = bench.sim.volumes();
    let found = volumes.iter().find(|v| support::volid(volume).ends_with(&v.key.name)).expect("a volume");
    i64::try_from(found.size).expect("a size")
}

#[tokio::test(start_paused = true)]
async fn an_expansion_that_qemu_did_not_hear_of_is_finished_by_the_next_one() {
    for storage in ["a-lvmthin", "a-zfspool", "a-rbd", "local"] {
        let bench = Bench::with(of_all_types(), CSI);
        let volume = bench.volume("pvc-1", storage).await.volume_id;
        bench.attach(&volume, "worker-101").await.expect("attached");
        bench.fault(json!({"fault": "hang_qemu", "vmid": 101}));
        for _ in 0..3 {
            let refused = bench.expand(&volume, 2 * GIB).await;
            assert_refused(refused, Code::Unavailable, &["VM 101"]);
            // No try makes it larger than what was asked for.
            assert!(stored_size(&bench, &volume) <= 2 * GIB, "{storage}");
            assert_eq!(guest_size(&bench, 101), GIB, "{storage}");
        }
        let half_done = matches!(storage, "a-lvmthin" | "a-zfspool");
        assert_eq!(stored_size(&bench, &volume) == 2 * GIB, half_done, "{storage}");
        bench.fault(json!({"fault": "hang_qemu", "vmid": 101, "on": false}));

        // Proxmox answers OK to the same size and does nothing: where no other is allowed, that is no success.
        if half_done {
            let refused = bench.expand_within(&volume, 2 * GIB, 2 * GIB).await;
            assert_refused(refused, Code::Aborted, &["2 GiB", "detach it and attach it again"]);
            assert_eq!((stored_size(&bench, &volume), guest_size(&bench, 101)), (2 * GIB, GIB), "{storage}");
            let limit = 2 * GIB + (5 << 20);
            let grown = bench.expand_within(&volume, 2 * GIB, limit).await.expect("grown within the limit");
            assert!(grown.capacity_bytes > 2 * GIB && grown.capacity_bytes <= limit, "{grown:?}");
        }
        for _ in 0..2 {
            let grown = bench.expand(&volume, 2 * GIB).await.expect("grown");
            assert!(
                grown.capacity_bytes >= 2 * GIB && grown.capacity_bytes < 3 * GIB,
                "{storage}: {grown:?}"
            );
            assert_eq!(guest_size(&bench, 101), grown.capacity_bytes, "{storage}");
            assert_eq!(stored_size(&bench, &volume), grown.capacity_bytes, "{storage}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_several_vms_read_is_not_expanded() {
    let (bench, volume) = read_by_two().await;
    for bench in [&bench, &bench.restarted()] {
        let refused = bench.expand(&volume, 2 * GIB).await;
        assert_refused(refused, Code::FailedPrecondition, &["VM 101", "VM 103"]);
        assert_eq!(stored_size(bench, &volume), GIB);
    }
    // With one reader left it grows in that one.
    bench.detach(&volume, "worker-103").await.expect("detached");
    bench.expand(&volume, 2 * GIB).await.expect("grown");
    assert_eq!(guest_size(&bench, 101), 2 * GIB);
}
