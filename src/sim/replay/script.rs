//! What a transcript does not say: the world each part begins in, and what happened between two records.

use super::record::Record;
use crate::sim::faults::Fault;
use crate::sim::misreading::Misreading;
use crate::sim::world::{Vm, World, WorldError};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Something that happened before a record.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Step {
    /// A request that was not recorded, as `METHOD /path`.
    Call(Unrecorded),
    /// A fault, or a change of the cluster.
    Fault(Fault),
    /// The same, some seconds into the record.
    Later(u64, Fault),
    /// A VM comes, in place of one of the same id.
    Vm(Vm),
    /// A VM goes, its volumes stay.
    Forget(u32),
    /// A VM stands on another node.
    Move(u32, String),
    /// A VM is started or stopped.
    Power(u32, bool),
    /// A volume is there: node, volume id, bytes.
    Volume(String, String, u64),
    /// A volume is gone.
    Remove(String, String),
    /// The volumes of owner 9999 on a storage are gone.
    Clear(String),
    /// A lock is held from here on: `vm/100`, `storage/pve1/local`.
    Hold(String),
    /// All locks are let go.
    Release,
    /// Time passes.
    Wait(u64),
}

/// A request that was not recorded.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Unrecorded {
    /// Method and path behind `/api2/json`.
    pub(super) to: String,
    /// Parameters.
    #[serde(default)]
    pub(super) form: BTreeMap<String, String>,
    /// Token; root's without one.
    #[serde(default, rename = "as")]
    pub(super) token: Option<String>,
    /// Whether it may be refused.
    #[serde(default)]
    pub(super) fails: bool,
    /// Id of the recorded task that this one stands for.
    #[serde(default)]
    pub(super) upid: Option<String>,
}

/// How a record is sent when it does not say so itself.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sending {
    /// `id=secret` of a token in place of the world's.
    #[serde(default)]
    pub(super) authorization: Option<String>,
    /// Ticket of this user, in the cookie.
    #[serde(default)]
    pub(super) ticket: Option<String>,
    /// With the ticket's CSRF token (`good`) or a wrong one (`bad`).
    #[serde(default)]
    pub(super) csrf: Option<String>,
    /// A JSON body.
    #[serde(default)]
    pub(super) json: Option<BTreeMap<String, String>>,
    /// Parameters in place of redacted ones.
    #[serde(default)]
    pub(super) form: Option<BTreeMap<String, String>>,
    /// The task of the answer goes on while the next record is sent.
    #[serde(default)]
    pub(super) leave: bool,
}

/// The script of a transcript.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// Worlds by the `seq` they begin at.
    #[serde(default)]
    pub(super) worlds: BTreeMap<u32, World>,
    /// What happened before a record.
    #[serde(default)]
    pub(super) before: BTreeMap<u32, Vec<Step>>,
    /// How records are sent.
    #[serde(default)]
    pub(super) send: BTreeMap<u32, Sending>,
    /// What the simulator gets wrong on purpose.
    #[serde(skip)]
    pub(super) misreading: Option<Misreading>,
    /// Keys of bodies that are not compared, by record: what the guest or the recording machine says.
    #[serde(default)]
    pub(super) except: BTreeMap<u32, String>,
}

/// A script that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// The file is not YAML of the right shape.
    #[error("cannot read the script: {0}")]
    Syntax(String),
    /// The world cannot be read.
    #[error(transparent)]
    World(#[from] WorldError),
}

impl Script {
    /// Reads a script.
    pub fn from_yaml(text: &str) -> Result<Self, ScriptError> {
        serde_saphyr::from_str(text).map_err(|error| ScriptError::Syntax(error.to_string()))
    }

    /// The built-in script of a transcript: names that begin with `H-` are those of the holder recording.
    pub fn builtin(first_name: &str) -> Result<Self, ScriptError> {
        Self::from_yaml(if first_name.starts_with("H-") {
            include_str!("scripts/holder.yaml")
        } else {
            include_str!("scripts/main.yaml")
        })
    }

    /// The script for a recording: the built-in one for those in `tests/fixtures` and parts of them, told by the first
    /// record's name, and an empty one for any other, which needs a world.
    pub fn for_recording(records: &[Record], world: Option<World>) -> Result<Self, ScriptError> {
        let name = records.first().map_or("", |record| record.name.as_str());
        let mut letters = name.chars();
        let group = letters.next().is_some_and(|letter| ('A'..='P').contains(&letter));
        let ours = group && letters.next().is_some_and(|next| next == '-' || next.is_ascii_digit());
        let script = if ours { Self::builtin(name)? } else { Self::default() };
        Ok(match world {
            Some(world) => script.starting_in(world),
            None => script,
        })
    }

    /// Has the simulator misread Proxmox in one way: a replay must find it out.
    #[doc(hidden)]
    #[must_use]
    pub fn misreading(mut self, misreading: Misreading) -> Self {
        self.misreading = Some(misreading);
        self
    }

    /// The same with one world at the beginning.
    #[must_use]
    pub fn starting_in(mut self, world: World) -> Self {
        self.worlds = BTreeMap::from([(0, world)]);
        self
    }
}

/// The text of a form value, as PVE's clients send it.
pub(super) fn form_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(flag) => u8::from(*flag).to_string(),
        other => other.to_string(),
    }
}
