//! PVE's JSON as it comes: numbers as strings, booleans as 0, 1, "0" and "1".

use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::Value;

/// The envelope of every answer.
#[derive(Deserialize)]
pub(super) struct Envelope<T> {
    pub(super) data: T,
}

/// A number that may come as a string.
pub(super) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    read_number(&Value::deserialize(deserializer)?).ok_or_else(|| D::Error::custom("not a whole number"))
}

/// A number that may come as a string, null or not at all.
pub(super) fn optional_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(read_number(&Value::deserialize(deserializer)?))
}

/// A boolean in any of PVE's spellings.
pub(super) fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(read_flag(&Value::deserialize(deserializer)?))
}

/// A value of a config as text: PVE answers `cores` as a number and `memory` as a string.
pub(super) fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(u8::from(*flag).to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

pub(super) fn read_flag(value: &Value) -> bool {
    match value {
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_u64() != Some(0),
        Value::String(text) => !matches!(text.as_str(), "" | "0"),
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

fn read_number(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}
