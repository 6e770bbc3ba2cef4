//! What both services have around them: the admin port, signals, and an orderly end.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use super::{CommonArgs, Failed};
use crate::{
    csi::{
        identity::{IdentityService, Readiness},
        server::{ServeError, Server},
    },
    runtime::Operations,
    telemetry::{admin, metrics::Metrics},
};

/// How long running calls and their work may take to end after SIGTERM: as long as the slowest change of a VM.
const GRACE: Duration = Duration::from_secs(75);

/// Serves what `add` adds to Identity, and the admin port, until SIGTERM or SIGINT. It is not ready before `led`, and then as that says:
/// to wait keeps the sidecars of a pod that has to from their own work.
pub(super) async fn serve(
    common: &CommonArgs,
    operations: Operations,
    metrics: Metrics,
    mut led: BoxFuture<'static, Readiness>,
    add: impl FnOnce(Server) -> Server,
) -> Result<(), Failed> {
    let stop = CancellationToken::new();
    let signals = stop_on_signals(stop.clone()).map_err(|error| Failed::running(&error))?;
    let (readiness, told) = watch::channel(Readiness::NotYet);

    let asked = told.clone();
    let ready = Arc::new(move || *asked.borrow() == Readiness::Ready);
    admin_port(common.process.metrics_address, &metrics, ready, &stop).await?;

    let identity = IdentityService::new(&common.driver_name, told);
    let server = add(Server::new(identity, operations.clone(), metrics));
    if let Some(now) = (&mut led).now_or_never() {
        readiness.send_replace(now);
    } else {
        let stop = stop.clone();
        tokio::spawn(async move {
            if let Some(now) = stop.run_until_cancelled(led).await {
                readiness.send_replace(now);
            }
        });
    }
    let all_ended = server.serve(&common.socket(), stop, GRACE).await;
    signals.abort();
    match all_ended {
        Ok(true) => Ok(()),
        Ok(false) => {
            // A tool or a system call goes on as long as the container does, which may not be long.
            let work = operations.running();
            tracing::warn!(
                ?work,
                "work has not ended in time and is cut off where it stands; the next retry starts from what is there"
            );
            Ok(())
        }
        Err(error @ ServeError::Name(_)) => Err(Failed::config(&error)),
        Err(error) => Err(Failed::running(&error)),
    }
}

/// Serves the admin port until `stop`, where an address is given; stops all when it fails.
pub(super) async fn admin_port(
    address: Option<SocketAddr>,
    metrics: &Metrics,
    ready: admin::Ready,
    stop: &CancellationToken,
) -> Result<(), Failed> {
    let Some(address) = address else { return Ok(()) };
    let serving = admin::serve(address, metrics.clone(), ready, stop.clone().cancelled_owned()).await;
    let (address, serving) = serving.map_err(|error| Failed {
        exit: super::Exit::Failure,
        text: format!("cannot listen on {address} for metrics: {error}"),
    })?;
    tracing::info!(%address, "serving metrics");
    let stop = stop.clone();
    tokio::spawn(async move {
        if let Err(error) = serving.await {
            tracing::error!(%error, "the admin port failed");
            // Half a process is worse than none: whoever watches it starts a whole one.
            stop.cancel();
        }
    });
    Ok(())
}

/// Cancels `stop` on SIGTERM or SIGINT.
pub(super) fn stop_on_signals(stop: CancellationToken) -> std::io::Result<tokio::task::JoinHandle<()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::spawn(async move {
        tokio::select! {
            biased;
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        stop.cancel();
    }))
}
