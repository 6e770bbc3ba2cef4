//! ZFS pools on the nodes (pve-storage `Storage/ZFSPoolPlugin.pm`); what `zfs` itself says is from openzfs
//! (`lib/libzfs/libzfs_dataset.c`, `cmd/zfs/zfs_main.c`).

use super::super::error::PveError;
use super::volname::bad_zfs_character;
use crate::sim::world::Storage;

/// Sizes are multiples of this, whatever the block size (`ZFSPoolPlugin.pm:zfs_create_zvol`, `volume_resize`).
const UNIT: u64 = 1 << 20;

/// The dataset of a volume (`ZFSPoolPlugin.pm:path`).
pub fn dataset(storage: &Storage, name: &str) -> String {
    format!("{}/{name}", storage.pool())
}

fn error(text: impl std::fmt::Display) -> PveError {
    // `zfs_request` puts the words in front.
    PveError::die(format!("zfs error: {text}"))
}

/// Bytes of a block: `blocksize` of the storage, or what openzfs takes without it
/// (`include/sys/fs/zfs.h:ZVOL_DEFAULT_BLOCKSIZE`; `ZFSPoolPlugin.pm:verify_zfs_blocksize` reads the unit).
pub fn block_size(storage: &Storage) -> u64 {
    let text = storage.properties.get("blocksize").map_or("16k", String::as_str).to_ascii_lowercase();
    let (digits, unit) = match (text.strip_suffix('k'), text.strip_suffix('m')) {
        (Some(digits), _) => (digits, 1 << 10),
        (_, Some(digits)) => (digits, 1 << 20),
        _ => (text.as_str(), 1),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .filter(|size| *size > 0)
        .unwrap_or(16384)
}

/// Bytes that a volume gets of whom this many were asked for (`ZFSPoolPlugin.pm:zfs_create_zvol`).
pub fn round(size: u64) -> u64 {
    size.div_ceil(UNIT).saturating_mul(UNIT)
}

/// Refuses a volume that `zfs create -V` does not make: a name or a size that cannot be
/// (`libzfs_dataset.c:zfs_create`).
pub fn check(storage: &Storage, name: &str, size: u64) -> Result<(), PveError> {
    let cannot = |why: &str| error(format!("cannot create '{}': {why}", dataset(storage, name)));
    if let Some(character) = bad_zfs_character(name) {
        return Err(cannot(&format!("invalid character '{character}' in name")));
    }
    if size == 0 {
        return Err(cannot("volume size cannot be zero"));
    }
    if !size.is_multiple_of(block_size(storage)) {
        return Err(cannot("volume size must be a multiple of volume block size"));
    }
    Ok(())
}

/// Bytes that a volume which is not sparse keeps free for itself: its data and its metadata in 128 KiB blocks, twice
/// (`libzfs_dataset.c:zvol_volsize_to_reservation`, on a pool without RAID-Z).
pub fn reservation(storage: &Storage, size: u64) -> u64 {
    let mut blocks = size / block_size(storage);
    let mut metadata: u64 = 7;
    while blocks > 1 {
        blocks = blocks.div_ceil(1024);
        metadata += blocks;
    }
    size.saturating_add(metadata * 2 * (128 << 10))
}

/// The answer to an allocation of a name that is taken (`ZFSPoolPlugin.pm:zfs_create_zvol`).
pub fn exists(storage: &Storage, name: &str) -> PveError {
    error(format!("cannot create '{}': dataset already exists", dataset(storage, name)))
}

/// The answer to an allocation without room (`ZFSPoolPlugin.pm:zfs_create_zvol`).
pub fn no_space(storage: &Storage, name: &str) -> PveError {
    error(format!("cannot create '{}': out of space", dataset(storage, name)))
}

/// The answer to growing a volume without room: its reservation grows with it (`libzfs_dataset.c:zfs_setprop_error`).
pub fn no_space_to_grow(storage: &Storage, name: &str) -> PveError {
    error(format!(
        "cannot set property for '{}': size is greater than available space",
        dataset(storage, name)
    ))
}

/// The error of reading a volume that is not there (`ZFSPoolPlugin.pm:zfs_get_properties`).
pub fn unreadable(storage: &Storage, name: &str) -> PveError {
    error(format!("cannot open '{}': dataset does not exist", dataset(storage, name)))
}

/// The error of using a volume that is not there, 10 s later, or 5 min in a task
/// (`ZFSPoolPlugin.pm:zfs_wait_for_zvol_link`).
pub fn missing(name: &str) -> PveError {
    PveError::die(format!("timeout: no zvol device link for '{name}' found after 10 sec."))
}

/// The refusal to remove a volume that is open, after six tries (`ZFSPoolPlugin.pm:zfs_delete_zvol`).
pub fn in_use(storage: &Storage, name: &str) -> PveError {
    error(format!("cannot destroy '{}': dataset is busy", dataset(storage, name)))
}

/// The refusal of a snapshot: there is one of that name, or no room to keep what the volume has
/// (`ZFSPoolPlugin.pm:volume_snapshot`).
pub fn no_snapshot(storage: &Storage, name: &str, snapshot: &str, why: &str) -> PveError {
    error(format!("cannot create snapshot '{}@{snapshot}': {why}", dataset(storage, name)))
}

/// The error of deleting a snapshot that is not there (`zfs_main.c:zfs_do_destroy`).
pub fn snapshot_missing() -> PveError {
    error("could not find any snapshots to destroy; check snapshot names.")
}

/// The error of a storage whose pool is not imported (`ZFSPoolPlugin.pm:activate_storage`).
pub fn inactive(storage: &Storage) -> PveError {
    let pool = storage.pool();
    let pool = pool.split('/').next().unwrap_or(pool);
    PveError::die(format!(
        "could not activate storage '{}', zfs error: cannot import '{pool}': no such pool available\n",
        storage.id
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(properties: &[(&str, &str)]) -> Storage {
        Storage {
            id: "z".to_owned(),
            kind: crate::sim::world::Kind::Zfspool,
            properties: properties.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ..Storage::default()
        }
    }

    #[test]
    fn a_volume_that_is_not_sparse_reserves_more_than_its_size() {
        // 65536 blocks of 16 KiB need 64 indirect blocks and one above them, with 7 of the metadnode, all twice.
        assert_eq!(reservation(&storage(&[]), 1 << 30), (1 << 30) + 72 * 2 * 131_072);
        assert_eq!(block_size(&storage(&[("blocksize", "8K")])), 8192);
    }

    #[test]
    fn sizes_are_whole_mebibytes_and_never_zero() {
        assert_eq!(round(1), 1 << 20);
        assert_eq!(round(1 << 30), 1 << 30);
        let text = |size| {
            check(&storage(&[("pool", "tank/vm")]), "vm-1-x", size).map_err(|e| e.message().to_owned())
        };
        assert_eq!(
            text(0),
            Err("zfs error: cannot create 'tank/vm/vm-1-x': volume size cannot be zero".to_owned())
        );
        assert_eq!(text(1 << 20), Ok(()));
    }
}
