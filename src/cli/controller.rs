//! `proxmox-csi controller`: clients of the regions, the volumes on them, and the services on a socket.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clap::Args;
use futures_util::{FutureExt as _, future::BoxFuture};
use tokio_util::sync::CancellationToken;

use super::{CommonArgs, Exit, Failed, serving};
use crate::{
    config::{self, ClusterConfig, NodesFile},
    csi::{
        controller::{ControllerService, Gate},
        identity::Readiness,
    },
    k8s::{
        client::connect,
        cluster::KubeCluster,
        events::Recorder,
        lease::{self, Election, Leadership},
        notices::Notices,
    },
    pve::{
        Client,
        failover::{self, Server},
        transport::{self, HttpsOptions, SetupError, Trust},
    },
    runtime::Operations,
    telemetry::{log, metrics::Metrics},
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
    pub(super) cloud_config: PathBuf,

    /// Kubeconfig of the cluster whose nodes volumes are attached to; without it, and without --nodes, the cluster this pod runs in
    #[arg(long, value_name = "FILE", conflicts_with = "nodes")]
    pub(super) kubeconfig: Option<PathBuf>,

    /// Where there is no Kubernetes: a file that names the nodes and their VMs: `nodes: [{name, region, uuid, vmid}]`, where `uuid` is
    /// the VM's SMBIOS uuid (in the VM: `/sys/class/dmi/id/product_uuid`). Read anew at each look-up
    #[arg(long, value_name = "FILE")]
    nodes: Option<PathBuf>,

    /// Name of the Lease that lets one controller act
    #[arg(long, default_value = "proxmox-csi-controller", value_name = "NAME")]
    lease_name: String,

    /// Namespace of the Lease; without it that of the pod or the kubeconfig
    #[arg(long, value_name = "NAMESPACE")]
    lease_namespace: Option<String>,
}

/// How long a write of a controller before this one may still be at work in Proxmox: 10 s for a lock and 60 s under it
/// (pve-cluster `Cluster.pm:cfs_lock`).
const LONGEST_LOCK: Duration = Duration::from_secs(70);

/// Between two tries to check privileges.
const PREFLIGHT_PAUSE: Duration = Duration::from_mins(1);

pub(super) async fn run(args: ControllerArgs) -> Result<(), Failed> {
    let config = config::read(&args.cloud_config).map_err(|error| Failed::config(&error))?;
    for warning in &config.warnings {
        tracing::warn!(warning, "odd configuration");
    }
    let metrics = Metrics::default();
    let settings = Settings { owner: config.owner, holders: config.holders.0..=config.holders.1 };
    let operations = Operations::default();
    let serve = |cluster: Arc<dyn Cluster>, gate: Option<&Gate>, led: BoxFuture<'static, ()>| {
        let clients = config
            .clusters
            .iter()
            .map(|cluster| client(cluster, &metrics, gate))
            .collect::<Result<Vec<Client>, _>>()?;
        for client in &clients {
            // It tells and decides nothing, so nobody waits for it.
            tokio::spawn(preflight(client.clone(), gate.map(Arc::clone)));
        }
        let volumes = Volumes::new(clients, cluster, settings);
        let mut controller = ControllerService::new(volumes.clone(), operations.clone());
        if let Some(gate) = gate {
            controller = controller.behind(Arc::clone(gate));
        }
        let gate = gate.map(Arc::clone);
        let (common, operations, metrics) = (&args.common, operations.clone(), metrics.clone());
        Ok::<_, Failed>(async move {
            let led = Box::pin(led.map(|()| Readiness::Ready));
            let may_act = || gate.as_ref().is_none_or(|gate| gate());
            tokio::select! {
                biased;
                served = serving::serve(common, operations, metrics, led, |server| server.with_controller(controller)) => served,
                never = volumes.keep_current(may_act) => match never {},
            }
        })
    };

    if let Some(file) = &args.nodes {
        let nodes = NodesFile::open(file).map_err(|error| Failed::config(&error))?;
        return serve(Arc::new(nodes), None, Box::pin(std::future::ready(())))?.await;
    }
    let kube = connect(args.kubeconfig.as_deref()).await.map_err(|error| {
        let mut failed = Failed::config(&error);
        failed.text.push_str("; where there is no Kubernetes, name the nodes with --nodes");
        failed
    })?;
    let only_region = match &config.clusters[..] {
        [cluster] => Some(cluster.region.clone()),
        _ => None,
    };
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "proxmox-csi".to_owned());
    let driver = &args.common.driver_name;
    let recorder = Recorder::new(kube.clone(), driver, &host);
    let notices = Notices::start(kube.clone(), recorder, metrics.csi().clone());
    let nodes = KubeCluster::new(kube.clone(), only_region).with_notices(notices);
    let namespace = args.lease_namespace.clone().unwrap_or_else(|| kube.default_namespace().to_owned());
    let (election, leadership) =
        Election::new(kube, lease::Settings::new(&namespace, &args.lease_name, &host));
    let held = leadership.clone();
    metrics.csi().lease(move || held.holds());
    let (led, gate) = lead(leadership);
    let serving = serve(Arc::new(nodes), Some(&gate), led)?;
    // The lease outlives the service: it is given back when nothing writes any more.
    let release = CancellationToken::new();
    let mut elected = tokio::spawn(election.run(release.clone()));
    tokio::select! {
        biased;
        ended = &mut elected => {
            tracing::error!(?ended, "ending without another change");
            Err(Failed {
                exit: Exit::Failure,
                text: "the lease is lost: another controller acts, or the API server was out of reach too long"
                    .to_owned(),
            })
        }
        served = serving => {
            release.cancel();
            // Its own deadline bounds it; a panic there has nothing to give back.
            let _ = elected.await;
            served
        }
    }
}

/// When this controller may act, and the gate that is open just then. Behind a controller that did not give the lease back it waits until
/// nothing of that one can still be at work.
pub(super) fn lead(mut leadership: Leadership) -> (BoxFuture<'static, ()>, Gate) {
    let acts = Arc::new(AtomicBool::new(false));
    let (told, asked) = (Arc::clone(&acts), leadership.clone());
    let led = async move {
        if let Some(before) = leadership.acquired().await {
            tracing::info!(before, "taking over: waiting until nothing of it is at work");
            tokio::time::sleep(LONGEST_LOCK).await;
        }
        told.store(true, Ordering::Release);
    };
    (Box::pin(led), Arc::new(move || acts.load(Ordering::Acquire) && asked.holds()))
}

/// Logs each privilege that the token lacks, with the command that gives it. Asks until it gets an answer: a region that is away at the
/// start is no reason to say nothing. Who may not act yet asks Proxmox nothing.
async fn preflight(client: Client, gate: Option<Gate>) {
    while gate.as_ref().is_some_and(|gate| !gate()) {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let region = client.region().clone();
    let mut complained = false;
    loop {
        match client.missing_privileges().await {
            Ok(missing) => {
                let who = client.who().await;
                for missing in &missing {
                    let (path, privilege, remedy) = (&missing.path, &missing.privilege, missing.remedy(&who));
                    if missing.optional {
                        tracing::info!(%region, path, privilege, purpose = missing.purpose, remedy, "an optional privilege is missing");
                    } else {
                        tracing::warn!(%region, path, privilege, purpose = missing.purpose, remedy, "a privilege is missing");
                    }
                }
                let needed = missing.iter().filter(|missing| !missing.optional).count();
                tracing::info!(%region, who, missing = needed, "privileges checked");
                return;
            }
            Err(error) => {
                let error = log::chain(&error);
                if complained {
                    tracing::debug!(%region, error, "cannot check privileges yet");
                } else {
                    tracing::warn!(%region, error, "cannot check privileges yet");
                }
                complained = true;
            }
        }
        tokio::time::sleep(PREFLIGHT_PAUSE).await;
    }
}

/// A client of a configured cluster.
pub(super) fn client(
    cluster: &ClusterConfig,
    metrics: &Metrics,
    gate: Option<&Gate>,
) -> Result<Client, Failed> {
    let trust = match &cluster.trust {
        config::Trust::System => Trust::System,
        config::Trust::Ca(path) => {
            Trust::Ca(transport::read_ca(path).map_err(|error| Failed::config(&error))?)
        }
        config::Trust::Fingerprints(fingerprints) => Trust::Fingerprints(fingerprints.clone()),
        config::Trust::Anything => Trust::Anything,
    };
    let server = |url: &String| {
        let https = transport::https(&HttpsOptions { url: url.clone(), trust: trust.clone() })?;
        let transport = match gate.map(Arc::clone) {
            Some(gate) => transport::gated(https, move || gate()),
            None => https,
        };
        // Nobody should write a password into a URL, and nobody should read it in a log.
        let name = url.rsplit('@').next().unwrap_or_default().to_owned();
        Ok(Server { name, transport })
    };
    let servers = cluster.urls.iter().map(server).collect::<Result<_, SetupError>>();
    let servers = servers.map_err(|error| Failed::config(&error))?;
    let transport = failover::region(&cluster.region, servers, metrics.pve());
    let transport = transport.expect("a cluster without a url is refused by the configuration");
    let (region, credentials) = (cluster.region.clone(), cluster.credentials.clone());
    Client::with_credentials(region, transport, credentials, metrics.clone())
        .map_err(|error| Failed::config(&error))
}
