//! `/access` (pve-access-control `API2/AccessControl.pm`).

use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
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
