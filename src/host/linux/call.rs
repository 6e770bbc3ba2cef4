//! Calls that may block: those that only read have a deadline, those that change something are awaited to their end.

use std::{io, path::Path, time::Duration};

use tokio::time::Instant;

/// Runs work that may block and changes nothing on a thread of its own; an error of kind `TimedOut` where it has not ended by the
/// deadline. Work that did not begin by then never does.
pub(super) async fn blocking<T: Send + 'static>(
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let mut task = tokio::task::spawn_blocking(work);
    match tokio::time::timeout(deadline, &mut task).await {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(panicked)) => Err(io::Error::other(panicked)),
        Err(_) => {
            task.abort();
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("it did not end within {deadline:?}")))
        }
    }
}

/// Runs work that may block and changes something on a thread of its own, to its end. An umount(2) that still writes out has taken
/// its mount out of the table already, and a removal that was left to itself may strike the next disk of that name: whoever
/// went on before the end would go by a state that is not there yet. Where it takes longer than usual, that is logged once.
pub(super) async fn to_its_end<T: Send + 'static>(
    what: &'static str,
    path: &Path,
    usual: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let started = Instant::now();
    let mut task = tokio::task::spawn_blocking(work);
    let ended = if let Ok(ended) = tokio::time::timeout(usual, &mut task).await {
        ended
    } else {
        tracing::warn!(what, path = %path.display(), after = ?usual, "a call is still in the kernel; its volume waits");
        let ended = task.await;
        tracing::info!(what, path = %path.display(), elapsed = ?started.elapsed(), "the call has ended");
        ended
    };
    ended.map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn p8_a_call_that_changes_something_is_awaited_beyond_its_usual_time() {
        let (release, held) = mpsc::channel::<()>();
        let slow = to_its_end("unmount", Path::new("/a"), SHORT, move || held.recv().is_ok());
        tokio::pin!(slow);
        assert!(tokio::time::timeout(10 * SHORT, &mut slow).await.is_err(), "it has not ended");
        release.send(()).expect("the call still runs");
        assert!(slow.await.expect("its outcome comes late"));
    }

    #[tokio::test]
    async fn a_call_that_reads_has_a_deadline() {
        let (release, held) = mpsc::channel::<()>();
        let error = blocking(SHORT, move || held.recv().is_ok()).await.expect_err("it did not end");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(release);
    }
}
