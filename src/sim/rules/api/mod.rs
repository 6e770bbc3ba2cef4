//! The API schema of pve-manager 9.2.11: which calls there are, who may make them, which parameters they take.
//!
//! `schema.json` is PVE's own `pvesh`-like dump, reduced to what is checked before a call is carried out; `more.json`
//! has calls that the dump left out, read in pve-access-control `API2/AccessControl.pm` and `API2/Domains.pm`. `find` is
//! the way in (pve-http-server `REST handler`: pve-common `RESTHandler.pm:find_handler`, `handle`).

mod check;
mod permission;

use super::schema::Params;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// A parameter, as `JSONSchema.pm` describes it.
#[derive(Debug, Deserialize)]
pub(super) struct Property {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    optional: bool,
    #[serde(default)]
    minimum: Option<f64>,
    #[serde(default)]
    maximum: Option<f64>,
    #[serde(default, rename = "enum")]
    words: Option<Vec<String>>,
    #[serde(default, rename = "maxLength")]
    longest: Option<usize>,
    #[serde(default, rename = "minLength")]
    shortest: Option<usize>,
    #[serde(default)]
    pattern: Option<String>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    requires: Option<String>,
}

/// One method of one path.
#[derive(Debug, Deserialize)]
pub struct Endpoint {
    #[serde(default)]
    parameters: BTreeMap<String, Property>,
    #[serde(default)]
    permissions: Option<Value>,
    /// Runs in pvedaemon, not in pveproxy.
    #[serde(default)]
    protected: u8,
    /// Handed on to the node of the path.
    #[serde(default)]
    proxyto: Option<String>,
}

impl Endpoint {
    /// Whether pveproxy hands the call on to pvedaemon.
    pub fn is_protected(&self) -> bool {
        self.protected != 0
    }

    /// Whether the call goes to the node in its path.
    pub fn is_proxied(&self) -> bool {
        self.proxyto.is_some()
    }

    /// Whether a caller needs no ticket.
    pub fn is_open(&self) -> bool {
        self.permissions.as_ref().is_some_and(|rule| rule["user"] == "world")
    }
}

/// A call that exists: its path pattern, its description, and the parameters in its path.
#[derive(Debug)]
pub struct Found {
    /// Path with `{name}` for parameters.
    pub pattern: &'static str,
    /// What the schema says of it.
    pub endpoint: &'static Endpoint,
    /// Parameters in the path.
    pub in_path: Params,
}

static SCHEMA: LazyLock<BTreeMap<String, BTreeMap<String, Endpoint>>> = LazyLock::new(|| {
    let read = |text: &str| -> BTreeMap<String, BTreeMap<String, Endpoint>> {
        serde_json::from_str(text).expect("the file is part of the source, and a test reads it")
    };
    let mut all = read(include_str!("schema.json"));
    all.extend(read(include_str!("more.json")));
    all
});

/// A step of a pattern.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Word(&'static str),
    /// A parameter.
    One(&'static str),
    /// The rest of the path: a volume id may stand there unencoded, with its slash.
    Rest(&'static str),
}

/// A call, its pattern taken apart.
struct Way {
    pattern: &'static str,
    steps: Vec<Step>,
    endpoint: &'static Endpoint,
}

/// All calls by their method.
static WAYS: LazyLock<BTreeMap<&'static str, Vec<Way>>> = LazyLock::new(|| {
    let mut all: BTreeMap<&'static str, Vec<Way>> = BTreeMap::new();
    for (pattern, methods) in &*SCHEMA {
        for (method, endpoint) in methods {
            let steps = pattern.split('/').filter(|step| !step.is_empty()).map(step_of).collect();
            all.entry(method.as_str()).or_default().push(Way { pattern, steps, endpoint });
        }
    }
    all
});

fn step_of(step: &'static str) -> Step {
    match step.strip_prefix('{').and_then(|step| step.strip_suffix('}')) {
        Some("volume") => Step::Rest("volume"),
        Some(name) => Step::One(name),
        None => Step::Word(step),
    }
}

/// The call of this method and path, `None` where PVE says that it is not implemented.
pub fn find(method: &str, path: &str) -> Option<Found> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let fitting = WAYS.get(method)?.iter().filter(|way| fits(&way.steps, &parts));
    // A fixed word wins over a parameter.
    let way =
        fitting.min_by_key(|way| way.steps.iter().filter(|step| !matches!(step, Step::Word(_))).count())?;
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let in_path = way.steps.iter().enumerate().filter_map(|(at, step)| match step {
        Step::Word(_) => None,
        Step::One(name) => Some(((*name).to_owned(), decode(parts.get(at)?))),
        Step::Rest(name) => Some(((*name).to_owned(), decode(&parts.get(at..)?.join("/")))),
    });
    Some(Found { pattern: way.pattern, endpoint: way.endpoint, in_path: in_path.collect() })
}

fn fits(steps: &[Step], parts: &[&str]) -> bool {
    let open = matches!(steps.last(), Some(Step::Rest(_)));
    let long_enough = if open { parts.len() >= steps.len() } else { parts.len() == steps.len() };
    long_enough
        && steps.iter().zip(parts).all(|(step, part)| match step {
            Step::Word(word) => word == part,
            Step::One(_) | Step::Rest(_) => true,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_ids_are_found_encoded_and_unencoded() {
        for path in [
            "/nodes/pve1/storage/local/content/local%3A9999%2Fvm-9999-x.raw",
            "/nodes/pve1/storage/local/content/local:9999/vm-9999-x.raw",
        ] {
            let found = find("GET", path).expect("the path is a call");
            assert_eq!(found.pattern, "/nodes/{node}/storage/{storage}/content/{volume}");
            assert_eq!(found.in_path["volume"], "local:9999/vm-9999-x.raw");
        }
        assert!(find("GET", "/nope").is_none());
        assert!(find("DELETE", "/version").is_none());
    }

    #[test]
    fn a_fixed_word_wins_over_a_parameter() {
        let found = find("GET", "/cluster/ha/status/current").expect("the path is a call");
        assert_eq!(found.pattern, "/cluster/ha/status/current");
    }
}
