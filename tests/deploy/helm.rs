//! What helm makes of the chart.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use serde_json::Value;

/// Release and namespace of what is rendered, where nothing else is said.
pub(crate) const RELEASE: &str = "proxmox-csi";
pub(crate) const NAMESPACE: &str = "csi-proxmox";
/// The Kubernetes that is rendered for: that of the API server of the tests.
pub(crate) const KUBERNETES: &str = "v1.36.3";

/// A file of the repository.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A program of `tests/deploy/bin`, which is built if need be.
pub(crate) fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let built = Command::new(path("tests/deploy/build.sh")).status().expect("bash runs");
        assert!(built.success(), "tests/deploy/build.sh failed, see above");
    });
    path("tests/deploy/bin").join(name)
}

pub(crate) fn helm(arguments: &[&str]) -> Output {
    let empty = tempfile::tempdir().expect("a directory");
    Command::new(program("helm"))
        .args(arguments)
        .current_dir(path(""))
        // Nothing of the person who runs it.
        .env_clear()
        .env("HOME", empty.path())
        .output()
        .expect("helm runs")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A rendering of the chart.
#[derive(Clone, Copy)]
pub(crate) struct Rendering<'a> {
    pub(crate) chart: &'a str,
    pub(crate) release: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) kubernetes: &'a str,
    /// Files of values, below the root of the repository.
    pub(crate) values: &'a [&'a str],
    pub(crate) set: &'a [&'a str],
}

impl Default for Rendering<'_> {
    fn default() -> Self {
        Self {
            chart: "deploy/chart",
            release: RELEASE,
            namespace: NAMESPACE,
            kubernetes: KUBERNETES,
            values: &[],
            set: &[],
        }
    }
}

impl Rendering<'_> {
    fn run(&self) -> Output {
        let mut arguments = vec!["template", self.release, self.chart, "--namespace", self.namespace];
        arguments.extend(["--kube-version", self.kubernetes]);
        arguments.extend(self.values.iter().flat_map(|file| ["--values", file]));
        arguments.extend(self.set.iter().flat_map(|set| ["--set", set]));
        helm(&arguments)
    }

    /// What is rendered, as text.
    #[track_caller]
    pub(crate) fn text(&self) -> String {
        let output = self.run();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    }

    /// The objects.
    #[track_caller]
    pub(crate) fn objects(&self) -> Vec<Value> {
        objects(&self.text())
    }

    /// What helm says when it refuses to render this.
    #[track_caller]
    pub(crate) fn refusal(&self) -> String {
        let output = self.run();
        assert!(!output.status.success(), "it is rendered: {}", text(&output.stdout));
        text(&output.stderr)
    }

    /// Writes what is rendered into a directory, as a file of this name.
    #[track_caller]
    pub(crate) fn write(&self, directory: &Path, name: &str) -> PathBuf {
        let file = directory.join(name);
        fs::write(&file, self.text()).expect("a file");
        file
    }
}

/// The objects of a YAML stream.
pub(crate) fn objects(stream: &str) -> Vec<Value> {
    let stream = format!("\n{stream}");
    let documents = stream.split("\n---").filter(|text| {
        text.lines().skip(1).any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
    });
    documents
        .map(|text| serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error}:\n{text}")))
        .collect()
}

/// The object of a kind and name.
#[track_caller]
pub(crate) fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("there is no {kind} `{name}`"))
}

/// Kind and name of each object, sorted.
pub(crate) fn names(objects: &[Value]) -> Vec<String> {
    let name = |object: &Value| {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        format!("{} {}", text(&object["kind"]), text(&object["metadata"]["name"]))
    };
    let mut all: Vec<String> = objects.iter().map(name).collect();
    all.sort();
    all
}

/// A container of the pods of a workload.
#[track_caller]
pub(crate) fn container<'a>(workload: &'a Value, name: &str) -> &'a Value {
    let containers = workload["spec"]["template"]["spec"]["containers"].as_array().expect("containers");
    containers
        .iter()
        .find(|container| container["name"] == name)
        .unwrap_or_else(|| panic!("no container `{name}`"))
}

/// The arguments of a container.
pub(crate) fn arguments(container: &Value) -> Vec<String> {
    let arguments = container["args"].as_array().expect("arguments");
    arguments.iter().map(|argument| argument.as_str().expect("text").to_owned()).collect()
}
