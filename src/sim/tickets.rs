//! Tickets of users who log in with a password, and the token that guards their writes
//! (pve-access-control `AccessControl.pm:assemble_ticket`, `assemble_csrf_prevention_token`, `verify_ticket`).

use super::Sim;
use sha1::{Digest as _, Sha1};
use std::fmt::Write as _;

/// Seconds a ticket is good for.
const LIFETIME: u64 = 2 * 60 * 60;

fn sign(text: &str) -> String {
    Sha1::digest(format!("the key of this cluster {text}")).iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

impl Sim {
    /// A ticket for `user`, as a login gives it.
    pub(crate) fn mint_ticket(&self, user: &str) -> String {
        let plain = format!("PVE:{user}:{:08X}", self.clock().now());
        format!("{plain}::{}", sign(&plain))
    }

    /// The user of a ticket that this cluster has given and that is still good.
    pub(crate) fn ticket_user(&self, ticket: &str) -> Option<String> {
        let (plain, signature) = ticket.split_once("::")?;
        (sign(plain) == signature).then_some(())?;
        let (rest, time) = plain.rsplit_once(':')?;
        let given = u64::from_str_radix(time, 16).ok()?;
        (self.clock().now() < given + LIFETIME).then_some(())?;
        rest.strip_prefix("PVE:").map(str::to_owned)
    }

    /// The token that must come with a write of `user` who has a ticket.
    pub(crate) fn mint_csrf(&self, user: &str) -> String {
        let time = format!("{:08X}", self.clock().now());
        format!("{time}:{}", sign(&format!("{time}:{user}")))
    }
}

/// Whether the token is one of `user`.
pub(crate) fn csrf_fits(user: &str, token: &str) -> bool {
    token.split_once(':').is_some_and(|(time, signature)| sign(&format!("{time}:{user}")) == signature)
}
