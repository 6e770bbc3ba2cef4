//! Names of Proxmox nodes.

use std::{fmt, str::FromStr};

use super::ParseError;

/// The name of a PVE node, which is also the topology zone: a DNS label (pve-common `JSONSchema.pm`, `pve-node`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for NodeName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let legal = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if text.is_empty()
            || text.len() > 63
            || !text.chars().all(legal)
            || text.starts_with('-')
            || text.ends_with('-')
        {
            return Err(ParseError::new(
                "Proxmox node name",
                text,
                "it must be 1 to 63 letters, digits and inner dashes",
            ));
        }
        Ok(Self(text.to_owned()))
    }
}
