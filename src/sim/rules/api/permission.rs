//! The `permissions` of a call (pve-access-control `RPCEnvironment.pm:exec_api2_perm_check`,
//! `check_api2_permissions`).

use super::Endpoint;
use crate::sim::rules::access::{Access, normalize_path};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::{Params, split_list};
use serde_json::Value;

impl Endpoint {
    /// Refuses a caller who may not make the call, whatever it is about (`RPCEnvironment.pm:check_api2_permissions`).
    pub fn permits(&self, access: &Access, user: &str, params: &Params) -> Result<(), PveError> {
        let Some(rule) = &self.permissions else {
            return if user == "root@pam" {
                Ok(())
            } else {
                Err(PveError::Status(403, "Permission check failed (user != root@pam)".to_owned()))
            };
        };
        match rule.get("check") {
            Some(check) => evaluate(check, access, user, params),
            None => Ok(()),
        }
    }
}

/// The refusal that names nothing.
fn refused() -> PveError {
    PveError::Status(403, "Permission check failed".to_owned())
}

fn evaluate(check: &Value, access: &Access, user: &str, params: &Params) -> Result<(), PveError> {
    let words: &[Value] = check.as_array().map_or(&[], Vec::as_slice);
    let text = |index: usize| words.get(index).and_then(Value::as_str).unwrap_or_default();
    let list = |index: usize| -> Vec<&str> {
        let words = words.get(index).and_then(Value::as_array);
        words.into_iter().flatten().filter_map(Value::as_str).collect()
    };
    match text(0) {
        "and" => words.iter().skip(1).try_for_each(|part| evaluate(part, access, user, params)),
        "or" => {
            let any = words.iter().skip(1).any(|part| evaluate(part, access, user, params).is_ok());
            if any { Ok(()) } else { Err(refused()) }
        }
        "perm" => {
            let option = |name: &str| {
                let at = words.iter().position(|word| word == name)?;
                words.get(at + 1)
            };
            if let Some(needed) = option("require_param").and_then(Value::as_str)
                && !params.contains_key(needed)
            {
                return Err(refused());
            }
            let path = fill(text(1), params);
            let mut privileges = list(2);
            // PVE 8 has one privilege for all of the agent (qemu-server `API2/Qemu/Agent.pm` of 8.4).
            if access.eight && privileges.iter().any(|name| name.starts_with("VM.GuestAgent.")) {
                privileges = vec!["VM.Monitor"];
            }
            if option("any").is_some() {
                return access.check(user, &path, &privileges);
            }
            privileges.iter().try_for_each(|privilege| access.check(user, &path, &[privilege]))
        }
        "userid-param" if text(1) == "self" => {
            if params.get("userid").is_some_and(|id| id == user) {
                Ok(())
            } else {
                Err(refused())
            }
        }
        "userid-param" => {
            let id = params.get("userid").map_or("", String::as_str);
            let realm = id.rsplit_once('@').map_or("pam", |(_, realm)| realm);
            access.check(user, &format!("/access/realm/{realm}"), &[text(1)])
        }
        "userid-group" => of_groups(words, &list(1), access, user, params),
        "perm-modify" => {
            let path = params.get("path").and_then(|path| normalize_path(path));
            // What can be no path is refused by the call itself.
            let Some(path) = path else { return Ok(()) };
            let own = match path.split('/').collect::<Vec<_>>().as_slice() {
                ["", "storage", ..] if path != "/storage" => {
                    &["Permissions.Modify", "Datastore.Allocate"][..]
                }
                ["", "vms", ..] if path != "/vms" => &["Permissions.Modify", "VM.Allocate"],
                ["", "pool", ..] if path != "/pool" => &["Permissions.Modify", "Pool.Allocate"],
                _ => &["Permissions.Modify"],
            };
            access.check(user, &path, own)
        }
        _ => Err(refused()),
    }
}

/// The right over a user through the user's groups: over all groups, or over one the user is in and over each that
/// the call names (the check `userid-group` of `RPCEnvironment.pm:exec_api2_perm_check`).
fn of_groups(
    words: &[Value],
    any: &[&str],
    access: &Access,
    user: &str,
    params: &Params,
) -> Result<(), PveError> {
    if access.has(user, "/access/groups", any) {
        return Ok(());
    }
    let option = words.iter().position(|word| word == "groups_param").and_then(|at| words.get(at + 1));
    let over = |group: &str| access.has(user, &format!("/access/groups/{group}"), any);
    let lacking = |what: &str| {
        PveError::Status(403, format!("Permission check failed (/access/groups{what}, {})", any.join("|")))
    };
    if option.is_some() {
        let named: Vec<&str> = params.get("groups").map_or(Vec::new(), |groups| split_list(groups).collect());
        if named.is_empty() {
            return Err(lacking(""));
        }
        if let Some(other) = named.iter().find(|group| !over(group)) {
            return Err(lacking(&format!("/{other}")));
        }
    }
    if option.is_some_and(|option| option == "create") {
        return Ok(());
    }
    let id = params.get("userid").map_or("", String::as_str);
    let through = access.groups.iter().any(|(name, group)| group.users.contains(id) && over(name));
    if through { Ok(()) } else { Err(refused()) }
}

/// `/vms/{vmid}` with the parameters of the call; `-` for one that it lacks (pve-common `Tools.pm:template_replace`).
fn fill(template: &str, params: &Params) -> String {
    let mut path = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, (name, after))) =
        rest.split_once('{').and_then(|(before, behind)| Some((before, behind.split_once('}')?)))
    {
        path.push_str(before);
        path.push_str(params.get(name).map_or("-", String::as_str));
        rest = after;
    }
    path.push_str(rest);
    path
}
