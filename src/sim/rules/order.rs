//! In which order the keys of a config are gone through: that of a Perl hash, which differs from call to call
//! (qemu-server `API2/Qemu.pm:$update_vm_api`, `QemuServer.pm:vmconfig_hotplug_pending`).

use serde::{Deserialize, Serialize};
use sha1::{Digest as _, Sha1};

/// Draws orders. The same seed gives the same orders in the same calls.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyOrder {
    seed: u64,
    drawn: u64,
    next: Vec<String>,
}

impl KeyOrder {
    /// Draws from this seed; the next call with one of the keys takes them in this order.
    pub fn new(seed: u64, next: Vec<String>) -> Self {
        Self { seed, drawn: 0, next }
    }

    /// Puts the keys of a call into an order.
    pub fn draw(&mut self, mut keys: Vec<String>) -> Vec<String> {
        if keys.iter().any(|key| self.next.contains(key)) {
            let next = std::mem::take(&mut self.next);
            keys.sort_by_key(|key| next.iter().position(|other| other == key).unwrap_or(usize::MAX));
            return keys;
        }
        self.drawn += 1;
        let (seed, drawn) = (self.seed, self.drawn);
        keys.sort_by_cached_key(|key| Sha1::digest(format!("{seed} {drawn} {key}")).to_vec());
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn keys() -> Vec<String> {
        ["scsi1", "scsi2", "scsi3"].map(str::to_owned).to_vec()
    }

    #[test]
    fn every_order_comes_and_the_same_seed_repeats_it() {
        let draw = |seed| {
            let mut order = KeyOrder::new(seed, Vec::new());
            (0..100).map(|_| order.draw(keys())).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_eq!(draw(1).into_iter().collect::<BTreeSet<_>>().len(), 6);
    }

    #[test]
    fn an_order_that_was_asked_for_is_taken_once() {
        let asked: Vec<String> = ["scsi3", "scsi1", "scsi2"].map(str::to_owned).to_vec();
        let mut order = KeyOrder::new(0, asked.clone());
        assert_eq!(order.draw(vec!["name".to_owned()]), ["name"]);
        assert_eq!(order.draw(keys()), asked);
        assert!(order.next.is_empty());
    }
}
