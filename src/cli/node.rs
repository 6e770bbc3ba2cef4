//! `proxmox-csi node`: the Linux host, the operations on it, and the services on a socket.

use std::{num::NonZeroU32, path::PathBuf, sync::Arc};

use clap::Args;

use super::{CommonArgs, Failed, serving};
use crate::{
    csi::node::NodeService,
    host::linux::{LinuxHost, LinuxOptions},
    node::{Node, NodeOptions},
    runtime::Operations,
    telemetry::metrics::Metrics,
    types::{NodeName, Region, topology::Place},
};

/// What `proxmox-csi node` takes.
#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    #[command(flatten)]
    pub(super) common: CommonArgs,

    /// Id of this node: its Kubernetes name, or that name and `/<vmid>`
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_id: String,

    /// Region of this node: the name of its Proxmox cluster in the controller's configuration
    #[arg(long, value_name = "REGION")]
    region: Region,

    /// Zone of this node: the Proxmox node that its VM runs on
    #[arg(long, value_name = "PVE-NODE")]
    zone: NodeName,

    /// How many volumes this node can hold; a VM has 30 slots for them, less the disks of its own
    #[arg(long, default_value = "24", value_name = "COUNT")]
    max_volumes: NonZeroU32,

    /// Where sysfs is mounted
    #[arg(long, default_value = "/sys", value_name = "DIRECTORY")]
    sysfs_root: PathBuf,

    /// Where device nodes are
    #[arg(long, default_value = "/dev", value_name = "DIRECTORY")]
    dev_root: PathBuf,
}

pub(super) async fn run(args: NodeArgs) -> Result<(), Failed> {
    let host = LinuxHost::new(LinuxOptions {
        sysfs_root: args.sysfs_root,
        dev_root: args.dev_root,
        ..LinuxOptions::default()
    });
    let mut options = NodeOptions::new(args.node_id);
    options.place = Some(Place { region: args.region, zone: Some(args.zone) });
    options.max_volumes = args.max_volumes;
    let operations = Operations::default();
    let service = NodeService::new(Node::new(Arc::new(host), options), operations.clone());
    let led = Box::pin(std::future::ready(()));
    serving::serve(&args.common, operations, Metrics::default(), led, |server| server.with_node(service))
        .await
}
