//! `proxmox-csi explain`: all about one volume.

use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;

use super::{
    Exit, Failed, doctor,
    tools::{self, Output, Paint, ToolArgs, Tools},
};
use crate::{
    doctor::{
        explain::{self, Explanation},
        rows::HeldBy,
        view::Depth,
    },
    types::Bytes,
};

/// What `proxmox-csi explain` takes.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    pub(super) tool: ToolArgs,

    /// The volume: its handle (region/zone/storage/name), the name of its PV, or its claim as namespace/name
    #[arg(value_name = "HANDLE")]
    handle: String,

    /// Rehearse an attach to this Node; without it to the one where the volume is, or is wanted, or could be
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  proxmox-csi explain homelab//rbd/vm-9999-pvc-0e6cf7a5
      by its handle
  proxmox-csi explain shop/data-postgres-0 --kubeconfig ~/.kube/config
      by its claim: why does its pod not start?
  proxmox-csi explain pvc-0e6cf7a5 --node worker-3
      by its PV: would it attach there?

Exit codes: 0 nothing to see to, 1 findings, or no such volume, 2 the command line, 3 the configuration.";

#[derive(Serialize)]
struct Document<'a> {
    schema: u32,
    command: &'static str,
    ok: bool,
    volume: &'a Explanation,
}

pub(super) async fn run(args: ExplainArgs) -> Result<Exit, Failed> {
    let tools = Tools::open(&args.tool).await?;
    let rehearsal = tools.rehearsal()?;
    let (view, book) = tools.look(Depth { servers: false, listings: false }).await;
    let handle = explain::resolve(&view, &args.handle).map_err(|error| Failed::running(&error))?;
    if let Some(region) = view.region(&handle.region)
        && let Err(why) = &region.resources
    {
        return Err(Failed { exit: Exit::Failure, text: format!("region {}: {why}", handle.region) });
    }
    let told = explain::explain(
        &view,
        &book,
        &tools.sources,
        &rehearsal,
        &handle,
        args.node.as_deref(),
        &tools.progress,
    )
    .await;
    tools::finished();
    let needs_action = told.needs_action();
    if args.tool.output == Output::Json {
        tools::print_json(&Document { schema: 1, command: "explain", ok: !needs_action, volume: &told })?;
    } else {
        tools::print(&shown(&told, view.cluster.is_some(), Paint::of_stdout()));
    }
    Ok(tools::exit(needs_action))
}

fn shown(told: &Explanation, has_cluster: bool, paint: Paint) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let value = if value.is_empty() { "-" } else { value };
        let _ = write!(
            text,
            "{}{}",
            paint.bold(&format!("{name:<12}")),
            tools::wrapped(value, &" ".repeat(12)).trim_start()
        );
    };
    let row = &told.row;
    line("volume", &row.handle);
    let zone = row.zone.as_ref().map_or_else(String::new, |zone| format!(", on Proxmox node {zone}"));
    let kind = told.storage_type.as_deref().unwrap_or("of a type that is not seen");
    let shared = match told.shared {
        Some(true) => ", shared",
        Some(false) => ", local",
        None => "",
    };
    line("storage", &format!("{} ({kind}{shared}) of region {}{zone}", row.storage, row.region));
    let owner = match (row.owner, told.owner_is_configured) {
        (Some(owner), true) => format!("VMID {owner}, the driver's"),
        (Some(owner), false) => format!("VMID {owner}, not the driver's: it is served and never formatted"),
        (None, _) => "its name does not say: it is served, and never formatted or deleted".to_owned(),
    };
    line("owner", &owner);
    let exists = match (told.exists, row.size_bytes, &told.exists_why) {
        ("yes", Some(size), _) => format!("yes, {}", Bytes::new(size)),
        (word, _, Some(why)) => format!("{word}: {why}"),
        ("no", ..) => "no: it is proven not to be there".to_owned(),
        (word, ..) => word.to_owned(),
    };
    line("exists", &exists);
    line("wwn", &format!("{} (as this driver attaches it)", row.wwn));
    line("state", row.state.as_str());
    if row.held_by.is_empty() {
        line("held by", "no VM");
    }
    for held in &row.held_by {
        line("held by", &held_text(held));
    }
    if has_cluster {
        kubernetes(told, &mut line);
    }
    for one in &told.operations {
        let verdict = match one.outcome {
            "nothing" => "nothing to do",
            "would" => "would",
            "refuses" => "would be refused",
            _ => "not known",
        };
        line("now", &format!("{}: {verdict}: {}", one.operation, one.text));
    }
    for task in &told.tasks {
        line(
            "task",
            &format!(
                "{} {} of VM {} by {}: {} ({})",
                task.started, task.kind, task.vmid, task.user, task.status, task.upid
            ),
        );
    }
    line("next", &told.advice());
    if !told.findings.is_empty() {
        text.push('\n');
        for one in &told.findings {
            text.push_str(&doctor::finding(one, paint));
        }
    }
    text
}

fn kubernetes(told: &Explanation, line: &mut impl FnMut(&str, &str)) {
    let row = &told.row;
    let Some(pv) = &row.pv else {
        line("pv", "none in this cluster");
        return;
    };
    let class = row.storage_class.as_deref().unwrap_or("none");
    let reclaim = row.reclaim_policy.as_deref().unwrap_or("-");
    line(
        "pv",
        &format!("{pv}, {}, class {class}, reclaim policy {reclaim}", row.phase.as_deref().unwrap_or("-")),
    );
    line("claim", row.claim.as_deref().unwrap_or("none"));
    if let Some(nodes) = &told.fitting_nodes {
        line("fits", &if nodes.is_empty() { "no Node".to_owned() } else { nodes.join(", ") });
    }
    line(
        "attachment",
        &if row.attachments.is_empty() { "none".to_owned() } else { row.attachments.join(", ") },
    );
    if !told.in_use_on.is_empty() {
        line("in use", &format!("says the kubelet of {}", told.in_use_on.join(", ")));
    }
    for pod in &told.pods {
        line(
            "pod",
            &format!("{}, {}, on {}", pod.name, pod.phase, pod.node.as_deref().unwrap_or("no Node yet")),
        );
    }
}

fn held_text(held: &HeldBy) -> String {
    let node = held.node.as_ref().map(|node| format!(", Node {node}")).unwrap_or_default();
    let vm = format!("VM {} ({}) on {}{node}", held.vmid, held.vm, held.host);
    match held.kind {
        "snapshot" => format!("{vm}, in its snapshot {}", held.key),
        "placeholder" => {
            format!("{vm}, {}: the placeholder of a replicated volume, which never runs", held.key)
        }
        "unused" => format!("{vm}, as {}: a mere reference", held.key),
        _ => {
            let config = match (held.in_force, held.pending) {
                (true, false) => "in force",
                (true, true) => "in force, with a change of the slot pending",
                (false, _) => "pending only",
            };
            let qemu = match held.in_qemu {
                Some(true) => "QEMU has it",
                Some(false) => "QEMU does NOT have it",
                None => "no QEMU runs, or it does not say",
            };
            format!("{vm}, {}: {config}; {qemu}", held.key)
        }
    }
}
