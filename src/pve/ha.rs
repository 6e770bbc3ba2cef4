//! Which PVE nodes belong together for the HA manager: groups of PVE 8, node-affinity rules of PVE 9.

use std::collections::{BTreeMap, BTreeSet};

use http::Method;
use serde::Deserialize;

use super::{
    ApiError,
    client::{Call, Client},
    wire,
};
use crate::types::NodeName;

/// The HA groups each PVE node is in, by name.
pub type HaGroups = BTreeMap<NodeName, BTreeSet<String>>;

#[derive(Deserialize)]
struct RawGroup {
    #[serde(default)]
    group: Option<String>,
    #[serde(default)]
    rule: Option<String>,
    #[serde(default)]
    nodes: Option<String>,
    #[serde(default, deserialize_with = "wire::flag")]
    disable: bool,
}

fn read(rows: Vec<RawGroup>) -> HaGroups {
    let mut groups = HaGroups::new();
    for row in rows.into_iter().filter(|row| !row.disable) {
        let Some(name) = row.group.or(row.rule) else { continue };
        // `pve1:2,pve2`: the number is a priority.
        for node in row.nodes.as_deref().unwrap_or_default().split(',') {
            if let Ok(node) = node.split(':').next().unwrap_or_default().parse() {
                groups.entry(node).or_default().insert(name.clone());
            }
        }
    }
    groups
}

impl Client {
    /// The HA groups of each PVE node. Needs `Sys.Audit` on `/`. PVE 9 has rules instead, and refuses to list groups; PVE 8 has no
    /// rules. Source: pve-ha-manager `API2/HA/Rules.pm`, `API2/HA/Groups.pm`.
    pub async fn ha_groups(&self) -> Result<HaGroups, ApiError> {
        let rules =
            Call::new("ha_rules", Method::GET, &[&"cluster", &"ha", &"rules"]).with("type", "node-affinity");
        match self.call::<Vec<RawGroup>>(rules).await {
            Ok(rows) => Ok(read(rows)),
            // The path is not known there.
            Err(error) if error.refusal().is_some_and(|(status, _)| matches!(status, 404 | 501)) => {
                let groups = Call::new("ha_groups", Method::GET, &[&"cluster", &"ha", &"groups"]);
                self.call::<Vec<RawGroup>>(groups).await.map(read)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_and_rules_read_the_same() {
        for text in [
            r#"[{"group":"fast","nodes":"pve1:2,pve2"},{"group":"slow","nodes":"pve2","type":"group"}]"#,
            r#"[{"rule":"fast","type":"node-affinity","nodes":"pve1:2,pve2","resources":"vm:100"},
                {"rule":"slow","nodes":"pve2"},{"rule":"off","nodes":"pve1","disable":1}]"#,
        ] {
            let groups = read(serde_json::from_str(text).expect("JSON"));
            let of = |node: &str| {
                let node: NodeName = node.parse().expect("a name");
                groups[&node].iter().cloned().collect::<Vec<_>>()
            };
            assert_eq!(of("pve1"), ["fast"]);
            assert_eq!(of("pve2"), ["fast", "slow"]);
        }
    }
}
