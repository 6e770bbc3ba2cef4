//! The tables, and the judgement over one path.

use crate::source::{Import, Source, Target};

/// What each layer may import beside itself. The longest row that begins a path is its layer; a new module needs a row.
const LAYERS: &[(&str, Allowed)] = &[
    ("types", Allowed::Only(&[])),
    ("pve", Allowed::Only(&["types", "telemetry"])),
    ("volume", Allowed::Only(&["pve", "types", "runtime", "telemetry"])),
    ("host", Allowed::Only(&["types"])),
    ("node", Allowed::Only(&["host", "types"])),
    // What both services share knows both sides; the services know one each.
    (
        "csi",
        Allowed::Only(&[
            "csi::controller",
            "csi::node",
            "volume",
            "pve",
            "node",
            "host",
            "types",
            "runtime",
            "telemetry",
        ]),
    ),
    ("csi::controller", Allowed::Only(&["csi", "volume", "pve", "types", "runtime", "telemetry"])),
    ("csi::node", Allowed::Only(&["csi", "node", "host", "types", "runtime", "telemetry"])),
    ("k8s", Allowed::Only(&["types", "runtime", "telemetry"])),
    ("ccm", Allowed::Only(&["k8s", "pve", "types", "runtime", "telemetry"])),
    // Looks at what both sides say and compares: the one room beside the driver itself that knows Proxmox and Kubernetes. What it
    // changes it changes through `volume`. It has no `csi` in it: an operator's tool speaks no gRPC.
    ("doctor", Allowed::Only(&["volume", "pve", "k8s", "types", "telemetry"])),
    // Never `pve` nor `volume`: two readings of the API, so that one mistake cannot cancel the other.
    ("sim", Allowed::Only(&["host", "types"])),
    ("config", Allowed::Only(&["types"])),
    ("runtime", Allowed::Only(&[])),
    ("telemetry", Allowed::Only(&[])),
    // The composition roots.
    ("cli", Allowed::Everything),
    ("main", Allowed::Everything),
    ("bin", Allowed::Everything),
];

/// Layers whose own tests may also use the simulator.
const TESTED_ON_SIM: &[&str] = &["pve", "volume", "node", "csi", "csi::controller", "csi::node", "ccm"];

/// External crates and paths that have one home, by module; a trailing `*` stands for the rest of a name.
const HOMES: &[(&str, &[&str])] = &[
    ("tonic", &["csi", "cli"]),
    ("tonic_prost", &["csi"]),
    ("reqwest", &["pve::transport*"]),
    ("axum", &["sim", "telemetry"]),
    ("askama", &["sim"]),
    ("nix", &["host::linux"]),
    ("sys_mount", &["host::linux"]),
    // A VM of the simulator can be a process; nothing else of it starts one.
    ("std::process::Command", &["host::linux", "cli", "sim::qemu"]),
    ("tokio::process", &["host::linux", "cli"]),
    ("clap", &["cli", "main", "bin"]),
    ("kube", &["k8s", "ccm"]),
    ("k8s_openapi", &["k8s", "ccm"]),
];

enum Allowed {
    Everything,
    Only(&'static [&'static str]),
}

/// What is wrong in a file, as `line: sentence`. `test_only`: the whole file is behind `#[cfg(test)]`.
pub(crate) fn violations(source: &Source, test_only: bool) -> Vec<String> {
    // The root names every layer; that is what it is for.
    if source.module.is_empty() {
        return Vec::new();
    }
    let Some((layer, allowed)) = layer_of(&source.module) else {
        return vec![format!(
            "1: module `{}` is of no layer: give it a row in tests/architecture/rules.rs",
            source.module.join("::")
        )];
    };
    let judge = |import: &Import| {
        let wrong = match &import.target {
            Target::Internal(path) => internal(layer, allowed, path, test_only || import.test),
            Target::External(path) => external(&source.module, path),
        };
        wrong.map(|what| format!("{}: {what}", import.line))
    };
    source.imports.iter().filter_map(judge).collect()
}

fn internal(layer: &str, allowed: &Allowed, path: &[String], test: bool) -> Option<String> {
    let Allowed::Only(allowed) = allowed else { return None };
    // `use crate as root`: what is taken through the name is judged where it is used.
    let first = path.first()?;
    if first == "*" {
        return Some(format!("`{layer}` imports everything from the crate's root: name what it needs"));
    }
    let shown = path.join("::");
    let Some((target, _)) = layer_of(path) else {
        return Some(format!("`{layer}` imports `crate::{shown}`, which is of no layer"));
    };
    if target == layer
        || allowed.contains(&target)
        || (test && target == "sim" && TESTED_ON_SIM.contains(&layer))
    {
        return None;
    }
    let may = if allowed.is_empty() {
        "no other layer".to_owned()
    } else {
        format!("only `{}`", allowed.join("`, `"))
    };
    Some(format!("`{layer}` imports `crate::{shown}`, but it may import {may}"))
}

fn external(module: &[String], path: &[String]) -> Option<String> {
    let (what, homes) = HOMES.iter().find(|(what, _)| reaches(path, what))?;
    if homes.iter().any(|home| is_below(module, home)) {
        return None;
    }
    let here = module.join("::");
    Some(format!("`{here}` names `{}`, but `{what}` stays in `{}`", path.join("::"), homes.join("`, `")))
}

/// Whether `path` names `what`, something in it, or takes it along with a glob.
fn reaches(path: &[String], what: &str) -> bool {
    let what: Vec<&str> = what.split("::").collect();
    let glob = path.last().is_some_and(|last| last == "*");
    let named = if glob { &path[..path.len() - 1] } else { path };
    let common = named.iter().zip(&what).take_while(|(a, b)| a == b).count();
    common == what.len() || (glob && common == named.len())
}

fn is_below(module: &[String], home: &str) -> bool {
    let segments: Vec<&str> = home.split("::").collect();
    segments.len() <= module.len()
        && segments.iter().zip(module).all(|(home, segment)| match home.strip_suffix('*') {
            Some(start) => segment.starts_with(start),
            None => segment == home,
        })
}

fn layer_of(path: &[String]) -> Option<(&'static str, &'static Allowed)> {
    let rows = LAYERS.iter().filter(|(layer, _)| is_below(path, layer));
    rows.max_by_key(|(layer, _)| layer.len()).map(|(layer, allowed)| (*layer, allowed))
}

/// Files past `limit` lines without a reason, and reasons for files that are not.
pub(crate) fn length_violations(
    lengths: &[(String, usize)],
    limit: usize,
    reasons: &[(&str, &str)],
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (file, lines) in lengths.iter().filter(|(_, lines)| *lines > limit) {
        if !reasons.iter().any(|(listed, reason)| listed == file && !reason.is_empty()) {
            wrong.push(format!(
                "{file}: {lines} lines: move its second subject out, or list it with a reason in tests/architecture.rs"
            ));
        }
    }
    for (listed, _) in reasons {
        if !lengths.iter().any(|(file, lines)| file == listed && *lines > limit) {
            wrong.push(format!("{listed}: listed as a long file, but it is not one: take it off the list"));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::module_of;

    fn wrong(file: &str, text: &str) -> Vec<String> {
        violations(&Source::parse(module_of(file), text), false)
    }

    #[test]
    fn what_stands_to_the_left_may_be_imported() {
        assert_eq!(
            wrong("src/volume/attach.rs", "use crate::{pve::Client, types::VmId}; use super::outcome;"),
            [""; 0]
        );
        assert_eq!(
            wrong("src/csi/controller.rs", "use crate::{csi::status, volume}; use tonic::Status;"),
            [""; 0]
        );
        assert_eq!(wrong("src/host/linux/exec.rs", "use tokio::process::Command; use nix::mount;"), [""; 0]);
        assert_eq!(wrong("src/cli/demo.rs", "use crate::{csi, sim, volume}; use clap::Parser;"), [""; 0]);
        assert_eq!(
            wrong("src/main.rs", "fn main() -> std::process::ExitCode { proxmox_csi::cli::main() }"),
            [""; 0]
        );
        assert_eq!(wrong("src/pve/transport_tls.rs", "use reqwest::Client;"), [""; 0]);
        assert_eq!(wrong("src/pve/transport/tls.rs", "use reqwest::Client;"), [""; 0]);
    }

    #[test]
    fn what_stands_to_the_right_may_not() {
        assert_eq!(
            wrong("src/types/vmid.rs", "\nuse crate::pve::Client;"),
            ["2: `types` imports `crate::pve::Client`, but it may import no other layer"]
        );
        assert_eq!(
            wrong("src/pve/task.rs", "use super::super::volume;"),
            ["1: `pve` imports `crate::volume`, but it may import only `types`, `telemetry`"]
        );
        assert_eq!(
            wrong("src/node/stage.rs", "fn f() { crate::csi::status::code(); }"),
            ["1: `node` imports `crate::csi::status::code`, but it may import only `host`, `types`"]
        );
        for (file, text) in [
            ("src/sim/world.rs", "use crate::pve;"),
            ("src/sim/world.rs", "use crate::{types, volume::Handle};"),
            ("src/sim/mod.rs", "#[cfg(test)] mod tests { use crate::pve::Client; }"),
            ("src/volume/create.rs", "use crate::host::Disk;"),
            ("src/volume/create.rs", "use crate::csi::proto;"),
            ("src/csi/node.rs", "use crate::volume::Handle;"),
            ("src/csi/node.rs", "use super::controller;"),
            ("src/csi/controller.rs", "use crate::node::stage;"),
            ("src/telemetry/log.rs", "use crate::runtime;"),
            ("src/runtime.rs", "use super::telemetry;"),
            ("src/ccm/labels.rs", "use crate::volume;"),
            ("src/pve/mod.rs", "pub use crate::sim::World;"),
        ] {
            assert_eq!(wrong(file, text).len(), 1, "{file}: {text}");
        }
    }

    #[test]
    fn the_root_is_no_way_around() {
        assert_eq!(
            wrong("src/pve/mod.rs", "use super::*;"),
            ["1: `pve` imports everything from the crate's root: name what it needs"]
        );
        assert_eq!(
            wrong("src/pve/mod.rs", "use crate::Thing;"),
            ["1: `pve` imports `crate::Thing`, which is of no layer"]
        );
        assert_eq!(wrong("src/pve/mod.rs", "use crate as root; fn f() { root::sim::boot(); }").len(), 1);
    }

    #[test]
    fn a_new_module_needs_a_row() {
        assert_eq!(
            wrong("src/backup/mod.rs", ""),
            ["1: module `backup` is of no layer: give it a row in tests/architecture/rules.rs"]
        );
    }

    #[test]
    fn the_simulator_may_serve_the_tests_of_a_layer() {
        let text = "#[cfg(test)] mod tests { use crate::sim::World; }";
        assert_eq!(wrong("src/volume/attach.rs", text), [""; 0]);
        assert_eq!(wrong("src/types/vmid.rs", text).len(), 1);
        assert_eq!(wrong("src/volume/attach.rs", "use crate::sim::World;").len(), 1);
        let whole_file = Source::parse(module_of("src/volume/tests.rs"), "use crate::sim::World;");
        assert_eq!(violations(&whole_file, true), [""; 0]);
    }

    #[test]
    fn external_crates_stay_at_home() {
        assert_eq!(
            wrong("src/volume/attach.rs", "use tonic::Status;"),
            ["1: `volume::attach` names `tonic::Status`, but `tonic` stays in `csi`, `cli`"]
        );
        for (file, text) in [
            ("src/pve/client.rs", "use reqwest::Client;"),
            ("src/pve/client.rs", "fn f() { ::reqwest::get(\"x\"); }"),
            ("src/csi/server.rs", "use axum::Router;"),
            ("src/host/mod.rs", "use nix::mount;"),
            ("src/sim/guest.rs", "use std::process::{Command, Stdio};"),
            ("src/sim/guest.rs", "use std::process; fn f() { process::Command::new(\"x\"); }"),
            ("src/sim/guest.rs", "use std::process::*;"),
            ("src/sim/guest.rs", "fn f() { tokio::process::Command::new(\"x\"); }"),
            ("src/node/stage.rs", "use sys_mount::Mount;"),
            ("src/config.rs", "#[derive(clap::Args)] struct A;"),
            ("src/cli/node.rs", "use kube::Client;"),
        ] {
            assert_eq!(wrong(file, text).len(), 1, "{file}: {text}");
        }
        assert_eq!(wrong("src/types/vmid.rs", "use std::process::ExitCode; use tokio::time;"), [""; 0]);
    }

    #[test]
    fn a_long_file_is_seen_and_a_stale_reason_too() {
        let lengths =
            [("src/a.rs".to_owned(), 500), ("src/b.rs".to_owned(), 501), ("src/c.rs".to_owned(), 900)];
        assert_eq!(
            length_violations(&lengths, 500, &[("src/a.rs", "why"), ("src/c.rs", "one table")]),
            [
                "src/b.rs: 501 lines: move its second subject out, or list it with a reason in tests/architecture.rs",
                "src/a.rs: listed as a long file, but it is not one: take it off the list",
            ]
        );
    }
}
