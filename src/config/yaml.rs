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
        let hint = if key.ends_with("controllerVMID") { "; hint: it is spelt `controllerVmID`" } else { "" };
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
