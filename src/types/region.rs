//! Regions: the Proxmox clusters of the configuration.

use std::{fmt, str::FromStr};

use super::ParseError;

/// The name of a configured Proxmox cluster, which is also the topology region: a Kubernetes label value without a slash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region(String);

impl Region {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Region {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        if text.len() > 63
            || !text.chars().all(legal)
            || !edge(text.chars().next())
            || !edge(text.chars().last())
        {
            return Err(ParseError::new(
                "region",
                text,
                "it must be a label value: 1 to 63 letters, digits, `-`, `_`, `.`, with a letter or digit at both ends",
            ));
        }
        Ok(Self(text.to_owned()))
    }
}
