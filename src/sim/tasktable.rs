//! All tasks of the cluster, found by id and listed by age.

use super::tasks::Task;
use super::tracked::Tracked;
use std::collections::BTreeMap;

/// Tasks that are remembered; a container may run for weeks. PVE rotates its archive too (pve-common
/// `RESTEnvironment.pm:log_cluster_msg`, pve-manager `pveupdate`).
const MOST: usize = 20_000;

/// Tasks, oldest first.
#[derive(Debug, Default)]
pub struct Tasks {
    list: Tracked<u64, Task>,
    by_upid: BTreeMap<String, u64>,
}

impl Tasks {
    /// Adds the newest task; the oldest goes where there are too many, unless it still runs.
    pub fn push(&mut self, task: Task) {
        let number = self.list.last_key_value().map_or(0, |(last, _)| last + 1);
        self.put(number, task);
        let oldest_ended = self.list.first_key_value().is_some_and(|(_, task)| task.status.is_some());
        if self.list.len() > MOST
            && oldest_ended
            && let Some((_, task)) = self.list.pop_first()
        {
            self.by_upid.remove(&task.upid);
        }
    }

    /// Puts back what was saved under its number.
    pub fn put(&mut self, number: u64, task: Task) {
        self.by_upid.insert(task.upid.clone(), number);
        self.list.insert(number, task);
    }

    /// Forgets a task.
    pub fn drop_number(&mut self, number: u64) {
        if let Some(task) = self.list.remove(&number) {
            self.by_upid.remove(&task.upid);
        }
    }

    /// The task of this id.
    pub fn get(&self, upid: &str) -> Option<&Task> {
        self.list.get(self.by_upid.get(upid)?)
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, upid: &str) -> Option<&mut Task> {
        self.list.get_mut(self.by_upid.get(upid)?)
    }

    /// All, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Task> {
        self.list.values()
    }

    /// All, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Task> {
        self.list.values_mut()
    }

    /// What is to be saved.
    pub(super) fn tracked(&mut self) -> &mut Tracked<u64, Task> {
        &mut self.list
    }
}

impl serde::Serialize for Tasks {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}
