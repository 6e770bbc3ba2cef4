//! Parameter verification with PVE's texts (pve-common `JSONSchema.pm:validate`, `check_prop`).

use super::error::PveError;
use super::options;
use std::collections::BTreeMap;

/// Parameters of a call, path and body together.
pub type Params = BTreeMap<String, String>;

/// What a parameter may hold.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Any text.
    Text,
    /// `0`/`1` and the words PVE takes for them.
    Boolean,
    /// A number between the limits.
    Integer(i64, i64),
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// `\d+[MG]?`
    AllocSize,
    /// `\+?\d+(\.\d+)?[KMGT]?`
    ResizeSize,
    /// Any drive key.
    DriveKey,
    /// A list of config keys.
    KeyList,
    /// At most this many characters.
    AtMost(usize),
}

/// One parameter: name, what it holds, and whether it must be there.
#[derive(Debug, Clone, Copy)]
pub struct Param(pub &'static str, pub Kind, pub bool);

/// A VM id in a path or a body (`pve-vmid`).
pub const VMID: Kind = Kind::Integer(100, 999_999_999);

const NOT_DEFINED: &str =
    "property is not defined in schema and the schema does not allow additional properties";
const MISSING: &str = "property is missing and it is not optional";
const PATTERN: &str = "value does not match the regex pattern";

fn check(kind: Kind, value: &str) -> Result<(), String> {
    let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    match kind {
        Kind::Boolean => options::check("", options::Kind::Boolean, value).map(|_| ()),
        Kind::Integer(least, most) => match value.parse::<i64>() {
            Err(_) => Err(format!("type check ('integer') failed - got '{value}'")),
            Ok(number) if number < least => Err(format!("value must have a minimum value of {least}")),
            Ok(number) if number > most => Err(format!("value must have a maximum value of {most}")),
            Ok(_) => Ok(()),
        },
        Kind::OneOf(words) if words.contains(&value) => Ok(()),
        Kind::OneOf(words) => {
            Err(format!("value '{value}' does not have a value in the enumeration '{}'", words.join(", ")))
        }
        Kind::AllocSize => {
            let number = value.strip_suffix(['M', 'G']).unwrap_or(value);
            if digits(number) { Ok(()) } else { Err(PATTERN.to_owned()) }
        }
        Kind::ResizeSize => {
            let number = value.strip_prefix('+').unwrap_or(value);
            super::drive::parse_size(number).map(|_| ()).ok_or_else(|| PATTERN.to_owned())
        }
        Kind::DriveKey if options::kind_of(value) == Some(options::Kind::Drive) => Ok(()),
        Kind::DriveKey => Err(format!("value '{value}' does not have a value in the enumeration of drives")),
        Kind::KeyList => {
            for key in split_list(value) {
                let mut characters = key.chars();
                let first = characters.next().is_some_and(|c| c.is_ascii_alphabetic());
                if !first || !characters.all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) {
                    return Err(format!("invalid format - invalid configuration ID '{key}'\n"));
                }
            }
            Ok(())
        }
        Kind::AtMost(length) if value.len() > length => {
            Err(format!("value may only be {length} characters long"))
        }
        Kind::Text | Kind::AtMost(_) => Ok(()),
    }
}

/// The members of a PVE list: separated by commas, semicolons or blanks (pve-common `Tools.pm:split_list`).
pub fn split_list(text: &str) -> impl Iterator<Item = &str> {
    text.split([',', ';', ' ', '\0']).filter(|part| !part.is_empty())
}

/// Whether a parameter is set to a true value.
pub fn flag(params: &Params, name: &str) -> bool {
    params
        .get(name)
        .is_some_and(|value| options::check("", options::Kind::Boolean, value).is_ok_and(|v| v == "1"))
}

/// Checks `params` against `table`. With `config_keys`, keys of a VM config are taken too, and their values are
/// replaced by the form the config keeps.
pub fn verify(table: &[Param], config_keys: bool, params: &mut Params) -> Result<(), PveError> {
    let mut errors = BTreeMap::new();
    for (name, value) in params.iter_mut() {
        let result = match table.iter().find(|param| param.0 == name) {
            Some(param) => check(param.1, value),
            None if config_keys => match options::kind_of(name) {
                Some(kind) => options::check(name, kind, value).map(|checked| {
                    // A new disk keeps its spelling until it is made.
                    *value = checked;
                }),
                None => Err(NOT_DEFINED.to_owned()),
            },
            None => Err(NOT_DEFINED.to_owned()),
        };
        if let Err(error) = result {
            errors.insert(name.clone(), error);
        }
    }
    for param in table.iter().filter(|param| param.2 && !params.contains_key(param.0)) {
        errors.insert(param.0.to_owned(), MISSING.to_owned());
    }
    if errors.is_empty() { Ok(()) } else { Err(PveError::Parameters(errors)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded as A16 and A17.
    #[test]
    fn bad_parameters_are_named_one_by_one() {
        let table = [
            Param("vmid", VMID, true),
            Param("filename", Kind::Text, true),
            Param("size", Kind::AllocSize, true),
        ];
        let pairs = [("vmid", "abc"), ("filename", "x"), ("size", "1T"), ("bogus", "1")];
        let mut params = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let Err(PveError::Parameters(errors)) = verify(&table, false, &mut params) else {
            panic!("the parameters were taken");
        };
        assert_eq!(errors["bogus"], NOT_DEFINED);
        assert_eq!(errors["size"], PATTERN);
        assert_eq!(errors["vmid"], "type check ('integer') failed - got 'abc'");
        assert_eq!(errors.len(), 3);
    }
}
