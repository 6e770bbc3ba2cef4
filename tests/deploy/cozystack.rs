//! The packages for `CozyStack`: they render without a value, and the sources and bundle items name what is there.

use std::fs;

use serde_json::Value;

use crate::helm::{Rendering, arguments, container, names, object, objects, path};

const PACKAGES: [&str; 2] = ["proxmox-csi", "proxmox-ccm"];

fn read(file: &str) -> Value {
    let text = fs::read_to_string(path("deploy/cozystack").join(file)).expect("a file");
    objects(&text).remove(0)
}

fn rendered(package: &str) -> Vec<Value> {
    Rendering {
        chart: &format!("deploy/cozystack/packages/system/{package}"),
        release: package,
        namespace: &format!("cozy-{package}"),
        ..Rendering::default()
    }
    .objects()
}

#[test]
fn packages_for_cozystack_install_without_a_value() {
    let driver = rendered("proxmox-csi");
    let controller = object(&driver, "Deployment", "proxmox-csi-controller");
    let volumes = controller["spec"]["template"]["spec"]["volumes"].to_string();
    assert!(volumes.contains(r#""secretName":"proxmox-csi""#), "{volumes}");
    for name in
        ["DaemonSet proxmox-csi-node", "StorageClass proxmox-data-xfs", "CSIDriver csi.proxmox.sinextra.dev"]
    {
        assert!(names(&driver).iter().any(|one| one == name), "{name}");
    }
    let ccm = rendered("proxmox-ccm");
    let deployment = object(&ccm, "Deployment", "proxmox-ccm");
    assert!(arguments(container(deployment, "ccm")).contains(&"--labels-only".to_owned()));
    assert_eq!(deployment["metadata"]["labels"]["app"], "proxmox-cloud-controller-manager");
    assert!(!names(&ccm).iter().any(|name| name.starts_with("CSIDriver") || name.starts_with("DaemonSet")));
    // The configuration is a Secret that is there already.
    for object in driver.iter().chain(&ccm) {
        assert_ne!(object["kind"], "Secret");
    }
}

#[test]
fn sources_and_bundle_items_name_the_packages() {
    let bundle = read("bundle.yaml");
    for (package, item) in PACKAGES.into_iter().zip(bundle["releases"].as_array().expect("items")) {
        let chart = read(&format!("packages/system/{package}/Chart.yaml"));
        let source = read(&format!("sources/{package}.yaml"));
        let component = &source["spec"]["variants"][0]["components"][0];
        assert_eq!(source["metadata"]["name"], format!("cozystack.{package}"));
        assert_eq!(component["path"], format!("system/{package}"));
        for install in [&component["install"], item] {
            assert_eq!(install["releaseName"], package);
            assert_eq!(install["namespace"], format!("cozy-{package}"));
            // Pod Security lets the node plugin in, and nothing else needs it.
            assert_eq!(install["privileged"] == true, package == "proxmox-csi");
        }
        assert_eq!(item["name"], package);
        assert_eq!(item["chart"], chart["name"]);
        assert_eq!(chart["name"], format!("cozy-{package}"));
    }
}
