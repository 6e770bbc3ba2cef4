//! Resource pools (pve-manager `API2/Pool.pm`).

use super::cluster;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::split_list;
use serde_json::{Value, json};

/// `POST /pools` (`API2/Pool.pm:create_pool`).
pub(super) fn add_pool(call: &Call) -> Result<Reply, PveError> {
    let pool = call.text("poolid").to_owned();
    call.sim.change(|state| {
        if !state.pools.insert(pool.clone()) {
            return Err(PveError::die(format!("create pool failed: pool '{pool}' already exists")));
        }
        state.pool_comments.extend(call.get("comment").map(|text| (pool, text.to_owned())));
        Ok(Reply::null())
    })
}

/// `PUT /pools`: members come, or go with `delete=1` (`API2/Pool.pm:update_pool`, `update_pool_deprecated`).
pub(super) fn change_pool(call: &Call) -> Result<Reply, PveError> {
    let pool = call.text("poolid").to_owned();
    let vms: Vec<u32> =
        call.get("vms").into_iter().flat_map(split_list).filter_map(|id| id.parse().ok()).collect();
    let storages: Vec<String> =
        call.get("storage").into_iter().flat_map(split_list).map(str::to_owned).collect();
    call.sim.change(|state| {
        if !state.pools.contains(&pool) {
            return Err(PveError::die(format!("update pool failed: pool '{pool}' does not exist")));
        }
        state.pool_comments.extend(call.get("comment").map(|text| (pool.clone(), text.to_owned())));
        for vmid in vms {
            if call.flag("delete") {
                state.access.pools.remove(&vmid);
            } else {
                state.access.pools.insert(vmid, pool.clone());
            }
        }
        for storage in storages {
            if call.flag("delete") {
                state.access.pool_storages.remove(&(pool.clone(), storage));
            } else {
                state.access.pool_storages.insert((pool.clone(), storage));
            }
        }
        Ok(Reply::null())
    })
}

/// `GET /pools`, with members where one is asked for (`API2/Pool.pm:index`).
pub(super) fn pools(call: &Call) -> Reply {
    let pools = call.sim.read(|state| state.pools.clone());
    let wanted = call.get("poolid");
    let list: Vec<Value> = pools
        .iter()
        .filter(|pool| wanted.is_none_or(|wanted| wanted == *pool))
        .filter(|pool| call.may(&format!("/pool/{pool}"), &["Pool.Audit", "Pool.Allocate"]))
        .map(|pool| match wanted {
            Some(_) => json!({ "poolid": pool, "members": cluster::members(call, pool) }),
            None => json!({ "poolid": pool }),
        })
        .map(|entry| commented(call, entry))
        .collect();
    json!(list).into()
}

/// `GET /pools/{poolid}` (`API2/Pool.pm:read_pool`).
pub(super) fn pool(call: &Call) -> Result<Reply, PveError> {
    let pool = call.text("poolid");
    if !call.sim.read(|state| state.pools.contains(pool)) {
        return Err(PveError::die(format!("pool '{pool}' does not exist")));
    }
    Ok(commented(call, json!({ "poolid": pool, "members": cluster::members(call, pool) })).into())
}

fn commented(call: &Call, mut entry: Value) -> Value {
    let pool = entry["poolid"].as_str().unwrap_or_default().to_owned();
    if let Some(comment) = call.sim.read(|state| state.pool_comments.get(&pool).cloned()) {
        entry["comment"] = json!(comment);
    }
    entry
}

/// `DELETE /pools` and `/pools/{poolid}`: only an empty one (`Pool.pm:delete_pool`).
pub(super) fn remove_pool(call: &Call) -> Result<Reply, PveError> {
    let pool = call.text("poolid").to_owned();
    let failed = |why: &str| Err(PveError::die(format!("delete pool failed: {why}")));
    call.sim.change(|state| {
        if !state.pools.contains(&pool) {
            return failed(&format!("pool '{pool}' does not exist"));
        }
        let full = state.access.pools.values().any(|of| *of == pool)
            || state.access.pool_storages.iter().any(|(of, _)| *of == pool);
        if full {
            return failed(&format!("pool '{pool}' is not empty"));
        }
        state.pools.remove(&pool);
        state.pool_comments.remove(&pool);
        let path = format!("/pool/{pool}");
        state.access.acl.retain(|entry| entry.path != path);
        Ok(Reply::null())
    })
}
