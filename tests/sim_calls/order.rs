//! Several keys in one call (qemu-server `API2/Qemu.pm:$update_vm_api`): one by one, in no order that a client knows.

use super::cluster::Cluster;
use proxmox_csi::sim::faults::Fault;
use serde_json::json;
use std::collections::BTreeSet;

fn fault(cluster: &Cluster, value: serde_json::Value) {
    let fault: Fault = serde_json::from_value(value).expect("a fault");
    cluster.sim.inject(fault).expect("a fault that fits");
}

async fn left_pending(cluster: &Cluster, good: [&str; 2]) -> BTreeSet<String> {
    let form = [("scsi1", good[0]), ("scsi2", "data:9999/vm-9999-gone.raw"), ("scsi3", good[1])];
    let text = cluster.fails("PUT", "/nodes/pve1/qemu/102/config", &form).await;
    assert_eq!(text, "volume 'data:9999/vm-9999-gone.raw' does not exist");
    let vm = cluster.sim.vm(102).expect("the VM");
    assert_eq!(vm.open_volumes().count(), 0, "nothing is plugged when one key is bad");
    let pending: BTreeSet<String> = vm.conf.pending.keys().cloned().collect();
    if !pending.is_empty() {
        let list: Vec<&str> = pending.iter().map(String::as_str).collect();
        cluster.set(102, &[("revert", &list.join(","))]).await;
    }
    pending
}

#[tokio::test(start_paused = true)]
async fn which_good_keys_stay_pending_beside_a_bad_one_differs_from_call_to_call() {
    let cluster = Cluster::new();
    let a = cluster.alloc("data", "vm-9999-a.raw", "64M").await;
    let b = cluster.alloc("data", "vm-9999-b.raw", "64M").await;
    let mut seen = BTreeSet::new();
    for _ in 0..40 {
        seen.insert(left_pending(&cluster, [&a, &b]).await);
    }
    assert_eq!(seen.len(), 4, "none, either, and both: {seen:?}");
}

#[tokio::test(start_paused = true)]
async fn the_order_of_keys_repeats_with_its_seed_and_can_be_asked_for() {
    let cluster = Cluster::new();
    let a = cluster.alloc("data", "vm-9999-a.raw", "64M").await;
    let b = cluster.alloc("data", "vm-9999-b.raw", "64M").await;
    let mut runs = Vec::new();
    for _ in 0..2 {
        fault(&cluster, json!({ "fault": "key_order", "seed": 7 }));
        let mut run = Vec::new();
        for _ in 0..8 {
            run.push(left_pending(&cluster, [&a, &b]).await);
        }
        runs.push(run);
    }
    assert_eq!(runs[0], runs[1]);
    fault(&cluster, json!({ "fault": "key_order", "keys": ["scsi3", "scsi2"] }));
    assert_eq!(left_pending(&cluster, [&a, &b]).await, BTreeSet::from(["scsi3".to_owned()]));
}
