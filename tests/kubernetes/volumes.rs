//! What Kubernetes keeps of a volume: `KubeCluster` over PVs and `VolumeAttributesClass`es.

use std::collections::BTreeMap;

use proxmox_csi::{
    k8s::{
        cluster::KubeCluster,
        volumes::{ATTRIBUTES, LIFECYCLE},
    },
    types::{
        attributes::Attributes,
        cluster::{Cluster as _, VolumeRecord},
    },
};
use serde_json::{Value, json};

use crate::apiserver::ApiServer;

const VOLUMES: &str = "/api/v1/persistentvolumes";
const CLASSES: &str = "/apis/storage.k8s.io/v1/volumeattributesclasses";
const HANDLE: &str = "r1//shared/9999/vm-9999-pvc-1.raw";

fn volume(name: &str, handle: &str, annotations: &Value, class: Option<&str>) -> Value {
    json!({"apiVersion": "v1", "kind": "PersistentVolume",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"csi": {"driver": "csi.proxmox.sinextra.dev", "volumeHandle": handle},
            "volumeAttributesClassName": class}})
}

fn attributes(pairs: &[(&str, &str)]) -> Attributes {
    let map: BTreeMap<_, _> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Attributes::parse(&map).expect("legal attributes")
}

#[tokio::test]
async fn a_pv_is_found_by_the_name_of_its_disk_or_among_all_others() {
    let server = ApiServer::default();
    let cluster = KubeCluster::new(server.client(), None);
    assert_eq!(cluster.volume(HANDLE).await.expect("an answer"), None);
    let keep = json!({LIFECYCLE: "keep"});
    // A PV that bears the name, and is another's.
    server.put(VOLUMES, volume("pvc-1", "r1//other/9999/vm-9999-pvc-1.raw", &json!({}), None));
    assert_eq!(cluster.volume(HANDLE).await.expect("an answer"), None);
    for index in 0..600 {
        server.put(VOLUMES, volume(&format!("a-{index}"), &format!("r1//x/{index}"), &json!({}), None));
    }
    server.put(VOLUMES, volume("made-by-hand", HANDLE, &keep, None));
    for _ in 0..2 {
        let record = cluster.volume(HANDLE).await.expect("an answer").expect("a record");
        assert_eq!(record, VolumeRecord { keep: true, attributes: Attributes::default() });
    }
    server.put(
        VOLUMES,
        volume("pvc-2", "r1//shared/9999/vm-9999-pvc-2.raw", &json!({LIFECYCLE: "delete"}), None),
    );
    let record = cluster.volume("r1//shared/9999/vm-9999-pvc-2.raw").await.expect("an answer");
    assert!(!record.expect("a record").keep);
    server.set_down(true);
    let error = cluster.volume(HANDLE).await.expect_err("nothing is known");
    assert!(error.to_string().contains(HANDLE), "{error}");
}

#[tokio::test]
async fn what_was_changed_is_kept_with_the_pv_and_goes_before_its_class() {
    let server = ApiServer::default();
    let cluster = KubeCluster::new(server.client(), None);
    let class = json!({"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttributesClass",
        "metadata": {"name": "gold"}, "driverName": "csi.proxmox.sinextra.dev",
        "parameters": {"diskIOPS": "500", "replicateSchedule": "*/15"}});
    server.put(CLASSES, class);
    server.put(VOLUMES, volume("pvc-1", HANDLE, &json!({"other": "annotation"}), Some("gold")));
    let read = async || cluster.volume(HANDLE).await.expect("an answer").expect("a record").attributes;
    // As the driver before this one left it: the class is all there is to go by.
    assert_eq!(read().await, attributes(&[("diskIOPS", "500")]));
    let changed = attributes(&[("diskIOPS", "0"), ("backup", "true")]);
    cluster.keep_attributes(HANDLE, &changed).await.expect("kept");
    assert_eq!(read().await, changed);
    let kept = server.get(VOLUMES, "pvc-1").expect("the PV");
    assert_eq!(kept["metadata"]["annotations"]["other"], "annotation");
    assert_eq!(kept["metadata"]["annotations"][ATTRIBUTES], r#"{"backup":"true","diskIOPS":"0"}"#);
    // A class that is gone says nothing.
    server.put(VOLUMES, volume("pvc-2", "r1//shared/9999/vm-9999-pvc-2.raw", &json!({}), Some("silver")));
    let record = cluster.volume("r1//shared/9999/vm-9999-pvc-2.raw").await.expect("an answer");
    assert!(record.expect("a record").attributes.is_empty());
    let error = cluster.keep_attributes("r1//shared/9999/vm-9999-pvc-9.raw", &changed).await;
    assert!(error.is_err(), "there is no PV to keep it in");
    // What nobody can read is not taken for nothing.
    let broken = json!({ATTRIBUTES: "{broken"});
    server.put(VOLUMES, volume("pvc-3", "r1//shared/9999/vm-9999-pvc-3.raw", &broken, None));
    assert!(cluster.volume("r1//shared/9999/vm-9999-pvc-3.raw").await.is_err());
}
