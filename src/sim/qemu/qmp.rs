//! QEMU's monitor, spoken as Proxmox VE speaks it (qemu-server `QMPClient.pm`): a connection for each command, since
//! QEMU serves one at a time; limits by command; its words when one is passed.

use serde_json::{Value, json};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

/// How long to wait before a socket whose queue is full is tried again (`QMPClient.pm:$open_connection`).
const AGAIN: Duration = Duration::from_millis(100);

/// Why a command has no result. The texts are Proxmox's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// There is no QEMU.
    #[error("VM {0} not running\n")]
    NotRunning(u32),
    /// The limit has passed; the command may still be carried out.
    #[error("VM {vmid} qmp command '{command}' failed - got timeout\n")]
    Timeout {
        /// The VM.
        vmid: u32,
        /// The command.
        command: String,
    },
    /// QEMU takes no further connection.
    #[error(
        "VM {vmid} qmp command '{command}' failed - unable to connect to VM {vmid} qmp socket - timeout after {retries} retries\n"
    )]
    Busy {
        /// The VM.
        vmid: u32,
        /// The command.
        command: String,
        /// How often it was tried.
        retries: u32,
    },
    /// The connection broke.
    #[error("VM {vmid} qmp command '{command}' failed - {reason}\n")]
    Connection {
        /// The VM.
        vmid: u32,
        /// The command.
        command: String,
        /// What the system said.
        reason: String,
    },
    /// QEMU refused.
    #[error("VM {vmid} qmp command '{command}' failed - {reason}\n")]
    Refused {
        /// The VM.
        vmid: u32,
        /// The command.
        command: String,
        /// QEMU's words.
        reason: String,
    },
    /// What a step of Proxmox's own found wrong.
    #[error("{0}\n")]
    Step(String),
}

/// The monitor of one QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    vmid: u32,
    socket: PathBuf,
}

/// The limit of a command (`QMPClient.pm:cmd`); those of the monitor for people take 25 s in a hotplug
/// (`QMPHelpers.pm:qemu_deviceadd`, `qemu_devicedel`), and a resize 60 s (`Blockdev.pm:resize`).
fn limit(command: &str) -> Duration {
    Duration::from_secs(match command {
        "human-monitor-command" => 25,
        "blockdev-add" | "device_add" | "device_del" | "object-add" | "object-del" | "block_resize"
        | "quit" => 60,
        "blockdev-del" | "blockdev-reopen" => 600,
        _ => 5,
    })
}

impl Qmp {
    pub(super) fn new(vmid: u32, socket: PathBuf) -> Self {
        Self { vmid, socket }
    }

    /// One command within its usual limit.
    pub(super) async fn command(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.within(limit(name), name, arguments).await
    }

    /// One command within a limit.
    pub(super) async fn within(
        &self,
        limit: Duration,
        name: &str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        let started = Instant::now();
        let mut retries = 0;
        let stream = loop {
            retries += 1;
            match UnixStream::connect(&self.socket).await {
                Ok(stream) => break stream,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    if started.elapsed() >= limit {
                        return Err(QmpError::Busy { vmid: self.vmid, command: name.to_owned(), retries });
                    }
                    sleep(AGAIN).await;
                }
                Err(error) => return Err(self.broken(name, &error)),
            }
        };
        match timeout_at(started + limit, self.speak(stream, name, arguments)).await {
            Ok(result) => result,
            Err(_) => Err(QmpError::Timeout { vmid: self.vmid, command: name.to_owned() }),
        }
    }

    /// One command to a QEMU that may not listen yet: a refused connection is not tried again.
    pub(super) async fn once(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.within(Duration::from_secs(5), name, arguments).await
    }

    fn broken(&self, name: &str, error: &std::io::Error) -> QmpError {
        QmpError::Connection { vmid: self.vmid, command: name.to_owned(), reason: error.to_string() }
    }

    async fn speak(&self, stream: UnixStream, name: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut stream = BufReader::new(stream);
        self.answer(&mut stream, name, |answer| answer.get("QMP").is_some()).await?;
        for (id, command, arguments) in [(0, "qmp_capabilities", json!({})), (1, name, arguments)] {
            let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
            line.push('\n');
            stream.get_mut().write_all(line.as_bytes()).await.map_err(|error| self.broken(name, &error))?;
            let answer = self.answer(&mut stream, name, |answer| answer["id"] == json!(id)).await?;
            if let Some(error) = answer.get("error") {
                let reason = error["desc"].as_str().unwrap_or_default().to_owned();
                return Err(QmpError::Refused { vmid: self.vmid, command: name.to_owned(), reason });
            }
            if id == 1 {
                return Ok(answer["return"].clone());
            }
        }
        Ok(Value::Null)
    }

    /// The next message that is wanted; events and others are passed over.
    async fn answer(
        &self,
        stream: &mut BufReader<UnixStream>,
        name: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, QmpError> {
        let mut line = String::new();
        loop {
            line.clear();
            match stream.read_line(&mut line).await {
                Ok(0) => {
                    let gone = std::io::Error::other("client closed connection");
                    return Err(self.broken(name, &gone));
                }
                Ok(_) => {}
                Err(error) => return Err(self.broken(name, &error)),
            }
            let message: Value = serde_json::from_str(&line)
                .map_err(|error| self.broken(name, &std::io::Error::other(error.to_string())))?;
            if wanted(&message) {
                return Ok(message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn events_between_a_command_and_its_answer_are_passed_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("q");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let script =
                "{\"QMP\":{}}\n{\"return\":{},\"id\":0}\n{\"event\":\"RESUME\"}\n{\"return\":[7],\"id\":1}\n";
            stream.write_all(script.as_bytes()).await.expect("it listens");
            let mut lines = BufReader::new(stream).lines();
            let mut said = Vec::new();
            while let Ok(Some(line)) = lines.next_line().await {
                said.push(line);
            }
            said
        });
        let qmp = Qmp::new(101, socket);
        assert_eq!(qmp.command("query-block", json!({})).await, Ok(json!([7])));
        let said = server.await.expect("no panic");
        assert!(said[0].contains("qmp_capabilities") && said[1].contains("query-block"), "{said:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_qemu_that_does_not_answer_is_given_up_in_proxmox_s_words() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("q");
        let _listener = UnixListener::bind(&socket).expect("a socket");
        let error = Qmp::new(101, socket).command("query-pci", json!({})).await.expect_err("it is silent");
        assert_eq!(error.to_string(), "VM 101 qmp command 'query-pci' failed - got timeout\n");
    }
}
