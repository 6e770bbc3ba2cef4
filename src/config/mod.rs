//! The configuration file, and the file that names the nodes where there is no Kubernetes to ask.
//!
//! The format is that of the driver before this one, so that its Secret can be mounted as it is. Unknown keys are named in warnings.

mod cluster;
mod nodes;
mod yaml;

use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use cluster::{ClusterConfig, Trust};
pub use nodes::NodesFile;

use crate::types::VmId;

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
    clusters: Vec<cluster::RawCluster>,
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

/// Reads the configuration file, and the files that it names.
pub fn read(path: &Path) -> Result<Config, ConfigError> {
    let (raw, mut warnings) = yaml::parse::<RawConfig>(path, &yaml::text(path)?)?;
    let value = |why: String| ConfigError::Value { path: path.to_owned(), why };
    if raw.clusters.is_empty() {
        return Err(value(
            "`clusters` is empty; hint: name at least one Proxmox cluster with url, token and region".into(),
        ));
    }
    let mut clusters: Vec<ClusterConfig> = Vec::new();
    for raw in raw.clusters {
        let cluster = cluster::read(path, raw)?;
        if cluster.trust == Trust::Anything {
            warnings.push(format!(
                "region `{}`: `insecure` accepts any certificate; whoever sits on the way can read the token; hint: set `ca_file` or `fingerprint`",
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
    fn every_key_of_the_driver_before_this_one_is_known() {
        let directory = tempfile::tempdir().expect("a directory");
        let secret = directory.path().join("secret");
        std::fs::write(&secret, "s3cret\n").expect("a file");
        let id = directory.path().join("id");
        std::fs::write(&id, "csi@pve!csi").expect("a file");
        let text = format!(
            "
features:
  provider: capmox
  controllerVmID: 900000001
  ha_group: true
  force_update_labels: true
  network: {{mode: qemu, external_ip_cidrs: 192.0.2.0/24, ip_sort_order: 10.0.0.0/8, ipv6_support_disabled: true}}
clusters:
  - {{url: 'https://a:8006/api2/json', insecure: true, token_id: csi@pve!csi, token_secret: x, region: a}}
  - {{url: 'https://b:8006/api2/json', insecure: false, token_id_file: {}, token_secret_file: {}, region: b}}
  - {{url: 'https://c:8006/api2/json', username: root@pam, password: x, region: c}}
",
            id.display(),
            secret.display()
        );
        let config = parsed(&text).expect("a good file");
        assert_eq!(config.owner.get(), 900_000_001);
        assert_eq!(config.clusters.len(), 3);
        assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
        assert!(config.warnings[0].contains("region `a`: `insecure` accepts any certificate"));
    }

    #[test]
    fn bad_files_say_what_to_do_and_quote_no_secret() {
        for (from, to, expected) in [
            ("region: cluster-1", "region: a/b", "region"),
            ("token_id: csi@pve!csi", "token_id: csi", "user@realm!name"),
            ("token_secret: s3cret", "", "neither `token_secret` nor `token_secret_file` is set"),
            ("token_secret: s3cret", "token_secret: s3cret\n    username: root@pam", "keep the token"),
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
}
