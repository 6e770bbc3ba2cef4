//! Refusals by their codes, and what is refused to be used as it is plugged in: through the RPCs over the simulator in process.

mod support;

use std::time::Duration;

use proxmox_csi::{
    csi::proto::{self, controller_server::Controller as _, volume_capability::access_mode::Mode},
    sim::{Sim, World},
};
use serde_json::json;
use support::{
    Bench, CSI, GIB, REGION, Slots, assert_refused, block, new_volume, of_all_types, token, volid,
};
use tonic::{Code, Request};

/// Long enough for what the driver last heard of the region to be old.
const A_WHILE: Duration = Duration::from_secs(40);

#[tokio::test(start_paused = true)]
async fn a_detach_that_names_no_node_is_one_from_all() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let other = bench.volume("pvc-2", "shared").await.volume_id;
    bench.attach(&other, "worker-102").await.expect("attached");
    for node in ["worker-101", "worker-103"] {
        bench.attach_as(&volume, node, Mode::MultiNodeReaderOnly, true).await.expect("attached");
    }
    for _ in 0..2 {
        bench.detach(&volume, "").await.expect("detached");
        for vmid in [101, 102, 103] {
            assert_eq!(bench.slots(vmid, &volume), Slots::default(), "VM {vmid}");
        }
    }
    assert_eq!(bench.slots(102, &other).qemu, 1, "another volume stays");
}

#[tokio::test(start_paused = true)]
async fn a_size_that_can_not_be_had_by_growing_is_out_of_range() {
    for attached in [true, false] {
        let bench = Bench::new();
        let mut request = new_volume("pvc-1", "local");
        request.capacity_range = Some(proto::CapacityRange { required_bytes: 2 * GIB, limit_bytes: 0 });
        let volume = bench.create(request).await.expect("a volume").volume_id;
        if attached {
            bench.attach(&volume, "worker-101").await.expect("attached");
        }
        for (required, limit, names) in [
            // No whole step lies between them.
            (3 * GIB + 1, 3 * GIB + 2, ["at least", "steps"]),
            // Volumes never shrink.
            (GIB, GIB, ["2 GiB already", "limit of 1 GiB"]),
            (3 * GIB, 2 * GIB, ["3 GiB", "2 GiB"]),
        ] {
            let refused = bench.expand_within(&volume, required, limit).await;
            assert_refused(refused, Code::OutOfRange, &names);
        }
        assert_refused(bench.expand(&volume, 0).await, Code::InvalidArgument, &["required_bytes"]);
        assert_refused(bench.expand(&volume, -1).await, Code::InvalidArgument, &["required_bytes"]);
        let size = bench.sim.volumes().into_iter().find(|v| v.key.name.contains("pvc-1")).expect("it").size;
        assert_eq!(i64::try_from(size), Ok(2 * GIB), "attached: {attached}");
        // As large already is a success.
        let grown = bench.expand_within(&volume, GIB, 2 * GIB).await.expect("nothing to do");
        assert_eq!(grown.capacity_bytes, 2 * GIB);
    }
    let bench = Bench::new();
    let mut request = new_volume("pvc-1", "local");
    request.capacity_range = Some(proto::CapacityRange { required_bytes: 2 * GIB, limit_bytes: GIB });
    assert_refused(bench.create(request).await, Code::OutOfRange, &["2 GiB", "1 GiB"]);
}

#[tokio::test(start_paused = true)]
async fn of_a_raw_block_volume_the_node_has_nothing_to_grow() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    for (capability, node_has_to) in [(Some(block()), false), (Some(support::mount()), true), (None, true)] {
        let request = proto::ControllerExpandVolumeRequest {
            volume_id: volume.clone(),
            capacity_range: Some(proto::CapacityRange { required_bytes: 2 * GIB, limit_bytes: 0 }),
            volume_capability: capability.clone(),
            ..Default::default()
        };
        let answer = bench.controller.controller_expand_volume(Request::new(request)).await;
        let answer = answer.expect("grown").into_inner();
        assert_eq!((answer.capacity_bytes, answer.node_expansion_required), (2 * GIB, node_has_to));
    }
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_can_not_be_looked_for_is_never_said_to_be_missing() {
    let bench = Bench::with(of_all_types(), CSI);
    let local = bench.volume("pvc-1", "local").await.volume_id;
    let without_zone = local.replacen("test/pve1/", "test//", 1);
    for (handle, code, names) in [
        // The token may only not see the storage, and the region may be missing in a config that was edited.
        ("test//nope/vm-9999-pvc-1", Code::FailedPrecondition, &["`nope`", "Datastore.Audit"][..]),
        ("test/pve3/local/9999/vm-9999-pvc-1.raw", Code::FailedPrecondition, &["`local`", "`pve3`"]),
        ("elsewhere//shared/9999/vm-9999-pvc-1.raw", Code::FailedPrecondition, &["`elsewhere`", "test"]),
        // It may be on any node.
        (&without_zone, Code::InvalidArgument, &["names no zone", "`local`"]),
    ] {
        assert_refused(bench.delete(handle).await, code, names);
        assert_refused(bench.expand(handle, 2 * GIB).await, code, names);
        assert_refused(bench.modify(handle, &[("backup", "1")]).await, code, names);
        let get = proto::ControllerGetVolumeRequest { volume_id: handle.to_owned() };
        assert_refused(bench.controller.controller_get_volume(Request::new(get)).await, code, names);
        if !handle.starts_with("elsewhere") {
            assert_refused(bench.attach(handle, "worker-101").await, code, names);
        }
    }
    // Nobody's name says whose it is.
    let nobodys = "test/pve1/a-zfspool/mine";
    assert_refused(bench.delete(nobodys).await, Code::FailedPrecondition, &["mine", "which VM owns it"]);
    // It passes.
    bench.fault(json!({"fault": "kill_node", "node": "pve1"}));
    tokio::time::sleep(A_WHILE).await;
    for refused in [
        bench.delete(&local).await,
        bench.expand(&local, 2 * GIB).await.map(drop),
        bench.modify(&local, &[("backup", "1")]).await,
    ] {
        assert_refused(refused, Code::Unavailable, &["storage `local` is not available on `pve1`", "pvesm"]);
    }
    assert!(bench.sim.volumes().iter().any(|v| v.key.name.contains("pvc-1")));
}

#[tokio::test(start_paused = true)]
async fn a_drive_that_the_node_could_not_use_is_named_with_the_remedy_and_left_alone() {
    for (case, names) in [
        ("virtio", &["virtio5", "not a SCSI slot", "qm set 101 --delete virtio5"][..]),
        ("nameless", &["scsi5", "without a WWN", "qm set 101 --delete scsi5"]),
        ("twice", &["scsi5 and scsi6", "more than once"]),
        ("in the way", &["scsi4", "another drive is still in force", "qm set 101 --delete scsi4"]),
    ] {
        let bench = Bench::new();
        let volume = bench.volume("pvc-1", "local").await.volume_id;
        let path = "/nodes/pve1/qemu/101/config";
        let named = format!("{},wwn=0x5056432d49443035", volid(&volume));
        match case {
            "virtio" => drop(bench.admin("PUT", path, &format!("virtio5={}", volid(&volume))).await),
            "nameless" => drop(bench.admin("PUT", path, &format!("scsi5={}", volid(&volume))).await),
            "twice" => {
                for slot in ["scsi5", "scsi6"] {
                    bench.sim.set_vm_key(101, slot, Some(&named));
                    let drive =
                        json!({"fault": "drift", "vmid": 101, "slot": slot, "volume": volid(&volume)});
                    bench.fault(drive);
                }
            }
            _ => {
                bench.admin("PUT", path, "scsi4=local:1").await;
                bench.sim.set_vm_key(101, "hotplug", Some("0"));
                bench.admin("PUT", path, &format!("scsi4={}", volid(&volume))).await;
                bench.sim.set_vm_key(101, "hotplug", None);
                assert_eq!(bench.slots(101, &volume).pending, ["scsi4"]);
            }
        }
        let before = bench.sim.vm(101).expect("a vm").conf;
        let refused = bench.attach(&volume, "worker-101").await;
        assert_refused(refused, Code::FailedPrecondition, names);
        assert_eq!(bench.sim.vm(101).expect("a vm").conf, before, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn p7_of_two_vms_with_the_uuid_of_a_node_none_is_taken_for_it() {
    let here = Sim::in_memory(World::builtin()).expect("a world");
    let there = Sim::in_memory(World::builtin()).expect("a world");
    // Of nodes in a further region no VMID is recorded: the uuid alone tells.
    let bench = Bench::across(&[(REGION, &here), ("west", &there)], &token(CSI));
    let mut request = new_volume("pvc-1", "shared");
    request.accessibility_requirements = Some(support::places(&[support::at("west", "pve1")]));
    let volume = bench.create(request).await.expect("a volume").volume_id;
    bench.attach(&volume, "west-101").await.expect("attached");
    bench.detach(&volume, "west-101").await.expect("detached");
    let uuid = there.vm(101).expect("a vm").current("smbios1").expect("a uuid").to_owned();
    there.set_vm_key(102, "smbios1", Some(&uuid));
    tokio::time::sleep(A_WHILE).await;
    // A deletion looks at every VM anew.
    bench.delete("west//shared/9999/vm-9999-none.raw").await.expect("it is not there");
    let before = [101, 102].map(|vmid| there.vm(vmid).expect("a vm").conf);
    for bench in [&bench, &Bench::across(&[(REGION, &here), ("west", &there)], &token(CSI))] {
        let refused = bench.attach(&volume, "west-101").await;
        assert_refused(refused, Code::FailedPrecondition, &["101 and 102", "west-101", "--smbios1"]);
        let refused = bench.detach(&volume, "west-101").await;
        assert_refused(refused, Code::FailedPrecondition, &["101 and 102", "west-101"]);
    }
    assert_eq!([101, 102].map(|vmid| there.vm(vmid).expect("a vm").conf), before);
}
