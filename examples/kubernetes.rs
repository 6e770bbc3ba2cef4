//! A Kubernetes control plane on loopback to try things on: `make kubernetes`. It has no nodes, no scheduler and no controllers, so that
//! charts, rights and objects can be looked at and nothing runs. It ends on Ctrl-C and leaves nothing.

#[path = "../tests/support/kubernetes/mod.rs"]
mod kubernetes;

use kubernetes::{Cluster, Fail};

#[tokio::main]
async fn main() -> Result<(), Fail> {
    let cluster = Cluster::start().await?;
    println!("export KUBECONFIG={}", cluster.kubeconfig("admin").display());
    println!("kubectl is {}; Ctrl-C ends it", Cluster::kubectl_path().display());
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
    }
    Ok(())
}
