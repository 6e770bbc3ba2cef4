//! What Kubernetes says of the node that this process runs on: one watch on one object, so that to be asked costs nothing.

use std::num::NonZeroU32;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client, ResourceExt as _,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::sync::watch;

use super::node;
use crate::types::{cluster::OwnNode, topology::Place};

/// Label with the number of volumes that a node takes.
pub const MAX_VOLUMES: &str = "csi.proxmox.sinextra.dev/max-volume-attachments";

/// Watches the Node of this name until every receiver is dropped. `None` until it was read once; what was read stays while the API
/// server is away.
pub fn watch_own(client: Client, name: &str) -> watch::Receiver<Option<OwnNode>> {
    let (told, seen) = watch::channel(None);
    let (nodes, name) = (Api::<Node>::all(client), name.to_owned());
    tokio::spawn(async move {
        let mut events = std::pin::pin!(watcher::watch_object(nodes, &name).default_backoff());
        loop {
            let event = tokio::select! {
                biased;
                () = told.closed() => return,
                event = events.next() => event,
            };
            match event {
                Some(Ok(Some(node))) => drop(told.send_replace(Some(own(&node)))),
                Some(Ok(None)) => tracing::warn!(node = name, "there is no Node of this name"),
                Some(Err(error)) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(node = name, error, "cannot watch the Node of this machine; trying again");
                }
                None => return,
            }
        }
    });
    seen
}

/// What the labels say. One that can't be read says nothing, and is told once whenever the Node changes.
fn own(node: &Node) -> OwnNode {
    let labels = node.labels();
    let odd =
        |key: &str| tracing::warn!(label = key, value = labels[key], "a label of this Node can not be read");
    let zone = [node::OWN_ZONE, node::ZONE].into_iter().find(|key| labels.contains_key(*key));
    let zone = zone.and_then(|key| labels[key].parse().inspect_err(|_| odd(key)).ok());
    let max_volumes: Option<NonZeroU32> =
        labels.get(MAX_VOLUMES).and_then(|value| value.parse().inspect_err(|_| odd(MAX_VOLUMES)).ok());
    let place = match (node::region(node), zone) {
        (Some(region), Some(zone)) => Some(Place { region, zone: Some(zone) }),
        _ => None,
    };
    OwnNode { place, max_volumes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labelled(labels: &[(&str, &str)]) -> OwnNode {
        let mut node = Node::default();
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        node.metadata.labels = Some(labels.collect());
        own(&node)
    }

    #[test]
    fn labels_of_our_own_go_before_the_common_ones() {
        let common = [(node::REGION, "r1"), (node::ZONE, "pve-1")];
        let place = |labels: &[(&str, &str)]| labelled(labels).place.map(|place| place.segments());
        let segments = |region: &str, zone: &str| {
            Some(
                [(node::REGION, region), (node::ZONE, zone)]
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .into(),
            )
        };
        assert_eq!(place(&common), segments("r1", "pve-1"));
        let own = [(node::OWN_REGION, "r2"), (node::OWN_ZONE, "pve-2")];
        assert_eq!(place(&[common, own].concat()), segments("r2", "pve-2"));
        assert_eq!(place(&common[..1]), None, "a zone is needed");
        assert_eq!(place(&[common[0], (node::ZONE, "not a node")]), None);
    }

    #[test]
    fn a_limit_that_is_no_number_is_none() {
        assert_eq!(labelled(&[(MAX_VOLUMES, "12")]).max_volumes, NonZeroU32::new(12));
        for odd in ["0", "-1", "many", ""] {
            assert_eq!(labelled(&[(MAX_VOLUMES, odd)]).max_volumes, None, "{odd}");
        }
    }
}
