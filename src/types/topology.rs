//! Where volumes and nodes are: region and zone.

use std::collections::BTreeMap;

use super::{NodeName, ParseError, Region};

/// Topology key of the region; its value is the name of the configured Proxmox cluster.
pub const REGION_KEY: &str = "topology.kubernetes.io/region";
/// Topology key of the zone; its value is the name of the PVE node.
pub const ZONE_KEY: &str = "topology.kubernetes.io/zone";

/// A place: a region, and in it one PVE node or, with no zone, any.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The Proxmox cluster.
    pub region: Region,
    /// The PVE node; `None` means any of the region.
    pub zone: Option<NodeName>,
}

impl Place {
    /// The place as topology segments.
    pub fn segments(&self) -> BTreeMap<String, String> {
        let mut segments = BTreeMap::from([(REGION_KEY.to_owned(), self.region.to_string())]);
        if let Some(zone) = &self.zone {
            segments.insert(ZONE_KEY.to_owned(), zone.to_string());
        }
        segments
    }

    /// Reads topology segments; keys of others are passed over.
    pub fn from_segments(segments: &BTreeMap<String, String>) -> Result<Option<Self>, ParseError> {
        let Some(region) = segments.get(REGION_KEY) else { return Ok(None) };
        let zone = segments.get(ZONE_KEY).map(|zone| zone.parse()).transpose()?;
        Ok(Some(Self { region: region.parse()?, zone }))
    }
}
