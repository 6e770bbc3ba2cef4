//! Truth: requests recorded on a real Proxmox VE are sent to a fresh simulator, and every answer is compared.
//!
//! `record` reads a transcript, `script` says in which world each part of it begins and what happened between the
//! records (another's task, a lock held, a node cut off), `run` sends, `compare` finds the differences: in status,
//! reason phrase, content type and body. Ids of the recording are mapped to the simulator's as they appear (`ids`).
//! Read `run::replay` first.

mod compare;
mod ids;
mod record;
mod run;
mod script;

pub use record::{Record, RecordError, Response};
pub use run::{Outcome, ReplayError, Verdict, replay};
pub use script::{Script, ScriptError};
