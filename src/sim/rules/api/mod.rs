//! The API schema of pve-manager 9.2.11: which calls there are, who may make them, which parameters they take.
//!
//! `schema.json` is PVE's own `pvesh`-like dump, reduced to what is checked before a call is carried out; `more.json`
//! has calls that the dump left out, read in pve-access-control `API2/AccessControl.pm` and `API2/Domains.pm` and pve-manager `API2/Nodes.pm`. `find` is
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
    /// Whether a token will do.
    #[serde(default = "yes")]
    allowtoken: u8,
}

fn yes() -> u8 {
    1
}

impl Endpoint {
    /// Whether pveproxy hands the call on to pvedaemon (pve-manager `HTTPServer.pm:rest_handler`).
    pub fn is_protected(&self) -> bool {
        self.protected != 0
    }

    /// Whether the call goes to the node in its path (pve-manager `HTTPServer.pm:rest_handler`).
    pub fn is_proxied(&self) -> bool {
        self.proxyto.is_some()
    }

    /// Whether a token will do, or it takes a ticket (pve-manager `HTTPServer.pm:rest_handler`).
    pub fn allows_tokens(&self) -> bool {
        self.allowtoken != 0
    }

    /// Whether a caller needs no ticket (pve-manager `HTTPServer.pm:auth_handler`).
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

/// A call, its pattern taken apart.
struct Way {
    pattern: &'static str,
    /// Which step of the path each parameter is.
    in_path: Vec<(usize, &'static str)>,
    endpoint: &'static Endpoint,
}

/// All calls as a tree of the steps of their paths.
#[derive(Default)]
struct Branch {
    words: BTreeMap<&'static str, Branch>,
    /// A parameter.
    any: Option<Box<Branch>>,
    /// Calls that end here, by method.
    ends: BTreeMap<&'static str, Way>,
    /// Calls whose last parameter takes the rest of the path: a volume id may stand there unencoded, with its slash.
    open: BTreeMap<&'static str, Way>,
}

static TREE: LazyLock<Branch> = LazyLock::new(|| {
    let mut tree = Branch::default();
    for (pattern, methods) in &*SCHEMA {
        for (method, endpoint) in methods {
            let mut at = &mut tree;
            let mut in_path = Vec::new();
            let mut open = false;
            for (index, step) in pattern.split('/').filter(|step| !step.is_empty()).enumerate() {
                match step.strip_prefix('{').and_then(|step| step.strip_suffix('}')) {
                    Some(name) => {
                        in_path.push((index, name));
                        open = name == "volume";
                        if !open {
                            at = at.any.get_or_insert_default();
                        }
                    }
                    None => at = at.words.entry(step).or_default(),
                }
            }
            let ways = if open { &mut at.open } else { &mut at.ends };
            ways.insert(method, Way { pattern, in_path, endpoint });
        }
    }
    tree
});

impl Branch {
    /// A fixed word wins over a parameter.
    fn find<'a>(&'a self, method: &str, parts: &[&str]) -> Option<&'a Way> {
        let Some((first, rest)) = parts.split_first() else { return self.ends.get(method) };
        let word = self.words.get(*first).and_then(|branch| branch.find(method, rest));
        let any = || self.any.as_ref()?.find(method, rest);
        word.or_else(any).or_else(|| self.open.get(method))
    }
}

/// The call of this method and path, `None` where PVE says that it is not implemented
/// (`RESTHandler.pm:find_handler`).
pub fn find(method: &str, path: &str) -> Option<Found> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let way = TREE.find(method, &parts)?;
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let in_path = way.in_path.iter().filter_map(|(at, name)| {
        let value = match *name {
            "volume" => decode(&parts.get(*at..)?.join("/")),
            _ => decode(parts.get(*at)?),
        };
        Some(((*name).to_owned(), value))
    });
    Some(Found { pattern: way.pattern, endpoint: way.endpoint, in_path: in_path.collect() })
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
