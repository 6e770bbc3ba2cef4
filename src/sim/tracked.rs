//! A map that remembers which of its entries have changed, so that only these need to be written to disk, and what is
//! made of the entries (a sum, an index) follows them without a look at all of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Deref;

/// Changes that are remembered for those who follow them.
const REMEMBERED: usize = 1024;

/// A `BTreeMap` to read, with changes that leave a trace.
#[derive(Debug, Clone)]
pub struct Tracked<K, V> {
    map: BTreeMap<K, V>,
    /// Changed and removed keys; `None` where nobody asks for them.
    dirty: Option<BTreeSet<K>>,
    revision: u64,
    /// The keys of the last changes, one for each revision.
    recent: VecDeque<K>,
}

impl<K, V> Default for Tracked<K, V> {
    fn default() -> Self {
        Self { map: BTreeMap::new(), dirty: None, revision: 0, recent: VecDeque::new() }
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
        if self.recent.len() >= REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(key.clone());
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

    /// The keys that have changed since a revision, some of them more than once; `None` where that is too long ago to
    /// tell.
    pub fn changed_since(&self, revision: u64) -> Option<impl Iterator<Item = &K>> {
        let count = usize::try_from(self.revision.checked_sub(revision)?).ok()?;
        Some(self.recent.range(self.recent.len().checked_sub(count)?..))
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
        // Who follows has to look at all of them.
        self.recent.clear();
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
    fn who_follows_is_told_what_changed_since_or_to_look_at_all() {
        let mut map = Tracked::default();
        let since = |map: &Tracked<u64, u64>, revision| {
            map.changed_since(revision).map(|keys| keys.copied().collect::<Vec<_>>())
        };
        map.insert(1, 1);
        map.insert(2, 2);
        map.remove(&1);
        assert_eq!(since(&map, 0), Some(vec![1, 2, 1]));
        assert_eq!(since(&map, 2), Some(vec![1]));
        assert_eq!(since(&map, map.revision()), Some(Vec::new()));
        assert_eq!(since(&map, map.revision() + 1), None);
        map.values_mut().for_each(|value| *value += 1);
        assert_eq!(since(&map, 2), None);
        let all = map.revision();
        let last = u64::try_from(2 * REMEMBERED).expect("it is small");
        for key in 0..=last {
            map.insert(key, key);
        }
        assert_eq!(since(&map, all), None);
        assert_eq!(since(&map, map.revision() - 1), Some(vec![last]));
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
