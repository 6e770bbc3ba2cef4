//! `pve-sim`: a Proxmox VE cluster to test against, without a Proxmox VE. See `proxmox_csi::sim`.

use clap::{Parser, Subcommand, ValueEnum};
use proxmox_csi::sim::clock::Profile;
use proxmox_csi::sim::http::Tls;
use proxmox_csi::sim::replay::{Record, Script, Verdict, replay};
use proxmox_csi::sim::version::Version;
use proxmox_csi::sim::{Options, Sim, World};
use serde_json::json;
use std::collections::BTreeMap;
use std::error::Error;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use tokio::signal::unix::{SignalKind, signal};

/// A simulated Proxmox VE cluster to test against: its API, over block devices of this machine.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a cluster until SIGTERM or SIGINT, then take its disks away.
    ///
    /// One line of JSON on standard output says where it is and how to get in: url, nodes (url of each node that has an
    /// address of its own), ca (path of the certificate to trust), tokens (what follows `Authorization: `), guests
    /// (trees that stand for /sys and /dev of each VM; of a QEMU its ports and its console). A browser finds the cluster at /_sim/; `GET /_sim/state`,
    /// `GET /_sim/log` and `POST /_sim/faults` look into it and play faults.
    ///
    /// The cluster is kept in --state: the next run goes on where this one ends, however it ends.
    ///
    /// Loop devices need root: without it a world with VMs that stand for this machine ends with an error, unless
    /// --no-devices is given. Disks exist then only as far as Proxmox VE knows.
    Serve(Serve),
    /// Print the built-in world as a file to start from.
    World,
    /// Send recorded requests to a fresh simulator and print how its answers differ from the recorded ones.
    ///
    /// What happened between the records of tests/fixtures is built in; any other recording needs a world and is sent as
    /// it stands. Exit status 1 on any difference, and when it can't be replayed. Limits such
    /// as 10 s for a lock take their time.
    Replay(Replay),
}

#[derive(clap::Args)]
struct Replay {
    /// The recording: one JSON object per line.
    transcript: PathBuf,
    /// World file for all records, in place of the built-in worlds.
    #[arg(long)]
    world: Option<PathBuf>,
    /// Print the numbers of every group.
    #[arg(long)]
    groups: bool,
}

#[derive(clap::Args)]
struct Serve {
    /// Address to listen on; port 0 picks a free one. With NODE= in front it is that node's own, which refuses
    /// connections while the node is down; without, requests are answered while any node lives. Can be repeated.
    #[arg(long, default_value = "127.0.0.1:0", value_name = "[NODE=]ADDRESS")]
    listen: Vec<Address>,
    /// World file; the built-in world without it (see `pve-sim world`). It is where a new state begins.
    #[arg(long)]
    world: Option<PathBuf>,
    /// The release whose API is spoken, in place of the world's: 9.2 or 8.4.
    #[arg(long)]
    pve: Option<Version>,
    /// Directory for the cluster's state, volumes, guests and ca.pem; made if missing. With loop devices its `guests`,
    /// which is emptied at the start, must allow device nodes.
    #[arg(long)]
    state: PathBuf,
    /// Begin in the world again, and forget what an earlier run has left in --state.
    #[arg(long)]
    fresh: bool,
    /// What things cost: the times of a real cluster, or nothing.
    #[arg(long, value_enum, default_value_t = Time::Recorded)]
    time: Time,
    /// Seconds since 1970 that the cluster's clock shows at the start.
    #[arg(long, default_value_t = Options::default().epoch)]
    epoch: u64,
    /// More host names or addresses for the server's certificate.
    #[arg(long = "name")]
    names: Vec<String>,
    /// Also write the line of standard output to this file, in one step, once requests are served.
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// Make no loop devices and run no QEMU, whatever the world says.
    #[arg(long)]
    no_devices: bool,
}

/// Where to listen, and for which node.
#[derive(Clone)]
struct Address {
    node: Option<String>,
    address: SocketAddr,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (node, address) = match text.split_once('=') {
            Some((node, address)) => (Some(node.to_owned()), address),
            None => (None, text),
        };
        let address =
            address.parse().map_err(|_| format!("`{address}` is no address such as 127.0.0.1:8006"))?;
        Ok(Self { node, address })
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Time {
    /// Measured on a real cluster.
    Recorded,
    /// Nothing waits but what waits for a limit.
    None,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
    let result = match arguments.command {
        Command::Serve(serve) => run(&serve),
        Command::World => print_world(),
        Command::Replay(replay) => match run_replay(&replay) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => Err(error),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("error: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprint!(": {cause}");
                source = cause.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn print_world() -> Result<(), Box<dyn Error>> {
    print!("{}", serde_saphyr::to_string(&World::builtin())?);
    Ok(())
}

/// Returns whether nothing differed.
fn run_replay(arguments: &Replay) -> Result<bool, Box<dyn Error>> {
    let records = Record::read(&std::fs::read_to_string(&arguments.transcript)?)?;
    let world = match &arguments.world {
        Some(path) => Some(World::from_yaml(&std::fs::read_to_string(path)?)?),
        None => None,
    };
    let script = Script::for_recording(&records, world)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcomes = runtime.block_on(replay(&records, &script))?;
    let mut groups: BTreeMap<&str, [usize; 3]> = BTreeMap::new();
    let mut out = std::io::stdout().lock();
    for outcome in &outcomes {
        let index = match &outcome.verdict {
            Verdict::Equal => 0,
            Verdict::Different(differences) => {
                for difference in differences {
                    writeln!(out, "{} {}: {difference}", outcome.seq, outcome.name)?;
                }
                1
            }
            Verdict::Excepted(_) => 2,
        };
        groups.entry(&outcome.group).or_default()[index] += 1;
    }
    if arguments.groups {
        for (group, [equal, different, excepted]) in &groups {
            let all = equal + different + excepted;
            writeln!(
                out,
                "{group}: {all} records, {equal} equal, {different} different, {excepted} excepted"
            )?;
        }
    }
    let sum = |index: usize| groups.values().map(|counts| counts[index]).sum::<usize>();
    let (equal, different, excepted) = (sum(0), sum(1), sum(2));
    writeln!(out, "{} records, {equal} equal, {different} different, {excepted} excepted", outcomes.len())?;
    Ok(different == 0)
}

fn run(serve: &Serve) -> Result<(), Box<dyn Error>> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve_until_told(serve))
}

async fn serve_until_told(serve: &Serve) -> Result<(), Box<dyn Error>> {
    let mut world = match &serve.world {
        Some(path) => World::from_yaml(&std::fs::read_to_string(path)?)?,
        None => World::builtin(),
    };
    if let Some(version) = serve.pve {
        world.version = version;
    }
    if serve.no_devices {
        world.vms.iter_mut().for_each(|vm| vm.guest = proxmox_csi::sim::world::Guest::Memory);
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    std::fs::create_dir_all(&serve.state)?;
    let state = serve.state.canonicalize()?;
    let time = match serve.time {
        Time::Recorded => Profile::Recorded,
        Time::None => Profile::None,
    };
    if serve.fresh {
        Sim::forget(&state)?;
    }
    let sim =
        Sim::start(world, Options { time, state: Some(state.clone()), keep: true, epoch: serve.epoch })?;
    sim.machines_ready().await?;
    let tls = Tls::kept_in(&state, &serve.names)?;
    let ca = state.join("ca.pem");
    let mut listening = Vec::new();
    let mut nodes = serde_json::Map::new();
    for Address { node, address } in &serve.listen {
        let open = sim.listen_as(node.as_deref(), *address, &tls).await?;
        nodes.extend(node.clone().map(|node| (node, json!(open.url()))));
        listening.push(open);
    }
    let url = listening.first().map(proxmox_csi::sim::http::Listening::url);
    let tokens: serde_json::Map<_, _> =
        sim.token_headers().into_iter().map(|(id, header)| (id, json!(header))).collect();

    let guests: serde_json::Map<_, _> = sim
        .vmids()
        .into_iter()
        .filter_map(|vmid| {
            if let Some(access) = sim.guest_access(vmid) {
                let reached = json!({ "ports": access.ports, "console": access.console });
                return Some((vmid.to_string(), reached));
            }
            let roots = sim.guest_roots(vmid)?;
            Some((vmid.to_string(), json!({ "sys": roots.sys, "dev": roots.dev })))
        })
        .collect();
    let ready =
        json!({ "url": url, "nodes": nodes, "ca": ca, "tokens": tokens, "guests": guests }).to_string();
    writeln!(std::io::stdout(), "{ready}")?;
    if let Some(path) = &serve.ready_file {
        write_in_one_step(path, &format!("{ready}\n"))?;
    }
    tracing::info!(url, "the cluster is ready; a browser finds it at /_sim/");

    tokio::select! {
        biased;
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("going down");
    drop(listening);
    sim.save().await;
    sim.shutdown().await;
    Ok(())
}

/// A reader finds the whole content or no file.
fn write_in_one_step(path: &Path, content: &str) -> std::io::Result<()> {
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, content)?;
    std::fs::rename(fresh, path)
}
