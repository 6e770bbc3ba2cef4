//! A simulated Proxmox with a hand between it and the loop, and the loop over it and the fake API server.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use proxmox_csi::{
    ccm::{Ccm, RegionClients, Settings},
    pve::{
        Client,
        client::Token,
        failover::{self, Server},
        transport::{HttpRequest, HttpResponse, Transport, TransportError, boxed},
    },
    sim::{Sim, World, faults::Fault},
    telemetry::metrics::Metrics,
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::{
    apiserver::{ApiServer, rights},
    support,
};

pub(crate) const NODES: &str = "/api/v1/nodes";
pub(crate) const ATTACHMENTS: &str = "/apis/storage.k8s.io/v1/volumeattachments";
pub(crate) const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";
pub(crate) const SHUTDOWN: &str = "node.cloudprovider.kubernetes.io/shutdown";
pub(crate) const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
pub(crate) const ZONE: &str = "topology.kubernetes.io/zone";
pub(crate) const TOKEN: &str = "csi@pve!csi";
/// May do everything.
pub(crate) const ADMIN: &str = "root@pam!root";

/// The built-in world with this many VMs, on pve1 and pve2 in turns; no two worlds of different numbers share a uuid.
pub(crate) fn many(number: u32, count: u32) -> World {
    let mut world = World::builtin();
    let model = world.vms[0].clone();
    world.vms = (0..count)
        .map(|n| {
            let mut vm = model.clone();
            (vm.vmid, vm.name) = (1000 + n, format!("vm{n}"));
            ["pve1", "pve2"][usize::from(n % 2 == 1)].clone_into(&mut vm.node);
            vm.config.insert(
                "smbios1".to_owned(),
                format!("uuid=00000000-0000-4000-8000-{number:06}{:06}", 1000 + n),
            );
            vm
        })
        .collect();
    world
}

/// What a server of a region does to requests and answers.
#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a misfortune of its own, in any combination")]
pub(crate) struct Hand {
    /// It can't be reached.
    pub(crate) dead: bool,
    /// It never answers.
    pub(crate) hangs: bool,
    /// VMs that it leaves out of the listing, as a lost privilege does.
    pub(crate) hidden: BTreeSet<u32>,
    /// VMs that it has lost sight of: neither listed nor known to exist.
    pub(crate) lost: BTreeSet<u32>,
    /// It is cut off from its cluster: it goes on with what it last listed, and sees no host but its own.
    pub(crate) cut_off: bool,
    /// It does not hear of its hosts: rows of VMs stay as they were.
    pub(crate) stale: bool,
    /// Paths that it answers so, instead of asking: status and body.
    pub(crate) answers: BTreeMap<&'static str, (u16, Value)>,
    /// Goes on with what was last listed for ten minutes, where the test says when something changes.
    pub(crate) remembers: bool,
    /// The last listing that was asked for, and when.
    fresh: Option<(Instant, bytes::Bytes)>,
    /// The last listing that was told as it was.
    last: Option<Value>,
    /// What was asked, and how often.
    pub(crate) asked: BTreeMap<String, u64>,
    /// A defect of the loop, played by lying to it: whatever is asked for this path is answered so.
    pub(crate) planted: Option<Planted>,
}

/// A safeguard that is taken out of the loop by answering it what it wants to hear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Planted {
    /// Every VMID is free.
    Oracle,
    /// Every host is online.
    Quorum,
    /// Every VM is stopped, by its host.
    Status,
    /// The token may everything.
    Sight,
}

/// A region of one or two servers.
#[derive(Clone)]
pub(crate) struct Region {
    pub(crate) name: &'static str,
    pub(crate) sim: Sim,
    pub(crate) token: &'static str,
    hands: Vec<Arc<Mutex<Hand>>>,
}

impl Region {
    pub(crate) fn new(name: &'static str) -> Self {
        Self::of(name, World::builtin())
    }

    pub(crate) fn of(name: &'static str, world: World) -> Self {
        let sim = Sim::in_memory(world).expect("the world can be made");
        Self { name, sim, token: TOKEN, hands: vec![Arc::default()] }
    }

    /// The same with a second server.
    pub(crate) fn with_two_servers(mut self) -> Self {
        self.hands.push(Arc::default());
        self
    }

    /// The hand of a server.
    pub(crate) fn hand(&self, server: usize) -> MutexGuard<'_, Hand> {
        self.hands[server].lock().expect("no panic")
    }

    /// Changes the hands of all servers.
    pub(crate) fn hands(&self, mut change: impl FnMut(&mut Hand)) {
        for hand in &self.hands {
            change(&mut hand.lock().expect("no panic"));
        }
    }

    /// Leaves VMs out of the listing, as a lost privilege does.
    pub(crate) fn hide(&self, vmids: &[u32]) {
        self.hands(|hand| hand.hidden = vmids.iter().copied().collect());
    }

    pub(crate) fn set_dead(&self, dead: bool) {
        self.hands(|hand| hand.dead = dead);
    }

    pub(crate) fn fault(&self, json: Value) {
        let fault: Fault = serde_json::from_value(json).expect("a fault");
        self.sim.inject(fault).expect("a fault that fits");
    }

    pub(crate) fn uuid(&self, vmid: u32) -> String {
        self.sim.vm(vmid).and_then(|vm| vm.conf.uuid().map(str::to_owned)).expect("a uuid")
    }

    pub(crate) fn set_uuid(&self, vmid: u32, uuid: &str) {
        self.sim.set_vm_key(vmid, "smbios1", Some(&format!("uuid={uuid}")));
    }

    /// Something changed: what its servers remember is old.
    pub(crate) fn touch(&self) {
        self.hands(|hand| hand.fresh = None);
    }

    /// How many requests of this name there were, by all servers: `/cluster/resources`, or a part of a path.
    pub(crate) fn asked(&self, part: &str) -> u64 {
        let of = |hand: &Arc<Mutex<Hand>>| {
            let hand = hand.lock().expect("no panic");
            hand.asked.iter().filter(|(path, _)| path.contains(part)).map(|(_, n)| n).sum::<u64>()
        };
        self.hands.iter().map(of).sum()
    }

    pub(crate) fn forget_asked(&self) {
        self.hands(|hand| hand.asked.clear());
    }

    fn server(&self, hand: &Arc<Mutex<Hand>>) -> Transport {
        let (inner, hand) = (support::in_process(&self.sim), Arc::clone(hand));
        boxed(tower::service_fn(move |request: HttpRequest| {
            let (inner, hand) = (inner.clone(), Arc::clone(&hand));
            async move { answer(inner, &hand, request).await }
        }))
    }

    /// Its first server, without a loop.
    pub(crate) fn transport(&self) -> Transport {
        self.server(&self.hands[0])
    }

    pub(crate) fn clients(&self) -> RegionClients {
        let secret = World::builtin().token(self.token).expect("a token").secret.clone();
        let token = Token { id: self.token.into(), secret };
        let client = |transport: Transport| {
            Client::new(self.name.parse().expect("a region"), transport, &token, Metrics::default())
                .expect("a client")
        };
        let servers: Vec<Transport> = self.hands.iter().map(|hand| self.server(hand)).collect();
        let each = if servers.len() > 1 { servers.iter().cloned().map(client).collect() } else { Vec::new() };
        let server = |(index, transport): (usize, Transport)| Server { name: index.to_string(), transport };
        let all = servers.into_iter().enumerate().map(server).collect();
        let region = self.name.parse().expect("a region");
        let any = failover::region(&region, all, Metrics::default().pve()).expect("a server");
        RegionClients { any: client(any), each }
    }
}

fn json_answer(status: u16, body: &Value) -> HttpResponse {
    let answer = http::Response::builder().status(status).header("content-type", "application/json");
    answer.body(body.to_string().into()).expect("a legal answer")
}

/// A request through the hand of a server.
async fn answer(
    inner: Transport,
    hand: &Mutex<Hand>,
    request: HttpRequest,
) -> Result<HttpResponse, TransportError> {
    let path = request.uri().path().trim_start_matches("/api2/json").to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let free = |query: &str| {
        let vmid = query.strip_prefix("vmid=").unwrap_or("100");
        json_answer(200, &json!({"data": vmid}))
    };
    let (hangs, planted) = {
        let mut hand = hand.lock().expect("no panic");
        if hand.dead {
            return Err(TransportError::NotSent("no route to host".into()));
        }
        *hand.asked.entry(path.clone()).or_default() += 1;
        let scripted = hand.answers.iter().find(|(part, _)| path.contains(**part));
        if let Some((_, (status, body))) = scripted {
            return Ok(json_answer(*status, body));
        }
        if path == "/cluster/nextid" {
            let is_lost = |vmid: &u32| query == format!("vmid={vmid}");
            let last = hand.last.as_ref().filter(|_| hand.cut_off);
            // What is cut off knows the VMs of its last listing, and those alone.
            let unknown = last.is_some_and(|last| {
                let id = |row: &Value| row["vmid"].as_u64().is_some_and(|id| query == format!("vmid={id}"));
                !last["data"].as_array().into_iter().flatten().any(id)
            });
            if hand.planted == Some(Planted::Oracle) || hand.lost.iter().any(is_lost) || unknown {
                return Ok(free(&query));
            }
        }
        if path == "/cluster/resources"
            && !hand.hangs
            && let Some((at, bytes)) = &hand.fresh
            && at.elapsed() < secs(600)
        {
            return Ok(HttpResponse::new(bytes.clone()));
        }
        (hand.hangs, hand.planted)
    };
    if hangs {
        std::future::pending::<()>().await;
    }
    let mut answer = inner.oneshot(request).await?;
    if path == "/cluster/resources"
        && let Ok(mut json) = serde_json::from_slice::<Value>(answer.body())
    {
        let mut hand = hand.lock().expect("no panic");
        hand.change(&mut json);
        *answer.body_mut() = json.to_string().into();
        hand.fresh = hand.remembers.then(|| (Instant::now(), answer.body().clone()));
    }
    if planted == Some(Planted::Status) && path.ends_with("/status/current") {
        return Ok(json_answer(200, &json!({"data": {"status": "stopped"}})));
    }
    if planted == Some(Planted::Sight) && path == "/access/permissions" {
        let all = json!({"VM.Audit": 1});
        return Ok(json_answer(200, &json!({"data": {"/": all, "/vms": all}})));
    }
    Ok(answer)
}

impl Hand {
    /// What becomes of a listing.
    fn change(&mut self, listing: &mut Value) {
        if !self.cut_off && !self.stale {
            self.last = Some(listing.clone());
        }
        if let Some(last) = self.last.as_ref().filter(|_| self.cut_off) {
            *listing = last.clone();
        }
        let old: BTreeMap<u64, Value> = self
            .last
            .iter()
            .filter_map(|last| last["data"].as_array())
            .flatten()
            .filter_map(|row| Some((row["vmid"].as_u64()?, row.clone())))
            .collect();
        let Some(rows) = listing["data"].as_array_mut() else { return };
        let unseen = |row: &Value| {
            row["vmid"].as_u64().is_some_and(|vmid| {
                self.hidden.iter().chain(&self.lost).any(|hidden| u64::from(*hidden) == vmid)
            })
        };
        rows.retain(|row| !unseen(row));
        for row in rows.iter_mut() {
            if self.stale
                && let Some(old) = row["vmid"].as_u64().and_then(|vmid| old.get(&vmid))
            {
                row["status"] = old["status"].clone();
                row["uptime"] = old["uptime"].clone();
            }
            if row["type"] == "node" {
                if self.cut_off && row["node"] != "pve1" {
                    row["status"] = json!("offline");
                }
                if self.planted == Some(Planted::Quorum) {
                    row["status"] = json!("online");
                }
            }
        }
    }
}

/// Makes a change through the API, as an administrator would.
pub(crate) async fn admin(region: &Region, method: &str, path: &str, form: &str) {
    assert!(try_admin(region, method, path, form).await, "{method} {path} {form}");
}

/// The same, where it may be refused; tells whether it was taken.
pub(crate) async fn try_admin(region: &Region, method: &str, path: &str, form: &str) -> bool {
    let world = World::builtin();
    let request = http::Request::builder()
        .method(method)
        .uri(format!("/api2/json{path}"))
        .header("authorization", world.token("root@pam!root").expect("a token").header())
        .header("content-type", "application/x-www-form-urlencoded")
        .body(bytes::Bytes::from(form.to_owned()))
        .expect("a request");
    let answer = support::in_process(&region.sim).oneshot(request).await.expect("an answer");
    answer.status().is_success()
}

/// The loop, running.
pub(crate) struct Running {
    pub(crate) server: ApiServer,
    stop: CancellationToken,
    pub(crate) metrics: Metrics,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        if !std::thread::panicking() {
            assert_eq!(self.server.breaches(), [], "more was asked for than the roles allow");
        }
    }
}

pub(crate) fn ccm(server: &ApiServer, regions: &[&Region], settings: Settings, metrics: &Metrics) -> Ccm {
    server.allow(rights::CCM);
    let clients = regions.iter().map(|region| region.clients()).collect();
    Ccm::new(server.client(), clients, settings, None, "test", metrics)
}

pub(crate) fn start_with(server: &ApiServer, regions: &[&Region], settings: Settings) -> Running {
    let (stop, metrics) = (CancellationToken::new(), Metrics::default());
    tokio::spawn(ccm(server, regions, settings, &metrics).run(stop.clone()));
    Running { server: server.clone(), stop, metrics }
}

pub(crate) fn start(server: &ApiServer, regions: &[&Region]) -> Running {
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
pub(crate) fn within(
    limit: Duration,
    what: &str,
    holds: impl Fn() -> bool,
) -> impl Future<Output = Duration> {
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
pub(crate) async fn settled(region: &Region, settings: Settings) -> Running {
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
