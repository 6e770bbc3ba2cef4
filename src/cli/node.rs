//! `proxmox-csi node`: the Linux host, the operations on it, and the services on a socket.

use std::{num::NonZeroU32, path::PathBuf, sync::Arc};

use clap::{Args, ValueEnum};

use super::{CommonArgs, Failed, serving};
use crate::{
    csi::{identity::Readiness, node::NodeService},
    host::{
        Host as _,
        linux::{LinuxHost, LinuxOptions},
        luks::{KeyCost, Pbkdf},
    },
    k8s::{client::connect, own_node::watch_own},
    node::{Node, NodeOptions},
    runtime::Operations,
    telemetry::metrics::Metrics,
    types::{NodeName, Region, VmId, topology::Place},
};

/// What `proxmox-csi node` takes.
#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    #[command(flatten)]
    pub(super) common: CommonArgs,

    /// Id of this node: its Kubernetes name, or that name and `/<vmid>`
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_id: String,

    /// Region of this node: the name of its Proxmox cluster in the controller's configuration. Without it, and without --zone, the
    /// labels of its Node in Kubernetes say where it is
    #[arg(long, value_name = "REGION", requires = "zone")]
    region: Option<Region>,

    /// Zone of this node: the Proxmox node that its VM runs on
    #[arg(long, value_name = "PVE-NODE", requires = "region")]
    zone: Option<NodeName>,

    /// Kubeconfig of the cluster this node is in; without it the cluster the pod runs in, which is asked only where --region and
    /// --zone are missing
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// How many volumes this node can hold, unless its Node has the label `csi.proxmox.sinextra.dev/max-volume-attachments`; a VM has
    /// 30 slots for them, and those that its other disks have are taken off
    #[arg(long, default_value = "24", value_name = "COUNT")]
    max_volumes: NonZeroU32,

    #[command(flatten)]
    luks: LuksArgs,

    /// Serve volumes also on a machine that is, by what it says of itself, no VM of Proxmox
    #[arg(long)]
    allow_any_machine: bool,

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
    let (vmid, unfit) = match host.identity().await {
        Ok(identity) => (identity.vmid, identity.no_vm.filter(|_| !args.allow_any_machine)),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "what machine this is is not known");
            (None, None)
        }
    };
    let unfit = unfit.map(|why| {
        format!(
            "volumes can not be plugged into this machine: {why}; hint: keep the node plugin off it, by a nodeSelector say, or start it \
             with --allow-any-machine"
        )
    });
    if let Some(reason) = &unfit {
        tracing::error!(reason, "this machine gets no volumes");
    }
    let mut options = NodeOptions::new(node_id(args.node_id, vmid));
    options.place = args.region.map(|region| Place { region, zone: args.zone });
    options.max_volumes = args.max_volumes;
    options.key_cost = args.luks.cost();
    if unfit.is_none() && (args.kubeconfig.is_some() || options.place.is_none()) {
        let kube = connect(args.kubeconfig.as_deref()).await.map_err(|error| {
            let mut failed = Failed::config(&error);
            failed
                .text
                .push_str("; where there is no Kubernetes, say where the node is with --region and --zone");
            failed
        })?;
        let name = options.node_id.split('/').next().unwrap_or_default();
        options.labels = Some(watch_own(kube, name));
    }
    let operations = Operations::default();
    let readiness = unfit.clone().map_or(Readiness::Ready, Readiness::Unhealthy);
    let service = NodeService::new(Node::new(Arc::new(host), options), operations.clone()).unfit(unfit);
    let led = Box::pin(std::future::ready(readiness));
    serving::serve(&args.common, operations, Metrics::default(), led, |server| server.with_node(service))
        .await
}

/// The id with the VMID behind it, as the driver before this one has it, where the SMBIOS serial tells one. It saves the controller a
/// search, and the uuid decides.
fn node_id(name: String, vmid: Option<VmId>) -> String {
    match vmid {
        Some(vmid) if !name.contains('/') => format!("{name}/{vmid}"),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmid_of_the_command_line_goes_before_that_of_the_serial() {
        let vmid = "105".parse().ok();
        assert_eq!(node_id("worker-1".to_owned(), vmid), "worker-1/105");
        assert_eq!(node_id("worker-1/106".to_owned(), vmid), "worker-1/106");
        assert_eq!(node_id("worker-1".to_owned(), None), "worker-1");
    }
}
