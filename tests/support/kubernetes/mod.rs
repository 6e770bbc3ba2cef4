//! A Kubernetes control plane on loopback: etcd and kube-apiserver as processes, with certificates, RBAC and an audit log of their own.
//!
//! [`Cluster::start`] builds them if need be (see `tests/kubernetes/servers`). There is no scheduler, no controller manager and no kubelet:
//! who needs one plays it. A test of the API server belongs to `make test-kubernetes`, which builds the servers beforehand.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each user of it uses a part")]

mod certificates;
mod process;

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::{
    net::TcpSocket,
    process::Command,
    time::{Instant, sleep},
};

use certificates::Authority;
pub use process::Process;
use proxmox_csi::k8s::client::connect;

/// How long the servers may take to be ready, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_mins(3);

pub type Fail = Box<dyn std::error::Error + Send + Sync>;

/// A running control plane; it ends and leaves nothing behind when it is dropped.
pub struct Cluster {
    // The servers go before the directory they write to.
    api_server: Process,
    etcd: Process,
    _ports: [TcpSocket; 3],
    authority: Authority,
    directory: tempfile::TempDir,
    url: String,
    api_server_flags: Vec<String>,
}

/// A request that a service account made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Audited {
    pub verb: String,
    /// The API group, empty for the core.
    pub group: String,
    /// The resource, with its subresource: `nodes/status`.
    pub resource: String,
    pub name: String,
    /// The status of the answer.
    pub code: u64,
}

/// A port of this machine that is ours alone until the socket is dropped: the servers bind it once more, and as nobody listens on the
/// first socket, all connections are theirs.
fn reserve() -> io::Result<(TcpSocket, SocketAddr)> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseport(true)?;
    socket.bind(([127, 0, 0, 1], 0).into())?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}

fn servers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kubernetes/servers")
}

async fn build() -> Result<PathBuf, Fail> {
    let built = Command::new(servers().join("build.sh")).status().await?;
    if !built.success() {
        return Err("tests/kubernetes/servers/build.sh failed, see above".into());
    }
    Ok(servers().join("bin"))
}

impl Cluster {
    /// Starts a control plane that is ready for requests.
    pub async fn start() -> Result<Self, Fail> {
        let bin = build().await?;
        let directory = tempfile::Builder::new().prefix("kubernetes-").tempdir()?;
        let path = directory.path();
        let authority = Authority::new(path)?;
        authority.issue(path, "etcd", "etcd", None)?;
        authority.issue(path, "api-server", "kube-apiserver", None)?;
        authority.issue(path, "service-accounts", "service-accounts", None)?;
        authority.issue(path, "admin", "admin", Some("system:masters"))?;
        fs::write(
            path.join("audit.yaml"),
            "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n  \
             - {level: Metadata, userGroups: [\"system:serviceaccounts\"]}\n  - {level: None}\n",
        )?;

        let ((one, peers), (two, clients), (three, api)) = (reserve()?, reserve()?, reserve()?);
        let url = format!("https://{api}");
        let etcd = Process::start("etcd", &bin.join("etcd"), etcd_flags(peers, clients), path)?.quiet();
        let api_server_flags = api_server_flags(clients, api);
        let api_server = start_api_server(&api_server_flags, path)?;
        let mut cluster =
            Self { api_server, etcd, _ports: [one, two, three], authority, directory, url, api_server_flags };
        cluster.write_kubeconfig(
            "admin",
            "default",
            &json!({"client-certificate": "admin.crt", "client-key": "admin.key"}),
        )?;
        cluster.ready().await?;
        Ok(cluster)
    }

    async fn ready(&mut self) -> Result<(), Fail> {
        let client = connect(Some(&self.kubeconfig("admin"))).await?;
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let started = Instant::now();
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            let ready = client.request_text(request).await.is_ok_and(|text| text == "ok");
            // It makes them itself, a moment later.
            if ready
                && namespaces.get_opt("kube-system").await?.is_some()
                && namespaces.get_opt("default").await?.is_some()
            {
                return Ok(());
            }
            for process in [&mut self.etcd, &mut self.api_server] {
                if process.ended().is_some() || started.elapsed() > PATIENCE {
                    return Err(format!(
                        "`{}` does not get ready; it said:\n{}",
                        process.name(),
                        process.last_words()
                    )
                    .into());
                }
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Where files of the cluster and of its users lie.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The process of the API server, to stop and to continue it.
    pub fn api_server(&self) -> &Process {
        &self.api_server
    }

    /// Kills the API server and starts it anew, at the same address and over the same data.
    pub async fn restart_api_server(&mut self) {
        self.api_server.kill();
        self.api_server =
            start_api_server(&self.api_server_flags, self.directory()).expect("it started before");
        self.ready().await.unwrap_or_else(|error| panic!("{error}"));
    }

    /// The kubeconfig of somebody who has one; `admin` may do everything.
    pub fn kubeconfig(&self, who: &str) -> PathBuf {
        self.directory().join(format!("{who}.kubeconfig"))
    }

    fn write_kubeconfig(&self, who: &str, namespace: &str, user: &Value) -> io::Result<()> {
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority": "ca.crt"}}],
            "users": [{"name": who, "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": who, "namespace": namespace}}]});
        fs::write(self.kubeconfig(who), config.to_string())
    }

    /// A client that may do everything.
    pub async fn admin(&self) -> Client {
        connect(Some(&self.kubeconfig("admin"))).await.expect("the kubeconfig was written by us")
    }

    /// A client with the rights of the kubelet of a node, as `NodeRestriction` leaves them.
    pub async fn kubelet(&self, node: &str) -> Client {
        let (who, user) = (format!("kubelet-{node}"), format!("system:node:{node}"));
        self.authority.issue(self.directory(), &who, &user, Some("system:nodes")).expect("a certificate");
        let files = json!({"client-certificate": format!("{who}.crt"), "client-key": format!("{who}.key")});
        self.write_kubeconfig(&who, "default", &files).expect("a file");
        connect(Some(&self.kubeconfig(&who))).await.expect("the kubeconfig was written by us")
    }

    /// The kubeconfig of a service account, with a token as a pod would have it and the account's namespace.
    pub async fn service_account(&self, namespace: &str, name: &str) -> PathBuf {
        let token = self.kubectl(&["create", "token", name, "--namespace", namespace, "--duration=1h"]).await;
        self.write_kubeconfig(name, namespace, &json!({"token": token.trim()})).expect("a file");
        self.kubeconfig(name)
    }

    /// The kubectl of the same release.
    pub fn kubectl_path() -> PathBuf {
        servers().join("bin/kubectl")
    }

    /// What kubectl prints for an administrator. A kubectl that fails is a panic with its words.
    pub async fn kubectl(&self, arguments: &[&str]) -> String {
        let output = Command::new(Self::kubectl_path())
            .args(arguments)
            .env_clear()
            .env("HOME", self.directory())
            .env("KUBECONFIG", self.kubeconfig("admin"))
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .output();
        let output =
            tokio::time::timeout(PATIENCE, output).await.expect("kubectl ends").expect("kubectl runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "kubectl {}: {}", arguments.join(" "), text(&output.stderr));
        text(&output.stdout)
    }

    /// What kubectl prints with `--output=json`.
    pub async fn kubectl_json(&self, arguments: &[&str]) -> Value {
        let all = [arguments, &["--output=json"]].concat();
        serde_json::from_str(&self.kubectl(&all).await).expect("kubectl prints JSON")
    }

    /// Applies a file of the repository, as its name below the root.
    pub async fn apply(&self, file: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        self.kubectl(&["apply", "--server-side", "--filename", path.to_str().expect("a name of text")]).await;
    }

    /// All requests that a service account has made, in order.
    pub fn requests_of(&self, namespace: &str, name: &str) -> Vec<Audited> {
        let user = format!("system:serviceaccount:{namespace}:{name}");
        let log = fs::read_to_string(self.directory().join("audit.log")).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        log.lines()
            // The last line may be half written.
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|event| event["user"]["username"] == user.as_str())
            .map(|event| {
                let object = &event["objectRef"];
                let resource = match object["subresource"].as_str() {
                    Some(part) => format!("{}/{part}", text(&object["resource"])),
                    None => text(&object["resource"]),
                };
                Audited {
                    verb: text(&event["verb"]),
                    group: text(&object["apiGroup"]),
                    resource,
                    name: text(&object["name"]),
                    code: event["responseStatus"]["code"].as_u64().unwrap_or_default(),
                }
            })
            .collect()
    }
}

fn start_api_server(flags: &[String], directory: &Path) -> io::Result<Process> {
    let program = servers().join("bin/kube-apiserver");
    Ok(Process::start("kube-apiserver", &program, flags, directory)?.quiet())
}

fn etcd_flags(peers: SocketAddr, clients: SocketAddr) -> Vec<String> {
    let (peers, clients) = (format!("https://{peers}"), format!("https://{clients}"));
    let mut flags = vec![
        "--name=test".to_owned(),
        "--data-dir=etcd".to_owned(),
        "--log-level=warn".to_owned(),
        "--socket-reuse-port".to_owned(),
        // Nothing here is to outlive a power cut.
        "--unsafe-no-fsync".to_owned(),
        format!("--listen-peer-urls={peers}"),
        format!("--initial-advertise-peer-urls={peers}"),
        format!("--initial-cluster=test={peers}"),
        format!("--listen-client-urls={clients}"),
        format!("--advertise-client-urls={clients}"),
    ];
    for side in ["", "peer-"] {
        flags.push(format!("--{side}client-cert-auth"));
        flags.push(format!("--{side}trusted-ca-file=ca.crt"));
        flags.push(format!("--{side}cert-file=etcd.crt"));
        flags.push(format!("--{side}key-file=etcd.key"));
    }
    flags
}

fn api_server_flags(etcd: SocketAddr, api: SocketAddr) -> Vec<String> {
    [
        &format!("--etcd-servers=https://{etcd}"),
        "--etcd-cafile=ca.crt",
        "--etcd-certfile=api-server.crt",
        "--etcd-keyfile=api-server.key",
        "--bind-address=127.0.0.1",
        &format!("--secure-port={}", api.port()),
        "--permit-port-sharing",
        "--tls-cert-file=api-server.crt",
        "--tls-private-key-file=api-server.key",
        "--client-ca-file=ca.crt",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--anonymous-auth=false",
        "--allow-privileged",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--service-account-key-file=service-accounts.crt",
        "--service-account-signing-key-file=service-accounts.key",
        "--service-cluster-ip-range=10.96.0.0/24",
        // A loopback address can't be the endpoint of a Service, and nobody is to reach it by that.
        "--endpoint-reconciler-type=none",
        "--external-hostname=localhost",
        "--audit-policy-file=audit.yaml",
        "--audit-log-path=audit.log",
    ]
    .map(str::to_owned)
    .to_vec()
}
