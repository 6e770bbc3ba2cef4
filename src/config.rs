//! The configuration file, and the file that names the nodes where there is no Kubernetes to ask.
//!
//! The format is that of the driver before this one, so that its Secret can be mounted as it is. Unknown keys are named in warnings.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use futures_util::future::BoxFuture;
use serde::{Deserialize, de::DeserializeOwned};

use crate::types::{
    Region, VmId,
    cluster::{Cluster, LookupError, NodeRecord},
};

/// Where the configuration is looked for.
pub const DEFAULT_PATH: &str = "/etc/proxmox/config.yaml";
/// The owner of new volumes where the configuration names none.
const DEFAULT_OWNER: u32 = 9999;
/// VMIDs of short-lived holder VMs where the configuration names none: at the end of Proxmox's range.
const DEFAULT_HOLDERS: (u32, u32) = (999_990_000, 999_999_999);

/// The configuration.
#[derive(Debug)]
pub struct Config {
    /// The Proxmox clusters, at least one.
    pub clusters: Vec<ClusterConfig>,
    /// The owner of new volumes.
    pub owner: VmId,
    /// The first and last VMID of short-lived holder VMs.
    pub holders: (u32, u32),
    /// What the cloud-controller loop goes by.
    pub nodes: NodesConfig,
    /// What is odd about the file and was passed over.
    pub warnings: Vec<String>,
}

/// What the cloud-controller loop goes by, as it stands in the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own in the file")]
pub struct NodesConfig {
    /// `provider: capmox`: Cluster API's provider for Proxmox makes the VMs.
    pub capmox: bool,
    /// The zone is the HA group of a VM's host.
    pub ha_group: bool,
    /// Whether the zone label follows a VM that moves. Without a word of it it stays: a file of the driver before this one means that.
    pub zone_follows: bool,
    /// Whether addresses come from guest agents, too (`mode: qemu` or `auto`).
    pub ask_agents: bool,
    /// Networks of external addresses.
    pub external_ip_cidrs: String,
    /// Networks whose addresses come first, and those behind `!` that are left out.
    pub ip_sort_order: String,
    /// No IPv6.
    pub ipv6_support_disabled: bool,
}

/// A Proxmox cluster.
#[derive(Clone)]
pub struct ClusterConfig {
    /// Its name in topology labels and volume handles.
    pub region: Region,
    /// `https://host:8006`, one or several nodes of the cluster; the first that can be reached is used.
    pub urls: Vec<String>,
    /// Accept any certificate.
    pub insecure: bool,
    /// PEM file of certificates to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// `user@realm!name`.
    pub token_id: String,
    /// The secret.
    pub token_secret: String,
}

/// The secret is never printed.
impl fmt::Debug for ClusterConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterConfig")
            .field("region", &self.region)
            .field("urls", &self.urls)
            .field("token_id", &self.token_id)
            .finish_non_exhaustive()
    }
}

/// The configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file can't be read.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not the YAML it should be.
    #[error("`{path}` can not be understood: {why}")]
    Parse {
        /// Its path.
        path: PathBuf,
        /// Where and why.
        why: String,
    },
    /// A value can't be used.
    #[error("`{path}`: {why}")]
    Value {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        why: String,
    },
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    features: RawFeatures,
    #[serde(default)]
    clusters: Vec<RawCluster>,
}

/// Keys of the cloud-controller loop stand here too.
#[derive(Deserialize, Default)]
struct RawFeatures {
    #[serde(default)]
    provider: Option<String>,
    #[serde(default, rename = "controllerVmID")]
    controller_vmid: Option<u32>,
    #[serde(default, rename = "holderVmIDs")]
    holder_vmids: Option<(u32, u32)>,
    #[serde(default)]
    ha_group: bool,
    #[serde(default)]
    force_update_labels: Option<bool>,
    #[serde(default)]
    zone_labels: Option<String>,
    #[serde(default)]
    network: RawNetwork,
}

#[derive(Deserialize, Default)]
struct RawNetwork {
    #[serde(default)]
    mode: Option<String>,
    #[serde(default)]
    external_ip_cidrs: Option<String>,
    #[serde(default)]
    ip_sort_order: Option<String>,
    #[serde(default)]
    ipv6_support_disabled: bool,
}

#[derive(Deserialize)]
struct RawCluster {
    #[serde(default)]
    url: Option<String>,
    #[serde(default)]
    urls: Vec<String>,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    ca_file: Option<PathBuf>,
    #[serde(default)]
    token_id: Option<String>,
    #[serde(default)]
    token_id_file: Option<PathBuf>,
    #[serde(default)]
    token_secret: Option<String>,
    #[serde(default)]
    token_secret_file: Option<PathBuf>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    region: String,
}

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

/// Reads the configuration file, and the files that it names.
pub fn read(path: &Path) -> Result<Config, ConfigError> {
    let (raw, mut warnings) = read_yaml::<RawConfig>(path)?;
    let value = |why: String| ConfigError::Value { path: path.to_owned(), why };
    if raw.clusters.is_empty() {
        return Err(value(
            "`clusters` is empty; hint: name at least one Proxmox cluster with url, token and region".into(),
        ));
    }
    let mut clusters: Vec<ClusterConfig> = Vec::new();
    for raw in raw.clusters {
        let cluster = read_cluster(path, raw)?;
        if cluster.insecure {
            warnings.push(format!(
                "region `{}`: `insecure` accepts any certificate; whoever sits on the way can read the token",
                cluster.region
            ));
        }
        if clusters.iter().any(|other| other.region == cluster.region) {
            return Err(value(format!(
                "region `{}` stands there twice; hint: a region is one cluster",
                cluster.region
            )));
        }
        clusters.push(cluster);
    }
    if let Some(provider) = raw.features.provider.as_deref()
        && !matches!(provider, "default" | "capmox")
    {
        warnings.push(format!("`features.provider: {provider}` is unknown and has no effect"));
    }
    let owner = raw.features.controller_vmid.unwrap_or(DEFAULT_OWNER);
    let owner = VmId::new(owner).ok_or_else(|| {
        value(format!("`features.controllerVmID` is {owner}; hint: VMIDs go from 100 to 999999999"))
    })?;
    let holders = raw.features.holder_vmids.unwrap_or(DEFAULT_HOLDERS);
    let legal = |n| VmId::new(n).is_some();
    let holds_owner = (holders.0..=holders.1).contains(&owner.get());
    if !legal(holders.0) || !legal(holders.1) || holders.0 > holders.1 || holds_owner {
        return Err(value(format!(
            "`features.holderVmIDs` is {holders:?}; hint: the first and the last VMID of a range that nothing else uses"
        )));
    }
    let nodes = read_nodes_config(raw.features).map_err(value)?;
    Ok(Config { clusters, owner, holders, nodes, warnings })
}

fn read_nodes_config(raw: RawFeatures) -> Result<NodesConfig, String> {
    let zone_follows = match raw.zone_labels.as_deref() {
        None => raw.force_update_labels.unwrap_or(false),
        Some("follow") => true,
        Some("sticky") => false,
        Some(other) => return Err(format!("`features.zone_labels` is `{other}`; hint: follow or sticky")),
    };
    let ask_agents = match raw.network.mode.as_deref() {
        None | Some("default") => false,
        Some("qemu" | "auto") => true,
        Some(other) => {
            return Err(format!("`features.network.mode` is `{other}`; hint: default, qemu or auto"));
        }
    };
    Ok(NodesConfig {
        capmox: raw.provider.as_deref() == Some("capmox"),
        ha_group: raw.ha_group,
        zone_follows,
        ask_agents,
        external_ip_cidrs: raw.network.external_ip_cidrs.unwrap_or_default(),
        ip_sort_order: raw.network.ip_sort_order.unwrap_or_default(),
        ipv6_support_disabled: raw.network.ipv6_support_disabled,
    })
}

fn read_cluster(path: &Path, raw: RawCluster) -> Result<ClusterConfig, ConfigError> {
    let value = |why: String| ConfigError::Value { path: path.to_owned(), why };
    let region: Region = raw.region.parse().map_err(|error| value(format!("`clusters.region`: {error}")))?;
    if raw.username.is_some() || raw.password.is_some() {
        return Err(value(format!(
            "region `{region}`: login with username and password is not supported yet; hint: make an API token and set `token_id` and `token_secret`"
        )));
    }
    let one = |key: &str, inline: Option<String>, file: Option<PathBuf>| match (inline, file) {
        (Some(text), None) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
        (None, Some(file)) => std::fs::read_to_string(&file)
            .map(|text| text.trim().to_owned())
            .map_err(|source| ConfigError::Read { path: file, source }),
        (Some(_), Some(_)) => Err(value(format!("region `{region}`: both `{key}` and `{key}_file` are set"))),
        _ => Err(value(format!("region `{region}`: neither `{key}` nor `{key}_file` is set"))),
    };
    let token_id = one("token_id", raw.token_id, raw.token_id_file)?;
    let token_secret = one("token_secret", raw.token_secret, raw.token_secret_file)?;
    if !token_id.contains('@') || !token_id.contains('!') {
        return Err(value(format!(
            "region `{region}`: `token_id` is no token id; hint: it has the form user@realm!name"
        )));
    }
    let urls: Vec<String> = raw.url.into_iter().chain(raw.urls).collect();
    if urls.is_empty() {
        return Err(value(format!("region `{region}`: neither `url` nor `urls` is set")));
    }
    Ok(ClusterConfig { region, urls, insecure: raw.insecure, ca_file: raw.ca_file, token_id, token_secret })
}

/// Reads a YAML file; keys that mean nothing are named in the warnings.
fn read_yaml<T: DeserializeOwned>(path: &Path) -> Result<(T, Vec<String>), ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse_yaml(path, &text)
}

fn parse_yaml<T: DeserializeOwned>(path: &Path, text: &str) -> Result<(T, Vec<String>), ConfigError> {
    // The parser's own messages quote the file, which holds secrets: only its place is kept.
    let parse = |why: String| ConfigError::Parse { path: path.to_owned(), why };
    let value: serde_json::Value = serde_saphyr::from_str(text).map_err(|error| {
        let place = error.location().map(|at| format!(" at line {}, column {}", at.line(), at.column()));
        parse(format!("it is not YAML{}", place.unwrap_or_default()))
    })?;
    let mut warnings = Vec::new();
    let mut unknown = |key: serde_ignored::Path| {
        let key = key.to_string();
        let hint = if key.ends_with("controllerVMID") { "; hint: it is spelt `controllerVmID`" } else { "" };
        warnings.push(format!("`{}`: key `{key}` is unknown and has no effect{hint}", path.display()));
    };
    let read = serde_ignored::deserialize(value, &mut unknown).map_err(|error| {
        // The texts about values quote them; what is missing is named by its key alone.
        let text = error.to_string();
        let missing = text.starts_with("missing field");
        parse(if missing { text } else { "a value is not of the kind it must be".to_owned() })
    })?;
    Ok((read, warnings))
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
        parse_nodes(path, &read_to_string(path)?)?;
        Ok(Self { path: path.to_owned() })
    }

    async fn read(&self) -> Result<Vec<NodeRecord>, ConfigError> {
        let text = tokio::fs::read_to_string(&self.path)
            .await
            .map_err(|source| ConfigError::Read { path: self.path.clone(), source })?;
        parse_nodes(&self.path, &text)
    }
}

fn read_to_string(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

fn parse_nodes(path: &Path, text: &str) -> Result<Vec<NodeRecord>, ConfigError> {
    let value = |why: String| ConfigError::Value { path: path.to_owned(), why };
    let (raw, warnings) = parse_yaml::<RawNodes>(path, text)?;
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

    fn parsed(text: &str) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("config.yaml");
        std::fs::write(&path, text).expect("a file");
        read(&path)
    }

    const GOOD: &str = "
features:
  provider: default
  controllerVMID: 12345
clusters:
  - url: https://pve1:8006/api2/json
    insecure: false
    token_id: csi@pve!csi
    token_secret: s3cret
    region: cluster-1
    colour: blue
";

    #[test]
    fn the_file_of_today_is_read_and_unknown_keys_are_named() {
        let config = parsed(GOOD).expect("a good file");
        assert_eq!(config.owner.get(), DEFAULT_OWNER);
        assert_eq!(config.clusters[0].region.as_str(), "cluster-1");
        let warnings = config.warnings.join("\n");
        assert!(
            warnings.contains(
                "`features.controllerVMID` is unknown and has no effect; hint: it is spelt `controllerVmID`"
            ),
            "{warnings}"
        );
        assert!(warnings.contains("colour"), "{warnings}");
        assert!(!format!("{config:?}").contains("s3cret"));
    }

    #[test]
    fn bad_files_say_what_to_do_and_quote_no_secret() {
        for (from, to, expected) in [
            ("region: cluster-1", "region: a/b", "region"),
            ("token_id: csi@pve!csi", "token_id: csi", "user@realm!name"),
            ("token_secret: s3cret", "", "neither `token_secret` nor `token_secret_file` is set"),
            ("token_secret: s3cret", "token_secret: s3cret\n    username: root@pam", "make an API token"),
            ("token_secret: s3cret", "token_secret: s3cret\n  - ][", "not YAML"),
            ("token_secret: s3cret", "token_secret_file: /does/not/exist", "/does/not/exist"),
        ] {
            let error = parsed(&GOOD.replace(from, to)).expect_err(to).to_string();
            assert!(error.contains(expected), "{to}: {error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
        let owner = GOOD.replace("controllerVMID: 12345", "controllerVmID: 999990003");
        assert!(parsed(&owner).expect_err("a holder's VMID").to_string().contains("holderVmIDs"));
        assert!(parsed("clusters: []").expect_err("no cluster").to_string().contains("at least one"));
    }

    #[test]
    fn keys_of_the_cloud_controller_loop_are_read() {
        let with = |keys: &str| parsed(&GOOD.replace("  provider: default", keys)).map(|config| config.nodes);
        assert_eq!(with("  provider: default").expect("an old file"), NodesConfig::default());
        let old = "  provider: capmox\n  ha_group: true\n  force_update_labels: true\n  network: {mode: auto, external_ip_cidrs: '203.0.113.0/24', ip_sort_order: '10.0.0.0/8', ipv6_support_disabled: true}";
        let expected = NodesConfig {
            capmox: true,
            ha_group: true,
            zone_follows: true,
            ask_agents: true,
            external_ip_cidrs: "203.0.113.0/24".into(),
            ip_sort_order: "10.0.0.0/8".into(),
            ipv6_support_disabled: true,
        };
        assert_eq!(with(old).expect("an old file"), expected);
        assert!(with("  zone_labels: follow").expect("a new file").zone_follows);
        assert!(
            with("  zone_labels: always").expect_err("no such word").to_string().contains("follow or sticky")
        );
        assert!(with("  network: {mode: magic}").expect_err("no such mode").to_string().contains("auto"));
    }

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
