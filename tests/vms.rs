//! VMs to which something happens while a volume is attached: over the simulator in process, on a paused clock.

mod support;

use std::time::Duration;

use proxmox_csi::sim::{World, faults::Fault};
use support::{Bench, CSI, GIB, Slots, assert_refused};
use tonic::Code;

/// Long enough for any task of the simulator, and for what the driver last heard of the region to be old.
const A_WHILE: Duration = Duration::from_secs(40);

async fn done(bench: &Bench, method: &str, path: &str, form: &str) {
    bench.admin(method, path, form).await;
    tokio::time::sleep(A_WHILE).await;
}

#[tokio::test(start_paused = true)]
async fn a_volume_goes_into_a_stopped_vm_and_is_there_when_it_starts() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    done(&bench, "POST", "/nodes/pve1/qemu/101/status/stop", "").await;
    let context = bench.attach(&volume, "worker-101").await.expect("attached");
    let slots = bench.slots(101, &volume);
    assert_eq!((slots.current.len(), slots.pending.len(), slots.qemu), (1, 0, 0), "{slots:?}");
    // A stopped VM holds what it will have when it starts.
    let refused = bench.attach(&volume, "worker-103").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 101", "scsi1"]);
    let grown = bench.expand(&volume, 2 * GIB).await.expect("grown");
    assert_eq!(grown.capacity_bytes, 2 * GIB);
    done(&bench, "POST", "/nodes/pve1/qemu/101/status/start", "").await;
    assert_eq!(bench.slots(101, &volume).qemu, 1);
    assert_eq!(bench.attach(&volume, "worker-101").await.expect("still attached")["lun"], context["lun"]);
    done(&bench, "POST", "/nodes/pve1/qemu/101/status/stop", "").await;
    bench.detach(&volume, "worker-101").await.expect("detached");
    assert_eq!(bench.slots(101, &volume), Slots::default());
}

#[tokio::test(start_paused = true)]
async fn a_protected_vm_takes_volumes_and_keeps_them_and_the_remedy_is_named() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.sim.set_vm_key(101, "protection", Some("1"));
    bench.attach(&volume, "worker-101").await.expect("attached");
    let before = bench.sim.vm(101).expect("a vm").conf;
    let refused = bench.detach(&volume, "worker-101").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 101", "qm set 101 --protection 0"]);
    assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);
    bench.sim.set_vm_key(101, "protection", None);
    bench.detach(&volume, "worker-101").await.expect("detached");
}

#[tokio::test(start_paused = true)]
async fn a_locked_vm_lets_nothing_go_and_what_is_attached_stays_attached() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let context = bench.attach(&volume, "worker-101").await.expect("attached");
    bench.sim.set_vm_key(101, "lock", Some("migrate"));
    let before = bench.sim.vm(101).expect("a vm").conf;
    assert_refused(bench.detach(&volume, "worker-101").await, Code::Unavailable, &["VM 101", "migrate"]);
    assert_refused(bench.expand(&volume, 2 * GIB).await, Code::Unavailable, &["VM 101", "migrate"]);
    assert_eq!(bench.attach(&volume, "worker-101").await.expect("it is there"), context);
    assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);
}

#[tokio::test(start_paused = true)]
async fn a_vm_is_known_by_its_uuid_whatever_it_is_called() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    for vmid in [101, 103] {
        bench.sim.set_vm_key(vmid, "name", Some("renamed"));
    }
    bench.attach(&volume, "worker-101").await.expect("still attached");
    bench.detach(&volume, "worker-101").await.expect("detached");
    bench.attach(&volume, "worker-103").await.expect("attached");
    assert_eq!((bench.slots(101, &volume).qemu, bench.slots(103, &volume).qemu), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_volume_on_a_shared_storage_moves_with_its_vm() {
    let mut world = World::builtin();
    // A VM whose own disk is on the shared storage as well, so that it can move.
    world.vms[0].config.insert("scsi0".into(), "shared:101/vm-101-disk-0.raw,size=1G".into());
    let bench = Bench::with(world, CSI);
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let context = bench.attach(&volume, "worker-101").await.expect("attached");
    done(&bench, "POST", "/nodes/pve1/qemu/101/migrate", "target=pve2&online=1").await;
    assert_eq!(bench.attach(&volume, "worker-101").await.expect("still attached"), context);
    bench.expand(&volume, 2 * GIB).await.expect("grown where it is now");
    done(&bench, "POST", "/nodes/pve2/qemu/101/migrate", "target=pve1&online=1").await;
    bench.detach(&volume, "worker-101").await.expect("detached where it is now");
    assert_eq!(bench.slots(101, &volume), Slots::default());
    // A volume that is local to the node it came from can't follow, and is not attached across.
    let local = bench.volume("pvc-2", "local").await.volume_id;
    done(&bench, "POST", "/nodes/pve1/qemu/101/migrate", "target=pve2&online=1").await;
    let refused = bench.attach(&local, "worker-101").await;
    assert_refused(refused, Code::FailedPrecondition, &["pve1", "pve2", "VM 101"]);
}

#[tokio::test(start_paused = true)]
async fn a_volume_survives_its_vm_and_goes_elsewhere() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    done(&bench, "POST", "/nodes/pve1/qemu/101/status/stop", "").await;
    done(&bench, "DELETE", "/nodes/pve1/qemu/101", "purge=1&destroy-unreferenced-disks=1").await;
    assert!(!bench.sim.vmids().contains(&101));
    bench.detach(&volume, "worker-101").await.expect("the vm is proven gone");
    bench.attach(&volume, "worker-103").await.expect("attached");
    bench.detach(&volume, "worker-103").await.expect("detached");
    bench.delete(&volume).await.expect("deleted");
}

#[tokio::test(start_paused = true)]
async fn p2_a_vm_is_not_gone_because_a_server_that_is_cut_off_never_heard_of_it() {
    let mut world = World::builtin();
    world.vms.retain(|vm| vm.node == "pve1");
    let bench = Bench::with(world, CSI);
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    done(&bench, "POST", "/nodes/pve1/qemu/101/status/stop", "").await;
    done(&bench, "DELETE", "/nodes/pve1/qemu/101", "").await;
    let cut = |on| Fault::CutNode { node: "pve2".to_owned(), on };
    bench.sim.inject(cut(true)).expect("a node");
    tokio::time::sleep(A_WHILE).await;
    let refused = bench.detach(&volume, "worker-101").await;
    assert_refused(refused, Code::Unavailable, &["it sees 1 of 2 nodes", "worker-101", "pvecm status"]);
    bench.sim.inject(cut(false)).expect("a node");
    bench.detach(&volume, "worker-101").await.expect("proven gone by a server that sees its cluster");
}

#[tokio::test(start_paused = true)]
async fn p7_a_slot_that_holds_another_disk_by_now_is_left_alone() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    // Somebody moved the disk: the slot has a copy that the VM owns, and ours is plugged in nowhere.
    bench.admin("PUT", "/nodes/pve1/qemu/101/config", "delete=scsi1").await;
    bench.admin("PUT", "/nodes/pve1/qemu/101/config", "scsi1=local:1").await;
    let mine = bench.sim.vm(101).expect("a vm").current("scsi1").expect("a disk").to_owned();
    let context = bench.attach(&volume, "worker-101").await.expect("attached to another slot");
    assert_eq!(context["lun"], "2");
    bench.detach(&volume, "worker-101").await.expect("detached");
    assert_eq!(bench.sim.vm(101).expect("a vm").current("scsi1"), Some(mine.as_str()));
}

#[tokio::test(start_paused = true)]
async fn every_slot_from_scsi1_to_scsi30_is_used_beside_what_is_plugged_in_and_scsi0_never() {
    let mut world = World::builtin();
    // These boot from elsewhere.
    for vm in &mut world.vms {
        vm.config.extend([("scsi0".to_owned(), String::new()), ("boot".to_owned(), String::new())]);
    }
    let bench = Bench::with(world, CSI);
    for slot in (2..=30).filter(|slot| *slot != 17) {
        let disk = format!("local:101/vm-101-disk-{slot}.raw,size=1G");
        bench.sim.set_vm_key(101, &format!("scsi{slot}"), Some(&disk));
    }
    for (name, lun) in [("pvc-1", "1"), ("pvc-2", "17")] {
        let volume = bench.volume(name, "local").await.volume_id;
        assert_eq!(bench.attach(&volume, "worker-101").await.expect("attached")["lun"], lun);
    }
    let volume = bench.volume("pvc-3", "local").await.volume_id;
    assert_refused(bench.attach(&volume, "worker-101").await, Code::ResourceExhausted, &["scsi1 to scsi30"]);
    // But where somebody plugged the volume into scsi0, there it is.
    let drive = format!("{},wwn=0x5056432d49443030", support::volid(&volume)).replace(':', "%3A");
    let drive = drive.replace('/', "%2F").replace('=', "%3D").replace(',', "%2C");
    bench.admin("PUT", "/nodes/pve1/qemu/102/config", &format!("scsi0={drive}")).await;
    assert_eq!(bench.attach(&volume, "worker-102").await.expect("it is there")["lun"], "0");
}
