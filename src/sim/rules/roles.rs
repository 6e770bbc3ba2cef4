//! Privileges and the roles that PVE makes itself (pve-access-control `AccessControl.pm:$privgroups`, `create_roles`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

/// The role that holds everything.
pub(super) const EVERYTHING: &str = "Administrator";
/// The role that takes everything away.
pub(super) const NOTHING: &str = "NoAccess";

/// The privileges PVE knows (`AccessControl.pm:$privgroups`), in order. `VM.Monitor` is of PVE 8, `VM.GuestAgent.*` and
/// `VM.Replicate` are of PVE 9.
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
    "VM.Monitor",
    "VM.PowerMgmt",
    "VM.Replicate",
    "VM.Snapshot",
    "VM.Snapshot.Rollback",
];

/// The roles that PVE makes itself, with what they hold (`AccessControl.pm:create_roles`).
pub const MADE_ROLES: &[(&str, &[&str])] = &[
    ("PVEDatastoreUser", &["Datastore.AllocateSpace", "Datastore.Audit"]),
    (
        "PVEDatastoreAdmin",
        &["Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.AllocateTemplate", "Datastore.Audit"],
    ),
    ("PVEMappingAdmin", &["Mapping.Audit", "Mapping.Modify", "Mapping.Use"]),
    ("PVEMappingUser", &["Mapping.Audit", "Mapping.Use"]),
    ("PVEPoolAdmin", &["Pool.Allocate", "Pool.Audit"]),
    ("PVEPoolUser", &["Pool.Audit"]),
    ("PVESDNAdmin", &["SDN.Allocate", "SDN.Audit", "SDN.Use"]),
    ("PVESDNUser", &["SDN.Audit", "SDN.Use"]),
    ("PVESysAdmin", &["Sys.Audit", "Sys.Console", "Sys.Syslog"]),
    ("PVETemplateUser", &["VM.Audit", "VM.Clone"]),
    ("PVEUserAdmin", &["Group.Allocate", "Realm.AllocateUser", "User.Modify"]),
    (
        "PVEVMUser",
        &[
            "VM.Audit",
            "VM.Backup",
            "VM.Config.CDROM",
            "VM.Config.Cloudinit",
            "VM.Console",
            "VM.GuestAgent.Audit",
            "VM.GuestAgent.FileRead",
            "VM.GuestAgent.FileSystemMgmt",
            "VM.GuestAgent.FileWrite",
            "VM.PowerMgmt",
        ],
    ),
];

/// Privileges no role below `Administrator` holds, by the prefix of what it holds otherwise
/// (`AccessControl.pm:$privgroups`, key `root`).
const ROOTS_ALONE: &[&str] =
    &["Realm.Allocate", "Sys.AccessNetwork", "Sys.Incoming", "Sys.Modify", "Sys.PowerMgmt"];

/// What a role that PVE makes itself holds; `None` for the name of any other (`AccessControl.pm:create_roles`).
pub fn made_role(name: &str) -> Option<BTreeSet<String>> {
    let all = || ALL_PRIVILEGES.iter().copied();
    let found: Vec<&str> = match name {
        EVERYTHING => all().collect(),
        NOTHING => Vec::new(),
        "PVEAdmin" => all().filter(|p| !ROOTS_ALONE.contains(p) && *p != "Mapping.Modify").collect(),
        "PVEVMAdmin" => all().filter(|p| p.starts_with("VM.")).collect(),
        "PVEAuditor" => all().filter(|p| p.ends_with(".Audit")).collect(),
        _ => MADE_ROLES.iter().find(|(role, _)| *role == name)?.1.to_vec(),
    };
    Some(found.into_iter().map(str::to_owned).collect())
}

/// The names of the roles that PVE makes itself (`AccessControl.pm:create_roles`).
pub fn made_roles() -> impl Iterator<Item = &'static str> {
    let more = [EVERYTHING, NOTHING, "PVEAdmin", "PVEAuditor", "PVEVMAdmin"];
    MADE_ROLES.iter().map(|(name, _)| *name).chain(more)
}

/// A set of privileges, one bit each in the order of `ALL_PRIVILEGES`.
pub(super) type Mask = u64;

/// The bit of a privilege; nothing for one that PVE does not know.
pub(super) fn bit(privilege: &str) -> Mask {
    ALL_PRIVILEGES.binary_search(&privilege).map_or(0, |index| 1 << index)
}

pub(super) fn names(mask: Mask) -> impl Iterator<Item = &'static str> {
    ALL_PRIVILEGES.iter().enumerate().filter(move |(index, _)| mask >> index & 1 == 1).map(|(_, name)| *name)
}

/// The privileges of one version only: those of 9, or of 8 (`AccessControl.pm:$privgroups`).
pub(super) fn known(eight: bool) -> Mask {
    static OF: LazyLock<[Mask; 2]> = LazyLock::new(|| {
        let of_nine = |name: &str| name.starts_with("VM.GuestAgent.") || name == "VM.Replicate";
        let mask = |fits: &dyn Fn(&str) -> bool| {
            ALL_PRIVILEGES.iter().filter(|name| fits(name)).fold(0, |mask, name| mask | bit(name))
        };
        [mask(&|name| name != "VM.Monitor"), mask(&|name| !of_nine(name))]
    });
    OF[usize::from(eight)]
}

/// What a role that PVE makes itself holds; nothing for the name of any other (`AccessControl.pm:create_roles`).
pub(super) fn made_mask(role: &str) -> Mask {
    static OF: LazyLock<BTreeMap<&str, Mask>> = LazyLock::new(|| {
        let mask = |role| made_role(role).into_iter().flatten().fold(0, |mask, name| mask | bit(&name));
        made_roles().map(|role| (role, mask(role))).collect()
    });
    OF.get(role).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_privileges_are_in_order_and_known_to_the_roles() {
        assert!(ALL_PRIVILEGES.is_sorted());
        for (role, privileges) in MADE_ROLES {
            assert!(privileges.iter().all(|privilege| bit(privilege) != 0), "{role}");
        }
        let admin = made_role("PVEAdmin").expect("PVE makes it");
        assert!(admin.contains("VM.Allocate") && !admin.contains("Sys.Modify"));
    }
}
