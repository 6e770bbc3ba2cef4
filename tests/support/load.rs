//! Many volumes at once, with the sidecars' own limits: how long it takes, what Proxmox has under way, and whether a person notices.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join_all;
use proxmox_csi::{
    node::{Access, MountFlags, MountPath, Node, NodeOptions, Stage, Unstage},
    pve::{
        Client,
        transport::{HttpRequest, Transport, boxed},
    },
    sim::{Options, Sim, clock::Profile},
    telemetry::metrics::Metrics,
    types::{params::FilesystemOptions, publish::PublishedDisk, sharing::Sharing},
    volume::Volumes,
};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};
use tonic::Status;
use tower::ServiceExt as _;

use super::{
    Bench, CSI, REGION, admin, at, budget::world_of, in_process, new_volume, nodes_of, places, settings,
    token,
};

/// `--timeout` and `--worker-threads` of external-provisioner 6 as they are without a flag.
const PROVISIONER: (Duration, usize) = (Duration::from_secs(10), 100);
/// The same of external-attacher 4.
const ATTACHER: (Duration, usize) = (Duration::from_secs(15), 10);
/// The kubelet gives a call to a node plugin two minutes (`pkg/volume/csi/csi_attacher.go`, `csiTimeout`).
const KUBELET: Duration = Duration::from_mins(2);

/// What was seen.
#[derive(Debug, Default, Clone)]
pub struct Report {
    /// How long all of it took.
    pub took: Duration,
    /// How long Proxmox takes for the attachments and detachments of one VM alone, one after the other as its lock on the config makes
    /// them: no driver is faster.
    pub bound: Duration,
    /// Calls that ran into the deadline of their sidecar, by operation.
    pub timeouts: BTreeMap<&'static str, usize>,
    /// The longest call of each operation that was answered.
    pub longest: BTreeMap<&'static str, Duration>,
    /// Calls that were answered with an error, by operation and code, and the text of the first of them.
    pub errors: BTreeMap<String, (usize, String)>,
    /// The most requests of the driver that were under way at once, in the region and at one PVE node.
    pub most: (usize, usize),
    /// The longest answer to a person meanwhile, and to what.
    pub person: (Duration, &'static str),
    /// How often a person asked.
    pub asked: usize,
}

/// Counts what is under way.
#[derive(Default)]
struct Flight {
    now: BTreeMap<String, usize>,
    most: (usize, usize),
}

fn counting(inner: Transport, flight: &Arc<Mutex<Flight>>) -> Transport {
    let flight = Arc::clone(flight);
    boxed(tower::service_fn(move |request: HttpRequest| {
        let (inner, flight) = (inner.clone(), Arc::clone(&flight));
        let mut segments = request.uri().path().split('/').skip(3);
        let node = match (segments.next(), segments.next()) {
            (Some("nodes"), Some(node)) => node.to_owned(),
            _ => String::new(),
        };
        async move {
            {
                let mut flight = flight.lock().expect("no panic");
                *flight.now.entry(node.clone()).or_default() += 1;
                let all = flight.now.values().sum();
                let here = if node.is_empty() { 0 } else { flight.now[&node] };
                flight.most = (flight.most.0.max(all), flight.most.1.max(here));
            }
            let answer = inner.oneshot(request).await;
            *flight.lock().expect("no panic").now.get_mut(&node).expect("it was counted") -= 1;
            answer
        }
    }))
}

struct Load {
    bench: Bench,
    report: Mutex<Report>,
    provisioner: Semaphore,
    attacher: Semaphore,
    nodes: BTreeMap<u32, Node>,
}

impl Load {
    /// One operation as a sidecar does it: in turn, with a deadline, and again after a second, then two, four and so on.
    async fn call<T, F: Future<Output = Result<T, Status>>>(
        &self,
        operation: &'static str,
        turn: &Semaphore,
        deadline: Duration,
        call: impl Fn() -> F,
    ) -> T {
        let mut pause = Duration::from_secs(1);
        loop {
            let answer = {
                let _turn = turn.acquire().await.expect("it is never closed");
                let began = Instant::now();
                let answer = timeout(deadline, call()).await;
                let mut report = self.report.lock().expect("no panic");
                let longest = report.longest.entry(operation).or_default();
                *longest = (*longest).max(began.elapsed());
                answer
            };
            match answer {
                Ok(Ok(value)) => return value,
                Ok(Err(status)) => {
                    let mut report = self.report.lock().expect("no panic");
                    let error = report.errors.entry(format!("{operation} {:?}", status.code())).or_default();
                    if error.0 == 0 {
                        status.message().clone_into(&mut error.1);
                    }
                    error.0 += 1;
                }
                Err(_) => *self.report.lock().expect("no panic").timeouts.entry(operation).or_default() += 1,
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_mins(5));
        }
    }

    fn note_person(&self, (longest, what, asked): (Duration, &'static str, usize)) {
        let mut report = self.report.lock().expect("no panic");
        (report.person, report.asked) = ((longest, what), asked);
    }

    /// A volume's life on a VM.
    async fn life(&self, number: u32, vmid: u32) {
        let zone = if vmid == 103 || (vmid > 103 && vmid % 2 == 1) { "pve2" } else { "pve1" };
        let storage = if number.is_multiple_of(2) { "local" } else { "shared" };
        let mut request = new_volume(&format!("pvc-{number}"), storage);
        request.accessibility_requirements = Some(places(&[at(REGION, zone)]));
        let (bench, worker) = (&self.bench, format!("worker-{vmid}"));
        let (patience, _) = PROVISIONER;
        let made = self.call("create", &self.provisioner, patience, || bench.create(request.clone())).await;
        let volume = made.volume_id;
        let context =
            self.call("attach", &self.attacher, ATTACHER.0, || bench.attach(&volume, &worker)).await;

        let node = self.nodes.get(&vmid).expect("every VM is a node");
        let staging =
            MountPath::new(&format!("/var/lib/kubelet/{number}/globalmount")).expect("a legal path");
        let stage = Stage {
            volume: volume.clone(),
            staging: staging.clone(),
            disk: PublishedDisk::from_context(&context).expect("a context of ours"),
            access: Access::Filesystem { kind: "xfs".parse().ok(), flags: MountFlags::default() },
            sharing: Sharing::OneNode,
            options: FilesystemOptions::default(),
            key: None,
        };
        let unstage = Unstage { volume: volume.clone(), staging };
        let free = Semaphore::new(1);
        let unknown = |error: &dyn std::error::Error| Status::internal(error.to_string());
        self.call("stage", &free, KUBELET, async || node.stage(&stage).await.map_err(|e| unknown(&e))).await;
        self.call("unstage", &free, KUBELET, async || node.unstage(&unstage).await.map_err(|e| unknown(&e)))
            .await;

        self.call("detach", &self.attacher, ATTACHER.0, || bench.detach(&volume, &worker)).await;
        self.call("delete", &self.provisioner, patience, || bench.delete(&volume)).await;
    }
}

/// What a person looks at in the web interface.
const LOOKS: [&str; 5] = [
    "/version",
    "/cluster/resources",
    "/nodes/pve1/qemu/101/config",
    "/nodes/pve1/qemu/101/status/current",
    "/nodes/pve2/storage/shared/status",
];

/// So many volumes live at once, each on one of so many VMs in turn, at the latencies that were recorded. The same every time.
pub async fn load(volumes: u32, vms: u32) -> Report {
    let mut world = world_of(vms);
    for storage in &mut world.storages {
        "4T".clone_into(&mut storage.capacity);
    }
    let sim = Sim::start(world, Options { time: Profile::Recorded, ..Options::default() });
    let sim = sim.expect("the world can be made");
    let flight = Arc::new(Mutex::new(Flight::default()));
    let transport = counting(in_process(&sim), &flight);
    let region = REGION.parse().expect("a region");
    let client = Client::new(region, transport, &token(CSI), Metrics::default()).expect("a token");
    let all = Volumes::new(vec![client], nodes_of(&sim), settings());
    let nodes = sim
        .vmids()
        .into_iter()
        .map(|vmid| {
            let machine = sim.guest_of(vmid).expect("contents are in memory");
            (vmid, Node::new(Arc::new(machine), NodeOptions::new(format!("worker-{vmid}"))))
        })
        .collect();
    let bench = Bench::of(sim, all.clone());
    let background = tokio::spawn(async move { all.keep_current(|| true).await });

    // What one VM takes for one attachment and one detachment, alone.
    let alone = bench.volume("pvc-alone", "local").await.volume_id;
    let mut each = Duration::ZERO;
    for _ in 0..3 {
        let began = Instant::now();
        bench.attach(&alone, "worker-101").await.expect("attached");
        bench.detach(&alone, "worker-101").await.expect("detached");
        each = began.elapsed();
    }
    bench.delete(&alone).await.expect("deleted");

    let load = Load {
        bench,
        report: Mutex::default(),
        provisioner: Semaphore::new(PROVISIONER.1),
        attacher: Semaphore::new(ATTACHER.1),
        nodes,
    };
    let began = Instant::now();
    let person = async {
        let mut seen = (Duration::ZERO, "", 0);
        loop {
            for path in LOOKS {
                let asked = Instant::now();
                admin(&load.bench.sim, "GET", path, "").await;
                seen.2 += 1;
                if asked.elapsed() > seen.0 {
                    seen = (asked.elapsed(), path, seen.2);
                }
                load.note_person(seen);
                sleep(Duration::from_millis(97)).await;
            }
        }
    };
    let lives = join_all((0..volumes).map(|number| load.life(number, 101 + number % vms)));
    tokio::select! {
        _ = lives => {}
        () = person => unreachable!("a person never stops looking"),
    }
    background.abort();
    let mut report = load.report.lock().expect("no panic").clone();
    report.took = began.elapsed();
    report.bound = each * (volumes / vms);
    report.most = flight.lock().expect("no panic").most;
    assert!(
        load.bench.sim.volumes().iter().all(|volume| !volume.key.name.contains("pvc-")),
        "something is left"
    );
    report
}
