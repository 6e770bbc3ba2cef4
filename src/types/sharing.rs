//! Who may use a volume at once.

/// Who may use a volume at once: the access modes of CSI that this driver knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// One node; how many of its pods is left to the caller: the old `SINGLE_NODE_WRITER` says nothing of it.
    OneNode,
    /// One place on one node.
    OnePlace,
    /// Any number of places on one node.
    ManyPlaces,
    /// One node, which only reads.
    OneReader,
    /// Any number of nodes, all of which only read.
    ManyReaders,
}

impl Sharing {
    /// Whether nobody may write.
    pub fn is_read_only(self) -> bool {
        matches!(self, Self::OneReader | Self::ManyReaders)
    }
}
