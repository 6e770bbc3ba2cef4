//! The command line: one composition root for each command.
//!
//! [`main`] parses, starts logging and the runtime, and hands over. What a command is made of is wired in its own file and nowhere else.

mod ccm;
mod controller;
mod doctor;
mod explain;
mod node;
mod serving;
mod tools;
mod volumes;

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{ExitCode, Termination},
};

use clap::{Args, Parser, Subcommand};

use crate::{
    csi::identity::DRIVER_NAME,
    telemetry::log::{self, Format},
};

/// A CSI driver that turns Proxmox VE storage into Kubernetes volumes.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Each command has its own help: `proxmox-csi controller --help`.\n\
                  Flags are understood with one dash as well, as the driver before this one took them: -csi-address=…, -v=5."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve CSI Identity and Controller: turns CSI calls into Proxmox VE API calls
    ///
    /// Exactly one controller may act for a cluster: two could plug one volume into two VMs. In Kubernetes a Lease sees to that, and others wait,
    /// not ready; with --nodes it is up to you. It ends in order on SIGTERM: running
    /// calls are finished, new ones refused. Errors of the configuration end it with exit code 3.
    Controller(controller::ControllerArgs),
    /// Serve CSI Identity and Node on a worker VM: finds the disk, formats, mounts, grows and unmounts it
    ///
    /// Needs root on the VM and no Proxmox credential. In a container it needs the kubelet's directory with bidirectional mount
    /// propagation, /dev and /sys.
    Node(node::NodeArgs),
    /// Keep Kubernetes Nodes true to their VMs: labels, providerID, addresses, taints, removal
    ///
    /// Watches Nodes and asks each Proxmox cluster every few seconds where its VMs are and what they do. Finds a node's VM by its SMBIOS
    /// uuid, never by its name. Takes the `uninitialized` taint off, follows migrations, taints nodes whose VM is stopped, and deletes a Node
    /// only when its VM is proven gone. It never concludes anything from silence: a lost privilege, a dead host or region changes nothing.
    ///
    /// The token needs VM.Audit on /vms. More only for more: Sys.Audit on / for HA groups, VM.GuestAgent.Audit (before PVE 9: VM.Monitor) on
    /// /vms for addresses from guest agents. Try it with --dry-run --once, which writes nothing and says what it would write.
    Ccm(ccm::CcmArgs),
    /// Find out what is wrong: configuration, token, storages, VMs, Nodes, PVs, attachments
    ///
    /// Reads what Kubernetes, Proxmox, the configs of VMs and their QEMU say, compares it, and tells what does not agree, with what to type.
    /// Changes nothing, unless it is told to: --repair does the little that is provably safe. Needs no privilege that the driver does not
    /// need; what it could not see it says. Each finding has a code that stays the same: docs/tools.md.
    Doctor(doctor::DoctorArgs),
    /// List all volumes: where they are, who has them, what they are for
    ///
    /// Brings together what storages list, PVs, VolumeAttachments and the configs of all VMs. Lists storages, which is slow on directories
    /// with many images; --fast goes without. Changes nothing.
    Volumes(volumes::VolumesArgs),
    /// Tell all about one volume, and what an attach, a detach and a deletion would do now
    ///
    /// What the driver would do is rehearsed: its own code runs, over a connection that lets no change pass. Changes nothing.
    Explain(explain::ExplainArgs),
}

/// What every serving command takes.
#[derive(Debug, Args)]
struct CommonArgs {
    /// Unix socket to serve CSI on; its name must end in `.sock`
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock", value_name = "SOCKET")]
    csi_address: String,

    /// Name of the driver in StorageClasses, PVs and CSINodes
    #[arg(long, default_value = DRIVER_NAME, value_name = "NAME", value_parser = driver_name)]
    driver_name: String,

    #[command(flatten)]
    process: ProcessArgs,
}

/// What every process takes.
#[derive(Debug, Args)]
struct ProcessArgs {
    /// Address of the admin port with /livez, /readyz and /metrics, `:PORT` for all addresses; without it there is none
    #[arg(long, value_name = "IP:PORT", value_parser = address)]
    metrics_address: Option<SocketAddr>,

    /// Log verbosity: 5 and above logs each request to Proxmox and each command on the node
    #[arg(short, long = "v", default_value_t = 2, value_name = "LEVEL")]
    verbosity: u8,

    /// Log format: text or json
    #[arg(long, default_value_t = Format::Text, value_name = "FORMAT")]
    log_format: Format,
}

/// An address to listen on; without an IP, as Go programs take it, all of them.
fn address(text: &str) -> Result<SocketAddr, std::net::AddrParseError> {
    if text.starts_with(':') { format!("[::]{text}").parse() } else { text.parse() }
}

/// A name as CSI wants it (spec, `GetPluginInfo`): that of a domain, of at most 63 characters.
fn driver_name(text: &str) -> Result<String, &'static str> {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    let (first, last) = (text.chars().next(), text.chars().last());
    if text.len() <= 63 && text.chars().all(legal) && edge(first) && edge(last) {
        Ok(text.to_owned())
    } else {
        Err(
            "it must be a domain name: 1 to 63 letters, digits, `-` and `.`, with a letter or digit at both ends",
        )
    }
}

impl CommonArgs {
    /// The socket's path: the address with or without its `unix://`.
    fn socket(&self) -> PathBuf {
        let path =
            self.csi_address.strip_prefix("unix://").or_else(|| self.csi_address.strip_prefix("unix:"));
        PathBuf::from(path.unwrap_or(&self.csi_address))
    }
}

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    /// All that was asked for was done.
    Success,
    /// It could not go on.
    Failure,
    /// A tool found something that somebody has to see to.
    Findings,
    /// A tool could not see everything that its answer depends on.
    Incomplete,
    /// The configuration can't be used: starting again will not help.
    BadConfig,
}

impl Termination for Exit {
    fn report(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Success => 0,
            Self::Failure | Self::Findings => 1,
            // 2 is clap's, for a command line that can't be understood.
            Self::BadConfig => 3,
            // Of a tool 1 is a verdict, so that not to have come to one is told from it.
            Self::Incomplete => 4,
        })
    }
}

/// A command could not go on.
#[derive(Debug)]
struct Failed {
    exit: Exit,
    text: String,
}

impl Failed {
    /// The error and its causes, each once.
    fn new(exit: Exit, error: &dyn std::error::Error) -> Self {
        Self { exit, text: log::chain(error) }
    }

    fn config(error: &dyn std::error::Error) -> Self {
        Self::new(Exit::BadConfig, error)
    }

    fn running(error: &dyn std::error::Error) -> Self {
        Self::new(Exit::Failure, error)
    }
}

/// Runs the command of this process's command line.
pub fn main() -> ExitCode {
    let cli =
        Cli::parse_from(std::env::args_os().enumerate().map(|(index, argument)| match argument.to_str() {
            Some(text) if index > 0 => double_dash(text).into(),
            _ => argument,
        }));
    let process = |args: &ProcessArgs| (args.verbosity, args.log_format);
    let tool = |args: &tools::ToolArgs| (args.verbosity, args.log_format);
    let (verbosity, format) = match &cli.command {
        Command::Controller(args) => process(&args.common.process),
        Command::Node(args) => process(&args.common.process),
        Command::Ccm(args) => process(&args.process),
        Command::Doctor(args) => tool(&args.tool),
        Command::Volumes(args) => tool(&args.tool),
        Command::Explain(args) => tool(&args.tool),
    };
    log::start(verbosity, format);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failed::running(&error)),
    };
    let result = runtime.block_on(async {
        match cli.command {
            Command::Controller(args) => controller::run(args).await.map(|()| Exit::Success),
            Command::Node(args) => node::run(args).await.map(|()| Exit::Success),
            Command::Ccm(args) => Box::pin(ccm::run(args)).await.map(|()| Exit::Success),
            Command::Doctor(args) => doctor::run(args).await,
            Command::Volumes(args) => volumes::run(args).await,
            Command::Explain(args) => explain::run(args).await,
        }
    });
    // Threads that hang in a system call on a dead disk don't keep the process from ending.
    runtime.shutdown_background();
    match result {
        Ok(exit) => exit.report(),
        Err(failed) => report(&failed),
    }
}

fn report(failed: &Failed) -> ExitCode {
    eprintln!("error: {}", failed.text);
    failed.exit.report()
}

/// klog's single dash in front of a long flag becomes two: `-csi-address=x` and `-v=5`, as manifests of today have them.
fn double_dash(argument: &str) -> String {
    let name = argument.trim_start_matches('-').split('=').next().unwrap_or_default();
    let single = argument.starts_with('-') && !argument.starts_with("--");
    let long = name.len() > 1 && name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    if single && (long || argument.starts_with("-v=")) { format!("-{argument}") } else { argument.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    fn parsed(arguments: &[&str]) -> Command {
        let dashed = arguments.iter().map(|argument| double_dash(argument));
        let line = std::iter::once("proxmox-csi".to_owned()).chain(dashed);
        Cli::try_parse_from(line).unwrap_or_else(|error| panic!("{arguments:?}: {error}")).command
    }

    #[test]
    fn the_flags_of_the_driver_before_this_one_are_understood_in_each_spelling() {
        for dash in ["-", "--"] {
            for joint in ["=", " "] {
                let flag = |name: &str, value: &str| format!("{dash}{name}{joint}{value}");
                let line = [
                    "controller".to_owned(),
                    flag("csi-address", "unix:///csi/a.sock"),
                    flag("cloud-config", "/etc/a.yaml"),
                    flag("kubeconfig", "/etc/kubeconfig"),
                    flag("metrics-address", ":8080"),
                    flag("v", "5"),
                ]
                .join(" ");
                let Command::Controller(args) = parsed(&line.split(' ').collect::<Vec<_>>()) else {
                    panic!("{line} is of a controller");
                };
                assert_eq!(args.common.socket(), PathBuf::from("/csi/a.sock"), "{line}");
                assert_eq!(args.cloud_config, PathBuf::from("/etc/a.yaml"), "{line}");
                assert_eq!(args.kubeconfig, Some(PathBuf::from("/etc/kubeconfig")), "{line}");
                assert_eq!(args.common.process.metrics_address, "[::]:8080".parse().ok(), "{line}");
                assert_eq!(args.common.process.verbosity, 5, "{line}");
            }
        }
    }

    #[test]
    fn flags_of_today_are_understood() {
        for (given, expected) in [
            ("-csi-address=unix:///csi/csi.sock", "--csi-address=unix:///csi/csi.sock"),
            ("-v=5", "--v=5"),
            ("-v", "-v"),
            ("-v5", "-v5"),
            ("--v=5", "--v=5"),
            ("controller", "controller"),
            ("-h", "-h"),
        ] {
            assert_eq!(double_dash(given), expected);
        }
    }
}
