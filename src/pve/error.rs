//! What can go wrong with a request, and whether it may have been acted on all the same.

use std::{collections::BTreeMap, fmt};

use super::transport::TransportError;

/// A request that gave no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The request never reached a server: it may be sent again.
    #[error("{request} was not sent")]
    NotSent {
        /// The request, as method and path.
        request: RequestName,
        /// Why.
        #[source]
        source: TransportError,
    },
    /// The request may have been acted on: the state must be read before anything is concluded.
    #[error("{request} may have been acted on, but no answer came")]
    MaybeSent {
        /// The request.
        request: RequestName,
        /// Why.
        #[source]
        source: TransportError,
    },
    /// A node between us and the one that had to act did not pass the request on, or not the answer back.
    #[error("{request}: {status} {message}; the node it was meant for can not be reached")]
    Unreachable {
        /// The request.
        request: RequestName,
        /// The HTTP status, 595 to 599 or a gateway's 502 to 504.
        status: u16,
        /// The reason phrase.
        message: String,
    },
    /// Proxmox refused.
    #[error("{request}: Proxmox answered {status} {refusal}")]
    Refused {
        /// The request.
        request: RequestName,
        /// The HTTP status.
        status: u16,
        /// What Proxmox said.
        refusal: Refusal,
    },
    /// The answer can't be read, so that it is not known what was done.
    #[error("{request}: the answer can not be read: {why}")]
    Unreadable {
        /// The request.
        request: RequestName,
        /// What is wrong with it.
        why: String,
    },
}

/// A request as people read it: `PUT /nodes/pve1/qemu/100/config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestName(pub(super) String);

impl fmt::Display for RequestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Proxmox's own words.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refusal {
    /// The message, from the body where there is one, else from the reason phrase.
    pub message: String,
    /// The parameters that were refused, each with the reason.
    pub errors: BTreeMap<String, String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message.trim_end())?;
        for (parameter, error) in &self.errors {
            write!(f, " {parameter}: {}", error.trim_end())?;
        }
        Ok(())
    }
}

impl ApiError {
    /// Whether it is certain that the request changed nothing. Proxmox's own refusals are not: a task or a call may have
    /// failed half way (quorum lost during an unplug). Only a request that never arrived, or was refused before it was looked at, is.
    pub fn changed_nothing(&self) -> bool {
        match self {
            Self::NotSent { .. } => true,
            Self::Refused { status, .. } => matches!(status, 401 | 403 | 501) || self.is_schema_refusal(),
            Self::MaybeSent { .. } | Self::Unreachable { .. } | Self::Unreadable { .. } => false,
        }
    }

    /// Whether Proxmox never gave its verdict, so that asking again may help.
    pub fn is_unknown(&self) -> bool {
        match self {
            Self::NotSent { .. }
            | Self::MaybeSent { .. }
            | Self::Unreachable { .. }
            | Self::Unreadable { .. } => true,
            Self::Refused { .. } => false,
        }
    }

    /// The refusal, where Proxmox refused.
    pub fn refusal(&self) -> Option<(u16, &Refusal)> {
        match self {
            Self::Refused { status, refusal, .. } => Some((*status, refusal)),
            _ => None,
        }
    }

    fn is_schema_refusal(&self) -> bool {
        let schema =
            ["property is not defined", "property is missing", "type check", "does not match the regex"];
        self.refusal().is_some_and(|(status, refusal)| {
            status == 400 && refusal.errors.values().any(|e| schema.iter().any(|s| e.contains(s)))
        })
    }

    fn says(&self, text: &str) -> bool {
        self.refusal()
            .is_some_and(|(_, r)| r.message.contains(text) || r.errors.values().any(|e| e.contains(text)))
    }

    /// The token is wrong, unknown or expired (pve-http-server `AnyEvent.pm`, status 401).
    pub fn is_unauthenticated(&self) -> bool {
        self.refusal().is_some_and(|(status, _)| status == 401)
    }

    /// A privilege is missing (pve-access-control `RPCEnvironment.pm:check_full`, status 403).
    pub fn is_forbidden(&self) -> bool {
        self.refusal().is_some_and(|(status, _)| status == 403)
    }

    /// The node has no such VM: it was destroyed, or it is on another node now (pve-guest-common `AbstractConfig.pm:load_config`).
    pub fn is_no_such_vm(&self) -> bool {
        matches!(self, Self::Refused { refusal, .. }
            if refusal.message.contains("Configuration file '") && refusal.message.contains("does not exist"))
    }

    /// The config changed since its digest was read (pve-common `Tools.pm:assert_if_modified`).
    pub fn is_digest_mismatch(&self) -> bool {
        self.says(DIGEST_MISMATCH)
    }

    /// A disk or VM of that name is there already.
    pub fn is_already_exists(&self) -> bool {
        self.says("already exists")
    }

    /// The storage has no room (texts of qemu-img, lvcreate and the kernel).
    pub fn is_no_space(&self) -> bool {
        [
            "No space left on device",
            "insufficient free space",
            "Insufficient free space",
            "out of space",
            "size is too large",
        ]
        .iter()
        .any(|text| self.says(text))
    }

    /// A single-volume query found nothing it could read, which does not prove absence (pve-storage `volume_size_info` of `Storage.pm`,
    /// `LVMPlugin.pm`, `ZFSPoolPlugin.pm`, `RBDPlugin.pm`: a pool that is not imported reads the same).
    pub fn is_volume_unreadable(&self) -> bool {
        (self.says("volume_size_info on '") && self.says("no format"))
            || self.says("can't get size of '")
            || (self.says("zfs error: cannot open '") && self.says("dataset does not exist"))
            || (self.says("rbd error: rbd: error opening image ")
                && self.says("(2) No such file or directory"))
    }
}

/// The text of a stale digest, in answers and in the exit status of tasks.
pub(super) const DIGEST_MISMATCH: &str = "checksum mismatch (file change by other user?)";

impl ApiError {
    /// A node that is known to be offline, and is not asked.
    pub fn offline(node: &crate::types::NodeName) -> Self {
        Self::Unreachable {
            request: RequestName(format!("a request to node `{node}`")),
            status: 595,
            message: "the cluster says that it is offline".to_owned(),
        }
    }

    /// Credentials that were refused a moment ago, or can't be used.
    pub(super) fn unauthenticated(request: RequestName, message: String) -> Self {
        Self::Refused { request, status: 401, refusal: Refusal { message, ..Refusal::default() } }
    }

    /// Proxmox's own words, where it refused.
    pub(super) fn words(&self) -> String {
        self.refusal().map(|(_, refusal)| refusal.message.clone()).unwrap_or_default()
    }

    /// An answer whose content makes no sense.
    pub(crate) fn unreadable(request: &str, why: &str) -> Self {
        Self::Unreadable { request: RequestName(request.to_owned()), why: why.to_owned() }
    }
}
