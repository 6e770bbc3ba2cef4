//! A QEMU process: kept by a thread that waits for its end, killed with the simulator however that ends.

use rustix::fd::OwnedFd;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Error, Result};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

/// A running process.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    /// It names this process even when its number belongs to another one.
    handle: OwnedFd,
    ended: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Process {
    /// Starts a program whose words go to `log`. `at_end` is called when it has ended, whatever ended it.
    ///
    /// The kernel kills the program when the thread dies that started it (`prctl(2)`, `PR_SET_PDEATHSIG`). So it is
    /// started by a thread that lives as long as it: were it one of the runtime's, it would die with an idle worker.
    pub(super) fn start(
        program: &str,
        arguments: &[OsString],
        log: &Path,
        at_end: impl FnOnce() + Send + 'static,
    ) -> Result<Self> {
        let output = File::create(log)?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", program]).args(arguments);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        // Ctrl-C in a terminal reaches the simulator alone, which then ends its machines.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let (tell, told) = mpsc::channel();
        let ended = Arc::new(AtomicBool::new(false));
        let has_ended = Arc::clone(&ended);
        let thread = std::thread::Builder::new().name("qemu".to_owned()).spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => return drop(tell.send(Err(error))),
            };
            let pid = child.id();
            let handle = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw)
                .ok_or_else(|| Error::other("a process without a number"))
                .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
            // The caller waits for it.
            let _ = tell.send(handle.map(|handle| (pid, handle)));
            // It fails only for a child that was waited for before.
            let _ = child.wait();
            has_ended.store(true, Ordering::Release);
            at_end();
        })?;
        let started = told.recv().map_err(|_| Error::other("the thread that starts QEMU ended"))?;
        let (pid, handle) = started?;
        Ok(Self { pid, handle, ended, thread: Mutex::new(Some(thread)) })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Stops the process or lets it go on.
    pub(super) fn hang(&self, on: bool) {
        // It may have ended.
        let _ = pidfd_send_signal(&self.handle, if on { Signal::STOP } else { Signal::CONT });
    }

    /// Ends it at once and waits until it is gone. Blocks.
    pub(super) fn kill(&self) {
        // It may have ended.
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // It fails only after a panic, and then the process is not waited for, but killed.
            let _ = thread.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_gone_when_it_was_killed_and_says_when_it_ended() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        let (tell, told) = mpsc::channel();
        let process = Process::start("sleep", &["600".into()], &log, move || {
            let _ = tell.send(());
        });
        let process = process.expect("it starts");
        assert!(!process.has_ended());
        let entry = format!("/proc/{}", process.pid());
        assert!(Path::new(&entry).exists());
        process.kill();
        assert!(process.has_ended() && !Path::new(&entry).exists());
        told.recv().expect("its end is told");
    }
}
