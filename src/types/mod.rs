//! The vocabulary: values without IO, parsed once at the edge.
//!
//! A type here can only be made from text that is valid, so everything behind the edge works with values
//! that are safe to put into a URL, a property string or an argument list. Start with [`handle`].

pub mod attributes;
pub mod bytes;
pub mod cluster;
pub mod credentials;
pub mod fingerprint;
pub mod handle;
pub mod node;
pub mod notice;
pub mod params;
pub mod props;
pub mod publish;
pub mod region;
pub mod sharing;
pub mod slot;
pub mod storage;

pub mod topology;
pub mod upid;
pub mod vmid;
pub mod wwn;

pub use bytes::Bytes;
pub use credentials::Credentials;
pub use fingerprint::Fingerprint;
pub use handle::VolumeHandle;
pub use node::NodeName;
pub use region::Region;
pub use slot::ScsiSlot;
pub use storage::{StorageId, VolId, VolumeName};
pub use upid::Upid;
pub use vmid::VmId;
pub use wwn::Wwn;

/// A text that is not a value of the type it was parsed as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a valid {what}: {why}")]
pub struct ParseError {
    /// The name of the type, as a person would say it.
    pub what: &'static str,
    /// The refused text, cut to a length fit for a message.
    pub text: String,
    /// The rule that the text breaks.
    pub why: &'static str,
}

impl ParseError {
    pub(crate) fn new(what: &'static str, text: &str, why: &'static str) -> Self {
        Self { what, text: text.chars().take(160).collect(), why }
    }
}
