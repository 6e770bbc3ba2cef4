//! Single changes of a VM, one at a time.

use crate::types::{Bytes, ScsiSlot, props::PropertyString};

/// A single change of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Plug a volume in.
    Plug { slot: ScsiSlot, drive: PropertyString },
    /// Change options of a drive.
    Tune { slot: ScsiSlot, drive: PropertyString },
    /// Take a drive out.
    Unplug { key: String },
    /// Take a pending change of a drive back.
    Revert { key: String },
    /// Grow a drive.
    Grow { key: String, size: Bytes },
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plug { slot, drive } => {
                write!(f, "plug `{}` into slot {slot}", drive.bare().unwrap_or_default())
            }
            Self::Tune { slot, .. } => write!(f, "change options of drive {slot}"),
            Self::Unplug { key } => write!(f, "unplug drive {key}"),
            Self::Revert { key } => write!(f, "take back the pending change of drive {key}"),
            Self::Grow { key, size } => write!(f, "grow drive {key} to {size}"),
        }
    }
}

impl Step {
    /// What tasks that do this have in common.
    pub(super) fn act(&self) -> &'static str {
        match self {
            Self::Plug { .. } => "plug",
            Self::Tune { .. } => "tune",
            Self::Unplug { .. } => "unplug",
            Self::Revert { .. } => "take_back",
            Self::Grow { .. } => "grow",
        }
    }

    pub(super) fn key(&self) -> String {
        match self {
            Self::Plug { slot, .. } | Self::Tune { slot, .. } => slot.to_string(),
            Self::Unplug { key } | Self::Revert { key } | Self::Grow { key, .. } => key.clone(),
        }
    }
}

/// Whether a step was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carried {
    /// Proxmox says so; what came of it has to be read.
    Out,
    /// The config changed meanwhile and nothing was done: read and decide again.
    NotOut,
}
