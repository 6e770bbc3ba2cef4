//! What a real API server says to what the chart renders: each field is known to it and each value legal.

use std::process::Output;

use serde_json::json;

use crate::{
    helm::{Rendering, helm, objects, path, program, text},
    kubernetes::Cluster,
};

async fn cluster() -> Cluster {
    let cluster = Cluster::start().await.unwrap_or_else(|error| panic!("{error}"));
    let bin = path("tests/deploy/bin");
    program("helm");
    for definition in ["servicemonitors", "prometheusrules"] {
        let file = bin.join(format!("crd-{definition}.yaml"));
        cluster.kubectl(&["create", "--filename", &file.display().to_string()]).await;
    }
    cluster
        .kubectl(&["create", "--filename", &path("tests/deploy/vmpodscrape.yaml").display().to_string()])
        .await;
    let names = [
        "servicemonitors.monitoring.coreos.com",
        "prometheusrules.monitoring.coreos.com",
        "vmpodscrapes.operator.victoriametrics.com",
    ];
    for name in names {
        let definition = format!("customresourcedefinition/{name}");
        cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", &definition]).await;
    }
    cluster
}

/// Applies a file, on trial or for good; an unknown field is an error.
async fn apply(cluster: &Cluster, file: &std::path::Path, on_trial: bool) {
    let file = file.display().to_string();
    let mut arguments = vec!["apply", "--server-side", "--validate=strict", "--filename", &file];
    if on_trial {
        arguments.push("--dry-run=server");
    }
    cluster.kubectl(&arguments).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_api_server_takes_every_object_of_the_chart() {
    let cluster = cluster().await;
    let directory = cluster.directory().to_owned();
    for (number, namespace) in ["csi-proxmox", "kube-system", "somewhere-else"].into_iter().enumerate() {
        if namespace != "kube-system" {
            cluster.kubectl(&["create", "namespace", namespace]).await;
        }
        for values in ["cluster", "go-driver", "secret", "management", "tenant"] {
            let rendering = Rendering {
                values: &[&format!("tests/deploy/values/{values}.yaml")],
                set: &["createNamespace=false"],
                namespace,
                ..Rendering::default()
            };
            let file = rendering.write(&directory, &format!("{number}-{values}.yaml"));
            apply(&cluster, &file, true).await;
        }
    }
    // And for good, which a trial with objects that are in each other's way would not show.
    apply(&cluster, &directory.join("0-cluster.yaml"), false).await;
    let shown = cluster
        .kubectl(&[
            "get",
            "--filename",
            &directory.join("0-cluster.yaml").display().to_string(),
            "--output=name",
        ])
        .await;
    let rendered = std::fs::read_to_string(directory.join("0-cluster.yaml")).expect("a file");
    assert_eq!(shown.lines().count(), objects(&rendered).len(), "{shown}");
}

/// What an administrator does: install, look, upgrade, remove.
#[tokio::test(flavor = "multi_thread")]
async fn helm_installs_upgrades_and_removes_the_chart() {
    let cluster = Cluster::start().await.unwrap_or_else(|error| panic!("{error}"));
    let kubeconfig = cluster.kubeconfig("admin").display().to_string();
    let run = |arguments: &[&str]| -> String {
        let mut all = arguments.to_vec();
        all.extend(["--namespace", "csi-proxmox", "--kubeconfig", &kubeconfig]);
        let Output { status, stdout, stderr } = helm(&all);
        assert!(status.success(), "helm {}: {}", arguments.join(" "), text(&stderr));
        text(&stdout)
    };
    // No controller runs, so nothing gets ready: helm is not to wait.
    let values = "tests/deploy/values/go-driver.yaml";
    let install = [
        "install",
        "proxmox-csi",
        "deploy/chart",
        "--create-namespace",
        "--wait=hookOnly",
        "--values",
        values,
        "--set",
        "createNamespace=false",
    ];
    let notes = run(&install);
    assert!(
        notes.contains("proxmox-csi doctor") && notes.contains("PASSED OVER: `controller.snapshotter`"),
        "{notes}"
    );
    run(&[
        "upgrade",
        "proxmox-csi",
        "deploy/chart",
        "--wait=hookOnly",
        "--reuse-values",
        "--set",
        "ccm.enabled=true,replicaCount=2",
    ]);
    let deployments =
        cluster.kubectl(&["get", "deployments", "--namespace=csi-proxmox", "--output=name"]).await;
    assert_eq!(deployments, "deployment.apps/proxmox-csi-ccm\ndeployment.apps/proxmox-csi-controller\n");
    run(&["uninstall", "proxmox-csi", "--wait=hookOnly"]);
    for kind in ["clusterroles", "clusterrolebindings", "csidrivers", "storageclasses"] {
        let left = cluster
            .kubectl(&["get", kind, "--selector=app.kubernetes.io/name=proxmox-csi", "--output=name"])
            .await;
        assert_eq!(left, "", "helm leaves {kind} behind");
    }
}

/// A release of the Go driver's chart is upgraded to this one, with its name and its values: what can't be changed in a cluster (selectors,
/// StorageClasses, the `CSIDriver`) is as it was there.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_of_the_go_driver_is_upgraded_in_place() {
    let cluster = Cluster::start().await.unwrap_or_else(|error| panic!("{error}"));
    cluster.kubectl(&["create", "namespace", "csi-proxmox"]).await;
    let directory = cluster.directory().to_owned();
    // What can't be changed of what its chart 0.5.9 makes.
    let selector = |component: &str| {
        json!({"app.kubernetes.io/name": "proxmox-csi-plugin", "app.kubernetes.io/instance": "proxmox-csi-plugin",
            "app.kubernetes.io/component": component})
    };
    let workload = |kind: &str, component: &str| {
        json!({"apiVersion": "apps/v1", "kind": kind,
            "metadata": {"name": format!("proxmox-csi-plugin-{component}"), "namespace": "csi-proxmox"},
            "spec": {"selector": {"matchLabels": selector(component)}, "template": {"metadata": {"labels": selector(component)},
                "spec": {"containers": [{"name": format!("proxmox-csi-plugin-{component}"), "image": "x"}]}}}})
    };
    let class = |name: &str, parameters: serde_json::Value| {
        json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name},
            "provisioner": "csi.proxmox.sinextra.dev", "allowVolumeExpansion": true,
            "volumeBindingMode": "WaitForFirstConsumer", "reclaimPolicy": "Delete", "parameters": parameters})
    };
    let before = json!({"apiVersion": "v1", "kind": "List", "items": [
        workload("Deployment", "controller"), workload("DaemonSet", "node"),
        {"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": "csi.proxmox.sinextra.dev"},
            "spec": {"attachRequired": true, "podInfoOnMount": true, "storageCapacity": true, "volumeLifecycleModes": ["Persistent"]}},
        class("proxmox-data-xfs", json!({"csi.storage.k8s.io/fstype": "xfs", "storage": "data"})),
    ]});
    let file = directory.join("before.json");
    std::fs::write(&file, before.to_string()).expect("a file");
    cluster.kubectl(&["create", "--filename", &file.display().to_string()]).await;

    let after = Rendering {
        release: "proxmox-csi-plugin",
        values: &["tests/deploy/values/go-driver.yaml"],
        set: &["nameOverride=proxmox-csi-plugin"],
        ..Rendering::default()
    };
    let file = after.write(&directory, "after.yaml").display().to_string();
    cluster
        .kubectl(&["apply", "--server-side", "--force-conflicts", "--validate=strict", "--filename", &file])
        .await;
    let deployment = cluster
        .kubectl_json(&["get", "deployment", "proxmox-csi-plugin-controller", "--namespace=csi-proxmox"])
        .await;
    let containers = deployment["spec"]["template"]["spec"]["containers"].to_string();
    assert!(containers.contains("\"controller\""), "{containers}");
}

/// Why the node plugin is privileged: its mounts have to reach the host, and Kubernetes has that for privileged containers only.
#[tokio::test(flavor = "multi_thread")]
async fn mounts_that_reach_the_host_are_for_privileged_containers_only() {
    let cluster = Cluster::start().await.unwrap_or_else(|error| panic!("{error}"));
    let rendered =
        Rendering { set: &["controller.enabled=false"], namespace: "kube-system", ..Rendering::default() }
            .text();
    assert_eq!(rendered.matches("privileged: true").count(), 1, "one container is privileged");
    let file = cluster.directory().join("node.yaml");
    std::fs::write(&file, rendered.replace("privileged: true", "privileged: false")).expect("a file");
    let output = tokio::process::Command::new(Cluster::kubectl_path())
        .args(["apply", "--server-side", "--dry-run=server", "--filename"])
        .arg(&file)
        .env("KUBECONFIG", cluster.kubeconfig("admin"))
        .output()
        .await
        .expect("kubectl runs");
    let refused = text(&output.stderr);
    assert!(
        refused.contains("Bidirectional mount propagation is available only to privileged containers"),
        "{refused}"
    );
}
