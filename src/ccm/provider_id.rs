//! `spec.providerID`: written once, where it is empty, in the form that all who read it expect.

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;
use uuid::Uuid;

use crate::{
    k8s::node::ProviderId,
    types::{Region, VmId},
};

/// The form of providerIDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// `proxmox://region/vmid`.
    #[default]
    RegionVmid,
    /// `proxmox://uuid`, which Cluster API's provider for Proxmox looks for.
    Uuid,
    /// Not written.
    None,
}

/// What is to be done with a node's providerID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Keep,
    /// Write this one.
    Write(String),
    /// Nothing, because what would be right is not clear: the sentence says why.
    Refuse(String),
}

/// Whether Cluster API made the node: it says so on the Node, and its Proxmox provider in tags of the VM.
pub fn is_cluster_api(node: &Node, tags: &[String]) -> bool {
    let key = "cluster.x-k8s.io/";
    let named = node.annotations().keys().chain(node.labels().keys()).any(|name| name.starts_with(key));
    let address_tag = |tag: &String| {
        tag.strip_prefix("ip_net").is_some_and(|rest| {
            rest.trim_start_matches(|c: char| c.is_ascii_digit()).starts_with('_') && rest.len() > 2
        })
    };
    named || tags.iter().any(|tag| tag == "go-proxmox+cloud-init" || address_tag(tag))
}

/// What to write on a node without a providerID. The API server lets nobody change it again, and a Machine of Cluster API never finds
/// a Node that has another form than its own. `others_have_uuids`: some node of the cluster has the uuid form already.
pub fn decide(
    node: &Node,
    tags: &[String],
    format: Format,
    others_have_uuids: bool,
    region: &Region,
    vmid: VmId,
    uuid: Uuid,
) -> Decision {
    if ProviderId::of(node) != ProviderId::Empty || format == Format::None {
        return Decision::Keep;
    }
    let with_uuid = Decision::Write(format!("proxmox://{uuid}"));
    match format {
        Format::Uuid => with_uuid,
        _ if is_cluster_api(node, tags) => with_uuid,
        _ if others_have_uuids => Decision::Refuse(
            "other nodes have providerIDs of the form proxmox://uuid; hint: say which form is right with --provider-id-format".into(),
        ),
        _ => Decision::Write(format!("proxmox://{region}/{vmid}")),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::instances::tests::{UUID, node},
        *,
    };

    fn decided(node: &Node, tags: &[&str], format: Format, others_have_uuids: bool) -> Decision {
        let tags: Vec<String> = tags.iter().map(|tag| (*tag).to_owned()).collect();
        let (region, vmid) = ("r1".parse().expect("a region"), VmId::new(101).expect("a vmid"));
        decide(node, &tags, format, others_have_uuids, &region, vmid, UUID.parse().expect("a uuid"))
    }

    #[test]
    fn it_is_written_only_where_it_is_empty() {
        let write = |text: &str| Decision::Write(text.to_owned());
        let empty = node("", UUID);
        assert_eq!(decided(&empty, &[], Format::RegionVmid, false), write("proxmox://r1/101"));
        assert_eq!(decided(&empty, &[], Format::Uuid, false), write(&format!("proxmox://{UUID}")));
        assert_eq!(decided(&empty, &[], Format::None, false), Decision::Keep);
        assert_eq!(decided(&node("proxmox://r1/7", UUID), &[], Format::RegionVmid, false), Decision::Keep);
    }

    #[test]
    fn cluster_api_gets_the_form_it_looks_for() {
        let uuid = Decision::Write(format!("proxmox://{UUID}"));
        assert_eq!(decided(&node("", UUID), &["ip_net0_10.0.0.5"], Format::RegionVmid, true), uuid);
        let mut machine = node("", UUID);
        machine.annotations_mut().insert("cluster.x-k8s.io/machine".into(), "m1".into());
        assert_eq!(decided(&machine, &[], Format::RegionVmid, false), uuid);
        assert!(matches!(decided(&node("", UUID), &["prod"], Format::RegionVmid, true), Decision::Refuse(_)));
    }
}
