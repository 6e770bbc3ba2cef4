//! The node plugin as a process, as its sidecars meet it.

use std::{path::Path, time::Duration};

use hyper_util::rt::TokioIo;
use proxmox_csi::csi::proto::{
    NodeGetInfoRequest, NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest,
    ProbeRequest, identity_client::IdentityClient, node_client::NodeClient,
};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
};
use tonic::{Code, transport::Channel};

/// A machine whose firmware says this of its maker, and the node plugin on it.
async fn start(directory: &Path, maker: &str, more: &[&str]) -> (Child, Channel) {
    let dmi = directory.join("sys/class/dmi/id");
    for made in [&dmi, &directory.join("sys/block"), &directory.join("dev")] {
        std::fs::create_dir_all(made).expect("the tree is writable");
    }
    for (file, text) in [("sys_vendor", maker), ("chassis_vendor", maker), ("product_serial", "i=105")] {
        std::fs::write(dmi.join(file), format!("{text}\n")).expect("a file");
    }
    let socket = directory.join("csi.sock");
    let child = Command::new(env!("CARGO_BIN_EXE_proxmox-csi"))
        .args(["node", "--node-id", "worker-1", "--region", "r1", "--zone", "pve-1"])
        .arg("--csi-address")
        .arg(format!("unix://{}", socket.display()))
        .arg("--sysfs-root")
        .arg(directory.join("sys"))
        .arg("--dev-root")
        .arg(directory.join("dev"))
        .args(more)
        .kill_on_drop(true)
        .spawn()
        .expect("it starts");
    for _ in 0..2000 {
        if socket.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let connect = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://localhost");
    (child, endpoint.connect_with_connector(connect).await.expect("it listens"))
}

#[tokio::test]
async fn a_machine_that_is_no_vm_gets_no_volumes_and_the_process_stays_up() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut child, channel) = start(directory.path(), "Dell Inc.", &[]).await;
    let (mut identity, mut node) = (IdentityClient::new(channel.clone()), NodeClient::new(channel));
    for _ in 0..2 {
        let refusals = [
            identity.probe(ProbeRequest {}).await.map(drop),
            node.node_get_info(NodeGetInfoRequest {}).await.map(drop),
            node.node_stage_volume(NodeStageVolumeRequest::default()).await.map(drop),
            node.node_publish_volume(NodePublishVolumeRequest::default()).await.map(drop),
        ];
        for refusal in refusals {
            let refusal = refusal.expect_err("it is no VM");
            assert_eq!(refusal.code(), Code::FailedPrecondition);
            assert!(refusal.message().contains("`Dell Inc."), "{refusal}");
        }
    }
    let request = NodeUnpublishVolumeRequest {
        volume_id: "region//rbd/vm-9999-pvc-1".to_owned(),
        target_path: directory.path().join("target").display().to_string(),
    };
    node.node_unpublish_volume(request).await.expect("to take volumes away is always allowed");
    assert!(
        child.try_wait().expect("it can be asked").is_none(),
        "it does not end, so nothing starts it anew"
    );
}

#[tokio::test]
async fn a_vm_says_who_and_where_it_is_and_so_does_a_machine_that_is_said_to_be_one() {
    let cases: [(&str, &[&str]); 2] = [("QEMU", &[]), ("Dell Inc.", &["--allow-any-machine"])];
    for (maker, more) in cases {
        let directory = tempfile::tempdir().expect("a directory");
        let (_child, channel) = start(directory.path(), maker, more).await;
        let (mut identity, mut node) = (IdentityClient::new(channel.clone()), NodeClient::new(channel));
        let ready = identity.probe(ProbeRequest {}).await.expect("it answers").into_inner().ready;
        assert_eq!(ready, Some(true));
        for _ in 0..3 {
            let info = node.node_get_info(NodeGetInfoRequest {}).await.expect("it answers").into_inner();
            assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("worker-1/105", 24));
            let place = info.accessible_topology.expect("it is somewhere").segments;
            assert_eq!(place["topology.kubernetes.io/zone"], "pve-1");
        }
    }
}
