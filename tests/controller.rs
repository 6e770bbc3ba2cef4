//! The controller's promises, acted through its RPCs over the simulator in process, under the paused clock.

mod support;

use std::time::Duration;

use proxmox_csi::{
    csi::proto::{self, controller_server::Controller as _},
    sim::World,
};
use serde_json::json;
use support::{Bench, CSI, GIB, HOLDER, Slots, assert_refused, new_volume, volid};
use tonic::{Code, Request};

/// A volume that is attached as it should be.
#[track_caller]
fn assert_attached(bench: &Bench, vmid: u32, volume_id: &str) {
    let slots = bench.slots(vmid, volume_id);
    assert_eq!((slots.current.len(), slots.pending.len(), slots.qemu), (1, 0, 1), "{slots:?}");
}

#[track_caller]
fn assert_not_attached(bench: &Bench, vmid: u32, volume_id: &str) {
    assert_eq!(bench.slots(vmid, volume_id), Slots::default());
}

// --- The life of a volume ---

#[tokio::test(start_paused = true)]
async fn a_volume_is_created_attached_detached_and_deleted_and_each_step_repeats() {
    let bench = Bench::new();
    for storage in ["local", "shared"] {
        let volume = bench.volume("pvc-1", storage).await;
        assert_eq!(bench.volume("pvc-1", storage).await, volume);
        let zone = if storage == "local" { "pve1" } else { "" };
        assert_eq!(volume.volume_id, format!("test/{zone}/{storage}/9999/vm-9999-pvc-1.raw"));
        assert_eq!(volume.capacity_bytes, GIB);
        assert_eq!(volume.accessible_topology[0].segments.len(), if zone.is_empty() { 1 } else { 2 });

        let context = bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
        assert_eq!(bench.attach(&volume.volume_id, "worker-101").await.expect("still attached"), context);
        assert!(context["DevicePath"].starts_with("/dev/disk/by-id/wwn-0x3c51"), "{context:?}");
        assert_eq!(context["lun"], "1");
        assert_attached(&bench, 101, &volume.volume_id);

        for _ in 0..2 {
            bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
            assert_not_attached(&bench, 101, &volume.volume_id);
        }
        for _ in 0..2 {
            bench.delete(&volume.volume_id).await.expect("deleted");
        }
        bench.detach(&volume.volume_id, "worker-101").await.expect("a deleted volume is detached");
        assert!(!bench.sim.volumes().iter().any(|v| v.key.name.contains("pvc-1")));
    }
}

#[tokio::test(start_paused = true)]
async fn every_request_to_proxmox_is_one_that_it_has() {
    let bench = Bench::with(World::builtin(), HOLDER);
    let volume = bench.volume("pvc-1", "local").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.expand(&volume.volume_id, 2 * GIB).await.expect("grown");
    bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
    bench.expand(&volume.volume_id, 3 * GIB).await.expect("grown");
    bench.delete(&volume.volume_id).await.expect("deleted");
    let bad: Vec<_> = bench.sim.log().into_iter().filter(|entry| entry.status != 200).collect();
    // A volume is looked for before its name is allocated for the first time; nothing else may fail.
    assert!(bad.iter().all(|e| e.method == "GET" && e.path.contains("/content/")), "{bad:?}");
}

#[tokio::test(start_paused = true)]
async fn a_name_with_another_size_is_refused() {
    let bench = Bench::new();
    bench.volume("pvc-1", "shared").await;
    let mut other = new_volume("pvc-1", "shared");
    other.capacity_range.as_mut().expect("a range").required_bytes = 2 * GIB;
    assert_refused(bench.create(other).await, Code::AlreadyExists, &["vm-9999-pvc-1.raw", "1 GiB"]);
}

// --- P1: one writer ---

#[tokio::test(start_paused = true)]
async fn p1_a_volume_that_another_vm_holds_is_not_attached() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    let refused = bench.attach(&volume.volume_id, "worker-103").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 101", "scsi1", "worker-103"]);
    assert_attached(&bench, 101, &volume.volume_id);
    assert_not_attached(&bench, 103, &volume.volume_id);
}

#[tokio::test(start_paused = true)]
async fn p1_a_pending_plug_of_another_vm_counts() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.sim.set_vm_key(101, "hotplug", Some("0"));
    let form = format!("scsi5={}", volid(&volume.volume_id));
    bench.admin("PUT", "/nodes/pve1/qemu/101/config", &form).await;
    assert_eq!(bench.slots(101, &volume.volume_id).pending, ["scsi5"]);
    let refused = bench.attach(&volume.volume_id, "worker-103").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 101", "scsi5"]);
}

#[tokio::test(start_paused = true)]
async fn p1_a_drive_that_only_the_qemu_of_another_vm_knows_counts() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    // Somebody edited the config file: QEMU still has the disk.
    bench.sim.set_vm_key(101, "scsi1", None);
    let refused = bench.attach(&volume.volume_id, "worker-103").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 101", "scsi1", "QEMU"]);
    assert_not_attached(&bench, 103, &volume.volume_id);
}

#[tokio::test(start_paused = true)]
async fn p1_vms_that_the_token_may_not_see_are_not_taken_for_absent() {
    let mut world = World::builtin();
    // The token's rights end where somebody took them away for one VM.
    world.roles.insert("Switch".into(), ["VM.PowerMgmt".to_owned()].into());
    let entry = json!({"path": "/vms/101", "role": "Switch", "who": CSI});
    world.acl.push(serde_json::from_value(entry).expect("an ACL entry"));
    let bench = Bench::with(world, CSI);
    let volume = bench.volume("pvc-1", "shared").await;
    let form = format!("scsi5={}", volid(&volume.volume_id));
    bench.admin("PUT", "/nodes/pve1/qemu/101/config", &form).await;
    let refused = bench.attach(&volume.volume_id, "worker-103").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM.Audit", "/vms/101"]);
    assert_refused(bench.delete(&volume.volume_id).await, Code::FailedPrecondition, &["VM.Audit"]);
}

#[tokio::test(start_paused = true)]
async fn p1_two_attaches_at_once_end_in_one_vm() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    let id = volume.volume_id.as_str();
    let (a, b) = tokio::join!(bench.attach(id, "worker-101"), bench.attach(id, "worker-103"));
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    assert_eq!(bench.slots(101, id).qemu + bench.slots(103, id).qemu, 1);
}

#[tokio::test(start_paused = true)]
async fn p1_a_controller_without_the_lease_answers_nothing_and_asks_nothing() {
    let mut bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let leads = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let told = std::sync::Arc::clone(&leads);
    let gate = std::sync::Arc::new(move || told.load(std::sync::atomic::Ordering::Relaxed));
    bench.controller = bench.controller.clone().behind(gate);
    bench.sim.clear_log();
    assert_refused(bench.create(new_volume("pvc-2", "shared")).await, Code::Unavailable, &["lease"]);
    assert_refused(bench.attach(&volume, "worker-101").await, Code::Unavailable, &["lease"]);
    // Nothing is attached, but who does not lead can't know that it stays so.
    assert_refused(bench.detach(&volume, "worker-101").await, Code::Unavailable, &["lease"]);
    assert_refused(bench.expand(&volume, 2 * GIB).await, Code::Unavailable, &["lease"]);
    assert_refused(bench.delete(&volume).await, Code::Unavailable, &["lease"]);
    assert_refused(bench.modify(&volume, &[("backup", "1")]).await, Code::Unavailable, &["lease"]);
    assert_refused(bench.list(0, "").await, Code::Unavailable, &["lease"]);
    let get = proto::ControllerGetVolumeRequest { volume_id: volume.clone() };
    let got = bench.controller.controller_get_volume(Request::new(get)).await;
    assert_refused(got, Code::Unavailable, &["lease"]);
    let validate = proto::ValidateVolumeCapabilitiesRequest {
        volume_id: volume.clone(),
        volume_capabilities: vec![support::mount()],
        ..Default::default()
    };
    let validated = bench.controller.validate_volume_capabilities(Request::new(validate.clone())).await;
    assert_refused(validated, Code::Unavailable, &["lease"]);
    let room = bench.controller.get_capacity(Request::new(proto::GetCapacityRequest::default())).await;
    assert_refused(room, Code::Unavailable, &["lease"]);
    assert!(bench.sim.log().is_empty());
    leads.store(true, std::sync::atomic::Ordering::Relaxed);
    bench.controller.validate_volume_capabilities(Request::new(validate)).await.expect("an answer");
    bench.attach(&volume, "worker-101").await.expect("attached");
}

// --- P2: true answers ---

#[tokio::test(start_paused = true)]
async fn p2_attach_and_detach_with_hotplug_off_are_refused_and_change_nothing() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    bench.sim.set_vm_key(101, "hotplug", Some("network,usb"));
    let before = bench.sim.vm(101).expect("a vm").conf;
    let refused = bench.attach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::FailedPrecondition, &["qm set 101 --hotplug network,disk,usb"]);
    assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);

    bench.sim.set_vm_key(101, "hotplug", None);
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.sim.set_vm_key(101, "hotplug", Some("0"));
    let refused = bench.detach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::FailedPrecondition, &["qm set 101 --hotplug"]);
    assert_attached(&bench, 101, &volume.volume_id);
}

#[tokio::test(start_paused = true)]
async fn p2_an_unplug_that_fails_is_no_detach_and_leaves_nothing_pending() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.fault(json!({"fault": "hang_unplug", "vmid": 101}));
    let status = bench.detach(&volume.volume_id, "worker-101").await.expect_err("not detached");
    assert!(status.message().contains("still busy in guest?"), "{}", status.message());
    let vm = bench.sim.vm(101).expect("a vm");
    assert!(vm.conf.pending_delete.is_empty(), "{:?}", vm.conf.pending_delete);
    // While it is not detached it goes to no other VM.
    assert_refused(
        bench.attach(&volume.volume_id, "worker-103").await,
        Code::FailedPrecondition,
        &["VM 101"],
    );
    bench.fault(json!({"fault": "hang_unplug", "vmid": 101, "on": false}));
    bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
    assert_not_attached(&bench, 101, &volume.volume_id);
}

#[tokio::test(start_paused = true)]
async fn p2_a_half_done_unplug_is_mended_by_the_next_attach() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.fault(json!({"fault": "hang_unplug", "vmid": 101}));
    bench.detach(&volume.volume_id, "worker-101").await.expect_err("not detached");
    bench.fault(json!({"fault": "hang_unplug", "vmid": 101, "on": false}));
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached again");
    assert_attached(&bench, 101, &volume.volume_id);
}

#[tokio::test(start_paused = true)]
async fn p2_a_hung_qemu_is_not_known_to_have_or_lack_a_disk() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.fault(json!({"fault": "hang_qemu", "vmid": 101}));
    assert_refused(bench.attach(&volume.volume_id, "worker-101").await, Code::Unavailable, &["QEMU", "101"]);
    bench.detach(&volume.volume_id, "worker-101").await.expect_err("not known to be detached");
    assert!(bench.sim.vm(101).expect("a vm").conf.pending_delete.is_empty());
    bench.fault(json!({"fault": "hang_qemu", "vmid": 101, "on": false}));
    assert_attached(&bench, 101, &volume.volume_id);
    bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
}

#[tokio::test(start_paused = true)]
async fn p2_a_config_without_the_disk_is_no_detach_while_qemu_may_have_it() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    // Somebody edited the config file: QEMU still has the disk.
    bench.sim.set_vm_key(101, "scsi1", None);
    let refused = bench.detach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::FailedPrecondition, &["QEMU", "101", "scsi1"]);
    bench.fault(json!({"fault": "hang_qemu", "vmid": 101}));
    let refused = bench.detach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::Unavailable, &["QEMU", "101", "does not answer"]);
}

#[tokio::test(start_paused = true)]
async fn p2_a_node_that_is_gone_is_no_detach_while_a_qemu_may_have_the_disk() {
    // VM 102 is no node's, and its QEMU has a disk that its config does not know any more.
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-102").await.expect("attached");
    bench.sim.set_vm_key(102, "scsi1", None);
    bench.sim.set_vm_key(102, "smbios1", Some("uuid=00000000-0000-4000-8000-000000000001"));
    for node in ["worker-102", "worker-of-yesterday"] {
        let refused = bench.detach(&volume.volume_id, node).await;
        assert_refused(refused, Code::FailedPrecondition, &["QEMU", "102", "scsi1"]);
    }
}

#[tokio::test(start_paused = true)]
async fn p1_a_volume_that_a_qemu_may_have_is_put_into_no_holder() {
    let bench = Bench::with(World::builtin(), HOLDER);
    let vms = bench.sim.vmids();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.sim.set_vm_key(101, "scsi1", None);
    let refused = bench.expand(&volume.volume_id, 2 * GIB).await;
    assert_refused(refused, Code::FailedPrecondition, &["QEMU", "101", "scsi1"]);
    assert_eq!(bench.sim.vmids(), vms);
}

#[tokio::test(start_paused = true)]
async fn p2_a_volume_made_again_is_not_taken_for_the_one_that_was_deleted() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.delete(&volume.volume_id).await.expect("deleted");
    bench.delete(&volume.volume_id).await.expect("a repeated call");
    bench.volume("pvc-1", "shared").await;
    // The storage can't show it any more, and lists nothing: that was enough for the repeated call, and is not now.
    let text = "volume_size_info on 'shared:9999/vm-9999-pvc-1.raw' failed - no format";
    let path = "storage/shared/content/";
    bench.fault(json!({"fault": "refuse", "method": "GET", "path": path, "times": 2, "text": text}));
    bench.delete(&volume.volume_id).await.expect_err("not seen, and not proven absent");
    assert!(bench.sim.volumes().iter().any(|v| v.key.name.contains("pvc-1")));
}

#[tokio::test(start_paused = true)]
async fn p2_a_plug_that_fails_leaves_nothing_pending() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    let text = "hotplug problem - adding drive failed";
    bench.fault(json!({"fault": "fail_task", "worker": "qmconfig", "text": text}));
    let status = bench.attach(&volume.volume_id, "worker-101").await.expect_err("not attached");
    assert!(status.message().contains(text), "{}", status.message());
    assert_not_attached(&bench, 101, &volume.volume_id);
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
}

#[tokio::test(start_paused = true)]
async fn p2_a_late_detach_does_not_pull_the_disk_from_its_new_home() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
    bench.attach(&volume.volume_id, "worker-103").await.expect("moved");
    bench.detach(&volume.volume_id, "worker-101").await.expect("detached from there long ago");
    bench.detach(&volume.volume_id, "worker-of-yesterday").await.expect("no such node any more");
    assert_attached(&bench, 103, &volume.volume_id);
}

#[tokio::test(start_paused = true)]
async fn p2_a_vm_created_anew_under_the_same_id_is_a_stranger() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.sim.set_vm_key(101, "smbios1", Some("uuid=00000000-0000-4000-8000-000000000001"));
    // The node's VM is gone; VM 101 is nobody's, and the volume must leave it before it can be said to be detached.
    bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
    assert_not_attached(&bench, 101, &volume.volume_id);
    let refused = bench.attach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::NotFound, &["worker-101", "uuid"]);
    assert_not_attached(&bench, 101, &volume.volume_id);
}

#[tokio::test(start_paused = true)]
async fn p2_lost_requests_and_answers_end_in_one_slot_after_a_retry() {
    for fault in ["lose_request", "lose_answer"] {
        for (method, path) in
            [("POST", "qemu/101/config"), ("GET", "tasks/UPID"), ("GET", "101/status/current")]
        {
            let bench = Bench::new();
            let volume = bench.volume("pvc-1", "shared").await;
            bench.fault(json!({"fault": fault, "method": method, "path": path, "times": 4}));
            let mut calls = 0;
            while let Err(status) = bench.attach(&volume.volume_id, "worker-101").await {
                assert_eq!(status.code(), Code::Unavailable, "{fault} {path}: {}", status.message());
                calls += 1;
                assert!(calls < 10, "{fault} {path}: {}", status.message());
            }
            assert_attached(&bench, 101, &volume.volume_id);
            bench.fault(json!({"fault": fault, "method": method, "path": path, "times": 2}));
            while let Err(status) = bench.detach(&volume.volume_id, "worker-101").await {
                assert_eq!(status.code(), Code::Unavailable, "{fault} {path}: {}", status.message());
                calls += 1;
                assert!(calls < 20);
            }
            assert_not_attached(&bench, 101, &volume.volume_id);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_allocation_makes_one_volume_after_a_retry() {
    for fault in ["lose_request", "lose_answer"] {
        let bench = Bench::new();
        bench.fault(json!({"fault": fault, "method": "POST", "path": "/storage/local/content"}));
        assert_refused(bench.create(new_volume("pvc-1", "local")).await, Code::Unavailable, &["pvc-1"]);
        bench.volume("pvc-1", "local").await;
        assert_eq!(bench.sim.volumes().iter().filter(|v| v.key.name.contains("pvc-1")).count(), 1);
    }
}

// --- P3: the right disk ---

#[tokio::test(start_paused = true)]
async fn p3_both_handle_forms_of_a_shared_volume_give_one_name() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    let context = bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    let old_form = volume.volume_id.replacen("test//", "test/pve2/", 1);
    assert_eq!(bench.attach(&old_form, "worker-101").await.expect("the same volume"), context);
    assert_attached(&bench, 101, &volume.volume_id);
}

// --- P6: a dropped call does no harm ---

#[tokio::test(start_paused = true)]
async fn p6_a_dropped_attach_runs_to_its_end_and_a_retry_joins_it() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.fault(json!({"fault": "delay_task", "worker": "qmconfig", "ms": 20_000}));
    let call = bench.attach(&volume.volume_id, "worker-101");
    assert!(
        tokio::time::timeout(Duration::from_secs(2), call).await.is_err(),
        "the call is dropped half way"
    );
    let other = bench.attach(&volume.volume_id, "worker-103").await;
    assert_refused(other, Code::Aborted, &["still running"]);
    bench.attach(&volume.volume_id, "worker-101").await.expect("joins the running one");
    assert_attached(&bench, 101, &volume.volume_id);
    let posts =
        bench.sim.log().into_iter().filter(|e| e.method == "POST" && e.path.contains("101/config")).count();
    assert_eq!(posts, 1);
}

// --- P7 and the right codes: what is refused names the thing and the remedy, and changes nothing ---

#[tokio::test(start_paused = true)]
async fn a_locked_vm_is_not_changed() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    bench.sim.set_vm_key(101, "lock", Some("backup"));
    let before = bench.sim.vm(101).expect("a vm").conf;
    let refused = bench.attach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::Unavailable, &["VM 101", "backup", "qm unlock 101"]);
    assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);
}

#[tokio::test(start_paused = true)]
async fn a_full_bus_is_resource_exhausted_and_nothing_is_replaced() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    for slot in 1..=30 {
        bench.sim.set_vm_key(
            101,
            &format!("scsi{slot}"),
            Some(&format!("local:101/vm-101-disk-{slot}.raw,size=1G")),
        );
    }
    let before = bench.sim.vm(101).expect("a vm").conf;
    let refused = bench.attach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::ResourceExhausted, &["VM 101", "scsi1 to scsi30"]);
    assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);
}

#[tokio::test(start_paused = true)]
async fn a_vm_without_virtio_scsi_is_refused_with_the_remedy() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    for (scsihw, named) in [(None, "lsi"), (Some("megasas"), "megasas")] {
        bench.sim.set_vm_key(101, "scsihw", scsihw);
        let before = bench.sim.vm(101).expect("a vm").conf;
        let refused = bench.attach(&volume.volume_id, "worker-101").await;
        assert_refused(refused, Code::FailedPrecondition, &[named, "qm set 101 --scsihw virtio-scsi-single"]);
        assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_or_full_storage_is_named() {
    let bench = Bench::new();
    let refused = bench.create(new_volume("pvc-1", "nope")).await;
    assert_refused(refused, Code::InvalidArgument, &["`nope`", "Datastore.Audit", "local"]);
    let mut huge = new_volume("pvc-1", "local");
    huge.capacity_range.as_mut().expect("a range").required_bytes = 1000 * GIB;
    assert_refused(bench.create(huge).await, Code::ResourceExhausted, &["local", "1000 GiB", "pve1"]);
    bench.fault(json!({"fault": "fill_storage", "storage": "local"}));
    assert_refused(bench.create(new_volume("pvc-1", "local")).await, Code::ResourceExhausted, &["local"]);
    assert!(!bench.sim.volumes().iter().any(|v| v.key.name.contains("pvc-1")));
}

#[tokio::test(start_paused = true)]
async fn a_wrong_token_and_a_missing_privilege_are_told_apart() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    let nobody = Bench::with(World::builtin(), "nobody@pve!tok");
    let refused = nobody.create(new_volume("pvc-1", "local")).await;
    assert_refused(refused, Code::InvalidArgument, &["sees no storage", "Datastore.Audit"]);
    bench.fault(json!({"fault": "expire_token", "token": CSI}));
    let refused = bench.attach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::Unauthenticated, &["401", "Authentication failed!"]);
}

#[tokio::test(start_paused = true)]
async fn foreign_handles_are_refused_and_nothing_is_asked_of_proxmox() {
    let bench = Bench::new();
    let asked = bench.sim.log().len();
    assert_refused(
        bench.attach("fake-vol-id-1234", "worker-101").await,
        Code::NotFound,
        &["fake-vol-id-1234"],
    );
    bench.detach("fake-vol-id-1234", "worker-101").await.expect("nothing of it is attached");
    bench.delete("fake-vol-id-1234").await.expect("nothing of it is there");
    assert_refused(
        bench.delete("elsewhere//shared/9999/vm-9999-pvc-1.raw").await,
        Code::FailedPrecondition,
        &["elsewhere", "config"],
    );
    for result in [
        bench.delete("test//shared/9999/x,y.raw").await,
        bench.detach("test//shared/9999/x,y.raw", "worker-101").await,
    ] {
        assert_refused(result, Code::InvalidArgument, &["x,y.raw"]);
    }
    assert_eq!(bench.sim.log().len(), asked);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_node_and_a_node_in_another_zone_are_named() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    assert_refused(bench.attach(&volume.volume_id, "worker-7").await, Code::NotFound, &["worker-7"]);
    let refused = bench.attach(&volume.volume_id, "worker-103").await;
    assert_refused(refused, Code::FailedPrecondition, &["pve1", "pve2", "VM 103"]);
}

#[tokio::test(start_paused = true)]
async fn a_volume_in_use_is_not_deleted() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    assert_refused(bench.delete(&volume.volume_id).await, Code::FailedPrecondition, &["VM 101", "scsi1"]);
    assert!(bench.sim.volumes().iter().any(|v| v.key.name.contains("pvc-1")));
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_a_snapshot_references_is_not_deleted() {
    let mut world = World::builtin();
    // A snapshot takes all disks of a VM, and raw files can't be snapshotted.
    let boot = "local:101/vm-101-disk-0.qcow2,size=1G";
    world.vms[0].config.insert("scsi0".into(), boot.into());
    let bench = Bench::with(world, CSI);
    let mut request = new_volume("pvc-1", "local");
    request.parameters.insert("storageFormat".into(), "qcow2".into());
    let volume = bench.create(request).await.expect("a volume");
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.admin("POST", "/nodes/pve1/qemu/101/snapshot", "snapname=before-upgrade").await;
    // The snapshot is a task of its own; the detach waits for the VM's lock.
    tokio::time::sleep(Duration::from_secs(5)).await;
    bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
    let refused = bench.delete(&volume.volume_id).await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 101", "snapshot `before-upgrade`"]);
    // The pod may go elsewhere all the same.
    bench.attach(&volume.volume_id, "worker-102").await.expect("attached");
    bench.detach(&volume.volume_id, "worker-102").await.expect("detached");
    assert!(bench.sim.volumes().iter().any(|v| v.key.name.contains("pvc-1")));
    bench.admin("DELETE", "/nodes/pve1/qemu/101/snapshot/before-upgrade", "").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    bench.delete(&volume.volume_id).await.expect("deleted");
}

#[tokio::test(start_paused = true)]
async fn p7_the_own_disk_of_a_vm_is_detached_and_never_destroyed() {
    // A hand-made PV may be any disk, also one that the VM it is attached to owns: Proxmox then keeps it as unusedN, and deleting that
    // would destroy the data.
    let bench = Bench::new();
    bench.admin("PUT", "/nodes/pve1/qemu/101/config", "scsi4=local:1").await;
    let disk = bench.sim.vm(101).expect("a vm").current("scsi4").expect("a disk").to_owned();
    let volid = disk.split(',').next().expect("a volid").to_owned();
    let handle = format!("test/pve1/{}", volid.replacen(':', "/", 1));
    for _ in 0..2 {
        bench.detach(&handle, "worker-101").await.expect("detached");
        let vm = bench.sim.vm(101).expect("a vm");
        assert_eq!((vm.current("scsi4"), vm.current("unused0")), (None, Some(volid.as_str())));
        assert!(bench.sim.volumes().iter().any(|v| volid.ends_with(&v.key.name)), "the data is gone");
    }
    assert_refused(bench.delete(&handle).await, Code::FailedPrecondition, &["VM 101"]);
}

#[tokio::test(start_paused = true)]
async fn operations_that_wait_for_a_sweep_share_it() {
    let bench = Bench::new();
    let mut volumes = Vec::new();
    for index in 0..10 {
        volumes.push(bench.volume(&format!("pvc-{index}"), "shared").await.volume_id);
    }
    bench.sim.clear_log();
    let calls = volumes.iter().map(|volume| bench.delete(volume));
    for deleted in futures_util::future::join_all(calls).await {
        deleted.expect("deleted");
    }
    let sweeps = bench.sim.log().iter().filter(|e| e.path.contains("/qemu/103/pending")).count();
    assert!(sweeps <= 2, "{sweeps} sweeps for ten deletions");
}

#[tokio::test(start_paused = true)]
async fn the_disk_of_a_vm_is_not_deleted() {
    let bench = Bench::new();
    let boot = bench.sim.vm(101).expect("a vm").current("scsi0").expect("a boot disk").to_owned();
    let volid = boot.split(',').next().expect("a volid");
    let (storage, name) = volid.split_once(':').expect("a volid");
    let handle = format!("test/pve1/{storage}/{name}");
    assert_refused(bench.delete(&handle).await, Code::FailedPrecondition, &["VM 101"]);
    assert_eq!(bench.sim.vm(101).expect("a vm").current("scsi0"), Some(boot.as_str()));
}

#[tokio::test(start_paused = true)]
async fn a_missing_volume_is_not_found() {
    let bench = Bench::new();
    bench.volume("pvc-other", "shared").await;
    let missing = "test//shared/9999/vm-9999-pvc-1.raw";
    assert_refused(bench.attach(missing, "worker-101").await, Code::NotFound, &["pvc-1"]);
    assert_refused(bench.expand(missing, GIB).await, Code::NotFound, &["pvc-1"]);
}

#[tokio::test(start_paused = true)]
async fn a_dead_node_is_unknown_and_not_absent() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-103").await.expect("attached");
    bench.fault(json!({"fault": "kill_node", "node": "pve2"}));
    assert_refused(bench.detach(&volume.volume_id, "worker-103").await, Code::Unavailable, &[]);
    assert_refused(bench.attach(&volume.volume_id, "worker-101").await, Code::Unavailable, &["VM 103"]);
    assert_not_attached(&bench, 101, &volume.volume_id);
}

#[tokio::test(start_paused = true)]
async fn foreign_disks_keep_their_slots() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    bench.admin("PUT", "/nodes/pve1/qemu/101/config", "scsi1=local:1,serial=mine").await;
    let mine = bench.sim.vm(101).expect("a vm").current("scsi1").expect("a disk").to_owned();
    let context = bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    assert_eq!(context["lun"], "2");
    bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
    assert_eq!(bench.sim.vm(101).expect("a vm").current("scsi1"), Some(mine.as_str()));
}

#[tokio::test(start_paused = true)]
async fn p7_an_administrator_who_takes_the_slot_at_the_same_moment_keeps_it() {
    // Between our look and our change somebody plugs a disk into the slot we chose: the digest of what we saw makes Proxmox refuse.
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    bench.fault(json!({"fault": "delay", "method": "POST", "path": "101/config", "ms": 1000}));
    let meanwhile = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        bench.admin("PUT", "/nodes/pve1/qemu/101/config", "scsi1=local:1,serial=mine").await;
    };
    let (attached, ()) = tokio::join!(bench.attach(&volume.volume_id, "worker-101"), meanwhile);
    assert_eq!(attached.expect("attached")["lun"], "2");
    let vm = bench.sim.vm(101).expect("a vm");
    assert!(
        vm.current("scsi1").is_some_and(|disk| disk.contains("serial=mine")),
        "{:?}",
        vm.current("scsi1")
    );
    assert_attached(&bench, 101, &volume.volume_id);
}

// --- Expand ---

#[tokio::test(start_paused = true)]
async fn an_attached_volume_grows_in_its_vm() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    for _ in 0..2 {
        let grown = bench.expand(&volume.volume_id, 2 * GIB).await.expect("grown");
        assert_eq!((grown.capacity_bytes, grown.node_expansion_required), (2 * GIB, true));
    }
    let vm = bench.sim.vm(101).expect("a vm");
    let disk = vm.guest_disks().into_iter().find(|disk| disk.slot == 1).expect("the disk");
    assert_eq!(i64::try_from(disk.size), Ok(2 * GIB));
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_is_attached_nowhere_grows_through_a_holder_that_goes_away() {
    let bench = Bench::with(World::builtin(), HOLDER);
    let vms = bench.sim.vmids();
    let volume = bench.volume("pvc-1", "local").await;
    let grown = bench.expand(&volume.volume_id, 2 * GIB).await.expect("grown");
    assert_eq!(grown.capacity_bytes, 2 * GIB);
    assert_eq!(bench.sim.vmids(), vms);
    assert!(
        bench
            .sim
            .volumes()
            .iter()
            .any(|v| v.key.name.contains("pvc-1") && i64::try_from(v.size) == Ok(2 * GIB))
    );
}

#[tokio::test(start_paused = true)]
async fn without_the_right_to_make_a_holder_the_remedy_is_named() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    let refused = bench.expand(&volume.volume_id, 2 * GIB).await;
    assert_refused(refused, Code::FailedPrecondition, &["VM.Allocate", "while it is attached"]);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_was_left_over_is_finished_off() {
    for then in ["expand", "attach", "delete"] {
        let bench = Bench::with(World::builtin(), HOLDER);
        let vms = bench.sim.vmids();
        let volume = bench.volume("pvc-1", "local").await;
        // The resize fails, and so do the removals that follow it.
        bench.fault(json!({"fault": "fail_task", "worker": "resize", "text": "on purpose"}));
        bench.fault(json!({"fault": "refuse", "method": "POST", "path": "/config", "skip": 1, "times": 3, "text": "on purpose"}));
        bench.expand(&volume.volume_id, 2 * GIB).await.expect_err("fails half way");
        assert_eq!(bench.sim.vmids().len(), vms.len() + 1, "a holder is left over");
        bench.sim.clear_faults();
        match then {
            "expand" => drop(bench.expand(&volume.volume_id, 2 * GIB).await.expect("grown")),
            "attach" => drop(bench.attach(&volume.volume_id, "worker-101").await.expect("attached")),
            _ => bench.delete(&volume.volume_id).await.expect("deleted"),
        }
        assert_eq!(bench.sim.vmids(), vms, "{then}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_size_that_can_not_be_had_is_out_of_range() {
    let bench = Bench::new();
    let mut request = new_volume("pvc-1", "local");
    request.capacity_range =
        Some(proxmox_csi::csi::proto::CapacityRange { required_bytes: GIB + 1, limit_bytes: GIB + 2 });
    assert_refused(bench.create(request).await, Code::OutOfRange, &[]);
}

// --- Requests that are not as they should be ---

#[tokio::test(start_paused = true)]
async fn what_is_not_advertised_is_refused_before_proxmox_is_asked() {
    let bench = Bench::new();
    let asked = bench.sim.log().len();
    let mut many = new_volume("pvc-1", "local");
    let mode = proxmox_csi::csi::proto::volume_capability::access_mode::Mode::MultiNodeMultiWriter;
    many.volume_capabilities[0].access_mode.as_mut().expect("a mode").mode = mode.into();
    assert_refused(bench.create(many).await, Code::InvalidArgument, &["MULTI_NODE_MULTI_WRITER"]);
    let mut strange = new_volume("pvc-1", "local");
    strange.parameters.insert("cache".into(), "none,backup=1".into());
    assert_refused(bench.create(strange).await, Code::InvalidArgument, &["cache"]);
    let mut replicated = new_volume("pvc-1", "local");
    replicated.parameters.insert("replicate".into(), "true".into());
    assert_refused(bench.create(replicated).await, Code::InvalidArgument, &["replicate"]);
    assert_eq!(bench.sim.log().len(), asked);
}

// --- P5: no leak, no double ---

/// A volume that may be on any node.
fn anywhere(name: &str) -> proxmox_csi::csi::proto::CreateVolumeRequest {
    let mut request = new_volume(name, "local");
    request.accessibility_requirements = None;
    request
}

fn count(bench: &Bench, name: &str) -> usize {
    bench.sim.volumes().iter().filter(|v| v.key.name.contains(name)).count()
}

#[tokio::test(start_paused = true)]
async fn p5_a_repeated_create_finds_its_volume_though_the_storage_is_full_by_now() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    bench.fault(json!({"fault": "fill_storage", "storage": "local"}));
    assert_eq!(bench.volume("pvc-1", "local").await, volume);
    assert_eq!(bench.create(anywhere("pvc-1")).await.expect("found").volume_id, volume.volume_id);
    assert_eq!(count(&bench, "pvc-1"), 1);
}

#[tokio::test(start_paused = true)]
async fn p5_a_place_that_can_not_be_looked_at_is_not_taken_for_empty() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    bench.fault(json!({"fault": "lose_request", "method": "GET", "path": "nodes/pve1/storage/local/content", "times": 1}));
    assert_refused(bench.create(anywhere("pvc-1")).await, Code::Unavailable, &["pvc-1"]);
    assert_eq!(bench.create(anywhere("pvc-1")).await.expect("found").volume_id, volume.volume_id);
    assert_eq!(count(&bench, "pvc-1"), 1);
}

#[tokio::test(start_paused = true)]
async fn p5_an_allocation_in_doubt_is_tried_on_no_other_node() {
    for fault in ["lose_request", "lose_answer"] {
        let bench = Bench::new();
        let path = "nodes/pve1/storage/local/content";
        bench.fault(json!({"fault": fault, "method": "POST", "path": path}));
        bench.create(new_volume("pvc-1", "local")).await.expect_err("in doubt");
        bench.fault(json!({"fault": "kill_node", "node": "pve1"}));
        assert_refused(bench.create(anywhere("pvc-1")).await, Code::Unavailable, &["pvc-1", "pve1"]);
        assert_refused(bench.create(new_volume("pvc-1", "local")).await, Code::Unavailable, &["pve1"]);
        bench.fault(json!({"fault": "kill_node", "node": "pve1", "on": false}));
        bench.create(anywhere("pvc-1")).await.expect("a volume");
        assert_eq!(count(&bench, "pvc-1"), 1, "{fault}");
    }
}

#[tokio::test(start_paused = true)]
async fn p1_a_plug_that_is_still_on_its_way_is_awaited_before_the_volume_goes_elsewhere() {
    for restart in [false, true] {
        let mut bench = Bench::new();
        let volume = bench.volume("pvc-1", "shared").await;
        bench.fault(json!({"fault": "delay_task", "worker": "qmconfig", "ms": 20_000}));
        bench.fault(json!({"fault": "lose_answer", "method": "POST", "path": "101/config"}));
        assert_refused(bench.attach(&volume.volume_id, "worker-101").await, Code::Unavailable, &[]);
        assert_not_attached(&bench, 101, &volume.volume_id);
        if restart {
            let world = World::builtin();
            let secret = world.token(CSI).expect("the token").secret.clone();
            let token = proxmox_csi::pve::client::Token { id: CSI.to_owned(), secret };
            bench = Bench::over(&bench.sim, &token);
        }
        let refused = bench.attach(&volume.volume_id, "worker-103").await;
        assert_refused(refused, Code::FailedPrecondition, &["VM 101", "scsi1"]);
        assert_refused(bench.delete(&volume.volume_id).await, Code::FailedPrecondition, &["VM 101"]);
        assert_not_attached(&bench, 103, &volume.volume_id);
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_node_stops_no_volume_that_is_local_to_another() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    bench.fault(json!({"fault": "kill_node", "node": "pve2"}));
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
    bench.delete(&volume.volume_id).await.expect("deleted");
}

#[tokio::test(start_paused = true)]
async fn p7_a_late_detach_leaves_the_owner_of_a_volume_alone() {
    let bench = Bench::new();
    let before = bench.sim.vm(102).expect("a vm").conf;
    let boot = before.current["scsi0"].clone();
    let volid = boot.split(',').next().expect("a volid").to_owned();
    let handle = format!("test/pve1/{}", volid.replacen(':', "/", 1));
    bench.detach(&handle, "worker-of-yesterday").await.expect("attached to no node");
    assert_eq!(bench.sim.vm(102).expect("a vm").conf, before);
}

#[tokio::test(start_paused = true)]
async fn p7_a_disk_that_waits_for_our_slot_is_not_forgotten() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    let other = bench.volume("pvc-2", "local").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    bench.sim.set_vm_key(101, "hotplug", Some("0"));
    let form = format!("scsi1={}", volid(&other.volume_id));
    bench.admin("PUT", "/nodes/pve1/qemu/101/config", &form).await;
    bench.sim.set_vm_key(101, "hotplug", None);
    let before = bench.sim.vm(101).expect("a vm").conf;
    let refused = bench.detach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::FailedPrecondition, &["scsi1", "pvc-2", "--revert scsi1"]);
    let refused = bench.attach(&volume.volume_id, "worker-101").await;
    assert_refused(refused, Code::FailedPrecondition, &["scsi1", "pvc-2", "--revert scsi1"]);
    assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);
}

#[tokio::test(start_paused = true)]
async fn a_holder_whose_creation_was_in_doubt_is_used_and_goes_away() {
    let bench = Bench::with(World::builtin(), HOLDER);
    let vms = bench.sim.vmids();
    let volume = bench.volume("pvc-1", "local").await;
    bench.fault(json!({"fault": "lose_answer", "method": "POST", "path": "/nodes/pve1/qemu"}));
    assert_refused(bench.expand(&volume.volume_id, 2 * GIB).await, Code::Unavailable, &["short-lived VM"]);
    assert_eq!(bench.sim.vmids().len(), vms.len() + 1);
    bench.expand(&volume.volume_id, 2 * GIB).await.expect("grown");
    assert_eq!(bench.sim.vmids(), vms);
}
