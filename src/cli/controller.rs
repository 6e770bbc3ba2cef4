//! `proxmox-csi controller`: clients of the regions, the volumes on them, and the services on a socket.

use std::{path::PathBuf, sync::Arc};

use clap::Args;

use super::{CommonArgs, Failed, serving};
use crate::{
    config::{self, ClusterConfig, NodesFile},
    csi::controller::ControllerService,
    pve::{
        Client,
        client::Token,
        transport::{self, HttpsOptions},
    },
    runtime::Operations,
    telemetry::metrics::Metrics,
    types::cluster::Cluster,
    volume::{Settings, Volumes},
};

/// What `proxmox-csi controller` takes.
#[derive(Debug, Args)]
pub(super) struct ControllerArgs {
    #[command(flatten)]
    pub(super) common: CommonArgs,

    /// Configuration file: the Proxmox clusters and their API tokens
    #[arg(long, default_value = config::DEFAULT_PATH, value_name = "FILE")]
    cloud_config: PathBuf,

    /// File that names the nodes and their VMs: `nodes: [{name, region, uuid, vmid}]`, where `uuid` is the VM's SMBIOS uuid (in the
    /// VM: `/sys/class/dmi/id/product_uuid`). Read anew at each look-up
    #[arg(long, value_name = "FILE")]
    nodes: PathBuf,
}

pub(super) async fn run(args: ControllerArgs) -> Result<(), Failed> {
    let config = config::read(&args.cloud_config).map_err(|error| Failed::config(&error))?;
    for warning in &config.warnings {
        tracing::warn!(warning, "odd configuration");
    }
    let nodes = NodesFile::open(&args.nodes).map_err(|error| Failed::config(&error))?;
    let metrics = Metrics::default();
    let clients =
        config.clusters.iter().map(|cluster| client(cluster, &metrics)).collect::<Result<_, _>>()?;
    let settings = Settings { owner: config.owner, holders: config.holders.0..=config.holders.1 };
    let cluster: Arc<dyn Cluster> = Arc::new(nodes);
    let operations = Operations::default();
    let volumes = Volumes::new(clients, cluster, settings);
    let controller = ControllerService::new(volumes, operations.clone());
    serving::serve(&args.common, operations, metrics, |server| server.with_controller(controller)).await
}

/// A client of a configured cluster.
pub(super) fn client(cluster: &ClusterConfig, metrics: &Metrics) -> Result<Client, Failed> {
    let ca_pem = match &cluster.ca_file {
        Some(path) => Some(transport::read_ca(path).map_err(|error| Failed::config(&error))?),
        None => None,
    };
    let server = |url: &String| {
        let options = HttpsOptions { url: url.clone(), ca_pem: ca_pem.clone(), insecure: cluster.insecure };
        transport::https(&options)
    };
    let servers = cluster.urls.iter().map(server).collect::<Result<_, _>>();
    let transport = transport::region(servers.map_err(|error| Failed::config(&error))?);
    let transport = transport.expect("a cluster without a url is refused by the configuration");
    let token = Token { id: cluster.token_id.clone(), secret: cluster.token_secret.clone() };
    Client::new(cluster.region.clone(), transport, &token, metrics.clone())
        .map_err(|error| Failed::config(&error))
}
