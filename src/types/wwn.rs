//! World wide names: how a disk says which volume it is.

use std::{fmt, str::FromStr};

use sha2::{Digest as _, Sha256};

use super::{NodeName, ParseError, Region, ScsiSlot, VolId};

/// The NAA identifier of a disk, 64 bits.
///
/// A name of ours has NAA nibble 3 (locally assigned, one of the four that Linux prints in `wwid`), a fixed tag of
/// 12 bits, and 48 bits of SHA-256 over what makes the volume unique. It names the volume, never the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wwn(u64);

/// NAA 3 and the tag `c51`.
const OURS: u64 = 0x3c51;

impl Wwn {
    /// The name of a volume. `zone` is the PVE node of a volume on a local storage and `None` on a shared one,
    /// whatever its handle says, so that both handle forms of a shared volume give one name.
    pub fn of_volume(region: &Region, zone: Option<&NodeName>, volid: &VolId) -> Self {
        let mut hash = Sha256::new();
        for part in
            [region.as_str(), volid.storage.as_str(), zone.map_or("", NodeName::as_str), volid.name.as_str()]
        {
            // No part can hold a NUL, so the parts can't run into each other.
            hash.update(part.as_bytes());
            hash.update([0]);
        }
        let digest = hash.finalize();
        let low = digest[..6].iter().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
        Self(OURS << 48 | low)
    }

    /// Whether the name is one that this driver makes.
    pub fn is_ours(self) -> bool {
        self.0 >> 48 == OURS
    }

    /// The slot that a disk attached by the driver before this one was given its name for:
    /// the ASCII text `PVC-IDnn`. It may differ from the slot the disk is in.
    pub fn legacy_slot(self) -> Option<ScsiSlot> {
        let bytes = self.0.to_be_bytes();
        let digits = bytes.strip_prefix(b"PVC-ID")?;
        let digits = std::str::from_utf8(digits).ok()?;
        digits.chars().all(|c| c.is_ascii_digit()).then(|| digits.parse().ok().and_then(ScsiSlot::new))?
    }

    /// The line that Linux shows in `device/wwid`: `naa.` and 16 hex digits.
    pub fn wwid(self) -> String {
        format!("naa.{:016x}", self.0)
    }
}

/// Prints `0x` and 16 lower-case hex digits, as PVE's `wwn=` takes it.
impl fmt::Display for Wwn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{:016x}", self.0)
    }
}

impl FromStr for Wwn {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = || ParseError::new("WWN", text, "it must be `0x` and 16 hex digits");
        let digits = text.strip_prefix("0x").ok_or_else(err)?;
        if digits.len() != 16 || !digits.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(err());
        }
        u64::from_str_radix(digits, 16).map(Self).map_err(|_| err())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(region: &str, zone: Option<&str>, volid: &str) -> Wwn {
        let zone: Option<NodeName> = zone.map(|z| z.parse().expect("a node"));
        Wwn::of_volume(&region.parse().expect("a region"), zone.as_ref(), &volid.parse().expect("a volid"))
    }

    #[test]
    fn names_are_stable() {
        // Changing this value would make every attached disk of every cluster a stranger.
        assert_eq!(
            name("r1", Some("pve1"), "local:9999/vm-9999-pvc-1.raw").to_string(),
            "0x3c5137f0a94ede58"
        );
    }

    #[test]
    fn every_part_makes_a_difference() {
        let names = [
            name("r1", Some("pve1"), "local:9999/vm-9999-pvc-1.raw"),
            name("r2", Some("pve1"), "local:9999/vm-9999-pvc-1.raw"),
            name("r1", Some("pve2"), "local:9999/vm-9999-pvc-1.raw"),
            name("r1", None, "local:9999/vm-9999-pvc-1.raw"),
            name("r1", Some("pve1"), "data:9999/vm-9999-pvc-1.raw"),
            name("r1", Some("pve1"), "local:9999/vm-9999-pvc-2.raw"),
        ];
        for (i, a) in names.iter().enumerate() {
            assert!(a.is_ours());
            assert_eq!(a.legacy_slot(), None);
            assert!(names[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn legacy_names_tell_their_slot() {
        let wwn: Wwn = "0x5056432d49443031".parse().expect("a name");
        assert_eq!(wwn.legacy_slot(), ScsiSlot::new(1));
        assert!(!wwn.is_ours());
        assert_eq!(wwn.wwid(), "naa.5056432d49443031");
    }

    proptest! {
        #[test]
        fn print_and_parse_are_inverse(n: u64) {
            prop_assert_eq!(Wwn(n).to_string().parse::<Wwn>(), Ok(Wwn(n)));
        }
    }
}
