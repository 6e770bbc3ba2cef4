//! What the node plugin reads of its own Node.

use proxmox_csi::k8s::own_node::watch_own;
use serde_json::{Value, json};

use crate::apiserver::ApiServer;

const NODES: &str = "/api/v1/nodes";

fn node(labels: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "worker-1", "labels": labels}})
}

#[tokio::test(start_paused = true)]
async fn a_node_follows_its_labels_and_keeps_them_while_the_api_server_is_away() {
    let server = ApiServer::default();
    server.set_down(true);
    let mut labels = watch_own(server.client(), "worker-1");
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(*labels.borrow(), None, "nothing is known yet");
    server.set_down(false);
    let first = json!({"topology.kubernetes.io/region": "r1", "topology.kubernetes.io/zone": "pve-1"});
    server.put(NODES, node(&first));
    let zone = |own: &Option<proxmox_csi::types::cluster::OwnNode>| {
        let place = own.as_ref()?.place.as_ref()?;
        Some((place.zone.clone()?.to_string(), own.as_ref()?.max_volumes.map(std::num::NonZeroU32::get)))
    };
    labels.wait_for(|own| zone(own) == Some(("pve-1".to_owned(), None))).await.expect("it is read");

    let second = json!({"topology.kubernetes.io/region": "r1", "topology.kubernetes.io/zone": "pve-2",
        "csi.proxmox.sinextra.dev/max-volume-attachments": "7"});
    server.put(NODES, node(&second));
    labels.wait_for(|own| zone(own) == Some(("pve-2".to_owned(), Some(7)))).await.expect("it is followed");
    server.set_down(true);
    server.end_watches();
    tokio::time::sleep(std::time::Duration::from_mins(1)).await;
    assert_eq!(zone(&labels.borrow()), Some(("pve-2".to_owned(), Some(7))));
}
