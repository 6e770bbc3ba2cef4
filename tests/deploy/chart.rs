//! What is rendered of which values.

use serde_json::{Value, json};

use crate::helm::{Rendering, arguments, container, helm, names, object, path, text};

/// What is rendered, without what is looked at elsewhere: the hash of the configuration, and the lines of the dashboard.
fn rendered(values: &str) -> String {
    let values = format!("tests/deploy/values/{values}.yaml");
    let text = Rendering { values: &[&values], ..Rendering::default() }.text();
    let mut in_dashboard = false;
    let mut shown = String::new();
    for line in text.lines() {
        in_dashboard &= line.starts_with("    ");
        let line = if line.trim_start().starts_with("checksum/config:") {
            "        checksum/config: HASH"
        } else {
            line
        };
        if !in_dashboard {
            shown.push_str(line);
            shown.push('\n');
        }
        in_dashboard |= line == "  proxmox-csi.json: |";
    }
    shown
}

macro_rules! rendering {
    ($values:literal) => {
        insta::with_settings!({ description => concat!("deploy/chart with tests/deploy/values/", $values, ".yaml"), omit_expression => true }, {
            insta::assert_snapshot!($values, rendered($values));
        });
    };
}

#[test]
fn what_is_rendered_has_been_read() {
    rendering!("cluster");
    rendering!("go-driver");
    rendering!("secret");
    rendering!("management");
    rendering!("tenant");
}

#[test]
fn helm_finds_nothing_to_mend() {
    for values in ["cluster", "go-driver", "secret", "management", "tenant"] {
        let file = format!("tests/deploy/values/{values}.yaml");
        let output = helm(&["lint", "--strict", "deploy/chart", "--values", &file]);
        assert!(output.status.success(), "{values}: {}{}", text(&output.stdout), text(&output.stderr));
    }
}

#[test]
fn the_chart_is_of_the_version_of_the_program() {
    let chart: Value =
        serde_saphyr::from_str(&std::fs::read_to_string(path("deploy/chart/Chart.yaml")).expect("a chart"))
            .expect("YAML");
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_value_that_means_nothing_is_named() {
    for (set, named) in [
        ("storageclass=x", "storageclass"),
        ("node.kubeletdir=/x", "kubeletdir"),
        ("mode=half", "mode"),
        ("timeout=3", "timeout"),
        ("storageClass[0].name=x", "storage"),
        ("volumeAttributesClass[0].name=x,volumeAttributesClass[0].parameters.iops=5", "iops"),
        ("config.clusters[0].url=https://x", "region"),
        ("controller.plugin.image.repository=ghcr.io/sergelogvinov/proxmox-csi-controller", "Go driver"),
    ] {
        let refusal = Rendering { set: &[set], ..Rendering::default() }.refusal();
        assert!(refusal.contains(named), "{set}: {refusal}");
    }
    let lacking = Rendering { set: &["mode=management"], ..Rendering::default() }.refusal();
    assert!(lacking.contains("kubeconfig.existingSecret"), "{lacking}");
}

/// The configuration goes into the Secret as it stands, and the driver reads it.
#[test]
fn the_secret_holds_the_configuration_of_the_values() {
    let objects =
        Rendering { values: &["tests/deploy/values/go-driver.yaml"], ..Rendering::default() }.objects();
    let secret = object(&objects, "Secret", "proxmox-csi");
    let encoded = secret["data"]["config.yaml"].as_str().expect("text");
    let decoded =
        base64::Engine::decode(&base64::engine::general_purpose::STANDARD, encoded).expect("base64");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), decoded).expect("written");
    let config = proxmox_csi::config::read(file.path()).expect("the driver reads it");
    assert!(matches!(&config.warnings[..], [one] if one.contains("`insecure`")), "{:?}", config.warnings);
    let regions: Vec<String> = config.clusters.iter().map(|cluster| cluster.region.to_string()).collect();
    assert_eq!(regions, ["cluster-1", "cluster-2"]);
}

/// Names and parameters of StorageClasses can't be changed in a cluster, so those of the Go driver's chart have to come out as there.
#[test]
fn classes_of_values_of_the_go_driver_come_out_as_its_chart_made_them() {
    let objects =
        Rendering { values: &["tests/deploy/values/go-driver.yaml"], ..Rendering::default() }.objects();
    let class = object(&objects, "StorageClass", "proxmox-data-xfs");
    assert_eq!(
        class,
        &json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "proxmox-data-xfs"},
            "provisioner": "csi.proxmox.sinextra.dev", "allowVolumeExpansion": true,
            "volumeBindingMode": "WaitForFirstConsumer", "reclaimPolicy": "Delete",
            "parameters": {"csi.storage.k8s.io/fstype": "xfs", "storage": "data"}})
    );
    assert_eq!(
        object(&objects, "StorageClass", "proxmox-data")["parameters"],
        json!({"csi.storage.k8s.io/fstype": "ext4", "storage": "data", "cache": "writethrough", "ssd": "true",
            "csi.storage.k8s.io/node-stage-secret-name": "proxmox-csi-secret",
            "csi.storage.k8s.io/node-stage-secret-namespace": "kube-system"})
    );
    let driver = object(&objects, "CSIDriver", "csi.proxmox.sinextra.dev");
    // What can't be changed either, and what the Go driver goes by after a way back.
    assert_eq!(driver["spec"]["attachRequired"], true);
    assert_eq!(driver["spec"]["volumeLifecycleModes"], json!(["Persistent"]));
    assert_eq!(driver["spec"]["podInfoOnMount"], true);
}

#[test]
fn the_kubelets_directory_is_the_distributions() {
    for (directory, expected) in [
        ("/var/lib/kubelet", "/var/lib/kubelet"),
        ("/var/lib/k0s/kubelet", "/var/lib/k0s/kubelet"),
        ("/var/snap/microk8s/common/var/lib/kubelet/", "/var/snap/microk8s/common/var/lib/kubelet"),
    ] {
        let set = format!("node.kubeletDir={directory}");
        let objects = Rendering { set: &[&set], ..Rendering::default() }.objects();
        let node = object(&objects, "DaemonSet", "proxmox-csi-node");
        let socket = format!("{expected}/plugins/csi.proxmox.sinextra.dev/csi.sock");
        assert!(
            arguments(container(node, "csi-node-driver-registrar"))
                .contains(&format!("--kubelet-registration-path={socket}"))
        );
        let volumes = node["spec"]["template"]["spec"]["volumes"].as_array().expect("volumes");
        let of = |name: &str| {
            volumes.iter().find(|volume| volume["name"] == name).expect("a volume")["hostPath"]["path"]
                .clone()
        };
        assert_eq!(of("kubelet"), expected);
        assert_eq!(of("socket"), format!("{expected}/plugins/csi.proxmox.sinextra.dev/"));
        assert_eq!(of("registration"), format!("{expected}/plugins_registry/"));
        let mounts = container(node, "node")["volumeMounts"].as_array().expect("mounts");
        let kubelet = mounts.iter().find(|mount| mount["name"] == "kubelet").expect("a mount");
        assert_eq!(
            (&kubelet["mountPath"], &kubelet["mountPropagation"]),
            (&json!(expected), &json!("Bidirectional"))
        );
    }
}

/// Proxmox's credentials are in no pod that a worker runs for its own sake.
#[test]
fn the_node_plugin_holds_no_credential() {
    for values in ["cluster", "go-driver", "tenant"] {
        let objects =
            Rendering { values: &[&format!("tests/deploy/values/{values}.yaml")], ..Rendering::default() }
                .objects();
        let node = object(&objects, "DaemonSet", "proxmox-csi-node").to_string();
        assert!(!node.contains("secret"), "{values}: {node}");
    }
}

#[test]
fn halves_of_a_tenant_are_the_whole_and_the_managing_one_has_nothing_outside_of_its_namespace() {
    let of = |values: &str| {
        Rendering { values: &[&format!("tests/deploy/values/{values}.yaml")], ..Rendering::default() }
            .objects()
    };
    let management = of("management");
    let names_of_it = names(&management);
    assert_eq!(
        names_of_it.iter().filter(|name| !name.starts_with("NetworkPolicy")).collect::<Vec<_>>(),
        [
            "Deployment proxmox-csi-ccm",
            "Deployment proxmox-csi-controller",
            "PodDisruptionBudget proxmox-csi-ccm",
            "PodDisruptionBudget proxmox-csi-controller",
            "ServiceAccount proxmox-csi-ccm",
            "ServiceAccount proxmox-csi-controller",
        ]
    );
    for object in &management {
        assert_eq!(object["metadata"]["namespace"], "csi-proxmox", "{object}");
    }
    // The pods have no account in the cluster they run in, and each process goes by the tenant's kubeconfig.
    let controller = object(&management, "Deployment", "proxmox-csi-controller");
    assert_eq!(controller["spec"]["template"]["spec"]["automountServiceAccountToken"], false);
    for name in ["controller", "csi-provisioner", "csi-attacher", "csi-resizer"] {
        let arguments = arguments(container(controller, name));
        assert!(arguments.contains(&"--kubeconfig=/etc/kubernetes/tenant/kubeconfig".to_owned()), "{name}");
    }
    let tenant = names(&of("tenant"));
    assert!(
        !tenant.iter().any(|name| name.starts_with("Deployment") || name.starts_with("Secret")),
        "{tenant:?}"
    );
    for name in
        ["DaemonSet proxmox-csi-node", "CSIDriver csi.proxmox.sinextra.dev", "StorageClass proxmox-data-xfs"]
    {
        assert!(tenant.iter().any(|one| one == name), "{name}");
    }
}

/// Every flag that the chart gives to a command is one that it knows.
#[test]
fn every_flag_of_the_chart_is_known_to_its_command() {
    for values in ["cluster", "management"] {
        let objects = Rendering {
            values: &[&format!("tests/deploy/values/{values}.yaml")],
            set: &["ccm.keepNodes=true", "ccm.labelsOnly=true"],
            ..Rendering::default()
        }
        .objects();
        for workload in objects.iter().filter(|object| object["spec"]["template"].is_object()) {
            for container in
                workload["spec"]["template"]["spec"]["containers"].as_array().expect("containers")
            {
                let arguments = arguments(container);
                let Some(command) = arguments.first().filter(|first| !first.starts_with('-')) else {
                    continue;
                };
                let help = std::process::Command::new(env!("CARGO_BIN_EXE_proxmox-csi"))
                    .args([command, "--help"])
                    .output()
                    .expect("it runs");
                let help = text(&help.stdout);
                for flag in &arguments[1..] {
                    let flag = flag.split('=').next().expect("a flag");
                    assert!(
                        help.contains(&format!("{flag} ")) || help.contains(&format!("{flag}\n")),
                        "{command}: {flag}"
                    );
                }
            }
        }
    }
}
