//! Calls that may block: those that only read have a deadline, those that change something are awaited to their end.
//!
//! A call that reads and hangs leaves its thread behind, and whoever asks again would leave another, until no thread is left for
//! any volume. So [`Calls`] counts what has not come back, for each place, and beyond a few the next one is answered at once.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How many calls of one kind may be out at one place.
const AT_ONCE: usize = 4;

/// What is done, and where.
type Place = (&'static str, PathBuf);

/// The calls that have not come back.
#[derive(Debug, Clone, Default)]
pub(super) struct Calls(Arc<Mutex<BTreeMap<Place, usize>>>);

/// A call, counted until this is dropped, on whatever thread.
#[derive(Debug)]
pub(super) struct Running {
    calls: Calls,
    place: Place,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut running = self.calls.lock();
        if let Some(count) = running.get_mut(&self.place) {
            *count -= 1;
            if *count == 0 {
                running.remove(&self.place);
            }
        }
    }
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Place, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more call; an error of kind `TimedOut` where `at_once` are out already.
    pub(super) fn begin(&self, what: &'static str, at: &Path, at_once: usize) -> io::Result<Running> {
        let place = (what, at.to_owned());
        let mut running = self.lock();
        let count = running.entry(place.clone()).or_default();
        if *count >= at_once {
            let text = format!("earlier calls have not come back ({what} `{}`)", at.display());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        *count += 1;
        Ok(Running { calls: self.clone(), place })
    }

    /// Runs work that may block and changes nothing on a thread of its own; an error of kind `TimedOut` where it has not ended by the
    /// deadline, or where [`AT_ONCE`] of the kind have not ended at this place. Work that did not begin by then never does.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        what: &'static str,
        at: &Path,
        deadline: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let running = self.begin(what, at, AT_ONCE)?;
        limited(running, deadline, work).await
    }
}

/// Runs work that may block and changes nothing on a thread of its own, counted until it really ends.
pub(super) async fn limited<T: Send + 'static>(
    running: Running,
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let mut task = tokio::task::spawn_blocking(move || {
        let result = work();
        drop(running);
        result
    });
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
        let (calls, place) = (Calls::default(), Path::new("/a"));
        let error = calls.blocking("read", place, SHORT, move || held.recv().is_ok()).await;
        assert_eq!(error.expect_err("it did not end").kind(), io::ErrorKind::TimedOut);
        drop(release);
    }

    #[tokio::test]
    async fn calls_that_hang_at_one_place_do_not_pile_up() {
        let (calls, a, b) = (Calls::default(), Path::new("/a"), Path::new("/b"));
        let (began, starts) = mpsc::channel();
        let mut gates = Vec::new();
        for round in 0..3 * AT_ONCE {
            let (release, held) = mpsc::channel::<()>();
            gates.push(release);
            let began = began.clone();
            let work = move || {
                began.send(()).expect("the test listens");
                let _ = held.recv();
            };
            let error = calls.blocking("read", a, SHORT, work).await.expect_err("it hangs");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert_eq!(round < AT_ONCE, !error.to_string().contains("earlier calls"), "{error}");
        }
        assert_eq!(starts.try_iter().count(), AT_ONCE, "no more threads hang");
        calls.blocking("read", b, SHORT, || ()).await.expect("another place answers");
        calls.blocking("look at", a, SHORT, || ()).await.expect("and so does another call");
        drop(gates);
        while !calls.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        calls.blocking("read", a, 100 * SHORT, || ()).await.expect("it answers again");
    }
}
