//! Tickets of users who log in with a password, and the token that guards their writes
//! (pve-access-control `AccessControl.pm:assemble_ticket`, `assemble_csrf_prevention_token`, `verify_ticket`).

use super::Sim;
use sha1::{Digest as _, Sha1};
use std::fmt::Write as _;

/// Seconds a ticket is good for.
const LIFETIME: u64 = 2 * 60 * 60;

fn sign(age: u32, text: &str) -> String {
    Sha1::digest(format!("key {age} of this cluster {text}")).iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

impl Sim {
    /// A ticket for `user`, as a login gives it.
    pub(crate) fn mint_ticket(&self, user: &str) -> String {
        let plain = format!("PVE:{user}:{:08X}", self.clock().now());
        format!("{plain}::{}", sign(self.ticket_age(), &plain))
    }

    /// The user of a ticket that this cluster has given and that is still good.
    pub(crate) fn ticket_user(&self, ticket: &str) -> Option<String> {
        let (plain, signature) = ticket.split_once("::")?;
        (sign(self.ticket_age(), plain) == signature).then_some(())?;
        let (rest, time) = plain.rsplit_once(':')?;
        self.is_recent(time)?;
        let user = rest.strip_prefix("PVE:")?;
        self.read(|state| state.user_is_enabled(user, self.clock().now())).then(|| user.to_owned())
    }

    /// The token that must come with a write of `user` who has a ticket.
    pub(crate) fn mint_csrf(&self, user: &str) -> String {
        let time = format!("{:08X}", self.clock().now());
        format!("{time}:{}", sign(self.ticket_age(), &format!("{time}:{user}")))
    }

    /// Whether the token is one of `user` and as good as a ticket of its time
    /// (pve-common `Ticket.pm:verify_csrf_prevention_token`).
    pub(crate) fn csrf_fits(&self, user: &str, token: &str) -> bool {
        token.split_once(':').is_some_and(|(time, signature)| {
            let right = sign(self.ticket_age(), &format!("{time}:{user}")) == signature;
            right && self.is_recent(time).is_some()
        })
    }

    fn ticket_age(&self) -> u32 {
        self.read(|state| state.ticket_age)
    }

    /// `Some` for a time in the last two hours.
    fn is_recent(&self, hex: &str) -> Option<()> {
        let given = u64::from_str_radix(hex, 16).ok()?;
        (self.clock().now() < given + LIFETIME).then_some(())
    }
}
