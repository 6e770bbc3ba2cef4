//! `volumes`: the table of all volumes.

use serde_json::{Value, json};

use crate::{
    rig::{self, Rig, Said},
    support::{HOLDER, volid},
};

/// Six volumes, one of each state but `pending`.
async fn rig() -> Rig {
    let rig = Rig::start().await;
    rig.attached("pvc-1", "shared", "worker-101").await;
    rig.volume("pvc-2", "data").await;
    rig.bench.volume("pvc-orphan", "data").await;
    let gone = rig.volume("pvc-gone", "shared").await;
    rig.bench.delete(&gone).await.expect("deleted");
    let twice = rig.attached("pvc-twice", "shared", "worker-102").await;
    let form = format!("scsi5={}", volid(&twice));
    rig.bench.admin("POST", "/nodes/pve2/qemu/103/config", &form).await;
    let held = rig.volume("pvc-held", "shared").await;
    rig.bench.admin("POST", "/nodes/pve1/qemu", "vmid=999990000&name=csi-holder").await;
    rig.until_vm(999_990_000).await;
    let form = format!("scsi0={}", volid(&held));
    rig.bench.admin("POST", "/nodes/pve1/qemu/999990000/config", &form).await;
    rig.until_slot(999_990_000, "scsi0").await;
    rig.until_slot(103, "scsi5").await;
    rig
}

fn handles(said: &Said) -> Vec<String> {
    let document: Value =
        serde_json::from_str(&said.out).unwrap_or_else(|_| panic!("{}{}", said.out, said.err));
    let volumes = document["volumes"].as_array().expect("a list").clone();
    let name = |one: &Value| {
        one["name"].as_str().unwrap_or_default().rsplit("vm-900000000-").next().map(str::to_owned)
    };
    volumes.iter().filter_map(name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_volume_has_its_row() {
    let rig = rig().await;
    insta::assert_snapshot!("volumes", rig.tool(&["volumes"]).await.shown());
    insta::assert_snapshot!("volumes_wide", rig.tool(&["volumes", "-o", "wide"]).await.shown());
    insta::assert_snapshot!("volumes_json", rig.tool(&["volumes", "-o", "json"]).await.shown());
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_take_what_they_say() {
    let rig = rig().await;
    for (filter, expected) in [
        (&["--state", "orphan"][..], &["pvc-orphan.raw"][..]),
        (&["--state", "orphan", "--state", "missing"], &["pvc-gone.raw", "pvc-orphan.raw"]),
        (&["--storage", "data"], &["pvc-2.raw", "pvc-orphan.raw"]),
        (&["--zone", "pve1", "--state", "free"], &["pvc-2.raw"]),
        (&["--node", "worker-101"], &["pvc-1.raw"]),
        (&["--node", "103"], &["pvc-twice.raw"]),
        (&["--namespace", "shop", "--state", "holder"], &["pvc-held.raw"]),
        (&["--namespace", "elsewhere"], &[]),
        (&["--region", "mars"], &[]),
    ] {
        let all: Vec<&str> = ["volumes", "-o", "json"].iter().chain(filter).copied().collect();
        let said = rig.tool(&all).await;
        let mut found = handles(&said);
        found.sort();
        assert_eq!(
            (found, said.code),
            (expected.iter().map(|name| (*name).to_owned()).collect(), 0),
            "{filter:?}"
        );
    }
    let said = rig.tool(&["volumes", "--state", "lost"]).await;
    assert_eq!(said.code, 2);
    assert!(said.err.contains("it must be one of attached, free"), "{}", said.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_kubernetes_there_are_volumes_and_no_claims() {
    let rig = rig().await;
    let said = rig.tool_without_cluster(&["volumes"]).await;
    assert_eq!(said.code, 0);
    // What was not looked at is told beside the table, not in it.
    assert_eq!(said.err, "note: Kubernetes was not asked (--kubeconfig): PVs are not known\n");
    insta::assert_snapshot!("volumes_without_kubernetes", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_may_lack_something_says_so() {
    let rig = Rig::with(rig::world(), HOLDER).await;
    rig.attached("pvc-1", "shared", "worker-101").await;
    let quick = rig.tool(&["volumes", "--fast"]).await;
    assert_eq!(quick.code, 0);
    assert!(quick.err.contains("storages were not listed"), "{}", quick.err);
    assert!(quick.out.contains("worker-101 (101 scsi1)"), "{}", quick.out);

    rig.bench.fault(json!({"fault": "kill_node", "node": "pve2"}));
    let said = rig.tool(&["volumes"]).await;
    assert_eq!(said.code, 4, "{}", said.out);
    assert!(said.err.contains("VM 103 can not be read"), "{}", said.err);
    rig.server.set_down(true);
    let said = rig.tool(&["volumes", "-o", "json"]).await;
    assert_eq!(said.code, 4);
    assert!(said.out.contains("\"complete\": false"), "{}", said.out);
    assert!(!said.out.contains("\"orphan\""), "without PVs nobody knows an orphan: {}", said.out);
}
