//! A child process that dies with its test, however that ends, and tells what it said.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::{Instant, sleep};

/// A running process; dropping it kills it and waits for its end.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    is_quiet: bool,
}

impl Process {
    /// Starts a program whose output goes to `<directory>/<name>.log`. The kernel kills it should this thread die.
    pub fn start<A: AsRef<OsStr>>(
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
        directory: &Path,
    ) -> io::Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log)?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .current_dir(directory)
            // Nothing of the person who runs it: no kubeconfig, no caches, no settings of etcd.
            .env_clear()
            .env("HOME", directory)
            .env("HOSTNAME", name)
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Ctrl-C reaches the parent alone, which then ends the others.
            .process_group(0)
            .spawn()?;
        Ok(Self { name: name.to_owned(), child, log, is_quiet: false })
    }

    /// The same, but a failed test does not print its last words.
    pub fn quiet(mut self) -> Self {
        self.is_quiet = true;
        self
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// All that it said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines that it said.
    pub fn last_words(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("process ids are small");
        // It may have ended already.
        let _ = kill(Pid::from_raw(pid), signal);
    }

    /// Waits until it has ended by itself.
    pub async fn end(&mut self, patience: Duration) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(
                started.elapsed() < patience,
                "`{}` does not end within {patience:?}:\n{}",
                self.name,
                self.last_words()
            );
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks it to end, as Kubernetes does, and waits for it.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.end(Duration::from_secs(30)).await
    }

    /// Ends it at once: it can neither say nor give back anything.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() && !self.is_quiet {
            eprintln!("--- the last words of `{}`:\n{}", self.name, self.last_words());
        }
    }
}
