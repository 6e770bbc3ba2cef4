//! Smaller things of the state: users and tokens, files that are no disk images, what guests know, requests.

use super::state::VolumeKey;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A user (pve-access-control `user.cfg`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Who has none can't log in.
    #[serde(default)]
    pub password: Option<String>,
    /// Whether the user may come in at all.
    pub enabled: bool,
    /// Seconds since 1970 after which the user may not; 0 for never.
    #[serde(default)]
    pub expire: u64,
    /// `firstname`, `lastname`, `email`, `comment`, `keys`, where they are set.
    #[serde(default)]
    pub notes: BTreeMap<String, String>,
}

/// What is said of a token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenNote {
    /// Seconds since 1970 after which it is not taken; 0 for never.
    #[serde(default)]
    pub expire: u64,
    /// What it is for.
    #[serde(default)]
    pub comment: Option<String>,
}

/// A file on a storage that is no disk image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageFile {
    /// Where it is; the name is as in `iso/debian.iso`.
    pub key: VolumeKey,
    /// Bytes.
    pub size: u64,
    /// Seconds since 1970.
    pub ctime: u64,
}

/// What a VM's guest knows beside its disks, as far as its agent shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSystem {
    /// Files by path, in base64, as the agent wrote them.
    pub files: BTreeMap<String, String>,
    /// Whether its filesystems are frozen.
    #[serde(default)]
    pub frozen: bool,
    /// Commands that the agent has run, by process id.
    pub runs: BTreeMap<u32, Run>,
}

/// A command that a guest has run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The command line, words separated by blanks.
    pub command: String,
    /// How it ended.
    pub exitcode: i64,
    /// What it wrote.
    pub out: String,
    /// What it complained of.
    pub err: String,
}

/// One request the API has seen.
#[derive(Debug, Clone, Serialize)]
pub struct LogEntry {
    /// Number of the request.
    pub n: u64,
    /// Milliseconds since the start.
    pub at_ms: u64,
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Who asked, empty where authentication failed.
    pub user: String,
    /// Status of the answer; 0 when it was lost by a fault.
    pub status: u16,
    /// Reason phrase.
    pub reason: String,
    /// Milliseconds the request took.
    pub elapsed_ms: u64,
}
