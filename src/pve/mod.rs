//! A typed client of the Proxmox VE API: one method for each endpoint that is used.
//!
//! [`client::Client::call`] is what every method goes through: one request, one deadline, one error that tells whether the request
//! may have been acted on. What an endpoint means for a volume is decided in `volume`, not here.

pub mod access;
pub mod agent;
pub mod audit;
pub mod auth;
pub mod client;
pub mod cluster;
pub mod error;
pub mod failover;
pub mod ha;
mod httpdate;
pub mod inventory;
mod limits;
mod login;
pub mod qemu;
pub mod storage;
pub mod task;
pub mod transport;
mod transport_tls;
mod wire;

pub use client::Client;
pub use error::ApiError;
