//! Serving the services on a unix socket. Read [`Server::serve`].

use std::{
    io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::Mode;
use tokio::{
    fs,
    net::{UnixListener, UnixSocket, UnixStream},
};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::{
    controller::ControllerService,
    identity::IdentityService,
    node::NodeService,
    proto::{controller_server::ControllerServer, identity_server::IdentityServer, node_server::NodeServer},
    trace::TraceLayer,
};
use crate::{runtime::Operations, telemetry::metrics::Metrics};

/// The services of one process.
pub struct Server {
    routes: Routes,
    operations: Operations,
    metrics: Metrics,
}

/// Why the services are not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// CSI wants the socket's name to end in `.sock`.
    #[error("the socket `{}` must be an absolute path that ends in `.sock`", .0.display())]
    Name(PathBuf),
    /// Another process listens there.
    #[error("another process serves `{}`", .0.display())]
    Taken(PathBuf),
    /// Something that is no socket is there.
    #[error("`{}` exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The socket can't be made.
    #[error("cannot listen on `{}`", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Serving ended with an error.
    #[error("cannot serve `{}`", path.display())]
    Serve {
        /// The path.
        path: PathBuf,
        /// How.
        source: tonic::transport::Error,
    },
}

impl Server {
    /// A server of the Identity service; `operations` is what the other services run their work in.
    pub fn new(identity: IdentityService, operations: Operations, metrics: Metrics) -> Self {
        Self { routes: Routes::new(IdentityServer::new(identity)), operations, metrics }
    }

    /// Adds the Node service.
    #[must_use]
    pub fn with_node(mut self, node: NodeService) -> Self {
        self.routes = self.routes.add_service(NodeServer::new(node));
        self
    }

    /// Adds the Controller service.
    #[must_use]
    pub fn with_controller(mut self, controller: ControllerService) -> Self {
        self.routes = self.routes.add_service(ControllerServer::new(controller));
        self
    }

    /// Serves on the socket until `stop` is cancelled. Then no call is taken any more, running ones get `grace` to end and their work the
    /// same again, and the socket is removed. Returns whether all work ended.
    pub async fn serve(
        self,
        socket: &Path,
        stop: CancellationToken,
        grace: Duration,
    ) -> Result<bool, ServeError> {
        let listener = listen(socket).await?;
        tracing::info!(socket = %socket.display(), "serving");
        let serving = tonic::transport::Server::builder()
            .layer(TraceLayer(self.metrics))
            .add_routes(self.routes)
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.clone().cancelled_owned());
        let overtime = async {
            stop.cancelled().await;
            tokio::time::sleep(grace).await;
        };
        // Dropping `serving` only drops handlers; their work runs in tasks of its own.
        let served = tokio::select! {
            biased;
            served = serving => served,
            () = overtime => Ok(()),
        };
        if let Err(error) = fs::remove_file(socket).await {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the socket stays behind");
        }
        let ended = self.operations.drain(grace).await;
        served.map_err(|source| ServeError::Serve { path: socket.to_owned(), source })?;
        Ok(ended)
    }
}

/// A listener that nobody but root can connect to, from its first moment: the mode is set before the socket gets its name.
async fn listen(path: &Path) -> Result<UnixListener, ServeError> {
    if !path.is_absolute() || path.extension().is_none_or(|extension| extension != "sock") {
        return Err(ServeError::Name(path.to_owned()));
    }
    remove_stale(path).await?;
    let fail = |source| ServeError::Listen { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).await.map_err(fail)?;
    }
    let socket = UnixSocket::new_stream().map_err(fail)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(io::Error::from).map_err(fail)?;
    socket.bind(path).map_err(fail)?;
    socket.listen(64).map_err(fail)
}

/// Removes the socket of a process that is gone. One that somebody listens on, and anything else, stays.
async fn remove_stale(path: &Path) -> Result<(), ServeError> {
    let fail = |source| ServeError::Listen { path: path.to_owned(), source };
    match fs::symlink_metadata(path).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ServeError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).await.map_err(fail)
        }
        Err(error) => Err(fail(error)),
        Ok(_) => Err(ServeError::Taken(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, sync::Arc};

    use tokio::sync::watch;

    use super::*;
    use crate::{
        csi::{
            identity::{DRIVER_NAME, Readiness},
            proto,
        },
        host::linux::{LinuxHost, LinuxOptions},
        node::{Node, NodeOptions},
    };

    #[tokio::test]
    async fn a_socket_is_private_and_taken_over_only_from_the_dead() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("deep/csi.sock");
        let listener = listen(&path).await.expect("a fresh socket");
        let mode = fs::metadata(&path).expect("the socket is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(listen(&path).await, Err(ServeError::Taken(_))));
        drop(listener);
        drop(listen(&path).await.expect("a socket of the dead"));
        fs::write(directory.path().join("file.sock"), "").expect("a file");
        let file = listen(&directory.path().join("file.sock")).await;
        assert!(matches!(file, Err(ServeError::NotASocket(_))));
        assert!(matches!(listen(Path::new("/tmp/csi")).await, Err(ServeError::Name(_))));
    }

    #[tokio::test]
    async fn the_services_answer_until_they_are_stopped() {
        use hyper_util::rt::TokioIo;
        use proto::{identity_client::IdentityClient, node_client::NodeClient};
        use tonic::Code;

        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("csi.sock");
        let operations = Operations::default();
        let options = LinuxOptions { sysfs_root: directory.path().into(), ..LinuxOptions::default() };
        let node = Node::new(Arc::new(LinuxHost::new(options)), NodeOptions::new("node-1/100"));
        let (readiness, told) = watch::channel(Readiness::NotYet);
        let server =
            Server::new(IdentityService::new(DRIVER_NAME, told), operations.clone(), Metrics::default())
                .with_node(NodeService::new(node, operations));
        let stop = CancellationToken::new();
        let (path, stopped) = (socket.clone(), stop.clone());
        let serving = tokio::spawn(async move { server.serve(&path, stopped, Duration::from_secs(5)).await });
        while !socket.exists() {
            tokio::task::yield_now().await;
        }
        let path = socket.clone();
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(connect).await.expect("it listens");

        let mut identity = IdentityClient::new(channel.clone());
        let probe = identity.probe(proto::ProbeRequest {}).await.expect("it answers").into_inner();
        assert_eq!(probe.ready, Some(false));
        readiness.send(Readiness::Ready).expect("the service listens");
        let probe = identity.probe(proto::ProbeRequest {}).await.expect("it answers").into_inner();
        assert_eq!(probe.ready, Some(true));

        let mut node = NodeClient::new(channel.clone());
        let info = node.node_get_info(proto::NodeGetInfoRequest {}).await.expect("it answers").into_inner();
        assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("node-1/100", 24));
        let nothing = node.node_stage_volume(proto::NodeStageVolumeRequest::default()).await;
        assert_eq!(nothing.expect_err("fields are missing").code(), Code::InvalidArgument);
        let stats = proto::NodeGetVolumeStatsRequest {
            volume_id: "fake-vol-id".to_owned(),
            volume_path: "some/path".to_owned(),
            ..proto::NodeGetVolumeStatsRequest::default()
        };
        let stats = node.node_get_volume_stats(stats).await;
        assert_eq!(stats.expect_err("there is none").code(), Code::NotFound);

        stop.cancel();
        assert!(serving.await.expect("no panic").expect("no error"), "nothing is left running");
        assert!(!socket.exists());
    }
}
