//! The tasks of the loop: a poller for each region, a watch on Nodes, and the reconciles between them.

use std::{collections::BTreeMap, pin::pin, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client as KubeClient, ResourceExt as _,
    api::ListParams,
    runtime::{WatchStreamExt as _, utils::Backoff, watcher},
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Settings,
    poll::{Polled, Poller},
    reconcile::{Reconciler, RegionHandle},
    writes::Writer,
};
use crate::{
    k8s::{chain, events::Recorder, lease::Leadership},
    pve::Client,
    telemetry::metrics::Metrics,
};

/// How long changes are gathered before a reconcile.
const GATHER: Duration = Duration::from_millis(500);
/// How often all is compared though nothing changed.
const RESYNC: Duration = Duration::from_mins(1);

/// How old the last reconcile may be before the loop counts as stuck.
const STUCK: Duration = Duration::from_mins(2);

/// The loop, ready to run.
pub struct Ccm {
    nodes: Api<Node>,
    pollers: Vec<Poller>,
    reconciler: Reconciler,
    interval: Duration,
    health: Health,
    compared: watch::Sender<Option<Instant>>,
}

/// How a region is asked.
pub struct RegionClients {
    /// By whichever of its servers answers.
    pub any: Client,
    /// By each of its servers for itself, where there are several: what a server that is cut off from its cluster says does not count.
    pub each: Vec<Client>,
}

impl From<Client> for RegionClients {
    fn from(any: Client) -> Self {
        Self { any, each: Vec::new() }
    }
}

/// Whether the loop does its work; clones see the same.
#[derive(Clone)]
pub struct Health {
    polled: Vec<watch::Receiver<Polled>>,
    reconciled: watch::Receiver<Option<Instant>>,
    believed_for: Duration,
}

impl Health {
    /// Whether Nodes were compared lately, and with what some region told lately. One region that is dead is no reason to restart
    /// anything: the others are served.
    pub fn is_good(&self) -> bool {
        let since = |at: Option<Instant>| at.map(|at| at.elapsed());
        let told = |told: &watch::Receiver<Polled>| since(told.borrow().good_at);
        since(*self.reconciled.borrow()).is_some_and(|age| age <= STUCK)
            && self.polled.iter().filter_map(told).any(|age| age <= self.believed_for)
    }
}

/// One pass could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot list the nodes")]
pub struct RunError(#[source] kube::Error);

impl Ccm {
    /// The loop over these regions and the Nodes of this cluster. It writes only while the lease is held, where there is one.
    pub fn new(
        kube: KubeClient,
        regions: Vec<RegionClients>,
        settings: Settings,
        leadership: Option<Leadership>,
        identity: &str,
        metrics: &Metrics,
    ) -> Self {
        let ask_agents = settings.addresses.mode == super::addresses::Mode::Agent && !settings.labels_only;
        let (mut pollers, mut handles) = (Vec::new(), Vec::new());
        let mut answers = Vec::new();
        for RegionClients { any: client, each: servers } in regions {
            let (poller, told, wanted) =
                Poller::new(client.clone(), servers.clone(), metrics.clone(), ask_agents);
            pollers.push(poller);
            answers.push(told.clone());
            handles.push(RegionHandle { client, servers, polled: told, wanted });
        }
        let (compared, last) = watch::channel(None);
        let health = Health { polled: answers, reconciled: last, believed_for: settings.believed_for() };
        let writer = Writer::new(kube.clone(), leadership, settings.dry_run, metrics.clone());
        let recorder = Recorder::new(kube.clone(), "proxmox-ccm", identity).pausing();
        let interval = settings.interval;
        let reconciler = Reconciler::new(handles, settings, writer, recorder, metrics.clone());
        Self { nodes: Api::all(kube), pollers, reconciler, interval, health, compared }
    }

    /// The view on whether the loop does its work.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// Polls every region and compares all Nodes, once.
    pub async fn once(mut self) -> Result<(), RunError> {
        self.pollers.iter_mut().map(Poller::poll).collect::<FuturesUnordered<_>>().collect::<()>().await;
        let nodes = self.nodes.list(&ListParams::default()).await.map_err(RunError)?;
        self.reconciler.reconcile(&nodes.items).await;
        Ok(())
    }

    /// Polls, watches and compares until `stop`. A reconcile that runs when it comes is finished.
    pub async fn run(mut self, stop: CancellationToken) {
        let (poke, mut poked) = mpsc::channel::<()>(1);
        let tasks = TaskTracker::new();
        for (index, mut poller) in std::mem::take(&mut self.pollers).into_iter().enumerate() {
            let (stop, poke) = (stop.clone(), poke.clone());
            let pauses = Pauses { interval: self.interval, seed: u32::try_from(index).unwrap_or_default() };
            tasks.spawn(async move {
                stop.run_until_cancelled(async {
                    for pause in pauses {
                        poller.poll().await;
                        // A full channel: a reconcile is due already.
                        let _ = poke.try_send(());
                        tokio::time::sleep(pause).await;
                    }
                })
                .await;
            });
        }
        tasks.close();

        let mut events =
            pin!(watcher(self.nodes.clone(), watcher::Config::default()).backoff(Again::default()));
        let mut known = Known::default();
        let mut next: Option<Instant> = None;
        let mut resync = tokio::time::interval(RESYNC);
        resync.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            // All of these may be dropped and waited for again.
            let changed = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = due => {
                    next = None;
                    if known.complete {
                        let nodes: Vec<Node> = known.nodes.values().cloned().collect();
                        self.reconciler.reconcile(&nodes).await;
                        self.compared.send_replace(Some(Instant::now()));
                    }
                    false
                }
                event = events.next() => match event {
                    Some(Ok(event)) => known.take(event),
                    Some(Err(error)) => {
                        tracing::warn!(error = chain(&error), "cannot watch the nodes; trying again");
                        false
                    }
                    None => break,
                },
                Some(()) = poked.recv() => true,
                _ = resync.tick() => true,
            };
            if changed {
                next.get_or_insert_with(|| Instant::now() + GATHER);
            }
        }
        tasks.wait().await;
    }
}

/// The Nodes as last watched.
#[derive(Default)]
struct Known {
    nodes: BTreeMap<String, Node>,
    coming: BTreeMap<String, Node>,
    complete: bool,
}

impl Known {
    /// Takes an event in; tells whether there is something new to compare.
    fn take(&mut self, event: watcher::Event<Node>) -> bool {
        match event {
            watcher::Event::Init => self.coming.clear(),
            watcher::Event::InitApply(node) => drop(self.coming.insert(node.name_any(), node)),
            watcher::Event::InitDone => {
                self.nodes = std::mem::take(&mut self.coming);
                self.complete = true;
                return true;
            }
            watcher::Event::Apply(node) => {
                let old = self.nodes.insert(node.name_any(), node.clone());
                // The kubelet writes its status all the time; what we decide by rarely changes.
                return old.is_none_or(|old| {
                    let addresses = |node: &Node| node.status.as_ref().and_then(|s| s.addresses.clone());
                    old.spec != node.spec
                        || old.metadata.uid != node.metadata.uid
                        || old.labels() != node.labels()
                        || old.annotations() != node.annotations()
                        || addresses(&old) != addresses(&node)
                        || crate::k8s::node::is_ready(&old) != crate::k8s::node::is_ready(&node)
                        || crate::k8s::node::system_uuid(&old) != crate::k8s::node::system_uuid(&node)
                });
            }
            watcher::Event::Delete(node) => return self.nodes.remove(&node.name_any()).is_some(),
        }
        false
    }
}

/// The pauses between polls: up to a tenth longer than the interval, so that regions do not march in step.
struct Pauses {
    interval: Duration,
    seed: u32,
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.seed = self.seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Some(self.interval + self.interval * (self.seed >> 16 & 0xff) / 2560)
    }
}

/// The pauses between tries to watch: doubled each time, up to [`LONGEST_PAUSE`]. Only one process watches at a time, so that they need no
/// chance in them.
#[derive(Default)]
struct Again {
    tries: u32,
}

/// Between two tries to watch at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl Iterator for Again {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = Duration::from_millis(500) * 2_u32.saturating_pow(self.tries);
        self.tries = self.tries.saturating_add(1).min(16);
        Some(pause.min(LONGEST_PAUSE))
    }
}

impl Backoff for Again {
    fn reset(&mut self) {
        self.tries = 0;
    }
}
