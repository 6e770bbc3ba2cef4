//! What the token may do, whose VMID owns the volumes, and what is left of short-lived VMs.

use std::collections::BTreeMap;

use super::{Code, Finding, RegionView, Report, View, joined, note, quoted};
use crate::{
    pve::access::{Permissions, purpose},
    types::VmId,
};

/// The role of the documentation.
const ROLE: &str = "CSI";
/// Its privileges.
const PRIVILEGES: &str = "VM.Audit VM.Config.Disk Datastore.Allocate Datastore.AllocateSpace Datastore.Audit";

pub(super) fn privileges(view: &View, region: &RegionView, report: &mut Report) {
    let area = region.area();
    let permissions = match &region.permissions {
        Ok(permissions) => permissions,
        Err(why) => {
            report.find(Finding::new(Code::ServerFailed, &area, "privileges", why));
            return;
        }
    };
    let storages = view.used_storages(region);
    let mut missing: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut lacks = |path: String, privilege| missing.entry(path).or_default().push(privilege);
    if !permissions.allow_below("/vms", "VM.Audit") {
        lacks("/vms".to_owned(), "VM.Audit");
    }
    for gap in permissions.gaps_below("/vms", "VM.Audit") {
        lacks(gap.to_owned(), "VM.Audit");
    }
    if permissions.allow_below("/vms", "VM.Config.Disk") {
        for gap in permissions.gaps_below("/vms", "VM.Config.Disk") {
            lacks(gap.to_owned(), "VM.Config.Disk");
        }
    } else {
        // Enough on the VMs of nodes alone.
        let workers: Vec<VmId> =
            view.nodes.iter().flat_map(|node| view.vms_of(node)).map(|(vmid, ..)| vmid).collect();
        if workers.is_empty() {
            lacks("/vms".to_owned(), "VM.Config.Disk");
        }
        let denied: Vec<String> = workers
            .iter()
            .map(|vmid| format!("/vms/{vmid}"))
            .filter(|path| !permissions.allow(path, "VM.Config.Disk"))
            .collect();
        let all = !denied.is_empty() && denied.len() == workers.len();
        for path in if all { vec!["/vms".to_owned()] } else { denied } {
            lacks(path, "VM.Config.Disk");
        }
    }
    let of_storages = ["Datastore.Audit", "Datastore.AllocateSpace", "Datastore.Allocate"];
    for privilege in of_storages {
        let denied: Vec<String> = storages
            .iter()
            .map(|storage| format!("/storage/{storage}"))
            .filter(|path| !permissions.allow(path, privilege))
            .collect();
        let all = storages.len() > 1 && denied.len() == storages.len();
        for path in if all { vec!["/storage".to_owned()] } else { denied } {
            lacks(path, privilege);
        }
    }
    if storages.is_empty() && !of_storages.iter().all(|one| permissions.allow_below("/storage", one)) {
        report.unseen(
            &area,
            "privileges on storages: no StorageClass or PV names one, and the token sees none",
        );
    }
    if missing.is_empty() {
        report
            .pass(&area, format!("the token has each privilege on /vms and on {}", storages_text(&storages)));
    }
    for (path, privileges) in &missing {
        report.find(lacking(region, permissions, path, privileges));
    }
    optional(region, permissions, report);
}

fn storages_text(storages: &std::collections::BTreeSet<crate::types::StorageId>) -> String {
    if storages.is_empty() {
        "no storage, since none is used".to_owned()
    } else {
        format!("storage {}", joined(storages))
    }
}

fn lacking(region: &RegionView, permissions: &Permissions, path: &str, privileges: &[&str]) -> Finding {
    let token = &region.who;
    let why = joined(privileges.iter().map(|one| purpose(one)).collect::<std::collections::BTreeSet<_>>());
    let text = format!("the token lacks {} on {path}, for {why}", privileges.join(" and "));
    let finding = Finding::new(Code::PrivilegeMissing, &region.area(), path, text);
    let (user, role) = (token.split('!').next().unwrap_or_default(), role_of(region, path));
    let acl = |path: &str, role: &str| {
        // A token with privilege separation has no more than its user, so that both need it.
        let tokens = if token.contains('!') { format!(" --tokens {}", quoted(token)) } else { String::new() };
        format!("pveum acl modify {path} --users {}{tokens} --roles {role}", quoted(user))
    };
    if permissions.is_empty() {
        return finding
            .hint("the token has no privilege at all: with privilege separation it has only what is given to itself, and no more than its user")
            .command(format!("pveum role add {ROLE} --privs \"{PRIVILEGES}\"   # unless there is one"))
            .command(acl("/", ROLE));
    }
    let parent = &path[..path.rfind('/').unwrap_or(0)];
    let taken_away = !parent.is_empty() && privileges.iter().all(|one| permissions.allow_below(parent, one));
    if taken_away {
        let role = role.as_deref().unwrap_or(ROLE);
        return finding
            .hint(format!("an entry for {path} takes away what {parent} gives; `pveum acl list` shows it"))
            .command(acl(path, role));
    }
    let modify =
        |role: &str| format!("pveum role modify {role} --append 1 --privs \"{}\"", privileges.join(" "));
    match role {
        Some(role) => finding.command(modify(&role)),
        None => finding
            .hint(format!("`{ROLE}` stands for the token's role on {path}, which it may not read itself; `pveum acl list` shows it. Where it has none there, the second line gives it one"))
            .command(modify(ROLE))
            .command(acl(if path.starts_with("/storage") { path } else { "/vms" }, ROLE)),
    }
}

/// The role that the access list gives the token nearest to a path, where the token may read the list.
fn role_of(region: &RegionView, path: &str) -> Option<String> {
    let user = region.who.split('!').next().unwrap_or_default();
    let covers = |entry: &str| {
        entry == "/" || path == entry || path.strip_prefix(entry).is_some_and(|rest| rest.starts_with('/'))
    };
    let entries =
        region.acl.iter().filter(|row| (row.who == region.who || row.who == user) && covers(&row.path));
    entries.max_by_key(|row| (row.who.contains('!'), row.path.len())).map(|row| row.role.clone())
}

fn optional(region: &RegionView, permissions: &Permissions, report: &mut Report) {
    let lacked: Vec<&str> = ["VM.Allocate", "VM.Config.Options"]
        .into_iter()
        .filter(|privilege| !permissions.allow_below("/vms", privilege))
        .collect();
    if lacked.is_empty() || permissions.is_empty() {
        return;
    }
    let text = format!(
        "the token lacks {} on /vms: a volume that is attached nowhere can not be grown",
        lacked.join(" and ")
    );
    let role = role_of(region, "/vms").unwrap_or_else(|| ROLE.to_owned());
    report.find(
        Finding::new(Code::PrivilegeOptional, &region.area(), "/vms", text)
            .hint("without it, volumes grow while a pod uses them")
            .command(format!("pveum role modify {role} --append 1 --privs \"{}\"", lacked.join(" "))),
    );
}

/// The VMID that owns the volumes.
pub(super) fn owner(view: &View, region: &RegionView, report: &mut Report) {
    let (area, owner) = (region.area(), view.settings.owner);
    match &region.owner_exists {
        Err(why) => report.unseen(&area, format!("whether a VM has the owner's VMID {owner}: {why}")),
        Ok(false) => {
            report.pass(&area, format!("no VM has the owner's VMID {owner}"));
            if owner.get() == 9999 {
                let text = "volumes are owned by VMID 9999, the default, which Proxmox hands out when it comes to it";
                report.find(Finding::new(Code::OwnerDefault, &area, "VMID 9999", text).hint(
                    "do not change it once there are volumes; keep the number from being handed out: Datacenter, Options, Next Free VMID Range",
                ).command("pvesh set /cluster/options --next-id lower=100,upper=9999   # the upper end is not handed out"));
            }
        }
        Ok(true) => {
            let seen = region.vms.get(&owner);
            let what = match seen {
                Some(vm) => format!(
                    "VM {owner} ({}) on node `{}`",
                    vm.row.name.as_deref().unwrap_or("no name"),
                    vm.row.node
                ),
                None => format!("a VM {owner} that the token does not see"),
            };
            let protected =
                seen.and_then(|vm| vm.seen.as_ref().ok()).is_some_and(|facts| facts.config.is_protected());
            let text = format!(
                "there is {what}: the volumes look like its own, and go with it when it is destroyed with `destroy-unreferenced-disks`"
            );
            let finding = Finding::new(Code::OwnerVm, &area, format!("VMID {owner}"), text);
            let finding = if protected {
                note(finding).hint("it is protected, which keeps it from being destroyed; leave it so")
            } else {
                finding
                    .hint(format!("who could destroy it: {}", destroyers(region, owner)))
                    .command(format!("qm set {owner} --protection 1   # as long as it is there"))
            };
            report.find(finding);
        }
    }
}

/// Who has `VM.Allocate` on a VM, as far as the access list is seen.
fn destroyers(region: &RegionView, vmid: VmId) -> String {
    if region.acl.is_empty() {
        return "root@pam, and whoever has VM.Allocate on it; the token may not read the access list (`pveum acl list`)".to_owned();
    }
    let own = format!("/vms/{vmid}");
    let allows = |role: &str| {
        matches!(role, "Administrator" | "PVEAdmin" | "PVEVMAdmin")
            || region.roles.get(role).is_some_and(|all| all.iter().any(|one| one == "VM.Allocate"))
    };
    let rows = region.acl.iter().filter(|row| {
        (row.path == own || (row.propagate && matches!(row.path.as_str(), "/" | "/vms"))) && allows(&row.role)
    });
    let mut who: Vec<String> =
        rows.map(|row| format!("{} (by {} on {})", row.who, row.role, row.path)).collect();
    who.insert(0, "root@pam".to_owned());
    who.dedup();
    joined(who)
}

/// Short-lived VMs that are still there, and others in their range.
pub(super) fn holders(view: &View, region: &RegionView, report: &mut Report) {
    let (area, range) = (region.area(), &view.settings.holders);
    let mut others = Vec::new();
    for (vmid, vm) in region.vms.iter().filter(|(vmid, _)| range.contains(&vmid.get())) {
        if !view.settings.is_holder(*vmid, vm.row.name.as_deref()) {
            others.push(*vmid);
            continue;
        }
        let facts = vm.seen.as_ref().ok();
        let volumes = facts.map(|facts| facts.config.volumes().map(|held| held.volid).collect::<Vec<_>>());
        let holds = match volumes.as_deref() {
            None => "it can not be read".to_owned(),
            Some([]) => "it holds nothing".to_owned(),
            Some(volids) => format!("it holds {}", volids.join(", ")),
        };
        let text = format!(
            "VM {vmid} on node `{}` was made to grow a volume and is still there; {holds}",
            vm.row.node
        );
        let mut finding = Finding::new(Code::HolderLeftOver, &area, format!("VM {vmid}"), text).hint(
            "the next operation on the volume removes it; if an expansion is running just now, it is in use",
        );
        if vm.row.running {
            finding = finding.hint("it runs, which a short-lived VM of the driver never does: look at it");
        } else if facts.is_some_and(|facts| facts.config.lock().is_none()) {
            finding.repair = Some("take the volume out of it and destroy it".to_owned());
        }
        report.find(finding);
    }
    if !others.is_empty() {
        let text = format!(
            "VMs {} are in the range {} to {} and are none of the driver's",
            joined(&others),
            range.start(),
            range.end()
        );
        report.find(
            Finding::new(Code::HolderRange, &area, "holderVmIDs", text)
                .hint("the driver passes over them; where the first 20 are taken it can make no short-lived VM: set another `features.holderVmIDs`"),
        );
    }
}
