//! Which VM is a node? By uuid; a recorded VMID tells two of the same uuid apart; names never decide.
//!
//! What is known of a region ([`RegionFacts`]) may be old or have gaps. A VM that is found is found; that one is *not* there is
//! only said when every region answered and every config was read. Read [`locate`].

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use uuid::Uuid;

use super::sight::Sight;
use crate::{
    k8s::node::{self, ProviderId},
    types::{Bytes, NodeName, Region, VmId},
};

/// A VM, from its row and its config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmFacts {
    /// Its id.
    pub vmid: VmId,
    /// The PVE node its config is on.
    pub host: NodeName,
    /// Whether that one is online.
    pub host_online: bool,
    /// Its name.
    pub name: Option<String>,
    /// `running`, `stopped` or `unknown`.
    pub status: String,
    /// What locks it.
    pub lock: Option<String>,
    /// What the HA manager does with it.
    pub hastate: Option<String>,
    /// Virtual processors.
    pub cpus: u64,
    /// Memory.
    pub memory: Bytes,
    /// Tags.
    pub tags: Vec<String>,
    /// Its config, where that was read.
    pub identity: Option<Identity>,
}

/// What a VM's config says of who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// SMBIOS uuid.
    pub uuid: Option<Uuid>,
    /// SMBIOS sku, decoded.
    pub sku: Option<String>,
}

/// What is known of a region.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegionFacts {
    /// Whether the last poll was answered, and not long ago.
    pub fresh: bool,
    /// Whether more than half of its nodes are online.
    pub quorate: bool,
    /// Why it was not answered, where it was not.
    pub trouble: Option<String>,
    /// Whether the token sees every VM.
    pub sight: Sight,
    /// Its VMs without the templates.
    pub vms: BTreeMap<VmId, VmFacts>,
    /// Its PVE nodes.
    pub hosts: Vec<NodeName>,
}

impl RegionFacts {
    /// A VM whose config was never read.
    pub fn unread(&self) -> Option<VmId> {
        self.vms.values().find(|vm| vm.identity.is_none()).map(|vm| vm.vmid)
    }
}

/// All regions.
pub type Regions = BTreeMap<Region, RegionFacts>;

/// Which VM a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Located {
    /// This one. `twins`: others have its uuid too.
    Vm {
        /// The region.
        region: Region,
        /// The VM.
        vm: Box<VmFacts>,
        /// VMs of the same uuid.
        twins: Vec<(Region, VmId)>,
        /// Where it is recorded, if that is elsewhere.
        recorded_elsewhere: Option<(Region, VmId)>,
    },
    /// Several VMs have its uuid, and nothing records which of them it is.
    Twins(Vec<(Region, VmId)>),
    /// The recorded VMID is another VM's, and no VM has its uuid.
    Replaced {
        /// The region.
        region: Region,
        /// The VMID that is another's now.
        vmid: VmId,
    },
    /// No VM has its uuid, and none the recorded VMID.
    Absent {
        /// Where it was recorded.
        recorded: Option<(Region, VmId)>,
    },
    /// Some other controller's.
    NotOurs(NotOurs),
    /// It can't be told now.
    Unknown(Unclear),
}

/// Why a node is left alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotOurs {
    /// Its providerID is another provider's.
    #[error("its providerID `{0}` is not one of ours")]
    Foreign(String),
    /// It is recorded in a region that is not configured.
    #[error("its region `{0}` is not configured")]
    OtherRegion(Region),
    /// Its kubelet runs on a Proxmox host.
    #[error("it is the Proxmox node `{0}` itself, not a VM")]
    Host(NodeName),
}

/// Why it can't be told which VM a node is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unclear {
    /// The kubelet told no uuid.
    #[error("its kubelet told no systemUUID")]
    NoUuid,
    /// A region that may have it does not answer.
    #[error("region `{region}` does not answer: {why}")]
    Silent {
        /// The region.
        region: Region,
        /// Why.
        why: String,
    },
    /// The config of a VM that may be it was never read.
    #[error("the config of VM {vmid} of region `{region}` could not be read")]
    Unread {
        /// The region.
        region: Region,
        /// The VM.
        vmid: VmId,
    },
}

impl RegionFacts {
    fn silent(&self, region: &Region) -> Unclear {
        let why = self.trouble.clone().unwrap_or_else(|| "its last answer is too old".to_owned());
        Unclear::Silent { region: region.clone(), why }
    }
}

/// Where a node is recorded to be: by providerID, or by annotation and region.
pub fn recorded(node: &Node, regions: &Regions) -> Option<(Region, VmId)> {
    if let ProviderId::Vm(region, vmid) = ProviderId::of(node) {
        return Some((region, vmid));
    }
    let vmid = node::annotated_vmid(node)?;
    let only = || if regions.len() == 1 { regions.keys().next().cloned() } else { None };
    Some((node::region(node).or_else(only)?, vmid))
}

/// The uuids that are the node's: in either byte order.
fn uuids(system: Uuid, provider_id: &ProviderId) -> Vec<Uuid> {
    let both = vec![system, node::byte_swapped(system)];
    match provider_id {
        // It is the machine's too, or it was written for another one.
        ProviderId::Uuid(uuid) if !both.contains(uuid) => vec![*uuid],
        _ => both,
    }
}

/// The uuids by which a node's VM is known; none where its kubelet told none.
pub(super) fn node_uuids(node: &Node) -> Vec<Uuid> {
    node::system_uuid(node).map(|system| uuids(system, &ProviderId::of(node))).unwrap_or_default()
}

/// The VM of a node.
pub fn locate(node: &Node, regions: &Regions) -> Located {
    let provider_id = ProviderId::of(node);
    if let ProviderId::Foreign(text) = provider_id {
        return Located::NotOurs(NotOurs::Foreign(text));
    }
    let recorded = recorded(node, regions);
    if let Some((region, _)) = &recorded
        && !regions.contains_key(region)
    {
        return Located::NotOurs(NotOurs::OtherRegion(region.clone()));
    }
    let Some(system) = node::system_uuid(node) else {
        return Located::Unknown(Unclear::NoUuid);
    };
    let uuids = uuids(system, &provider_id);
    let is_it =
        |vm: &VmFacts| vm.identity.as_ref().and_then(|id| id.uuid).is_some_and(|id| uuids.contains(&id));
    let found: Vec<(&Region, &VmFacts)> = regions
        .iter()
        .flat_map(|(region, facts)| facts.vms.values().map(move |vm| (region, vm)))
        .filter(|(_, vm)| is_it(vm))
        .collect();
    let places = || found.iter().map(|(region, vm)| ((*region).clone(), vm.vmid));

    let at_record = recorded
        .as_ref()
        .and_then(|(region, vmid)| found.iter().find(|(r, vm)| *r == region && vm.vmid == *vmid).copied());
    let chosen = match (at_record, &found[..]) {
        (Some(it), _) => Some(it),
        (None, [it]) => Some(*it),
        _ => None,
    };
    if let Some((region, vm)) = chosen {
        if let Some(facts) = regions.get(region).filter(|facts| !facts.fresh) {
            return Located::Unknown(facts.silent(region));
        }
        let here = (region.clone(), vm.vmid);
        return Located::Vm {
            region: region.clone(),
            vm: Box::new(vm.clone()),
            twins: places().filter(|place| *place != here).collect(),
            recorded_elsewhere: recorded.filter(|place| *place != here),
        };
    }
    if found.len() > 1 {
        return Located::Twins(places().collect());
    }
    // From here on it is about absence, which needs every region's whole truth.
    for (region, facts) in regions {
        if !facts.fresh {
            return Located::Unknown(facts.silent(region));
        }
        if let Some(vmid) = facts.unread() {
            return Located::Unknown(Unclear::Unread { region: region.clone(), vmid });
        }
    }
    if let Some((region, vmid)) = &recorded
        && regions.get(region).is_some_and(|facts| facts.vms.contains_key(vmid))
    {
        return Located::Replaced { region: region.clone(), vmid: *vmid };
    }
    let name = node.metadata.name.as_deref().unwrap_or_default();
    // A kubelet may register by the whole name of its host.
    let short = name.split('.').next().unwrap_or_default();
    let mut hosts = regions.values().flat_map(|facts| &facts.hosts);
    if recorded.is_none()
        && let Some(host) = hosts.find(|host| host.as_str() == short)
    {
        return Located::NotOurs(NotOurs::Host(host.clone()));
    }
    Located::Absent { recorded }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    pub(in crate::ccm) const UUID: &str = "4daa5e68-83be-4e9d-9b71-8365c73aa16b";

    pub(in crate::ccm) fn node(provider_id: &str, uuid: &str) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "w1"}, "spec": {"providerID": provider_id},
            "status": {"nodeInfo": {"systemUUID": uuid, "architecture": "", "bootID": "",
                "containerRuntimeVersion": "", "kernelVersion": "", "kubeProxyVersion": "", "kubeletVersion": "",
                "machineID": "", "operatingSystem": "", "osImage": ""}}}))
        .expect("a node")
    }

    pub(in crate::ccm) fn vm(vmid: u32, uuid: &str) -> VmFacts {
        VmFacts {
            vmid: VmId::new(vmid).expect("a vmid"),
            host: "pve1".parse().expect("a name"),
            host_online: true,
            name: Some("other-name".into()),
            status: "running".into(),
            lock: None,
            hastate: None,
            cpus: 4,
            memory: Bytes::new(8 << 30),
            tags: Vec::new(),
            identity: Some(Identity { uuid: uuid.parse().ok(), sku: None }),
        }
    }

    fn regions(vms: Vec<VmFacts>) -> Regions {
        let vms = vms.into_iter().map(|vm| (vm.vmid, vm)).collect();
        let hosts = vec!["pve1".parse().expect("a name")];
        let facts =
            RegionFacts { fresh: true, quorate: true, trouble: None, sight: Sight::Whole, vms, hosts };
        BTreeMap::from([("r1".parse().expect("a region"), facts)])
    }

    fn found(located: Located) -> Option<(u32, usize)> {
        match located {
            Located::Vm { vm, twins, .. } => Some((vm.vmid.get(), twins.len())),
            _ => None,
        }
    }

    #[test]
    fn the_uuid_decides_and_names_do_not() {
        let all = regions(vec![vm(100, "00000000-0000-4000-8000-000000000001"), vm(101, UUID)]);
        assert_eq!(found(locate(&node("", UUID), &all)), Some((101, 0)));
        assert_eq!(found(locate(&node("proxmox://r1/101", &UUID.to_uppercase()), &all)), Some((101, 0)));
        assert_eq!(found(locate(&node(&format!("proxmox://{UUID}"), UUID), &all)), Some((101, 0)));
    }

    #[test]
    fn both_byte_orders_of_a_uuid_are_the_same_machine() {
        let all = regions(vec![vm(101, UUID)]);
        assert_eq!(found(locate(&node("", "685eaa4d-be83-9d4e-9b71-8365c73aa16b"), &all)), Some((101, 0)));
    }

    #[test]
    fn of_two_vms_with_one_uuid_the_recorded_one_is_the_node() {
        let all = regions(vec![vm(101, UUID), vm(102, UUID)]);
        assert_eq!(found(locate(&node("proxmox://r1/102", UUID), &all)), Some((102, 1)));
        assert!(matches!(locate(&node("", UUID), &all), Located::Twins(places) if places.len() == 2));
    }

    #[test]
    fn a_vmid_that_is_another_vm_now_is_told_from_one_that_is_gone() {
        let all = regions(vec![vm(101, "00000000-0000-4000-8000-000000000001")]);
        assert!(matches!(locate(&node("proxmox://r1/101", UUID), &all), Located::Replaced { .. }));
        assert!(matches!(
            locate(&node("proxmox://r1/102", UUID), &all),
            Located::Absent { recorded: Some(_) }
        ));
        assert!(matches!(locate(&node("", UUID), &all), Located::Absent { recorded: None }));
    }

    #[test]
    fn a_vm_restored_under_another_vmid_is_found_there() {
        let all = regions(vec![vm(200, UUID)]);
        let located = locate(&node("proxmox://r1/101", UUID), &all);
        assert!(matches!(located, Located::Vm { recorded_elsewhere: Some(_), .. }));
    }

    #[test]
    fn nothing_is_absent_while_a_region_is_silent_or_a_config_unread() {
        let mut all = regions(vec![vm(101, "00000000-0000-4000-8000-000000000001")]);
        all.insert("r2".parse().expect("a region"), RegionFacts::default());
        assert!(matches!(locate(&node("proxmox://r1/102", UUID), &all), Located::Unknown(_)));
        let mut unread = vm(103, UUID);
        unread.identity = None;
        let all = regions(vec![unread]);
        assert!(matches!(locate(&node("proxmox://r1/102", UUID), &all), Located::Unknown(_)));
        assert!(matches!(locate(&node("proxmox://r1/103", UUID), &all), Located::Unknown(_)));
    }

    #[test]
    fn a_silent_region_does_not_hold_up_the_others() {
        let mut all = regions(vec![vm(101, UUID)]);
        all.insert("r2".parse().expect("a region"), RegionFacts::default());
        assert_eq!(found(locate(&node("", UUID), &all)), Some((101, 0)));
        let mut silent = regions(vec![vm(101, UUID)]);
        for facts in silent.values_mut() {
            facts.fresh = false;
        }
        assert!(matches!(locate(&node("proxmox://r1/101", UUID), &silent), Located::Unknown(_)));
    }

    #[test]
    fn nodes_of_others_are_not_ours() {
        let all = regions(vec![vm(101, UUID)]);
        for provider_id in ["aws:///eu/i-1", "k3s://w1", "proxmox://elsewhere/101"] {
            assert!(matches!(locate(&node(provider_id, UUID), &all), Located::NotOurs(_)), "{provider_id}");
        }
        let mut host = node("", "00000000-0000-4000-8000-000000000009");
        host.metadata.name = Some("pve1".into());
        assert!(matches!(locate(&host, &all), Located::NotOurs(NotOurs::Host(_))));
        host.metadata.name = Some("pve1.example.com".into());
        assert!(matches!(locate(&host, &all), Located::NotOurs(NotOurs::Host(_))));
        assert!(matches!(locate(&node("", ""), &all), Located::Unknown(_)));
    }
}
