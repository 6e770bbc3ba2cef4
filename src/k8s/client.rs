//! A client from a kubeconfig file, or from what a pod finds in its own file system.

use std::{path::Path, time::Duration};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// A client of the Kubernetes API, for those who hand it on.
pub type KubeClient = Client;

/// A client can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig file can't be used.
    #[error("cannot use the kubeconfig `{path}`")]
    Kubeconfig {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: kube::config::KubeconfigError,
    },
    /// This process does not run in a pod with a service account.
    #[error(
        "cannot find the cluster this process runs in; hint: outside of a pod say where it is with --kubeconfig"
    )]
    InCluster(#[source] kube::config::InClusterError),
    /// TLS or the credentials can't be set up.
    #[error("cannot set up the Kubernetes client")]
    Setup(#[source] kube::Error),
}

/// A client of the cluster of `kubeconfig`, or of the cluster whose pod this process is. Its default namespace is the kubeconfig's or
/// the pod's. No request is made.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    // Another part of the process may have installed it already: then that one is in force, and it is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut config = match kubeconfig {
        Some(path) => from_file(path)
            .await
            .map_err(|source| ConnectError::Kubeconfig { path: path.display().to_string(), source })?,
        None => Config::incluster().map_err(ConnectError::InCluster)?,
    };
    config.connect_timeout = Some(Duration::from_secs(5));
    Client::try_from(config).map_err(ConnectError::Setup)
}

async fn from_file(path: &Path) -> Result<Config, kube::config::KubeconfigError> {
    let kubeconfig = Kubeconfig::read_from(path)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
}
