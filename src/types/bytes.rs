//! Sizes in bytes.

use std::{fmt, str::FromStr};

use super::ParseError;

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(u64);

impl Bytes {
    /// One mebibyte.
    pub const MIB: Bytes = Bytes(1 << 20);
    /// One gibibyte.
    pub const GIB: Bytes = Bytes(1 << 30);
    /// What new volumes are rounded up to: 512 MiB, as the driver before this one did.
    pub const VOLUME_STEP: Bytes = Bytes(512 << 20);
    /// The size of a volume for which nothing was asked.
    pub const VOLUME_DEFAULT: Bytes = Bytes(10 << 30);

    /// A size of `n` bytes.
    pub const fn new(n: u64) -> Self {
        Self(n)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The next multiple of `step`, or `None` where that passes what 64 bits hold.
    pub fn round_up(self, step: Bytes) -> Option<Bytes> {
        self.0.checked_next_multiple_of(step.0).map(Bytes)
    }

    /// The size in the whole KiB that an allocation takes: PVE reads a number without unit as KiB.
    /// `None` where it is not a multiple of 1 KiB (pve-storage `Storage/Content.pm`, parameter `size`).
    pub fn as_kib(self) -> Option<u64> {
        self.0.is_multiple_of(1024).then_some(self.0 / 1024)
    }
}

/// Prints the largest binary unit that leaves a whole number: `10 GiB`, `1536 MiB`, `1000 bytes`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// Parses what [`Display`](fmt::Display) prints, and the sizes of PVE's drive strings (`10G`, `512M`, `4096K`, plain bytes).
/// Source: pve-common `JSONSchema.pm:parse_size`.
impl FromStr for Bytes {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = |why| ParseError::new("size", text, why);
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| err("it must begin with a whole number"))?;
        let shift = match unit.trim_start() {
            "" | "bytes" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(err("the unit must be K, M, G, T or their KiB, MiB, GiB, TiB")),
        };
        number.checked_mul(1 << shift).map(Bytes).ok_or_else(|| err("it is too large"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn print_and_parse_are_inverse(n: u64) {
            let size = Bytes::new(n);
            prop_assert_eq!(size.to_string().parse::<Bytes>(), Ok(size));
        }
    }

    #[test]
    fn drive_string_sizes_parse() {
        assert_eq!("10G".parse(), Ok(Bytes::new(10 << 30)));
        assert_eq!("1200M".parse(), Ok(Bytes::new(1200 << 20)));
        assert!("G".parse::<Bytes>().is_err());
        assert!("1.5G".parse::<Bytes>().is_err());
        assert!("99999999999T".parse::<Bytes>().is_err());
    }

    #[test]
    fn rounding_goes_up_and_never_wraps() {
        assert_eq!(Bytes::new(1).round_up(Bytes::VOLUME_STEP), Some(Bytes::VOLUME_STEP));
        assert_eq!(Bytes::VOLUME_STEP.round_up(Bytes::VOLUME_STEP), Some(Bytes::VOLUME_STEP));
        assert_eq!(Bytes::new(u64::MAX).round_up(Bytes::VOLUME_STEP), None);
    }
}
