//! TODO

/// System calls of a Linux node that no crate wraps.
pub mod linux {
    pub mod loopdev;
}
