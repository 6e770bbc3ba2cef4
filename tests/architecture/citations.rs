//! The simulator names the source of each rule in Proxmox VE. What it names has to exist there: the fixture lists the
//! functions of the files, as facts of release 9.2.

use std::collections::{BTreeMap, BTreeSet};

/// Names by file, as `qemu-server/API2/Qemu.pm`.
pub(crate) type Known = BTreeMap<String, BTreeSet<String>>;

/// Reads the fixture: a file and its names per line.
pub(crate) fn known(text: &str) -> Known {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let entry = |line: &str| {
        let (file, names) = line.split_once(':')?;
        Some((file.to_owned(), names.split_whitespace().map(str::to_owned).collect()))
    };
    lines.filter_map(entry).collect()
}

/// The code spans of a comment, in order, with what stands between two of them.
fn spans(comment: &str) -> Vec<(&str, &str)> {
    let parts: Vec<&str> = comment.split('`').collect();
    parts.chunks(2).filter_map(|pair| Some((*pair.first()?, *pair.get(1)?))).collect()
}

/// Whether a span is the name of a Perl module's file.
fn is_module(span: &str) -> bool {
    std::path::Path::new(span).extension().is_some_and(|ending| ending == "pm")
}

/// What a comment cites: file and function. A span that follows a citation after a mere comma names another function of
/// the same file.
pub(crate) fn citations(comment: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut file: Option<&str> = None;
    for (before, span) in spans(comment) {
        let cited = span.split_once(':').filter(|(file, _)| is_module(file));
        match cited {
            Some((named, function)) => {
                file = Some(named);
                found.push((named.to_owned(), function.to_owned()));
            }
            // A bare file goes on to what follows it.
            None if is_module(span) => file = Some(span),
            None if before == ", " => found.extend(file.map(|file| (file.to_owned(), span.to_owned()))),
            None => file = None,
        }
    }
    found
}

/// Whether a citation is of a function that is there. A file is named by its path, or the end of it.
pub(crate) fn is_there(known: &Known, file: &str, function: &str) -> bool {
    let ending = format!("/{file}");
    known.iter().any(|(path, names)| path.ends_with(&ending) && names.contains(function))
}

/// The doc comments of a file as running text, each with the first line that follows it.
pub(crate) fn docs(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut comment = String::new();
    for line in text.lines() {
        let line = line.trim();
        let doc = line
            .strip_prefix("///")
            .or_else(|| line.strip_prefix("//!"))
            .or_else(|| line.strip_prefix("// "));
        match doc {
            Some(more) => {
                comment.push(' ');
                comment.push_str(more.trim());
            }
            // Attributes belong to what they stand on.
            None if line.starts_with("#[") => {}
            None => found.push((std::mem::take(&mut comment).trim().to_owned(), line.to_owned())),
        }
    }
    found
}

/// The name of a function that other modules can call, in the line that begins it.
pub(crate) fn shared_function(line: &str) -> Option<&str> {
    let rest =
        ["pub fn ", "pub(crate) fn ", "pub(super) fn ", "pub(super) async fn ", "pub(crate) async fn "]
            .into_iter()
            .find_map(|start| line.strip_prefix(start))?;
    rest.split(['(', '<']).next()
}

#[test]
fn a_citation_is_read_from_running_text() {
    let text = "What changes (qemu-server `API2/Qemu.pm:vm_start`, `vm_stop`, `QemuServer.pm:vm_start_nolock`). The key \
                `lock`, `name` are others; `AbstractConfig.pm`, `check_lock` is one.";
    let pair = |file: &str, name: &str| (file.to_owned(), name.to_owned());
    assert_eq!(
        citations(text),
        [
            pair("API2/Qemu.pm", "vm_start"),
            pair("API2/Qemu.pm", "vm_stop"),
            pair("QemuServer.pm", "vm_start_nolock"),
            pair("AbstractConfig.pm", "check_lock"),
        ]
    );
    let known = known("# facts\nqemu-server/API2/Qemu.pm: vm_start vm_stop\n");
    assert!(is_there(&known, "API2/Qemu.pm", "vm_stop") && is_there(&known, "Qemu.pm", "vm_stop"));
    assert!(!is_there(&known, "API2/Qemu.pm", "vm_fly") && !is_there(&known, "Fly.pm", "vm_stop"));
}

#[test]
fn a_comment_belongs_to_the_function_behind_it() {
    let text = "//! Head.\n\n/// One\n/// line.\n#[must_use]\npub(super) fn of(x: u8) {}\n";
    let found = docs(text);
    assert!(found.contains(&("One line.".to_owned(), "pub(super) fn of(x: u8) {}".to_owned())), "{found:?}");
    assert_eq!(shared_function("pub(super) async fn of<'a>(x: &'a u8) {"), Some("of"));
    assert_eq!(shared_function("fn of() {"), None);
}
