//! The other accounts of the chart: the node plugin's, and what the controller's may read for the operator's tools.

use std::{collections::BTreeSet, path::Path, time::Duration};

use crate::{
    helm::{arguments, container, object},
    kubernetes::Process,
    life::Life,
    rig::{CONTROLLER, NAMESPACE, until_within},
    rights::rights,
};

const NODE: &str = "proxmox-csi-node";
const LONG: Duration = Duration::from_mins(2);

/// Group, resource and verb of all that an account asked for; nothing of it was refused.
fn used(life: &Life, account: &str) -> BTreeSet<(String, String, String)> {
    life.rig.assert_nothing_was_refused(account);
    let requests = life.rig.requests_of(account).into_iter();
    requests.map(|request| (request.group, request.resource, request.verb)).collect()
}

fn granted(life: &Life, role: &str) -> BTreeSet<(String, String, String)> {
    let all = rights([object(&life.objects, "ClusterRole", role)]);
    all.into_iter().map(|(group, resource, verb, _)| (group, resource, verb)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_plugin_uses_the_rights_of_its_account_and_no_more() {
    let life = Life::start().await;
    life.node("w101", 101).await;
    let kubeconfig = life.rig.cluster.service_account(NAMESPACE, NODE).await;
    let directory = life.rig.cluster.directory();
    let mut words = vec!["NODE_NAME=w101".to_owned(), env!("CARGO_BIN_EXE_proxmox-csi").to_owned()];
    for argument in arguments(container(object(&life.objects, "DaemonSet", NODE), "node")) {
        words.push(match argument.split('=').next().expect("a flag") {
            "--csi-address" => format!("--csi-address=unix://{}", life.rig.socket("node")),
            "--metrics-address" => "--metrics-address=127.0.0.1:0".to_owned(),
            // What Kubernetes puts in.
            "--node-id" => "--node-id=w101".to_owned(),
            _ => argument,
        });
    }
    words.extend(["--allow-any-machine".to_owned(), format!("--kubeconfig={}", kubeconfig.display())]);
    let _node = Process::start("node", Path::new("/usr/bin/env"), words, directory).expect("it starts");
    let watches = async || life.rig.requests_of(NODE).iter().any(|request| request.verb == "watch");
    until_within(LONG, "the node plugin watches its Node", watches).await;
    assert_eq!(used(&life, NODE), granted(&life, NODE));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tools_in_the_controllers_pod_use_the_rights_of_their_role() {
    let life = Life::start().await;
    life.node("w101", 101).await;
    let kubeconfig = life.rig.cluster.service_account(NAMESPACE, CONTROLLER).await;
    let config = life.rig.cluster.directory().join("config.yaml");
    for command in ["doctor", "volumes"] {
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_proxmox-csi"))
            .args([command, "--output=json", "--cloud-config"])
            .arg(&config)
            .arg("--kubeconfig")
            .arg(&kubeconfig)
            .output()
            .await
            .expect("it runs");
        let said = String::from_utf8_lossy(&output.stdout);
        let answer: serde_json::Value =
            serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        let unseen = answer["unseen"].to_string();
        assert!(
            !unseen.contains("kubernetes") && !said.contains("kubernetes-unreadable"),
            "{command}: {said}"
        );
    }
    assert_eq!(used(&life, CONTROLLER), granted(&life, "proxmox-csi-tools"));
}
