//! One region's truth: a poll every few seconds serves all its nodes.
//!
//! `GET /cluster/resources` tells where every VM is and what it does. Who a VM is (its SMBIOS uuid) stands in its config, which is read
//! when the VM is first seen, when it was started anew (a VM that was re-created under an old VMID was), when its name changed, and now
//! and then. Each region is polled by its own task, so that a dead one holds up nobody. Read [`Poller::poll`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture};
use tokio::{sync::watch, time::Instant};

use super::{
    instances::{Identity, RegionFacts, VmFacts},
    sight::Sight,
};
use crate::{
    k8s,
    pve::{
        ApiError, Client,
        agent::Interface,
        cluster::{Resources, VmRow},
        ha::HaGroups,
        qemu::VmConfig,
    },
    telemetry::metrics::Metrics,
    types::{Bytes, NodeName, VmId, props::PropertyString},
};

/// Configs read at once.
const READS: usize = 4;
/// How long a config may take: it is answered by the VM's host, which may hang.
const READ_DEADLINE: Duration = Duration::from_secs(10);
/// After how long one that could not be read is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// After how long a config is read again though nothing hints at a change.
const STALE: Duration = Duration::from_mins(30);
/// How often privileges and HA groups are asked for.
const SLOWLY: Duration = Duration::from_mins(5);
/// How often an agent is asked, and how many at one poll.
const AGENT_EVERY: Duration = Duration::from_mins(5);
const AGENTS: usize = 4;

/// A config, or why there is none.
type ReadConfig = Result<Result<VmConfig, ApiError>, tokio::time::error::Elapsed>;

/// What is known of a region after a poll.
#[derive(Debug, Clone, Default)]
pub struct Polled {
    /// Its VMs and hosts.
    pub facts: RegionFacts,
    /// The HA groups of its hosts; `None` where they can't be read.
    pub groups: Option<HaGroups>,
    /// What agents told of their VMs' network.
    pub interfaces: BTreeMap<VmId, Vec<Interface>>,
    /// The VMs whose agents the token may not ask, and what Proxmox says to that.
    pub agents_refuse: BTreeMap<VmId, String>,
    /// When the last good poll was sent.
    pub good_at: Option<Instant>,
}

/// What the reconciles want to know of a region.
#[derive(Debug, Default)]
pub struct Wants {
    /// The VMs that are nodes: their agents are worth asking.
    pub vms: BTreeSet<VmId>,
    /// Some VM is missing: whether the token sees all is asked at each poll.
    pub in_doubt: bool,
}

/// The same, shared.
pub type Wanted = Arc<Mutex<Wants>>;

/// Polls one region.
pub struct Poller {
    client: Client,
    servers: Vec<Client>,
    metrics: Metrics,
    told: watch::Sender<Polled>,
    wanted: Wanted,
    ask_agents: bool,
    known: BTreeMap<VmId, Known>,
    asked_slowly: Option<Instant>,
    sight: Sight,
    agents: BTreeMap<VmId, Instant>,
    was_good: bool,
}

/// A config that was read, or could not be.
struct Known {
    identity: Option<Identity>,
    digest: String,
    at: Instant,
    shape: Shape,
    uptime: u64,
}

/// What else of a VM changes where it is made anew.
#[derive(PartialEq, Eq)]
struct Shape {
    name: Option<String>,
    cpus: Option<u64>,
    memory: Option<Bytes>,
    tags: Vec<String>,
}

impl Shape {
    fn of(row: &VmRow) -> Self {
        Self { name: row.name.clone(), cpus: row.cpus, memory: row.memory, tags: row.tags.clone() }
    }
}

impl Poller {
    /// A poller of the region of `client`, and the view on what it finds. `servers`: a client of each of the region's servers, where there
    /// are several.
    pub fn new(
        client: Client,
        servers: Vec<Client>,
        metrics: Metrics,
        ask_agents: bool,
    ) -> (Self, watch::Receiver<Polled>, Wanted) {
        let (told, seen) = watch::channel(Polled::default());
        let wanted = Wanted::default();
        let poller = Self {
            client,
            servers,
            metrics,
            told,
            wanted: Arc::clone(&wanted),
            ask_agents,
            known: BTreeMap::new(),
            asked_slowly: None,
            sight: Sight::NotAsked,
            agents: BTreeMap::new(),
            was_good: true,
        };
        (poller, seen, wanted)
    }

    /// Asks the region once, and tells what it said.
    pub async fn poll(&mut self) {
        let sent = Instant::now();
        let result = self.look(sent).await;
        let region = self.client.region().to_string();
        let seconds = k8s::seconds_since_1970();
        self.metrics.ccm().poll(&region, result.is_ok(), seconds);
        match result {
            Ok(polled) => {
                if !self.was_good {
                    tracing::info!(region, "the region answers again");
                }
                self.was_good = true;
                self.told.send_replace(polled);
            }
            Err(error) => {
                if self.was_good {
                    tracing::warn!(region, error, "the region does not answer: its nodes stay as they are");
                }
                self.was_good = false;
                self.told.send_modify(|polled| {
                    polled.facts.fresh = false;
                    polled.facts.trouble = Some(error);
                });
            }
        }
    }

    async fn look(&mut self, sent: Instant) -> Result<Polled, String> {
        let resources = self.resources().await.map_err(|error| k8s::chain(&error))?;
        let before = self.told.borrow().clone();
        let rows: BTreeMap<VmId, &VmRow> =
            resources.vms.iter().filter(|row| !row.template).map(|row| (row.vmid, row)).collect();
        let vanished = before.facts.vms.keys().any(|vmid| !rows.contains_key(vmid));
        let due = self.asked_slowly.is_none_or(|at| sent.duration_since(at) >= SLOWLY);
        let in_doubt = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).in_doubt;
        if due || vanished || in_doubt {
            self.sight = Sight::of(&self.client).await;
        }
        if rows.is_empty() && !before.facts.vms.is_empty() && !self.sight.is_whole() {
            return Err(format!(
                "it lists no VM any more, and the token does not see every one: {}; hint: give it VM.Audit on /vms",
                self.sight.missing()
            ));
        }
        let groups = if due { self.groups(before.groups).await } else { before.groups };
        if due {
            self.asked_slowly = Some(sent);
        }
        self.read_configs(&resources, &rows, sent).await;
        let (interfaces, agents_refuse) =
            self.ask_agents(&rows, before.interfaces, before.agents_refuse, sent).await;
        let vms = rows.values().map(|row| (row.vmid, self.facts(&resources, row))).collect();
        let facts = RegionFacts {
            fresh: true,
            quorate: resources.is_quorate(),
            trouble: None,
            sight: self.sight.clone(),
            vms,
            hosts: resources.nodes.iter().map(|row| row.node.clone()).collect(),
        };
        Ok(Polled { facts, groups, interfaces, agents_refuse, good_at: Some(sent) })
    }

    fn facts(&self, resources: &Resources, row: &VmRow) -> VmFacts {
        VmFacts {
            vmid: row.vmid,
            host: row.node.clone(),
            host_online: resources.is_online(&row.node),
            name: row.name.clone(),
            status: row.status.clone(),
            lock: row.lock.clone(),
            hastate: row.hastate.clone(),
            cpus: row.cpus.unwrap_or(1),
            memory: row.memory.unwrap_or(Bytes::new(0)),
            tags: row.tags.clone(),
            identity: self.known.get(&row.vmid).and_then(|known| known.identity.clone()),
        }
    }

    /// What the region lists: where the server that answers is cut off from its cluster, by one that is not.
    async fn resources(&self) -> Result<Resources, ApiError> {
        let first = self.client.resources().await?;
        if first.is_quorate() {
            return Ok(first);
        }
        for server in &self.servers {
            match server.resources().await {
                Ok(other) if other.is_quorate() => return Ok(other),
                _ => {}
            }
        }
        Ok(first)
    }

    async fn groups(&self, before: Option<HaGroups>) -> Option<HaGroups> {
        match self.client.ha_groups().await {
            Ok(groups) => Some(groups),
            // No answer is no news.
            Err(error) if error.is_unknown() => before,
            Err(error) => {
                tracing::debug!(region = %self.client.region(), error = k8s::chain(&error), "cannot read the HA groups");
                None
            }
        }
    }

    /// Reads the configs of VMs that are new or may be others than before.
    async fn read_configs(&mut self, resources: &Resources, rows: &BTreeMap<VmId, &VmRow>, now: Instant) {
        self.known.retain(|vmid, _| rows.contains_key(vmid));
        let (mut due, mut oldest): (Vec<&VmRow>, Option<(Instant, &VmRow)>) = (Vec::new(), None);
        for row in rows.values().copied() {
            let Some(known) = self.known.get_mut(&row.vmid) else {
                due.push(row);
                continue;
            };
            let age = now.duration_since(known.at);
            // A host that is not heard of tells no uptime, and some of the rest is missing, too.
            let online = resources.is_online(&row.node) && row.status != "unknown";
            if online && (row.uptime < known.uptime || Shape::of(row) != known.shape) {
                known.identity = None;
                due.push(row);
            } else if known.identity.is_none() {
                if age >= RETRY {
                    due.push(row);
                }
            } else if age >= STALE && oldest.is_none_or(|(at, _)| known.at < at) {
                oldest = Some((known.at, row));
            }
            known.uptime = known.uptime.max(row.uptime);
        }
        due.extend(oldest.map(|(_, row)| row));
        // The host answers; a dead one's neighbour would wait 30 s for it.
        due.retain(|row| resources.is_online(&row.node));
        let silent: Arc<Mutex<BTreeSet<NodeName>>> = Arc::default();
        let reads: Vec<BoxFuture<'static, (VmRow, Option<ReadConfig>)>> = due
            .into_iter()
            .map(|row| {
                let (client, row, silent) = (self.client.clone(), row.clone(), Arc::clone(&silent));
                async move {
                    let silent = || silent.lock().unwrap_or_else(PoisonError::into_inner);
                    // One that hangs would cost the deadline for each of its VMs.
                    if silent().contains(&row.node) {
                        return (row, None);
                    }
                    let reading = client.vm_config(&row.node, row.vmid);
                    let read = tokio::time::timeout(READ_DEADLINE, reading).await;
                    if read.is_err() {
                        silent().insert(row.node.clone());
                    }
                    (row, Some(read))
                }
                .boxed()
            })
            .collect();
        let read: Vec<(VmRow, Option<ReadConfig>)> =
            futures_util::stream::iter(reads).buffer_unordered(READS).collect().await;
        for (row, read) in read {
            let config = match read {
                Some(Ok(Ok(config))) => Some(config),
                Some(Ok(Err(error))) => {
                    tracing::debug!(vm = %row.vmid, error = k8s::chain(&error), "cannot read the config");
                    None
                }
                Some(Err(_)) | None => None,
            };
            let before = self.known.remove(&row.vmid);
            let known = match (config, before) {
                // The same config: the same VM.
                (Some(config), Some(before))
                    if before.digest == config.digest() && before.identity.is_some() =>
                {
                    Known { at: now, ..before }
                }
                (Some(config), _) => Known {
                    identity: Some(identity(&config)),
                    digest: config.digest().to_owned(),
                    at: now,
                    shape: Shape::of(&row),
                    uptime: row.uptime,
                },
                // Read again without need, and in vain: what was known stays.
                (None, before) => Known {
                    identity: before.and_then(|before| before.identity),
                    digest: String::new(),
                    at: now,
                    shape: Shape::of(&row),
                    uptime: row.uptime,
                },
            };
            self.known.insert(row.vmid, known);
        }
    }

    /// Asks the agents of some nodes' VMs, those first that were not asked for the longest time.
    async fn ask_agents(
        &mut self,
        rows: &BTreeMap<VmId, &VmRow>,
        mut told: BTreeMap<VmId, Vec<Interface>>,
        mut refused: BTreeMap<VmId, String>,
        now: Instant,
    ) -> (BTreeMap<VmId, Vec<Interface>>, BTreeMap<VmId, String>) {
        if !self.ask_agents {
            return (told, refused);
        }
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).vms.clone();
        told.retain(|vmid, _| wanted.contains(vmid) && rows.contains_key(vmid));
        refused.retain(|vmid, _| wanted.contains(vmid) && rows.contains_key(vmid));
        self.agents.retain(|vmid, _| wanted.contains(vmid));
        let runs = |vmid: &&VmId| rows.get(vmid).is_some_and(|row| row.status == "running");
        let mut due: Vec<VmId> = wanted.iter().filter(runs).copied().collect();
        due.retain(|vmid| self.agents.get(vmid).is_none_or(|at| now.duration_since(*at) >= AGENT_EVERY));
        due.sort_by_key(|vmid| self.agents.get(vmid).copied());
        let asked: Vec<BoxFuture<'static, _>> = due
            .iter()
            .take(AGENTS)
            .filter_map(|vmid| rows.get(vmid))
            .map(|row| {
                let (client, host, vmid) = (self.client.clone(), row.node.clone(), row.vmid);
                async move {
                    let answer = client.guest_interfaces(&host, vmid);
                    (vmid, tokio::time::timeout(READ_DEADLINE, answer).await)
                }
                .boxed()
            })
            .collect();
        for (vmid, answer) in futures_util::future::join_all(asked).await {
            self.agents.insert(vmid, now);
            refused.remove(&vmid);
            match answer {
                Ok(Ok(interfaces)) => drop(told.insert(vmid, interfaces)),
                Ok(Err(error)) if error.refusal().is_some_and(|(status, _)| status == 403) => {
                    refused.insert(vmid, k8s::chain(&error));
                }
                Ok(Err(error)) => {
                    tracing::debug!(vm = %vmid, error = k8s::chain(&error), "the agent does not answer");
                }
                Err(_) => tracing::debug!(vm = %vmid, "the agent takes too long"),
            }
        }
        (told, refused)
    }
}

/// Who a VM is, by its config. Values of `smbios1` may be in base64 (qemu-server `QemuServer.pm`, `base64=1`); the uuid never is.
fn identity(config: &VmConfig) -> Identity {
    let smbios: Option<PropertyString> = config.current("smbios1").and_then(|text| text.parse().ok());
    let sku = smbios.and_then(|smbios| {
        let sku = smbios.get("sku")?.to_owned();
        if smbios.get("base64") == Some("1") { decode_base64(&sku) } else { Some(sku) }
    });
    Identity { uuid: config.uuid(), sku }
}

/// The text of a base64 string, `None` where it is none.
fn decode_base64(text: &str) -> Option<String> {
    let (mut bytes, mut buffer, mut bits) = (Vec::new(), 0u32, 0u32);
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        buffer = (buffer << 6 | u32::from(value)) & 0xffff;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(buffer >> bits & 0xff).ok()?);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read() {
        for (text, expected) in [("bTUubGFyZ2U=", "m5.large"), ("YQ==", "a"), ("", ""), ("eHl6", "xyz")] {
            assert_eq!(decode_base64(text).as_deref(), Some(expected), "{text}");
        }
        assert_eq!(decode_base64("a b"), None);
    }
}
