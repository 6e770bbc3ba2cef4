//! How many requests may be under way at once, so that the administrators' own use of the API keeps its workers.
//!
//! Proxmox answers with three workers for each daemon and node (pve-manager `pveproxy`, `pvedaemon`: `max_workers`), and a call that waits
//! for a lock, a storage or a guest holds one all the while: three of those, and the node's API stands still. So at most two such calls
//! are under way at a node, and no node takes all the places of its region. Each limit is first come, first served.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    telemetry::pve::{InFlight, PveMetrics},
    types::Region,
};

/// Requests under way in a region, whichever server takes them.
const REGION: usize = 6;
/// Requests under way at one node: of a node that is dead each takes up to 30 s, and others must go on meanwhile.
const NODE: usize = 4;
/// Of those, requests that occupy a worker of its daemon.
const NODE_SLOW: usize = 2;

/// What a request costs the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Answered from memory or a file.
    Read,
    /// Occupies a worker of the node's daemon for as long as a lock, a storage or a guest takes.
    Slow,
    /// Starts a task, after checks that are quick.
    Change,
    /// A login.
    Login,
}

impl Class {
    /// As a label.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Slow => "slow",
            Self::Change => "change",
            Self::Login => "login",
        }
    }
}

/// The limits of a region. Clones share them.
#[derive(Clone)]
pub(super) struct Limits {
    name: String,
    region: Arc<Semaphore>,
    nodes: Arc<Mutex<BTreeMap<String, Node>>>,
    metrics: PveMetrics,
}

#[derive(Clone)]
struct Node {
    all: Arc<Semaphore>,
    slow: Arc<Semaphore>,
}

impl Default for Node {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(NODE)), slow: Arc::new(Semaphore::new(NODE_SLOW)) }
    }
}

/// The place of a request among those under way.
pub(super) struct Permit {
    _places: [Option<OwnedSemaphorePermit>; 3],
    _counted: InFlight,
}

impl Limits {
    pub(super) fn new(region: &Region, metrics: PveMetrics) -> Self {
        Self {
            name: region.to_string(),
            region: Arc::new(Semaphore::new(REGION)),
            nodes: Arc::default(),
            metrics,
        }
    }

    /// Waits for a place. Who waits for a node holds no place of the region meanwhile, so that a slow node holds up nobody else.
    pub(super) async fn enter(&self, node: Option<&str>, class: Class) -> Permit {
        let waiting = self.metrics.waiting(&self.name, class.as_str());
        let limits = node.map(|node| self.node(node));
        let slow = match &limits {
            Some(limits) if class == Class::Slow => take(&limits.slow).await,
            _ => None,
        };
        let all = match &limits {
            Some(limits) => take(&limits.all).await,
            None => None,
        };
        let region = take(&self.region).await;
        drop(waiting);
        let counted = self.metrics.in_flight(&self.name, node.unwrap_or_default(), class.as_str());
        Permit { _places: [slow, all, region], _counted: counted }
    }

    fn node(&self, name: &str) -> Node {
        // A panic while the map was locked can't have left it half changed: each change is one call.
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.entry(name.to_owned()).or_default().clone()
    }
}

async fn take(semaphore: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    // It fails only where somebody closes it, which nobody does.
    Arc::clone(semaphore).acquire_owned().await.ok()
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn limits() -> Limits {
        Limits::new(&"r1".parse().expect("a region"), PveMetrics::default())
    }

    #[tokio::test]
    async fn a_third_slow_call_at_a_node_waits_while_reads_and_other_nodes_go_on() {
        let limits = limits();
        let first = limits.enter(Some("pve1"), Class::Slow).await;
        let _second = limits.enter(Some("pve1"), Class::Slow).await;
        let mut third = Box::pin(limits.enter(Some("pve1"), Class::Slow));
        assert!((&mut third).now_or_never().is_none());
        let _read = limits.enter(Some("pve1"), Class::Read).now_or_never().expect("reads go on");
        let _other = limits.enter(Some("pve2"), Class::Slow).now_or_never().expect("another node goes on");
        let mut fourth = Box::pin(limits.enter(Some("pve1"), Class::Slow));
        assert!((&mut fourth).now_or_never().is_none());
        drop(first);
        assert!((&mut fourth).now_or_never().is_none(), "who came later goes later");
        assert!(third.now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_node_that_does_not_answer_leaves_places_to_others() {
        let limits = limits();
        let mut held = Vec::new();
        for _ in 0..NODE {
            held.push(limits.enter(Some("dead"), Class::Read).await);
        }
        let mut waiting: Vec<_> =
            (0..10).map(|_| Box::pin(limits.enter(Some("dead"), Class::Change))).collect();
        for one in &mut waiting {
            assert!(one.now_or_never().is_none());
        }
        let pve2 = limits.enter(Some("pve2"), Class::Read).now_or_never();
        let anywhere = limits.enter(None, Class::Read).now_or_never();
        assert!(pve2.is_some() && anywhere.is_some());
        assert!(limits.enter(None, Class::Read).now_or_never().is_none(), "the region is full");
    }

    #[tokio::test]
    async fn who_gives_up_waiting_leaves_no_trace() {
        let limits = limits();
        let held: Vec<_> =
            [limits.enter(Some("a"), Class::Slow).await, limits.enter(Some("a"), Class::Slow).await].into();
        assert!(limits.enter(Some("a"), Class::Slow).now_or_never().is_none());
        drop(held);
        let places: Vec<_> =
            (0..NODE_SLOW).map(|_| limits.enter(Some("a"), Class::Slow).now_or_never()).collect();
        assert!(places.iter().all(Option::is_some));
    }
}
