//! What the chart grants: to the driver's own commands what is held against their every request elsewhere, and to the sidecars what they
//! were seen to ask for (`life.rs`).

use std::collections::BTreeSet;

use serde_json::Value;

use crate::helm::{Rendering, object, objects, path};

/// A right: API group, resource and verb, and the name where only that one is meant.
pub(crate) type Right = (String, String, String, Option<String>);

/// The rights of the rules of roles.
pub(crate) fn rights<'a>(roles: impl IntoIterator<Item = &'a Value>) -> BTreeSet<Right> {
    let texts = |value: &Value| -> Vec<String> {
        let all = value.as_array().into_iter().flatten();
        all.map(|text| text.as_str().expect("text").to_owned()).collect()
    };
    let mut all = BTreeSet::new();
    for rule in roles.into_iter().flat_map(|role| role["rules"].as_array().expect("rules")) {
        let mut named: Vec<Option<String>> = texts(&rule["resourceNames"]).into_iter().map(Some).collect();
        if named.is_empty() {
            named.push(None);
        }
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    for name in &named {
                        all.insert((group.clone(), resource.clone(), verb.clone(), name.clone()));
                    }
                }
            }
        }
    }
    all
}

fn granted(objects: &[Value], kinds: &[&str], name: &str) -> BTreeSet<Right> {
    rights(kinds.iter().map(|kind| object(objects, kind, name)))
}

/// The fixtures hold exactly what the commands were seen to use, over a real API server (`tests/kubernetes_real`) and for the loop over a
/// fake one, too (`tests/kubernetes`).
#[test]
fn the_chart_grants_the_commands_what_they_were_seen_to_use_and_no_more() {
    let chart = Rendering { values: &["tests/deploy/values/cluster.yaml"], ..Rendering::default() }.objects();
    for (fixture, account, ours) in [
        ("tests/fixtures/rbac-controller.yaml", "proxmox-csi-controller", "proxmox-csi-controller"),
        ("tests/fixtures/rbac-ccm.yaml", "proxmox-ccm", "proxmox-csi-ccm"),
    ] {
        let seen = objects(&std::fs::read_to_string(path(fixture)).expect("a fixture"));
        let kinds = ["ClusterRole", "Role"];
        assert_eq!(granted(&chart, &kinds, ours), granted(&seen, &kinds, account), "{fixture}");
    }
}

#[test]
fn what_is_turned_off_takes_its_rights_along() {
    let deletes = (String::new(), "nodes".to_owned(), "delete".to_owned(), None);
    let of = |set: &[&str]| {
        let objects = Rendering { set, ..Rendering::default() }.objects();
        granted(&objects, &["ClusterRole"], "proxmox-csi-ccm")
    };
    assert!(of(&["ccm.enabled=true"]).contains(&deletes));
    assert!(!of(&["ccm.enabled=true", "ccm.keepNodes=true"]).contains(&deletes));
    let labels = of(&["ccm.enabled=true", "ccm.labelsOnly=true"]);
    assert!(!labels.iter().any(|(_, resource, verb, _)| resource == "nodes/status" || verb == "delete"));

    let objects = Rendering { set: &["options.enableCapacity=false"], ..Rendering::default() }.objects();
    let sidecars = granted(&objects, &["Role"], "proxmox-csi-sidecars");
    let of_capacity = |resource: &str| ["csistoragecapacities", "pods", "replicasets"].contains(&resource);
    assert!(!sidecars.iter().any(|(_, resource, ..)| of_capacity(resource)), "{sidecars:?}");
}

/// A binding gives the roles of this release to the accounts of this release, and none is left unbound.
#[test]
fn every_role_is_bound_once_to_an_account_of_the_release() {
    for values in ["cluster", "tenant", "go-driver"] {
        let namespace = "somewhere-else";
        let objects = Rendering {
            values: &[&format!("tests/deploy/values/{values}.yaml")],
            namespace,
            release: "other",
            ..Rendering::default()
        }
        .objects();
        let of = |kind: &str| objects.iter().filter(move |object| object["kind"] == kind).collect::<Vec<_>>();
        for (role, binding) in [("ClusterRole", "ClusterRoleBinding"), ("Role", "RoleBinding")] {
            let mut bound: Vec<&Value> =
                of(binding).iter().map(|binding| &binding["roleRef"]["name"]).collect();
            let mut roles: Vec<&Value> = of(role).iter().map(|role| &role["metadata"]["name"]).collect();
            bound.sort_by_key(ToString::to_string);
            roles.sort_by_key(ToString::to_string);
            assert!(!roles.is_empty());
            assert_eq!(roles, bound, "{values}: {role}");
            for binding in of(binding) {
                let subject = &binding["subjects"][0];
                assert_eq!(subject["namespace"], namespace);
                object(&objects, "ServiceAccount", subject["name"].as_str().expect("a name"));
            }
        }
    }
}
