//! `/access` (pve-access-control `API2/AccessControl.pm`).

use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use serde_json::json;

/// `GET /access/permissions`: the caller's own, or with `Sys.Audit` on /access another's.
pub(super) fn permissions(call: &Call) -> Result<Reply, PveError> {
    let who = call.get("userid").unwrap_or(&call.user);
    if who != call.user {
        call.check("/access", &["Sys.Audit"])?;
    }
    Ok(call.sim.read(|state| json!(state.access.effective(who, call.get("path")))).into())
}
