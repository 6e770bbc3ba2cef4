//! `/access` (pve-access-control `API2/AccessControl.pm`).

use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::access::AclEntry;
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::split_list;
use serde_json::{Map, Value, json};

/// `GET /access/permissions`: the caller's own, or with `Sys.Audit` on /access another's.
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
    let good = call.sim.read(|state| state.users.get(&user).is_some_and(|known| known == password))
        || call.sim.ticket_user(password).is_some_and(|of| of == user);
    if !good {
        call.sim.clock().spend(Cost::AuthFailure).await;
        return Err(PveError::Status(401, "authentication failure".to_owned()));
    }
    Ok(json!({
        "username": user,
        "ticket": call.sim.mint_ticket(&user),
        "CSRFPreventionToken": call.sim.mint_csrf(&user),
        "cap": capabilities(call, &user),
    })
    .into())
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
                    "path": entry.path, "roleid": entry.role, "ugid": entry.who,
                    "type": if entry.who.contains('!') { "token" } else { "user" },
                    "propagate": u8::from(entry.propagate),
                })
            })
            .collect()
    });
    json!(entries).into()
}

/// `GET /access/roles/{roleid}` (`API2/Role.pm:read_role`).
pub(super) fn role(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("roleid");
    call.sim.read(|state| {
        let role =
            state.access.roles.get(id).ok_or_else(|| PveError::die(format!("role '{id}' does not exist")))?;
        Ok(Value::Object(role.iter().map(|privilege| (privilege.clone(), json!(1))).collect()).into())
    })
}

/// `GET /access/users/{userid}/token` (`API2/User.pm:token_index`).
pub(super) fn tokens(call: &Call) -> Reply {
    let user = call.text("userid");
    let list: Vec<Value> = call.sim.read(|state| {
        state
            .tokens
            .keys()
            .filter_map(|id| id.split_once('!').filter(|(of, _)| *of == user).map(|(_, name)| (id, name)))
            .map(|(id, name)| {
                json!({ "tokenid": name, "expire": 0, "privsep": u8::from(state.access.separated.contains(id)) })
            })
            .collect()
    });
    json!(list).into()
}

/// `POST /access/users/{userid}/token/{tokenid}` (`API2/User.pm:generate_token`).
pub(super) fn add_token(call: &Call) -> Result<Reply, PveError> {
    let id = format!("{}!{}", call.text("userid"), call.text("tokenid"));
    let separated = call.get("privsep").is_none_or(|_| call.flag("privsep"));
    let expire = call.get("expire").and_then(|time| time.parse::<u64>().ok()).unwrap_or(0);
    let expired = expire > 0 && expire < call.sim.clock().now();
    call.sim.change(|state| {
        if state.tokens.contains_key(&id) {
            return Err(PveError::die(format!("Token '{id}' already exists.")));
        }
        state.counter += 1;
        let secret = crate::sim::start::uuid_of(&format!("token {id} {}", state.counter));
        state.tokens.insert(id.clone(), (!expired).then(|| secret.clone()));
        if separated {
            state.access.separated.insert(id.clone());
        }
        let mut info = json!({ "privsep": u8::from(separated).to_string() });
        if let Some(time) = call.get("expire") {
            info["expire"] = json!(time);
        }
        Ok(json!({ "full-tokenid": id, "value": secret, "info": info }).into())
    })
}

/// `DELETE /access/users/{userid}/token/{tokenid}`.
pub(super) fn remove_token(call: &Call) -> Result<Reply, PveError> {
    let id = format!("{}!{}", call.text("userid"), call.text("tokenid"));
    call.sim.change(|state| match state.tokens.remove(&id) {
        Some(_) => Ok(Reply::null()),
        None => Err(PveError::die(format!("no such token '{}' for user", call.text("tokenid")))),
    })
}

/// `PUT /access/acl`: entries come, or go with `delete=1` (`API2/ACL.pm:update_acl`).
pub(super) fn change_acl(call: &Call) -> Reply {
    let path = call.text("path").to_owned();
    let propagate = call.get("propagate").is_none_or(|_| call.flag("propagate"));
    let who: Vec<String> = ["users", "tokens"]
        .iter()
        .filter_map(|list| call.get(list))
        .flat_map(split_list)
        .map(str::to_owned)
        .collect();
    let roles: Vec<String> = split_list(call.text("roles")).map(str::to_owned).collect();
    call.sim.change(|state| {
        for who in &who {
            for role in &roles {
                state
                    .access
                    .acl
                    .retain(|entry| !(entry.path == path && entry.who == *who && entry.role == *role));
                if !call.flag("delete") {
                    state.access.acl.push(AclEntry {
                        path: path.clone(),
                        who: who.clone(),
                        role: role.clone(),
                        propagate,
                    });
                }
            }
        }
    });
    Reply::null()
}

/// `PUT /access/roles/{roleid}` and `POST /access/roles` (`API2/Role.pm:update_role`, `create_role`).
pub(super) fn change_role(call: &Call) -> Reply {
    let privileges: std::collections::BTreeSet<String> =
        call.get("privs").into_iter().flat_map(split_list).map(str::to_owned).collect();
    call.sim.change(|state| {
        let role = state.access.roles.entry(call.text("roleid").to_owned()).or_default();
        if call.flag("append") {
            role.extend(privileges);
        } else {
            *role = privileges;
        }
    });
    Reply::null()
}
