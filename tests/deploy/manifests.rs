//! Manifests for those who do without helm are what the chart renders, to the letter. `UPDATE_MANIFESTS=1` writes them anew.

use std::{env, fs};

use serde_json::Value;

use crate::{
    helm::{Rendering, object, objects, path},
    kubernetes::Cluster,
};

/// Each with the release and namespace that it is rendered with.
const MANIFESTS: [(&str, &str, &str); 5] = [
    ("standard", "proxmox-csi", "csi-proxmox"),
    ("k0s", "proxmox-csi", "csi-proxmox"),
    ("microk8s", "proxmox-csi", "csi-proxmox"),
    ("talos", "proxmox-csi", "csi-proxmox"),
    ("ccm", "proxmox-ccm", "proxmox-ccm"),
];

fn rendered(name: &str, release: &str, namespace: &str) -> String {
    let values = format!("deploy/values/{name}.yaml");
    let rendered = Rendering { release, namespace, values: &[&values], ..Rendering::default() }.text();
    format!(
        "# Made of deploy/chart with {values}; do not edit:\n\
         # helm template {release} deploy/chart --namespace {namespace} --values {values} --kube-version {}\n{rendered}",
        crate::helm::KUBERNETES
    )
}

fn assert_is(file: &str, expected: &str) {
    let file = path(file);
    if env::var_os("UPDATE_MANIFESTS").is_some() {
        fs::write(&file, expected).expect("written");
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == expected,
        "`{}` is not what the chart renders: run `UPDATE_MANIFESTS=1 cargo test --test deploy manifests::`",
        file.display()
    );
}

#[test]
fn the_manifests_are_what_the_chart_renders() {
    for (name, release, namespace) in MANIFESTS {
        assert_is(&format!("deploy/manifests/{name}.yaml"), &rendered(name, release, namespace));
    }
    let mut there: Vec<String> = fs::read_dir(path("deploy/manifests"))
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .filter(|name| name != "kustomization.yaml")
        .collect();
    there.sort();
    let mut made = MANIFESTS.map(|(name, ..)| format!("{name}.yaml"));
    made.sort();
    assert_eq!(there, made, "a manifest that nothing makes");
}

/// Talos applies what stands in its machine configuration, so the whole manifest stands there.
#[test]
fn the_example_for_talos_holds_the_manifest_for_talos() {
    let (name, release, namespace) = MANIFESTS[3];
    let head = "\
# A patch of the machine configuration of control-plane nodes: talosctl patch machineconfig --nodes NODE --patch @machine-config.yaml
# Made of deploy/manifests/talos.yaml. Put your own clusters into the Secret, and your registry before the images.
cluster:
  externalCloudProvider:
    enabled: true
  inlineManifests:
    - name: proxmox-csi-config
      contents: |-
        apiVersion: v1
        kind: Secret
        metadata:
          name: proxmox-csi
          namespace: csi-proxmox
        stringData:
          config.yaml: |
            clusters:
              - region: homelab
                url: https://pve1.example:8006
                token_id: csi@pve!csi
                token_secret: 11111111-2222-3333-4444-555555555555
    - name: proxmox-csi
      contents: |-
";
    let manifest = rendered(name, release, namespace);
    let body = manifest.lines().fold(String::new(), |all, line| {
        if line.is_empty() { all + "\n" } else { all + "        " + line + "\n" }
    });
    assert_is("deploy/talos/machine-config.yaml", &format!("{head}{body}"));
    let patch: Value = serde_saphyr::from_str(
        &fs::read_to_string(path("deploy/talos/machine-config.yaml")).expect("a file"),
    )
    .expect("YAML");
    let manifests = patch["cluster"]["inlineManifests"].as_array().expect("manifests");
    let inline = objects(manifests[1]["contents"].as_str().expect("text"));
    assert_eq!(inline, objects(&manifest));
    object(&objects(manifests[0]["contents"].as_str().expect("text")), "Secret", "proxmox-csi");
}

/// What kustomize, as kubectl has it, makes of them is the same.
#[tokio::test(flavor = "multi_thread")]
async fn kustomize_builds_the_same_objects_with_other_images() {
    let cluster = Cluster::start().await.unwrap_or_else(|error| panic!("{error}"));
    let directory = path("deploy/manifests").display().to_string();
    let built = objects(&cluster.kubectl(&["kustomize", &directory]).await);
    let manifest = objects(&rendered("standard", "proxmox-csi", "csi-proxmox"));
    let sorted = |objects: &[Value]| {
        let mut all: Vec<String> = objects.iter().map(ToString::to_string).collect();
        all.sort();
        all
    };
    assert_eq!(sorted(&built), sorted(&manifest));
    for (name, ..) in MANIFESTS {
        let file = path(&format!("deploy/manifests/{name}.yaml")).display().to_string();
        // Its namespace comes with it.
        let namespace = if name == "ccm" { "proxmox-ccm" } else { "csi-proxmox" };
        if cluster.kubectl(&["get", "namespace", namespace, "--ignore-not-found"]).await.is_empty() {
            cluster.kubectl(&["create", "namespace", namespace]).await;
        }
        cluster
            .kubectl(&[
                "apply",
                "--server-side",
                "--validate=strict",
                "--dry-run=server",
                "--filename",
                &file,
            ])
            .await;
    }
}
