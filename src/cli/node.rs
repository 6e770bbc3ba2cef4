//! `proxmox-csi node`: the Linux host, the operations on it, and the services on a socket.

use std::{num::NonZeroU32, path::PathBuf, sync::Arc};

use clap::{Args, ValueEnum};

use super::{CommonArgs, Failed, serving};
use crate::{
    csi::node::NodeService,
    host::{
        linux::{LinuxHost, LinuxOptions},
        luks::{KeyCost, Pbkdf},
    },
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

    #[command(flatten)]
    luks: LuksArgs,

    /// Where sysfs is mounted
    #[arg(long, default_value = "/sys", value_name = "DIRECTORY")]
    sysfs_root: PathBuf,

    /// Where device nodes are
    #[arg(long, default_value = "/dev", value_name = "DIRECTORY")]
    dev_root: PathBuf,
}

/// What it costs to open a volume that is encrypted from now on.
#[derive(Debug, Args)]
struct LuksArgs {
    /// How a key is made of the passphrase of a volume that is encrypted from now on
    #[arg(long = "luks-pbkdf", default_value = "argon2id", value_name = "FUNCTION")]
    pbkdf: PbkdfArg,

    /// Memory that argon2id takes whenever such a volume is opened, in KiB; the container must have it
    #[arg(long = "luks-pbkdf-memory", default_value = "65536", value_name = "KIB", value_parser = clap::value_parser!(u32).range(32..=4_194_304))]
    memory: u32,

    /// Time it is to take, in milliseconds, as measured when the volume is encrypted
    #[arg(long = "luks-iter-time", default_value = "1000", value_name = "MS", value_parser = clap::value_parser!(u32).range(1..))]
    time: u32,

    /// Rounds, instead of a time; at least 4 for argon2id and 1000 for pbkdf2
    #[arg(long = "luks-iterations", value_name = "COUNT", value_parser = clap::value_parser!(u32).range(4..))]
    iterations: Option<u32>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PbkdfArg {
    Argon2id,
    Pbkdf2,
}

impl LuksArgs {
    fn cost(&self) -> KeyCost {
        KeyCost {
            pbkdf: match self.pbkdf {
                PbkdfArg::Argon2id => Pbkdf::Argon2id,
                PbkdfArg::Pbkdf2 => Pbkdf::Pbkdf2,
            },
            memory_kib: self.memory,
            time_ms: self.time,
            iterations: self.iterations,
        }
    }
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
    options.key_cost = args.luks.cost();
    let operations = Operations::default();
    let service = NodeService::new(Node::new(Arc::new(host), options), operations.clone());
    let led = Box::pin(std::future::ready(()));
    serving::serve(&args.common, operations, Metrics::default(), led, |server| server.with_node(service))
        .await
}
