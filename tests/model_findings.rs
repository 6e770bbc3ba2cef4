//! What the model test (`tests/model`) has found, each as small as it became: over the simulator in process, on a paused clock.

mod support;

use std::time::Duration;

use serde_json::json;
use support::{Bench, CSI, GIB, Slots, assert_refused, volid};
use tokio::time::sleep;
use tonic::Code;

fn privilege(bench: &Bench, privilege: &str, on: bool) {
    bench.fault(json!({"fault": "drop_privilege", "who": CSI, "privilege": privilege, "on": on}));
}

/// Without VM.Audit Proxmox lists no VM at all, and says so to nobody.
#[tokio::test(start_paused = true)]
async fn p2_what_the_token_might_see_a_minute_ago_proves_no_vm_gone() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    privilege(&bench, "VM.Audit", true);
    for seconds in [0, 20, 3, 40] {
        sleep(Duration::from_secs(seconds)).await;
        bench.detach(&volume, "worker-101").await.expect_err("nobody can see whether it is detached");
        bench.attach(&volume, "worker-103").await.expect_err("nobody can see whether it is free");
        bench.delete(&volume).await.expect_err("nobody can see whether it is in use");
    }
    privilege(&bench, "VM.Audit", false);
    bench.detach(&volume, "worker-101").await.expect("detached");
    assert_eq!(bench.slots(101, &volume), Slots::default());
}

/// A failover by hand moves the config and not the disk. What has the name there is another volume.
#[tokio::test(start_paused = true)]
async fn p7_the_namesake_of_a_volume_on_another_node_is_neither_grown_nor_tuned() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    let namesake = "vmid=9999&filename=vm-9999-pvc-1.raw&size=1G";
    bench.admin("POST", "/nodes/pve2/storage/local/content", namesake).await;
    bench.sim.stop_vm(101).await;
    bench.sim.move_vm(101, "pve2");
    // The first look is where it was.
    bench.expand(&volume, 2 * GIB).await.expect_err("it is not there any more");
    sleep(Duration::from_mins(1)).await;
    let grown = bench.expand(&volume, 2 * GIB).await;
    assert_refused(grown, Code::FailedPrecondition, &["VM 101", "pve2", "hint: "]);
    let changed = bench.modify(&volume, &[("diskIOPS", "10")]).await;
    assert_refused(changed, Code::FailedPrecondition, &["VM 101", "pve2", "hint: "]);
    let sizes: Vec<u64> =
        bench.sim.volumes().iter().filter(|v| v.key.name.contains("pvc-1")).map(|v| v.size).collect();
    assert_eq!(sizes, [1 << 30, 1 << 30]);
}

/// The hint of the refusal tells to restart the VM: then that helps at once, and not ten minutes later.
#[tokio::test(start_paused = true)]
async fn a_stray_drive_of_a_vm_that_was_restarted_stands_in_the_way_no_more() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.fault(json!({"fault": "drift", "vmid": 103, "slot": "scsi7", "volume": volid(&volume)}));
    let deleted = bench.delete(&volume).await;
    assert_refused(deleted, Code::FailedPrecondition, &["VM 103", "scsi7", "restart the VM"]);
    bench.sim.stop_vm(103).await;
    bench.sim.start_vm(103).await.expect("started");
    sleep(Duration::from_secs(20)).await;
    bench.delete(&volume).await.expect("deleted");
}
