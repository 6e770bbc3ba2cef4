//! What the token may do.

use std::collections::BTreeMap;

use http::Method;
use serde::Deserialize;
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
    /// Whether the token has `privilege` on `path`, such as `/storage/local`.
    ///
    /// A path that is not listed inherits from the one above it. The paths of one part, such as `/storage`, are always answered, so that
    /// one that is not listed has no privilege at all.
    pub fn allow(&self, path: &str, privilege: &str) -> bool {
        match (self.0.get(path), path.rfind('/')) {
            (Some(privileges), _) => privileges.contains_key(privilege),
            (None, Some(cut)) if cut > 0 => self.allow_below(&path[..cut], privilege),
            (None, _) => false,
        }
    }

    /// Whether the token has `privilege` on everything below `path`, where nothing below says otherwise.
    pub fn allow_below(&self, path: &str, privilege: &str) -> bool {
        self.0.get(path).and_then(|privileges| privileges.get(privilege)).copied().unwrap_or(false)
    }

    /// Whether anything at all is allowed on `path`. A path that has an ACL and is not listed is one where the token has no privilege:
    /// `NoAccess`, which this list leaves out.
    pub fn lists(&self, path: &str) -> bool {
        self.0.contains_key(path)
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

/// An entry of the access control list.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct AclEntry {
    /// Where it holds.
    pub path: String,
    /// What it gives, or with `NoAccess` takes.
    #[serde(rename = "roleid")]
    pub role: String,
}

impl Client {
    /// The access control list: all of it with `Sys.Audit` on `/access`, else only what the token may change.
    /// Source: pve-access-control `API2/ACL.pm:read_acl`.
    pub async fn acl(&self) -> Result<Vec<AclEntry>, ApiError> {
        self.call(Call::new("acl", Method::GET, &[&"access", &"acl"])).await
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
            ("/vms".to_owned(), on(&["VM.Audit"])),
            ("/storage/slow".to_owned(), on(&[])),
            ("/vms/105".to_owned(), on(&["VM.Config.Disk"])),
        ]));
        assert!(permissions.allow("/vms/100", "VM.Audit"));
        assert!(!permissions.allow("/vms/105", "VM.Audit"));
        assert!(!permissions.allow("/storage/slow", "VM.Audit"));
        assert_eq!(permissions.gaps_below("/vms", "VM.Audit").collect::<Vec<_>>(), ["/vms/105"]);
        assert!(!Permissions::default().allow("/vms/1", "VM.Audit"));
        // `/storage` has no privilege at all: Proxmox leaves it out, and `/` does not stand in for it.
        assert!(!permissions.allow("/storage/fast", "VM.Audit"));
    }

    #[test]
    fn what_does_not_propagate_holds_for_nothing_below() {
        let here_only = BTreeMap::from([("VM.Audit".to_owned(), false)]);
        let permissions = Permissions(BTreeMap::from([("/vms".to_owned(), here_only)]));
        assert!(permissions.allow("/vms", "VM.Audit"));
        assert!(!permissions.allow_below("/vms", "VM.Audit"));
        assert!(!permissions.allow("/vms/100", "VM.Audit"));
    }
}
