//! What the tools for operators read of a cluster: Nodes, what the driver registered on them, volumes, attachments, classes and pods.
//!
//! Plain data, so that what is concluded from it has no Kubernetes in it. Everything is read, nothing written.

use std::{collections::BTreeMap, fmt::Debug};

use k8s_openapi::api::{
    core::v1::{Node, PersistentVolume, Pod},
    storage::v1::{CSINode, StorageClass, VolumeAttachment},
};
use kube::{Api, Client, Resource, ResourceExt as _, api::ListParams};
use serde::de::DeserializeOwned;

use super::{
    cluster::KubeCluster,
    node::{self, ProviderId},
};
use crate::types::{Region, cluster::NodeRecord};

/// Objects of one kind, or why they can't be listed.
pub type Listed<T> = Result<Vec<T>, String>;

/// What a cluster has.
#[derive(Debug, Clone)]
pub struct Inventory {
    /// Nodes.
    pub nodes: Listed<NodeObject>,
    /// What the driver registered on nodes.
    pub registrations: Listed<Registration>,
    /// PVs of the driver.
    pub volumes: Listed<PvObject>,
    /// Attachments that the driver makes.
    pub attachments: Listed<AttachmentObject>,
    /// StorageClasses of the driver.
    pub classes: Listed<ClassObject>,
    /// Pods that use claims.
    pub pods: Listed<PodObject>,
}

/// A Node.
#[derive(Debug, Clone)]
pub struct NodeObject {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether the kubelet says that it works.
    pub ready: bool,
    /// Which VM it says it is, or why it does not; `None` for a Node of another provider.
    pub record: Result<Option<NodeRecord>, String>,
    /// Volumes that its kubelet may have mounted, by handle; of this driver only.
    pub in_use: Vec<String>,
}

/// What the driver registered on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// The Node.
    pub node: String,
    /// The node id that the controller is called with; `None` where the driver is not registered there.
    pub id: Option<String>,
    /// Topology keys.
    pub topology_keys: Vec<String>,
    /// How many volumes the scheduler puts there.
    pub limit: Option<i32>,
}

/// A PV.
#[derive(Debug, Clone)]
pub struct PvObject {
    /// Its name.
    pub name: String,
    /// Its volume handle.
    pub handle: String,
    /// `namespace/name` of the claim it is bound to.
    pub claim: Option<String>,
    /// `Bound`, `Released`, …
    pub phase: String,
    /// Its capacity in bytes, where that can be read.
    pub capacity: Option<u64>,
    /// Its class.
    pub class: Option<String>,
    /// `Delete` or `Retain`.
    pub reclaim: Option<String>,
    /// Volume context.
    pub context: BTreeMap<String, String>,
    /// Its access modes.
    pub modes: Vec<String>,
    /// Whether it is to be attached read-only.
    pub read_only: bool,
    /// Where it can be used: one of these must fit. Empty: everywhere.
    pub affinity: Vec<Term>,
    /// Whether it is being deleted.
    pub deleting: bool,
}

/// Labels a Node must have, each with one of the values.
pub type Term = BTreeMap<String, Vec<String>>;

impl PvObject {
    /// Whether a Node with these labels can use the volume.
    pub fn fits(&self, labels: &BTreeMap<String, String>) -> bool {
        let fits = |term: &Term| {
            term.iter().all(|(key, values)| labels.get(key).is_some_and(|value| values.contains(value)))
        };
        self.affinity.is_empty() || self.affinity.iter().any(fits)
    }
}

/// A `VolumeAttachment`.
#[derive(Debug, Clone)]
pub struct AttachmentObject {
    /// Its name.
    pub name: String,
    /// The PV.
    pub volume: Option<String>,
    /// The Node.
    pub node: String,
    /// Whether the driver said that it is attached.
    pub attached: bool,
    /// What the driver told the node.
    pub metadata: BTreeMap<String, String>,
    /// What went wrong last with attaching or detaching.
    pub error: Option<String>,
    /// Whether it is being deleted.
    pub deleting: bool,
}

/// A StorageClass.
#[derive(Debug, Clone)]
pub struct ClassObject {
    /// Its name.
    pub name: String,
    /// Its parameters.
    pub parameters: BTreeMap<String, String>,
    /// Whether a volume is made before a pod uses it.
    pub immediate: bool,
}

/// A pod that uses claims.
#[derive(Debug, Clone)]
pub struct PodObject {
    /// `namespace/name`.
    pub name: String,
    /// The Node.
    pub node: Option<String>,
    /// `Running`, `Pending`, …
    pub phase: String,
    /// `namespace/name` of the claims it uses.
    pub claims: Vec<String>,
}

impl PodObject {
    /// Whether its containers have ended for good.
    pub fn has_ended(&self) -> bool {
        matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }
}

/// How many objects are asked for at once.
const PAGE: u32 = 500;

/// Everything of a driver that `client` may list. A Node that names no region is in `only_region`, where just one is configured.
pub async fn read(client: &Client, driver: &str, only_region: Option<&Region>) -> Inventory {
    let cluster = KubeCluster::new(client.clone(), only_region.cloned());
    let nodes = list::<Node>(client).await;
    let nodes = nodes.map(|nodes| nodes.iter().map(|node| node_object(&cluster, driver, node)).collect());
    let registrations = list::<CSINode>(client).await;
    let volumes = list::<PersistentVolume>(client).await;
    let attachments = list::<VolumeAttachment>(client).await;
    let classes = list::<StorageClass>(client).await;
    let pods = list::<Pod>(client).await;
    Inventory {
        nodes,
        registrations: registrations.map(|all| all.iter().map(|one| registration(driver, one)).collect()),
        volumes: volumes.map(|all| all.iter().filter_map(|one| pv_object(driver, one)).collect()),
        attachments: attachments.map(|all| all.iter().filter_map(|one| attachment(driver, one)).collect()),
        classes: classes.map(|all| all.iter().filter_map(|one| class(driver, one)).collect()),
        pods: pods.map(|all| all.iter().map(pod).filter(|pod| !pod.claims.is_empty()).collect()),
    }
}

async fn list<K>(client: &Client) -> Listed<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let api: Api<K> = Api::all(client.clone());
    let mut all = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let listed = api.list(&page).await.map_err(|error| super::chain(&error))?;
        all.extend(listed.items);
        match listed.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(all),
        }
    }
}

fn node_object(cluster: &KubeCluster, driver: &str, node: &Node) -> NodeObject {
    let in_use = node.status.as_ref().and_then(|status| status.volumes_in_use.as_ref());
    let prefix = format!("kubernetes.io/csi/{driver}^");
    let record = match ProviderId::of(node) {
        ProviderId::Foreign(_) => Ok(None),
        _ => cluster.record(node, None).map(Some).map_err(|error| error.to_string()),
    };
    NodeObject {
        name: node.name_any(),
        labels: node.labels().clone(),
        ready: node::is_ready(node),
        record,
        in_use: in_use
            .into_iter()
            .flatten()
            .filter_map(|name| name.strip_prefix(&prefix).map(str::to_owned))
            .collect(),
    }
}

fn registration(driver: &str, object: &CSINode) -> Registration {
    let found = object.spec.drivers.iter().find(|one| one.name == driver);
    Registration {
        node: object.name_any(),
        id: found.map(|one| one.node_id.clone()),
        topology_keys: found.and_then(|one| one.topology_keys.clone()).unwrap_or_default(),
        limit: found.and_then(|one| one.allocatable.as_ref()).and_then(|allocatable| allocatable.count),
    }
}

fn pv_object(driver: &str, object: &PersistentVolume) -> Option<PvObject> {
    let spec = object.spec.as_ref()?;
    let csi = spec.csi.as_ref().filter(|csi| csi.driver == driver)?;
    let required = spec.node_affinity.as_ref().and_then(|affinity| affinity.required.as_ref());
    let term = |term: &k8s_openapi::api::core::v1::NodeSelectorTerm| {
        let expressions = term.match_expressions.iter().flatten().filter(|one| one.operator == "In");
        expressions.map(|one| (one.key.clone(), one.values.clone().unwrap_or_default())).collect()
    };
    Some(PvObject {
        name: object.name_any(),
        handle: csi.volume_handle.clone(),
        claim: spec
            .claim_ref
            .as_ref()
            .and_then(|claim| Some(format!("{}/{}", claim.namespace.as_deref()?, claim.name.as_deref()?))),
        phase: object.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default(),
        capacity: spec.capacity.as_ref().and_then(|all| quantity(&all.get("storage")?.0)),
        class: spec.storage_class_name.clone().filter(|class| !class.is_empty()),
        reclaim: spec.persistent_volume_reclaim_policy.clone(),
        context: csi.volume_attributes.clone().unwrap_or_default(),
        modes: spec.access_modes.clone().unwrap_or_default(),
        read_only: csi.read_only.unwrap_or(false),
        affinity: required.map(|one| one.node_selector_terms.iter().map(term).collect()).unwrap_or_default(),
        deleting: object.metadata.deletion_timestamp.is_some(),
    })
}

fn attachment(driver: &str, object: &VolumeAttachment) -> Option<AttachmentObject> {
    if object.spec.attacher != driver {
        return None;
    }
    let status = object.status.as_ref();
    let errors = status.map(|status| [&status.attach_error, &status.detach_error]);
    let error = errors.into_iter().flatten().flatten().find_map(|error| error.message.clone());
    Some(AttachmentObject {
        name: object.name_any(),
        volume: object.spec.source.persistent_volume_name.clone(),
        node: object.spec.node_name.clone(),
        attached: status.is_some_and(|status| status.attached),
        metadata: status.and_then(|status| status.attachment_metadata.clone()).unwrap_or_default(),
        error,
        deleting: object.metadata.deletion_timestamp.is_some(),
    })
}

fn class(driver: &str, object: &StorageClass) -> Option<ClassObject> {
    (object.provisioner == driver).then(|| ClassObject {
        name: object.name_any(),
        parameters: object.parameters.clone().unwrap_or_default(),
        immediate: object.volume_binding_mode.as_deref() != Some("WaitForFirstConsumer"),
    })
}

fn pod(object: &Pod) -> PodObject {
    let namespace = object.namespace().unwrap_or_default();
    let name = object.name_any();
    let volumes = object.spec.iter().filter_map(|spec| spec.volumes.as_ref()).flatten();
    let claims = volumes.filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(claim), _) => Some(format!("{namespace}/{}", claim.claim_name)),
        (None, Some(_)) => Some(format!("{namespace}/{name}-{}", volume.name)),
        (None, None) => None,
    });
    PodObject {
        claims: claims.collect(),
        name: format!("{namespace}/{name}"),
        node: object.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        phase: object.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default(),
    }
}

/// A quantity of bytes as Kubernetes writes it, such as `10Gi` and `1500M`; none where it is a fraction or of another form.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, bytes) in [
            ("1Gi", Some(1 << 30)),
            ("1500M", Some(1_500_000_000)),
            ("42", Some(42)),
            ("1.5Gi", None),
            ("", None),
            ("99999999999Ti", None),
        ] {
            assert_eq!(quantity(text), bytes, "{text}");
        }
    }

    #[test]
    fn a_volume_fits_where_one_of_its_terms_does() {
        let term = |zone: &str| Term::from([("zone".to_owned(), vec![zone.to_owned()])]);
        let mut volume = pv_object("d", &PersistentVolume::default());
        assert!(volume.is_none());
        let spec = serde_json::json!({"spec": {"csi": {"driver": "d", "volumeHandle": "h"}}});
        volume = pv_object("d", &serde_json::from_value(spec).expect("a PV"));
        let mut volume = volume.expect("a PV of the driver");
        let labels = BTreeMap::from([("zone".to_owned(), "b".to_owned())]);
        assert!(volume.fits(&labels) && volume.fits(&BTreeMap::new()));
        volume.affinity = vec![term("a")];
        assert!(!volume.fits(&labels));
        volume.affinity.push(term("b"));
        assert!(volume.fits(&labels) && !volume.fits(&BTreeMap::new()));
    }
}
