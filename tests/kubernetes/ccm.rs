//! The cloud-controller loop over a simulated Proxmox and the fake API server: what becomes of Nodes.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use proxmox_csi::{
    ccm::{Ccm, Settings, labels::ZoneMode},
    pve::{
        Client,
        client::Token,
        transport::{HttpRequest, TransportError, boxed},
    },
    sim::{Sim, World, faults::Fault},
    telemetry::metrics::Metrics,
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::{apiserver::ApiServer, support};

pub(crate) const NODES: &str = "/api/v1/nodes";
const ATTACHMENTS: &str = "/apis/storage.k8s.io/v1/volumeattachments";
const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";
pub(crate) const SHUTDOWN: &str = "node.cloudprovider.kubernetes.io/shutdown";
pub(crate) const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
pub(crate) const ZONE: &str = "topology.kubernetes.io/zone";
const TOKEN: &str = "csi@pve!csi";

/// A region, and a hand between it and the loop.
#[derive(Clone)]
pub(crate) struct Region {
    pub(crate) name: &'static str,
    pub(crate) sim: Sim,
    hidden: Arc<Mutex<BTreeSet<u32>>>,
    dead: Arc<Mutex<bool>>,
    token: &'static str,
}

impl Region {
    pub(crate) fn new(name: &'static str) -> Self {
        Self::of(name, World::builtin())
    }

    fn of(name: &'static str, world: World) -> Self {
        let sim = Sim::in_memory(world).expect("the world can be made");
        Self { name, sim, hidden: Arc::default(), dead: Arc::default(), token: TOKEN }
    }

    /// Leaves VMs out of the listing, as a lost privilege does.
    pub(crate) fn hide(&self, vmids: &[u32]) {
        *self.hidden.lock().expect("no panic") = vmids.iter().copied().collect();
    }

    pub(crate) fn set_dead(&self, dead: bool) {
        *self.dead.lock().expect("no panic") = dead;
    }

    pub(crate) fn fault(&self, json: Value) {
        let fault: Fault = serde_json::from_value(json).expect("a fault");
        self.sim.inject(fault).expect("a fault that fits");
    }

    pub(crate) fn uuid(&self, vmid: u32) -> String {
        self.sim.vm(vmid).and_then(|vm| vm.conf.uuid().map(str::to_owned)).expect("a uuid")
    }

    fn client(&self) -> Client {
        let inner = support::in_process(&self.sim);
        let (hidden, dead) = (Arc::clone(&self.hidden), Arc::clone(&self.dead));
        let transport = boxed(tower::service_fn(move |request: HttpRequest| {
            let (inner, hidden, dead) = (inner.clone(), Arc::clone(&hidden), Arc::clone(&dead));
            async move {
                if *dead.lock().expect("no panic") {
                    return Err(TransportError::NotSent("no route to host".into()));
                }
                let listing = request.uri().path().ends_with("/cluster/resources");
                let mut answer = inner.oneshot(request).await?;
                if listing && let Ok(mut json) = serde_json::from_slice::<Value>(answer.body()) {
                    let hidden = hidden.lock().expect("no panic");
                    if let Some(rows) = json["data"].as_array_mut() {
                        let shown = |row: &Value| {
                            row["vmid"]
                                .as_u64()
                                .is_none_or(|vmid| !hidden.iter().any(|h| u64::from(*h) == vmid))
                        };
                        rows.retain(shown);
                    }
                    *answer.body_mut() = json.to_string().into();
                }
                Ok(answer)
            }
        }));
        let secret = World::builtin().token(self.token).expect("a token").secret.clone();
        let token = Token { id: self.token.into(), secret };
        Client::new(self.name.parse().expect("a region"), transport, &token, Metrics::default())
            .expect("a client")
    }
}

/// Makes a change through the API, as an administrator would.
pub(crate) async fn admin(region: &Region, method: &str, path: &str, form: &str) {
    let world = World::builtin();
    let request = http::Request::builder()
        .method(method)
        .uri(format!("/api2/json{path}"))
        .header("authorization", world.token("root@pam!root").expect("a token").header())
        .header("content-type", "application/x-www-form-urlencoded")
        .body(bytes::Bytes::from(form.to_owned()))
        .expect("a request");
    let answer = support::in_process(&region.sim).oneshot(request).await.expect("an answer");
    assert!(answer.status().is_success(), "{method} {path} {form}: {answer:?}");
}

/// What turns a misfortune on and off.
type Switch<'a> = Box<dyn Fn(bool) + 'a>;

/// The loop, running.
pub(crate) struct Running {
    server: ApiServer,
    stop: CancellationToken,
    metrics: Metrics,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn ccm(server: &ApiServer, regions: &[&Region], settings: Settings, metrics: &Metrics) -> Ccm {
    let clients = regions.iter().map(|region| region.client()).collect();
    Ccm::new(server.client(), clients, settings, None, "test", metrics)
}

pub(crate) fn start_with(server: &ApiServer, regions: &[&Region], settings: Settings) -> Running {
    let (stop, metrics) = (CancellationToken::new(), Metrics::default());
    tokio::spawn(ccm(server, regions, settings, &metrics).run(stop.clone()));
    Running { server: server.clone(), stop, metrics }
}

fn start(server: &ApiServer, regions: &[&Region]) -> Running {
    start_with(server, regions, Settings::default())
}

/// A Node as a kubelet registers it.
pub(crate) fn new_node(name: &str, uuid: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "mine": "yes"},
            "annotations": {"alpha.kubernetes.io/provided-node-ip": "10.0.0.5"}},
        "spec": {"taints": [{"key": UNINITIALIZED, "value": "true", "effect": "NoSchedule"},
            {"key": "mine", "effect": "NoSchedule"}]},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "addresses": [],
            "nodeInfo": {"systemUUID": uuid, "architecture": "", "bootID": "", "containerRuntimeVersion": "",
                "kernelVersion": "", "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "",
                "operatingSystem": "", "osImage": ""}}})
}

pub(crate) fn set_ready(server: &ApiServer, name: &str, ready: bool) {
    server.edit(NODES, name, |node| {
        node["status"]["conditions"][0]["status"] = json!(if ready { "True" } else { "Unknown" });
    });
}

pub(crate) fn node(server: &ApiServer, name: &str) -> Value {
    server.get(NODES, name).expect("a node")
}

pub(crate) fn taints(server: &ApiServer, name: &str) -> BTreeSet<String> {
    let node = node(server, name);
    let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    taints.iter().filter_map(|taint| taint["key"].as_str().map(str::to_owned)).collect()
}

pub(crate) fn label(server: &ApiServer, name: &str, key: &str) -> Option<String> {
    node(server, name)["metadata"]["labels"][key].as_str().map(str::to_owned)
}

/// Waits until it holds, at most so long; returns how long it took.
#[track_caller]
fn within(limit: Duration, what: &str, holds: impl Fn() -> bool) -> impl Future<Output = Duration> {
    let caller = std::panic::Location::caller();
    let what = what.to_owned();
    async move {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < limit, "{caller}: not within {limit:?}: {what}");
            sleep(Duration::from_millis(100)).await;
        }
        begun.elapsed()
    }
}

pub(crate) const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A server with the three VMs of the built-in world as initialised nodes w101 to w103.
async fn settled(region: &Region, settings: Settings) -> Running {
    let server = ApiServer::default();
    for vmid in [101, 102, 103] {
        server.put(NODES, new_node(&format!("w{vmid}"), &region.uuid(vmid)));
    }
    let running = start_with(&server, &[region], settings);
    for name in ["w101", "w102", "w103"] {
        within(secs(5), "initialised", || !taints(&server, name).contains(UNINITIALIZED)).await;
    }
    running
}

#[tokio::test(start_paused = true)]
async fn a_node_is_initialised_within_two_seconds_of_its_registration() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let _running = start(&server, &[&region]);
    sleep(secs(60)).await;
    server.put(NODES, new_node("any-name", &region.uuid(103).to_uppercase()));
    within(secs(2), "taint off", || !taints(&server, "any-name").contains(UNINITIALIZED)).await;
    let node = node(&server, "any-name");
    assert_eq!(node["spec"]["providerID"], "proxmox://r1/103");
    for (key, value) in [
        ("topology.kubernetes.io/region", "r1"),
        (ZONE, "pve2"),
        ("failure-domain.beta.kubernetes.io/zone", "pve2"),
        ("topology.proxmox.sinextra.dev/zone", "pve2"),
        ("mine", "yes"),
    ] {
        assert_eq!(node["metadata"]["labels"][key], value, "{key}");
    }
    let addresses =
        json!([{"type": "Hostname", "address": "any-name"}, {"type": "InternalIP", "address": "10.0.0.5"}]);
    assert_eq!(node["status"]["addresses"], addresses);
    assert_eq!(taints(&server, "any-name"), BTreeSet::from(["mine".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn a_migration_is_in_the_labels_within_one_poll() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    sleep(secs(30)).await;
    region.sim.move_vm(101, "pve2");
    within(secs(12), "zone", || label(&running.server, "w101", ZONE).as_deref() == Some("pve2")).await;
    assert_eq!(label(&running.server, "w102", ZONE).as_deref(), Some("pve1"));
    assert!(running.server.events_about("w101").contains("VmMoved"));
}

#[tokio::test(start_paused = true)]
async fn a_sticky_zone_stays_and_our_own_label_follows() {
    let region = Region::new("r1");
    let mut settings = Settings::default();
    settings.labels.zone = ZoneMode::Sticky;
    let running = settled(&region, settings).await;
    region.sim.move_vm(101, "pve2");
    let own = "topology.proxmox.sinextra.dev/zone";
    within(secs(12), "own zone", || label(&running.server, "w101", own).as_deref() == Some("pve2")).await;
    assert_eq!(label(&running.server, "w101", ZONE).as_deref(), Some("pve1"));
}

#[tokio::test(start_paused = true)]
async fn at_rest_nothing_is_written_and_proxmox_is_asked_once_a_poll() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    sleep(secs(60)).await;
    running.server.writes();
    region.sim.clear_log();
    sleep(Duration::from_mins(10)).await;
    assert_eq!(running.server.writes(), [""; 0]);
    let asked = region.sim.log().len();
    // 60 polls, privileges and HA groups twice.
    assert!((50..70).contains(&asked), "{asked} requests in ten minutes");
}

#[tokio::test(start_paused = true)]
async fn silence_and_lost_sight_delete_and_blank_nothing() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(30)).await;
    for name in ["w101", "w102", "w103"] {
        set_ready(&server, name, false);
    }
    let before: Vec<Value> =
        ["w101", "w102", "w103"].map(|name| node(&server, name)["metadata"]["labels"].clone()).into();
    let kinds: [(&str, Switch<'_>); 5] = [
        ("the region is dead", Box::new(|on| region.set_dead(on))),
        (
            "the token is expired",
            Box::new(|on| region.fault(json!({"fault": "expire_token", "token": TOKEN, "on": on}))),
        ),
        ("one VM is hidden", Box::new(|on| region.hide(if on { &[102] } else { &[] }))),
        ("every VM is hidden", Box::new(|on| region.hide(if on { &[101, 102, 103] } else { &[] }))),
        (
            "a host is dead",
            Box::new(|on| region.fault(json!({"fault": "kill_node", "node": "pve2", "on": on}))),
        ),
    ];
    for (what, set) in kinds {
        set(true);
        sleep(Duration::from_mins(10)).await;
        assert_eq!(server.names(NODES), ["w101", "w102", "w103"], "{what}");
        for (name, labels) in ["w101", "w102", "w103"].iter().zip(&before) {
            assert_eq!(node(&server, name)["metadata"]["labels"], *labels, "{what}");
            assert_eq!(
                node(&server, name)["status"]["addresses"].as_array().map(Vec::len),
                Some(2),
                "{what}"
            );
            assert!(!taints(&server, name).contains(SHUTDOWN), "{what}");
        }
        set(false);
        sleep(secs(30)).await;
    }
    assert!(server.events_about("w102").contains("NotDeleted"));
    assert!(server.events_about("w103").contains("HostUnreachable"));
}

#[tokio::test(start_paused = true)]
async fn a_node_goes_only_after_its_vm_was_seen_gone_twice_and_its_kubelet_is_silent() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    region.sim.forget_vm(102);
    sleep(Duration::from_mins(5)).await;
    assert!(server.get(NODES, "w102").is_some(), "its kubelet lives");
    set_ready(&server, "w102", false);
    sleep(secs(55)).await;
    assert!(server.get(NODES, "w102").is_some(), "seen gone for less than a minute");
    within(secs(60), "deleted", || server.get(NODES, "w102").is_none()).await;
    assert!(server.events_about("w102").contains("DeletingNode"));
    assert_eq!(server.names(NODES), ["w101", "w103"]);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_comes_back_in_time_keeps_its_node() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    set_ready(&server, "w102", false);
    // Neither row nor VMID for a while, as between the two halves of a restore.
    let refused =
        json!({"fault": "refuse", "path": "/cluster/nextid", "status": 500, "text": "no quorum", "times": 0});
    region.hide(&[102]);
    region.fault(refused);
    sleep(Duration::from_mins(10)).await;
    region.hide(&[]);
    region.sim.clear_faults();
    sleep(Duration::from_mins(10)).await;
    assert!(server.get(NODES, "w102").is_some());
}

#[tokio::test(start_paused = true)]
async fn many_at_once_are_not_deleted() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    for vmid in [101, 102] {
        region.sim.forget_vm(vmid);
        set_ready(&server, &format!("w{vmid}"), false);
    }
    sleep(Duration::from_mins(20)).await;
    assert_eq!(server.names(NODES).len(), 3);
    assert!(server.events_about("w101").contains("DeletionHalted"));
    assert!(running.metrics.render().contains("proxmox_ccm_refusals_total{reason=\"too_many_at_once\"}"));
}

#[tokio::test(start_paused = true)]
async fn a_vmid_that_is_another_vm_now_is_a_stranger() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(60)).await;
    set_ready(&server, "w102", false);
    region.sim.stop_vm(102).await;
    region.sim.set_vm_key(102, "smbios1", Some("uuid=00000000-0000-4000-8000-000000000001"));
    region.sim.start_vm(102).await.expect("it starts");
    region.sim.move_vm(102, "pve2");
    sleep(secs(30)).await;
    assert_eq!(
        label(&server, "w102", ZONE).as_deref(),
        Some("pve1"),
        "the stranger's place is not the node's"
    );
    within(secs(120), "deleted: the token sees every VM", || server.get(NODES, "w102").is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn without_sight_of_every_vm_a_stranger_proves_nothing() {
    let mut world = World::builtin();
    // Exactly these three, one by one.
    let base = world.acl.iter().find(|entry| entry.who == TOKEN).expect("an entry").clone();
    world.acl.retain(|entry| entry.who != TOKEN);
    for vmid in [101, 102, 103] {
        let mut entry = base.clone();
        entry.path = format!("/vms/{vmid}");
        world.acl.push(entry);
    }
    let region = Region::of("r1", world);
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(60)).await;
    set_ready(&server, "w102", false);
    region.sim.stop_vm(102).await;
    region.sim.set_vm_key(102, "smbios1", Some("uuid=00000000-0000-4000-8000-000000000001"));
    sleep(Duration::from_mins(10)).await;
    assert!(server.get(NODES, "w102").is_some());
    assert!(server.events_about("w102").contains("NotDeleted"));
    // A VMID that nobody has is proof without any privilege.
    region.sim.forget_vm(102);
    within(Duration::from_mins(3), "deleted", || server.get(NODES, "w102").is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn of_two_vms_with_one_uuid_only_the_recorded_one_is_a_node() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let uuid = region.uuid(101);
    region.sim.set_vm_key(103, "smbios1", Some(&format!("uuid={uuid}")));
    server.put(NODES, new_node("unrecorded", &uuid));
    let mut recorded = new_node("recorded", &uuid);
    recorded["spec"]["providerID"] = json!("proxmox://r1/103");
    server.put(NODES, recorded);
    let _running = start(&server, &[&region]);
    within(secs(5), "initialised", || !taints(&server, "recorded").contains(UNINITIALIZED)).await;
    assert_eq!(label(&server, "recorded", ZONE).as_deref(), Some("pve2"));
    sleep(secs(60)).await;
    assert!(taints(&server, "unrecorded").contains(UNINITIALIZED));
    assert_eq!(label(&server, "unrecorded", ZONE), None);
    for name in ["recorded", "unrecorded"] {
        assert!(server.events_about(name).contains("DuplicateUuid"), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stopped_vm_is_tainted_and_untainted() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    region.sim.stop_vm(101).await;
    sleep(secs(60)).await;
    assert!(!taints(&server, "w101").contains(SHUTDOWN), "its kubelet is not silent yet");
    set_ready(&server, "w101", false);
    within(secs(30), "tainted", || taints(&server, "w101").contains(SHUTDOWN)).await;
    sleep(Duration::from_mins(5)).await;
    assert!(!taints(&server, "w101").contains(OUT_OF_SERVICE), "only when asked for");
    region.sim.start_vm(101).await.expect("it starts");
    set_ready(&server, "w101", true);
    within(secs(2), "untainted", || !taints(&server, "w101").contains(SHUTDOWN)).await;
    assert!(taints(&server, "w101").contains("mine"));
}

#[tokio::test(start_paused = true)]
async fn a_dead_vm_is_given_up_and_taken_back_behind_its_old_volumes() {
    let region = Region::new("r1");
    let running = settled(&region, Settings { out_of_service: true, ..Settings::default() }).await;
    let server = running.server.clone();
    let attachment = json!({"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment",
        "metadata": {"name": "va-1", "creationTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {"attacher": "csi.proxmox.sinextra.dev", "nodeName": "w101", "source": {}}});
    server.put(ATTACHMENTS, attachment);
    region.sim.stop_vm(101).await;
    set_ready(&server, "w101", false);
    let took = within(secs(60), "given up", || taints(&server, "w101").contains(OUT_OF_SERVICE)).await;
    assert!(took >= secs(30), "{took:?}");
    region.sim.start_vm(101).await.expect("it starts");
    set_ready(&server, "w101", true);
    sleep(secs(60)).await;
    assert!(taints(&server, "w101").contains(OUT_OF_SERVICE), "an old volume is attached");
    let mut later = server.get(ATTACHMENTS, "va-1").expect("it");
    later["metadata"]["creationTimestamp"] = json!("2999-01-01T00:00:00Z");
    server.put(ATTACHMENTS, later);
    within(secs(31), "taken back", || !taints(&server, "w101").contains(OUT_OF_SERVICE)).await;
}

#[tokio::test(start_paused = true)]
async fn what_may_still_write_is_not_given_up() {
    let region = Region::new("r1");
    let running = settled(&region, Settings { out_of_service: true, ..Settings::default() }).await;
    let server = running.server.clone();
    region.sim.set_vm_key(101, "lock", Some("suspended"));
    region.sim.stop_vm(101).await;
    region.sim.set_vm_key(102, "lock", Some("migrate"));
    region.sim.stop_vm(102).await;
    region.fault(json!({"fault": "kill_node", "node": "pve2", "on": true}));
    for name in ["w101", "w102", "w103"] {
        set_ready(&server, name, false);
    }
    sleep(Duration::from_mins(10)).await;
    for name in ["w101", "w102", "w103"] {
        assert!(!taints(&server, name).contains(OUT_OF_SERVICE), "{name}");
    }
    assert!(taints(&server, "w101").contains(SHUTDOWN), "suspended to disk");
    assert!(!taints(&server, "w102").contains(SHUTDOWN), "it is being migrated");
    assert!(!taints(&server, "w103").contains(SHUTDOWN), "it may run there");
}

#[tokio::test(start_paused = true)]
async fn nodes_of_cluster_api_get_the_uuid_and_are_left_to_it() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    region.sim.set_vm_key(101, "tags", Some("go-proxmox;ip_net0_10.0.0.5"));
    // Its kubelet has no external cloud provider: no taint to wait for, and addresses of its own.
    let mut machine = new_node("machine", &region.uuid(101));
    machine["metadata"]["annotations"] = json!({"cluster.x-k8s.io/machine": "m1"});
    machine["spec"] = json!({});
    machine["status"]["addresses"] = json!([{"type": "InternalIP", "address": "10.0.0.5"}]);
    server.put(NODES, machine);
    let _running = start(&server, &[&region]);
    within(secs(5), "labelled", || label(&server, "machine", ZONE).is_some()).await;
    let id = format!("proxmox://{}", region.uuid(101));
    within(secs(5), "providerID", || node(&server, "machine")["spec"]["providerID"] == json!(id)).await;
    let now = node(&server, "machine");
    assert_eq!(now["metadata"]["annotations"]["proxmox.sinextra.dev/instance-id"], "101");
    assert_eq!(now["status"]["addresses"], json!([{"type": "InternalIP", "address": "10.0.0.5"}]));
    region.sim.forget_vm(101);
    set_ready(&server, "machine", false);
    sleep(Duration::from_mins(10)).await;
    assert!(server.get(NODES, "machine").is_some());
    assert!(server.events_about("machine").contains("NotDeleted"));
}

#[tokio::test(start_paused = true)]
async fn nodes_of_others_are_left_alone() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let mut foreign = new_node("edge", &region.uuid(101));
    foreign["spec"]["providerID"] = json!("k3s://edge");
    let host = new_node("pve1", "00000000-0000-4000-8000-00000000000a");
    let lost = new_node("lost", "00000000-0000-4000-8000-00000000000b");
    for node in [foreign, host, lost] {
        server.put(NODES, node);
    }
    let _running = start(&server, &[&region]);
    for name in ["edge", "pve1", "lost"] {
        set_ready(&server, name, false);
    }
    sleep(Duration::from_mins(10)).await;
    assert_eq!(server.writes().len(), 0, "nothing but events");
    assert_eq!(server.events_about("edge"), BTreeSet::from(["NotManaged".to_owned()]));
    assert_eq!(server.events_about("pve1"), BTreeSet::from(["NotManaged".to_owned()]));
    assert_eq!(server.events_about("lost"), BTreeSet::from(["NotDeleted".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn a_dead_region_holds_up_no_other_and_proves_nothing_there() {
    let (one, two) = (Region::new("r1"), Region::new("r2"));
    two.set_dead(true);
    for vmid in [101, 102, 103] {
        // The built-in worlds are twins; these are other machines.
        two.sim.set_vm_key(vmid, "smbios1", Some(&format!("uuid=00000000-0000-4000-8000-000000000{vmid}")));
    }
    let server = ApiServer::default();
    server.put(NODES, new_node("w101", &one.uuid(101)));
    server.put(NODES, new_node("far", "00000000-0000-4000-8000-000000000103"));
    let _running = start(&server, &[&one, &two]);
    within(secs(5), "initialised", || !taints(&server, "w101").contains(UNINITIALIZED)).await;
    one.sim.forget_vm(101);
    set_ready(&server, "w101", false);
    sleep(Duration::from_mins(10)).await;
    assert!(server.get(NODES, "w101").is_some(), "it may be in the region that is silent");
    assert!(taints(&server, "far").contains(UNINITIALIZED));
    two.set_dead(false);
    within(secs(15), "initialised", || !taints(&server, "far").contains(UNINITIALIZED)).await;
    assert_eq!(node(&server, "far")["spec"]["providerID"], "proxmox://r2/103");
    within(Duration::from_mins(2), "deleted", || server.get(NODES, "w101").is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_too_old_begins_anew() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(30)).await;
    server.set_down(true);
    sleep(secs(90)).await;
    server.edit(NODES, "w101", |node| node["metadata"]["labels"][ZONE] = json!("wrong"));
    server.compact();
    server.set_down(false);
    within(secs(120), "mended", || label(&server, "w101", ZONE).as_deref() == Some("pve1")).await;
    server.end_watches();
    server.edit(NODES, "w102", |node| node["metadata"]["labels"][ZONE] = json!("wrong"));
    within(secs(120), "mended", || label(&server, "w102", ZONE).as_deref() == Some("pve1")).await;
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_and_labels_only_write_no_more_than_they_say() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    server.put(NODES, new_node("w101", &region.uuid(101)));
    let dry = start_with(&server, &[&region], Settings { dry_run: true, ..Settings::default() });
    sleep(secs(60)).await;
    drop(dry);
    assert_eq!(server.writes(), [""; 0]);
    assert!(server.events_about("w101").is_empty());
    let labels_only = Settings { labels_only: true, ..Settings::default() };
    ccm(&server, &[&region], labels_only, &Metrics::default()).once().await.expect("one pass");
    assert_eq!(label(&server, "w101", ZONE).as_deref(), Some("pve1"));
    assert!(taints(&server, "w101").contains(UNINITIALIZED));
    assert_eq!(node(&server, "w101")["spec"]["providerID"], Value::Null);
    ccm(&server, &[&region], Settings::default(), &Metrics::default()).once().await.expect("one pass");
    assert!(!taints(&server, "w101").contains(UNINITIALIZED));
}

#[tokio::test(start_paused = true)]
async fn a_resize_is_followed() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    server.put(NODES, new_node("w101", &region.uuid(101)));
    let _running = start(&server, &[&region]);
    let kind = "node.kubernetes.io/instance-type";
    within(secs(5), "typed", || label(&server, "w101", kind).is_some()).await;
    region.sim.set_vm_key(101, "cores", Some("6"));
    region.sim.set_vm_key(101, "memory", Some("16384"));
    let resized = || label(&server, "w101", kind).is_some_and(|kind| kind.ends_with("VCPU-16GB"));
    within(secs(12), "resized", resized).await;
}

#[tokio::test(start_paused = true)]
async fn ha_groups_are_labels_and_go_away_with_them() {
    let (server, mut region) = (ApiServer::default(), Region::new("r1"));
    region.token = "root@pam!root";
    let rules = "/cluster/ha/rules";
    admin(&region, "POST", "/cluster/ha/resources", "sid=vm%3A101").await;
    admin(&region, "POST", rules, "rule=fast&type=node-affinity&nodes=pve1%3A2&resources=vm%3A101").await;
    let mut node = new_node("w101", &region.uuid(101));
    node["metadata"]["labels"]["group.topology.proxmox.sinextra.dev/old"] = json!("");
    server.put(NODES, node);
    let _running = start(&server, &[&region]);
    let group = |name: &str| label(&server, "w101", &format!("group.topology.proxmox.sinextra.dev/{name}"));
    within(secs(5), "labelled", || group("fast").is_some()).await;
    assert_eq!(group("old"), None, "another controller's label, and no group any more");
    admin(&region, "DELETE", "/cluster/ha/rules/fast", "").await;
    within(Duration::from_mins(6), "gone", || group("fast").is_none()).await;
}
