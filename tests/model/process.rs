//! The two controllers, and which of them may act.
//!
//! The election is a stand-in for the Lease with its rules and times (`k8s/lease.rs`, `cli/controller.rs`): 15 s of validity, 10 s until
//! a holder gives up, a process that ends when it loses the lease, and 70 s behind a holder that did not give it back. The gate is the
//! real one, in front of the calls and on the wire.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use proxmox_csi::{
    csi::controller::{ControllerService, Gate},
    pve::{Client, transport::gated},
    runtime::Operations,
    telemetry::metrics::Metrics,
    volume::Volumes,
};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    plan::Process,
    rig::Rig,
    support::{CSI, HOLDER, REGION, settings, token},
    wire::wire,
};

const VALID: Duration = Duration::from_secs(15);
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const LONGEST_LOCK: Duration = Duration::from_secs(70);
/// Between two tries of a candidate.
const RETRY: Duration = Duration::from_secs(2);

/// The Lease and who wants it.
#[derive(Default)]
pub struct Election {
    /// The two controllers.
    pub controllers: Vec<Controller>,
    /// Who holds the lease, and when it was renewed.
    lease: Option<(u32, Instant)>,
    /// Which of the two can't reach the API server, and until when.
    parted: [Option<Instant>; 2],
    begun: u32,
}

/// A controller's process.
pub struct Controller {
    /// Each that ever began has its own number.
    pub number: u32,
    pub service: ControllerService,
    pub volumes: Volumes,
    /// The process is gone.
    pub dead: CancellationToken,
    operations: Operations,
    alive: Arc<AtomicBool>,
    term: Arc<Mutex<Term>>,
    background: JoinHandle<()>,
}

/// What a process believes of its lease.
#[derive(Debug, Default)]
struct Term {
    /// Since when it may act, and until when it may count on it.
    acts: Option<(Instant, Instant)>,
}

impl Term {
    fn may_act(&self) -> bool {
        let now = Instant::now();
        self.acts.is_some_and(|(from, until)| from <= now && now < until)
    }
}

impl Controller {
    fn begin(rig: &Rig, number: u32) -> Self {
        let alive = Arc::new(AtomicBool::new(true));
        let term = Arc::new(Mutex::new(Term::default()));
        let asked = Arc::clone(&term);
        let gate: Gate = Arc::new(move || asked.lock().expect("no panic").may_act());
        let may = Arc::clone(&gate);
        let transport = gated(wire(rig, number, &alive), move || may());
        let token = token(if rig.setup.holders { HOLDER } else { CSI });
        let region = REGION.parse().expect("a region");
        let client = Client::new(region, transport, &token, Metrics::default()).expect("a legal token");
        let volumes = Volumes::new(vec![client], rig.kubernetes.clone(), settings());
        let operations = Operations::default();
        let service = ControllerService::new(volumes.clone(), operations.clone()).behind(Arc::clone(&gate));
        let current = volumes.clone();
        let background = tokio::spawn(async move { match current.keep_current(move || gate()).await {} });
        let dead = CancellationToken::new();
        Self { number, service, volumes, dead, operations, alive, term, background }
    }

    /// The process ends: nothing more goes out, and nobody hears from it.
    fn end(&self) {
        self.alive.store(false, Ordering::Relaxed);
        self.background.abort();
        self.dead.cancel();
    }

    fn may_act(&self) -> bool {
        self.term.lock().expect("no panic").may_act()
    }
}

/// What a caller needs of a controller.
#[derive(Clone)]
pub struct Target {
    pub number: u32,
    pub service: ControllerService,
    pub dead: CancellationToken,
}

impl Rig {
    /// Begins both controllers and the election.
    pub fn begin(&self) -> JoinHandle<()> {
        for place in 0..2 {
            self.start(place);
        }
        let rig = self.clone();
        tokio::spawn(async move {
            loop {
                rig.elect();
                tokio::time::sleep(RETRY).await;
            }
        })
    }

    fn start(&self, place: usize) {
        let number = {
            let mut election = self.election.lock().expect("no panic");
            election.begun += 1;
            election.begun
        };
        let controller = Controller::begin(self, number);
        let mut election = self.election.lock().expect("no panic");
        if place < election.controllers.len() {
            election.controllers[place] = controller;
        } else {
            election.controllers.push(controller);
        }
    }

    /// Ends a process at once, and begins one that remembers nothing.
    fn restart(&self, place: usize) {
        self.election.lock().expect("no panic").controllers[place].end();
        self.start(place);
    }

    /// Renews, gives up, and takes the lease.
    fn elect(&self) {
        let now = Instant::now();
        let mut lost = None;
        {
            let mut election = self.election.lock().expect("no panic");
            let Election { controllers, lease, parted, .. } = &mut *election;
            for until in parted.iter_mut() {
                *until = until.filter(|until| now < *until);
            }
            for (place, controller) in controllers.iter().enumerate() {
                let mut term = controller.term.lock().expect("no panic");
                let Some((from, until)) = term.acts else { continue };
                let holds = lease.is_some_and(|(holder, _)| holder == controller.number);
                if holds && parted[place].is_none() {
                    *lease = Some((controller.number, now));
                    term.acts = Some((from, now + RENEW_DEADLINE));
                } else if now >= until || (!holds && parted[place].is_none()) {
                    lost = Some(place);
                }
            }
            let free = lease.is_none_or(|(_, renewed)| now >= renewed + VALID);
            let candidate = controllers.iter().enumerate().find(|(place, c)| {
                parted[*place].is_none() && c.term.lock().expect("no panic").acts.is_none()
            });
            if let (true, Some((_, candidate))) = (free, candidate) {
                let wait = if lease.is_some() { LONGEST_LOCK } else { Duration::ZERO };
                candidate.term.lock().expect("no panic").acts = Some((now + wait, now + RENEW_DEADLINE));
                *lease = Some((candidate.number, now));
                let number = candidate.number;
                self.ledger().say(&format!("c{number} takes the lease and acts in {} s", wait.as_secs()));
            }
        }
        if let Some(place) = lost {
            self.ledger().say("a controller lost its lease and ends");
            self.restart(place);
        }
    }

    /// The place of the controller that leads, or would.
    fn leader(&self) -> usize {
        let election = self.election.lock().expect("no panic");
        let holder = election.lease.map(|(holder, _)| holder);
        election.controllers.iter().position(|c| Some(c.number) == holder).unwrap_or(0)
    }

    /// The controller that is asked.
    pub fn target(&self, other: bool) -> Target {
        let leader = self.leader();
        let place = if other { 1 - leader } else { leader };
        let election = self.election.lock().expect("no panic");
        let Controller { number, service, dead, .. } = &election.controllers[place];
        Target { number: *number, service: service.clone(), dead: dead.clone() }
    }

    /// Which controllers may act.
    pub fn acting(&self) -> Vec<u32> {
        let election = self.election.lock().expect("no panic");
        election.controllers.iter().filter(|c| c.may_act()).map(|c| c.number).collect()
    }

    /// Everybody reaches the API server.
    pub fn reunite(&self) {
        self.election.lock().expect("no panic").parted = [None, None];
    }

    /// Something happens to a process.
    pub fn happen(&self, process: Process) {
        let leader = self.leader();
        let place = |leads: bool| if leads { leader } else { 1 - leader };
        match process {
            Process::Crash { leader } => self.restart(place(leader)),
            Process::Partition { leader, seconds } => {
                let until = Instant::now() + Duration::from_secs(seconds);
                self.election.lock().expect("no panic").parted[place(leader)] = Some(until);
            }
            Process::Stop => {
                let rig = self.clone();
                let operations = {
                    let election = self.election.lock().expect("no panic");
                    election.controllers[leader].operations.clone()
                };
                tokio::spawn(async move {
                    let number = rig.target(false).number;
                    let ended = operations.drain(Duration::from_mins(1)).await;
                    let mut election = rig.election.lock().expect("no panic");
                    let still = election.controllers[leader].number == number;
                    let holds = election.lease.is_some_and(|(holder, _)| holder == number);
                    // What did not end keeps the lease until it expires.
                    if still && holds && ended {
                        election.lease = None;
                    }
                    drop(election);
                    if still {
                        rig.ledger().say(&format!("c{number} ends as it was asked to"));
                        rig.restart(leader);
                    }
                });
            }
        }
    }
}
