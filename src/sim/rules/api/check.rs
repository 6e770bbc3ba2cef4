//! Parameter verification with PVE's texts (pve-common `JSONSchema.pm:validate`, `check_prop`, `check_type`).

use super::{Endpoint, Property};
use crate::sim::rules::drive::parse_size;
use crate::sim::rules::error::PveError;
use crate::sim::rules::options;
use crate::sim::rules::schema::{MISSING, NOT_DEFINED, PATTERN, Params, split_list};
use std::collections::BTreeMap;

impl Endpoint {
    /// Checks the parameters and brings booleans and config values into the form the rest works with
    /// (`JSONSchema.pm:validate`).
    pub fn verify(&self, params: &mut Params) -> Result<(), PveError> {
        let takes_config = self.parameters.contains_key("scsi[n]");
        let mut errors = BTreeMap::new();
        let names: Vec<String> = params.keys().cloned().collect();
        for (name, value) in params.iter_mut() {
            let property = self.property(name);
            let result = match property {
                None => Err(NOT_DEFINED.to_owned()),
                Some(_) if takes_config && options::kind_of(name).is_some() => {
                    // A config value takes the form the file keeps.
                    options::kind_of(name).map_or(Ok(()), |kind| {
                        options::check(name, kind, value).map(|checked| *value = checked)
                    })
                }
                Some(property) => property.check(value),
            };
            if let Err(error) = result {
                errors.insert(name.clone(), error);
            } else if let Some(needed) = property.and_then(|property| property.requires.as_ref())
                && !names.contains(needed)
            {
                errors.insert(needed.clone(), format!("missing property - '{name}' requires this property"));
            }
        }
        for (name, property) in &self.parameters {
            if !property.optional && !name.ends_with("[n]") && !params.contains_key(name) {
                errors.insert(name.clone(), MISSING.to_owned());
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(PveError::Parameters(errors)) }
    }

    fn property(&self, name: &str) -> Option<&Property> {
        if let Some(property) = self.parameters.get(name) {
            return Some(property);
        }
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let property = self.parameters.get(&format!("{stem}[n]"))?;
        // `link[n]` and the like have no limit of ours; config keys have PVE's.
        (stem.len() < name.len() && (options::kind_of(name).is_some() || stem == "link")).then_some(property)
    }
}

impl Property {
    fn check(&self, value: &mut String) -> Result<(), String> {
        match self.kind.as_str() {
            "boolean" => {
                *value = options::check("", options::Kind::Boolean, value)?;
                return Ok(());
            }
            "integer" if value.parse::<i64>().is_err() => {
                return Err(format!("type check ('integer') failed - got '{value}'"));
            }
            "number" if value.parse::<f64>().is_err() => {
                return Err(format!("type check ('number') failed - got '{value}'"));
            }
            _ => {}
        }
        if let Some(format) = &self.format {
            check_format(format, value).map_err(|error| format!("invalid format - {error}\n"))?;
        }
        if matches!(self.kind.as_str(), "integer" | "number") {
            let number = value.parse::<f64>().unwrap_or_default();
            if let Some(least) = self.minimum.filter(|least| number < *least) {
                return Err(format!("value must have a minimum value of {least}"));
            }
            if let Some(most) = self.maximum.filter(|most| number > *most) {
                return Err(format!("value must have a maximum value of {most}"));
            }
            return Ok(());
        }
        if let Some(longest) = self.longest.filter(|longest| value.chars().count() > *longest) {
            return Err(format!("value may only be {longest} characters long"));
        }
        if let Some(shortest) = self.shortest.filter(|shortest| value.chars().count() < *shortest) {
            return Err(format!("value must be at least {shortest} characters long"));
        }
        if let Some(pattern) = &self.pattern
            && !fits(pattern, value)
        {
            return Err(PATTERN.to_owned());
        }
        if let Some(words) = &self.words
            && !words.contains(value)
        {
            let words = words.join(", ");
            return Err(format!("value '{value}' does not have a value in the enumeration '{words}'"));
        }
        Ok(())
    }
}

/// The patterns that the calls we model have; others are taken as they come.
fn fits(pattern: &str, value: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    match pattern {
        r"\d+[MG]?" => digits(value.strip_suffix(['M', 'G']).unwrap_or(value)),
        "https?://.*" => value.starts_with("http://") || value.starts_with("https://"),
        r"\+?\d+(\.\d+)?[KMGT]?" => parse_size(value.strip_prefix('+').unwrap_or(value)).is_some(),
        _ => true,
    }
}

fn check_format(format: &str, value: &str) -> Result<(), String> {
    let named = |text: &str, more: &str| {
        let mut characters = text.chars();
        characters.next().is_some_and(|c| c.is_ascii_alphabetic())
            && characters.all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    match format {
        "pve-configid-list" => match split_list(value).find(|id| !named(id, "-_") || id.len() < 2) {
            Some(id) => Err(format!("invalid configuration ID '{id}'")),
            None => Ok(()),
        },
        "pve-storage-id" if !named(value, "-_.") || value.len() < 2 || value.ends_with(['-', '_', '.']) => {
            Err(format!("storage ID '{value}' contains illegal characters"))
        }
        "pve-configid" if !named(value, "-_") || value.len() < 2 => {
            Err(format!("invalid configuration ID '{value}'"))
        }
        "pve-vmid" => match value.parse::<u64>() {
            Ok(id) if (100..=999_999_999).contains(&id) && !value.starts_with('0') => Ok(()),
            _ => Err("value does not look like a valid VM ID".to_owned()),
        },
        "dns-name" => options::check("name", options::Kind::Text, value)
            .map(|_| ())
            .map_err(|_| "value does not look like a valid DNS name".to_owned()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::find;
    use super::*;

    fn errors(method: &str, path: &str, pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let found = find(method, path).expect("the path is a call");
        let mut params = found.in_path;
        params.extend(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        match found.endpoint.verify(&mut params) {
            Err(PveError::Parameters(errors)) => errors,
            _ => BTreeMap::new(),
        }
    }

    /// Recorded as A16 and A17.
    #[test]
    fn bad_parameters_are_named_one_by_one() {
        let path = "/nodes/pve1/storage/local/content";
        let pairs = [("vmid", "abc"), ("filename", "x"), ("size", "1T"), ("bogus", "1")];
        let found = errors("POST", path, &pairs);
        assert_eq!(found["bogus"], NOT_DEFINED);
        assert_eq!(found["size"], PATTERN);
        assert_eq!(found["vmid"], "type check ('integer') failed - got 'abc'");
        assert_eq!(found.len(), 3);
        assert_eq!(errors("POST", path, &[("vmid", "9999")])["filename"], MISSING);
    }

    /// Recorded as C26 and C27.
    #[test]
    fn config_keys_are_checked_by_number_and_format() {
        let path = "/nodes/pve1/qemu/100/config";
        assert_eq!(errors("PUT", path, &[("scsi31", "local:9999/x.raw")])["scsi31"], NOT_DEFINED);
        assert!(errors("PUT", path, &[("scsi30", "local:9999/x.raw")]).is_empty());
    }
}
