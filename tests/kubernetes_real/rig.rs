//! A control plane, a simulated Proxmox, the commands between them, and hands that play kubelets.

use std::{path::Path, time::Duration};

use k8s_openapi::api::{coordination::v1::Lease, core::v1::Node};
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams, PostParams},
};
use proxmox_csi::sim::{
    Sim, World,
    http::{Listening, Tls},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tower::ServiceExt as _;

use crate::{
    kubernetes::{Audited, Cluster, Process},
    support::{CSI, REGION, in_process},
};

/// Where the service accounts and Leases are.
pub(crate) const NAMESPACE: &str = "kube-system";
/// The service account and the Lease of the cloud-controller loop.
pub(crate) const CCM: &str = "proxmox-ccm";
/// Those of the CSI controller.
pub(crate) const CONTROLLER: &str = "proxmox-csi-controller";
pub(crate) const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";
pub(crate) const SHUTDOWN: &str = "node.cloudprovider.kubernetes.io/shutdown";
pub(crate) const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
pub(crate) const ZONE: &str = "topology.kubernetes.io/zone";

/// How long anything may take that is not said to take longer.
const PATIENCE: Duration = Duration::from_secs(90);

pub(crate) struct Rig {
    pub(crate) cluster: Cluster,
    pub(crate) sim: Sim,
    pub(crate) nodes: Api<Node>,
    pub(crate) leases: Api<Lease>,
    _listening: Listening,
}

impl Rig {
    /// Nothing runs yet but the servers; the rights of `fixture` are applied.
    pub(crate) async fn start(fixture: &str) -> Self {
        let cluster = Cluster::start().await.unwrap_or_else(|error| panic!("{error}"));
        let sim = Sim::in_memory(World::builtin()).expect("the built-in world starts");
        let tls = Tls::generate(&[]).expect("certificates");
        let any = "127.0.0.1:0".parse().expect("an address");
        let listening = sim.listen(any, &tls).await.expect("a free port");
        let write =
            |name: &str, text: &str| std::fs::write(cluster.directory().join(name), text).expect("a file");
        write("pve-ca.pem", tls.ca_pem());
        let config = json!({"features": {"zone_labels": "follow"}, "clusters": [{"region": REGION,
            "url": listening.url(), "ca_file": cluster.directory().join("pve-ca.pem"), "token_id": CSI,
            "token_secret": World::builtin().token(CSI).expect("a token").secret}]});
        write("config.yaml", &config.to_string());
        cluster.apply(fixture).await;
        let admin = cluster.admin().await;
        let (nodes, leases) = (Api::all(admin.clone()), Api::namespaced(admin, NAMESPACE));
        Self { cluster, sim, nodes, leases, _listening: listening }
    }

    /// What an administrator of Proxmox does.
    pub(crate) async fn pve(&self, method: &str, path: &str, form: &str) {
        let world = World::builtin();
        let request = http::Request::builder()
            .method(method)
            .uri(format!("/api2/json{path}"))
            .header("authorization", world.token("root@pam!root").expect("a token").header())
            .header("content-type", "application/x-www-form-urlencoded")
            .body(bytes::Bytes::from(form.to_owned()))
            .expect("a request");
        let answer = in_process(&self.sim).oneshot(request).await.expect("an answer");
        assert!(answer.status().is_success(), "{method} {path}: {answer:?}");
    }

    /// Starts a command of the driver as a service account.
    async fn command(&self, command: &str, account: &str, name: &str, more: &[&str]) -> Process {
        let kubeconfig = self.cluster.service_account(NAMESPACE, account).await;
        let config = self.cluster.directory().join("config.yaml");
        let mut arguments = vec![
            command.to_owned(),
            format!("--cloud-config={}", config.display()),
            format!("--kubeconfig={}", kubeconfig.display()),
        ];
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        let program = Path::new(env!("CARGO_BIN_EXE_proxmox-csi"));
        Process::start(name, program, arguments, self.cluster.directory()).expect("the binary runs")
    }

    /// Starts the cloud-controller loop, polling every 2 s.
    pub(crate) async fn ccm(&self, name: &str, more: &[&str]) -> Process {
        self.command("ccm", CCM, name, &[&["--poll-interval=2"], more].concat()).await
    }

    /// Starts a CSI controller on the socket `<name>.sock`.
    pub(crate) async fn controller(&self, name: &str) -> Process {
        let socket = format!("--csi-address=unix://{}", self.socket(name));
        self.command("controller", CONTROLLER, name, &[&socket]).await
    }

    pub(crate) fn socket(&self, name: &str) -> String {
        self.cluster.directory().join(format!("{name}.sock")).display().to_string()
    }

    /// Plays the kubelet that starts on a VM and registers its Node.
    pub(crate) async fn kubelet(&self, name: &str, vmid: u32) -> Kubelet {
        self.kubelet_with(name, vmid, "").await
    }

    /// The same, with a kubelet that was told a providerID.
    pub(crate) async fn kubelet_with(&self, name: &str, vmid: u32, provider_id: &str) -> Kubelet {
        let nodes = Api::all(self.cluster.kubelet(name).await);
        let kubelet = Kubelet { name: name.to_owned(), vmid, uuid: self.uuid(vmid), nodes };
        kubelet.register(provider_id).await;
        kubelet
    }

    pub(crate) fn uuid(&self, vmid: u32) -> String {
        self.sim.vm(vmid).and_then(|vm| vm.conf.uuid().map(str::to_owned)).expect("a uuid")
    }

    pub(crate) async fn node(&self, name: &str) -> Option<Node> {
        self.nodes.get_opt(name).await.expect("the API server answers")
    }

    pub(crate) async fn label(&self, name: &str, key: &str) -> Option<String> {
        self.node(name).await?.labels().get(key).cloned()
    }

    pub(crate) async fn has_taint(&self, name: &str, key: &str) -> bool {
        self.node(name).await.is_some_and(|node| taints(&node).contains(&key.to_owned()))
    }

    /// Who holds a Lease; `None` where there is none, empty where it was given back.
    pub(crate) async fn holder(&self, lease: &str) -> Option<String> {
        let lease = self.leases.get_opt(lease).await.expect("the API server answers")?;
        Some(lease.spec?.holder_identity.unwrap_or_default())
    }

    /// What kubectl prints of the events about a node.
    pub(crate) async fn events_about(&self, node: &str) -> String {
        let about = format!("--field-selector=involvedObject.kind=Node,involvedObject.name={node}");
        self.cluster.kubectl(&["get", "events", "--namespace=default", &about]).await
    }

    /// All that a service account asked for.
    pub(crate) fn requests_of(&self, account: &str) -> Vec<Audited> {
        self.cluster.requests_of(NAMESPACE, account)
    }

    /// A service account that was refused nothing has the rights that it needs.
    #[track_caller]
    pub(crate) fn assert_nothing_was_refused(&self, account: &str) {
        let requests = self.requests_of(account);
        let refused: Vec<_> = requests.iter().filter(|request| matches!(request.code, 401 | 403)).collect();
        assert!(!requests.is_empty(), "`{account}` asked for nothing at all");
        assert!(refused.is_empty(), "`{account}` was refused: {refused:?}");
    }
}

/// Hands that play the kubelet of a node, with a kubelet's credentials.
pub(crate) struct Kubelet {
    pub(crate) name: String,
    vmid: u32,
    uuid: String,
    nodes: Api<Node>,
}

impl Kubelet {
    /// Registers the Node, as a kubelet with an external cloud provider does.
    pub(crate) async fn register(&self, provider_id: &str) {
        let node: Node = serde_json::from_value(json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.name, "labels": {"kubernetes.io/hostname": self.name, "mine": "yes"},
                "annotations": {"alpha.kubernetes.io/provided-node-ip": format!("10.0.0.{}", self.vmid)}},
            "spec": {"providerID": provider_id,
                "taints": [{"key": UNINITIALIZED, "value": "true", "effect": "NoSchedule"},
                    {"key": "mine", "effect": "NoSchedule"}]},
            "status": {"conditions": [ready(true)],
                "nodeInfo": {"systemUUID": self.uuid, "architecture": "amd64", "bootID": "", "kubeletVersion": "v1.36.3",
                    "containerRuntimeVersion": "", "kernelVersion": "", "kubeProxyVersion": "", "machineID": "",
                    "operatingSystem": "linux", "osImage": ""}}}))
        .expect("a Node");
        self.nodes.create(&PostParams::default(), &node).await.expect("a kubelet may register its node");
    }

    /// Says whether the node is ready. A kubelet that died says nothing; that it is silent is then written by the node controller.
    pub(crate) async fn set_ready(&self, is_ready: bool) {
        let patch = Patch::Strategic(json!({"status": {"conditions": [ready(is_ready)]}}));
        self.nodes
            .patch_status(&self.name, &PatchParams::default(), &patch)
            .await
            .expect("the status is its own");
    }
}

fn ready(is_ready: bool) -> Value {
    json!({"type": "Ready", "status": if is_ready { "True" } else { "Unknown" }})
}

pub(crate) fn taints(node: &Node) -> Vec<String> {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    taints.into_iter().flatten().map(|taint| taint.key.clone()).collect()
}

pub(crate) fn provider_id(node: &Node) -> Option<String> {
    node.spec.as_ref()?.provider_id.clone()
}

/// Waits until something holds, and tells how long that took.
pub(crate) async fn until(what: &str, holds: impl AsyncFn() -> bool) -> Duration {
    until_within(PATIENCE, what, holds).await
}

pub(crate) async fn until_within(patience: Duration, what: &str, holds: impl AsyncFn() -> bool) -> Duration {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < patience, "not within {patience:?}: {what}");
        sleep(Duration::from_millis(100)).await;
    }
    println!("{what}: after {:.1} s", started.elapsed().as_secs_f64());
    started.elapsed()
}
