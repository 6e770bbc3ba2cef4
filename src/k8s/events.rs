//! Events: what an administrator must know, said once an hour while it lasts.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::{
    api::{
        core::v1::{Node, ObjectReference},
        events::v1::Event,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, api::PostParams};
use tokio::time::Instant;

use super::{chain, date};
pub use crate::types::notice::Notice;

/// How long the same event is not repeated: as long as the API server keeps one.
const REPEAT: Duration = Duration::from_hours(1);
/// How long writing an event may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long none is tried after one failed, by who waits for them: an API server that does not answer would hold up the work between.
const PAUSE: Duration = Duration::from_secs(30);
/// The longest note that the API server takes.
const LONGEST_NOTE: usize = 1024;

/// What became of a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// It is in an event.
    Written,
    /// It was said within the hour.
    Repeated,
    /// It could not be written; the next one of its kind is tried again.
    Failed,
}

/// Writes events. Clones share the memory of what was said.
#[derive(Clone)]
pub struct Recorder {
    client: Client,
    controller: String,
    instance: String,
    said: Arc<Mutex<BTreeMap<(String, Notice), Instant>>>,
    /// When writing one last failed, and how long none is tried after that.
    failed_at: Arc<Mutex<Option<Instant>>>,
    pause: Duration,
}

impl Recorder {
    /// A recorder for the controller of this name, in the process of this identity.
    pub fn new(client: Client, controller: &str, instance: &str) -> Self {
        Self {
            client,
            controller: controller.to_owned(),
            instance: instance.chars().take(128).collect(),
            said: Arc::default(),
            failed_at: Arc::default(),
            pause: Duration::ZERO,
        }
    }

    /// The same for somebody who waits for each event: for a while after one failed, none is tried.
    #[must_use]
    pub fn pausing(self) -> Self {
        Self { pause: PAUSE, ..self }
    }

    /// Whether this is to be said now; remembers that it is.
    fn is_news(&self, object: &str, notice: &Notice) -> bool {
        // A panic while the map was locked can't have left it half changed: each change is one call.
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        said.retain(|_, at| now.duration_since(*at) < REPEAT);
        let key = (object.to_owned(), notice.clone());
        let news = !said.contains_key(&key);
        if news {
            said.insert(key, now);
        }
        news
    }

    /// Forgets that it was said: it could not be.
    fn unsay(&self, object: &str, notice: &Notice) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.remove(&(object.to_owned(), notice.clone()));
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether this was not said within the hour; remembers that it is, without saying it.
    pub fn is_news_about(&self, node: &Node, notice: &Notice) -> bool {
        self.is_news(&key(&reference(node)), notice)
    }

    /// Says something about a node, if it was not said within the hour. A failure is only logged: no work depends on an event.
    pub async fn about_node(&self, node: &Node, notice: Notice) -> Said {
        self.publish(reference(node), notice).await
    }

    /// Says something about an object, if it was not said within the hour.
    pub async fn publish(&self, regarding: ObjectReference, notice: Notice) -> Said {
        let name = regarding.name.clone().unwrap_or_default();
        let object = key(&regarding);
        let failed_at = *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner);
        if failed_at.is_some_and(|at| at.elapsed() < self.pause) {
            return Said::Failed;
        }
        if !self.is_news(&object, &notice) {
            return Said::Repeated;
        }
        // Events of objects that are in no namespace are wanted in this one.
        let namespace = regarding.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let Notice { warning, reason, note } = notice.clone();
        if warning {
            tracing::warn!(object = name, reason, note, "said in an event");
        } else {
            tracing::info!(object = name, reason, note, "said in an event");
        }
        let event = Event {
            metadata: ObjectMeta {
                // Names are limited, and these are unique.
                name: Some(format!("proxmox.{}", uuid::Uuid::new_v4().simple())),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(date())),
            reporting_controller: Some(self.controller.clone()),
            reporting_instance: Some(self.instance.clone()),
            action: Some(reason.to_owned()),
            reason: Some(reason.to_owned()),
            type_: Some(if warning { "Warning" } else { "Normal" }.to_owned()),
            note: Some(cut(&note)),
            regarding: Some(regarding),
            ..Event::default()
        };
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        let post = PostParams::default();
        match tokio::time::timeout(DEADLINE, api.create(&post, &event)).await {
            Ok(Ok(_)) => return Said::Written,
            Ok(Err(error)) => {
                tracing::debug!(object = name, reason, error = chain(&error), "cannot write event");
            }
            Err(_) => tracing::debug!(object = name, reason, "writing an event took too long"),
        }
        self.unsay(&object, &notice);
        Said::Failed
    }
}

fn reference(node: &Node) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Node".into()),
        name: node.metadata.name.clone(),
        uid: node.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}

fn key(regarding: &ObjectReference) -> String {
    let text = |part: &Option<String>| part.clone().unwrap_or_default();
    format!("{}/{}", text(&regarding.uid), text(&regarding.name))
}

fn cut(note: &str) -> String {
    let mut end = note.len().min(LONGEST_NOTE);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    note[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_note_is_cut_between_characters() {
        let note = format!("{}ü", "x".repeat(LONGEST_NOTE - 1));
        assert_eq!(cut(&note), "x".repeat(LONGEST_NOTE - 1));
        assert_eq!(cut("short"), "short");
    }
}
