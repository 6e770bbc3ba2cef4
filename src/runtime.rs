//! Work that outlives its caller.
//!
//! tonic drops a handler when the caller's deadline passes, wherever its future stands. So no handler does the work:
//! it starts a tracked task and awaits it ([`Operations::run`]). A retry with the same request joins the running work; another
//! request for the same object is told to come back.

use std::{
    any::Any,
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

/// The running operations, one for each object.
#[derive(Clone, Default)]
pub struct Operations {
    tracker: TaskTracker,
    running: Arc<Mutex<BTreeMap<String, Running>>>,
}

struct Running {
    what: &'static str,
    request: Vec<u8>,
    outcome: Box<dyn Any + Send>,
}

/// Why an operation gave no outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoOutcome {
    /// Another operation on the object is running.
    #[error("{running} of `{object}` is still running")]
    Busy {
        /// The object.
        object: String,
        /// What runs.
        running: &'static str,
    },
    /// The task ended without an outcome: it panicked, or the process is ending.
    #[error("{what} of `{object}` ended without an outcome")]
    Lost {
        /// The object.
        object: String,
        /// What was run.
        what: &'static str,
    },
}

impl Operations {
    /// The outcome of `work` on `object`, run in a task of its own that goes on when this future is dropped.
    ///
    /// `request` tells requests apart: where the same one is running already, `work` is not run and the running one's outcome is
    /// returned. The object is free again before any waiter sees the outcome.
    pub async fn run<T, F>(
        &self,
        what: &'static str,
        object: &str,
        request: Vec<u8>,
        work: F,
    ) -> Result<T, NoOutcome>
    where
        T: Clone + Send + Sync + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let outcome = self.start(what, object, request, work)?;
        outcome.await.ok_or_else(|| NoOutcome::Lost { object: object.to_owned(), what })
    }

    fn start<T, F>(
        &self,
        what: &'static str,
        object: &str,
        request: Vec<u8>,
        work: F,
    ) -> Result<Outcome<T>, NoOutcome>
    where
        T: Clone + Send + Sync + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let mut running = lock(&self.running);
        if let Some(other) = running.get(object) {
            let same = other.what == what && other.request == request;
            return match other.outcome.downcast_ref::<Outcome<T>>() {
                Some(outcome) if same => Ok(outcome.clone()),
                _ => Err(NoOutcome::Busy { object: object.to_owned(), running: other.what }),
            };
        }
        let (sender, receiver) = oneshot::channel();
        let outcome: Outcome<T> = receiver.map(Result::ok).boxed().shared();
        let entry = Running { what, request, outcome: Box::new(outcome.clone()) };
        running.insert(object.to_owned(), entry);
        drop(running);

        let done = Done { running: Arc::clone(&self.running), object: object.to_owned() };
        self.tracker.spawn(async move {
            let result = work.await;
            drop(done);
            // Nobody listens any more: the next retry starts over and finds the state as it is.
            let _ = sender.send(result);
        });
        Ok(outcome)
    }

    /// What runs, in words: which operation on which object.
    pub fn running(&self) -> Vec<String> {
        lock(&self.running).iter().map(|(object, entry)| format!("{} of `{object}`", entry.what)).collect()
    }

    /// Waits until nothing runs, at most for `grace`; tells whether all work ended.
    pub async fn drain(&self, grace: Duration) -> bool {
        self.tracker.close();
        tokio::time::timeout(grace, self.tracker.wait()).await.is_ok()
    }
}

type Outcome<T> = Shared<BoxFuture<'static, Option<T>>>;

/// Frees the object also when the work panics.
struct Done {
    running: Arc<Mutex<BTreeMap<String, Running>>>,
    object: String,
}

impl Drop for Done {
    fn drop(&mut self) {
        lock(&self.running).remove(&self.object);
    }
}

/// A panic while the map was locked can't have left it half changed: each change is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn work_goes_on_when_its_caller_is_dropped() {
        let operations = Operations::default();
        let count = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&count);
        let work = async move {
            tokio::time::sleep(Duration::from_secs(10)).await;
            counted.fetch_add(1, Ordering::SeqCst);
        };
        let call = operations.run("test", "volume", vec![1], work);
        assert!(tokio::time::timeout(Duration::from_secs(1), call).await.is_err());
        assert_eq!(operations.running(), ["test of `volume`"]);
        assert!(operations.drain(Duration::from_mins(1)).await);
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_joins_and_another_request_is_told_to_come_back() {
        let operations = Operations::default();
        let slow = |value: u32| async move {
            tokio::time::sleep(Duration::from_secs(10)).await;
            value
        };
        let first = operations.run("attach", "volume", vec![1], slow(1));
        let retry = operations.run("attach", "volume", vec![1], slow(2));
        let other = operations.run("attach", "volume", vec![2], slow(3));
        let elsewhere = operations.run("attach", "another", vec![2], slow(4));
        let (first, retry, other, elsewhere) = tokio::join!(first, retry, other, elsewhere);
        assert_eq!((first, retry, elsewhere), (Ok(1), Ok(1), Ok(4)));
        assert_eq!(other, Err(NoOutcome::Busy { object: "volume".into(), running: "attach" }));
        assert_eq!(operations.run("attach", "volume", vec![2], slow(5)).await, Ok(5));
    }

    #[tokio::test]
    async fn a_panic_frees_the_object() {
        let operations = Operations::default();
        let lost: Result<(), _> =
            operations.run("stage", "volume", vec![], async { panic!("on purpose") }).await;
        assert_eq!(lost, Err(NoOutcome::Lost { object: "volume".into(), what: "stage" }));
        assert_eq!(operations.run("stage", "volume", vec![], async { 1 }).await, Ok(1));
    }
}
