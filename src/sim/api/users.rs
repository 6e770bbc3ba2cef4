//! Users, groups and tokens (pve-access-control `API2/User.pm`, `API2/Group.pm`). Errors of a change carry its name, as
//! `AccessControl.pm:lock_user_config` puts it in front.

use crate::sim::http::{Call, Reply};
use crate::sim::records::{TokenNote, User};
use crate::sim::rules::access::Group;
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::split_list;
use crate::sim::start::uuid_of;
use crate::sim::state::State;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// What a user may have beside rights.
const NOTES: &[&str] = &["firstname", "lastname", "email", "comment", "keys"];

/// A name with its realm (`AccessControl.pm:verify_username`).
fn userid(call: &Call) -> Result<String, PveError> {
    let id = call.text("userid");
    match id.rsplit_once('@') {
        Some((name, realm)) if !name.is_empty() && !realm.is_empty() => Ok(id.to_owned()),
        _ => Err(PveError::die(format!("user name '{id}' is too short"))),
    }
}

fn no_user(id: &str) -> PveError {
    PveError::die(format!("no such user ('{id}')"))
}

fn known<'a>(state: &'a State, id: &str) -> Result<&'a User, PveError> {
    state.users.get(id).ok_or_else(|| no_user(id))
}

/// The flag or number of a user as it comes back.
fn described(user: &User) -> Map<String, Value> {
    let mut entry = Map::new();
    entry.insert("enable".to_owned(), json!(u8::from(user.enabled)));
    entry.insert("expire".to_owned(), json!(user.expire));
    entry.extend(user.notes.iter().map(|(key, value)| (key.clone(), json!(value))));
    entry
}

fn groups_of<'a>(state: &'a State, id: &str) -> Vec<&'a str> {
    let groups = state.access.groups.iter().filter(|(_, group)| group.users.contains(id));
    groups.map(|(name, _)| name.as_str()).collect()
}

/// `GET /access/users`: those in groups that the caller may look at, and always the caller (`User.pm:index`).
pub(super) fn list(call: &Call) -> Reply {
    let any = &["User.Modify", "Sys.Audit"];
    let wanted = call.get("enabled").map(|_| call.flag("enabled"));
    let entries: Vec<Value> = call.sim.read(|state| {
        let everyone = state.access.has(&call.user, "/access/groups", any);
        let seen = |id: &str| {
            everyone
                || id == call.user
                || groups_of(state, id)
                    .iter()
                    .any(|group| state.access.has(&call.user, &format!("/access/groups/{group}"), any))
        };
        let users = state
            .users
            .iter()
            .filter(|(id, user)| seen(id.as_str()) && wanted.is_none_or(|wanted| wanted == user.enabled));
        users
            .map(|(id, user)| {
                let mut entry = described(user);
                entry.insert("userid".to_owned(), json!(id));
                let realm = id.rsplit('@').next().unwrap_or_default();
                entry.insert("realm-type".to_owned(), json!(realm));
                if call.flag("full") {
                    entry.insert("groups".to_owned(), json!(groups_of(state, id).join(",")));
                    entry.insert("tokens".to_owned(), json!(token_list(state, id)));
                }
                Value::Object(entry)
            })
            .collect()
    });
    json!(entries).into()
}

/// `GET /access/users/{userid}` (`User.pm:read_user`).
pub(super) fn get(call: &Call) -> Result<Reply, PveError> {
    let id = userid(call)?;
    call.sim.read(|state| {
        let mut entry = described(known(state, &id)?);
        entry.insert("groups".to_owned(), json!(groups_of(state, &id)));
        let tokens: Map<String, Value> = state
            .tokens
            .keys()
            .filter_map(|full| full.split_once('!').filter(|(of, _)| *of == id).map(|(_, name)| (name, full)))
            .map(|(name, full)| (name.to_owned(), token_info(state, full)))
            .collect();
        if !tokens.is_empty() {
            entry.insert("tokens".to_owned(), Value::Object(tokens));
        }
        Ok(Value::Object(entry).into())
    })
}

/// Puts what a call says of a user where it belongs; groups are replaced unless `append` is set.
fn describe(state: &mut State, call: &Call, id: &str) -> Result<(), PveError> {
    let wanted: Option<Vec<&str>> = call.get("groups").map(|groups| split_list(groups).collect());
    if let Some(missing) = wanted.iter().flatten().find(|group| !state.access.groups.contains_key(**group)) {
        return Err(PveError::die(format!("no such group '{missing}'")));
    }
    if let Some(wanted) = wanted {
        for (name, group) in &mut state.access.groups {
            if wanted.contains(&name.as_str()) {
                group.users.insert(id.to_owned());
            } else if !call.flag("append") {
                group.users.remove(id);
            }
        }
    }
    let user = state.users.entry(id.to_owned()).or_insert(User { enabled: true, ..User::default() });
    if call.get("enable").is_some() {
        user.enabled = call.flag("enable");
    }
    if let Some(expire) = call.get("expire").and_then(|time| time.parse().ok()) {
        user.expire = expire;
    }
    for note in NOTES {
        if let Some(text) = call.get(note) {
            user.notes.insert((*note).to_owned(), text.to_owned());
        }
    }
    Ok(())
}

/// `POST /access/users` (`User.pm:create_user`).
pub(super) fn create(call: &Call) -> Result<Reply, PveError> {
    let id = userid(call)?;
    let failed = |error: &PveError| PveError::die(format!("create user failed: {}", error.message()));
    call.sim.change(|state| {
        if state.users.contains_key(&id) {
            return Err(failed(&PveError::die(format!("user '{id}' already exists"))));
        }
        describe(state, call, &id).map_err(|error| failed(&error))?;
        if let (Some(user), Some(password)) = (state.users.get_mut(&id), call.get("password")) {
            user.password = Some(password.to_owned());
        }
        Ok(Reply::null())
    })
}

/// `PUT /access/users/{userid}` (`User.pm:update_user`).
pub(super) fn update(call: &Call) -> Result<Reply, PveError> {
    let id = userid(call)?;
    call.sim.change(|state| {
        let changed = known(state, &id).map(|_| ()).and_then(|()| describe(state, call, &id));
        changed.map_err(|error| PveError::die(format!("update user failed: {}", error.message())))?;
        Ok(Reply::null())
    })
}

/// `DELETE /access/users/{userid}`: with the user's tokens, groups and entries (`User.pm:delete_user`).
pub(super) fn delete(call: &Call) -> Result<Reply, PveError> {
    let id = userid(call)?;
    call.sim.change(|state| {
        known(state, &id)?;
        state.users.remove(&id);
        for group in state.access.groups.values_mut() {
            group.users.remove(&id);
        }
        let theirs = |who: &str| who.split('!').next() == Some(&id);
        state.tokens.retain(|token, _| !theirs(token));
        state.token_notes.retain(|token, _| !theirs(token));
        state.access.separated.retain(|token| !theirs(token));
        state.access.acl.retain(|entry| !theirs(&entry.who));
        Ok(Reply::null())
    })
}

/// `PUT /access/password` (`API2/AccessControl.pm:change_password`). Who changes one must give their own too, but for
/// root (pve-access-control `RPCEnvironment.pm:reauth_user_for_user_modification`).
pub(super) fn password(call: &Call) -> Result<Reply, PveError> {
    let id = userid(call)?;
    let own = call.sim.read(|state| state.users.get(&call.user).and_then(|user| user.password.clone()));
    if call.user != "root@pam" && call.get("confirmation-password") != own.as_deref() {
        return Err(PveError::Status(401, "authentication failure".to_owned()));
    }
    call.sim.change(|state| {
        let user = state.users.get_mut(&id).ok_or_else(|| no_user(&id))?;
        user.password = Some(call.text("password").to_owned());
        Ok(Reply::null())
    })
}

/// What comes back of a token; all of it text or number as `user.cfg` has it.
fn token_info(state: &State, full: &str) -> Value {
    let note = state.token_notes.get(full).cloned().unwrap_or_default();
    let mut info =
        json!({ "expire": note.expire, "privsep": u8::from(state.access.separated.contains(full)) });
    if let Some(comment) = note.comment {
        info["comment"] = json!(comment);
    }
    info
}

fn token_list(state: &State, user: &str) -> Vec<Value> {
    let tokens = state
        .tokens
        .keys()
        .filter_map(|id| id.split_once('!').filter(|(of, _)| *of == user).map(|(_, name)| (id, name)));
    tokens
        .map(|(id, name)| {
            let mut info = token_info(state, id);
            info["tokenid"] = json!(name);
            info
        })
        .collect()
}

/// `GET /access/users/{userid}/token` (`User.pm:token_index`).
pub(super) fn tokens(call: &Call) -> Result<Reply, PveError> {
    let user = call.text("userid");
    call.sim.read(|state| {
        known(state, user)?;
        Ok(json!(token_list(state, user)).into())
    })
}

fn full_tokenid(call: &Call) -> String {
    format!("{}!{}", call.text("userid"), call.text("tokenid"))
}

fn token_exists(state: &State, call: &Call) -> Result<(), PveError> {
    known(state, call.text("userid"))?;
    if state.tokens.contains_key(&full_tokenid(call)) {
        return Ok(());
    }
    let (user, token) = (call.text("userid"), call.text("tokenid"));
    Err(PveError::die(format!("no such token '{token}' for user '{user}'")))
}

/// `GET /access/users/{userid}/token/{tokenid}` (`User.pm:read_token`).
pub(super) fn token(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| {
        token_exists(state, call)?;
        Ok(token_info(state, &full_tokenid(call)).into())
    })
}

fn secret(state: &mut State, id: &str) -> String {
    state.counter += 1;
    uuid_of(&format!("token {id} {}", state.counter))
}

/// `POST /access/users/{userid}/token/{tokenid}` (`User.pm:generate_token`).
pub(super) fn add_token(call: &Call) -> Result<Reply, PveError> {
    let id = full_tokenid(call);
    let separated = call.get("privsep").is_none_or(|_| call.flag("privsep"));
    call.sim.change(|state| {
        known(state, call.text("userid"))?;
        if state.tokens.contains_key(&id) {
            return Err(PveError::parameter("tokenid", "Token already exists."));
        }
        let secret = secret(state, &id);
        state.tokens.insert(id.clone(), Some(secret.clone()));
        if separated {
            state.access.separated.insert(id.clone());
        }
        let note = TokenNote {
            expire: call.get("expire").and_then(|time| time.parse().ok()).unwrap_or(0),
            comment: call.get("comment").filter(|text| !text.is_empty()).map(str::to_owned),
        };
        let mut info = json!({ "privsep": u8::from(separated).to_string() });
        if let Some(time) = call.get("expire") {
            info["expire"] = json!(time);
        }
        if let Some(comment) = &note.comment {
            info["comment"] = json!(comment);
        }
        state.token_notes.insert(id.clone(), note);
        Ok(json!({ "full-tokenid": id, "value": secret, "info": info }).into())
    })
}

/// `PUT /access/users/{userid}/token/{tokenid}` (`User.pm:update_token_info`).
pub(super) fn update_token(call: &Call) -> Result<Reply, PveError> {
    let id = full_tokenid(call);
    call.sim.change(|state| {
        token_exists(state, call)?;
        let delete: Vec<&str> = call.get("delete").into_iter().flat_map(split_list).collect();
        if let Some(unknown) = delete.iter().find(|key| **key != "comment") {
            return Err(PveError::parameter("delete", format!("unknown option '{unknown}'")));
        }
        if call.get("privsep").is_some() {
            if call.flag("privsep") {
                state.access.separated.insert(id.clone());
            } else {
                state.access.separated.remove(&id);
            }
        }
        let note = state.token_notes.entry(id.clone()).or_default();
        if let Some(expire) = call.get("expire").and_then(|time| time.parse().ok()) {
            note.expire = expire;
        }
        if let Some(comment) = call.get("comment") {
            note.comment = Some(comment.to_owned());
        }
        note.comment = note.comment.take().filter(|text| !text.is_empty() && delete.is_empty());
        let fresh = call.flag("regenerate").then(|| secret(state, &id));
        let mut info = token_info(state, &id);
        if let Some(fresh) = fresh {
            info["value"] = json!(fresh);
            info["full-tokenid"] = json!(id);
            state.tokens.insert(id, Some(fresh));
        }
        Ok(info.into())
    })
}

/// `DELETE /access/users/{userid}/token/{tokenid}` (`User.pm:remove_token`).
pub(super) fn remove_token(call: &Call) -> Result<Reply, PveError> {
    let id = full_tokenid(call);
    call.sim.change(|state| {
        token_exists(state, call)?;
        state.tokens.remove(&id);
        state.token_notes.remove(&id);
        state.access.separated.remove(&id);
        Ok(Reply::null())
    })
}

/// `GET /access/groups` (`Group.pm:index`).
pub(super) fn groups(call: &Call) -> Reply {
    let any = &["User.Modify", "Sys.Audit", "Group.Allocate"];
    let list: Vec<Value> = call.sim.read(|state| {
        let seen = |name: &str| state.access.has(&call.user, &format!("/access/groups/{name}"), any);
        let groups = state.access.groups.iter().filter(|(name, _)| seen(name.as_str()));
        groups
            .map(|(name, group)| {
                let users: Vec<&str> = group.users.iter().map(String::as_str).collect();
                let mut entry = json!({ "groupid": name, "users": users.join(",") });
                if let Some(comment) = &group.comment {
                    entry["comment"] = json!(comment);
                }
                entry
            })
            .collect()
    });
    json!(list).into()
}

/// `GET /access/groups/{groupid}` (`Group.pm:read_group`).
pub(super) fn group(call: &Call) -> Result<Reply, PveError> {
    let name = call.text("groupid");
    call.sim.read(|state| {
        let group = state.access.groups.get(name);
        let group = group.ok_or_else(|| PveError::die(format!("group '{name}' does not exist")))?;
        let mut entry = json!({ "members": group.users });
        if let Some(comment) = &group.comment {
            entry["comment"] = json!(comment);
        }
        Ok(entry.into())
    })
}

/// `POST /access/groups` (`Group.pm:create_group`).
pub(super) fn add_group(call: &Call) -> Result<Reply, PveError> {
    let name = call.text("groupid").to_owned();
    let comment = call.get("comment").filter(|text| !text.is_empty()).map(str::to_owned);
    call.sim.change(|state| {
        if state.access.groups.contains_key(&name) {
            return Err(PveError::die(format!("create group failed: group '{name}' already exists")));
        }
        state.access.groups.insert(name, Group { users: BTreeSet::new(), comment });
        Ok(Reply::null())
    })
}

/// `PUT /access/groups/{groupid}` (`Group.pm:update_group`).
pub(super) fn change_group(call: &Call) -> Result<Reply, PveError> {
    let name = call.text("groupid");
    call.sim.change(|state| {
        let group =
            state.access.groups.get_mut(name).ok_or_else(|| {
                PveError::die(format!("update group failed: group '{name}' does not exist"))
            })?;
        if let Some(comment) = call.get("comment") {
            group.comment = Some(comment.to_owned());
        }
        Ok(Reply::null())
    })
}

/// `DELETE /access/groups/{groupid}`: with its entries (`Group.pm:delete_group`).
pub(super) fn remove_group(call: &Call) -> Result<Reply, PveError> {
    let name = call.text("groupid");
    call.sim.change(|state| {
        if state.access.groups.remove(name).is_none() {
            return Err(PveError::die(format!("delete group failed: group '{name}' does not exist")));
        }
        let who = format!("@{name}");
        state.access.acl.retain(|entry| entry.who != who);
        Ok(Reply::null())
    })
}
