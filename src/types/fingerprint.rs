//! Fingerprints of certificates.

use std::{fmt, str::FromStr};

use super::ParseError;

/// The SHA-256 of a certificate, as Proxmox shows it: 32 bytes in hex, with colons between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint with these bytes.
    pub fn new(sha256: [u8; 32]) -> Self {
        Self(sha256)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let colon = if index == 0 { "" } else { ":" };
            write!(f, "{colon}{byte:02X}")?;
        }
        Ok(())
    }
}

impl FromStr for Fingerprint {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || {
            ParseError::new(
                "fingerprint",
                text,
                "it must be a SHA-256: 64 hex digits, with or without colons between the bytes",
            )
        };
        let digits: String = if text.contains(':') {
            let parts: Vec<&str> = text.split(':').collect();
            if parts.iter().any(|part| part.len() != 2) {
                return Err(wrong());
            }
            parts.concat()
        } else {
            text.to_owned()
        };
        let mut bytes = [0; 32];
        if digits.len() != 64 || !digits.is_ascii() {
            return Err(wrong());
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            let pair = &digits[index * 2..index * 2 + 2];
            // `from_str_radix` takes a sign, too.
            if !pair.chars().all(|c| c.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_spellings_of_a_fingerprint_are_read_and_nothing_else() {
        let plain = "0a".repeat(32);
        let colons = vec!["0A"; 32].join(":");
        assert_eq!(plain.parse::<Fingerprint>(), colons.parse());
        for wrong in ["", "0a", &plain[..63], &format!("{plain}0"), &plain.replace("0a", "0g")] {
            assert!(wrong.parse::<Fingerprint>().is_err(), "{wrong}");
        }
        assert!(format!("{}:0", vec!["0A"; 31].join(":")).parse::<Fingerprint>().is_err());
        assert!("+a".repeat(32).parse::<Fingerprint>().is_err());
    }

    proptest! {
        #[test]
        fn a_fingerprint_reads_back_as_it_prints(bytes: [u8; 32]) {
            let fingerprint = Fingerprint::new(bytes);
            prop_assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        }

        #[test]
        fn no_text_makes_the_parser_fail_badly(text in ".*") {
            let _ = text.parse::<Fingerprint>();
        }
    }
}
