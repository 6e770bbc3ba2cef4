//! `proxmox-csi ccm`: the regions, the Nodes, the lease, and the loop between them.

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::{Args, ValueEnum};
use tokio_util::sync::CancellationToken;

use super::{Exit, Failed, ProcessArgs, controller, serving};
use crate::{
    ccm::{
        Ccm, RegionClients, Settings,
        addresses::{AddressRules, Mode},
        labels::{LabelRules, ZoneMode},
        provider_id::Format,
    },
    config::{self, ClusterConfig, NodesConfig},
    k8s::{
        client,
        lease::{self, Election, Ended},
    },
    telemetry::metrics::Metrics,
    types::ParseError,
};

/// What `proxmox-csi ccm` takes.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own on the command line")]
pub(super) struct CcmArgs {
    /// Configuration file: the Proxmox clusters and their API tokens, and under `features` what else is said there
    #[arg(long, default_value = config::DEFAULT_PATH, value_name = "FILE")]
    cloud_config: PathBuf,

    /// Kubeconfig of the cluster whose Nodes are kept; without it the cluster this pod runs in. A cluster whose control plane runs
    /// elsewhere is reached by its own kubeconfig
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// Form of a providerID that is written where there is none: region-vmid (`proxmox://region/vmid`), uuid (`proxmox://uuid`, which
    /// Cluster API's provider for Proxmox looks for), or none. Without it uuid with `features.provider: capmox`, else region-vmid; a
    /// machine of Cluster API gets uuid in any case, for another form would hide it from Cluster API forever
    #[arg(long, value_name = "FORM")]
    provider_id_format: Option<FormatArg>,

    /// What the label topology.kubernetes.io/zone does when a VM moves: follow, or sticky. Without it `features.zone_labels`
    #[arg(long, value_name = "MODE")]
    zone: Option<ZoneArg>,

    /// Taint a node `node.kubernetes.io/out-of-service` when its VM is dead for certain: stopped without a lock, or fenced by the HA
    /// manager. Its pods are deleted and its volumes detached at once, instead of after minutes
    #[arg(long)]
    out_of_service: bool,

    /// Never delete a Node
    #[arg(long)]
    keep_nodes: bool,

    /// Delete Nodes that Cluster API made, too; without it they are left to it
    #[arg(long)]
    delete_cluster_api_nodes: bool,

    /// Write labels and nothing else: beside another cloud controller
    #[arg(long)]
    labels_only: bool,

    /// Write nothing, and log what would be written
    #[arg(long)]
    dry_run: bool,

    /// Compare all Nodes once and end, without taking the lease. What takes two observations is not done: nothing is deleted
    #[arg(long)]
    once: bool,

    /// Seconds between two polls of a Proxmox cluster
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(2..=60))]
    poll_interval: u64,

    /// Name of the Lease that lets one process act
    #[arg(long, default_value = "proxmox-ccm", value_name = "NAME")]
    lease_name: String,

    /// Namespace of the Lease; without it that of the pod or the kubeconfig
    #[arg(long, value_name = "NAMESPACE")]
    lease_namespace: Option<String>,

    #[command(flatten)]
    pub(super) process: ProcessArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatArg {
    RegionVmid,
    Uuid,
    None,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ZoneArg {
    Follow,
    Sticky,
}

/// The flags over the file.
fn settings(args: &CcmArgs, file: &NodesConfig) -> Result<Settings, ParseError> {
    Ok(Settings {
        provider_id: match args.provider_id_format {
            Some(FormatArg::Uuid) => Format::Uuid,
            Some(FormatArg::None) => Format::None,
            None if file.capmox => Format::Uuid,
            Some(FormatArg::RegionVmid) | None => Format::RegionVmid,
        },
        labels: LabelRules {
            zone: match args.zone {
                Some(ZoneArg::Follow) => ZoneMode::Follow,
                None if file.zone_follows => ZoneMode::Follow,
                Some(ZoneArg::Sticky) | None => ZoneMode::Sticky,
            },
            zone_is_ha_group: file.ha_group,
        },
        addresses: AddressRules {
            mode: if file.ask_agents { Mode::Agent } else { Mode::Provided },
            external: file.external_ip_cidrs.parse()?,
            order: file.ip_sort_order.parse()?,
            no_ipv6: file.ipv6_support_disabled,
        },
        out_of_service: args.out_of_service,
        delete_nodes: !args.keep_nodes,
        delete_cluster_api: args.delete_cluster_api_nodes,
        labels_only: args.labels_only,
        dry_run: args.dry_run,
        interval: Duration::from_secs(args.poll_interval),
        ..Settings::default()
    })
}

/// The clients of a region: by any of its servers, and by each where there are several.
fn clients(cluster: &ClusterConfig, metrics: &Metrics) -> Result<RegionClients, Failed> {
    let single = |url: &String| ClusterConfig { urls: vec![url.clone()], ..cluster.clone() };
    let several: &[String] = if cluster.urls.len() > 1 { &cluster.urls } else { &[] };
    Ok(RegionClients {
        any: controller::client(cluster, metrics, None)?,
        each: several
            .iter()
            .map(|url| controller::client(&single(url), metrics, None))
            .collect::<Result<_, _>>()?,
    })
}

pub(super) async fn run(args: CcmArgs) -> Result<(), Failed> {
    let config = config::read(&args.cloud_config).map_err(|error| Failed::config(&error))?;
    for warning in &config.warnings {
        tracing::warn!(warning, "odd configuration");
    }
    let settings = settings(&args, &config.nodes).map_err(|error| Failed::config(&error))?;
    let metrics = Metrics::default();
    let regions =
        config.clusters.iter().map(|cluster| clients(cluster, &metrics)).collect::<Result<Vec<_>, _>>()?;
    let kube = client::connect(args.kubeconfig.as_deref()).await.map_err(|error| Failed::config(&error))?;
    // In a pod the host's name is the pod's.
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "proxmox-ccm".to_owned());
    if args.once {
        let ccm = Ccm::new(kube, regions, settings, None, &host, &metrics);
        return ccm.once().await.map_err(|error| Failed::running(&error));
    }

    let stop = CancellationToken::new();
    let signals = serving::stop_on_signals(stop.clone()).map_err(|error| Failed::running(&error))?;
    if args.dry_run {
        // Who writes nothing needs no lease.
        let ccm = Ccm::new(kube, regions, settings, None, &host, &metrics);
        let health = ccm.health();
        let ready = Arc::new(move || health.is_good());
        serving::admin_port(args.process.metrics_address, &metrics, ready, &stop).await?;
        ccm.run(stop).await;
        signals.abort();
        return Ok(());
    }
    let namespace = args.lease_namespace.unwrap_or_else(|| kube.default_namespace().to_owned());
    let election = lease::Settings::new(&namespace, &args.lease_name, &host);
    let identity = election.identity.clone();
    let (election, mut leadership) = Election::new(kube.clone(), election);
    let ccm = Ccm::new(kube, regions, settings, Some(leadership.clone()), &identity, &metrics);
    let (health, led) = (ccm.health(), leadership.clone());
    // A candidate that waits for its turn is as ready as it gets.
    let ready = Arc::new(move || if led.holds() { health.is_good() } else { led.is_alive() });
    serving::admin_port(args.process.metrics_address, &metrics, ready, &stop).await?;
    // The lease outlives the loop: it is given back when nothing writes any more.
    let release = CancellationToken::new();
    let mut elected = tokio::spawn(election.run(release.clone()));
    let work = async {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            from = leadership.acquired() => tracing::info!(taken_from = from, "acting on nodes"),
        }
        ccm.run(stop.clone()).await;
    };
    let lost = tokio::select! {
        biased;
        ended = &mut elected => !matches!(ended, Ok(Ended::Released)),
        () = work => false,
    };
    if !lost {
        release.cancel();
        // Its own deadline bounds it; a panic there has nothing to give back.
        let _ = elected.await;
    }
    signals.abort();
    if lost {
        return Err(Failed {
            exit: Exit::Failure,
            text: "the lease is lost: another process acts, or the API server was out of reach too long"
                .to_owned(),
        });
    }
    Ok(())
}
