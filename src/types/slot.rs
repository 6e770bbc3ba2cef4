//! SCSI slots of a VM.

use std::{fmt, str::FromStr};

use super::ParseError;

/// A `scsiN` key of a VM config, N from 0 to 30 (qemu-server `QemuServer/Drive.pm`, `$MAX_SCSI_DISKS` = 31).
/// The guest sees the disk at LUN N.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScsiSlot(u8);

impl ScsiSlot {
    /// The slot of index `n`, where there is one.
    pub fn new(n: u8) -> Option<Self> {
        (n <= 30).then_some(Self(n))
    }

    /// The index, which is also the LUN.
    pub fn index(self) -> u8 {
        self.0
    }

    /// The slots that volumes are plugged into, in order: `scsi1` to `scsi30`. `scsi0` is most VMs' boot disk.
    pub fn for_volumes() -> impl Iterator<Item = ScsiSlot> {
        (1..=30).map(Self)
    }
}

impl fmt::Display for ScsiSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "scsi{}", self.0)
    }
}

impl FromStr for ScsiSlot {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = || ParseError::new("SCSI slot", text, "it must be scsi0 to scsi30");
        let digits = text.strip_prefix("scsi").ok_or_else(err)?;
        if digits.is_empty() || (digits.len() > 1 && digits.starts_with('0')) || digits.starts_with('+') {
            return Err(err());
        }
        digits.parse().ok().and_then(Self::new).ok_or_else(err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_prints_and_parses() {
        for n in 0..=30 {
            let slot = ScsiSlot::new(n).expect("0 to 30 are slots");
            assert_eq!(slot.to_string().parse(), Ok(slot));
        }
        for bad in ["scsi31", "scsi01", "scsi", "scsi+1", "scsihw", "virtio1", "SCSI1"] {
            assert!(bad.parse::<ScsiSlot>().is_err(), "{bad}");
        }
    }
}
