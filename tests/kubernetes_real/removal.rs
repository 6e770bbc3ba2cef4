//! Nodes that are given up or deleted, and the rights that all of it takes.

use std::time::Duration;

use crate::{
    rig::{CCM, OUT_OF_SERVICE, Rig, SHUTDOWN, UNINITIALIZED, until, until_within},
    rights,
};

/// Takes VM.Audit on a VM from the driver's token, or gives it back.
async fn hide(rig: &Rig, vmid: u32, is_hidden: bool) {
    let delete = u8::from(!is_hidden);
    let form = format!("path=/vms/{vmid}&roles=NoAccess&tokens=csi%40pve!csi&delete={delete}");
    rig.pve("PUT", "/access/acl", &form).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_deleted_only_when_its_vm_is_proven_gone_and_every_right_is_used() {
    let rig = Rig::start("tests/fixtures/rbac-ccm.yaml").await;
    let _ccm = rig.ccm("ccm-a", &["--out-of-service"]).await;
    let (stopped, hidden, gone) =
        (rig.kubelet("stopped", 101).await, rig.kubelet("hidden", 102).await, rig.kubelet("gone", 103).await);
    for name in ["stopped", "hidden", "gone"] {
        until("it is initialised", async || !rig.has_taint(name, UNINITIALIZED).await).await;
    }

    // One is stopped, one is no longer seen, one is gone. While its kubelet lives, a node stays whatever Proxmox says.
    assert!(rig.sim.stop_vm(101).await);
    hide(&rig, 102, true).await;
    assert!(rig.sim.stop_vm(103).await && rig.sim.forget_vm(103));
    stopped.set_ready(false).await;
    hidden.set_ready(false).await;
    until("an event says why it stays", async || rig.events_about("hidden").await.contains("VM.Audit")).await;
    let events = rig.events_about("hidden").await;
    assert!(events.contains("Warning") && events.contains("VM 102"), "{events}");
    assert!(rig.node("gone").await.is_some(), "the node of a living kubelet was deleted");
    hide(&rig, 102, false).await;

    gone.set_ready(false).await;
    let is_deleted = async || rig.node("gone").await.is_none();
    let waited = until_within(Duration::from_secs(150), "it is deleted", is_deleted).await;
    // Seen gone twice, a minute apart.
    assert!(waited >= Duration::from_secs(58), "deleted after {waited:?}");
    let events = rig.events_about("gone").await;
    assert!(events.contains("DeletingNode"), "{events}");
    let shown = rig.cluster.kubectl(&["get", "nodes", "--output=name"]).await;
    assert_eq!(shown.lines().collect::<Vec<_>>(), ["node/hidden", "node/stopped"]);
    assert!(!rig.has_taint("hidden", SHUTDOWN).await && !rig.has_taint("hidden", OUT_OF_SERVICE).await);

    // The stopped one was given up, and comes back.
    until("it is given up", async || rig.has_taint("stopped", OUT_OF_SERVICE).await).await;
    assert!(rig.has_taint("stopped", SHUTDOWN).await);
    rig.sim.start_vm(101).await.expect("it starts");
    stopped.set_ready(true).await;
    until("it is used again", async || {
        !rig.has_taint("stopped", OUT_OF_SERVICE).await && !rig.has_taint("stopped", SHUTDOWN).await
    })
    .await;

    rig.assert_nothing_was_refused(CCM);
    assert_eq!(rights::used(&rig, CCM), rights::granted(&rig, CCM).await);
}
