//! Property strings: `local:9999/x.raw,backup=0,size=1G`, as Proxmox writes drives and other composite values.

use std::{collections::BTreeMap, fmt, str::FromStr};

use super::ParseError;

/// A property string: an optional leading bare value and key=value pairs in alphabetical order.
///
/// Proxmox has no escape in these strings: a comma always ends a value. So [`set`](Self::set) refuses what could
/// begin a further property. Source: pve-common `JSONSchema.pm:parse_property_string`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PropertyString {
    bare: Option<String>,
    properties: BTreeMap<String, String>,
}

impl PropertyString {
    /// A string that begins with a bare value, such as the volid of a drive.
    pub fn with_bare(value: &str) -> Result<Self, ParseError> {
        check(value)?;
        if value.contains('=') {
            return Err(ParseError::new("property value", value, "a leading value must not hold `=`"));
        }
        Ok(Self { bare: Some(value.to_owned()), properties: BTreeMap::new() })
    }

    /// The leading bare value.
    pub fn bare(&self) -> Option<&str> {
        self.bare.as_deref()
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.properties.get(key).map(String::as_str)
    }

    /// Sets a key. Refuses keys that are not of letters, digits, `_` and `-`, and values that Proxmox would split.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), ParseError> {
        check(value)?;
        if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-')) {
            return Err(ParseError::new("property name", key, "it must be letters, digits, `_` and `-`"));
        }
        self.properties.insert(key.to_owned(), value.to_owned());
        Ok(())
    }

    /// Takes a key out.
    pub fn remove(&mut self, key: &str) {
        self.properties.remove(key);
    }

    /// The pairs, in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.properties.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

fn check(value: &str) -> Result<(), ParseError> {
    if value.is_empty() || value.chars().any(|c| c == ',' || c.is_control() || c.is_whitespace()) {
        return Err(ParseError::new(
            "property value",
            value,
            "it must hold no comma, blank or control character",
        ));
    }
    Ok(())
}

impl fmt::Display for PropertyString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if let Some(bare) = &self.bare {
            f.write_str(bare)?;
            separator = ",";
        }
        for (key, value) in &self.properties {
            write!(f, "{separator}{key}={value}")?;
            separator = ",";
        }
        Ok(())
    }
}

/// Parses leniently what Proxmox answers: unknown keys are kept, a repeated key keeps its last value.
impl FromStr for PropertyString {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parsed = Self::default();
        for (index, part) in text.split(',').enumerate() {
            match part.split_once('=') {
                Some((key, value)) => drop(parsed.properties.insert(key.to_owned(), value.to_owned())),
                None if index == 0 => parsed.bare = Some(part.to_owned()),
                None => {
                    return Err(ParseError::new(
                        "property string",
                        text,
                        "only its first part may lack a `=`",
                    ));
                }
            }
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_value_can_not_bring_a_further_property() {
        let mut drive = PropertyString::with_bare("local:9999/x.raw").expect("a volid");
        for bad in ["none,backup=1", "a b", "a\n", ""] {
            assert!(drive.set("cache", bad).is_err(), "{bad:?}");
        }
        assert!(drive.set("a=b,c", "1").is_err());
        assert!(PropertyString::with_bare("file=x").is_err());
        drive.set("cache", "none").expect("a legal value");
        assert_eq!(drive.to_string(), "local:9999/x.raw,cache=none");
    }

    proptest! {
        #[test]
        fn what_is_built_is_read_back(volid in "[a-z]{2,8}:[a-z0-9/._-]{1,20}", pairs in proptest::collection::btree_map("[a-z_]{1,8}", "[a-zA-Z0-9_.:/-]{1,12}", 0..6)) {
            let mut built = PropertyString::with_bare(&volid).expect("a volid");
            for (key, value) in &pairs {
                built.set(key, value).expect("a legal pair");
            }
            prop_assert_eq!(built.to_string().parse::<PropertyString>(), Ok(built));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = text.parse::<PropertyString>();
        }
    }
}
