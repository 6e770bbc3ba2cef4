//! What the driver says to administrators, as Events about the claim, the volume or the node.
//!
//! [`Notices::tell`] only puts it into a short queue: nobody waits for the API server, and what finds the queue full is dropped. The same
//! thing is said once an hour, and of one object and reason no more than a few different things: a retry every few seconds, or a number
//! that changes from one to the next, must not fill etcd.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::api::core::v1::{Node, ObjectReference, PersistentVolumeClaim};
use kube::{Api, Client};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::Instant,
};

use super::{
    chain,
    events::{Recorder, Said},
    volumes::{Failed, PersistentVolumes},
};
use crate::{
    telemetry::csi::CsiMetrics,
    types::notice::{About, Notice},
};

/// How long the same thing is not said again.
const REPEAT: Duration = Duration::from_hours(1);
/// Different things that are said of one object for one reason in that time.
const VARIANTS: usize = 3;
/// What may wait to be said.
const WAITING: usize = 64;
/// How long finding out whom a notice is about may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// Says things in Events. Clones share the queue.
#[derive(Clone)]
pub struct Notices {
    queue: mpsc::Sender<(About, Notice)>,
    said: Lately,
    metrics: CsiMetrics,
}

/// What was said lately, by object and reason.
type Lately = Arc<Mutex<BTreeMap<(About, &'static str), Vec<(String, Instant)>>>>;

impl Notices {
    /// Begins to say things. Ends when the last clone is dropped.
    pub fn start(client: Client, recorder: Recorder, metrics: CsiMetrics) -> Self {
        let (queue, waiting) = mpsc::channel(WAITING);
        let said = Lately::default();
        let volumes = PersistentVolumes::new(client.clone());
        let writer = Writer { client, recorder, volumes, said: Arc::clone(&said), metrics: metrics.clone() };
        tokio::spawn(writer.run(waiting));
        Self { queue, said, metrics }
    }

    /// Says something, some time soon; returns at once.
    pub fn tell(&self, about: About, notice: Notice) {
        let reason = notice.reason;
        if !is_news(&self.said, &about, &notice) {
            return self.metrics.event(reason, "repeated");
        }
        if let Err(TrySendError::Full((about, notice)) | TrySendError::Closed((about, notice))) =
            self.queue.try_send((about, notice))
        {
            unsay(&self.said, &about, &notice);
            self.metrics.event(reason, "dropped");
        }
    }
}

/// Whether it was not said lately; remembers that it is.
fn is_news(said: &Lately, about: &About, notice: &Notice) -> bool {
    // A panic while the map was locked can't have left it half changed: each change is one call.
    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    said.retain(|_, notes| {
        notes.retain(|(_, at)| now.duration_since(*at) < REPEAT);
        !notes.is_empty()
    });
    let notes = said.entry((about.clone(), notice.reason)).or_default();
    if notes.len() >= VARIANTS || notes.iter().any(|(note, _)| *note == notice.note) {
        return false;
    }
    notes.push((notice.note.clone(), now));
    true
}

/// Forgets that it was said: it could not be.
fn unsay(said: &Lately, about: &About, notice: &Notice) {
    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(notes) = said.get_mut(&(about.clone(), notice.reason)) {
        notes.retain(|(note, _)| *note != notice.note);
    }
}

struct Writer {
    client: Client,
    recorder: Recorder,
    volumes: PersistentVolumes,
    said: Lately,
    metrics: CsiMetrics,
}

impl Writer {
    async fn run(self, mut waiting: mpsc::Receiver<(About, Notice)>) {
        while let Some((about, notice)) = waiting.recv().await {
            let result = match tokio::time::timeout(DEADLINE, self.regarding(&about)).await {
                Ok(Ok(Some(object))) => match self.recorder.publish(object, notice.clone()).await {
                    Said::Written => "written",
                    Said::Repeated => "repeated",
                    Said::Failed => "failed",
                },
                Ok(Ok(None)) => "dropped",
                Ok(Err(error)) => {
                    tracing::debug!(?about, error = chain(&*error), "cannot find what an event is about");
                    "failed"
                }
                Err(_) => "failed",
            };
            self.metrics.event(notice.reason, result);
            if matches!(result, "failed" | "dropped") {
                unsay(&self.said, &about, &notice);
            }
        }
    }

    /// The object that people look at for this; `None` where there is none.
    async fn regarding(&self, about: &About) -> Result<Option<ObjectReference>, Failed> {
        match about {
            About::Node(id) => {
                let name = id.split('/').next().unwrap_or_default();
                let node = Api::<Node>::all(self.client.clone()).get_opt(name).await?;
                Ok(node.map(|node| reference("Node", None, node.metadata.name, node.metadata.uid)))
            }
            About::Claim { namespace, name } => {
                let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), namespace);
                let claim = claims.get_opt(name).await?;
                Ok(claim.map(|claim| {
                    let metadata = claim.metadata;
                    reference("PersistentVolumeClaim", metadata.namespace, metadata.name, metadata.uid)
                }))
            }
            About::Volume(handle) => Ok(self.volumes.find(handle).await?.map(|volume| {
                let bound =
                    volume.status.and_then(|status| status.phase).is_some_and(|phase| phase == "Bound");
                match volume.spec.and_then(|spec| spec.claim_ref).filter(|_| bound) {
                    Some(claim) => reference("PersistentVolumeClaim", claim.namespace, claim.name, claim.uid),
                    None => reference("PersistentVolume", None, volume.metadata.name, volume.metadata.uid),
                }
            })),
        }
    }
}

fn reference(
    kind: &str,
    namespace: Option<String>,
    name: Option<String>,
    uid: Option<String>,
) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some(kind.to_owned()),
        namespace,
        name,
        uid,
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_same_thing_is_said_once_an_hour_and_few_others_beside_it() {
        let said = Lately::default();
        let about = About::Volume("r1//s/v".to_owned());
        let news = |note: &str| is_news(&said, &about, &Notice::warning("StorageFull", note));
        assert!(news("1 G free"));
        for _ in 0..5 {
            assert!(!news("1 G free"));
        }
        assert!(news("2 G free") && news("3 G free"));
        assert!(!news("4 G free"), "one reason does not fill the list");
        assert!(is_news(&said, &about, &Notice::warning("VmLocked", "backup")), "another reason is heard");
        tokio::time::sleep(REPEAT).await;
        assert!(news("4 G free"));
        unsay(&said, &about, &Notice::warning("StorageFull", "4 G free"));
        assert!(news("4 G free"), "what could not be said is tried again");
    }
}
