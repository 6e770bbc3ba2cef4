//! Who may do what (pve-access-control `AccessControl.pm:roles`, `RPCEnvironment.pm:permissions`, `check`).

use super::error::PveError;
use std::collections::{BTreeMap, BTreeSet};

/// An access control entry: `who` has `role` at `path`, and below it where it propagates.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclEntry {
    /// Object path, such as `/` or `/storage/local`.
    pub path: String,
    /// User (`csi@pve`) or token (`csi@pve!csi`).
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

/// The access table: roles, entries, pools and which tokens stand on their own rights.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Privileges by role.
    pub roles: BTreeMap<String, BTreeSet<String>>,
    /// All entries.
    pub acl: Vec<AclEntry>,
    /// Pool of a VM.
    pub pools: BTreeMap<u32, String>,
    /// Tokens with privilege separation.
    pub separated: BTreeSet<String>,
}

/// What a role of this name contains when the administrator did not define it; `Administrator` holds everything.
const EVERYTHING: &str = "Administrator";
/// The role that takes all others away.
const NOTHING: &str = "NoAccess";

/// The privileges PVE 9 knows (`AccessControl.pm:$privgroups`).
pub const ALL_PRIVILEGES: &[&str] = &[
    "Datastore.Allocate",
    "Datastore.AllocateSpace",
    "Datastore.AllocateTemplate",
    "Datastore.Audit",
    "Group.Allocate",
    "Mapping.Audit",
    "Mapping.Modify",
    "Mapping.Use",
    "Permissions.Modify",
    "Pool.Allocate",
    "Pool.Audit",
    "Realm.Allocate",
    "Realm.AllocateUser",
    "SDN.Allocate",
    "SDN.Audit",
    "SDN.Use",
    "Sys.AccessNetwork",
    "Sys.Audit",
    "Sys.Console",
    "Sys.Incoming",
    "Sys.Modify",
    "Sys.PowerMgmt",
    "Sys.Syslog",
    "User.Modify",
    "VM.Allocate",
    "VM.Audit",
    "VM.Backup",
    "VM.Clone",
    "VM.Config.CDROM",
    "VM.Config.CPU",
    "VM.Config.Cloudinit",
    "VM.Config.Disk",
    "VM.Config.HWType",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.Options",
    "VM.Console",
    "VM.GuestAgent.Audit",
    "VM.GuestAgent.FileRead",
    "VM.GuestAgent.FileSystemMgmt",
    "VM.GuestAgent.FileWrite",
    "VM.GuestAgent.Unrestricted",
    "VM.Migrate",
    "VM.PowerMgmt",
    "VM.Replicate",
    "VM.Snapshot",
    "VM.Snapshot.Rollback",
];

/// The paths PVE always lists in `/access/permissions` (`RPCEnvironment.pm:get_effective_permissions`).
pub const DEFAULT_PATHS: &[&str] =
    &["/", "/access", "/access/groups", "/nodes", "/pool", "/sdn", "/storage", "/vms"];

impl Access {
    fn role(&self, name: &str) -> BTreeSet<String> {
        if name == EVERYTHING {
            return ALL_PRIVILEGES.iter().map(|p| (*p).to_owned()).collect();
        }
        self.roles.get(name).cloned().unwrap_or_default()
    }

    /// The roles of one user or token by its own entries, each with whether it holds below: those set further down replace those
    /// above, and `NoAccess` stands alone (`AccessControl.pm:roles`).
    fn roles_at(&self, who: &str, path: &str) -> BTreeMap<String, bool> {
        let mut steps = vec![String::from("/")];
        let mut built = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            built = format!("{built}/{part}");
            steps.push(built.clone());
        }
        let mut roles = BTreeMap::new();
        for step in &steps {
            let here = |entry: &&AclEntry| {
                entry.who == who && entry.path == *step && (entry.propagate || step == path)
            };
            let new: BTreeMap<String, bool> =
                self.acl.iter().filter(here).map(|entry| (entry.role.clone(), entry.propagate)).collect();
            if !new.is_empty() {
                roles = new;
            }
        }
        if roles.contains_key(NOTHING) {
            roles.retain(|role, _| role == NOTHING);
        }
        roles
    }

    /// The privileges of one user or token at `path` with those that its pool lends a VM, each with whether it holds below: a pool
    /// only adds, unless it has `NoAccess`, and never over a `NoAccess` of the VM itself (`RPCEnvironment.pm:$compile_acl_path`).
    fn compiled(&self, who: &str, path: &str) -> BTreeMap<String, bool> {
        if who == "root@pam" {
            return self.role(EVERYTHING).into_iter().map(|privilege| (privilege, true)).collect();
        }
        let mut roles = self.roles_at(who, path);
        let vmid = path.strip_prefix("/vms/").and_then(|vmid| vmid.parse().ok());
        let pool = vmid.and_then(|id: u32| self.pools.get(&id));
        if let Some(pool) = pool
            && !roles.contains_key(NOTHING)
        {
            let lent = self.roles_at(who, &format!("/pool/{pool}"));
            if lent.contains_key(NOTHING) {
                roles.clear();
            } else {
                for role in lent.into_keys() {
                    roles.entry(role).or_insert(false);
                }
            }
        }
        let mut privileges = BTreeMap::new();
        for (role, below) in roles {
            for privilege in self.role(&role) {
                *privileges.entry(privilege).or_insert(false) |= below;
            }
        }
        privileges
    }

    /// The privileges of `auth`, a user or a token, at `path`, each with whether it holds below.
    fn held(&self, auth: &str, path: &str) -> BTreeMap<String, bool> {
        let user = auth.split('!').next().unwrap_or(auth);
        let users = self.compiled(user, path);
        if auth == user || !self.separated.contains(auth) {
            return users;
        }
        // A separated token has at most what its user has.
        let own = self.compiled(auth, path).into_iter();
        own.filter_map(|(privilege, below)| {
            let of_user = users.get(&privilege)?;
            Some((privilege, below && *of_user))
        })
        .collect()
    }

    /// The privileges of `auth`, a user or a token, at `path`.
    pub fn privileges(&self, auth: &str, path: &str) -> BTreeSet<String> {
        self.held(auth, path).into_keys().collect()
    }

    /// Whether `auth` has one of `any` at `path`.
    pub fn has(&self, auth: &str, path: &str, any: &[&str]) -> bool {
        let privileges = self.privileges(auth, path);
        any.iter().any(|privilege| privileges.contains(*privilege))
    }

    /// Refuses with PVE's text unless `auth` has one of `any` at `path`.
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

    /// Privileges by path, as `/access/permissions` lists them; the value says whether they propagate. Paths without any are left out,
    /// `NoAccess` among them (`RPCEnvironment.pm:get_effective_permissions`).
    pub fn effective(&self, auth: &str, path: Option<&str>) -> BTreeMap<String, BTreeMap<String, u8>> {
        let paths: BTreeSet<String> = match path {
            Some(path) => BTreeSet::from([path.to_owned()]),
            None => DEFAULT_PATHS
                .iter()
                .map(|path| (*path).to_owned())
                .chain(self.acl.iter().map(|entry| entry.path.clone()))
                .chain(self.pools.keys().map(|vmid| format!("/vms/{vmid}")))
                .collect(),
        };
        paths
            .into_iter()
            .map(|path| {
                let held = self.held(auth, &path).into_iter();
                let privileges = held.map(|(privilege, below)| (privilege, u8::from(below))).collect();
                (path, privileges)
            })
            .filter(|(_, privileges): &(String, BTreeMap<String, u8>)| {
                path.is_some() || !privileges.is_empty()
            })
            .collect()
    }
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
        }
    }

    #[test]
    fn a_deeper_entry_replaces_the_one_above() {
        let access = access();
        assert!(access.has("csi@pve!csi", "/vms/101", &["VM.Audit"]));
        assert!(!access.has("csi@pve!csi", "/vms/7", &["VM.Audit"]));
    }

    #[test]
    fn a_path_without_access_is_left_out_of_the_list() {
        let mut access = access();
        let list = access.effective("csi@pve", None);
        assert_eq!(list["/vms"]["VM.Audit"], 1);
        assert!(!list.contains_key("/vms/7"), "as if nothing were said of it");
        assert_eq!(access.effective("csi@pve", Some("/vms/7"))["/vms/7"].len(), 0);
        access.acl[0].propagate = false;
        assert_eq!(access.effective("csi@pve", None)["/"]["VM.Audit"], 0);
    }

    #[test]
    fn a_pool_lends_what_it_has_and_takes_all_with_no_access() {
        let mut access = access();
        let entry = |role: &str| AclEntry {
            path: "/pool/p".to_owned(),
            who: "min@pve".to_owned(),
            role: role.to_owned(),
            propagate: true,
        };
        access.pools.extend([(7, "p".to_owned()), (8, "p".to_owned())]);
        access.acl.push(entry("csi"));
        assert!(access.has("min@pve", "/vms/8", &["VM.Audit"]));
        assert_eq!(access.effective("min@pve", None)["/vms/8"]["VM.Audit"], 0, "never below");
        access.acl.pop();
        access.acl.push(AclEntry { who: "csi@pve".to_owned(), ..entry("NoAccess") });
        assert!(!access.has("csi@pve", "/vms/8", &["VM.Audit"]));
        assert!(access.has("csi@pve", "/vms/9", &["VM.Audit"]));
    }

    #[test]
    fn a_separated_token_without_entries_has_nothing() {
        assert!(!access().has("csi@pve!sep", "/vms/101", &["VM.Audit"]));
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
