//! What the token may do, what it must be allowed to do, and how to let it.

use std::collections::{BTreeMap, BTreeSet};

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

    /// Whether the token has no privilege on any listed path.
    pub fn is_empty(&self) -> bool {
        self.0.values().all(BTreeMap::is_empty)
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

/// A privilege that the token lacks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Missing {
    /// Where it lacks: an ACL path such as `/vms`.
    pub path: String,
    /// The privilege.
    pub privilege: String,
    /// What it is needed for.
    pub purpose: &'static str,
    /// Whether the driver works without it, but for that.
    pub optional: bool,
}

impl Missing {
    /// The privilege to see every VM.
    pub fn all_vms() -> Self {
        Self::new("/vms", "VM.Audit", "finding VMs and seeing which of them hold a volume")
    }

    fn new(path: &str, privilege: &str, purpose: &'static str) -> Self {
        Self { path: path.to_owned(), privilege: privilege.to_owned(), purpose, optional: false }
    }

    /// The commands that give it to `who`, a token or user.
    pub fn remedy(&self, who: &str) -> String {
        let kind = if who.contains('!') { "tokens" } else { "users" };
        // What lacks on one VM lacks on the next one, too.
        let path = if self.path.starts_with("/vms/") { "/vms" } else { &self.path };
        format!(
            "`pveum role modify CSI -append 1 -privs {}` adds it to the role CSI, `pveum acl modify {path} --{kind} '{who}' --roles CSI` gives that role to `{who}`",
            self.privilege
        )
    }
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {} ({})", self.privilege, self.path, self.purpose)
    }
}

/// The privilege that a refusal names, in an error's text: `Permission check failed (/vms/100, VM.Config.Disk)`; of several that would
/// each do, the first. Source: pve-access-control `RPCEnvironment.pm:check_full`.
pub fn missing_in(text: &str) -> Option<Missing> {
    let (_, rest) = text.split_once("Permission check failed (")?;
    let (inside, _) = rest.split_once(')')?;
    let (path, privileges) = inside.split_once(", ")?;
    let privilege = privileges.split('|').next()?;
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '.';
    if !path.starts_with('/') || privilege.is_empty() || !privilege.chars().all(legal) {
        return None;
    }
    Some(Missing::new(path, privilege, "what was just refused"))
}

/// What is needed on all VMs, and for what; never more than this for plain work.
const ON_VMS: [(&str, &str); 2] = [
    ("VM.Audit", "finding VMs and seeing which of them hold a volume"),
    ("VM.Config.Disk", "attaching, detaching and growing volumes"),
];
/// What is needed on each storage that volumes are on.
const ON_STORAGES: [(&str, &str); 3] = [
    ("Datastore.Audit", "seeing the storage"),
    ("Datastore.AllocateSpace", "making and growing volumes"),
    ("Datastore.Allocate", "deleting and attaching volumes, and seeing them in a listing"),
];
/// What growing a volume that is attached nowhere needs beside.
const FOR_HOLDERS: [&str; 2] = ["VM.Allocate", "VM.Config.Options"];

/// What a privilege is needed for.
pub fn purpose(privilege: &str) -> &'static str {
    let all = ON_VMS.iter().chain(&ON_STORAGES);
    all.copied()
        .find(|(name, _)| *name == privilege)
        .map_or("growing volumes that are attached nowhere", |(_, purpose)| purpose)
}

impl Permissions {
    /// What the token lacks for the work of a driver, on the storages that it sees. Where it has all that is needed on some of them, others are left
    /// alone but for those where a part of it lacks: they may not be meant for volumes.
    pub fn missing(&self, storages: &BTreeSet<&str>) -> Vec<Missing> {
        let mut missing = Vec::new();
        for (privilege, purpose) in ON_VMS {
            if !self.allow_below("/vms", privilege) {
                missing.push(Missing::new("/vms", privilege, purpose));
            }
            let gaps = self.gaps_below("/vms", privilege);
            missing.extend(gaps.map(|path| Missing::new(path, privilege, purpose)));
        }
        let lacks = |storage: &str| {
            let path = format!("/storage/{storage}");
            let lacking = ON_STORAGES.iter().filter(|(privilege, _)| !self.allow(&path, privilege));
            lacking.map(|(privilege, purpose)| Missing::new(&path, privilege, purpose)).collect::<Vec<_>>()
        };
        if storages.iter().any(|storage| lacks(storage).is_empty()) {
            missing.extend(storages.iter().flat_map(|storage| lacks(storage)));
        } else {
            let everywhere =
                ON_STORAGES.iter().filter(|(privilege, _)| !self.allow_below("/storage", privilege));
            missing
                .extend(everywhere.map(|(privilege, purpose)| Missing::new("/storage", privilege, purpose)));
        }
        for privilege in FOR_HOLDERS {
            if !self.allow_below("/vms", privilege) {
                let purpose = "growing volumes that are attached nowhere";
                missing.push(Missing { optional: true, ..Missing::new("/vms", privilege, purpose) });
            }
        }
        missing
    }
}

impl Client {
    /// What the token lacks for the work of a driver; see [`Permissions::missing`].
    pub async fn missing_privileges(&self) -> Result<Vec<Missing>, ApiError> {
        let permissions = self.permissions().await?;
        let resources = self.resources().await?;
        let storages: BTreeSet<&str> = resources.storages.iter().map(|row| row.storage.as_str()).collect();
        Ok(permissions.missing(&storages))
    }

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

    fn of(paths: &[(&str, &[&str])]) -> Permissions {
        let row = |(path, names): &(&str, &[&str])| {
            ((*path).to_owned(), names.iter().map(|name| ((*name).to_owned(), true)).collect())
        };
        Permissions(paths.iter().map(row).collect())
    }

    const VMS: &[&str] = &["VM.Audit", "VM.Config.Disk"];
    const STORES: &[&str] = &["Datastore.Audit", "Datastore.AllocateSpace", "Datastore.Allocate"];

    fn needed(permissions: &Permissions, storages: &[&'static str]) -> Vec<String> {
        let missing = permissions.missing(&storages.iter().copied().collect());
        let needed = missing.into_iter().filter(|missing| !missing.optional);
        needed.map(|missing| format!("{} {}", missing.privilege, missing.path)).collect()
    }

    #[test]
    fn what_lacks_is_named_with_its_path() {
        let all = of(&[("/vms", VMS), ("/storage", STORES)]);
        assert_eq!(needed(&all, &["a", "b"]), [""; 0]);
        assert_eq!(all.missing(&BTreeSet::from(["a"])).len(), 2, "what holders need is named, too");
        // One storage is meant for volumes, another one half, a third not at all.
        let some = of(&[("/vms", VMS), ("/storage/a", STORES), ("/storage/b", &STORES[..2])]);
        assert_eq!(needed(&some, &["a", "b"]), ["Datastore.Allocate /storage/b"]);
        let none = Permissions::default();
        assert_eq!(
            needed(&none, &[]),
            [
                "VM.Audit /vms",
                "VM.Config.Disk /vms",
                "Datastore.Audit /storage",
                "Datastore.AllocateSpace /storage",
                "Datastore.Allocate /storage"
            ]
        );
        let gap = of(&[("/vms", VMS), ("/vms/105", &["VM.Audit"]), ("/storage", STORES)]);
        assert_eq!(needed(&gap, &["a"]), ["VM.Config.Disk /vms/105"]);
    }

    #[test]
    fn a_refusal_says_which_privilege_lacks_and_how_to_give_it() {
        let text =
            "PUT /x: Proxmox answered 403 Permission check failed (/vms/100, VM.Config.Disk|VM.Config.CDROM)";
        let missing = missing_in(text).expect("it says so");
        assert_eq!((missing.path.as_str(), missing.privilege.as_str()), ("/vms/100", "VM.Config.Disk"));
        let remedy = missing.remedy("csi@pve!csi");
        assert!(remedy.contains("-privs VM.Config.Disk"), "{remedy}");
        assert!(remedy.contains("pveum acl modify /vms --tokens 'csi@pve!csi' --roles CSI"), "{remedy}");
        assert!(missing.remedy("root@pam").contains("--users 'root@pam'"));
        for text in ["", "Permission check failed", "Permission check failed (user != root@pam)"] {
            assert_eq!(missing_in(text), None, "{text}");
        }
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
