//! One process acts: leader election by a Lease, with client-go's rules.
//!
//! Clocks of other machines are never compared: a lease counts as expired when *we* have seen no change of it for as long as its holder
//! said it lasts. Every write carries the resourceVersion that was read, so of two candidates one fails. A holder that could not renew
//! within its renew deadline, which is shorter than the lease, has lost; its process must end ([`Ended::Lost`]). Source: client-go
//! `tools/leaderelection/leaderelection.go`. Read [`Election::run`] first.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, api::PostParams};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{chain, date};

/// What the election goes by; [`Settings::new`] has client-go's times.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Who this process is; no other process may ever have the same.
    pub identity: String,
    /// How long others wait after the last change they saw.
    pub duration: Duration,
    /// How long a holder goes on without a renewal.
    pub renew_deadline: Duration,
    /// Between two tries.
    pub retry: Duration,
}

impl Settings {
    /// 15 s, 10 s and 2 s, and an identity made of `host` and a fresh uuid.
    pub fn new(namespace: &str, name: &str, host: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            identity: format!("{host}_{}", uuid::Uuid::new_v4()),
            duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// How long ago the API server may have been heard of by a candidate that is well.
const ALIVE: Duration = Duration::from_secs(30);

/// How an election ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was stopped, and the lease given back if it was held.
    Released,
    /// The lease was held and could not be renewed in time: the process must end without another write.
    Lost,
}

/// Whether this process holds the lease; clones see the same.
#[derive(Debug, Clone)]
pub struct Leadership(watch::Receiver<State>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct State {
    /// Until when nobody else can hold it, counted from before the renewal was sent.
    valid_until: Option<Instant>,
    taken_from: Option<String>,
    /// When the API server last said who holds it.
    heard_at: Option<Instant>,
}

impl Leadership {
    /// Whether the lease is held at this moment: to be asked before each write.
    pub fn holds(&self) -> bool {
        self.0.borrow().valid_until.is_some_and(|until| Instant::now() < until)
    }

    /// Whether the API server was heard of lately: what a candidate that waits for its turn can be asked.
    pub fn is_alive(&self) -> bool {
        self.0.borrow().heard_at.is_some_and(|at| at.elapsed() < ALIVE)
    }

    /// Waits until the lease is held. Tells from whom it was taken without having been given back: that one may still have requests
    /// under way. `None` also where there was no holder. Never returns where the election has ended. Cancel safe.
    pub async fn acquired(&mut self) -> Option<String> {
        let from = self.0.wait_for(|state| state.valid_until.is_some()).await;
        match from.map(|state| state.taken_from.clone()) {
            Ok(from) => from,
            Err(_) => std::future::pending().await,
        }
    }
}

/// A candidate.
pub struct Election {
    api: Api<Lease>,
    settings: Settings,
    state: watch::Sender<State>,
    observed: Option<Observed>,
    /// Whose expired lease is being taken.
    taking_from: Option<String>,
    tries: u64,
}

/// What became of one try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Try {
    /// The lease is ours.
    Held,
    /// It is another's, and valid.
    Others,
    /// No answer, or somebody else wrote at the same time.
    Failed,
}

/// The lease as last seen, and when its record was first seen so.
struct Observed {
    lease: Lease,
    since: Instant,
}

impl Observed {
    fn spec(&self) -> LeaseSpec {
        self.lease.spec.clone().unwrap_or_default()
    }

    fn holder(&self) -> Option<String> {
        self.spec().holder_identity.filter(|holder| !holder.is_empty())
    }

    /// Whether its holder may still count on it, by our own clock.
    fn is_valid(&self, now: Instant) -> bool {
        let seconds = self.spec().lease_duration_seconds.and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
        now < self.since + Duration::from_secs(seconds)
    }
}

impl Election {
    /// A candidate that does nothing until it is run, and the view on what becomes of it.
    pub fn new(client: Client, settings: Settings) -> (Self, Leadership) {
        let (state, told) = watch::channel(State::default());
        let api = Api::namespaced(client, &settings.namespace);
        (Self { api, settings, state, observed: None, taking_from: None, tries: 0 }, Leadership(told))
    }

    /// Acquires the lease and renews it until `stop`, or until it is lost.
    pub async fn run(mut self, stop: CancellationToken) -> Ended {
        if !self.acquire(&stop).await {
            return Ended::Released;
        }
        tracing::info!(lease = self.settings.name, identity = self.settings.identity, "holding the lease");
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    self.release().await;
                    return Ended::Released;
                }
                () = tokio::time::sleep(self.settings.retry) => {}
            }
            if !self.renew(&stop).await {
                if stop.is_cancelled() {
                    self.release().await;
                    return Ended::Released;
                }
                tracing::error!(lease = self.settings.name, "the lease is lost: this process must end");
                self.state.send_replace(State::default());
                return Ended::Lost;
            }
        }
    }

    /// Tries until the lease is ours; `false` when stopped.
    async fn acquire(&mut self, stop: &CancellationToken) -> bool {
        loop {
            // A try that is dropped half way may have taken the lease: its next holder waits until it expires.
            let held = tokio::select! {
                biased;
                () = stop.cancelled() => return false,
                held = self.attempt() => held,
            };
            if held == Try::Held {
                return true;
            }
            let pause = self.settings.retry + self.jitter();
            tokio::select! {
                biased;
                () = stop.cancelled() => return false,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Tries to renew until it works, the renew deadline passes or somebody else is seen to hold it.
    async fn renew(&mut self, stop: &CancellationToken) -> bool {
        let Some(deadline) = self.state.borrow().valid_until else { return false };
        let renewing = async {
            loop {
                match self.attempt().await {
                    Try::Held => return true,
                    Try::Others => return false,
                    Try::Failed => {}
                }
                tokio::time::sleep(self.settings.retry).await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => false,
            renewed = tokio::time::timeout_at(deadline, renewing) => renewed.unwrap_or(false),
        }
    }

    /// Up to 1.2 times the pause again, different for each candidate.
    fn jitter(&mut self) -> Duration {
        self.tries += 1;
        let seed =
            self.settings.identity.bytes().fold(self.tries, |seed, byte| {
                seed.wrapping_mul(0x0100_0000_01b3).wrapping_add(u64::from(byte))
            });
        let part = u32::try_from(seed % 1200).unwrap_or_default();
        self.settings.retry * part / 1000
    }

    /// One try to acquire or renew, bounded in time.
    async fn attempt(&mut self) -> Try {
        let patience = self.settings.renew_deadline / 2;
        match tokio::time::timeout(patience, self.acquire_or_renew()).await {
            Ok(Ok(held)) => {
                self.state.send_if_modified(|state| {
                    state.heard_at = Some(Instant::now());
                    // Nobody waits for this.
                    false
                });
                held
            }
            Ok(Err(error)) => {
                tracing::warn!(
                    lease = self.settings.name,
                    error = chain(&error),
                    "cannot take or renew the lease"
                );
                Try::Failed
            }
            Err(_) => {
                tracing::warn!(lease = self.settings.name, "the API server did not answer in time");
                Try::Failed
            }
        }
    }

    async fn acquire_or_renew(&mut self) -> Result<Try, kube::Error> {
        let sent = Instant::now();
        // A holder's record is most likely as it wrote it: one request instead of two.
        if let Some(lease) = self.own_record(sent) {
            match self.api.replace(&self.settings.name, &PostParams::default(), &lease).await {
                Ok(written) => {
                    self.held(written, sent);
                    return Ok(Try::Held);
                }
                // Somebody wrote, or an answer to us was lost: what is there now decides.
                Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        let Some(lease) = self.api.get_opt(&self.settings.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.settings.name.clone()),
                    namespace: Some(self.settings.namespace.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(None)),
            };
            return match self.api.create(&PostParams::default(), &lease).await {
                Ok(created) => {
                    self.held(created, sent);
                    Ok(Try::Held)
                }
                Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(Try::Failed),
                Err(error) => Err(error),
            };
        };
        let now = Instant::now();
        if self.observed.as_ref().is_none_or(|observed| observed.lease.spec != lease.spec) {
            self.observed = Some(Observed { lease: lease.clone(), since: now });
        }
        let Some(observed) = &self.observed else { return Ok(Try::Failed) };
        let holder = observed.holder();
        let ours = holder.as_deref() == Some(self.settings.identity.as_str());
        if holder.is_some() && !ours && observed.is_valid(now) {
            return Ok(Try::Others);
        }
        if !ours {
            // Remembered before it is written: the answer to a write that did take the lease may be lost.
            self.taking_from = holder;
        }
        let mut next = lease;
        next.spec = Some(self.spec(Some(&next.spec.unwrap_or_default())));
        match self.api.replace(&self.settings.name, &PostParams::default(), &next).await {
            Ok(written) => {
                self.held(written, sent);
                Ok(Try::Held)
            }
            // Somebody else was faster; the next try sees who.
            Err(kube::Error::Api(status)) if status.is_conflict() => Ok(Try::Failed),
            Err(error) => Err(error),
        }
    }

    /// The record to renew with, where we held the lease when it was last seen, and still may.
    fn own_record(&self, now: Instant) -> Option<Lease> {
        let observed = self.observed.as_ref()?;
        let ours = observed.holder().as_deref() == Some(self.settings.identity.as_str());
        (ours && observed.is_valid(now)).then(|| {
            let mut lease = observed.lease.clone();
            lease.spec = Some(self.spec(Some(&observed.spec())));
            lease
        })
    }

    fn held(&mut self, lease: Lease, sent: Instant) {
        let taken_from = self.taking_from.take();
        self.observed = Some(Observed { lease, since: sent });
        let until = sent + self.settings.renew_deadline;
        self.state.send_modify(|state| {
            if state.valid_until.is_none() {
                state.taken_from = taken_from;
            }
            state.valid_until = Some(until);
        });
    }

    /// The spec that makes us the holder.
    fn spec(&self, old: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(date());
        let ours = old.is_some_and(|old| old.holder_identity.as_deref() == Some(&self.settings.identity));
        let transitions = old.and_then(|old| old.lease_transitions).unwrap_or(0);
        let acquired = old.and_then(|old| old.acquire_time.clone()).filter(|_| ours);
        LeaseSpec {
            holder_identity: Some(self.settings.identity.clone()),
            lease_duration_seconds: Some(
                i32::try_from(self.settings.duration.as_secs()).unwrap_or(i32::MAX).max(1),
            ),
            acquire_time: Some(acquired.unwrap_or_else(|| now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(if ours || old.is_none() { transitions } else { transitions + 1 }),
            ..LeaseSpec::default()
        }
    }

    /// Gives the lease back, so that the next holder need not wait. Only what we are known to hold is written.
    async fn release(&mut self) {
        // From here on nobody in this process may act, whatever becomes of the request.
        self.state.send_replace(State::default());
        let Some(observed) = &self.observed else { return };
        let old = observed.spec();
        if old.holder_identity.as_deref() != Some(self.settings.identity.as_str()) {
            return;
        }
        let mut lease = observed.lease.clone();
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            acquire_time: Some(MicroTime(date())),
            renew_time: Some(MicroTime(date())),
            lease_transitions: old.lease_transitions,
            ..LeaseSpec::default()
        });
        let post = PostParams::default();
        let written = self.api.replace(&self.settings.name, &post, &lease);
        match tokio::time::timeout(self.settings.renew_deadline / 2, written).await {
            Ok(Ok(_)) => tracing::info!(lease = self.settings.name, "gave the lease back"),
            Ok(Err(error)) => {
                tracing::warn!(
                    lease = self.settings.name,
                    error = chain(&error),
                    "cannot give the lease back"
                );
            }
            Err(_) => tracing::warn!(lease = self.settings.name, "giving the lease back took too long"),
        }
    }
}
