//! What the tools for operators ask beside what the driver needs. Each of these answers a token of the driver's own role, if only with
//! less: none needs a further privilege.

use std::collections::BTreeMap;

use http::Method;
use serde::Deserialize;
use serde_json::Value;

use super::{
    ApiError,
    client::{Call, Client},
    wire,
};
use crate::types::{NodeName, Upid, VmId};

/// An entry of the access control list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AclRow {
    /// The path.
    pub path: String,
    /// The role.
    pub role: String,
    /// The user, group or token.
    pub who: String,
    /// Whether it holds below the path too.
    pub propagate: bool,
}

/// An API token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// Its name: what stands behind the `!`.
    pub name: String,
    /// When it expires, in seconds since 1970; `None` where it never does.
    pub expires: Option<u64>,
    /// Whether it has only what is given to itself.
    pub privilege_separation: bool,
}

/// A task, running or ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskRow {
    /// Its id.
    pub upid: Upid,
    /// What it does: `qmconfig`, …
    pub kind: String,
    /// Who started it.
    pub user: String,
    /// When it began, in seconds since 1970.
    pub started: u64,
    /// How it ended; `None` while it runs.
    pub status: Option<String>,
}

#[derive(Deserialize)]
struct RawVersion {
    version: String,
}

#[derive(Deserialize)]
struct RawAcl {
    path: String,
    roleid: String,
    ugid: String,
    #[serde(default, deserialize_with = "wire::flag")]
    propagate: bool,
}

#[derive(Deserialize)]
struct RawToken {
    tokenid: String,
    #[serde(default, deserialize_with = "wire::optional_number")]
    expire: Option<u64>,
    #[serde(default, deserialize_with = "wire::flag")]
    privsep: bool,
}

#[derive(Deserialize)]
struct RawTask {
    upid: String,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    user: String,
    #[serde(default, deserialize_with = "wire::optional_number")]
    starttime: Option<u64>,
    #[serde(default, deserialize_with = "wire::optional_number")]
    endtime: Option<u64>,
    #[serde(default)]
    status: Option<String>,
}

impl Client {
    /// The version of Proxmox VE on the server that answers. Every user may ask. Source: pve-manager `API2.pm`, `version`.
    pub async fn version(&self) -> Result<String, ApiError> {
        let raw: RawVersion = self.call(Call::new("version", Method::GET, &[&"version"])).await?;
        Ok(raw.version)
    }

    /// The entries of the access control list that the token may see: all of them with `Sys.Audit` on `/access`, none of them with the
    /// driver's own role. Source: pve-access-control `API2/ACL.pm`, `read_acl`.
    pub async fn acl(&self) -> Result<Vec<AclRow>, ApiError> {
        let rows: Vec<RawAcl> = self.call(Call::new("acl", Method::GET, &[&"access", &"acl"])).await?;
        let read = |row: RawAcl| AclRow {
            path: row.path,
            role: row.roleid,
            who: row.ugid,
            propagate: row.propagate,
        };
        Ok(rows.into_iter().map(read).collect())
    }

    /// The privileges of a role. Every user may ask. Source: pve-access-control `API2/Role.pm`, `read_role`.
    pub async fn role(&self, role: &str) -> Result<Vec<String>, ApiError> {
        let call = Call::new("role", Method::GET, &[&"access", &"roles", &role]);
        let privileges: BTreeMap<String, Value> = self.call(call).await?;
        Ok(privileges.into_iter().filter(|(_, on)| wire::read_flag(on)).map(|(name, _)| name).collect())
    }

    /// The tokens of a user. A token may not ask this of its own user without `User.Modify`, which the driver has not; the user may.
    /// Source: pve-access-control `API2/User.pm`, `token_index`.
    pub async fn tokens(&self, user: &str) -> Result<Vec<TokenRow>, ApiError> {
        let call = Call::new("tokens", Method::GET, &[&"access", &"users", &user, &"token"]);
        let rows: Vec<RawToken> = self.call(call).await?;
        let read = |row: RawToken| TokenRow {
            name: row.tokenid,
            expires: row.expire.filter(|at| *at > 0),
            privilege_separation: row.privsep,
        };
        Ok(rows.into_iter().map(read).collect())
    }

    /// The last tasks of a VM on a node, newest first: those of this very token, and all of them with `Sys.Audit` on the node.
    /// Source: pve-manager `API2/Tasks.pm`, `node_tasks`.
    pub async fn recent_tasks(
        &self,
        node: &NodeName,
        vmid: VmId,
        count: usize,
    ) -> Result<Vec<TaskRow>, ApiError> {
        let call = Call::new("recent_tasks", Method::GET, &[&"nodes", node, &"tasks"])
            .with("source", "all")
            .with("vmid", vmid)
            .with("limit", count);
        let rows: Vec<RawTask> = self.call(call).await?;
        let read = |row: RawTask| {
            Some(TaskRow {
                upid: row.upid.parse().ok()?,
                kind: row.kind,
                user: row.user,
                started: row.starttime.unwrap_or(0),
                status: row.endtime.and(row.status),
            })
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }
}
