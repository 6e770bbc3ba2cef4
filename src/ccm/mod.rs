//! The cloud-controller loop: Node objects tell the truth about their VMs.
//!
//! One poll a region says where every VM is and what it does; a reconcile of all Nodes compares that with what the Nodes say. What to do
//! is decided by pure functions: which VM a node is (`instances`), what it is called (`provider_id`, `labels`, `addresses`), whether it
//! may be used (`taints`), whether it is still there (`lifecycle`). Nothing is concluded from silence. Read [`run`] first.

pub mod addresses;
pub mod instances;
pub mod labels;
pub mod lifecycle;
mod missing;
mod notices;
pub mod poll;
pub mod provider_id;
pub mod reconcile;
mod run;
pub mod sight;
pub mod taints;
mod witnesses;
pub mod writes;

use std::time::Duration;

pub use run::{Ccm, Health, RegionClients, RunError};

/// What the loop does, and what it leaves.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own on the command line")]
pub struct Settings {
    /// The form of providerIDs that are written.
    pub provider_id: provider_id::Format,
    /// What labels are made from.
    pub labels: labels::LabelRules,
    /// How addresses are chosen.
    pub addresses: addresses::AddressRules,
    /// Give up nodes whose VM is dead for certain, so that their volumes move at once.
    pub out_of_service: bool,
    /// Delete Nodes whose VM is proven gone.
    pub delete_nodes: bool,
    /// Those that Cluster API made, too.
    pub delete_cluster_api: bool,
    /// Write labels and nothing else.
    pub labels_only: bool,
    /// Write nothing, and log what would be written.
    pub dry_run: bool,
    /// Between two polls of a region.
    pub interval: Duration,
    /// How long a VM must be seen gone before its Node is deleted.
    pub gone_for: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            provider_id: provider_id::Format::default(),
            labels: labels::LabelRules::default(),
            addresses: addresses::AddressRules::default(),
            out_of_service: false,
            delete_nodes: true,
            delete_cluster_api: false,
            labels_only: false,
            dry_run: false,
            interval: Duration::from_secs(10),
            gone_for: lifecycle::GONE_FOR,
        }
    }
}

/// How old a good poll may be to be believed, in intervals between polls, and at least.
const BELIEVED_INTERVALS: u32 = 3;
const BELIEVED_AT_LEAST: Duration = Duration::from_mins(1);

impl Settings {
    /// How old a good poll may be to be believed.
    fn believed_for(&self) -> Duration {
        BELIEVED_AT_LEAST.max(self.interval * BELIEVED_INTERVALS)
    }
}
