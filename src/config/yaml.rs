//! YAML that names what it did not understand, and quotes nothing.

use std::path::Path;

use serde::de::DeserializeOwned;

use super::ConfigError;

/// The text of a file.
pub(super) fn text(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

/// Reads YAML; keys that mean nothing are named in the warnings.
pub(super) fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<(T, Vec<String>), ConfigError> {
    // The parser's own messages quote the file, which holds secrets: only its place is kept.
    let parse = |why: String| ConfigError::Parse { path: path.to_owned(), why };
    let value: serde_json::Value = serde_saphyr::from_str(text).map_err(|error| {
        let place = error.location().map(|at| format!(" at line {}, column {}", at.line(), at.column()));
        parse(format!("it is not YAML{}", place.unwrap_or_default()))
    })?;
    let mut warnings = Vec::new();
    let mut unknown = |key: serde_ignored::Path| {
        let key = key.to_string();
        let hint = meant(key.rsplit('.').next().unwrap_or_default());
        let hint = hint.map(|meant| format!("; hint: it is spelt `{meant}`")).unwrap_or_default();
        warnings.push(format!("`{}`: key `{key}` is unknown and has no effect{hint}", path.display()));
    };
    let read = serde_ignored::deserialize(value, &mut unknown).map_err(|error| {
        // The texts about values quote them; what is missing is named by its key alone.
        let text = error.to_string();
        let missing = text.starts_with("missing field");
        parse(if missing { text } else { "a value is not of the kind it must be".to_owned() })
    })?;
    Ok((read, warnings))
}

/// The keys that mean something, of both files.
const KEYS: [&str; 29] = [
    "ca_file",
    "clusters",
    "controllerVmID",
    "external_ip_cidrs",
    "features",
    "fingerprint",
    "fingerprints",
    "force_update_labels",
    "ha_group",
    "holderVmIDs",
    "insecure",
    "ip_sort_order",
    "ipv6_support_disabled",
    "mode",
    "name",
    "network",
    "nodes",
    "password",
    "password_file",
    "provider",
    "region",
    "token_id",
    "token_id_file",
    "token_secret",
    "token_secret_file",
    "url",
    "urls",
    "username",
    "zone_labels",
];

/// The key that was meant by one that is none: the nearest one, whatever its capitals and dashes, if no more than a slip lies between.
fn meant(key: &str) -> Option<&'static str> {
    let plain = |key: &str| key.to_ascii_lowercase().replace('-', "_");
    let key = plain(key);
    // A slip in a short word makes another word of it.
    let slips = if key.len() < 6 { 1 } else { 2 };
    let near = KEYS.into_iter().map(|known| (distance(&key, &plain(known)), known));
    near.filter(|(distance, _)| *distance <= slips).min().map(|(_, known)| known)
}

/// How many letters must be put in, left out or changed to get from one text to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_pen_is_named_and_a_word_of_its_own_is_not() {
        for (key, expected) in [
            ("controllerVMID", Some("controllerVmID")),
            ("ca-file", Some("ca_file")),
            ("tokenID", Some("token_id")),
            ("token_secrets", Some("token_secret")),
            ("insecur", Some("insecure")),
            ("uri", Some("url")),
            ("colour", None),
            ("log", None),
            ("", None),
        ] {
            assert_eq!(meant(key), expected, "{key}");
        }
        for key in KEYS {
            assert_eq!(meant(key), Some(key));
        }
    }

    #[test]
    fn distances_are_counted_in_letters() {
        for (a, b, expected) in [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("a", "ab", 1)] {
            assert_eq!((distance(a, b), distance(b, a)), (expected, expected));
        }
    }
}
