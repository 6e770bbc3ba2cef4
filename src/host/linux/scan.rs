//! Scanning SCSI hosts, each in a thread of its own.
//!
//! The write to a scan file ends when the host has answered, and on a controller that hangs it never does. The disk may be on another
//! controller, so nobody waits for that one, and no second thread is hung up on it for the same LUN.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};

use crate::{
    host::error::{PathError, ScanError},
    types::ScsiSlot,
};

/// How long the slower hosts are waited for once one has been scanned. A disk that they find later is seen as well: whoever
/// asked for the scan looks at the list of disks again and again.
const GRACE: Duration = Duration::from_secs(1);

/// The scans that have not ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Scans(Arc<Mutex<BTreeSet<Scan>>>);

/// A scan file and the LUN.
type Scan = (PathBuf, u8);

/// Takes a scan off the list when it ends, or when it never began.
struct Running {
    scans: Scans,
    scan: Scan,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.scans.lock().remove(&self.scan);
    }
}

impl Scans {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<Scan>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, file: &Path, lun: ScsiSlot) -> Option<Running> {
        let scan = (file.to_owned(), lun.index());
        let new = self.lock().insert(scan.clone());
        new.then(|| Running { scans: self.clone(), scan })
    }

    /// Writes to all the files at once. Succeeds where one host at least was scanned; what has not ended then goes on by itself.
    pub(super) async fn run(
        &self,
        files: Vec<PathBuf>,
        lun: ScsiSlot,
        patience: Duration,
        write: impl Fn(&Path, ScsiSlot) -> Result<(), PathError> + Clone + Send + 'static,
    ) -> Result<(), ScanError> {
        let mut deadline = Instant::now() + patience;
        let (mut tasks, mut pending) = (JoinSet::new(), BTreeSet::new());
        let (mut scanned, mut failed) = (false, None);
        for file in files {
            pending.insert(file.clone());
            // What an earlier call hung up on may answer yet, but not to this one.
            let Some(running) = self.begin(&file, lun) else { continue };
            let write = write.clone();
            tasks.spawn_blocking(move || {
                let result = write(&file, lun);
                drop(running);
                (file, result)
            });
        }
        // Cancel safe: what is dropped with the set has either begun, and ends by itself, or never does.
        while let Ok(Some(ended)) = timeout_at(deadline, tasks.join_next()).await {
            // A thread that panicked, or that the end of the runtime kept from beginning, has not answered.
            let Ok((file, result)) = ended else { continue };
            pending.remove(&file);
            match result {
                Ok(()) => {
                    scanned = true;
                    deadline = deadline.min(Instant::now() + GRACE);
                }
                Err(error) => failed = Some(error),
            }
        }
        for file in &pending {
            tracing::warn!(path = %file.display(), lun = lun.index(), "a SCSI host does not answer to a scan");
        }
        match failed.or_else(|| pending.pop_first().map(hung)) {
            _ if scanned => Ok(()),
            Some(error) => Err(error.into()),
            None => Err(ScanError::NoHost),
        }
    }
}

fn hung(path: PathBuf) -> PathError {
    let source = io::Error::new(io::ErrorKind::TimedOut, "the SCSI host does not answer");
    PathError { what: "write to", path, source }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_host_that_hangs_holds_up_no_other_and_no_second_thread() {
        let (release, held) = mpsc::channel::<()>();
        let (written, writes) = mpsc::channel();
        let held = Arc::new(Mutex::new(held));
        let write = move |file: &Path, _| {
            written.send(file.to_owned()).expect("the test listens");
            if file == Path::new("/host0/scan") {
                let _ = held.lock().expect("no writer panics").recv();
            }
            Ok(())
        };
        let (scans, lun) = (Scans::default(), ScsiSlot::new(1).expect("a slot"));
        let files = ["/host0/scan", "/host1/scan"].map(PathBuf::from);
        let patience = Duration::from_mins(1);
        for round in 0..2 {
            scans.run(files.to_vec(), lun, patience, write.clone()).await.expect("host 1 was scanned");
            let began: BTreeSet<PathBuf> = writes.try_iter().collect();
            assert_eq!(began, files[round..].iter().cloned().collect(), "round {round}");
        }
        let error = scans.run(files[..1].to_vec(), lun, patience, write.clone()).await;
        assert!(
            matches!(error, Err(ScanError::Write(error)) if error.source.kind() == io::ErrorKind::TimedOut)
        );

        drop(release);
        while !scans.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        scans.run(files[..1].to_vec(), lun, patience, write).await.expect("it answers again");
    }

    #[tokio::test]
    async fn what_goes_wrong_at_every_host_is_told() {
        let write = |file: &Path, _| {
            Err(PathError { what: "write to", path: file.into(), source: io::ErrorKind::Other.into() })
        };
        let (scans, lun) = (Scans::default(), ScsiSlot::new(1).expect("a slot"));
        let patience = Duration::from_mins(1);
        let error = scans.run(vec!["/host0/scan".into()], lun, patience, write).await;
        assert!(matches!(error, Err(ScanError::Write(_))), "{error:?}");
        let none = scans.run(Vec::new(), lun, patience, write).await;
        assert!(matches!(none, Err(ScanError::NoHost)), "{none:?}");
    }
}
