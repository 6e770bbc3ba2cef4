//! Two answers side by side.

use super::ids::Ids;
use super::record::Response;
use serde_json::{Map, Value};

/// Numbers that are clocks, process ids, loads or sizes of the recording machine's disks: only their type counts.
const MEASURED: &[&str] = &[
    "pid",
    "pstart",
    "starttime",
    "endtime",
    "ctime",
    "snaptime",
    "uptime",
    "cpu",
    "mem",
    "memhost",
    "used",
    "avail",
    "used_fraction",
    "netin",
    "netout",
    "diskread",
    "diskwrite",
    "pressurecpufull",
    "pressurecpusome",
    "pressureiofull",
    "pressureiosome",
    "pressurememoryfull",
    "pressurememorysome",
    "saved",
    "cgroup-mode",
    "total-bytes",
    "used-bytes",
];

/// The same, but only of nodes and storages; of a VM they follow from its config.
const OF_MACHINES: &[&str] = &["disk", "maxdisk", "maxmem", "maxcpu", "total"];

/// What names an element of a list.
const NAMES: &[&str] =
    &["upid", "volid", "id", "key", "storage", "rule", "sid", "subdir", "tokenid", "vmid", "node", "name"];

/// Lists every difference.
pub(super) struct Comparison<'a> {
    ids: &'a mut Ids,
    differences: Vec<String>,
}

impl<'a> Comparison<'a> {
    pub(super) fn new(ids: &'a mut Ids) -> Self {
        Self { ids, differences: Vec::new() }
    }

    fn differ(&mut self, place: &str, recorded: &str, ours: &str) {
        self.differences.push(format!("{place}: recorded {recorded}, here {ours}"));
    }

    /// Compares whole answers and returns the differences.
    pub(super) fn responses(mut self, recorded: &Response, ours: &Response) -> Vec<String> {
        if recorded.status != ours.status {
            self.differ("status", &recorded.status.to_string(), &ours.status.to_string());
        }
        if let Some(reason) = &recorded.reason {
            let here = ours.reason.as_deref().unwrap_or_default();
            if !self.ids.same(reason, here) {
                self.differ("reason", &format!("`{reason}`"), &format!("`{here}`"));
            }
            if let (Some(wanted), Some(here)) = (&recorded.content_type, &ours.content_type)
                && wanted != here
            {
                self.differ("content type", &brief(wanted), &brief(here));
            }
        }
        let blank = |body: &Value| body.is_null() || body == "";
        if !(blank(&recorded.body) && blank(&ours.body)) {
            self.values("body", &recorded.body, &ours.body);
        }
        self.differences
    }

    fn values(&mut self, place: &str, recorded: &Value, ours: &Value) {
        match (recorded, ours) {
            (Value::Object(a), Value::Object(b)) => self.objects(place, a, b),
            (Value::Array(a), Value::Array(b)) => {
                self.lists(place, &without_progress(a), &without_progress(b));
            }
            (Value::String(a), Value::String(b)) => {
                if !self.ids.same(a, b) {
                    self.differ(place, &format!("`{a}`"), &format!("`{b}`"));
                }
            }
            (Value::Number(a), Value::Number(b)) if a.as_f64() == b.as_f64() => {}
            (a, b) if a == b => {}
            (a, b) => self.differ(place, &brief(a), &brief(b)),
        }
    }

    fn objects(&mut self, place: &str, recorded: &Map<String, Value>, ours: &Map<String, Value>) {
        let machine = |object: &Map<String, Value>| {
            object.contains_key("plugintype")
                || object.contains_key("avail")
                || object.get("type").is_some_and(|kind| kind == "node")
        };
        for (key, value) in recorded {
            let here = format!("{place}.{key}");
            let shown_progress = |data: Option<&Value>| {
                data.and_then(Value::as_array)
                    .is_some_and(|lines| lines.len() != without_progress(lines).len())
            };
            if key == "total" && shown_progress(recorded.get("data")) {
                continue;
            }
            let Some(other) = ours.get(key) else {
                self.differ(&here, &brief(value), "nothing");
                continue;
            };
            let measured = MEASURED.contains(&key.as_str())
                || (OF_MACHINES.contains(&key.as_str()) && machine(recorded))
                || place.contains(".blockstat.");
            if measured {
                if std::mem::discriminant(value) != std::mem::discriminant(other) {
                    self.differ(&here, &format!("{} ({})", brief(value), type_of(value)), type_of(other));
                }
            } else if key == "content" && value.is_string() && other.is_string() {
                // Hash order.
                let words = |value: &Value| {
                    let mut words: Vec<String> =
                        value.as_str().unwrap_or_default().split(',').map(str::to_owned).collect();
                    words.sort();
                    words
                };
                if words(value) != words(other) {
                    self.differ(&here, &brief(value), &brief(other));
                }
            } else {
                self.values(&here, value, other);
            }
        }
        for (key, value) in ours.iter().filter(|(key, _)| !recorded.contains_key(*key)) {
            self.differ(&format!("{place}.{key}"), "nothing", &brief(value));
        }
    }

    /// Lists whose elements have names are compared by name, as their order is that of a hash in PVE.
    fn lists(&mut self, place: &str, recorded: &[Value], ours: &[Value]) {
        let text = |value: &Value, key: &str| {
            value
                .get(key)
                .and_then(|v| v.as_str().map(str::to_owned).or_else(|| v.as_i64().map(|n| n.to_string())))
        };
        let unique = |list: &[Value], key: &str| {
            let mut names: Vec<Option<String>> = list.iter().map(|value| text(value, key)).collect();
            let all = names.iter().all(Option::is_some);
            names.sort();
            let count = names.len();
            names.dedup();
            all && names.len() == count
        };
        let name = NAMES.iter().find(|key| unique(recorded, key) && unique(ours, key) && **key != "upid");
        let Some(name) = name else {
            if recorded.len() != ours.len() {
                let all = |list: &[Value]| brief(&Value::Array(list.to_vec()));
                self.differ(
                    place,
                    &format!("{} elements {}", recorded.len(), all(recorded)),
                    &format!("{} {}", ours.len(), all(ours)),
                );
                return;
            }
            for (index, (a, b)) in recorded.iter().zip(ours).enumerate() {
                self.values(&format!("{place}[{index}]"), a, b);
            }
            return;
        };
        for value in recorded {
            let wanted = text(value, name).map(|wanted| self.ids.translate(&wanted));
            match ours.iter().find(|other| text(other, name) == wanted) {
                Some(other) => {
                    let label = wanted.unwrap_or_default();
                    self.values(&format!("{place}[{label}]"), value, other);
                }
                None => self.differ(place, &brief(value), "no such element"),
            }
        }
        for other in ours {
            let known = recorded.iter().any(|value| {
                text(value, name).map(|wanted| self.ids.translate(&wanted)) == text(other, name)
            });
            if !known {
                self.differ(place, "no such element", &brief(other));
            }
        }
    }
}

/// A task's log without what depends on the speed of the machine: the progress of a copy, and the numbers of lines
/// behind it.
fn without_progress(list: &[Value]) -> Vec<Value> {
    let text = |line: &Value| line.get("t").unwrap_or(line).as_str().unwrap_or_default().to_owned();
    let progress = |line: &&Value| text(line).starts_with("transferred ");
    if !list.iter().any(|line| progress(&line)) {
        return list.to_vec();
    }
    let mut rest: Vec<Value> = list.iter().filter(|line| !progress(line)).cloned().collect();
    for line in &mut rest {
        if let Some(line) = line.as_object_mut() {
            line.remove("n");
        }
    }
    rest
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    }
}

/// A value short enough for a line.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 240 {
        format!("{}…", text.chars().take(240).collect::<String>())
    } else {
        text
    }
}
