//! The format guard as a property: mkfs runs on blank, readable, right-sized devices and on nothing else.
//!
//! Each case is made of a seed: an image, what the controller says of it, what is asked for, and what goes wrong meanwhile. It is staged
//! over a machine in memory, whose bytes the driver's own proof reads. `CASES=100000` runs more of them, `SEED=n` one.

mod node_suite;

use std::{sync::Arc, time::Duration};

use node_suite::{KEY, MIB, Volume, node_options};
use proxmox_csi::{
    host::FsKind,
    node::{MountPath, Node, Stage, StageError},
    sim::{
        Image,
        guest::memory::{Drive, Machine, Volume as OnDisk},
    },
    types::{Bytes, publish::Contents, sharing::Sharing},
};
use tokio::time::sleep;

/// `SplitMix64`: the same numbers for the same seed.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        let end = u64::try_from(all.len()).expect("a length");
        &all[usize::try_from(self.below(end)).expect("an index")]
    }
}

/// Where a signature stands.
#[derive(Debug, Clone, Copy)]
enum At {
    Head(u64),
    /// Counted back from the end.
    Tail(u64),
}

use At::{Head, Tail};

/// What others write on disks, by name: a part of what `blkid -k` lists, with the places of util-linux `libblkid/src/superblocks`.
const SIGNATURES: [(&str, At, &[u8]); 62] = [
    ("linux_raid_member 1.1", Head(0), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("linux_raid_member 1.2", Head(4096), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("linux_raid_member 1.0", Tail(8192), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("linux_raid_member 0.90", Tail(65536), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("ddf_raid_member", Tail(512), &[0xde, 0x11, 0xde, 0x11]),
    ("isw_raid_member", Tail(1024), b"Intel Raid ISM Cfg Sig. "),
    ("lsi_mega_raid_member", Tail(512), b"$XIDE$"),
    ("via_raid_member", Tail(512), &[0x55, 0xaa]),
    ("silicon_medley_raid_member", Tail(512 - 96), &[0x52, 0x31, 0x2f, 0x00]),
    ("nvidia_raid_member", Tail(1024), b"NVIDIA"),
    ("promise_fasttrack_raid_member", Tail(63 * 512), b"Promise Technology, Inc."),
    ("hpt45x_raid_member", Tail(11 * 512), &[0xf3, 0x75, 0x78, 0x5a]),
    ("hpt37x_raid_member", Head(4608), &[0xf0, 0x16, 0x78, 0x5a]),
    ("adaptec_raid_member", Tail(512), b"DPTM"),
    ("jmicron_raid_member", Tail(512), b"JM"),
    ("bcache", Head(4120), b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("ceph_bluestore", Head(0), b"bluestore block device"),
    ("drbd", Tail(4096 - 60), &[0x83, 0x74, 0x02, 0x6b]),
    ("LVM2_member", Head(536), b"LVM2 001"),
    ("LVM2_member, first sector", Head(24), b"LVM2 001"),
    ("LVM1_member", Head(0), b"HM"),
    ("DM_snapshot_cow", Head(0), b"SnAp"),
    ("DM_verity_hash", Head(0), b"verity\0\0"),
    ("DM_integrity", Head(0), b"integrt\0"),
    ("crypto_LUKS 1", Head(0), b"LUKS\xba\xbe\x00\x01"),
    ("crypto_LUKS 2", Head(0), b"LUKS\xba\xbe\x00\x02"),
    ("crypto_LUKS 2, second header", Head(0x4000), b"SKUL\xba\xbe\x00\x02"),
    ("crypto_LUKS 2, last place of the second header", Head(0x40_0000), b"SKUL\xba\xbe\x00\x02"),
    ("VMFS_volume_member", Head(1 << 20), &[0x0d, 0xd0, 0x01, 0xc0]),
    ("ubi", Head(0), b"UBI#"),
    ("vdo", Head(0), b"dmvdo001"),
    ("stratis", Head(512 + 4), b"!Stra0tis\x86\xff\x02^\x41rh"),
    ("BitLocker", Head(3), b"-FVE-FS-"),
    ("vfat", Head(0x52), b"FAT32   "),
    ("fat16", Head(0x36), b"FAT16   "),
    ("swap", Head(4086), b"SWAPSPACE2"),
    ("swap, pages of 64 KiB", Head(65526), b"SWAPSPACE2"),
    ("swsuspend", Head(4086), b"S1SUSPEND"),
    ("xfs", Head(0), b"XFSB"),
    ("xfs_external_log", Head(0), &[0xfe, 0xed, 0xba, 0xbe]),
    ("ext", Head(0x438), &[0x53, 0xef]),
    ("reiserfs", Head(0x10034), b"ReIsEr2Fs"),
    ("reiser4", Head(65536), b"ReIsEr4"),
    ("jfs", Head(0x8000), b"JFS1"),
    ("udf", Head(0x8001), b"NSR02"),
    ("iso9660", Head(0x8001), b"CD001"),
    ("zfs_member, label 0", Head(0x20000), &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0]),
    ("zfs_member, label 3", Tail(256 * 1024 - 0x20000), &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0]),
    ("hfsplus", Head(1024), b"H+"),
    ("ufs", Head(8192 + 1372), &[0x54, 0x19, 0x01, 0x00]),
    ("ntfs", Head(3), b"NTFS    "),
    ("ReFS", Head(3), b"ReFS\0\0\0\0"),
    ("gfs2", Head(65536), &[0x01, 0x16, 0x19, 0x70]),
    ("ocfs2", Head(0x2000), b"OCFSV2"),
    ("oracleasm", Head(32), b"ORCLDISK"),
    ("squashfs", Head(0), b"hsqs"),
    ("btrfs", Head(0x10040), b"_BHRfS_M"),
    ("nilfs2", Head(1030), &[0x34, 0x34]),
    ("exfat", Head(3), b"EXFAT   "),
    ("f2fs", Head(1024), &[0x10, 0x20, 0xf5, 0xf2]),
    ("gpt", Head(512), b"EFI PART"),
    ("gpt, the copy at the end alone", Tail(512), b"EFI PART"),
];

/// What is true of an image, whatever the driver thinks of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    Blank,
    /// A file system that is whole.
    Whole(FsKind),
    /// A LUKS header of the passphrase that is asked with, and nothing behind it.
    Locked,
    /// Anything else.
    Data,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// A place in what has to be read answers with EIO.
    Unreadable,
    /// Some place or other does.
    UnreadableSomewhere,
    /// It is smaller than the volume.
    TooSmall,
    /// Sysfs says another size.
    OtherSize,
    /// Its name is another disk's by now.
    OtherNode,
    /// It goes after so many milliseconds.
    Goes(u64),
    /// It shrinks after so many milliseconds.
    Shrinks(u64),
    /// It goes, and a disk of another volume gets its name.
    Replaced(u64),
}

struct Case {
    seed: u64,
    what: String,
    size: u64,
    image: Image,
    truth: Truth,
    fault: Fault,
    contents: Contents,
    fs: FsKind,
    readonly: bool,
    encrypted: bool,
}

const HEAD: u64 = 8 * MIB;
const TAIL: u64 = MIB;

fn image_of(chance: &mut Chance) -> (String, u64, Image, Truth) {
    let image = Image::default();
    let small = 24 * MIB + chance.below(4096) * 4096;
    let tail = |chance: &mut Chance, size: u64| size - 1 - chance.below(TAIL);
    let byte = |chance: &mut Chance, at: u64| {
        image.write(&[u8::try_from(1 + chance.below(255)).expect("a byte")], at);
    };
    match chance.below(20) {
        0..=5 => ("blank".to_owned(), small, image, Truth::Blank),
        6 => {
            let at = chance.below(HEAD);
            byte(chance, at);
            (format!("a byte at {at}"), small, image, Truth::Data)
        }
        7 => {
            let at = tail(chance, small);
            byte(chance, at);
            (format!("zeros, and a byte at {at} near the end"), small, image, Truth::Data)
        }
        8..=11 => {
            let (name, at, bytes) = *chance.pick(&SIGNATURES);
            let at = match at {
                Head(at) => at,
                Tail(back) => small - back,
            };
            image.write(bytes, at);
            (format!("the signature of {name}"), small, image, Truth::Data)
        }
        12 | 13 => {
            let kind = *chance.pick(&[FsKind::Ext4, FsKind::Xfs, FsKind::Btrfs]);
            let size = if kind == FsKind::Ext4 { 160 * MIB } else { 320 * MIB };
            OnDisk::make(&image, size, kind).expect("it is large enough");
            // Each part is torn off or not: the superblock, the files, the copies.
            let (superblock, copies) = match kind {
                FsKind::Ext4 => (1024, vec![128 * MIB]),
                FsKind::Xfs => (0, [1, 2, 3].map(|group| size / 4 / 4096 * 4096 * group).into()),
                FsKind::Btrfs => (65536, vec![64 * MIB]),
            };
            let mut torn = Vec::new();
            for at in [superblock, MIB].into_iter().chain(copies) {
                if chance.one_in(2) {
                    image.write(&vec![0; 64 * 1024], at);
                    torn.push(at);
                }
            }
            let whole = OnDisk::read(&image, size).is_some();
            let truth = if image.is_blank() {
                Truth::Blank
            } else if whole {
                Truth::Whole(kind)
            } else {
                Truth::Data
            };
            (format!("{kind} without what was at {torn:?}"), size, image, truth)
        }
        14 => {
            let at = small - TAIL + chance.below(TAIL - 4096);
            image.write(&chance.next().to_le_bytes().repeat(64), at);
            (format!("a zeroed head, and data at {at}"), small, image, Truth::Data)
        }
        15 => {
            let ours = chance.one_in(2);
            let own = chance.one_in(2);
            let key = if own { KEY.as_bytes() } else { b"another" };
            OnDisk::encrypt(&image, small, key, ours).expect("it is large enough");
            (
                format!("LUKS, ours {ours}, our key {own}"),
                small,
                image,
                if own { Truth::Locked } else { Truth::Data },
            )
        }
        16 => {
            image.write(b"\x80\x02\x03\x00\x83\x10\x10\x10\x00\x08\x00\x00\x00\x40\x00\x00", 446);
            image.write(b"\x55\xaa", 510);
            ("a partition table".to_owned(), small, image, Truth::Data)
        }
        17 | 18 => {
            let at = chance.below(HEAD - 65536);
            let noise: Vec<u8> = (0..4096).flat_map(|_| chance.next().to_le_bytes()).collect();
            image.write(&noise, at);
            (format!("noise at {at}"), small, image, Truth::Data)
        }
        _ => {
            let kind = *chance.pick(&[FsKind::Ext4, FsKind::Xfs, FsKind::Btrfs]);
            OnDisk::make_half(&image, 320 * MIB, kind).expect("it is large enough");
            (format!("half an mkfs of {kind}"), 320 * MIB, image, Truth::Data)
        }
    }
}

impl Case {
    fn of(seed: u64) -> Self {
        let mut chance = Chance(seed);
        let (what, size, image, truth) = image_of(&mut chance);
        let fault = match chance.below(20) {
            0 => Fault::Unreadable,
            1 => Fault::UnreadableSomewhere,
            2 => Fault::TooSmall,
            3 => Fault::OtherSize,
            4 => Fault::OtherNode,
            5 => Fault::Goes(chance.below(400)),
            6 => Fault::Shrinks(chance.below(400)),
            7 => Fault::Replaced(chance.below(400)),
            _ => Fault::None,
        };
        let contents = *chance.pick(&[
            Contents::Blank,
            Contents::Blank,
            Contents::Blank,
            Contents::Unwiped,
            Contents::Unknown,
        ]);
        let fs = if size < 300 * MIB {
            FsKind::Ext4
        } else {
            *chance.pick(&[FsKind::Ext4, FsKind::Xfs, FsKind::Btrfs])
        };
        // Where the data behind a header begins, an ext4 must still fit.
        let encrypted = size >= 26 * MIB && chance.one_in(5);
        Self { seed, what, size, image, truth, fault, contents, fs, readonly: chance.one_in(8), encrypted }
    }

    /// Whether the driver may write to the device at all.
    fn may_be_written_to(&self) -> bool {
        let allowed = self.contents == Contents::Blank && !self.readonly;
        let readable =
            !matches!(self.fault, Fault::Unreadable | Fault::TooSmall | Fault::OtherSize | Fault::OtherNode);
        match self.truth {
            Truth::Blank => allowed && readable,
            // The header stays as it is; what is inside is formatted. Between the two are places that nobody has to read.
            Truth::Locked => {
                let readable = readable || (self.fault == Fault::Unreadable && self.broken_at() < 16 * MIB);
                allowed && readable && self.encrypted
            }
            // A mount marks it.
            Truth::Whole(kind) => kind == self.fs && !self.encrypted && !self.readonly,
            Truth::Data => false,
        }
    }

    /// Whether it has to be formatted.
    fn must_be_formatted(&self) -> bool {
        self.truth == Truth::Blank && self.fault == Fault::None && self.may_be_written_to()
    }

    /// Where a device is broken that is.
    fn broken_at(&self) -> u64 {
        let mut chance = Chance(!self.seed);
        match self.fault {
            Fault::UnreadableSomewhere => chance.below(self.size),
            _ if chance.one_in(2) => chance.below(HEAD),
            _ => self.size - 1 - chance.below(TAIL),
        }
    }

    async fn run(&self) {
        let machine = Machine::new(None).patient_for(Duration::from_millis(200));
        let mut volume =
            Volume::new("pvc-1", 1, self.size, MountPath::new("/var/lib/staging").expect("a path"));
        let number = |volume: &Volume| {
            u64::from_str_radix(volume.published.wwn.to_string().trim_start_matches("0x"), 16).ok()
        };
        let drive = |image: &Image, wwn, size| Drive { image: image.clone(), size, wwn, readonly: false };
        machine.plug(1, drive(&self.image, number(&volume), self.size));
        let (other, foreign) = (Volume::new("pvc-2", 2, self.size, volume.staging.clone()), Image::default());
        let broken = self.broken_at();
        match self.fault {
            Fault::Unreadable => machine.break_at(1, broken..broken + 1),
            Fault::UnreadableSomewhere => machine.break_at(1, broken..broken + 4096),
            Fault::TooSmall => volume.published.size = Some(Bytes::new(self.size + 1 + self.seed % MIB)),
            Fault::OtherSize => machine.list_size(1, Some(self.size + 512)),
            Fault::OtherNode => {
                machine.plug(2, drive(&foreign, number(&other), self.size));
                machine.move_node("sdb", Some("sda"));
            }
            _ => {}
        }
        volume.published.contents = self.contents;
        let sharing = if self.readonly { Sharing::OneReader } else { Sharing::OneNode };
        let stage = if self.encrypted {
            volume.stage_encrypted(self.fs.as_str(), KEY)
        } else {
            volume.stage(self.fs.as_str())
        };
        let stage = Stage { sharing, ..stage };
        let mut options = node_options();
        options.find_timeout = Duration::from_secs(1);
        let node = Node::new(Arc::new(machine.clone()), options);
        let before = self.image.snapshot();
        let uuid = OnDisk::read(&self.image, self.size).map(|found| found.uuid);
        let meanwhile = async {
            match self.fault {
                Fault::Goes(after) => {
                    sleep(Duration::from_millis(after)).await;
                    machine.unplug(1);
                }
                Fault::Shrinks(after) => {
                    sleep(Duration::from_millis(after)).await;
                    machine.resize_now(1, self.size / 2);
                }
                Fault::Replaced(after) => {
                    sleep(Duration::from_millis(after)).await;
                    machine.unplug(1);
                    machine.plug(2, drive(&foreign, number(&other), self.size));
                }
                _ => {}
            }
        };
        let (staged, ()) = tokio::join!(node.stage(&stage), meanwhile);
        self.judge(&staged, &before, uuid, &foreign);
    }

    fn judge(
        &self,
        staged: &Result<(), StageError>,
        before: &Image,
        uuid: Option<uuid::Uuid>,
        foreign: &Image,
    ) {
        let context = format!(
            "SEED={}: {}, {} bytes, {:?}, {:?}, {:?}, {} asked, read-only {}, encrypted {}: {staged:?}",
            self.seed,
            self.what,
            self.size,
            self.truth,
            self.fault,
            self.contents,
            self.fs,
            self.readonly,
            self.encrypted
        );
        assert!(foreign.is_blank(), "{context}: another volume was written to");
        let written = !self.image.is_same(before);
        assert!(!written || self.may_be_written_to(), "{context}: it was written to");
        let now = OnDisk::read(&self.image, self.size).map(|found| found.uuid);
        if let Truth::Whole(_) = self.truth {
            assert_eq!(now, uuid, "{context}: it was formatted anew");
        }
        if self.must_be_formatted() {
            assert!(staged.is_ok() && written, "{context}: it is blank and was not formatted");
            assert_eq!(now.is_some(), !self.encrypted, "{context}");
        }
        let mounted = staged.is_ok() && self.truth == Truth::Data;
        assert!(!mounted, "{context}: what is there is no volume of this kind");
    }
}

async fn run(cases: impl Iterator<Item = u64>) -> (usize, usize, usize) {
    let (mut formatted, mut mounted, mut refused) = (0, 0, 0);
    for seed in cases {
        let case = Case::of(seed);
        case.run().await;
        match case.truth {
            _ if case.must_be_formatted() => formatted += 1,
            Truth::Whole(_) => mounted += 1,
            _ => refused += 1,
        }
    }
    (formatted, mounted, refused)
}

#[tokio::test(start_paused = true)]
async fn p4_mkfs_runs_on_blank_readable_right_sized_devices_and_on_nothing_else() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    if let Some(seed) = number("SEED") {
        Case::of(seed).run().await;
        return;
    }
    let cases = number("CASES").unwrap_or(20_000);
    let (formatted, mounted, refused) = run(0..cases).await;
    println!("{cases} cases: {formatted} that must be formatted, {mounted} file systems, {refused} others");
    assert!(formatted > 50 && mounted > 10 && refused > 500, "the cases are of every kind");
}

#[tokio::test(start_paused = true)]
async fn p4_every_signature_keeps_a_disk_from_being_formatted() {
    let size = 24 * MIB;
    for (name, at, bytes) in SIGNATURES {
        let image = Image::default();
        image.write(
            bytes,
            match at {
                Head(at) => at,
                Tail(back) => size - back,
            },
        );
        for encrypted in [false, true] {
            let case = Case {
                seed: 0,
                what: name.to_owned(),
                size,
                image: image.snapshot(),
                truth: Truth::Data,
                fault: Fault::None,
                contents: Contents::Blank,
                fs: FsKind::Ext4,
                readonly: false,
                encrypted,
            };
            case.run().await;
        }
    }
}
