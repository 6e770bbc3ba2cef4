//! `explain`: all about one volume, and what the driver would do with it.

use serde_json::{Value, json};

use crate::{
    rig::{Rig, Said},
    support::volid,
};

/// `operation: outcome: text` of each rehearsal.
fn operations(said: &Said) -> Vec<String> {
    let document: Value =
        serde_json::from_str(&said.out).unwrap_or_else(|_| panic!("{}{}", said.out, said.err));
    let operations = document["volume"]["operations"].as_array().expect("a list").clone();
    let word = |one: &Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
    operations
        .iter()
        .map(|one| ["operation", "outcome", "text"].map(|key| word(one, key)).join(": "))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_in_use_is_told_in_full_and_nothing_is_touched() {
    let rig = Rig::start().await;
    let volume = rig.attached("pvc-1", "shared", "worker-101").await;
    rig.put_pod("web", "worker-101", "pvc-1");
    rig.bench.sim.clear_log();
    let said = rig.tool(&["explain", &volume]).await;
    insta::assert_snapshot!("explain_attached", said.shown());
    insta::assert_snapshot!(
        "explain_attached_json",
        rig.tool(&["explain", &volume, "-o", "json"]).await.shown()
    );
    let writes: Vec<_> = rig.bench.sim.log().into_iter().filter(|one| one.method != "GET").collect();
    assert!(writes.is_empty(), "{writes:?}");
    assert_eq!(rig.bench.slots(101, &volume).current, ["scsi1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_found_by_its_pv_and_its_claim() {
    let rig = Rig::start().await;
    let volume = rig.volume("pvc-1", "data").await;
    for name in [volume.as_str(), "pvc-1", "shop/pvc-1"] {
        let said = rig.tool(&["explain", name, "-o", "json"]).await;
        assert_eq!(said.code, 0, "{}{}", said.out, said.err);
        assert_eq!(
            operations(&said),
            [
                "attach to node worker-101: would: plug `data:900000000/vm-900000000-pvc-1.raw` into slot scsi1 of VM 101",
                "detach from node worker-101: nothing: it is not attached there",
                "delete: would: delete it, with its data",
            ],
            "{name}"
        );
    }
    let said = rig.tool(&["explain", "pvc-2"]).await;
    assert_eq!((said.code, said.out.as_str()), (1, ""));
    assert!(said.err.contains("no PV of this driver has that name or claim"), "{}", said.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attach_that_would_be_refused_says_why() {
    let rig = Rig::start().await;
    let volume = rig.attached("pvc-1", "shared", "worker-101").await;
    rig.volume("pvc-2", "data").await;
    let elsewhere = rig.tool(&["explain", "pvc-1", "--node", "worker-103", "-o", "json"]).await;
    let attach = &operations(&elsewhere)[0];
    assert!(attach.starts_with("attach to node worker-103: refuses: cannot attach"), "{attach}");
    assert!(attach.contains("it is held by VM 101"), "{attach}");
    let zone = rig.tool(&["explain", "pvc-2", "--node", "worker-103", "-o", "json"]).await;
    assert!(operations(&zone)[0].contains("is on a storage local to Proxmox node `pve1`"), "{}", zone.out);
    let delete = &operations(&elsewhere)[2];
    assert!(delete.starts_with("delete: refuses:") && delete.contains("VM 101"), "{delete}");
    assert_eq!(rig.bench.slots(101, &volume).qemu, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_of_a_stuck_vm_says_what_stands_in_the_way() {
    let rig = Rig::start().await;
    let volume = rig.attached("pvc-1", "shared", "worker-101").await;
    rig.bench.sim.set_vm_key(101, "lock", Some("backup"));
    rig.put_attachment("pvc-1", "worker-101", &[].into());
    let said = rig.tool(&["explain", &volume]).await;
    assert!(said.out.contains("detach from node worker-101: would be refused"), "{}", said.out);
    assert!(said.out.contains("VM 101 is locked (backup)"), "{}", said.out);
    rig.bench.sim.set_vm_key(101, "lock", None);
    rig.bench.fault(json!({"fault": "hang_qemu", "vmid": 101}));
    let said = rig.tool(&["explain", &volume]).await;
    assert!(said.out.contains("no QEMU runs, or it does not say"), "{}", said.out);
    assert!(said.out.contains("error      vm-silent: VM 101"), "{}", said.out);
    assert_eq!(said.code, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_volume_and_no_other_is_told() {
    let rig = Rig::start().await;
    rig.bench.volume("pvc-orphan", "data").await;
    let volume = rig.volume("pvc-1", "shared").await;
    rig.bench.attach(&volume, "worker-101").await.expect("attached");
    let form = format!("scsi5={}", volid(&volume));
    rig.bench.admin("POST", "/nodes/pve2/qemu/103/config", &form).await;
    rig.until_slot(103, "scsi5").await;
    let said = rig.tool(&["explain", &volume]).await;
    insta::assert_snapshot!("explain_double", said.shown());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_gone_is_told_as_proven_and_one_that_can_not_be_told_is_not() {
    let rig = Rig::start().await;
    rig.volume("pvc-0", "shared").await;
    let volume = rig.volume("pvc-1", "shared").await;
    rig.bench.delete(&volume).await.expect("deleted");
    let said = rig.tool(&["explain", &volume]).await;
    assert_eq!(said.code, 1);
    assert!(said.out.contains("no: it is proven not to be there"), "{}", said.out);
    assert!(said.out.contains("delete: nothing to do: it is gone already"), "{}", said.out);
    rig.bench.fault(json!({"fault": "unmount", "storage": "shared"}));
    let said = rig.tool(&["explain", &volume]).await;
    assert!(said.out.contains("exists      unknown:"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_kubernetes_a_file_names_the_nodes() {
    let rig = Rig::start().await;
    let volume = rig.bench.volume("pvc-1", "data").await.volume_id;
    let uuid = rig.bench.sim.vm(101).and_then(|vm| vm.conf.uuid().map(str::to_owned)).expect("a uuid");
    rig.write("nodes.yaml", &json!({"nodes": [{"name": "w1", "region": "test", "uuid": uuid}]}).to_string());
    let nodes = format!("--nodes={}", rig.path("nodes.yaml").display());
    let said = rig.tool_without_cluster(&["explain", &volume, &nodes]).await;
    insta::assert_snapshot!("explain_without_kubernetes", said.shown());
    let said = rig.tool_without_cluster(&["explain", "pvc-1"]).await;
    assert!(said.err.contains("is no volume handle (region/zone/storage/name)"), "{}", said.err);
    let said = rig.tool_without_cluster(&["explain", "mars//shared/x"]).await;
    assert!(said.out.contains("is not configured"), "{}{}", said.out, said.err);
}
