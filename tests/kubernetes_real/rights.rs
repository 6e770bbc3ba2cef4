//! What the service accounts may do: what the fixtures grant, what the documents tell people to grant, and what is used of it.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::Value;

use crate::rig::{CCM, CONTROLLER, NAMESPACE, Rig};

/// A right: API group, resource and verb.
pub(crate) type Right = (String, String, String);

/// All that an account is allowed, as the API server has it.
pub(crate) async fn granted(rig: &Rig, account: &str) -> BTreeSet<Right> {
    let mut all = BTreeSet::new();
    for role in [&["get", "clusterrole", account][..], &["get", "role", account, "--namespace", NAMESPACE]] {
        let role = rig.cluster.kubectl_json(role).await;
        for rule in role["rules"].as_array().expect("rules") {
            let texts = |key: &str| {
                let values = rule[key].as_array().expect("a list").iter().filter_map(Value::as_str);
                values.map(str::to_owned).collect::<Vec<_>>()
            };
            for group in texts("apiGroups") {
                for resource in texts("resources") {
                    all.extend(
                        texts("verbs").into_iter().map(|verb| (group.clone(), resource.clone(), verb)),
                    );
                }
            }
        }
    }
    all
}

/// All that an account has done.
pub(crate) fn used(rig: &Rig, account: &str) -> BTreeSet<Right> {
    let requests = rig.requests_of(account).into_iter();
    requests.map(|request| (request.group, request.resource, request.verb)).collect()
}

#[test]
fn the_documents_name_the_rights_that_are_tested() {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read `{}`: {error}", path.display()))
    };
    for (document, account, fixture) in [
        ("docs/ccm.md", CCM, "tests/fixtures/rbac-ccm.yaml"),
        ("docs/configuration.md", CONTROLLER, "tests/fixtures/rbac-controller.yaml"),
    ] {
        let (text, tested) = (read(document), read(fixture));
        let roles: Vec<&str> = text
            .split("```yaml\n")
            .skip(1)
            .filter_map(|block| block.split("```").next())
            .flat_map(|block| block.split("---\n"))
            .filter(|object| object.contains("kind: ClusterRole\n") || object.contains("kind: Role\n"))
            .filter(|object| object.contains(&format!("metadata: {{name: {account}")))
            .collect();
        assert_eq!(roles.len(), 2, "`{document}` names a ClusterRole and a Role: {roles:?}");
        for role in roles {
            assert!(
                tested.split("---\n").any(|object| object == role),
                "`{fixture}` lacks what `{document}` has:\n{role}"
            );
        }
    }
}
