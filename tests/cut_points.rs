//! Every request of every controller operation, cut in every way: the retry comes to the same end with one disk.
//!
//! The requests are those of an undisturbed run, so that a new one in an operation is covered without a change here. A cut strikes one
//! request; the caller then retries as the sidecars do.

mod support;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use proxmox_csi::{
    pve::{
        Client,
        transport::{HttpRequest, HttpResponse, Transport, TransportError, boxed},
    },
    sim::{Sim, World},
    telemetry::metrics::Metrics,
    volume::Volumes,
};
use serde_json::json;
use support::{Bench, GIB, HOLDER, REGION, in_process, new_volume, nodes_of, settings, token};
use tokio::{sync::Notify, time::sleep};
use tonic::{Code, Status};
use tower::ServiceExt as _;

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// No connection.
    NotSent,
    /// It is lost, and the connection fails.
    LoseRequest,
    /// Proxmox acts, and the answer is lost.
    LoseAnswer,
    /// The connection fails, and Proxmox gets the request 15 s later.
    Late,
    /// Proxmox does not answer in time, and acts.
    Deadline,
    /// Refused by a worker that broke.
    Refuse500,
    /// Refused by the proxy before it.
    Unreachable595,
    /// Its task fails and has done nothing.
    FailTask,
    /// Its task fails and has done its work.
    FailTaskAfter,
    /// The process ends before it is sent.
    CrashBefore,
    /// The process ends after Proxmox acted.
    CrashAfter,
    /// The caller gives up while it is under way.
    CallerGone,
}

const CUTS: [Cut; 12] = [
    Cut::NotSent,
    Cut::LoseRequest,
    Cut::LoseAnswer,
    Cut::Late,
    Cut::Deadline,
    Cut::Refuse500,
    Cut::Unreachable595,
    Cut::FailTask,
    Cut::FailTaskAfter,
    Cut::CrashBefore,
    Cut::CrashAfter,
    Cut::CallerGone,
];

/// The operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Create,
    Attach,
    ExpandAttached,
    Detach,
    ExpandDetached,
    Delete,
}

/// In the order of a volume's life.
const LIFE: [Operation; 6] = [
    Operation::Create,
    Operation::Attach,
    Operation::ExpandAttached,
    Operation::Detach,
    Operation::ExpandDetached,
    Operation::Delete,
];

/// Counts requests while it is armed, and cuts one.
#[derive(Clone)]
struct Scissors(Arc<Inner>);

struct Inner {
    sim: Sim,
    state: Mutex<State>,
    /// The cut has struck, for those that end the caller or the process.
    struck: Notify,
}

#[derive(Default)]
struct State {
    armed: bool,
    seen: Vec<String>,
    plan: Option<(usize, Cut)>,
}

impl Scissors {
    fn new(sim: &Sim) -> Self {
        Self(Arc::new(Inner { sim: sim.clone(), state: Mutex::default(), struck: Notify::new() }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().expect("no test panics while it holds this")
    }

    fn arm(&self, plan: Option<(usize, Cut)>) {
        *self.state() = State { armed: true, seen: Vec::new(), plan };
    }

    /// Stops counting, and tells the requests that were seen.
    fn disarm(&self) -> Vec<String> {
        let mut state = self.state();
        state.armed = false;
        state.plan = None;
        std::mem::take(&mut state.seen)
    }

    fn transport(&self) -> Transport {
        let (scissors, proxmox) = (self.clone(), in_process(&self.0.sim));
        boxed(tower::service_fn(move |request: HttpRequest| {
            let (scissors, proxmox) = (scissors.clone(), proxmox.clone());
            async move { scissors.send(proxmox, request).await }
        }))
    }

    /// What is to happen to this request.
    fn next(&self, request: &HttpRequest) -> Option<Cut> {
        let mut state = self.state();
        if !state.armed {
            return None;
        }
        let number = state.seen.len();
        state.seen.push(format!("{} {}", request.method(), request.uri().path()));
        match state.plan {
            Some((at, cut)) if at == number => {
                state.plan = None;
                Some(cut)
            }
            _ => None,
        }
    }

    async fn send(&self, proxmox: Transport, request: HttpRequest) -> Result<HttpResponse, TransportError> {
        let lost = || TransportError::MaybeSent("cut".to_owned());
        let refused = |status: u16, reason: &'static [u8]| {
            let mut response = http::Response::new(Bytes::from_static(b"{\"data\":null}"));
            *response.status_mut() = http::StatusCode::from_u16(status).expect("a status");
            let reason = hyper::ext::ReasonPhrase::from_static(reason);
            response.extensions_mut().insert(reason);
            response
        };
        match self.next(&request) {
            None => proxmox.oneshot(request).await,
            Some(Cut::NotSent) => Err(TransportError::NotSent("cut".to_owned())),
            Some(Cut::LoseRequest) => Err(lost()),
            Some(Cut::LoseAnswer) => {
                proxmox.oneshot(request).await.map_err(|_| lost())?;
                Err(lost())
            }
            Some(Cut::Late) => {
                tokio::spawn(async move {
                    sleep(Duration::from_secs(15)).await;
                    proxmox.oneshot(request).await.ok();
                });
                Err(lost())
            }
            Some(Cut::Deadline) => {
                proxmox.oneshot(request).await.map_err(|_| lost())?;
                sleep(Duration::from_secs(35)).await;
                Err(TransportError::Deadline(Duration::from_secs(35)))
            }
            Some(Cut::Refuse500) => Ok(refused(500, b"Connection refused")),
            Some(Cut::Unreachable595) => Ok(refused(595, b"Connection timed out")),
            Some(cut @ (Cut::FailTask | Cut::FailTaskAfter)) => {
                if let Some(worker) = worker(&request) {
                    let fault = json!({"fault": "fail_task", "worker": worker, "text": "command 'x' failed: got signal 9", "after": cut == Cut::FailTaskAfter});
                    let fault = serde_json::from_value(fault).expect("a fault");
                    self.0.sim.inject(fault).expect("a fault that fits the world");
                }
                proxmox.oneshot(request).await
            }
            Some(Cut::CrashBefore) => {
                self.0.struck.notify_one();
                std::future::pending().await
            }
            Some(Cut::CrashAfter) => {
                proxmox.oneshot(request).await.ok();
                self.0.struck.notify_one();
                std::future::pending().await
            }
            Some(Cut::CallerGone) => {
                self.0.struck.notify_one();
                sleep(Duration::from_secs(3)).await;
                proxmox.oneshot(request).await
            }
        }
    }
}

/// The worker of the task that a request starts.
fn worker(request: &HttpRequest) -> Option<&'static str> {
    let path = request.uri().path();
    match request.method().as_str() {
        "POST" if path.ends_with("/config") => Some("qmconfig"),
        "PUT" if path.ends_with("/resize") => Some("resize"),
        "DELETE" if path.contains("/content/") => Some("imgdel"),
        "POST" if path.ends_with("/qemu") => Some("qmcreate"),
        "DELETE" if path.contains("/qemu/") => Some("qmdestroy"),
        _ => None,
    }
}

/// A controller over cut wires.
struct Rig {
    bench: Bench,
    scissors: Scissors,
}

impl Rig {
    fn new() -> Self {
        let mut world = World::builtin();
        // A directory that lists nothing at all may be one that is not mounted.
        for storage in &mut world.storages {
            storage.is_mountpoint = true;
        }
        let sim = Sim::in_memory(world).expect("the world can be made");
        let scissors = Scissors::new(&sim);
        Self { bench: started(&scissors), scissors }
    }

    /// The process ended, and a new one begins: it remembers nothing.
    fn restart(&mut self) {
        self.bench = started(&self.scissors);
    }

    /// Calls until it succeeds, as the sidecars do, and returns the answer.
    async fn call(
        &mut self,
        operation: Operation,
        storage: &str,
        cut: Option<Cut>,
    ) -> Result<String, String> {
        let mut history = Vec::new();
        for attempt in 0..10_u32 {
            let called = {
                let call = act(&self.bench, operation, storage);
                tokio::select! {
                    biased;
                    answer = call => Some(answer),
                    () = self.scissors.0.struck.notified() => None,
                }
            };
            match called {
                Some(Ok(answer)) => {
                    self.check_answer(operation, storage)?;
                    return Ok(answer);
                }
                Some(Err(status)) => {
                    history.push(format!("{:?}: {}", status.code(), status.message()));
                    self.check_refusal(operation, &status)
                        .await
                        .map_err(|broken| format!("{broken}: {history:#?}"))?;
                }
                None if cut == Some(Cut::CallerGone) => history.push("the caller gave up".to_owned()),
                None => {
                    history.push("the process ended".to_owned());
                    self.restart();
                }
            }
            sleep(Duration::from_secs(1 << attempt.min(6))).await;
        }
        Err(format!("no end of it: {history:#?}"))
    }

    /// An OK is true when it is said.
    fn check_answer(&self, operation: Operation, storage: &str) -> Result<(), String> {
        let slots = self.bench.slots(101, &id(storage));
        let there = self.bench.sim.volumes().iter().any(|volume| volume.key.name.contains("pvc-cut"));
        let holds = match operation {
            Operation::Create | Operation::ExpandDetached => there,
            Operation::Attach | Operation::ExpandAttached => {
                slots.current.len() == 1 && slots.pending.is_empty() && slots.qemu == 1
            }
            Operation::Detach => slots == support::Slots::default(),
            Operation::Delete => !there,
        };
        holds.then_some(()).ok_or_else(|| format!("{operation:?} answered OK, and it is not so: {slots:?}"))
    }

    /// After an error that the provisioner takes for final there is nothing and nothing comes.
    async fn check_refusal(&self, operation: Operation, status: &Status) -> Result<(), String> {
        let final_code = !matches!(
            status.code(),
            Code::Unavailable | Code::Aborted | Code::DeadlineExceeded | Code::Cancelled
        );
        if operation != Operation::Create || !final_code {
            return Ok(());
        }
        sleep(Duration::from_secs(20)).await;
        let made: Vec<_> =
            self.bench.sim.volumes().into_iter().filter(|v| v.key.name.contains("pvc-cut")).collect();
        if made.is_empty() { Ok(()) } else { Err(format!("a final error, and a volume: {made:?}")) }
    }
}

fn started(scissors: &Scissors) -> Bench {
    let region = REGION.parse().expect("a region");
    let client =
        Client::new(region, scissors.transport(), &token(HOLDER), Metrics::default()).expect("a token");
    let sim = &scissors.0.sim;
    Bench::of(sim.clone(), Volumes::new(vec![client], nodes_of(sim), settings()))
}

fn id(storage: &str) -> String {
    let zone = if storage == "shared" { "" } else { "pve1" };
    format!("{REGION}/{zone}/{storage}/9999/vm-9999-pvc-cut.raw")
}

async fn act(bench: &Bench, operation: Operation, storage: &str) -> Result<String, Status> {
    let volume = id(storage);
    match operation {
        Operation::Create => bench.create(new_volume("pvc-cut", storage)).await.map(|v| format!("{v:?}")),
        Operation::Attach => bench.attach(&volume, "worker-101").await.map(|context| format!("{context:?}")),
        Operation::ExpandAttached => bench.expand(&volume, 2 * GIB).await.map(|grown| format!("{grown:?}")),
        Operation::Detach => bench.detach(&volume, "worker-101").await.map(|()| String::new()),
        Operation::ExpandDetached => bench.expand(&volume, 3 * GIB).await.map(|grown| format!("{grown:?}")),
        Operation::Delete => bench.delete(&volume).await.map(|()| String::new()),
    }
}

/// All that Proxmox has. A VM whose creation was killed half way stays locked until an administrator unlocks it: nobody else can.
fn dump(sim: &Sim) -> BTreeMap<String, String> {
    let vms = sim.vmids().into_iter().filter_map(|vmid| {
        let vm = sim.vm(vmid).filter(|vm| vm.conf.current.get("lock").is_none_or(|lock| lock != "create"))?;
        let text = format!(
            "{:#?} {:#?} {:#?} {:#?}",
            vm.conf.current,
            vm.conf.pending,
            vm.conf.pending_delete,
            vm.open_volumes().collect::<Vec<_>>()
        );
        Some((format!("vm {vmid}"), text))
    });
    let volumes = sim.volumes().into_iter().map(|v| (format!("volume {:?}", v.key), v.size.to_string()));
    vms.chain(volumes).collect()
}

/// Lives up to an operation; `warm` with a life before it, so that everything is known.
async fn before(operation: Operation, storage: &str, warm: bool) -> Rig {
    let mut rig = Rig::new();
    if warm {
        for earlier in LIFE {
            rig.call(earlier, storage, None).await.expect("an undisturbed call");
        }
    }
    for earlier in LIFE.into_iter().take_while(|earlier| *earlier != operation) {
        rig.call(earlier, storage, None).await.expect("an undisturbed call");
    }
    if !warm {
        rig.restart();
    }
    rig
}

/// Cuts at the first touch of everything, and where all is known.
async fn cut_everywhere(operation: Operation) {
    for (storage, warm) in [("local", false), ("shared", true), ("local", true)] {
        // What is remembered of a local volume matters where others may hold it.
        if (storage, warm) == ("local", true) && operation != Operation::Attach {
            continue;
        }
        let mut rig = before(operation, storage, warm).await;
        rig.scissors.arm(None);
        let answer = rig.call(operation, storage, None).await.expect("an undisturbed call");
        let requests = rig.scissors.disarm();
        sleep(Duration::from_mins(2)).await;
        let state = dump(&rig.bench.sim);
        assert!(!requests.is_empty(), "an operation asks for something");
        for (at, request) in requests.iter().enumerate() {
            for cut in CUTS {
                let what =
                    format!("{operation:?} on {storage}, warm {warm}, request {at} {request}, {cut:?}");
                let mut rig = before(operation, storage, warm).await;
                rig.scissors.arm(Some((at, cut)));
                let answered = rig.call(operation, storage, Some(cut)).await;
                rig.scissors.disarm();
                rig.bench.sim.clear_faults();
                match answered {
                    Ok(answered) => assert_eq!(answered, answer, "{what}"),
                    Err(broken) => panic!("{what}: {broken}"),
                }
                // What was late has come, and what lingers has ended.
                sleep(Duration::from_mins(2)).await;
                rig.bench.volumes.tidy().await;
                rig.bench.volumes.tidy().await;
                assert_eq!(dump(&rig.bench.sim), state, "{what}");
                // The rest of its life leaves nothing behind.
                for later in LIFE.into_iter().skip_while(|later| *later <= operation) {
                    if let Err(broken) = rig.call(later, storage, None).await {
                        panic!("{what}, then {later:?}: {broken}");
                    }
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn p5_create_comes_to_one_volume_wherever_it_is_cut() {
    cut_everywhere(Operation::Create).await;
}

#[tokio::test(start_paused = true)]
async fn p5_attach_comes_to_one_slot_wherever_it_is_cut() {
    cut_everywhere(Operation::Attach).await;
}

#[tokio::test(start_paused = true)]
async fn p5_detach_comes_to_no_slot_wherever_it_is_cut() {
    cut_everywhere(Operation::Detach).await;
}

#[tokio::test(start_paused = true)]
async fn p5_expand_comes_to_one_size_wherever_it_is_cut() {
    cut_everywhere(Operation::ExpandAttached).await;
}

#[tokio::test(start_paused = true)]
async fn p5_expand_through_a_holder_leaves_no_holder_wherever_it_is_cut() {
    cut_everywhere(Operation::ExpandDetached).await;
}

#[tokio::test(start_paused = true)]
async fn p5_delete_comes_to_no_volume_wherever_it_is_cut() {
    cut_everywhere(Operation::Delete).await;
}
