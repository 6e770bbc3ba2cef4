//! VM ids.

use std::{fmt, str::FromStr};

use super::ParseError;

/// The id of a VM, unique in one PVE cluster: 100 to 999999999 (pve-common `JSONSchema.pm`, `pve-vmid`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(u32);

impl VmId {
    /// The id of value `n`, where it is in PVE's range.
    pub fn new(n: u32) -> Option<Self> {
        (100..=999_999_999).contains(&n).then_some(Self(n))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for VmId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = || ParseError::new("VMID", text, "it must be a number from 100 to 999999999");
        if text.starts_with(['0', '+']) {
            return Err(err());
        }
        text.parse().ok().and_then(Self::new).ok_or_else(err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_range_of_pve_parses() {
        assert_eq!("100".parse::<VmId>().map(VmId::get), Ok(100));
        for bad in ["99", "1000000000", "0100", "+100", "", "1e3", " 100"] {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
    }
}
