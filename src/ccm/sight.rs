//! Does the token see every VM of a region? Only then is a VM that it does not see not there.
//!
//! A VM is listed where the token has `VM.Audit` on it (pve-manager `API2/Cluster.pm:resources`). That it has it on `/vms` and below, and
//! that no listed path lacks it, is what the token may ask of itself. Paths with `NoAccess` are left out of that answer; they show in
//! the access control list, which takes `Sys.Audit` on `/access`, and otherwise only where a VMID is in use that nobody sees.
//! Read [`Sight::of`].

use crate::{
    k8s::chain,
    pve::{ApiError, Client, access::Permissions, cluster::Resources},
    types::VmId,
};

/// What a token sees of a region's VMs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Sight {
    /// Not known yet.
    #[default]
    NotAsked,
    /// Every one there is, by the privileges.
    Whole,
    /// Not every one: the sentence says where not.
    Gap(String),
}

impl Sight {
    /// What the token sees, by the privileges it has now: one request, or two where it may read the access control list.
    pub(super) async fn of(client: &Client) -> Self {
        match Self::ask(client).await {
            Ok(sight) => sight,
            Err(error) => Self::Gap(format!("its privileges can't be read: {}", chain(&error))),
        }
    }

    async fn ask(client: &Client) -> Result<Self, ApiError> {
        let permissions = client.permissions().await?;
        if let Some(path) = gap(&permissions) {
            return Ok(Self::Gap(format!("it lacks VM.Audit on `{path}`")));
        }
        if !permissions.allow("/access", "Sys.Audit") {
            return Ok(Self::Whole);
        }
        for entry in client.acl().await? {
            let hidden = if entry.path.starts_with("/vms/") || permissions.allow_below("/", "VM.Audit") {
                // Whatever has an entry is listed, unless nothing is allowed there.
                (entry.path.starts_with("/vms/") || entry.path.starts_with("/pool/"))
                    && !permissions.lists(&entry.path)
            } else {
                // It may be about others. That can't be told, for groups are not known.
                entry.path.starts_with("/pool/") && entry.role == "NoAccess"
            };
            if hidden {
                return Ok(Self::Gap(format!("it may have no access to `{}`", entry.path)));
            }
        }
        Ok(Self::Whole)
    }

    /// Whether every VM is seen.
    pub fn is_whole(&self) -> bool {
        *self == Self::Whole
    }

    /// What is missing, as the end of a sentence about the token.
    pub fn missing(&self) -> &str {
        match self {
            Self::NotAsked => "its privileges are not known yet",
            Self::Whole => "it sees every VM",
            Self::Gap(what) => what,
        }
    }
}

/// A path below which the token does not see every VM, by its own word.
fn gap(permissions: &Permissions) -> Option<&str> {
    if permissions.allow_below("/vms", "VM.Audit") {
        permissions.gaps_below("/vms", "VM.Audit").next()
    } else {
        Some("/vms")
    }
}

/// A VMID that exists and is not listed, where there is one among the lowest. All VMIDs between the lowest that the cluster hands out
/// and the lowest free one exist; a VM that is restored without a wish gets that one.
pub(super) async fn hidden_vmid(client: &Client, listed: &Resources) -> Result<Option<VmId>, ApiError> {
    let mut id = client.next_free_vmid().await?.get();
    loop {
        id -= 1;
        let Some(vmid) = VmId::new(id) else { return Ok(None) };
        if !listed.guests.contains(&vmid) {
            // Below the lowest that is handed out, VMIDs are free.
            return Ok(client.vmid_exists(vmid).await?.then_some(vmid));
        }
    }
}
