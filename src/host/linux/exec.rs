//! The one way a program is run: found in fixed directories, no shell, an empty environment, bounded output, a deadline.
//!
//! A tool that works on a disk gets the opened disk as its standard input and `/proc/self/fd/0` as its argument, so that it
//! opens the very device that was verified, whatever names point where by then.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::Command,
};

use super::device::Device;
use crate::host::error::ToolError;

/// The name of the disk that a tool got, as its argument.
pub(super) const THE_DISK: &str = "/proc/self/fd/0";

const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// What is kept of each output; the rest is read and dropped, since a closed pipe would kill the tool.
const KEPT: usize = 64 * 1024;

/// A program to run.
pub(super) struct Tool {
    name: &'static str,
    args: Vec<String>,
    disk: Option<Arc<Device>>,
    deadline: Option<Duration>,
}

/// What a program left.
pub(super) struct Output {
    pub(super) code: Option<i32>,
    pub(super) stdout: String,
    pub(super) stderr: String,
    status: String,
    tool: &'static str,
}

impl Tool {
    pub(super) fn new<S: Into<String>>(name: &'static str, args: impl IntoIterator<Item = S>) -> Self {
        Self { name, args: args.into_iter().map(Into::into).collect(), disk: None, deadline: None }
    }

    /// Gives the tool the disk, which it finds at [`THE_DISK`].
    pub(super) fn on(mut self, disk: Arc<Device>) -> Self {
        self.disk = Some(disk);
        self
    }

    /// Kills the tool after this time. Without a deadline it is awaited to its end.
    pub(super) fn within(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Runs it and returns what it left, whatever its exit status.
    pub(super) async fn run(self) -> Result<Output, ToolError> {
        let path = find(self.name).await.ok_or(ToolError::Missing(self.name))?;
        let failed = |source| ToolError::Run { tool: self.name, source };
        let stdin = match &self.disk {
            Some(disk) => Stdio::from(disk.file().try_clone().map_err(failed)?),
            None => Stdio::null(),
        };
        tracing::debug!(tool = self.name, args = ?self.args, "running a tool");
        let mut child = Command::new(path)
            .args(&self.args)
            .env_clear()
            .env("LC_ALL", "C")
            .current_dir("/")
            // A signal from the terminal is for us: we decide when a tool ends.
            .process_group(0)
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let work = async { tokio::join!(child.wait(), drain(stdout), drain(stderr)) };
        let (status, stdout, stderr) = match self.deadline {
            None => work.await,
            Some(after) => {
                if let Ok(ended) = tokio::time::timeout(after, work).await {
                    ended
                } else {
                    // A tool in an uninterruptible read goes when the kernel lets it; tokio reaps it then.
                    let _ = child.start_kill();
                    return Err(ToolError::TimedOut { tool: self.name, after });
                }
            }
        };
        let status = status.map_err(failed)?;
        Ok(Output {
            code: status.code(),
            stdout: stdout.map_err(failed)?,
            stderr: stderr.map_err(failed)?,
            status: status.to_string(),
            tool: self.name,
        })
    }
}

impl Output {
    /// The output of a tool that must have ended with 0.
    pub(super) fn success(self) -> Result<Self, ToolError> {
        if self.code == Some(0) { Ok(self) } else { Err(self.failure()) }
    }

    /// The failure that this output tells of.
    pub(super) fn failure(self) -> ToolError {
        let said = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        // mkfs and others tell the cause first and then all their options.
        let lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).take(4).collect();
        let said = if lines.is_empty() { "it said nothing".to_owned() } else { lines.join("; ") };
        ToolError::Failed { tool: self.tool, status: self.status, said }
    }
}

async fn find(name: &str) -> Option<PathBuf> {
    for directory in DIRECTORIES {
        let path = Path::new(directory).join(name);
        if tokio::fs::try_exists(&path).await.unwrap_or(false) {
            return Some(path);
        }
    }
    None
}

async fn drain(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<String> {
    let Some(mut pipe) = pipe else { return Ok(String::new()) };
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let read = pipe.read(&mut buffer).await?;
        if read == 0 {
            return Ok(String::from_utf8_lossy(&kept).into_owned());
        }
        let room = KEPT.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..read.min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_tool_gets_no_environment_and_its_output_is_bounded() {
        let output =
            Tool::new("env", [""; 0]).run().await.expect("env runs").success().expect("and ends well");
        assert_eq!(output.stdout, "LC_ALL=C\n");
        let output =
            Tool::new("seq", ["1", "200000"]).run().await.expect("seq runs").success().expect("well");
        assert_eq!(output.stdout.len(), KEPT);
    }

    #[tokio::test]
    async fn a_tool_past_its_deadline_is_an_error() {
        let slow = Tool::new("sleep", ["60"]).within(Duration::from_millis(20)).run().await;
        assert!(matches!(slow, Err(ToolError::TimedOut { tool: "sleep", .. })));
        assert!(matches!(Tool::new("no-such-tool", [""; 0]).run().await, Err(ToolError::Missing(_))));
    }
}
