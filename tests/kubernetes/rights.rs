//! What a client may do, as a file of roles says, and what it did.

use std::collections::{BTreeMap, BTreeSet};

use http::Method;
use serde::Deserialize;

/// What `proxmox-csi ccm` may do.
pub(crate) const CCM: &str = include_str!("../fixtures/rbac-ccm.yaml");

/// A right: API group, resource with its part behind `/`, verb, and the name where only that one is meant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Right {
    pub(crate) group: String,
    pub(crate) resource: String,
    pub(crate) verb: String,
    pub(crate) name: Option<String>,
}

#[derive(Deserialize)]
struct Role {
    kind: String,
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    api_groups: Vec<String>,
    resources: Vec<String>,
    #[serde(default)]
    resource_names: Vec<String>,
    verbs: Vec<String>,
}

/// The rights that a file of roles gives.
pub(crate) fn rights(file: &str) -> BTreeSet<Right> {
    let mut all = BTreeSet::new();
    for text in file.split("\n---\n") {
        let role: Role = serde_saphyr::from_str(text).expect("an object");
        let grants = matches!(role.kind.as_str(), "ClusterRole" | "Role");
        assert!(grants || role.rules.is_empty(), "a {} with rules", role.kind);
        for rule in role.rules {
            let names: Vec<Option<String>> = if rule.resource_names.is_empty() {
                vec![None]
            } else {
                rule.resource_names.into_iter().map(Some).collect()
            };
            for (group, resource) in
                rule.api_groups.iter().flat_map(|group| rule.resources.iter().map(move |r| (group, r)))
            {
                for (verb, name) in rule.verbs.iter().flat_map(|verb| names.iter().map(move |n| (verb, n))) {
                    all.insert(Right {
                        group: group.clone(),
                        resource: resource.clone(),
                        verb: verb.clone(),
                        name: name.clone(),
                    });
                }
            }
        }
    }
    all
}

/// What a request does.
pub(crate) fn of(method: &Method, path: &str, query: &BTreeMap<String, String>) -> Right {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    // `/api/v1/…` and `/apis/<group>/v1/…`, with or without a namespace.
    let (group, rest) = match parts.as_slice() {
        ["api", _, rest @ ..] => ("", rest),
        ["apis", group, _, rest @ ..] => (*group, rest),
        _ => ("?", parts.as_slice()),
    };
    let rest = match rest {
        ["namespaces", _, rest @ ..] if !rest.is_empty() => rest,
        rest => rest,
    };
    let (resource, name, part) = match rest {
        [resource] => (*resource, None, None),
        [resource, name] => (*resource, Some(*name), None),
        [resource, name, part] => (*resource, Some(*name), Some(*part)),
        _ => ("?", None, None),
    };
    let watches = query.get("watch").is_some_and(|on| on == "true" || on == "1");
    let verb = match (method.as_str(), name) {
        ("GET", None) if watches => "watch",
        ("GET", None) => "list",
        ("GET", Some(_)) => "get",
        ("POST", _) => "create",
        ("PUT", _) => "update",
        ("PATCH", _) => "patch",
        ("DELETE", Some(_)) => "delete",
        _ => "?",
    };
    Right {
        group: group.to_owned(),
        resource: part.map_or_else(|| resource.to_owned(), |part| format!("{resource}/{part}")),
        verb: verb.to_owned(),
        name: name.map(str::to_owned),
    }
}

/// The right that covers what was done, if one does.
pub(crate) fn covering<'a>(rights: &'a BTreeSet<Right>, done: &Right) -> Option<&'a Right> {
    rights.iter().find(|right| {
        (&right.group, &right.resource, &right.verb) == (&done.group, &done.resource, &done.verb)
            && (right.name.is_none() || right.name == done.name)
    })
}
