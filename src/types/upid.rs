//! Task ids of Proxmox.

use std::{fmt, str::FromStr};

use super::{NodeName, ParseError};

/// The id of a Proxmox task: `UPID:node:pid:pstart:starttime:type:id:user:` (pve-common `Tools.pm:upid_decode`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Upid {
    text: String,
    node: NodeName,
}

impl Upid {
    /// The node the task runs on, the only one that knows its state.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// What the task does: `qmconfig`, `imgdel`, …
    pub fn kind(&self) -> &str {
        // Nine fields are there, or it would not have parsed.
        self.text.split(':').nth(5).unwrap_or_default()
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Upid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Upid {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = |why| ParseError::new("task id", text, why);
        let mut parts = text.split(':');
        if parts.next() != Some("UPID") {
            return Err(err("it must begin with `UPID:`"));
        }
        let node =
            parts.next().and_then(|node| node.parse().ok()).ok_or_else(|| err("it must name a node"))?;
        if parts.count() < 6 || text.chars().any(|c| c.is_control() || c == '/' || c == ' ') {
            return Err(err("it must have nine fields without blanks, slashes or control characters"));
        }
        Ok(Self { text: text.to_owned(), node })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_id_knows_its_node() {
        let text = "UPID:pve1:00004B43:00021E5E:6B001EFB:imgdel:9999@local:csi@pve!csi:";
        let upid: Upid = text.parse().expect("a task id");
        assert_eq!((upid.node().as_str(), upid.kind(), upid.as_str()), ("pve1", "imgdel", text));
        for bad in ["", "garbage", "UPID:pve1", "UPID:pve1:1:2:3:x/../y:4:u:"] {
            assert!(bad.parse::<Upid>().is_err(), "{bad}");
        }
    }
}
