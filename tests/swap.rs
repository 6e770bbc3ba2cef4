//! The Go driver's workloads are replaced by ours, and ours by it, with disks attached: its calls and drive strings are those of its v0.19.

mod support;

use proxmox_csi::sim::{World, world::Storage};
use serde_json::json;
use support::{Bench, CSI, GIB, assert_refused, volid};
use tonic::Code;

/// A value as a form has it.
fn encoded(text: &str) -> String {
    text.replace(':', "%3A").replace('/', "%2F").replace('=', "%3D").replace(',', "%2C")
}

/// What the Go driver writes into a slot: options in the random order of a Go map, and a WWN of the slot's number in ASCII.
fn go_drive(volume_id: &str, slot: u32) -> (String, String) {
    // "PVC-ID" and two digits, in ASCII.
    let hex = format!("5056432d49443{}3{}", slot / 10, slot % 10);
    (format!("{},wwn=0x{hex},replicate=0,iothread=1,backup=0", volid(volume_id)), format!("0x{hex}"))
}

/// `POST config` of the Go driver. It does not look at how its task ended.
async fn go_attach(bench: &Bench, vmid: u32, slot: u32, volume_id: &str) -> String {
    let (drive, wwn) = go_drive(volume_id, slot);
    let form = format!("scsi{slot}={}", encoded(&drive));
    bench.admin("POST", &format!("/nodes/pve1/qemu/{vmid}/config"), &form).await;
    tokio::time::sleep(std::time::Duration::from_secs(40)).await;
    wwn
}

#[tokio::test(start_paused = true)]
async fn compat_06_what_the_go_driver_left_attached_or_pending_is_taken_over() {
    let bench = Bench::new();
    let mut ids = Vec::new();
    for name in ["pvc-1", "pvc-2", "pvc-3"] {
        ids.push(bench.volume(name, "shared").await.volume_id);
    }
    let [attached, half_gone, half_there] = <[String; 3]>::try_from(ids).expect("three");
    let wwn = go_attach(&bench, 101, 1, &attached).await;
    go_attach(&bench, 101, 2, &half_gone).await;
    // Its unlink failed in the guest: the deletion stays pending and would strike at the next start.
    bench.fault(json!({"fault": "hang_unplug", "vmid": 101}));
    bench.admin("POST", "/nodes/pve1/qemu/101/config", "delete=scsi2").await;
    tokio::time::sleep(std::time::Duration::from_mins(1)).await;
    assert!(bench.sim.vm(101).expect("a vm").conf.pending_delete.contains_key("scsi2"));
    bench.fault(json!({"fault": "hang_unplug", "vmid": 101, "on": false}));
    // Its plug failed: the drive stays pending.
    let text = "hotplug problem - adding drive failed";
    bench.fault(json!({"fault": "fail_task", "worker": "qmconfig", "text": text}));
    go_attach(&bench, 101, 3, &half_there).await;

    // Ours: what is attached is served as it is, under the name it has.
    let bench = bench.restarted();
    let context = bench.attach(&attached, "worker-101").await.expect("attached");
    assert_eq!(context["DevicePath"], format!("/dev/disk/by-id/wwn-{wwn}"));
    assert_eq!(context["lun"], "1");
    // What was pending is finished one way or the other, as is asked for.
    bench.detach(&half_gone, "worker-101").await.expect("detached");
    assert_eq!(bench.slots(101, &half_gone), support::Slots::default());
    let context = bench.attach(&half_there, "worker-101").await.expect("attached");
    let slots = bench.slots(101, &half_there);
    assert_eq!((slots.current.len(), slots.pending.len(), slots.qemu), (1, 0, 1), "{slots:?}");
    assert_eq!(slots.current[0], format!("scsi{}", context["lun"]));
    let conf = bench.sim.vm(101).expect("a vm").conf;
    assert!(conf.pending.is_empty() && conf.pending_delete.is_empty(), "{conf:?}");
    // It grows and goes as any other.
    bench.expand(&attached, 2 * GIB).await.expect("grown");
    bench.detach(&attached, "worker-101").await.expect("detached");
    bench.delete(&attached).await.expect("deleted");
}

/// Nothing waits for the next start of a VM.
#[track_caller]
fn assert_settled(bench: &Bench, vmid: u32) {
    let conf = bench.sim.vm(vmid).expect("a vm").conf;
    assert!(conf.pending.is_empty() && conf.pending_delete.is_empty(), "{conf:?}");
}

#[tokio::test(start_paused = true)]
async fn compat_06_a_plug_or_an_unplug_that_the_go_driver_left_pending_is_finished_or_taken_back() {
    for then in ["attach", "detach"] {
        let bench = Bench::new();
        let mut ids = Vec::new();
        for name in ["pvc-1", "pvc-2", "pvc-3"] {
            ids.push(bench.volume(name, "shared").await.volume_id);
        }
        let [to_come, drifted, to_go] = <[String; 3]>::try_from(ids).expect("three");
        let wwn = go_attach(&bench, 101, 3, &to_go).await;
        // Its calls failed because QEMU did not answer, and it did not look.
        bench.fault(json!({"fault": "hang_qemu", "vmid": 101}));
        go_attach(&bench, 101, 1, &to_come).await;
        go_attach(&bench, 101, 2, &drifted).await;
        bench.admin("POST", "/nodes/pve1/qemu/101/config", "delete=scsi3").await;
        tokio::time::sleep(std::time::Duration::from_mins(1)).await;
        bench.fault(json!({"fault": "hang_qemu", "vmid": 101, "on": false}));
        // QEMU got one of them all the same: the config never said so.
        bench.fault(json!({"fault": "drift", "vmid": 101, "slot": "scsi2", "volume": volid(&drifted)}));
        let slots = |id: &str| bench.slots(101, id);
        let of = |current: &[&str], pending: &[&str], qemu| support::Slots {
            current: current.iter().map(|slot| (*slot).to_owned()).collect(),
            pending: pending.iter().map(|slot| (*slot).to_owned()).collect(),
            qemu,
        };
        assert_eq!(slots(&to_come), of(&[], &["scsi1"], 0));
        assert_eq!(slots(&drifted), of(&[], &["scsi2"], 1));
        assert_eq!(slots(&to_go), of(&["scsi3"], &[], 1));
        assert!(bench.sim.vm(101).expect("a vm").conf.pending_delete.contains_key("scsi3"));

        let bench = bench.restarted();
        let slots = |id: &str| bench.slots(101, id);
        // The drive that only QEMU knows comes first: while it is there, it may be any volume.
        for (id, slot) in [(&drifted, "scsi2"), (&to_come, "scsi1"), (&to_go, "scsi3")] {
            if then == "detach" {
                bench.detach(id, "worker-101").await.expect("detached");
                assert_eq!(slots(id), support::Slots::default(), "{slot}");
                continue;
            }
            let context = bench.attach(id, "worker-101").await.expect("attached");
            assert_eq!(slots(id), of(&[slot], &[], 1), "{slot}");
            assert_eq!(format!("scsi{}", context["lun"]), slot);
            let is_gos = context["DevicePath"].ends_with(&wwn);
            assert_eq!(is_gos, slot == "scsi3", "what was in force keeps its name: {context:?}");
        }
        assert_settled(&bench, 101);
    }
}

#[tokio::test(start_paused = true)]
async fn compat_06_what_we_attached_the_go_driver_detaches() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let context = bench.attach(&volume, "worker-101").await.expect("attached");
    // It looks for a slot whose text has the disk's name, and unlinks that.
    let disk = volume.rsplit_once("shared/").expect("a disk").1;
    let vm = bench.sim.vm(101).expect("a vm");
    let slots: Vec<_> =
        vm.conf.current.iter().filter(|(key, text)| key.starts_with("scsi") && text.contains(disk)).collect();
    assert_eq!(slots.len(), 1, "{slots:?}");
    assert_eq!(*slots[0].0, format!("scsi{}", context["lun"]));
    bench.admin("PUT", "/nodes/pve1/qemu/101/unlink", &format!("idlist={}", slots[0].0)).await;
    assert_eq!(bench.slots(101, &volume), support::Slots::default());
    // It attaches the volume elsewhere, and ours comes back to that.
    go_attach(&bench, 102, 1, &volume).await;
    let bench = bench.restarted();
    bench.detach(&volume, "worker-101").await.expect("not there any more");
    assert_refused(bench.attach(&volume, "worker-101").await, Code::FailedPrecondition, &["VM 102", "scsi1"]);
    bench.attach(&volume, "worker-102").await.expect("there it is");
}

#[tokio::test(start_paused = true)]
async fn compat_02_a_replicated_volume_attaches_where_its_placeholder_is_while_that_does_not_run() {
    let mut world = World::builtin();
    let kind = proxmox_csi::sim::world::Kind::Zfspool;
    world.storages.push(Storage { id: "zfs".into(), kind, ..world.storages[0].clone() });
    let bench = Bench::with(world, CSI);
    bench.admin("POST", "/nodes/pve1/qemu", "vmid=10001&name=pvc-1").await;
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    let form = "vmid=10001&filename=vm-10001-pvc-1&size=1G";
    bench.admin("POST", "/nodes/pve1/storage/zfs/content", form).await;
    let form = format!("scsi1={}", encoded("zfs:vm-10001-pvc-1,backup=1,replicate=1"));
    bench.admin("PUT", "/nodes/pve1/qemu/10001/config", &form).await;
    let before = bench.sim.vm(10001).expect("the placeholder").conf;

    let volume = "test//zfs/vm-10001-pvc-1";
    for _ in 0..2 {
        bench.attach(volume, "worker-101").await.expect("attached beside its placeholder");
    }
    assert_eq!(bench.slots(101, volume).qemu, 1);
    // Two VMs of nodes do not share it, and a node elsewhere can't reach it.
    assert_refused(bench.attach(volume, "worker-102").await, Code::FailedPrecondition, &["VM 101"]);
    assert_refused(bench.attach(volume, "worker-103").await, Code::FailedPrecondition, &["pve1", "pve2"]);
    let grown = bench.expand(volume, 2 * GIB).await.expect("grown where it runs");
    assert_eq!(grown.capacity_bytes, 2 * GIB);
    bench.modify(volume, &[("diskIOPS", "100")]).await.expect("changed");
    bench.detach(volume, "worker-101").await.expect("detached");
    assert_eq!(bench.slots(101, volume), support::Slots::default());
    assert_eq!(bench.sim.vm(10001).expect("the placeholder").conf, before, "the placeholder is left alone");
    assert_refused(bench.delete(volume).await, Code::FailedPrecondition, &["VM 10001"]);
    // Somebody starts it: now it is a VM that uses the volume.
    bench.admin("POST", "/nodes/pve1/qemu/10001/status/start", "").await;
    tokio::time::sleep(std::time::Duration::from_mins(1)).await;
    assert_refused(bench.attach(volume, "worker-101").await, Code::FailedPrecondition, &["VM 10001"]);
}
