//! What the token may do.

use std::collections::BTreeMap;

use http::Method;
use serde_json::Value;

use super::{
    ApiError,
    client::{Call, Client},
    wire,
};

/// The privileges of a token: for each ACL path the privileges that apply there, each with whether it applies below too.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Permissions(BTreeMap<String, BTreeMap<String, bool>>);

impl Permissions {
    /// Whether the token has `privilege` on `path`. A path that is not listed inherits from its nearest listed parent.
    pub fn allow(&self, path: &str, privilege: &str) -> bool {
        if let Some(privileges) = self.0.get(path) {
            return privileges.contains_key(privilege);
        }
        let mut parent = path;
        while let Some(cut) = parent.rfind('/') {
            parent = if cut == 0 { "/" } else { &parent[..cut] };
            if let Some(privileges) = self.0.get(parent) {
                return privileges.get(privilege).copied().unwrap_or(false);
            }
            if parent == "/" {
                break;
            }
        }
        false
    }

    /// The listed paths below `parent` where the token lacks `privilege`.
    pub fn gaps_below<'a>(&'a self, parent: &'a str, privilege: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter_map(move |(path, privileges)| {
            let below = path.strip_prefix(parent).is_some_and(|rest| rest.starts_with('/'));
            (below && !privileges.contains_key(privilege)).then_some(path.as_str())
        })
    }
}

impl Client {
    /// What the token may do, on every path that has an ACL or a default. Every token may ask this of itself.
    /// Source: pve-access-control `API2/AccessControl.pm:permissions`; the value is the propagate flag.
    pub async fn permissions(&self) -> Result<Permissions, ApiError> {
        let call = Call::new("permissions", Method::GET, &[&"access", &"permissions"]);
        let paths: BTreeMap<String, BTreeMap<String, Value>> = self.call(call).await?;
        let read = |privileges: BTreeMap<String, Value>| {
            privileges.into_iter().map(|(name, propagate)| (name, wire::read_flag(&propagate))).collect()
        };
        Ok(Permissions(paths.into_iter().map(|(path, privileges)| (path, read(privileges))).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privileges_are_inherited_from_the_nearest_listed_path() {
        let on = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), true)).collect();
        let permissions = Permissions(BTreeMap::from([
            ("/".to_owned(), on(&["VM.Audit"])),
            ("/storage/slow".to_owned(), on(&[])),
            ("/vms/105".to_owned(), on(&["VM.Config.Disk"])),
        ]));
        assert!(permissions.allow("/vms/100", "VM.Audit"));
        assert!(!permissions.allow("/vms/105", "VM.Audit"));
        assert!(!permissions.allow("/storage/slow", "VM.Audit"));
        assert_eq!(permissions.gaps_below("/vms", "VM.Audit").collect::<Vec<_>>(), ["/vms/105"]);
        assert!(!Permissions::default().allow("/vms/1", "VM.Audit"));
    }
}
