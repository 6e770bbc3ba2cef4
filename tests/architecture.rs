//! Keeps the layers of the crate apart, as `src/lib.rs` draws them.
//!
//! `tokens` and `source` turn a file into the paths its code names, whatever way they are written; `rules` holds the
//! tables and judges each path. Read the tables in `rules` first; a new module needs a row there. All of it is tested
//! on snippets, so that the checker itself can fail.

use std::fs;
use std::path::{Path, PathBuf};

#[path = "architecture/citations.rs"]
mod citations;
#[path = "architecture/rules.rs"]
mod rules;
#[path = "architecture/source.rs"]
mod source;
#[path = "architecture/tokens.rs"]
mod tokens;

use source::Source;

/// Files past `COMFORTABLE` lines, each with the reason why it has no second subject to move out.
const LONG_FILES: &[(&str, &str)] = &[];

/// Past this a file has to be listed in `LONG_FILES`.
const COMFORTABLE: usize = 500;

/// Placeholders that must not be committed.
const BANNED_MACROS: &[&str] = &["todo", "unimplemented", "dbg"];

#[test]
fn layers_import_only_what_stands_to_their_left() {
    let files = sources(&["src"]);
    let mut wrong: Vec<String> = Vec::new();
    for (path, source) in &files {
        let is_below = |module: &Vec<String>| source.module.starts_with(module);
        let test_only = files.iter().any(|(_, other)| other.test_modules.iter().any(is_below));
        wrong.extend(rules::violations(source, test_only).into_iter().map(|v| format!("{path}:{v}")));
    }
    assert!(wrong.is_empty(), "{} breaches of the layers:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn no_placeholder_is_left_in_the_code() {
    let found: Vec<String> = sources(&["src", "tests", "benches", "examples"])
        .iter()
        .flat_map(|(path, source)| {
            let calls = source.macro_calls(BANNED_MACROS);
            calls.into_iter().map(move |(line, name)| format!("{path}:{line}: `{name}!` is a placeholder"))
        })
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_long_file_has_its_reason() {
    let lengths: Vec<(String, usize)> =
        rust_files(&["src"]).into_iter().map(|path| (name_of(&path), read(&path).lines().count())).collect();
    let wrong = rules::length_violations(&lengths, COMFORTABLE, LONG_FILES);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Functions of the simulator's rules and calls that decide nothing that Proxmox decides.
const OURS: &[&str] = &[
    "api/cluster.rs merge",
    "api/copy.rs on_volume",
    "api/files.rs key_of",
    "api/files.rs named",
    "api/ha.rs change",
    "api/ha.rs digest",
    "api/ha.rs section",
    "api/ha.rs vmid_of",
    "api/ha.rs with",
    "api/hotplug.rs blocking_on_guest",
    "api/mod.rs perform",
    "api/power.rs cut",
    "api/update.rs run_locked",
    "api/volume.rs copy",
    "rules/conf.rs has_pending",
    "rules/conf.rs uuid",
    "rules/drive.rs flag",
    "rules/drive.rs index_of",
    "rules/error.rs die",
    "rules/error.rs message",
    "rules/error.rs parameter",
    "rules/error.rs status",
    "rules/order.rs draw",
    "rules/order.rs new",
    "rules/plugin/mod.rs format_named",
    "rules/roles.rs bit",
    "rules/roles.rs names",
];

#[test]
fn each_rule_of_the_simulator_names_a_source_that_is_there() {
    let known = citations::known(include_str!("fixtures/pve-functions.txt"));
    let mut wrong = Vec::new();
    for path in rust_files(&["src/sim"]) {
        let (name, text) = (name_of(&path), read(&path));
        let short = name.trim_start_matches("src/sim/");
        let is_rule = short.starts_with("rules/") || short.starts_with("api/");
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (comment, line) in citations::docs(code) {
            let cited = citations::citations(&comment);
            let missing =
                cited.iter().filter(|(file, function)| !citations::is_there(&known, file, function));
            wrong.extend(missing.map(|(file, function)| format!("{name}: `{file}:{function}` is not there")));
            let rule = citations::shared_function(&line)
                .filter(|_| is_rule && !comment.contains(".pm") && !comment.contains(".c:"));
            let ours = |rule: &&str| OURS.contains(&format!("{short} {rule}").as_str());
            wrong.extend(
                rule.filter(|rule| !ours(rule)).map(|rule| format!("{name}: `{rule}` names no source")),
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a document calls a test is one: in the tables of these, each name in backquotes that is a sentence.
#[test]
fn every_test_that_a_document_names_exists() {
    let mut known = std::collections::BTreeSet::new();
    for path in rust_files(&["src", "tests", "examples"]) {
        for word in read(&path).split("fn ").skip(1) {
            let name = word.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next();
            known.extend(name.map(str::to_owned));
        }
    }
    let mut named = 0;
    let mut missing = Vec::new();
    for document in ["docs/testing.md", "docs/compatibility.md"] {
        let text = read(&crate_root().join(document));
        for line in text.lines().filter(|line| line.starts_with('|')) {
            let quoted = line.split('`').skip(1).step_by(2);
            let is_sentence = |name: &&str| {
                name.matches('_').count() >= 3
                    && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            };
            for name in quoted.filter(is_sentence) {
                named += 1;
                if !known.contains(name) {
                    missing.push(format!("{document}: `{name}`"));
                }
            }
        }
    }
    assert!(named > 100, "only {named} names were found");
    assert!(missing.is_empty(), "no such test:\n{}", missing.join("\n"));
}

/// Every Rust file below `roots` of the crate, read; fails when there is none, so that no check passes on nothing.
fn sources(roots: &[&str]) -> Vec<(String, Source)> {
    rust_files(roots)
        .iter()
        .map(|path| {
            let name = name_of(path);
            let source = Source::parse(source::module_of(&name), &read(path));
            (name, source)
        })
        .collect()
}

fn rust_files(roots: &[&str]) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories: Vec<PathBuf> =
        roots.iter().map(|root| crate_root().join(root)).filter(|root| root.exists()).collect();
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory)
            .unwrap_or_else(|error| panic!("cannot list `{}`: {error}", directory.display()));
        for entry in entries {
            let path = entry.expect("a directory that was opened can be listed").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    assert!(!files.is_empty(), "no Rust file below {roots:?}");
    files.sort();
    files
}

fn crate_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn name_of(path: &Path) -> String {
    let name = path.strip_prefix(crate_root()).expect("it was found below the root");
    name.to_str().expect("a file name in UTF-8").to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("cannot read `{}`: {error}", path.display()))
}
