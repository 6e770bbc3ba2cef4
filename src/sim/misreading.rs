//! Mistakes on purpose: a replay that does not notice them proves nothing.

/// A rule of Proxmox VE that is got wrong on purpose, for the test that a replay finds it out.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misreading {
    /// What is not there is answered 404, as in other APIs.
    MissingIs404,
    /// A disk that its VM owns vanishes when it is detached, and does not become `unusedN`.
    DetachedVanishes,
}
