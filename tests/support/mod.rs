//! A whole controller over a simulated Proxmox, in process, for tests that act through its RPCs.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

pub mod budget;
pub mod load;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use axum::body::Body;
use futures_util::future::BoxFuture;
use http_body_util::BodyExt as _;
use proxmox_csi::{
    csi::{
        controller::ControllerService,
        proto::{
            self, ControllerPublishVolumeRequest, ControllerUnpublishVolumeRequest, CreateVolumeRequest,
            controller_server::Controller as _,
            volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode},
        },
    },
    pve::{
        Client,
        client::Token,
        transport::{HttpRequest, Transport, TransportError, boxed},
    },
    runtime::Operations,
    sim::{
        Sim, World,
        faults::Fault,
        world::{Kind, Storage},
    },
    telemetry::metrics::Metrics,
    types::{
        VmId,
        attributes::Attributes,
        cluster::{Cluster, LookupError, NodeRecord, RecordError, VolumeRecord},
    },
    volume::{Settings, Volumes},
};
use tonic::{Code, Request, Status};
use tower::ServiceExt as _;

/// The region of every test.
pub const REGION: &str = "test";
/// One GiB.
pub const GIB: i64 = 1 << 30;
/// The token of the five privileges, and the one that may make holder VMs.
pub const CSI: &str = "csi@pve!csi";
pub const HOLDER: &str = "csi@pve!holder";

/// A controller, its Proxmox, and the nodes that it knows.
pub struct Bench {
    pub sim: Sim,
    pub volumes: Volumes,
    pub controller: ControllerService,
    pub operations: Operations,
    pub records: Records,
}

/// What the cluster keeps of volumes, by handle: it outlives a controller.
pub type Records = Arc<Mutex<BTreeMap<String, VolumeRecord>>>;

/// Nodes that are known from the start: `worker-101` is VM 101 of the first region; of a further region, `west-101` is VM 101 of region
/// `west`, and its VMID is not recorded.
struct Nodes(Vec<NodeRecord>, Records);

impl Cluster for Nodes {
    fn node<'a>(&'a self, node_id: &'a str) -> BoxFuture<'a, Result<Option<NodeRecord>, LookupError>> {
        let found = self.0.iter().find(|node| node.name == node_id).cloned();
        Box::pin(async move { Ok(found) })
    }

    fn nodes(&self) -> BoxFuture<'_, Result<Vec<NodeRecord>, LookupError>> {
        Box::pin(async { Ok(self.0.clone()) })
    }

    fn volume<'a>(&'a self, handle: &'a str) -> BoxFuture<'a, Result<Option<VolumeRecord>, RecordError>> {
        let found = self.1.lock().expect("no panic").get(handle).cloned();
        Box::pin(async move { Ok(found) })
    }

    fn keep_attributes<'a>(
        &'a self,
        handle: &'a str,
        attributes: &'a Attributes,
    ) -> BoxFuture<'a, Result<(), RecordError>> {
        let mut records = self.1.lock().expect("no panic");
        records.entry(handle.to_owned()).or_default().attributes = attributes.clone();
        Box::pin(async { Ok(()) })
    }
}

/// The VMs of a simulator as nodes.
pub fn nodes_of(sim: &Sim) -> Arc<dyn Cluster> {
    cluster_of(&[(REGION, sim)], Records::default())
}

fn cluster_of(regions: &[(&str, &Sim)], records: Records) -> Arc<dyn Cluster> {
    let mut nodes = Vec::new();
    for (index, (region, sim)) in regions.iter().enumerate() {
        let is_first = index == 0;
        nodes.extend(sim.vmids().into_iter().map(|vmid| NodeRecord {
            name: format!("{}-{vmid}", if is_first { "worker" } else { region }),
            region: region.parse().expect("a region"),
            vmid: VmId::new(vmid).filter(|_| is_first),
            uuid: sim.vm(vmid).and_then(|vm| vm.conf.uuid()?.parse().ok()).expect("a uuid"),
        }));
    }
    Arc::new(Nodes(nodes, records))
}

/// A token of the built-in world.
pub fn token(id: &str) -> Token {
    let secret = World::builtin().token(id).expect("the world has the token").secret.clone();
    Token { id: id.to_owned(), secret }
}

/// The simulator's API as a transport.
pub fn in_process(sim: &Sim) -> Transport {
    let service = sim.service();
    boxed(tower::service_fn(move |request: HttpRequest| {
        let service = service.clone();
        async move {
            let lost = |error: &dyn std::error::Error| TransportError::MaybeSent(error.to_string());
            let answer = service.oneshot(request.map(Body::from)).await.map_err(|error| lost(&error))?;
            let (parts, body) = answer.into_parts();
            let body = body.collect().await.map_err(|error| lost(&error))?.to_bytes();
            Ok(http::Response::from_parts(parts, body))
        }
    }))
}

/// The built-in world with a storage of each type that can hold volumes, `a-<type>`; those that are not shared are on all nodes.
pub fn of_all_types() -> World {
    let mut world = World::builtin();
    for kind in [Kind::Nfs, Kind::Cifs, Kind::Btrfs, Kind::Lvmthin, Kind::Zfspool, Kind::Rbd, Kind::Lvm] {
        let shared = matches!(kind, Kind::Nfs | Kind::Cifs | Kind::Rbd);
        let storage = Storage { id: format!("a-{}", kind.word()), kind, shared, ..world.storages[1].clone() };
        world.storages.push(storage);
    }
    world
}

/// Settings as most have them.
pub fn settings() -> Settings {
    Settings { owner: VmId::new(9999).expect("a VMID"), holders: 999_990_000..=999_999_999 }
}

impl Bench {
    /// The built-in world with the token of the five privileges.
    pub fn new() -> Self {
        Self::with(World::builtin(), CSI)
    }

    /// A world and the token that the driver uses.
    pub fn with(world: World, token: &str) -> Self {
        let sim = Sim::in_memory(world).expect("the world can be made");
        Self::over(&sim, &self::token(token))
    }

    /// A controller with this token over a running simulator: a second one, or one after a restart.
    pub fn over(sim: &Sim, token: &Token) -> Self {
        Self::across(&[(REGION, sim)], token)
    }

    /// A controller over several regions; the bench is that of the first.
    pub fn across(regions: &[(&str, &Sim)], token: &Token) -> Self {
        Self::remembering(regions, token, Records::default())
    }

    fn remembering(regions: &[(&str, &Sim)], token: &Token, records: Records) -> Self {
        let client = |(region, sim): &(&str, &Sim)| {
            let region = region.parse().expect("a region");
            Client::new(region, in_process(sim), token, Metrics::default()).expect("a legal token")
        };
        let sim = regions.first().expect("a region").1;
        let clients = regions.iter().map(client).collect();
        let volumes = Volumes::new(clients, cluster_of(regions, Arc::clone(&records)), settings());
        Self { records, ..Self::of(sim.clone(), volumes) }
    }

    /// A controller of these volumes.
    pub fn of(sim: Sim, volumes: Volumes) -> Self {
        let operations = Operations::default();
        let controller = ControllerService::new(volumes.clone(), operations.clone());
        Self { sim, volumes, controller, operations, records: Records::default() }
    }

    /// A new controller over the same Proxmox, which remembers nothing.
    pub fn restarted(&self) -> Self {
        Self::remembering(&[(REGION, &self.sim)], &token(CSI), Arc::clone(&self.records))
    }

    /// Changes a volume.
    pub async fn modify(&self, volume_id: &str, parameters: &[(&str, &str)]) -> Result<(), Status> {
        let request = proto::ControllerModifyVolumeRequest {
            volume_id: volume_id.to_owned(),
            mutable_parameters: strings(parameters),
            ..Default::default()
        };
        self.controller.controller_modify_volume(Request::new(request)).await.map(drop)
    }

    /// A page of volumes: their ids, and the token of the next page.
    pub async fn list(&self, most: i32, token: &str) -> Result<(Vec<String>, String), Status> {
        let request = proto::ListVolumesRequest { max_entries: most, starting_token: token.to_owned() };
        let answer = self.controller.list_volumes(Request::new(request)).await?.into_inner();
        let ids = answer.entries.into_iter().map(|entry| entry.volume.expect("a volume").volume_id);
        Ok((ids.collect(), answer.next_token))
    }

    /// Plays a fault.
    pub fn fault(&self, json: serde_json::Value) {
        let fault: Fault = serde_json::from_value(json).expect("a fault");
        self.sim.inject(fault).expect("a fault that fits the world");
    }

    pub async fn create(&self, request: CreateVolumeRequest) -> Result<proto::Volume, Status> {
        let response = self.controller.create_volume(Request::new(request)).await?;
        Ok(response.into_inner().volume.expect("an OK has a volume"))
    }

    /// A volume of 1 GiB on a storage; on pve1, where it is local.
    pub async fn volume(&self, name: &str, storage: &str) -> proto::Volume {
        self.create(new_volume(name, storage)).await.expect("a volume")
    }

    pub async fn attach(&self, volume_id: &str, node: &str) -> Result<BTreeMap<String, String>, Status> {
        let request = publish(volume_id, node);
        let response = self.controller.controller_publish_volume(Request::new(request)).await?;
        Ok(response.into_inner().publish_context)
    }

    /// Attaches with a capability, read-only or not.
    pub async fn attach_as(
        &self,
        volume_id: &str,
        node: &str,
        mode: Mode,
        readonly: bool,
    ) -> Result<BTreeMap<String, String>, Status> {
        let mut request = publish(volume_id, node);
        request.volume_capability = Some(with_mode(mount(), mode));
        request.readonly = readonly;
        let response = self.controller.controller_publish_volume(Request::new(request)).await?;
        Ok(response.into_inner().publish_context)
    }

    pub async fn detach(&self, volume_id: &str, node: &str) -> Result<(), Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            node_id: node.to_owned(),
            ..Default::default()
        };
        self.controller.controller_unpublish_volume(Request::new(request)).await.map(drop)
    }

    pub async fn delete(&self, volume_id: &str) -> Result<(), Status> {
        let request = proto::DeleteVolumeRequest { volume_id: volume_id.to_owned(), ..Default::default() };
        self.controller.delete_volume(Request::new(request)).await.map(drop)
    }

    pub async fn expand(
        &self,
        volume_id: &str,
        required: i64,
    ) -> Result<proto::ControllerExpandVolumeResponse, Status> {
        self.expand_within(volume_id, required, 0).await
    }

    /// Grows a volume to at least a size and at most another; 0 is no limit.
    pub async fn expand_within(
        &self,
        volume_id: &str,
        required: i64,
        limit: i64,
    ) -> Result<proto::ControllerExpandVolumeResponse, Status> {
        let request = proto::ControllerExpandVolumeRequest {
            volume_id: volume_id.to_owned(),
            capacity_range: Some(proto::CapacityRange { required_bytes: required, limit_bytes: limit }),
            volume_capability: Some(mount()),
            ..Default::default()
        };
        Ok(self.controller.controller_expand_volume(Request::new(request)).await?.into_inner())
    }

    /// The slots of a VM whose current, pending or QEMU's own drive is the volume.
    pub fn slots(&self, vmid: u32, volume_id: &str) -> Slots {
        let volid = volid(volume_id);
        let vm = self.sim.vm(vmid).expect("a vm");
        let holds = |text: &String| text.split(',').next() == Some(volid.as_str());
        Slots {
            current: vm.conf.current.iter().filter(|(_, v)| holds(v)).map(|(k, _)| k.clone()).collect(),
            pending: vm.conf.pending.iter().filter(|(_, v)| holds(v)).map(|(k, _)| k.clone()).collect(),
            qemu: vm.open_volumes().filter(|key| volid.ends_with(&key.name)).count(),
        }
    }

    /// Makes a change through the API as an administrator would, and waits for it.
    pub async fn admin(&self, method: &str, path: &str, form: &str) -> serde_json::Value {
        admin(&self.sim, method, path, form).await
    }
}

/// Makes a change through the API of a simulator as an administrator would.
pub async fn admin(sim: &Sim, method: &str, path: &str, form: &str) -> serde_json::Value {
    let world = World::builtin();
    let token = world.tokens.iter().find(|t| t.id == "root@pam!root").expect("an administrator");
    let in_query = matches!(method, "GET" | "DELETE") && !form.is_empty();
    let uri = if in_query { format!("/api2/json{path}?{form}") } else { format!("/api2/json{path}") };
    let request = http::Request::builder()
        .method(method)
        .uri(uri)
        .header("authorization", token.header())
        .header("content-type", "application/x-www-form-urlencoded")
        .body(bytes::Bytes::from(if in_query { String::new() } else { form.to_owned() }))
        .expect("a request");
    let answer = in_process(sim).oneshot(request).await.expect("an answer");
    assert!(answer.status().is_success(), "{method} {path} {form}: {answer:?}");
    serde_json::from_slice(answer.body()).expect("JSON")
}

/// Where a VM has a volume.
#[derive(Debug, PartialEq, Eq, Default)]
pub struct Slots {
    pub current: Vec<String>,
    pub pending: Vec<String>,
    pub qemu: usize,
}

/// What Proxmox calls the volume of a handle.
pub fn volid(volume_id: &str) -> String {
    let mut parts = volume_id.splitn(4, '/').skip(2);
    format!("{}:{}", parts.next().expect("a storage"), parts.next().expect("a name"))
}

pub fn mount() -> proto::VolumeCapability {
    proto::VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Mount(MountVolume { fs_type: "xfs".into(), ..Default::default() })),
    }
}

pub fn block() -> proto::VolumeCapability {
    proto::VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mount() }
}

pub fn strings(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// A place as the scheduler writes it; no zone: the whole region.
pub fn at(region: &str, zone: &str) -> proto::Topology {
    let region = ("topology.kubernetes.io/region".to_owned(), region.to_owned());
    let zone = ("topology.kubernetes.io/zone".to_owned(), zone.to_owned());
    proto::Topology { segments: [region, zone].into_iter().filter(|(_, value)| !value.is_empty()).collect() }
}

/// Where a volume may be, the preferred place first.
pub fn places(places: &[proto::Topology]) -> proto::TopologyRequirement {
    let mut requisite = places.to_vec();
    requisite.reverse();
    proto::TopologyRequirement { requisite, preferred: places.to_vec() }
}

pub fn new_volume(name: &str, storage: &str) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(proto::CapacityRange { required_bytes: GIB, limit_bytes: 0 }),
        volume_capabilities: vec![mount()],
        parameters: BTreeMap::from([("storage".to_owned(), storage.to_owned())]),
        accessibility_requirements: Some(places(&[at(REGION, "pve1")])),
        ..Default::default()
    }
}

/// The same capability with another access mode.
pub fn with_mode(mut capability: proto::VolumeCapability, mode: Mode) -> proto::VolumeCapability {
    capability.access_mode = Some(AccessMode { mode: mode.into() });
    capability
}

pub fn publish(volume_id: &str, node: &str) -> ControllerPublishVolumeRequest {
    ControllerPublishVolumeRequest {
        volume_id: volume_id.to_owned(),
        node_id: node.to_owned(),
        volume_capability: Some(mount()),
        ..Default::default()
    }
}

/// Asserts a code and that the text names all of these.
#[track_caller]
pub fn assert_refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, names: &[&str]) {
    let status = result.expect_err("must be refused");
    assert_eq!(status.code(), code, "{}", status.message());
    assert!(
        !status.message().is_empty() && status.details().is_empty(),
        "a text for people, and nothing else"
    );
    for name in names {
        assert!(status.message().contains(name), "`{name}` is not named in: {}", status.message());
    }
}
