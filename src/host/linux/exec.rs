//! The one way a program is run: found in fixed directories, no shell, an empty environment, bounded output, a deadline.
//!
//! A tool that works on a disk gets the opened disk as its standard input and `/proc/self/fd/0` as its argument, so that it
//! opens the very device that was verified, whatever names point where by then. One that reads a secret gets that as its standard
//! input, and finds the disk among the descriptors of this process.

use std::{io, path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{ChildStdin, Command},
};

use super::{call::Calls, device::Device};
use crate::host::{error::ToolError, luks::Passphrase};

/// The name of the disk that a tool got, as its argument.
pub(super) const THE_DISK: &str = "/proc/self/fd/0";

/// Where tools are looked for, in this order.
pub(super) const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// What is kept of each output; the rest is read and dropped, since a closed pipe would kill the tool.
const KEPT: usize = 64 * 1024;

/// The programs of this machine, and which of them have not come back.
#[derive(Debug, Clone)]
pub(super) struct Tools {
    directories: Arc<[PathBuf]>,
    pub(super) calls: Calls,
}

/// A program to run.
pub(super) struct Tool {
    name: &'static str,
    args: Vec<String>,
    environment: Option<(&'static str, &'static str)>,
    input: Input,
    deadline: Option<Duration>,
}

/// What a program has as its standard input.
enum Input {
    Nothing,
    Disk(Arc<Device>),
    Secret(Passphrase),
}

/// What a program left.
pub(super) struct Output {
    pub(super) code: Option<i32>,
    pub(super) stdout: String,
    pub(super) stderr: String,
    status: String,
    tool: &'static str,
}

impl Tools {
    /// The tools in these directories.
    pub(super) fn new(directories: &[PathBuf], calls: Calls) -> Self {
        Self { directories: directories.into(), calls }
    }

    async fn find(&self, name: &'static str) -> Result<PathBuf, ToolError> {
        for directory in self.directories.iter() {
            let path = directory.join(name);
            if tokio::fs::try_exists(&path).await.unwrap_or(false) {
                return Ok(path);
            }
        }
        let directories: Vec<_> = self.directories.iter().map(|path| path.display().to_string()).collect();
        Err(ToolError::Missing { tool: name, directories: directories.join(", ") })
    }

    /// Runs a tool and returns what it left, whatever its exit status.
    pub(super) async fn run(&self, tool: Tool) -> Result<Output, ToolError> {
        let name = tool.name;
        let path = self.find(name).await?;
        let failed = |source| ToolError::Run { tool: name, source };
        let stdin = match &tool.input {
            Input::Nothing => Stdio::null(),
            Input::Disk(disk) => Stdio::from(disk.file().try_clone().map_err(failed)?),
            Input::Secret(_) => Stdio::piped(),
        };
        // One that was killed and does not go, since it hangs in the kernel, keeps the next one from hanging as well.
        let running = match &tool.input {
            Input::Disk(disk) => Some(self.calls.begin(name, disk.node(), 1).map_err(failed)?),
            _ => None,
        };
        tracing::debug!(tool = name, args = ?tool.args, "running a tool");
        let mut child = Command::new(path)
            .args(&tool.args)
            .env_clear()
            .env("LC_ALL", "C")
            .envs(tool.environment)
            .current_dir("/")
            // A signal from the terminal is for us: we decide when a tool ends.
            .process_group(0)
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let work =
            async { tokio::join!(child.wait(), drain(stdout), drain(stderr), tell(stdin, &tool.input)) };
        let (status, stdout, stderr, ()) = match tool.deadline {
            None => work.await,
            Some(after) => {
                if let Ok(ended) = tokio::time::timeout(after, work).await {
                    ended
                } else {
                    let _ = child.start_kill();
                    tokio::spawn(async move {
                        let _ = child.wait().await;
                        drop(running);
                    });
                    return Err(ToolError::TimedOut { tool: name, after });
                }
            }
        };
        let status = status.map_err(failed)?;
        Ok(Output {
            code: status.code(),
            stdout: stdout.map_err(failed)?,
            stderr: stderr.map_err(failed)?,
            status: status.to_string(),
            tool: name,
        })
    }
}

impl Tool {
    pub(super) fn new<S: Into<String>>(name: &'static str, args: impl IntoIterator<Item = S>) -> Self {
        let args = args.into_iter().map(Into::into).collect();
        Self { name, args, environment: None, input: Input::Nothing, deadline: None }
    }

    /// Gives the tool the disk, which it finds at [`THE_DISK`].
    pub(super) fn on(mut self, disk: Arc<Device>) -> Self {
        self.input = Input::Disk(disk);
        self
    }

    /// Gives the tool a secret to read, byte for byte and to the end.
    pub(super) fn told(mut self, secret: Passphrase) -> Self {
        self.input = Input::Secret(secret);
        self
    }

    /// Sets a variable of the tool's environment, which is empty but for that and the language.
    pub(super) fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.environment = Some((name, value));
        self
    }

    /// Kills the tool after this time. Without a deadline it is awaited to its end.
    pub(super) fn within(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
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
        self.said(said)
    }

    /// The failure of a tool that reports on its standard output.
    pub(super) fn failure_in_stdout(self) -> ToolError {
        let said = if self.stdout.trim().is_empty() { &self.stderr } else { &self.stdout };
        self.said(said)
    }

    fn said(&self, said: &str) -> ToolError {
        // mkfs and others tell the cause first and then all their options.
        let lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).take(4).collect();
        let said = if lines.is_empty() { "it said nothing".to_owned() } else { lines.join("; ") };
        ToolError::Failed { tool: self.tool, status: self.status.clone(), said }
    }
}

/// Writes the secret, and closes the pipe. A tool that does not read it says why by its exit status.
async fn tell(pipe: Option<ChildStdin>, input: &Input) {
    if let (Some(mut pipe), Input::Secret(secret)) = (pipe, input) {
        let _ = pipe.write_all(secret.as_bytes()).await;
    }
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
    use std::path::Path;

    use super::*;

    fn tools() -> Tools {
        Tools::new(&DIRECTORIES.map(PathBuf::from), Calls::default())
    }

    #[tokio::test]
    async fn a_tool_gets_no_environment_and_its_output_is_bounded() {
        let run = async |tool| tools().run(tool).await.expect("it runs").success().expect("and ends well");
        assert_eq!(run(Tool::new("env", [""; 0])).await.stdout, "LC_ALL=C\n");
        assert_eq!(run(Tool::new("env", [""; 0]).with("A", "b")).await.stdout, "A=b\nLC_ALL=C\n");
        assert_eq!(run(Tool::new("seq", ["1", "200000"])).await.stdout.len(), KEPT);
    }

    #[tokio::test]
    async fn a_tool_past_its_deadline_is_an_error() {
        let slow = Tool::new("sleep", ["60"]).within(Duration::from_millis(20));
        assert!(matches!(tools().run(slow).await, Err(ToolError::TimedOut { tool: "sleep", .. })));
        let missing = tools().run(Tool::new("no-such-tool", [""; 0])).await;
        assert!(matches!(missing, Err(ToolError::Missing { .. })));
    }

    #[tokio::test]
    async fn p9_a_secret_reaches_a_tool_by_its_standard_input_alone() {
        let secret = b"a\nb\0c\xff";
        let tool = Tool::new("od", ["-An", "-v", "-tx1"]).told(Passphrase::new(*secret));
        let output = tools().run(tool).await.expect("it runs").success().expect("and ends well");
        assert_eq!(output.stdout.trim(), "61 0a 62 00 63 ff", "every byte, and no other");
        let deaf = Tool::new("true", [""; 0]).told(Passphrase::new(vec![b'x'; 1 << 20]));
        tools().run(deaf).await.expect("who does not listen is not waited for").success().expect("well");
    }

    #[tokio::test]
    async fn a_tool_that_hangs_on_a_disk_keeps_the_next_from_hanging() {
        let disk = Arc::new(Device::open(Path::new("/dev/null")).expect("it opens"));
        let tools = tools();
        let earlier = tools.calls.begin("true", disk.node(), 1).expect("the first");
        let next = tools.run(Tool::new("true", [""; 0]).on(Arc::clone(&disk))).await;
        assert!(
            matches!(next, Err(ToolError::Run { source, .. }) if source.kind() == io::ErrorKind::TimedOut)
        );
        drop(earlier);
        tools.run(Tool::new("true", [""; 0]).on(disk)).await.expect("it runs again");
    }
}
