//! What stands for blkid: signatures at their places, as `blkid -p` knows them (util-linux `libblkid/src/superblocks`, `partitions`).

use std::io::{Error, Result};

use crate::host::{Found, FsKind, blank::ReadAt, guard::Signs, superblock::Superblock};

/// A signature that is a fixed text at a fixed place.
struct Magic {
    kind: &'static str,
    usage: &'static str,
    at: u64,
    bytes: &'static [u8],
}

const fn magic(kind: &'static str, usage: &'static str, at: u64, bytes: &'static [u8]) -> Magic {
    Magic { kind, usage, at, bytes }
}

const FS: &str = "filesystem";

const MAGICS: [Magic; 27] = [
    magic("xfs", FS, 0, b"XFSB"),
    magic("btrfs", FS, 0x10040, b"_BHRfS_M"),
    magic("swap", "other", 4086, b"SWAPSPACE2"),
    magic("swap", "other", 4086, b"SWAP-SPACE"),
    magic("LVM2_member", "raid", 0x218, b"LVM2 001"),
    magic("LVM2_member", "raid", 0x018, b"LVM2 001"),
    magic("linux_raid_member", "raid", 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    magic("linux_raid_member", "raid", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    magic("vfat", FS, 0x52, b"FAT32   "),
    magic("vfat", FS, 0x36, b"FAT16   "),
    magic("vfat", FS, 0x36, b"FAT12   "),
    magic("exfat", FS, 3, b"EXFAT   "),
    magic("ntfs", FS, 3, b"NTFS    "),
    magic("iso9660", FS, 0x8001, b"CD001"),
    magic("udf", FS, 0x8001, b"NSR02"),
    magic("f2fs", FS, 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    magic("jfs", FS, 0x8000, b"JFS1"),
    magic("reiserfs", FS, 0x10034, b"ReIsEr2Fs"),
    magic("squashfs", FS, 0, b"hsqs"),
    magic("erofs", FS, 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    magic("nilfs2", FS, 1024 + 6, &[0x34, 0x34]),
    magic("bcache", "other", 4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    magic("ceph_bluestore", "other", 0, b"bluestore block device"),
    magic("DRBD", "raid", 0, b"DRBD\x83\x74\x02"),
    magic("zfs_member", FS, 0x20000, &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0]),
    magic("zfs_member", FS, 0x21000, &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0]),
    magic("minix", FS, 1024 + 16, &[0x8f, 0x13]),
];

fn has(disk: &dyn ReadAt, at: u64, bytes: &[u8]) -> Result<bool> {
    let mut read = vec![0; bytes.len()];
    let end = at.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    if end > disk.size() {
        return Ok(false);
    }
    disk.read_exact_at(&mut read, at)?;
    Ok(read == bytes)
}

/// The text of a field that ends with zeros.
fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
    (!text.is_empty()).then_some(text)
}

/// What the superblock of an ext is (`superblocks/ext.c`): by its features, where its numbers make sense.
fn ext(disk: &dyn ReadAt) -> Result<Option<(&'static str, String)>> {
    let mut head = [0; 1024];
    if disk.size() < 2048 {
        return Ok(None);
    }
    disk.read_exact_at(&mut head, 1024)?;
    let little = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| head[at + n]));
    if head[0x38..0x3a] != [0x53, 0xef] || little(0x18) > 6 || little(0x4c) > 2 {
        return Ok(None);
    }
    // What ext2 and ext3 do not know: anything but file types, and a log that waits.
    let newer = little(0x60) & !(0x2 | 0x4 | 0x10) != 0 || little(0x64) & !0x7 != 0;
    let kind = match (newer, little(0x5c) & 4 != 0) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    };
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&head[0x68..0x78]);
    Ok(Some((kind, uuid::Uuid::from_bytes(uuid).to_string())))
}

fn uuid_at(disk: &dyn ReadAt, at: u64) -> Result<String> {
    let mut uuid = [0; 16];
    disk.read_exact_at(&mut uuid, at)?;
    Ok(uuid::Uuid::from_bytes(uuid).to_string())
}

/// The partition table (`partitions/gpt.c`, `dos.c`): of a DOS one each of the four boot flags has to be legal and one type set.
fn table(disk: &dyn ReadAt) -> Result<Option<&'static str>> {
    let last = disk.size().saturating_sub(512);
    if has(disk, 512, b"EFI PART")? || (last > 0 && has(disk, last, b"EFI PART")?) {
        return Ok(Some("gpt"));
    }
    if !has(disk, 510, &[0x55, 0xaa])? {
        return Ok(None);
    }
    let mut entries = [0; 64];
    disk.read_exact_at(&mut entries, 446)?;
    let legal = entries.chunks(16).all(|entry| matches!(entry[0], 0 | 0x80));
    let any = entries.chunks(16).any(|entry| entry[4] != 0);
    Ok((legal && any).then_some("dos"))
}

/// What is on the disk; an error where a place can't be read, or where several signatures contradict each other.
pub(super) fn probe(disk: &dyn ReadAt) -> Result<Found> {
    let mut found: Vec<Signs> = Vec::new();
    let sign = |kind: &str, usage: &str| Signs {
        kind: Some(kind.to_owned()),
        usage: Some(usage.to_owned()),
        ..Signs::default()
    };
    for magic in MAGICS {
        if has(disk, magic.at, magic.bytes)?
            && !found.iter().any(|one| one.kind.as_deref() == Some(magic.kind))
        {
            let mut signs = sign(magic.kind, magic.usage);
            match magic.kind {
                "xfs" => signs.uuid = Some(uuid_at(disk, 32)?),
                "btrfs" => signs.uuid = Some(uuid_at(disk, 0x10020)?),
                _ => {}
            }
            found.push(signs);
        }
    }
    if let Some((kind, uuid)) = ext(disk)? {
        found.push(Signs { uuid: Some(uuid), ..sign(kind, FS) });
    }
    if has(disk, 0, b"LUKS\xba\xbe")? {
        let mut head = [0; 256];
        disk.read_exact_at(&mut head, 0)?;
        found.push(Signs {
            subsystem: text(&head[208..256]),
            uuid: text(&head[168..208]),
            ..sign("crypto_LUKS", "crypto")
        });
    }
    let table = table(disk)?.map(str::to_owned);
    if found.len() > 1 {
        return Err(Error::other("several signatures, which contradict each other"));
    }
    let Some(signs) = found.pop() else {
        return Ok(table
            .map_or(Found::NoSignature, |table| Signs { table: Some(table), ..Signs::default() }.found()));
    };
    // As blkid does: the boot code of a file system can look like a table (`partitions/dos.c`, `is_fat`).
    let boot_code = matches!(signs.kind.as_deref(), Some("vfat" | "ntfs" | "exfat"));
    match (Signs { table: table.filter(|_| !boot_code), ..signs }).found() {
        Found::Filesystem { name, .. } if name == "xfs" && is_unfinished(disk)? => {
            Ok(Found::Unfinished(FsKind::Xfs))
        }
        found => Ok(found),
    }
}

fn is_unfinished(disk: &dyn ReadAt) -> Result<bool> {
    Ok(Superblock::read(disk)?.is_some_and(|superblock| superblock.unfinished))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::contents::Image;
    use crate::sim::guest::memory::device::Loose;

    fn found(writes: &[(u64, &[u8])]) -> Result<Found> {
        let image = Image::default();
        for (at, bytes) in writes {
            image.write(bytes, *at);
        }
        probe(&Loose { image: &image, size: 64 << 20 })
    }

    #[test]
    fn every_signature_is_seen_and_two_contradict_each_other() {
        for magic in MAGICS {
            let seen = found(&[(magic.at, magic.bytes)]).expect("it can be read");
            assert_ne!(seen, Found::NoSignature, "{}", magic.kind);
        }
        assert_eq!(found(&[]).expect("it can be read"), Found::NoSignature);
        assert_eq!(
            found(&[(0, b"LUKS\xba\xbe\x00\x02"), (208, b"proxmox-csi")]).expect("read"),
            Found::Luks { ours: true }
        );
        assert_eq!(found(&[(0, b"LUKS\xba\xbe\x00\x01")]).expect("read"), Found::Luks { ours: false });
        let ext2 = found(&[(1024 + 0x38, &[0x53, 0xef])]).expect("read");
        assert!(matches!(&ext2, Found::Filesystem { name, .. } if name == "ext2"), "{ext2:?}");
        assert!(found(&[(0, b"XFSB"), (4086, b"SWAPSPACE2")]).is_err());
        let partition = b"\x00\x02\x03\x00\x83\x10\x10\x10\x00\x08\x00\x00\x00\x40\x00\x00";
        let dos = found(&[(446, partition), (510, b"\x55\xaa")]).expect("read");
        assert_eq!(dos, Found::Other("a partition table (`dos`)".to_owned()));
        let both = found(&[(0, b"XFSB"), (512, b"EFI PART")]).expect("read");
        assert_eq!(both, Found::Other("`xfs` and a partition table (`gpt`)".to_owned()));
    }
}
