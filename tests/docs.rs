//! The documents: what they link to is there, heading and all, and the table of contents of the site names each page.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All pages, by their path.
fn pages() -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    for directory in ["", "docs", "deploy/cozystack"] {
        for entry in fs::read_dir(root().join(directory)).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let text = fs::read_to_string(&path).expect("text");
                all.insert(path, text);
            }
        }
    }
    assert!(all.len() > 15, "{:?}", all.keys());
    all
}

/// The text without blocks of code, in which brackets mean something else.
fn prose(text: &str) -> String {
    let mut in_code = false;
    let mut prose = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if !in_code {
            // Nor code within a line.
            prose.extend(line.split('`').step_by(2));
            prose.push('\n');
        }
    }
    prose
}

/// What a page links to.
fn links(text: &str) -> Vec<String> {
    let prose = prose(text);
    prose
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .map(|(link, _)| link.to_owned())
        .collect()
}

/// The name by which a heading is linked to, as GitHub and mdBook make it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    let mut in_code = false;
    let mut all = BTreeSet::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if let Some(heading) = line.strip_prefix('#').filter(|_| !in_code) {
            all.insert(anchor(heading.trim_start_matches('#').trim().trim_matches('`')));
        }
    }
    all
}

#[test]
fn every_link_leads_somewhere() {
    let pages = pages();
    let mut dead = Vec::new();
    let mut followed = 0;
    for (page, text) in &pages {
        // Its links are those of the site, where the pages of the root lie beside the others.
        if page.ends_with("docs/SUMMARY.md") {
            continue;
        }
        for link in links(text) {
            if link.starts_with("http://") || link.starts_with("https://") {
                continue;
            }
            followed += 1;
            let (file, fragment) = link.split_once('#').unwrap_or((&link, ""));
            let target =
                if file.is_empty() { page.clone() } else { page.parent().expect("a directory").join(file) };
            let Ok(target) = target.canonicalize() else {
                dead.push(format!("{}: {link}", page.display()));
                continue;
            };
            if !fragment.is_empty() {
                let text = fs::read_to_string(&target).expect("text");
                if !anchors(&text).contains(fragment) {
                    dead.push(format!("{}: {link}: no such heading", page.display()));
                }
            }
        }
    }
    assert!(followed > 50, "only {followed} links were found");
    assert!(dead.is_empty(), "dead links:\n{}", dead.join("\n"));
}

/// mdBook leaves out what its summary does not name.
#[test]
fn the_site_has_every_page() {
    let summary = fs::read_to_string(root().join("docs/SUMMARY.md")).expect("a summary");
    let named: BTreeSet<String> = links(&summary).into_iter().collect();
    let mut there: BTreeSet<String> =
        ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"].map(str::to_owned).into();
    for entry in fs::read_dir(root().join("docs")).expect("a directory") {
        there.insert(entry.expect("an entry").file_name().into_string().expect("text"));
    }
    there.remove("SUMMARY.md");
    assert_eq!(named, there);
}

/// So that no link of the site leads out of it: the copy of the pages has its own places for those of the root (deploy/book/build.sh).
#[test]
fn pages_of_the_site_link_to_pages_of_the_site() {
    let summary = fs::read_to_string(root().join("docs/SUMMARY.md")).expect("a summary");
    let named: BTreeSet<String> = links(&summary).into_iter().collect();
    let mut outside = Vec::new();
    for (page, text) in pages() {
        let name = page.file_name().expect("a name").to_str().expect("text");
        if !named.contains(name) || page.parent() == Some(&root().join("deploy/cozystack")) {
            continue;
        }
        for link in
            links(&text).into_iter().filter(|link| !link.starts_with("http") && !link.starts_with('#'))
        {
            let file = link.split('#').next().expect("a file");
            let target = file.strip_prefix("../").or_else(|| file.strip_prefix("docs/")).unwrap_or(file);
            if !named.contains(target) {
                outside.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(outside.is_empty(), "links that the site does not have:\n{}", outside.join("\n"));
}
