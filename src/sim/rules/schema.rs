//! Parameters of a call, and the texts and lists every check shares (pve-common `JSONSchema.pm`, `Tools.pm`).

use super::options;
use std::collections::BTreeMap;

/// Parameters of a call, path and body together.
pub type Params = BTreeMap<String, String>;

/// A parameter the call does not have.
pub const NOT_DEFINED: &str =
    "property is not defined in schema and the schema does not allow additional properties";
/// A parameter that must be there.
pub(super) const MISSING: &str = "property is missing and it is not optional";
/// A value of the wrong form.
pub(super) const PATTERN: &str = "value does not match the regex pattern";

/// The members of a PVE list: separated by commas, semicolons or blanks (pve-common `Tools.pm:split_list`).
pub fn split_list(text: &str) -> impl Iterator<Item = &str> {
    text.split([',', ';', ' ', '\0']).filter(|part| !part.is_empty())
}

/// Whether a parameter is set to a true value (pve-common `JSONSchema.pm:parse_boolean`).
pub fn flag(params: &Params, name: &str) -> bool {
    params
        .get(name)
        .is_some_and(|value| options::check("", options::Kind::Boolean, value).is_ok_and(|v| v == "1"))
}
