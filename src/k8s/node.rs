//! What a Node object says of its VM: labels, annotation, providerID, system uuid, readiness.

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::ResourceExt as _;
use uuid::Uuid;

use crate::types::{Region, VmId};

/// Label and topology key of the region.
pub const REGION: &str = crate::types::topology::REGION_KEY;
/// Label and topology key of the zone.
pub const ZONE: &str = crate::types::topology::ZONE_KEY;
/// Label of the region by a name of our own, which overrides the common one.
pub const OWN_REGION: &str = "topology.proxmox.sinextra.dev/region";
/// Label of the zone by a name of our own.
pub const OWN_ZONE: &str = "topology.proxmox.sinextra.dev/zone";
/// Annotation with the VMID.
pub const INSTANCE_ID: &str = "proxmox.sinextra.dev/instance-id";

/// What `spec.providerID` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProviderId {
    /// Nothing yet.
    Empty,
    /// `proxmox://region/vmid`.
    Vm(Region, VmId),
    /// `proxmox://uuid`, as Cluster API's provider for Proxmox writes it.
    Uuid(Uuid),
    /// Another provider's, or a text of ours that can't be read.
    Foreign(String),
}

impl ProviderId {
    /// Reads a providerID.
    pub fn read(text: &str) -> Self {
        if text.is_empty() {
            return Self::Empty;
        }
        let foreign = || Self::Foreign(text.to_owned());
        let Some(rest) = text.strip_prefix("proxmox://") else { return foreign() };
        match rest.split_once('/') {
            None => rest.parse().map_or_else(|_| foreign(), Self::Uuid),
            Some((region, vmid)) => match (region.parse(), vmid.parse()) {
                (Ok(region), Ok(vmid)) => Self::Vm(region, vmid),
                _ => foreign(),
            },
        }
    }

    /// The providerID of a node.
    pub fn of(node: &Node) -> Self {
        Self::read(node.spec.as_ref().and_then(|spec| spec.provider_id.as_deref()).unwrap_or_default())
    }
}

/// The uuid that the kubelet read from the machine's firmware tables.
pub fn system_uuid(node: &Node) -> Option<Uuid> {
    node.status.as_ref()?.node_info.as_ref()?.system_uuid.trim().parse().ok().filter(|id: &Uuid| !id.is_nil())
}

/// The same uuid with its first three fields in the other byte order: firmware tables before SMBIOS 2.6 are read so.
pub fn byte_swapped(uuid: Uuid) -> Uuid {
    Uuid::from_bytes_le(uuid.into_bytes())
}

/// The region of a node: by our own label, the common one, or the providerID.
pub fn region(node: &Node) -> Option<Region> {
    let label = |key: &str| node.labels().get(key).and_then(|value| value.parse().ok());
    label(OWN_REGION).or_else(|| label(REGION)).or_else(|| match ProviderId::of(node) {
        ProviderId::Vm(region, _) => Some(region),
        _ => None,
    })
}

/// The VMID of the annotation.
pub fn annotated_vmid(node: &Node) -> Option<VmId> {
    node.annotations().get(INSTANCE_ID)?.parse().ok()
}

/// Whether the kubelet says that it works.
pub fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The taints of a node.
pub fn taints(node: &Node) -> &[Taint] {
    node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default()
}

/// The taint of this key.
pub fn taint<'a>(node: &'a Node, key: &str) -> Option<&'a Taint> {
    taints(node).iter().find(|taint| taint.key == key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_provider_id_is_read() {
        let uuid = "4daa5e68-83be-4e9d-9b71-8365c73aa16b";
        assert_eq!(ProviderId::read(""), ProviderId::Empty);
        let vm = ProviderId::Vm("r-1".parse().expect("a region"), "105".parse().expect("a vmid"));
        assert_eq!(ProviderId::read("proxmox://r-1/105"), vm);
        let parsed = ProviderId::Uuid(uuid.parse().expect("a uuid"));
        assert_eq!(ProviderId::read(&format!("proxmox://{}", uuid.to_uppercase())), parsed);
        for foreign in
            ["aws:///x", "k3s://w1", "proxmox://", "proxmox:///105", "proxmox://r/99", "proxmox://r/1/2"]
        {
            assert_eq!(ProviderId::read(foreign), ProviderId::Foreign(foreign.to_owned()));
        }
    }

    #[test]
    fn a_swapped_uuid_swaps_back() {
        let uuid: Uuid = "685eaa4d-be83-9d4e-9b71-8365c73aa16b".parse().expect("a uuid");
        assert_eq!(byte_swapped(uuid).to_string(), "4daa5e68-83be-4e9d-9b71-8365c73aa16b");
        assert_eq!(byte_swapped(byte_swapped(uuid)), uuid);
    }
}
