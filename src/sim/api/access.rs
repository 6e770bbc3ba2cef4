//! `/access` (pve-access-control `API2/AccessControl.pm`).

use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::access::{AclEntry, is_acl_path, normalize_path};
use crate::sim::rules::error::PveError;
use crate::sim::rules::roles::{ALL_PRIVILEGES, made_role, made_roles};
use crate::sim::rules::schema::split_list;
use crate::sim::state::State;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// `GET /access/permissions`: the caller's own, or with `Sys.Audit` on /access another's (pve-access-control
/// `API2/AccessControl.pm:permissions`).
pub(super) fn permissions(call: &Call) -> Result<Reply, PveError> {
    let who = call.get("userid").unwrap_or(&call.user);
    if who != call.user {
        call.check("/access", &["Sys.Audit"])?;
    }
    Ok(call.sim.read(|state| json!(state.access.effective(who, call.get("path")))).into())
}

/// `POST /access/ticket` (`API2/AccessControl.pm:create_ticket`): a login, or a ticket in place of the password.
pub(super) async fn ticket(call: &Call) -> Result<Reply, PveError> {
    let mut user = call.text("username").to_owned();
    if let Some(realm) = call.get("realm")
        && !user.contains('@')
    {
        user = format!("{user}@{realm}");
    }
    let password = call.text("password");
    let now = call.sim.clock().now();
    let good = call.sim.read(|state| {
        let known = state.users.get(&user).and_then(|user| user.password.as_deref());
        state.user_is_enabled(&user, now) && known == Some(password)
    }) || call.sim.ticket_user(password).is_some_and(|of| of == user);
    if !good {
        call.sim.clock().spend(Cost::AuthFailure).await;
        return Err(PveError::Status(401, "authentication failure".to_owned()));
    }
    let mut data = json!({
        "username": user,
        "ticket": call.sim.mint_ticket(&user),
        "CSRFPreventionToken": call.sim.mint_csrf(&user),
        "cap": capabilities(call, &user),
    });
    let (cluster, audit) =
        call.sim.read(|state| (state.cluster.clone(), state.access.has(&user, "/", &["Sys.Audit"])));
    if !cluster.is_empty() && audit {
        data["clustername"] = json!(cluster);
    }
    Ok(data.into())
}

/// What the user interface shows, by part of the cluster (`RPCEnvironment.pm:compute_api_permission`).
fn capabilities(call: &Call, user: &str) -> Value {
    const PARTS: &[(&str, &[&str], &[&str])] = &[
        ("vms", &["/vms"], &["VM."]),
        ("storage", &["/storage"], &["Datastore."]),
        ("nodes", &["/nodes"], &["Sys."]),
        ("dc", &["/"], &["Sys."]),
        ("access", &["/access", "/access/groups"], &["User.", "Group.", "Permissions."]),
        ("sdn", &["/sdn"], &["SDN."]),
        ("mapping", &["/mapping"], &["Mapping."]),
    ];
    let mut all = Map::new();
    for (name, paths, prefixes) in PARTS {
        let held = call.sim.read(|state| {
            let of_paths = paths.iter().flat_map(|path| state.access.privileges(user, path));
            let fits = |privilege: &String| prefixes.iter().any(|prefix| privilege.starts_with(prefix));
            of_paths.filter(fits).map(|privilege| (privilege, json!(1))).collect::<Map<_, _>>()
        });
        all.insert((*name).to_owned(), Value::Object(held));
    }
    Value::Object(all)
}

/// `GET /access/acl`: all of it with `Sys.Audit` or `Permissions.Modify`, else nothing (`API2/ACL.pm:read_acl`).
pub(super) fn acl(call: &Call) -> Reply {
    let entries: Vec<Value> = call.sim.read(|state| {
        let seen = |path: &str| state.access.has(&call.user, path, &["Sys.Audit", "Permissions.Modify"]);
        state
            .access
            .acl
            .iter()
            .filter(|entry| seen("/access") || seen(&entry.path))
            .map(|entry| {
                json!({
                    "path": entry.path, "roleid": entry.role, "ugid": entry.who.trim_start_matches('@'),
                    "type": match &entry.who {
                        who if who.starts_with('@') => "group",
                        who if who.contains('!') => "token",
                        _ => "user",
                    },
                    "propagate": u8::from(entry.propagate),
                })
            })
            .collect()
    });
    json!(entries).into()
}

/// `PUT /access/acl`: entries come, or go with `delete=1` (`API2/ACL.pm:update_acl`).
pub(super) fn change_acl(call: &Call) -> Result<Reply, PveError> {
    const WHO: &[(&str, &str)] = &[("users", ""), ("groups", "@"), ("tokens", "")];
    if WHO.iter().all(|(list, _)| call.get(list).is_none_or(str::is_empty)) {
        let text = "either 'users', 'groups' or 'tokens' is required.";
        return Err(PveError::Parameters(
            WHO.iter().map(|(list, _)| ((*list).to_owned(), text.to_owned())).collect(),
        ));
    }
    let delete = call.flag("delete");
    let path = normalize_path(call.text("path")).filter(|path| delete || is_acl_path(path));
    let path =
        path.ok_or_else(|| PveError::parameter("path", format!("invalid ACL path '{}'", call.text("path"))))?;
    let propagate = call.get("propagate").is_none_or(|_| call.flag("propagate"));
    let failed = |text: String| PveError::die(format!("ACL update failed: {text}"));
    call.sim.change(|state| {
        let held = state.access.effective(&call.user, Some(&path)).remove(&path).unwrap_or_default();
        let mut entries = Vec::new();
        for role in split_list(call.text("roles")) {
            let privileges =
                state.access.role(role).ok_or_else(|| failed(format!("role '{role}' does not exist")))?;
            if !held.contains_key("Permissions.Modify") {
                hands_on(role, &privileges, &held, delete, propagate)?;
            }
            for (list, mark) in WHO {
                for who in call.get(list).into_iter().flat_map(split_list) {
                    exists(state, list, who).map_err(failed)?;
                    entries.push(AclEntry {
                        path: path.clone(),
                        who: format!("{mark}{who}"),
                        role: role.to_owned(),
                        propagate,
                    });
                }
            }
        }
        for entry in entries {
            let same = |other: &AclEntry| {
                other.path == entry.path && other.who == entry.who && other.role == entry.role
            };
            state.access.acl.retain(|other| !same(other));
            if !delete {
                state.access.acl.push(entry);
            }
        }
        Ok(Reply::null())
    })
}

/// Without `Permissions.Modify` one gives and takes only what one holds (`ACL.pm:update_acl`).
fn hands_on(
    role: &str,
    privileges: &BTreeSet<String>,
    held: &BTreeMap<String, u8>,
    delete: bool,
    propagate: bool,
) -> Result<(), PveError> {
    let verb = if delete { "remove" } else { "add" };
    for privilege in privileges {
        match held.get(privilege) {
            None => {
                return Err(PveError::parameter(
                    "role",
                    format!(
                        "Cannot {verb} role '{role}' - requires 'Permissions.Modify' or superset of privileges."
                    ),
                ));
            }
            Some(0) if propagate && !delete => {
                return Err(PveError::parameter(
                    "role",
                    format!(
                        "Cannot {verb} role '{role}' with propagation - requires 'Permissions.Modify' or propagated \
                         superset of privileges."
                    ),
                ));
            }
            Some(_) => {}
        }
    }
    if role == "NoAccess" {
        let text = format!("Cannot {verb} role '{role}' - requires 'Permissions.Modify'");
        return Err(PveError::parameter("role", text));
    }
    Ok(())
}

fn exists(state: &State, list: &str, who: &str) -> Result<(), String> {
    match list {
        "groups" if !state.access.groups.contains_key(who) => Err(format!("group '{who}' does not exist")),
        "users" if !state.users.contains_key(who) => Err(format!("user '{who}' does not exist")),
        "tokens" if !state.tokens.contains_key(who) => {
            let (user, token) = who.split_once('!').unwrap_or((who, ""));
            if !state.users.contains_key(user) {
                return Err(format!("no such user ('{user}')"));
            }
            Err(format!("no such token '{token}' for user '{user}'"))
        }
        _ => Ok(()),
    }
}

/// `GET /access/roles` (`API2/Role.pm:index`).
pub(super) fn roles(call: &Call) -> Reply {
    let list: Vec<Value> = call.sim.read(|state| {
        let own = state.access.roles.keys().cloned();
        let names: BTreeSet<String> = made_roles().map(str::to_owned).chain(own).collect();
        let entry = |name: &str| {
            let privileges: Vec<String> = state.access.role(name).into_iter().flatten().collect();
            let special = made_role(name).is_some();
            json!({ "roleid": name, "privs": privileges.join(","), "special": u8::from(special) })
        };
        names.iter().map(|name| entry(name)).collect()
    });
    json!(list).into()
}

/// `GET /access/roles/{roleid}` (`API2/Role.pm:read_role`).
pub(super) fn role(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("roleid");
    call.sim.read(|state| {
        let role = state.access.role(id);
        let role = role.ok_or_else(|| PveError::die(format!("role '{id}' does not exist")))?;
        Ok(Value::Object(role.into_iter().map(|privilege| (privilege, json!(1))).collect()).into())
    })
}

/// The privileges a call names (`AccessControl.pm:add_role_privs`).
fn named_privileges(call: &Call) -> Result<BTreeSet<String>, PveError> {
    let named = call.get("privs").into_iter().flat_map(split_list);
    named
        .map(|name| {
            let known = ALL_PRIVILEGES.contains(&name).then(|| name.to_owned());
            known.ok_or_else(|| PveError::die(format!("invalid privilege '{name}'")))
        })
        .collect()
}

/// `POST /access/roles` (`API2/Role.pm:create_role`).
pub(super) fn add_role(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("roleid").to_owned();
    if id.to_ascii_uppercase().starts_with("PVE") {
        return Err(PveError::parameter(
            "roleid",
            "cannot use role ID starting with the (case-insensitive) 'PVE' namespace",
        ));
    }
    let failed = |text: &str| PveError::die(format!("create role failed: {text}"));
    let privileges = named_privileges(call).map_err(|error| failed(error.message()))?;
    call.sim.change(|state| {
        if state.access.role(&id).is_some() {
            return Err(failed(&format!("role '{id}' already exists")));
        }
        state.access.roles.insert(id, privileges);
        Ok(Reply::null())
    })
}

fn refuse_made(id: &str, what: &str) -> Result<(), PveError> {
    match made_role(id) {
        Some(_) => Err(PveError::die(format!("auto-generated role '{id}' cannot be {what}"))),
        None => Ok(()),
    }
}

/// `PUT /access/roles/{roleid}` (`API2/Role.pm:update_role`).
pub(super) fn change_role(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("roleid");
    refuse_made(id, "modified")?;
    let failed = |text: &str| PveError::die(format!("update role failed: {text}"));
    let privileges = named_privileges(call).map_err(|error| failed(error.message()))?;
    call.sim.change(|state| {
        let role = state.access.roles.get_mut(id);
        let role = role.ok_or_else(|| failed(&format!("role '{id}' does not exist")))?;
        if !call.flag("append") {
            role.clear();
        }
        role.extend(privileges);
        Ok(Reply::null())
    })
}

/// `DELETE /access/roles/{roleid}` (`API2/Role.pm:delete_role`).
pub(super) fn remove_role(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("roleid");
    refuse_made(id, "deleted")?;
    call.sim.change(|state| match state.access.roles.remove(id) {
        Some(_) => Ok(Reply::null()),
        None => Err(PveError::die(format!("delete role failed: role '{id}' does not exist"))),
    })
}

/// `GET /access/domains`: the two realms that PVE brings (`API2/Domains.pm:index`).
pub(super) fn domains() -> Reply {
    json!([
        { "realm": "pam", "type": "pam", "comment": "Linux PAM standard authentication" },
        { "realm": "pve", "type": "pve", "comment": "Proxmox VE authentication server" },
    ])
    .into()
}

/// `GET /access` and `GET /access/ticket`: what a browser looks at (`API2/AccessControl.pm:index`, `get_ticket`).
pub(super) fn index() -> Reply {
    let parts = ["users", "groups", "roles", "acl", "domains", "ticket", "password", "permissions"];
    json!(parts.map(|part| json!({ "subdir": part }))).into()
}
