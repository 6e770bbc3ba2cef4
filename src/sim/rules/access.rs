//! Who may do what (pve-access-control `AccessControl.pm:roles`, `RPCEnvironment.pm:permissions`, `check`).

use super::error::PveError;
use super::roles::{EVERYTHING, Mask, NOTHING, bit, known, made_mask, made_role, names};
use std::collections::{BTreeMap, BTreeSet};

/// An access control entry: `who` has `role` at `path`, and below it where it propagates.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclEntry {
    /// Object path, such as `/` or `/storage/local`.
    pub path: String,
    /// User (`csi@pve`), token (`csi@pve!csi`) or group (`@admins`).
    pub who: String,
    /// Name of the role.
    pub role: String,
    /// Whether the entry holds below the path.
    #[serde(default = "yes")]
    pub propagate: bool,
}

fn yes() -> bool {
    true
}

/// A group of users.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Group {
    /// Its members.
    #[serde(default)]
    pub users: BTreeSet<String>,
    /// What it is for.
    #[serde(default)]
    pub comment: Option<String>,
}

/// The access table: roles, entries, groups, pools and which tokens stand on their own rights.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct Access {
    /// Privileges by role; those that PVE brings are there without being listed.
    pub roles: BTreeMap<String, BTreeSet<String>>,
    /// All entries.
    pub acl: Vec<AclEntry>,
    /// Groups of users, which entries name as `@group`.
    #[serde(default)]
    pub groups: BTreeMap<String, Group>,
    /// Pool of a VM.
    pub pools: BTreeMap<u32, String>,
    /// Pools and the storages in them, as `(pool, storage)`.
    #[serde(default)]
    pub pool_storages: BTreeSet<(String, String)>,
    /// Tokens with privilege separation.
    pub separated: BTreeSet<String>,
    /// Whether the privileges are those of PVE 8.
    #[serde(default)]
    pub eight: bool,
    /// Privileges that a fault has taken from a user or token, as `(who, privilege)`.
    #[serde(default)]
    pub dropped: BTreeSet<(String, String)>,
}

/// The paths PVE always lists in `/access/permissions` (`RPCEnvironment.pm:get_effective_permissions`).
pub const DEFAULT_PATHS: &[&str] =
    &["/", "/access", "/access/groups", "/nodes", "/pool", "/sdn", "/storage", "/vms"];

/// What somebody holds at a path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    /// Privileges.
    all: Mask,
    /// Those of them that hold below the path too.
    down: Mask,
    /// `NoAccess` is among the roles.
    barred: bool,
}

impl Held {
    const EVERYTHING: Self = Self { all: Mask::MAX, down: Mask::MAX, barred: false };
}

/// A path in the form in which entries have it; `None` for one that can't be (`AccessControl.pm:normalize_path`).
pub fn normalize_path(path: &str) -> Option<String> {
    (!path.is_empty()).then_some(())?;
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let fits = |c: char| c.is_ascii_alphanumeric() || ".-_/".contains(c);
    path.chars().all(fits).then(|| format!("/{}", parts.join("/")))
}

/// What networks are made of, as far as entries can name it.
const SDN: &[&str] = &["controllers", "dns", "fabrics", "ipams", "prefix-lists", "route-maps", "zones"];

/// Whether entries can stand at the path (`AccessControl.pm:check_path`).
pub fn is_acl_path(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    match parts.as_slice() {
        []
        | ["access" | "nodes" | "pool" | "sdn" | "storage" | "vms" | "mapping"]
        | ["sdn", "zones", _, _] => true,
        ["sdn", kind] | ["sdn", kind, _] => SDN.contains(kind),
        ["sdn", "zones", _, _, tag] => {
            tag.len() <= 4 && !tag.starts_with('0') && tag.chars().all(|c| c.is_ascii_digit())
        }
        ["access", "groups" | "realm", rest @ ..] | ["nodes" | "storage", rest @ ..] => rest.len() <= 1,
        ["pool", rest @ ..] => rest.len() <= 3,
        ["mapping", rest @ ..] => rest.len() <= 2,
        ["vms", id] => id.len() >= 3 && !id.starts_with('0') && id.chars().all(|c| c.is_ascii_digit()),
        _ => false,
    }
}

impl Access {
    /// What a role holds; `None` where there is none of this name (`AccessControl.pm:create_roles`,
    /// `API2/Role.pm:read_role`).
    pub fn role(&self, name: &str) -> Option<BTreeSet<String>> {
        self.roles.get(name).cloned().or_else(|| made_role(name))
    }

    fn mask_of(&self, role: &str) -> Mask {
        match self.roles.get(role) {
            Some(privileges) => privileges.iter().fold(0, |mask, privilege| mask | bit(privilege)),
            None if role == EVERYTHING => Mask::MAX,
            None => made_mask(role),
        }
    }

    /// The roles at a path by entries alone: one set further down replaces those above it, one of the user those of
    /// the user's groups (`AccessControl.pm:roles`).
    fn by_entries(&self, who: &str, path: &str) -> Held {
        // The last step at which entries hold; of the entries there, the user's own before the groups'.
        let mut found: Option<(usize, bool)> = None;
        let mut held = Held::default();
        for entry in &self.acl {
            let depth = match steps(&entry.path, path) {
                Some(depth) if entry.propagate || entry.path == path => depth,
                _ => continue,
            };
            let own = entry.who == who;
            let theirs = || {
                let group = entry.who.strip_prefix('@').and_then(|group| self.groups.get(group));
                group.is_some_and(|group| group.users.contains(who))
            };
            if !own && !theirs() {
                continue;
            }
            if found.is_some_and(|found| found > (depth, own)) {
                continue;
            }
            if found != Some((depth, own)) {
                found = Some((depth, own));
                held = Held::default();
            }
            let mask = self.mask_of(&entry.role);
            held.all |= mask;
            held.down |= if entry.propagate { mask } else { 0 };
            held.barred |= entry.role == NOTHING;
        }
        if held.barred { Held { barred: true, ..Held::default() } } else { held }
    }

    /// The same with what pools bring to their members, which never holds further down
    /// (`RPCEnvironment.pm:$compile_acl_path`).
    fn with_pools(&self, who: &str, path: &str) -> Held {
        let held = self.by_entries(who, path);
        if held.barred {
            return held;
        }
        let through = |pool: &str| self.by_entries(who, &format!("/pool/{pool}"));
        let add = |held: Held, pool: Held| {
            let barred = Held { barred: true, ..Held::default() };
            if pool.barred { barred } else { Held { all: held.all | pool.all, ..held } }
        };
        if let Some(vmid) = path.strip_prefix("/vms/") {
            let pool = vmid.parse().ok().and_then(|id: u32| self.pools.get(&id));
            return pool.map_or(held, |pool| add(held, through(pool)));
        }
        if let Some(storage) = path.strip_prefix("/storage/") {
            let pools = self.pool_storages.iter().filter(|(_, member)| member == storage);
            return pools.fold(held, |held, (pool, _)| add(held, through(pool)));
        }
        held
    }

    /// What `auth`, a user or a token, holds at `path` (`RPCEnvironment.pm:permissions`).
    fn held(&self, auth: &str, path: &str) -> Held {
        let user = auth.split('!').next().unwrap_or(auth);
        let mut held = if user == "root@pam" { Held::EVERYTHING } else { self.with_pools(user, path) };
        if auth != user && self.separated.contains(auth) {
            // A separated token has at most what its user has.
            let own = self.with_pools(auth, path);
            held.all &= own.all;
            held.down &= own.down;
        }
        for (who, privilege) in &self.dropped {
            if who == auth || who == user {
                held.all &= !bit(privilege);
            }
        }
        held.all &= known(self.eight);
        held
    }

    /// The privileges of `auth`, a user or a token, at `path` (`RPCEnvironment.pm:permissions`).
    pub fn privileges(&self, auth: &str, path: &str) -> BTreeSet<String> {
        names(self.held(auth, path).all).map(str::to_owned).collect()
    }

    /// Whether `auth` has one of `any` at `path` (`RPCEnvironment.pm:check_any`).
    pub fn has(&self, auth: &str, path: &str, any: &[&str]) -> bool {
        let held = self.held(auth, path).all;
        any.iter().any(|privilege| held & bit(privilege) != 0)
    }

    /// Refuses with PVE's text unless `auth` has one of `any` at `path` (`RPCEnvironment.pm:check`, `check_any`).
    pub fn check(&self, auth: &str, path: &str, any: &[&str]) -> Result<(), PveError> {
        if self.has(auth, path, any) {
            return Ok(());
        }
        Err(PveError::Status(403, format!("Permission check failed ({path}, {})", any.join("|"))))
    }

    /// Refuses a volume the caller may not use (pve-storage `Storage.pm:check_volume_access`). `vmid` is the VM the
    /// volume is to be plugged into, if any.
    pub fn check_volume(
        &self,
        auth: &str,
        storage: &str,
        owner: u32,
        vmid: Option<u32>,
    ) -> Result<(), PveError> {
        let path = format!("/storage/{storage}");
        if self.has(auth, &path, &["Datastore.Allocate"]) || vmid == Some(owner) {
            return Ok(());
        }
        self.check(auth, &path, &["Datastore.Audit"])?;
        self.check(auth, &format!("/vms/{owner}"), &["VM.Config.Disk"])
    }

    /// Privileges by path, as `/access/permissions` lists them; the value says whether they propagate
    /// (`RPCEnvironment.pm:get_effective_permissions`).
    pub fn effective(&self, auth: &str, path: Option<&str>) -> BTreeMap<String, BTreeMap<String, u8>> {
        let paths: BTreeSet<String> = match path {
            Some(path) => BTreeSet::from([path.to_owned()]),
            None => DEFAULT_PATHS
                .iter()
                .map(|path| (*path).to_owned())
                .chain(self.acl.iter().map(|entry| entry.path.clone()))
                .collect(),
        };
        paths
            .into_iter()
            .map(|path| {
                let held = self.held(auth, &path);
                let down = |privilege: &str| u8::from(held.down & bit(privilege) != 0);
                (path, names(held.all).map(|name| (name.to_owned(), down(name))).collect())
            })
            .filter(|(_, privileges): &(String, BTreeMap<String, u8>)| {
                path.is_some() || !privileges.is_empty()
            })
            .collect()
    }
}

/// How many steps the path of an entry is above `path`, counted from the root; `None` where it is not above it.
fn steps(above: &str, path: &str) -> Option<usize> {
    if above == "/" {
        return Some(0);
    }
    let rest = path.strip_prefix(above)?;
    (rest.is_empty() || rest.starts_with('/')).then(|| above.matches('/').count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access() -> Access {
        let role = |privileges: &[&str]| privileges.iter().map(|p| (*p).to_owned()).collect();
        let entry = |path: &str, who: &str, role: &str| AclEntry {
            path: path.to_owned(),
            who: who.to_owned(),
            role: role.to_owned(),
            propagate: true,
        };
        Access {
            roles: BTreeMap::from([
                ("csi".to_owned(), role(&["VM.Audit", "VM.Config.Disk", "Datastore.Allocate"])),
                ("audit".to_owned(), role(&["Datastore.Audit"])),
                ("NoAccess".to_owned(), role(&[])),
            ]),
            acl: vec![
                entry("/", "csi@pve", "csi"),
                entry("/vms/7", "csi@pve", "NoAccess"),
                entry("/storage", "min@pve", "audit"),
            ],
            pools: BTreeMap::new(),
            separated: BTreeSet::from(["csi@pve!sep".to_owned()]),
            ..Access::default()
        }
    }

    #[test]
    fn a_deeper_entry_replaces_the_one_above() {
        let access = access();
        assert!(access.has("csi@pve!csi", "/vms/101", &["VM.Audit"]));
        assert!(!access.has("csi@pve!csi", "/vms/7", &["VM.Audit"]));
    }

    #[test]
    fn a_separated_token_without_entries_has_nothing() {
        assert!(!access().has("csi@pve!sep", "/vms/101", &["VM.Audit"]));
    }

    #[test]
    fn an_entry_of_a_group_gives_way_to_one_of_the_user() {
        let mut access = access();
        access.groups.insert(
            "admins".to_owned(),
            Group { users: BTreeSet::from(["ann@pve".to_owned(), "csi@pve".to_owned()]), comment: None },
        );
        access.acl.push(AclEntry {
            path: "/".to_owned(),
            who: "@admins".to_owned(),
            role: "PVEVMAdmin".to_owned(),
            propagate: true,
        });
        assert!(access.has("ann@pve", "/vms/101", &["VM.PowerMgmt"]));
        assert!(!access.has("csi@pve", "/vms/101", &["VM.PowerMgmt"]));
    }

    #[test]
    fn what_a_pool_brings_reaches_its_members_and_not_below() {
        let mut access = access();
        access.pools.insert(300, "p1".to_owned());
        access.pool_storages.insert(("p1".to_owned(), "nfs".to_owned()));
        access.acl.push(AclEntry {
            path: "/pool/p1".to_owned(),
            who: "ann@pve".to_owned(),
            role: "PVEAdmin".to_owned(),
            propagate: true,
        });
        assert!(access.has("ann@pve", "/vms/300", &["VM.Allocate"]));
        assert!(access.has("ann@pve", "/storage/nfs", &["Datastore.Allocate"]));
        assert!(!access.has("ann@pve", "/vms/301", &["VM.Allocate"]));
        assert_eq!(access.effective("ann@pve", Some("/vms/300"))["/vms/300"]["VM.Allocate"], 0);
        access.acl[0].who = "ann@pve".to_owned();
        access.acl[0].role = NOTHING.to_owned();
        assert!(!access.has("ann@pve", "/vms/300", &["VM.Allocate"]));
    }

    #[test]
    fn paths_are_those_that_entries_can_have() {
        for path in ["/", "/vms/100", "/storage/local", "/pool/a/b", "/access/realm/pve"] {
            assert!(is_acl_path(path), "{path}");
        }
        assert!(is_acl_path("/sdn/zones/z1/vnet1/100"));
        for path in
            ["/vms/x", "/vms/010", "/vm/100", "/storage/a/b", "/access/nope", "/sdn/nope", "/sdn/zones/z/v/0"]
        {
            assert!(!is_acl_path(path), "{path}");
        }
        assert_eq!(normalize_path("vms//100/").as_deref(), Some("/vms/100"));
        assert_eq!(normalize_path("/vms/1 2"), None);
    }

    /// Recorded as C61.
    #[test]
    fn a_volume_of_another_owner_needs_rights_on_that_owner() {
        let error = access().check_volume("min@pve", "local", 9999, Some(101));
        assert_eq!(
            error.map_err(|e| e.message().to_owned()),
            Err("Permission check failed (/vms/9999, VM.Config.Disk)".to_owned())
        );
        assert_eq!(access().check_volume("min@pve", "local", 101, Some(101)), Ok(()));
    }
}
