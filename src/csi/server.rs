//! Serving the services on a unix socket. Read [`Server::serve`].

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::Mode;
use tokio::net::{UnixListener, UnixSocket, UnixStream};
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
        if let Err(error) = tokio::fs::remove_file(socket).await {
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
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(fail)?;
    }
    let socket = UnixSocket::new_stream().map_err(fail)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(io::Error::from).map_err(fail)?;
    socket.bind(path).map_err(fail)?;
    socket.listen(64).map_err(fail)
}

/// Removes the socket of a process that is gone. One that somebody listens on, and anything else, stays.
async fn remove_stale(path: &Path) -> Result<(), ServeError> {
    let fail = |source| ServeError::Listen { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ServeError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(fail),
        Err(error) => Err(fail(error)),
        Ok(_) => Err(ServeError::Taken(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

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
}
