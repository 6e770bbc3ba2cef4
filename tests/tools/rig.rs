//! A cluster in order: a Proxmox of two nodes, three workers, a Kubernetes that knows them, and the tools over both.

use std::{collections::BTreeMap, path::PathBuf, process::Stdio};

use proxmox_csi::{
    pve::{Client, client::Token},
    sim::{
        Sim, World,
        http::{Listening, Tls},
    },
    telemetry::metrics::Metrics,
    types::VmId,
    volume::{Settings, Volumes},
};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::{
    apiserver::ApiServer,
    support::{Bench, HOLDER, REGION, in_process, nodes_of},
};

pub const NODES: &str = "/api/v1/nodes";
pub const PODS: &str = "/api/v1/pods";
pub const PVS: &str = "/api/v1/persistentvolumes";
pub const CSINODES: &str = "/apis/storage.k8s.io/v1/csinodes";
pub const CLASSES: &str = "/apis/storage.k8s.io/v1/storageclasses";
pub const ATTACHMENTS: &str = "/apis/storage.k8s.io/v1/volumeattachments";
pub const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/proxmox/leases";
pub const DRIVER: &str = "csi.proxmox.sinextra.dev";
const OWNER: u32 = 900_000_000;

pub struct Rig {
    pub bench: Bench,
    pub server: ApiServer,
    pub directory: tempfile::TempDir,
    pub tls: Tls,
    listening: Listening,
}

/// What a command said.
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    /// The findings of `-o json`, as `severity code subject`.
    pub fn findings(&self) -> Vec<String> {
        let document: Value =
            serde_json::from_str(&self.out).unwrap_or_else(|_| panic!("{}{}", self.out, self.err));
        let word = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
        let findings = document["findings"].as_array().cloned().unwrap_or_default();
        findings
            .iter()
            .map(|one| ["severity", "code", "subject"].map(|key| word(one, key)).join(" "))
            .collect()
    }

    /// Standard output with what changes from run to run taken out, and the exit code.
    pub fn shown(&self) -> String {
        assert_eq!(self.err, "", "nothing is said on standard error where nobody watches");
        format!("exit code {}\n{}", self.code, self.out)
    }
}

/// A world in which nothing is wrong.
pub fn world() -> World {
    let mut world = World::builtin();
    for storage in &mut world.storages {
        storage.is_mountpoint = storage.id != "local";
    }
    for vm in &mut world.vms {
        vm.config.insert("agent".to_owned(), "1".to_owned());
    }
    world
}

impl Rig {
    pub async fn start() -> Self {
        Self::with(world(), HOLDER).await
    }

    /// A world, and the token that driver and tools use.
    pub async fn with(world: World, token: &str) -> Self {
        let secret = world.token(token).expect("the world has the token").secret.clone();
        let token = Token { id: token.to_owned(), secret };
        let directory = tempfile::tempdir().expect("a directory");
        let sim = Sim::in_memory(world).expect("the world can be made");
        let tls = Tls::generate(&[]).expect("certificates");
        let any = "127.0.0.1:0".parse().expect("an address");
        let listening = sim.listen(any, &tls).await.expect("a free port");

        let client =
            Client::new(REGION.parse().expect("a region"), in_process(&sim), &token, Metrics::default());
        let settings =
            Settings { owner: VmId::new(OWNER).expect("a VMID"), holders: 999_990_000..=999_999_999 };
        let volumes = Volumes::new(vec![client.expect("a legal token")], nodes_of(&sim), settings);
        let rig =
            Self { bench: Bench::of(sim, volumes), server: ApiServer::default(), directory, tls, listening };
        rig.write("ca.pem", rig.tls.ca_pem());
        rig.configure(&token, |_| {});
        let address = rig.server.listen().await;
        rig.write(
            "kubeconfig",
            &json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
                "users": [{"name": "u", "user": {}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "proxmox"}}]})
            .to_string(),
        );
        for (vmid, zone) in [(101, "pve1"), (102, "pve1"), (103, "pve2")] {
            rig.put_node(vmid, zone);
        }
        rig.put_class("shared", &json!({"storage": "shared"}));
        rig.put_class("local", &json!({"storage": "data"}));
        rig
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.listening.address())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("a file");
    }

    /// Writes the configuration of a cluster in order, changed by `edit`.
    pub fn configure(&self, token: &Token, edit: impl FnOnce(&mut Value)) {
        let mut config = json!({
            "features": {"controllerVmID": OWNER},
            "clusters": [{"region": REGION, "ca_file": self.path("ca.pem"), "url": self.url(),
                "token_id": token.id, "token_secret": token.secret}],
        });
        edit(&mut config);
        self.write("config.yaml", &config.to_string());
    }

    /// Changes the configuration.
    pub fn reconfigure(&self, edit: impl FnOnce(&mut Value)) {
        let text = std::fs::read_to_string(self.path("config.yaml")).expect("it was written");
        let mut config: Value = serde_json::from_str(&text).expect("it is JSON");
        edit(&mut config);
        self.write("config.yaml", &config.to_string());
    }

    pub fn put_node(&self, vmid: u32, zone: &str) {
        let uuid = self.bench.sim.vm(vmid).and_then(|vm| vm.conf.uuid().map(str::to_owned)).expect("a uuid");
        let name = format!("worker-{vmid}");
        self.server.put(
            NODES,
            json!({"apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "labels": {
                    "topology.kubernetes.io/region": REGION, "topology.kubernetes.io/zone": zone}},
                "spec": {"providerID": format!("proxmox://{REGION}/{vmid}")},
                "status": {"conditions": [{"type": "Ready", "status": "True"}],
                    "nodeInfo": {"systemUUID": uuid, "architecture": "", "bootID": "",
                        "containerRuntimeVersion": "", "kernelVersion": "", "kubeProxyVersion": "",
                        "kubeletVersion": "", "machineID": "", "operatingSystem": "", "osImage": ""}}}),
        );
        self.server.put(
            CSINODES,
            json!({"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": name},
                "spec": {"drivers": [{"name": DRIVER, "nodeID": name, "allocatable": {"count": 24},
                    "topologyKeys": ["topology.kubernetes.io/region", "topology.kubernetes.io/zone"]}]}}),
        );
    }

    pub fn put_class(&self, name: &str, parameters: &Value) {
        self.server.put(
            CLASSES,
            json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name},
                "provisioner": DRIVER, "parameters": parameters, "volumeBindingMode": "WaitForFirstConsumer"}),
        );
    }

    /// A PV of a volume, bound to the claim `shop/NAME`.
    pub fn put_pv(&self, name: &str, handle: &str) {
        let mut expressions =
            vec![json!({"key": "topology.kubernetes.io/region", "operator": "In", "values": [REGION]})];
        let zone = handle.split('/').nth(1).unwrap_or_default();
        if !zone.is_empty() {
            expressions
                .push(json!({"key": "topology.kubernetes.io/zone", "operator": "In", "values": [zone]}));
        }
        self.server.put(
            PVS,
            json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
                "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"],
                    "persistentVolumeReclaimPolicy": "Delete", "storageClassName": "shared",
                    "claimRef": {"namespace": "shop", "name": name},
                    "csi": {"driver": DRIVER, "volumeHandle": handle, "volumeAttributes": {"storage": "shared"}},
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": expressions}]}}},
                "status": {"phase": "Bound"}}),
        );
    }

    /// A VolumeAttachment `va-PV` of a PV to a Node, with what the driver said.
    pub fn put_attachment(&self, pv: &str, node: &str, context: &BTreeMap<String, String>) {
        self.server.put(
            ATTACHMENTS,
            json!({"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment",
                "metadata": {"name": format!("va-{pv}")},
                "spec": {"attacher": DRIVER, "nodeName": node, "source": {"persistentVolumeName": pv}},
                "status": {"attached": true, "attachmentMetadata": context}}),
        );
    }

    pub fn put_pod(&self, name: &str, node: &str, claim: &str) {
        self.server.put(
            PODS,
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop"},
                "spec": {"nodeName": node, "containers": [{"name": "c"}],
                    "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": claim}}]},
                "status": {"phase": "Running"}}),
        );
    }

    /// A volume with its PV.
    pub async fn volume(&self, name: &str, storage: &str) -> String {
        let volume = self.bench.volume(name, storage).await;
        self.put_pv(name, &volume.volume_id);
        volume.volume_id
    }

    /// A volume with its PV, attached to a node, with its VolumeAttachment.
    pub async fn attached(&self, name: &str, storage: &str, node: &str) -> String {
        let volume = self.volume(name, storage).await;
        let context = self.bench.attach(&volume, node).await.expect("attached");
        self.put_attachment(name, node, &context);
        volume
    }

    async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        for _ in 0..200 {
            if holds() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("not within 10 s: {what}");
    }

    /// Waits for the task that makes a VM.
    pub async fn until_vm(&self, vmid: u32) {
        self.until("a VM", || self.bench.sim.vm(vmid).is_some_and(|vm| vm.current("lock").is_none())).await;
    }

    /// Waits for the task that starts a VM.
    pub async fn until_running(&self, vmid: u32) {
        self.until("a VM that runs", || self.bench.sim.vm(vmid).is_some_and(|vm| vm.running)).await;
    }

    /// Waits for the task that fills a slot.
    pub async fn until_slot(&self, vmid: u32, key: &str) {
        self.until("a slot", || self.bench.sim.vm(vmid).is_some_and(|vm| vm.current(key).is_some())).await;
    }

    /// Waits for the task that takes a snapshot.
    pub async fn until_snapshot(&self, vmid: u32) {
        let done =
            |vm: proxmox_csi::sim::VmView| !vm.conf.snapshots.is_empty() && vm.current("lock").is_none();
        self.until("a snapshot", || self.bench.sim.vm(vmid).is_some_and(done)).await;
    }

    /// Runs a tool with the configuration and the kubeconfig.
    pub async fn tool(&self, arguments: &[&str]) -> Said {
        let kubeconfig = format!("--kubeconfig={}", self.path("kubeconfig").display());
        let all: Vec<&str> = arguments.iter().copied().chain([kubeconfig.as_str()]).collect();
        self.tool_without_cluster(&all).await
    }

    /// Runs a tool with the configuration alone.
    pub async fn tool_without_cluster(&self, arguments: &[&str]) -> Said {
        let output = Command::new(env!("CARGO_BIN_EXE_proxmox-csi"))
            .args(arguments)
            .arg(format!("--cloud-config={}", self.path("config.yaml").display()))
            .env_remove("KUBECONFIG")
            .env_remove("RUST_LOG")
            .env("HOSTNAME", "test")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .expect("the binary runs");
        assert_eq!(self.bench.sim.unmodelled(), [""; 0]);
        Said {
            code: output.status.code().expect("it ended by itself"),
            out: self.stable(&output.stdout),
            err: self.stable(&output.stderr),
        }
    }

    /// Runs a tool with the configuration and the kubeconfig on a terminal, where a person types. What it says is all in `out`.
    pub async fn tool_on_terminal(&self, arguments: &str, typed: &str) -> Said {
        let command = format!(
            "{} {arguments} --kubeconfig={} --cloud-config={}",
            env!("CARGO_BIN_EXE_proxmox-csi"),
            self.path("kubeconfig").display(),
            self.path("config.yaml").display()
        );
        // util-linux's script gives it a terminal.
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .env_remove("KUBECONFIG")
            .env_remove("RUST_LOG")
            .env("HOSTNAME", "test")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("script, of util-linux, is installed");
        child.stdin.take().expect("a pipe").write_all(typed.as_bytes()).await.expect("it reads");
        let output = child.wait_with_output().await.expect("it ends");
        Said {
            code: output.status.code().expect("it ended by itself"),
            out: self.stable(&output.stdout),
            err: String::new(),
        }
    }

    /// `doctor -o json`.
    pub async fn doctor(&self, more: &[&str]) -> Said {
        let all: Vec<&str> = ["doctor", "-o", "json"].iter().chain(more).copied().collect();
        self.tool(&all).await
    }

    /// Takes out what changes from run to run: the port, the directory, times and process numbers of tasks.
    fn stable(&self, bytes: &[u8]) -> String {
        let text = String::from_utf8(bytes.to_vec()).expect("text");
        let text = text.replace(&self.url(), "https://pve.test:8006");
        let text = text.replace(&self.directory.path().display().to_string(), "/DIR");
        let text = masked(&text, "UPID:", |c| c == ' ' || c == ')' || c == '"' || c == '\n', "UPID:…");
        masked(&text, "2026-11-20T", |c| c == ' ' || c == '"' || c == '\n', "2026-11-20T…")
    }
}

/// Everything from `start` to what `ends` it becomes `mask`.
fn masked(text: &str, start: &str, ends: impl Fn(char) -> bool, mask: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(start) {
        out.push_str(&rest[..at]);
        out.push_str(mask);
        rest = &rest[at..];
        rest = &rest[rest.find(&ends).unwrap_or(rest.len())..];
    }
    out + rest
}
