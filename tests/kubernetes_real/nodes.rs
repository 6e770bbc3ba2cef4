//! The life of Nodes whose VMs live.

use std::{collections::BTreeSet, time::Duration};

use kube::{
    ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::{Map, Value, json};
use tokio::time::sleep;

use crate::{
    rig::{CCM, NAMESPACE, Rig, SHUTDOWN, UNINITIALIZED, ZONE, provider_id, taints, until, until_within},
    support::REGION,
};

const RIGHTS: &str = "tests/fixtures/rbac-ccm.yaml";

/// The labels that the loop writes on a node whose host is in no HA group.
const OURS: [&str; 8] = [
    "beta.kubernetes.io/instance-type",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
    "topology.proxmox.sinextra.dev/region",
    "topology.proxmox.sinextra.dev/zone",
];

/// The columns of the line that begins with a word.
fn row<'a>(table: &'a str, first: &str) -> Vec<&'a str> {
    let row = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    row.into_iter()
        .find(|row| row.first() == Some(&first))
        .unwrap_or_else(|| panic!("no `{first}` in:\n{table}"))
}

/// What `managedFields` says that a manager owns below `metadata`.
fn owned(node: &Value, manager: &str, operation: &str) -> Map<String, Value> {
    let entries = node["metadata"]["managedFields"].as_array().expect("kubectl was told to show them");
    let is = |entry: &&Value| entry["manager"] == manager && entry["operation"] == operation;
    let mut entries = entries.iter().filter(is);
    let entry = entries.next().unwrap_or_else(|| panic!("`{manager}` owns nothing by {operation}: {node:#}"));
    assert!(entries.next().is_none(), "two entries of `{manager}`");
    entry["fieldsV1"].as_object().expect("an object").clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_node_is_initialised_and_kubectl_shows_it() {
    let rig = Rig::start(RIGHTS).await;
    let _ccm = rig.ccm("ccm-a", &[]).await;
    until("the loop acts", async || rig.holder(CCM).await.is_some_and(|holder| holder.starts_with("ccm-a_")))
        .await;

    let kubelet = rig.kubelet("w103", 103).await;
    let is_done = async || !rig.has_taint("w103", UNINITIALIZED).await;
    until_within(Duration::from_secs(20), "a new node is initialised", is_done).await;

    let node = rig.node("w103").await.expect("it is there");
    assert_eq!(provider_id(&node).as_deref(), Some(format!("proxmox://{REGION}/103").as_str()));
    // The second is the API server's own, for a node that was not ready before.
    assert_eq!(taints(&node), ["mine", "node.kubernetes.io/not-ready"]);

    let zones =
        ["get", "nodes", "--label-columns=topology.kubernetes.io/region,topology.kubernetes.io/zone,mine"];
    let table = rig.cluster.kubectl(&zones).await;
    assert_eq!(row(&table, "w103")[5..], [REGION, "pve2", "yes"], "{table}");
    let shown = rig.cluster.kubectl(&["describe", "node", "w103"]).await;
    assert_eq!(row(&shown, "ProviderID:")[1], format!("proxmox://{REGION}/103"));
    assert_eq!(row(&shown, "InternalIP:")[1], "10.0.0.103");
    assert_eq!(row(&shown, "Hostname:")[1], "w103");

    // What is ours is owned by us, and nothing else is: not the kubelet's label, nor that of a person.
    rig.cluster.kubectl(&["label", "node", "w103", "team=blue"]).await;
    let json = rig.cluster.kubectl_json(&["get", "node", "w103", "--show-managed-fields"]).await;
    let fields = owned(&json, CCM, "Apply");
    let keys: Vec<&String> = fields.keys().collect();
    assert_eq!(keys, ["f:metadata"], "applied fields outside of the metadata: {fields:?}");
    let metadata = fields["f:metadata"].as_object().expect("an object");
    assert_eq!(metadata.keys().collect::<Vec<_>>(), ["f:labels"], "{metadata:?}");
    let labels = metadata["f:labels"].as_object().expect("an object").keys();
    let labels: BTreeSet<&str> = labels.filter_map(|key| key.strip_prefix("f:")).collect();
    assert_eq!(labels, BTreeSet::from(OURS));

    // Who overwrites one of ours has it put right; the foreign ones stay.
    rig.cluster
        .kubectl(&["label", "node", "w103", "topology.kubernetes.io/zone=elsewhere", "--overwrite"])
        .await;
    until("an overwritten label is put right", async || {
        rig.label("w103", ZONE).await.as_deref() == Some("pve2")
    })
    .await;
    let node = rig.node("w103").await.expect("it is there");
    let labels = node.labels();
    assert_eq!((labels["team"].as_str(), labels["mine"].as_str()), ("blue", "yes"));

    // Deleted by a person and registered again, it is a new one of the same name.
    rig.cluster.kubectl(&["delete", "node", "w103"]).await;
    kubelet.register("").await;
    until("a node that came back is initialised", async || !rig.has_taint("w103", UNINITIALIZED).await).await;
    assert_eq!(rig.label("w103", ZONE).await.as_deref(), Some("pve2"));
    rig.assert_nothing_was_refused(CCM);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_and_a_resize_reach_the_labels_and_an_event_tells_of_the_move() {
    let rig = Rig::start(RIGHTS).await;
    let _ccm = rig.ccm("ccm-a", &[]).await;
    let kubelet = rig.kubelet("w101", 101).await;
    until("the zone", async || rig.label("w101", ZONE).await.as_deref() == Some("pve1")).await;

    rig.pve("POST", "/nodes/pve1/qemu/101/migrate", "target=pve2&online=1&with-local-disks=1").await;
    let follows = async || rig.label("w101", ZONE).await.as_deref() == Some("pve2");
    until_within(Duration::from_secs(20), "the zone follows a migration", follows).await;
    until("the event", async || rig.events_about("w101").await.contains("VmMoved")).await;
    let events = rig.events_about("w101").await;
    assert!(events.contains("VM 101 moved from `pve1` to `pve2`"), "{events}");
    let described = rig.cluster.kubectl(&["describe", "node", &kubelet.name]).await;
    assert!(described.contains("VmMoved") && described.contains(CCM), "{described}");

    let kind = "node.kubernetes.io/instance-type";
    let before = rig.label("w101", kind).await.expect("it has one");
    assert!(rig.sim.set_vm_key(101, "cores", Some("7")));
    until("a resize shows", async || {
        rig.label("w101", kind).await.is_some_and(|text| text.starts_with("7VCPU-"))
    })
    .await;
    assert!(!before.starts_with("7VCPU"), "{before}");
    rig.assert_nothing_was_refused(CCM);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_is_tainted_and_loses_the_taint_when_it_is_back() {
    let rig = Rig::start(RIGHTS).await;
    let _ccm = rig.ccm("ccm-a", &[]).await;
    let kubelet = rig.kubelet("w102", 102).await;
    until("it is initialised", async || !rig.has_taint("w102", UNINITIALIZED).await).await;

    assert!(rig.sim.stop_vm(102).await);
    kubelet.set_ready(false).await;
    let waited = until("a stopped VM is tainted", async || rig.has_taint("w102", SHUTDOWN).await).await;
    // Not on the first look: right after a migration a running VM looks stopped.
    assert!(waited >= Duration::from_secs(12), "{waited:?}");
    let shown = rig.cluster.kubectl(&["describe", "node", "w102"]).await;
    assert!(shown.contains(&format!("{SHUTDOWN}:NoSchedule")), "{shown}");

    rig.sim.start_vm(102).await.expect("it starts");
    kubelet.set_ready(true).await;
    until("it is back", async || !rig.has_taint("w102", SHUTDOWN).await).await;
    assert!(rig.has_taint("w102", "mine").await);
    rig.assert_nothing_was_refused(CCM);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_writes_nothing_and_once_writes_and_ends() {
    let rig = Rig::start(RIGHTS).await;
    let _kubelet = rig.kubelet("w101", 101).await;
    let before = rig.node("w101").await.expect("it is there");

    let mut dry = rig.ccm("ccm-dry", &["--dry-run"]).await;
    until("it says what it would write", async || {
        let log = dry.log();
        ["topology.kubernetes.io/zone=pve1", "providerID=proxmox://", "taints="]
            .iter()
            .all(|text| log.contains(text))
    })
    .await;
    assert!(dry.terminate().await.success());
    let once = ["--dry-run", "--once"];
    assert!(rig.ccm("ccm-dry-once", &once).await.end(Duration::from_mins(1)).await.success());
    assert_eq!(rig.node("w101").await, Some(before), "a dry run changed the node");
    assert_eq!(rig.holder(CCM).await, None, "a dry run took the lease");
    let asked = rig.requests_of(CCM);
    assert!(!asked.is_empty());
    let writes: Vec<_> =
        asked.iter().filter(|request| !matches!(request.verb.as_str(), "get" | "list" | "watch")).collect();
    assert!(writes.is_empty(), "{writes:?}");

    assert!(rig.ccm("ccm-once", &["--once"]).await.end(Duration::from_mins(1)).await.success());
    let node = rig.node("w101").await.expect("it is there");
    assert_eq!(node.labels().get(ZONE).map(String::as_str), Some("pve1"));
    assert!(!taints(&node).contains(&UNINITIALIZED.to_owned()), "{:?}", taints(&node));
    rig.assert_nothing_was_refused(CCM);
    assert!(
        !rig.cluster
            .kubectl(&["get", "lease", "--namespace", NAMESPACE, "--output=name"])
            .await
            .contains(CCM)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_id_that_is_there_stays_and_a_node_of_another_provider_is_left_alone() {
    let rig = Rig::start(RIGHTS).await;
    let of_cluster_api = format!("proxmox://{}", rig.uuid(101));
    let _machine = rig.kubelet_with("machine", 101, &of_cluster_api).await;
    let _foreign = rig.kubelet_with("foreign", 102, "k3s://foreign").await;
    let before = rig.node("foreign").await.expect("it is there");
    let _ccm = rig.ccm("ccm-a", &[]).await;

    until("it is initialised", async || !rig.has_taint("machine", UNINITIALIZED).await).await;
    let node = rig.node("machine").await.expect("it is there");
    assert_eq!(provider_id(&node), Some(of_cluster_api));
    // The providerID does not have the VMID, so it is recorded elsewhere; and the kubelet's annotation is still the kubelet's.
    let json = rig.cluster.kubectl_json(&["get", "node", "machine", "--show-managed-fields"]).await;
    let annotations = owned(&json, CCM, "Apply")["f:metadata"]["f:annotations"].clone();
    assert_eq!(annotations, json!({"f:proxmox.sinextra.dev/instance-id": {}}));
    assert_eq!(json["metadata"]["annotations"]["proxmox.sinextra.dev/instance-id"], "101");

    until("an event says why it is left alone", async || {
        rig.events_about("foreign").await.contains("`k3s://foreign`")
    })
    .await;
    assert_eq!(rig.node("foreign").await, Some(before));
    rig.assert_nothing_was_refused(CCM);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_others_write_all_the_time_is_initialised_too() {
    let rig = Rig::start(RIGHTS).await;
    let _ccm = rig.ccm("ccm-a", &[]).await;
    until("the loop acts", async || rig.holder(CCM).await.is_some_and(|holder| !holder.is_empty())).await;
    let kubelet = rig.kubelet("w101", 101).await;
    let writes = async {
        let person = PatchParams::default();
        for count in 0.. {
            let patch = Patch::Merge(json!({"metadata": {"annotations": {"count": count.to_string()}}}));
            rig.nodes.patch("w101", &person, &patch).await.expect("a person may annotate");
            kubelet.set_ready(true).await;
            sleep(Duration::from_millis(20)).await;
        }
    };
    let is_done = until("it is initialised", async || !rig.has_taint("w101", UNINITIALIZED).await);
    tokio::select! {
        () = writes => {}
        _ = is_done => {}
    }
    let node = rig.node("w101").await.expect("it is there");
    assert_eq!(provider_id(&node), Some(format!("proxmox://{REGION}/101")));
    assert_eq!(node.labels().get(ZONE).map(String::as_str), Some("pve1"));
    assert!(node.annotations().contains_key("count"), "nobody wrote it meanwhile");
    rig.assert_nothing_was_refused(CCM);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_was_restarted_is_watched_again() {
    let mut rig = Rig::start(RIGHTS).await;
    // Without a lease to lose, which a slow start would take.
    let ccm = rig.ccm("ccm-dry", &["--dry-run"]).await;
    let _before = rig.kubelet("w101", 101).await;
    until("it sees a node", async || ccm.log().contains("node=\"w101\"")).await;
    rig.cluster.restart_api_server().await;
    let _after = rig.kubelet("w102", 102).await;
    until("it sees a new node", async || ccm.log().contains("node=\"w102\"")).await;
    // A server that has just started refuses everybody until it knows the roles again.
    assert!(!rig.requests_of(CCM).is_empty());
}
