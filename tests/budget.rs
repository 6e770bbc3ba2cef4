//! What operations cost: requests to Proxmox, whatever the number of VMs.

mod support;

use support::budget::lives;

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
