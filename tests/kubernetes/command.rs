//! The real command over loopback: kubeconfig, HTTP, TLS to Proxmox, the Lease, and an orderly end.

use std::{path::Path, time::Duration};

use proxmox_csi::sim::{Sim, World, http::Tls};
use serde_json::json;
use tokio::process::{Child, Command};

use crate::{
    apiserver::ApiServer,
    rig::{NODES, ZONE, label, new_node},
};

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/proxmox/leases";

struct Rig {
    server: ApiServer,
    sim: Sim,
    directory: tempfile::TempDir,
    _listening: proxmox_csi::sim::http::Listening,
}

impl Rig {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let sim = Sim::in_memory(World::builtin()).expect("the built-in world starts");
        let tls = Tls::generate(&[]).expect("certificates");
        let any = "127.0.0.1:0".parse().expect("an address");
        let listening = sim.listen(any, &tls).await.expect("a free port");
        let write =
            |name: &str, text: &str| std::fs::write(directory.path().join(name), text).expect("a file");
        write("ca.pem", tls.ca_pem());
        let ca = directory.path().join("ca.pem");
        write(
            "config.yaml",
            &json!({"features": {"zone_labels": "follow"}, "clusters": [{"region": "r1", "ca_file": ca,
                "url": format!("https://{}", listening.address()), "token_id": "csi@pve!csi",
                "token_secret": World::builtin().token("csi@pve!csi").expect("a token").secret}]})
            .to_string(),
        );
        let server = ApiServer::default();
        let address = server.listen().await;
        write(
            "kubeconfig",
            &json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
                "users": [{"name": "u", "user": {}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "proxmox"}}]})
            .to_string(),
        );
        Self { server, sim, directory, _listening: listening }
    }

    fn path(&self, name: &str) -> &'static Path {
        Box::leak(self.directory.path().join(name).into_boxed_path())
    }

    fn command(&self, name: &str, more: &[String]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_proxmox-csi"))
            .arg(name)
            .arg(format!("--cloud-config={}", self.path("config.yaml").display()))
            .arg(format!("--kubeconfig={}", self.path("kubeconfig").display()))
            .args(more)
            .env_remove("CSI_ENDPOINT")
            .kill_on_drop(true)
            .spawn()
            .expect("the binary runs")
    }

    fn holder(&self, lease: &str) -> Option<String> {
        self.server.get(LEASES, lease)?["spec"]["holderIdentity"].as_str().map(str::to_owned)
    }

    async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        for _ in 0..300 {
            if holds() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("not within 30 s: {what}");
    }
}

async fn terminate(mut child: Child) -> Option<i32> {
    let pid = i32::try_from(child.id().expect("it runs")).expect("a process id");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)
        .expect("a signal");
    let ended = tokio::time::timeout(Duration::from_secs(20), child.wait()).await.expect("it ends");
    ended.expect("a status").code()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ccm_leads_keeps_nodes_and_gives_the_lease_back() {
    let rig = Rig::start().await;
    let uuid = rig.sim.vm(103).and_then(|vm| vm.conf.uuid().map(str::to_owned)).expect("a uuid");
    rig.server.put(NODES, new_node("w103", &uuid));
    let child = rig.command("ccm", &["--poll-interval=2".to_owned()]);
    rig.until("labels", || label(&rig.server, "w103", ZONE).as_deref() == Some("pve2")).await;
    rig.sim.move_vm(103, "pve1");
    rig.until("the move", || label(&rig.server, "w103", ZONE).as_deref() == Some("pve1")).await;
    assert!(rig.holder("proxmox-ccm").is_some_and(|holder| !holder.is_empty()));
    assert_eq!(terminate(child).await, Some(0));
    assert_eq!(rig.holder("proxmox-ccm").as_deref(), Some(""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_loses_the_lease_ends() {
    let rig = Rig::start().await;
    let socket = format!("--csi-address=unix://{}", rig.path("csi.sock").display());
    let child = rig.command("controller", std::slice::from_ref(&socket));
    let lease = "proxmox-csi-controller";
    rig.until("the lease", || rig.holder(lease).is_some_and(|holder| !holder.is_empty())).await;
    assert_eq!(terminate(child).await, Some(0));
    assert_eq!(rig.holder(lease).as_deref(), Some(""));

    let mut child = rig.command("controller", &[socket]);
    rig.until("the lease", || rig.holder(lease).is_some_and(|holder| !holder.is_empty())).await;
    rig.server.edit(LEASES, lease, |lease| lease["spec"]["holderIdentity"] = json!("another"));
    let ended = tokio::time::timeout(Duration::from_secs(20), child.wait()).await.expect("it ends");
    assert_eq!(ended.expect("a status").code(), Some(1));
    assert_eq!(rig.holder(lease).as_deref(), Some("another"));
}
