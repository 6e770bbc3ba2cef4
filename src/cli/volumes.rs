//! `proxmox-csi volumes`: a table of all volumes.

use clap::Args;
use serde::Serialize;

use super::{
    Exit, Failed,
    tools::{self, Output, Paint, ToolArgs, Tools},
};
use crate::{
    doctor::{
        book::State,
        rows::{self, Filter, Row},
        view::Depth,
    },
    types::Bytes,
};

/// What `proxmox-csi volumes` takes.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct VolumesArgs {
    #[command(flatten)]
    pub(super) tool: ToolArgs,

    /// List no storage: quick, without sizes, orphans and missing volumes
    #[arg(long)]
    fast: bool,

    /// Only those of this region
    #[arg(long, value_name = "REGION")]
    region: Option<String>,

    /// Only those on this storage
    #[arg(long, value_name = "STORAGE")]
    storage: Option<String>,

    /// Only those local to this Proxmox node
    #[arg(long, value_name = "PVE-NODE")]
    zone: Option<String>,

    /// Only those that this Node, or the VM of this name or VMID, holds
    #[arg(long, value_name = "NODE")]
    node: Option<String>,

    /// Only those whose claim is in this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,

    /// Only those that are doing this: attached, free, pending, holder, conflict, orphan, missing; may be given several times
    #[arg(long, value_name = "STATE", value_parser = state)]
    state: Vec<State>,
}

const EXAMPLES: &str = "\
Examples:
  proxmox-csi volumes --kubeconfig ~/.kube/config
      all volumes
  proxmox-csi volumes --state orphan --state missing
      what has no PV, and what no PV should name any more
  proxmox-csi volumes --node worker-3 -o wide
      what a node holds, with slots and WWNs
  proxmox-csi volumes -o json | jq '[.volumes[].size_bytes] | add'
      for programs: docs/tools.md has the fields

States: attached (one VM has it), free (none has), pending (one is to get or lose it at its next start), holder (a short-lived
VM of the driver has it), conflict (several have it), orphan (no PV and no VM), missing (its storage does not list it).
Exit codes: 0 all was seen, 2 the command line, 3 the configuration, 4 not all could be seen.";

fn state(text: &str) -> Result<State, String> {
    State::ALL
        .into_iter()
        .find(|state| state.as_str() == text)
        .ok_or_else(|| format!("it must be one of {}", State::ALL.map(State::as_str).join(", ")))
}

#[derive(Serialize)]
struct Document {
    schema: u32,
    command: &'static str,
    complete: bool,
    unseen: Vec<String>,
    volumes: Vec<Row>,
}

pub(super) async fn run(args: VolumesArgs) -> Result<Exit, Failed> {
    let tools = Tools::open(&args.tool).await?;
    let (view, book) = tools.look(Depth { servers: false, listings: !args.fast }).await;
    let filter = Filter {
        region: args.region,
        storage: args.storage,
        zone: args.zone,
        node: args.node,
        namespace: args.namespace,
        states: args.state,
    };
    let rows = rows::rows(&view, &book, &filter);
    let unseen = rows::gaps(&view, !args.fast);
    let complete = !rows::is_incomplete(&view);
    match args.tool.output {
        Output::Json => {
            tools::print_json(&Document { schema: 1, command: "volumes", complete, unseen, volumes: rows })?;
        }
        output => {
            tools::print(&shown(&rows, output == Output::Wide, Paint::of_stdout()));
            for gap in unseen {
                eprintln!("note: {gap}");
            }
        }
    }
    Ok(if complete { Exit::Success } else { Exit::Incomplete })
}

fn shown(rows: &[Row], wide: bool, paint: Paint) -> String {
    if rows.is_empty() {
        return "no volumes\n".to_owned();
    }
    let text = |value: Option<&str>| value.filter(|text| !text.is_empty()).unwrap_or("-").to_owned();
    let row = |row: &Row| {
        let size = row.size_bytes.map(|bytes| Bytes::new(bytes).to_string());
        let held = |one: &rows::HeldBy| {
            let node = one.node.as_deref().unwrap_or(&one.vm);
            match one.kind {
                "drive" => format!("{node} ({} {})", one.vmid, one.key),
                kind => format!("{node} ({} {kind} {})", one.vmid, one.key),
            }
        };
        let held = row.held_by.iter().map(held).collect::<Vec<_>>().join(", ");
        let mut cells = vec![
            row.handle.clone(),
            text(size.as_deref()),
            row.state.to_string(),
            text(Some(&held)),
            text(row.claim.as_deref().or(row.pv.as_deref())),
        ];
        if wide {
            cells.extend([
                text(row.pv.as_deref()),
                text(row.phase.as_deref()),
                text(row.storage_class.as_deref()),
                text(row.reclaim_policy.as_deref()),
                text(row.format.as_deref()),
                row.wwn.clone(),
                text(Some(&row.attachments.join(", "))),
            ]);
        }
        cells
    };
    let mut heads = vec!["VOLUME", "SIZE", "STATE", "HELD BY", "CLAIM"];
    if wide {
        heads.extend(["PV", "PHASE", "CLASS", "RECLAIM", "FORMAT", "WWN", "ATTACHMENT"]);
    }
    tools::table(&heads, &rows.iter().map(row).collect::<Vec<_>>(), paint)
}
