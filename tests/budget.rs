//! What operations cost: requests to Proxmox, whatever the number of VMs.

mod support;

use proxmox_csi::csi::proto::{GetCapacityRequest, controller_server::Controller as _};
use support::{Bench, REGION, at, budget::lives, mount, strings};
use tonic::Request;

/// What each operation may send in the steady state, polls of its task included. On file storages a deletion looks first whether the volume
/// is there: Proxmox calls the deletion of what it can't see a success.
const BUDGET: [(&str, usize); 5] =
    [("create", 1), ("attach", 5), ("expand", 4), ("detach", 6), ("delete", 3)];

#[tokio::test(start_paused = true)]
async fn operations_keep_their_budget_whatever_the_number_of_vms() {
    for vms in [3, 60] {
        let (_, steady) = lives(vms, "local").await;
        for (operation, budget) in BUDGET {
            let count = steady[operation];
            assert!(count.own <= budget, "{operation} with {vms} VMs: {count:?}, budget {budget}");
            let others = if operation == "delete" { usize::MAX } else { 2 };
            assert!(count.shared <= others, "{operation} with {vms} VMs reads others: {count:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_deletion_on_a_volume_manager_takes_no_look_before_it() {
    for storage in ["thin", "tank", "ceph"] {
        let (_, steady) = lives(3, storage).await;
        for (operation, budget) in BUDGET {
            let count = steady[operation];
            let budget = if operation == "delete" { 2 } else { budget };
            // A volume on shared storage is attached after a new look at every VM, that of the node too.
            let looks = if (storage, operation) == ("ceph", "attach") { 2 } else { 0 };
            assert!(count.own <= budget + looks, "{operation} on {storage}: {count:?}, budget {budget}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn on_shared_storage_the_number_of_vms_counts_for_sweeps_alone() {
    let mut own = Vec::new();
    for vms in [3, 60] {
        let (_, steady) = lives(vms, "shared").await;
        for operation in ["create", "expand", "detach"] {
            assert!(steady[operation].shared <= 2, "{operation} with {vms} VMs: {:?}", steady[operation]);
        }
        for operation in ["attach", "delete"] {
            let swept = usize::try_from(vms).expect("a number") - 1;
            assert!(steady[operation].shared >= swept, "{operation}: {:?}", steady[operation]);
        }
        own.push(steady.into_iter().map(|(operation, count)| (operation, count.own)).collect::<Vec<_>>());
    }
    assert_eq!(own[0], own[1]);
}

#[tokio::test(start_paused = true)]
async fn capacity_takes_no_request_of_its_own() {
    let bench = Bench::new();
    bench.volume("pvc-1", "local").await;
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    bench.sim.clear_log();
    for storage in ["local", "shared", "data"] {
        for zone in [None, Some("pve1"), Some("pve2")] {
            let request = GetCapacityRequest {
                volume_capabilities: vec![mount()],
                parameters: strings(&[("storage", storage)]),
                accessible_topology: zone.map(|zone| at(REGION, zone)),
            };
            let told = bench.controller.get_capacity(Request::new(request)).await.expect("an answer");
            assert!(told.into_inner().available_capacity > 0);
        }
    }
    assert!(bench.sim.log().is_empty(), "{:?}", bench.sim.log());
}
