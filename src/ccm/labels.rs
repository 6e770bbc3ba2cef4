//! The labels and annotations that a node has for its VM.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;

use super::instances::VmFacts;
use crate::{
    k8s::node::{INSTANCE_ID, OWN_REGION, OWN_ZONE, REGION, ZONE},
    types::Region,
};

const OLD_REGION: &str = "failure-domain.beta.kubernetes.io/region";
const OLD_ZONE: &str = "failure-domain.beta.kubernetes.io/zone";
const INSTANCE_TYPE: &str = "node.kubernetes.io/instance-type";
const OLD_INSTANCE_TYPE: &str = "beta.kubernetes.io/instance-type";
/// What labels of HA groups begin with.
pub const GROUP_PREFIX: &str = "group.topology.proxmox.sinextra.dev/";

/// What the zone label does when the VM moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZoneMode {
    /// It follows.
    #[default]
    Follow,
    /// It stays as it was first set; the labels of our own names follow.
    Sticky,
}

/// What labels are made from, besides the VM.
#[derive(Debug, Clone, Copy, Default)]
pub struct LabelRules {
    /// What the zone does when the VM moves.
    pub zone: ZoneMode,
    /// The zone is the first HA group of the VM's host, not the host.
    pub zone_is_ha_group: bool,
}

/// A node's labels can't be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The zone is to be an HA group, and the host is in none.
    #[error("the zone is to be an HA group, but host `{0}` is in none")]
    NoGroup(String),
    /// The HA groups are not known.
    #[error(
        "the zone is to be an HA group, but the HA groups can't be read; hint: the token needs Sys.Audit on /"
    )]
    GroupsUnknown,
}

/// The labels of ours that a node of this VM has. `groups`: the HA groups of its host, `None` where they can't be read, which leaves
/// the labels of groups as they are.
pub fn desired(
    node: &Node,
    region: &Region,
    vm: &VmFacts,
    rules: LabelRules,
    groups: Option<&BTreeSet<String>>,
) -> Result<BTreeMap<String, String>, LabelError> {
    let host = vm.host.to_string();
    let zone = match (rules.zone_is_ha_group, groups) {
        (false, _) => host,
        (true, None) => return Err(LabelError::GroupsUnknown),
        (true, Some(groups)) => groups.first().cloned().ok_or(LabelError::NoGroup(host))?,
    };
    let mut labels = BTreeMap::from([
        (OWN_REGION.to_owned(), region.to_string()),
        (OWN_ZONE.to_owned(), zone.clone()),
        (INSTANCE_TYPE.to_owned(), instance_type(vm)),
        (OLD_INSTANCE_TYPE.to_owned(), instance_type(vm)),
    ]);
    for (key, old_key, value) in [(REGION, OLD_REGION, region.to_string()), (ZONE, OLD_ZONE, zone)] {
        // The framework of other controllers copies the old key over the new one: both say the same, always.
        let kept = node.labels().get(key).filter(|text| rules.zone == ZoneMode::Sticky && !text.is_empty());
        let value = kept.cloned().unwrap_or(value);
        labels.insert(key.to_owned(), value.clone());
        labels.insert(old_key.to_owned(), value);
    }
    match groups {
        Some(groups) => {
            let legal = groups.iter().filter(|group| is_label(group));
            labels.extend(legal.map(|group| (format!("{GROUP_PREFIX}{group}"), String::new())));
        }
        None => labels.extend(group_labels(node).map(|(key, value)| (key.clone(), value.clone()))),
    }
    Ok(labels)
}

/// The labels of HA groups that a node has.
fn group_labels(node: &Node) -> impl Iterator<Item = (&String, &String)> {
    node.labels().iter().filter(|(key, _)| key.starts_with(GROUP_PREFIX))
}

/// Labels of ours on the node that hold no more, whoever wrote them.
pub fn stale(node: &Node, desired: &BTreeMap<String, String>) -> Vec<String> {
    group_labels(node).map(|(key, _)| key).filter(|key| !desired.contains_key(*key)).cloned().collect()
}

/// The annotation that records the VMID, where the providerID does not.
pub fn annotations(vm: &VmFacts) -> BTreeMap<String, String> {
    BTreeMap::from([(INSTANCE_ID.to_owned(), vm.vmid.to_string())])
}

/// The SMBIOS sku where it can be a label, else what the VM has: `4VCPU-8GB`.
fn instance_type(vm: &VmFacts) -> String {
    let sku = vm.identity.as_ref().and_then(|identity| identity.sku.as_deref());
    match sku.filter(|sku| is_label(sku)) {
        Some(sku) => sku.to_owned(),
        None => format!("{}VCPU-{}GB", vm.cpus, vm.memory.get() >> 30),
    }
}

/// Whether a text can be the value of a label, or the name of one.
fn is_label(text: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63 && text.chars().all(legal) && edge(text.chars().next()) && edge(text.chars().last())
}

#[cfg(test)]
mod tests {
    use super::{
        super::instances::{
            Identity,
            tests::{UUID, node, vm},
        },
        *,
    };

    fn labels(
        node: &Node,
        vm: &VmFacts,
        rules: LabelRules,
        groups: Option<&[&str]>,
    ) -> BTreeMap<String, String> {
        let groups: Option<BTreeSet<String>> =
            groups.map(|all| all.iter().map(|group| (*group).to_owned()).collect());
        desired(node, &"r1".parse().expect("a region"), vm, rules, groups.as_ref()).expect("labels")
    }

    #[test]
    fn a_new_node_gets_every_label() {
        let labels = labels(&node("", UUID), &vm(101, UUID), LabelRules::default(), Some(&["fast"]));
        for (key, value) in [
            ("topology.kubernetes.io/region", "r1"),
            ("topology.kubernetes.io/zone", "pve1"),
            ("failure-domain.beta.kubernetes.io/region", "r1"),
            ("failure-domain.beta.kubernetes.io/zone", "pve1"),
            ("topology.proxmox.sinextra.dev/region", "r1"),
            ("topology.proxmox.sinextra.dev/zone", "pve1"),
            ("node.kubernetes.io/instance-type", "4VCPU-8GB"),
            ("beta.kubernetes.io/instance-type", "4VCPU-8GB"),
            ("group.topology.proxmox.sinextra.dev/fast", ""),
        ] {
            assert_eq!(labels.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert_eq!(labels.len(), 9);
    }

    #[test]
    fn a_sticky_zone_stays_and_our_own_label_follows() {
        let mut moved = node("", UUID);
        moved.labels_mut().insert(ZONE.into(), "pve9".into());
        let sticky = LabelRules { zone: ZoneMode::Sticky, ..LabelRules::default() };
        let labels_of = |rules| labels(&moved, &vm(101, UUID), rules, None);
        assert_eq!(labels_of(sticky)[ZONE], "pve9");
        assert_eq!(labels_of(sticky)[OLD_ZONE], "pve9");
        assert_eq!(labels_of(sticky)[OWN_ZONE], "pve1");
        assert_eq!(labels_of(LabelRules::default())[ZONE], "pve1");
    }

    #[test]
    fn group_labels_go_away_only_when_the_groups_are_known() {
        let mut old = node("", UUID);
        old.labels_mut().insert(format!("{GROUP_PREFIX}gone"), String::new());
        let known = labels(&old, &vm(101, UUID), LabelRules::default(), Some(&[]));
        assert_eq!(stale(&old, &known), [format!("{GROUP_PREFIX}gone")]);
        let unknown = labels(&old, &vm(101, UUID), LabelRules::default(), None);
        assert!(stale(&old, &unknown).is_empty() && unknown.contains_key(&format!("{GROUP_PREFIX}gone")));
    }

    #[test]
    fn the_zone_can_be_an_ha_group() {
        let rules = LabelRules { zone_is_ha_group: true, ..LabelRules::default() };
        assert_eq!(labels(&node("", UUID), &vm(101, UUID), rules, Some(&["b", "a"]))[ZONE], "a");
        let region = "r1".parse().expect("a region");
        let bad = |groups| desired(&node("", UUID), &region, &vm(101, UUID), rules, groups);
        assert_eq!(bad(None), Err(LabelError::GroupsUnknown));
        assert_eq!(bad(Some(&BTreeSet::new())), Err(LabelError::NoGroup("pve1".into())));
    }

    #[test]
    fn the_instance_type_is_the_sku_where_it_can_be() {
        let with = |sku: &str| {
            let mut vm = vm(101, UUID);
            vm.identity = Some(Identity { uuid: None, sku: Some(sku.to_owned()) });
            instance_type(&vm)
        };
        assert_eq!(with("m5.large"), "m5.large");
        for bad in ["", "a b", "-x", "größer"] {
            assert_eq!(with(bad), "4VCPU-8GB", "{bad}");
        }
    }
}
