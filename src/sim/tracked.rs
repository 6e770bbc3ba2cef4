//! A map that remembers which of its entries have changed, so that only these need to be written to disk.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

/// A `BTreeMap` to read, with changes that leave a trace.
#[derive(Debug, Clone)]
pub struct Tracked<K, V> {
    map: BTreeMap<K, V>,
    /// Changed and removed keys; `None` where nobody asks for them.
    dirty: Option<BTreeSet<K>>,
    revision: u64,
}

impl<K, V> Default for Tracked<K, V> {
    fn default() -> Self {
        Self { map: BTreeMap::new(), dirty: None, revision: 0 }
    }
}

impl<K, V> Deref for Tracked<K, V> {
    type Target = BTreeMap<K, V>;

    fn deref(&self) -> &Self::Target {
        &self.map
    }
}

impl<K: Ord + Clone, V> Tracked<K, V> {
    fn touch(&mut self, key: &K) {
        self.revision += 1;
        if let Some(dirty) = &mut self.dirty
            && !dirty.contains(key)
        {
            dirty.insert(key.clone());
        }
    }

    /// Begins to remember changes; all that is there counts as changed.
    pub fn track(&mut self) {
        self.dirty = Some(self.map.keys().cloned().collect());
    }

    /// A number that grows with every change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether anything has changed since the changes were last taken.
    pub fn is_dirty(&self) -> bool {
        self.dirty.as_ref().is_some_and(|dirty| !dirty.is_empty())
    }

    /// The changed entries, `None` for one that is gone; forgets that they have changed.
    pub fn take_dirty(&mut self) -> Vec<(K, Option<&V>)> {
        let keys = self.dirty.as_mut().map(std::mem::take).unwrap_or_default();
        keys.into_iter()
            .map(|key| {
                let value = self.map.get(&key);
                (key, value)
            })
            .collect()
    }

    /// Puts a value in; returns the one that was there.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.touch(&key);
        self.map.insert(key, value)
    }

    /// Takes a value out.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.map.contains_key(key).then(|| self.touch(key));
        self.map.remove(key)
    }

    /// A value to change; it counts as changed.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.map.contains_key(key).then(|| self.touch(key));
        self.map.get_mut(key)
    }

    /// All values to change; all count as changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.revision += 1;
        if let Some(dirty) = &mut self.dirty {
            dirty.extend(self.map.keys().cloned());
        }
        self.map.values_mut()
    }

    /// Takes out what does not fit.
    pub fn retain(&mut self, mut fits: impl FnMut(&K, &V) -> bool) {
        let gone: Vec<K> =
            self.map.iter().filter(|(key, value)| !fits(key, value)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            self.remove(&key);
        }
    }

    /// Takes the first value out.
    pub fn pop_first(&mut self) -> Option<(K, V)> {
        let first = self.map.keys().next().cloned()?;
        self.touch(&first);
        self.map.remove_entry(&first)
    }
}

impl<K: serde::Serialize, V: serde::Serialize> serde::Serialize for Tracked<K, V> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.map.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_changed_or_removed_is_told_once() {
        let mut map = Tracked::default();
        map.insert(1, "a");
        map.insert(2, "b");
        map.track();
        assert_eq!(map.take_dirty(), [(1, Some(&"a")), (2, Some(&"b"))]);
        assert!(!map.is_dirty());
        if let Some(value) = map.get_mut(&2) {
            *value = "c";
        }
        map.remove(&1);
        map.remove(&9);
        assert!(map.get_mut(&9).is_none());
        assert_eq!(map.take_dirty(), [(1, None), (2, Some(&"c"))]);
        assert!(map.take_dirty().is_empty());
    }

    #[test]
    fn a_map_that_nobody_saves_remembers_nothing() {
        let mut map = Tracked::default();
        map.insert(1, "a");
        assert!(!map.is_dirty());
        assert!(map.take_dirty().is_empty());
        assert_eq!(map.revision(), 1);
    }
}
