//! Which VM is a node: the answers of `KubeCluster`.

use proxmox_csi::{k8s::cluster::KubeCluster, types::cluster::Cluster as _};
use serde_json::{Value, json};

use crate::apiserver::ApiServer;

const NODES: &str = "/api/v1/nodes";
const UUID: &str = "4daa5e68-83be-4e9d-9b71-8365c73aa16b";

fn node(name: &str, provider_id: &str, labels: &Value, annotations: &Value, uuid: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {"providerID": provider_id},
        "status": {"nodeInfo": {"systemUUID": uuid, "architecture": "", "bootID": "", "containerRuntimeVersion": "",
            "kernelVersion": "", "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "",
            "operatingSystem": "", "osImage": ""}}})
}

#[tokio::test]
async fn a_node_is_found_by_every_path() {
    let server = ApiServer::default();
    let own =
        json!({"topology.proxmox.sinextra.dev/region": "own", "topology.kubernetes.io/region": "common"});
    let common = json!({"topology.kubernetes.io/region": "common"});
    let annotation = json!({"proxmox.sinextra.dev/instance-id": "107"});
    server.put(NODES, node("by-id", "proxmox://r1/105", &json!({}), &json!({}), &UUID.to_uppercase()));
    server.put(NODES, node("by-annotation", "", &own, &annotation, UUID));
    server.put(NODES, node("by-uuid", "", &common, &json!({}), UUID));
    // The kubelet read the firmware's tables in the other byte order.
    let swapped = "685eaa4d-be83-9d4e-9b71-8365c73aa16b";
    server.put(NODES, node("capmox", &format!("proxmox://{UUID}"), &common, &json!({}), swapped));
    let cluster = KubeCluster::new(server.client(), None);
    for (id, region, vmid) in [
        ("by-id", "r1", Some(105)),
        ("by-id/106", "r1", Some(106)),
        ("by-annotation", "own", Some(107)),
        ("by-uuid", "common", None),
        ("by-uuid/108", "common", Some(108)),
        ("capmox", "common", None),
    ] {
        let record = cluster.node(id).await.expect("an answer").expect("a node");
        assert_eq!(record.region.as_str(), region, "{id}");
        assert_eq!(record.vmid.map(proxmox_csi::types::VmId::get), vmid, "{id}");
        assert_eq!(record.uuid.to_string(), UUID, "{id}");
    }
    assert_eq!(cluster.nodes().await.expect("a list").len(), 4);
}

#[tokio::test]
async fn what_is_no_node_of_ours_is_told_apart_from_what_is_unclear() {
    let server = ApiServer::default();
    let cluster = KubeCluster::new(server.client(), None);
    assert_eq!(cluster.node("missing").await.expect("an answer"), None);
    assert_eq!(cluster.node("../secrets").await.expect("an answer"), None);
    server.put(NODES, node("edge", "k3s://edge", &json!({}), &json!({}), UUID));
    assert!(cluster.node("edge").await.is_err());
    assert!(cluster.nodes().await.expect("it is nobody's VM").is_empty());
    server
        .put(NODES, node("lost", "", &json!({}), &json!({"proxmox.sinextra.dev/instance-id": "100"}), UUID));
    let error = cluster.nodes().await.expect_err("left out, its VM would look free");
    assert_eq!(error.node, "lost");
    let only = KubeCluster::new(server.client(), "r1".parse().ok());
    assert_eq!(only.nodes().await.expect("a list").len(), 1);
    server.set_down(true);
    assert!(cluster.node("lost").await.is_err());
}
