//! How full storages are.

use super::contents;
use super::rules::plugin;
use super::state::{Snapshot, State, Volume, VolumeKey};
use super::world::Kind;
use std::path::PathBuf;

impl State {
    /// Bytes left on a storage, seen from `node`; nothing on one that a fault has filled.
    pub fn free(&self, node: &str, id: &str) -> u64 {
        self.storages.get(id).map_or(0, |storage| {
            if storage.full { 0 } else { storage.total.saturating_sub(self.used(node, id)) }
        })
    }

    /// Bytes in use on a storage, seen from `node`: what the files take, 4 KiB each where contents are not kept, and
    /// the whole size of thick volumes.
    pub fn used(&self, node: &str, id: &str) -> u64 {
        let Some(storage) = self.storages.get(id) else { return 0 };
        let config = &storage.config;
        let taken = |key: &VolumeKey, volume: &Volume| {
            let kept = |snapshot: &Snapshot| plugin::kept(config, snapshot.size, snapshot.used);
            let snapshots = if config.kind == Kind::Lvmthin {
                volume.kept_blocks(key)
            } else {
                volume.snapshots.iter().map(kept).sum()
            };
            plugin::taken(config, volume.size, volume.used()).saturating_add(snapshots)
        };
        // Guests write into files, and no change of a volume tells of it.
        if self.volumes_on(node, config).next().is_some_and(|(_, volume)| volume.image.is_some()) {
            return self.volumes_on(node, config).map(|(key, volume)| taken(key, volume)).sum();
        }
        let ids: Vec<&str> = self.same_place(config).map(|other| other.id.as_str()).collect();
        let here = (!config.shared).then_some(node);
        let all = self.volumes_on(node, config).map(|(key, _)| key);
        self.sums.of(&self.volumes, (id, here), all, |key, volume| {
            let seen = key.node.as_deref().is_none_or(|of| of == node);
            (seen && ids.contains(&key.storage.as_str())).then(|| taken(key, volume))
        })
    }
}

impl Volume {
    /// Bytes the volume takes.
    pub fn used(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        let blocks =
            self.image.as_ref().and_then(|path| std::fs::metadata(path).ok()).map(|m| m.blocks() * 512);
        blocks.unwrap_or(4096).max(4096)
    }

    /// Bytes that only its snapshots have, in a thin pool that counts each block once (pve-storage
    /// `LvmThinPlugin.pm:volume_snapshot`, and what `LvmThinPlugin.pm:status` is told by the pool). Nothing where contents are not kept.
    fn kept_blocks(&self, key: &VolumeKey) -> u64 {
        let file = |snapshot: &Snapshot| self.snapshot_file(key, &snapshot.name);
        let newer = self.snapshots.iter().skip(1).map(file).chain([self.image.clone()]);
        let pairs = self.snapshots.iter().map(file).zip(newer);
        let own = |(old, new): (Option<PathBuf>, Option<PathBuf>)| contents::own(&old?, &new?).ok();
        pairs.filter_map(own).sum()
    }

    /// The file of a snapshot, beside that of the volume (`Sim::snapshots_of`).
    fn snapshot_file(&self, key: &VolumeKey, name: &str) -> Option<PathBuf> {
        let storage = self.image.as_ref()?.ancestors().nth(key.name.split('/').count() + 1)?;
        Some(storage.join("snapshots").join(&key.name).join(name))
    }
}
