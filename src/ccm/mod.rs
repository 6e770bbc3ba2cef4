//! The cloud-controller loop: Node objects tell the truth about their VMs.
//!
//! One poll a region says where every VM is and what it does; a reconcile of all Nodes compares that with what the Nodes say. What to do
//! is decided by pure functions: which VM a node is (`instances`), what it is called (`provider_id`, `labels`, `addresses`), whether it
//! may be used (`taints`), whether it is still there (`lifecycle`). Nothing is concluded from silence.

pub mod addresses;
pub mod instances;
pub mod labels;
pub mod lifecycle;
pub mod provider_id;
pub mod taints;
