//! What the tools for operators share: their flags, what they read from, and how they speak to people and to programs.

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    sync::Arc,
};

use clap::{Args, ValueEnum};
use futures_util::future::BoxFuture;
use serde::Serialize;

use super::{Exit, Failed, controller};
use crate::{
    config::{self, ClusterConfig, Config, NodesFile},
    csi::{controller::Gate, identity::DRIVER_NAME},
    doctor::{
        book::Book,
        explain::Rehearsal,
        finding::Severity,
        server::Server,
        view::{self, Depth, Progress, Settings, Source, View},
    },
    k8s::{
        client::{self, ConnectError, KubeClient},
        cluster::KubeCluster,
        inventory::{self, Inventory},
    },
    pve::Client,
    telemetry::{log::Format, metrics::Metrics},
    types::{
        Region,
        cluster::{Cluster, LookupError, NodeRecord},
    },
    volume::{self, Volumes},
};

/// What every tool takes.
#[derive(Debug, Args)]
pub(super) struct ToolArgs {
    /// Configuration file: the Proxmox clusters and their API tokens; the controller's own
    #[arg(long, default_value = config::DEFAULT_PATH, value_name = "FILE")]
    cloud_config: PathBuf,

    /// Kubeconfig of the cluster whose PVs are looked at; without it the cluster this pod runs in. Outside of a pod, and without it,
    /// Kubernetes is not looked at
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// Where there is no Kubernetes: the controller's file that names the nodes and their VMs
    #[arg(long, value_name = "FILE", conflicts_with = "kubeconfig")]
    nodes: Option<PathBuf>,

    /// Name of the driver in StorageClasses, PVs and CSINodes
    #[arg(long, default_value = DRIVER_NAME, value_name = "NAME")]
    driver_name: String,

    /// How to answer: text for people, wide for people with wide screens, json for programs (docs/tools.md)
    #[arg(short, long, default_value = "text", value_name = "FORMAT")]
    pub(super) output: Output,

    /// Log verbosity, on standard error: 5 and above logs each request to Proxmox
    #[arg(short, long = "v", default_value_t = 0, value_name = "LEVEL")]
    pub(super) verbosity: u8,

    /// Log format: text or json
    #[arg(long, default_value_t = Format::Text, value_name = "FORMAT", hide = true)]
    pub(super) log_format: Format,
}

/// How to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    Text,
    Wide,
    Json,
}

/// No nodes: where neither Kubernetes nor a file names them.
struct NoNodes;

impl Cluster for NoNodes {
    fn node<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Option<NodeRecord>, LookupError>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    fn nodes(&self) -> BoxFuture<'_, Result<Vec<NodeRecord>, LookupError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }
}

/// What the tools read from.
pub(super) struct Tools {
    pub(super) config: Config,
    pub(super) settings: Settings,
    pub(super) sources: Vec<Source>,
    pub(super) kube: Option<KubeClient>,
    cluster: Arc<dyn Cluster>,
    metrics: Metrics,
    pub(super) progress: Progress,
}

impl Tools {
    /// Reads the configuration and makes clients; asks nobody anything.
    pub(super) async fn open(args: &ToolArgs) -> Result<Self, Failed> {
        let config = config::read(&args.cloud_config).map_err(|error| Failed::config(&error))?;
        let metrics = Metrics::default();
        let mut sources = Vec::new();
        for cluster in &config.clusters {
            sources.push(source(cluster, &metrics).await?);
        }
        let kube = match (&args.kubeconfig, &args.nodes) {
            (_, Some(_)) => None,
            (path, None) => match client::connect(path.as_deref()).await {
                Ok(kube) => Some(kube),
                Err(ConnectError::InCluster(_)) if path.is_none() => None,
                Err(error) => return Err(Failed::config(&error)),
            },
        };
        let cluster: Arc<dyn Cluster> = match (&kube, &args.nodes) {
            (Some(kube), _) => Arc::new(KubeCluster::new(kube.clone(), only_region(&config))),
            (None, Some(file)) => Arc::new(NodesFile::open(file).map_err(|error| Failed::config(&error))?),
            (None, None) => Arc::new(NoNodes),
        };
        let settings = Settings {
            driver: args.driver_name.clone(),
            owner: config.owner,
            holders: config.holders.0..=config.holders.1,
        };
        Ok(Self { config, settings, sources, kube, cluster, metrics, progress: progress() })
    }

    /// Everything there is, as far as `depth` goes.
    pub(super) async fn look(&self, depth: Depth) -> (View, Book) {
        let inventory = self.inventory().await;
        let nodes = match &inventory {
            Some(inventory) => {
                let objects = inventory.nodes.iter().flatten();
                objects.filter_map(|node| node.record.clone().ok().flatten()).collect()
            }
            None => self.cluster.nodes().await.unwrap_or_default(),
        };
        let view =
            view::look(self.settings.clone(), &self.sources, inventory, nodes, depth, &self.progress).await;
        let mut book = Book::of(&view);
        if depth.listings
            && let Ok(rehearsal) = self.rehearsal()
        {
            book.prove(rehearsal.volumes()).await;
        }
        finished();
        (view, book)
    }

    async fn inventory(&self) -> Option<Inventory> {
        let kube = self.kube.as_ref()?;
        Some(inventory::read(kube, &self.settings.driver, only_region(&self.config).as_ref()).await)
    }

    /// Volumes of which nothing can be changed.
    pub(super) fn rehearsal(&self) -> Result<Rehearsal, Failed> {
        let stopped = Arc::default();
        let gate = Rehearsal::gate(&stopped);
        Ok(Rehearsal::new(self.volumes(&gate)?, stopped))
    }

    /// Volumes that are changed while the gate is open.
    pub(super) fn volumes(&self, gate: &Gate) -> Result<Volumes, Failed> {
        let clients =
            self.config.clusters.iter().map(|one| controller::client(one, &self.metrics, Some(gate)));
        let settings =
            volume::Settings { owner: self.settings.owner, holders: self.settings.holders.clone() };
        Ok(Volumes::new(clients.collect::<Result<_, _>>()?, Arc::clone(&self.cluster), settings))
    }
}

fn only_region(config: &Config) -> Option<Region> {
    match &config.clusters[..] {
        [cluster] => Some(cluster.region.clone()),
        _ => None,
    }
}

async fn source(cluster: &ClusterConfig, metrics: &Metrics) -> Result<Source, Failed> {
    let only = |url: &String| -> Result<Server, Failed> {
        let one = ClusterConfig { urls: vec![url.clone()], ..cluster.clone() };
        // Nobody should write a password into a URL, and nobody should read it on a screen.
        let shown = url.split_once('@').map_or_else(|| url.clone(), |(_, host)| format!("https://{host}"));
        Ok(Server { url: shown, client: reader(&one, metrics)? })
    };
    let client = reader(cluster, metrics)?;
    Ok(Source {
        who: client.who().await,
        client,
        servers: cluster.urls.iter().map(only).collect::<Result<_, _>>()?,
    })
}

/// A client that changes nothing, whatever is asked of it.
fn reader(cluster: &ClusterConfig, metrics: &Metrics) -> Result<Client, Failed> {
    let never: Gate = Arc::new(|| false);
    controller::client(cluster, metrics, Some(&never))
}

/// Tells a person on a terminal what is being looked at; nobody else.
fn progress() -> Progress {
    if !std::io::stderr().is_terminal() {
        return Progress::silent();
    }
    Progress::new(|what| {
        // A terminal that is gone hears nothing.
        let _ = write!(std::io::stderr(), "\r\x1b[2K{what} …");
    })
}

/// Wipes the line of progress.
pub(super) fn finished() {
    if std::io::stderr().is_terminal() {
        let _ = write!(std::io::stderr(), "\r\x1b[2K");
    }
}

/// Prints what was asked for. A reader that has heard enough is no error.
pub(super) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// One JSON document.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), Failed> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failed::running(&error))?;
    print(&format!("{text}\n"));
    Ok(())
}

/// Colours, where somebody sees them: standard output is a terminal that has them, and `NO_COLOR` is not set (no-color.org).
#[derive(Debug, Clone, Copy)]
pub(super) struct Paint(bool);

impl Paint {
    pub(super) fn of_stdout() -> Self {
        let is = |key: &str| std::env::var(key).unwrap_or_default();
        Self::of(std::io::stdout().is_terminal(), &is("NO_COLOR"), &is("TERM"))
    }

    fn of(is_terminal: bool, no_color: &str, term: &str) -> Self {
        Self(is_terminal && no_color.is_empty() && term != "dumb")
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(super) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub(super) fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    pub(super) fn good(self, text: &str) -> String {
        self.wrap("32", text)
    }

    pub(super) fn severity(self, severity: Severity, text: &str) -> String {
        match severity {
            Severity::Error => self.wrap("1;31", text),
            Severity::Warning => self.wrap("33", text),
            Severity::Note => self.wrap("36", text),
        }
    }
}

/// Columns under their heads, two blanks apart, without blanks at the ends of lines.
pub(super) fn table(heads: &[&str], rows: &[Vec<String>], paint: Paint) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(heads.get(column).map(|head| head.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let head = line(&heads.iter().map(|head| (*head).to_owned()).collect::<Vec<_>>());
    let mut text = format!("{}\n", paint.bold(&head));
    for row in rows {
        text.push_str(&line(row));
        text.push('\n');
    }
    text
}

/// A sentence in lines of a readable length, each behind `indent`.
pub(super) fn wrapped(text: &str, indent: &str) -> String {
    const LINE: usize = 108;
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if indent.len() + line.chars().count() + 1 + word.chars().count() <= LINE => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines.iter().flat_map(|line| [indent, line, "\n"]).collect()
}

/// How a tool ends that found something, or did not.
pub(super) fn exit(findings: bool) -> Exit {
    if findings { Exit::Findings } else { Exit::Success }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_has_no_blanks_at_its_ends() {
        let rows = vec![vec!["ä".to_owned(), "bb".to_owned()], vec!["longer".to_owned(), String::new()]];
        let text = table(&["A", "HEAD"], &rows, Paint(false));
        assert_eq!(text, "A       HEAD\nä       bb\nlonger\n");
        assert!(table(&["A"], &[], Paint(true)).starts_with("\x1b[1mA"));
    }

    #[test]
    fn colours_are_for_terminals_that_want_them() {
        assert_eq!(Paint::of(true, "", "xterm").good("ok"), "\x1b[32mok\x1b[0m");
        for (is_terminal, no_color, term) in [(false, "", "xterm"), (true, "1", "xterm"), (true, "", "dumb")]
        {
            assert_eq!(Paint::of(is_terminal, no_color, term).good("ok"), "ok");
        }
    }

    #[test]
    fn long_sentences_are_cut_between_words() {
        let text = wrapped(&"word ".repeat(40), "  ");
        assert!(text.lines().count() > 1);
        assert!(text.lines().all(|line| line.len() <= 108 && line.starts_with("  word")));
        assert_eq!(wrapped("", "  "), "");
    }
}
