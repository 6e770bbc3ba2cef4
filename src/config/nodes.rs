//! The file that names the nodes where there is no Kubernetes to ask.

use std::path::{Path, PathBuf};

use futures_util::future::BoxFuture;
use serde::Deserialize;

use super::{ConfigError, yaml};
use crate::types::{
    VmId,
    cluster::{Cluster, LookupError, NodeRecord},
};

#[derive(Deserialize)]
struct RawNodes {
    nodes: Vec<RawNode>,
}

#[derive(Deserialize)]
struct RawNode {
    name: String,
    region: String,
    #[serde(default)]
    vmid: Option<u32>,
    uuid: String,
}

/// The nodes of a file: a [`Cluster`] for where there is no Kubernetes to ask. Read anew at each look-up, so that nodes can
/// come and go.
#[derive(Debug, Clone)]
pub struct NodesFile {
    path: PathBuf,
}

impl NodesFile {
    /// The nodes of this file, which must be readable now.
    pub fn open(path: &Path) -> Result<Self, ConfigError> {
        parse_nodes(path, &yaml::text(path)?)?;
        Ok(Self { path: path.to_owned() })
    }

    async fn read(&self) -> Result<Vec<NodeRecord>, ConfigError> {
        let text = tokio::fs::read_to_string(&self.path)
            .await
            .map_err(|source| ConfigError::Read { path: self.path.clone(), source })?;
        parse_nodes(&self.path, &text)
    }
}

fn parse_nodes(path: &Path, text: &str) -> Result<Vec<NodeRecord>, ConfigError> {
    let value = |why: String| ConfigError::Value { path: path.to_owned(), why };
    let (raw, warnings) = yaml::parse::<RawNodes>(path, text)?;
    for warning in warnings {
        tracing::warn!(warning, "odd nodes file");
    }
    let mut nodes: Vec<NodeRecord> = Vec::new();
    for node in raw.nodes {
        let region = node.region.parse().map_err(|error| value(format!("node `{}`: {error}", node.name)))?;
        let vmid = match node.vmid {
            Some(id) => {
                Some(VmId::new(id).ok_or_else(|| value(format!("node `{}`: {id} is no VMID", node.name)))?)
            }
            None => None,
        };
        if nodes.iter().any(|other| other.name == node.name) {
            return Err(value(format!("node `{}` stands there twice", node.name)));
        }
        let uuid = node.uuid.parse().map_err(|_| {
            value(format!(
                "node `{}`: `{}` is no uuid; hint: it stands in the VM's /sys/class/dmi/id/product_uuid",
                node.name, node.uuid
            ))
        })?;
        nodes.push(NodeRecord { name: node.name, region, vmid, uuid });
    }
    Ok(nodes)
}

impl Cluster for NodesFile {
    fn node<'a>(&'a self, node_id: &'a str) -> BoxFuture<'a, Result<Option<NodeRecord>, LookupError>> {
        Box::pin(async move {
            let lookup =
                |source: ConfigError| LookupError { node: node_id.to_owned(), source: Box::new(source) };
            // A node id is the node's name, with its VMID behind a slash where that is known.
            let (name, vmid) = match node_id.split_once('/') {
                Some((name, vmid)) => (name, vmid.parse::<VmId>().ok()),
                None => (node_id, None),
            };
            let nodes = self.read().await.map_err(lookup)?;
            Ok(nodes.into_iter().find(|node| node.name == name).map(|mut node| {
                node.vmid = node.vmid.or(vmid);
                node
            }))
        })
    }

    fn nodes(&self) -> BoxFuture<'_, Result<Vec<NodeRecord>, LookupError>> {
        Box::pin(async move {
            self.read()
                .await
                .map_err(|source| LookupError { node: "all nodes".to_owned(), source: Box::new(source) })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nodes_are_found_by_both_forms_of_their_id() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("nodes.yaml");
        let text = "nodes: [{name: w1, region: r1, uuid: 4DAA5E68-83be-4e9d-9b71-8365c73aa16b}]";
        std::fs::write(&path, text).expect("a file");
        let nodes = NodesFile::open(&path).expect("a good file");
        let vmid = |record: Option<NodeRecord>| record.map(|r| r.vmid.map(VmId::get));
        assert_eq!(vmid(nodes.node("w1").await.expect("a look-up")), Some(None));
        assert_eq!(vmid(nodes.node("w1/105").await.expect("a look-up")), Some(Some(105)));
        assert_eq!(nodes.node("w2").await.expect("a look-up"), None);
    }
}
