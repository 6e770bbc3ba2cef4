//! What somebody who looks after the cluster should know: the driver's side of Kubernetes Events.

/// What is said about an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Notice {
    /// Whether somebody should look.
    pub warning: bool,
    /// Why it was said, in one word of capitals: `VmMoved`.
    pub reason: &'static str,
    /// The sentence.
    pub note: String,
}

impl Notice {
    /// Something odd that somebody should look at.
    pub fn warning(reason: &'static str, note: impl Into<String>) -> Self {
        Self { warning: true, reason, note: note.into() }
    }

    /// Something that happened in order.
    pub fn normal(reason: &'static str, note: impl Into<String>) -> Self {
        Self { warning: false, reason, note: note.into() }
    }
}

/// What a notice is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum About {
    /// A node, by its CSI node id (`name` or `name/vmid`).
    Node(String),
    /// A volume, by its handle: where it is bound, the claim is meant.
    Volume(String),
    /// A claim that has no volume yet.
    Claim {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}
