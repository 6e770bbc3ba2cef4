//! The format guard over what real tools write, on disks that fail, and with nodes that become another disk's.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::FileExt as _,
    process::{Command, Stdio},
};

use proxmox_csi::{host::error::MountError, node::StageError};

use crate::{
    node_suite::{KEY, MIB, Rig as _, Volume},
    rig::{Loops, run},
};

/// Large enough for an XFS.
const SIZE: u64 = 320 * MIB;

/// The passphrase of somebody else.
const ANOTHER: &str = "another's";

/// Puts something on the image at a path.
type Make = Box<dyn Fn(&str)>;

fn bytes(writes: &'static [(u64, &'static [u8])]) -> Make {
    Box::new(move |path| {
        let file = fs::File::options().write(true).open(path).expect("the image");
        for (at, bytes) in writes {
            file.write_all_at(bytes, *at).expect("it can be written");
        }
    })
}

fn tool(words: &'static [&'static str]) -> Make {
    Box::new(move |path| drop(run(words[0], &[&words[1..], &[path]].concat())))
}

fn luks(kind: &'static str) -> Make {
    Box::new(move |path| {
        let mut child = Command::new("cryptsetup")
            .args(["luksFormat", "--batch-mode", "--type", kind, "--pbkdf", "pbkdf2"])
            .args(["--pbkdf-force-iterations", "1000", "--key-file", "-", path])
            .stdin(Stdio::piped())
            .spawn()
            .expect("cryptsetup runs");
        child.stdin.take().expect("a pipe").write_all(ANOTHER.as_bytes()).expect("it listens");
        assert!(child.wait().expect("it ends").success());
    })
}

/// What may be on a disk: the file system that it is, if it is one that the driver mounts, and who makes it.
fn corpus() -> Vec<(&'static str, Option<&'static str>, Make)> {
    let partition: &[u8] = b"\x00\x02\x03\x00\x83\x10\x10\x10\x00\x08\x00\x00\x00\x40\x00\x00";
    let dos: &'static [(u64, &[u8])] = Box::leak(Box::new([(446, partition), (510, b"\x55\xaa")]));
    vec![
        ("ext2", None, tool(&["mkfs.ext2", "-q", "-F"])),
        ("ext3", None, tool(&["mkfs.ext3", "-q", "-F"])),
        ("ext4", Some("ext4"), tool(&["mkfs.ext4", "-q", "-F"])),
        ("ext4, blocks of 1 KiB", Some("ext4"), tool(&["mkfs.ext4", "-q", "-F", "-b", "1024"])),
        ("xfs", Some("xfs"), tool(&["mkfs.xfs", "-q", "-f"])),
        ("btrfs", Some("btrfs"), tool(&["mkfs.btrfs", "-q", "-f"])),
        ("swap", None, tool(&["mkswap"])),
        ("LUKS1", None, luks("luks1")),
        ("LUKS2", None, luks("luks2")),
        ("a table of partitions, dos", None, bytes(dos)),
        (
            "a table of partitions, gpt",
            None,
            bytes(&[(510, b"\x55\xaa"), (512, b"EFI PART\x00\x00\x01\x00\x5c")]),
        ),
        ("the copy of a gpt", None, bytes(&[(SIZE - 512, b"EFI PART\x00\x00\x01\x00\x5c")])),
        ("LVM2", None, bytes(&[(512, b"LABELONE\x01"), (536, b"LVM2 001")])),
        ("md 1.2", None, bytes(&[(4096, &[0xfc, 0x4e, 0x2b, 0xa9, 1])])),
        ("md 1.0", None, bytes(&[(SIZE - 8192, &[0xfc, 0x4e, 0x2b, 0xa9, 1])])),
        ("ZFS", None, bytes(&[(0x20000, &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0]), (0x4000, b"\x01\x01version")])),
        ("vfat", None, bytes(&[(0, b"\xeb\x58\x90mkfs.fat"), (0x52, b"FAT32   "), (510, b"\x55\xaa")])),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_what_real_tools_have_written_is_never_formatted_not_even_what_is_left_of_it() {
    let rig = Loops::new().await;
    let mut looked_at = 0;
    for (index, (what, kind, make)) in corpus().into_iter().enumerate() {
        // Whole; the first sectors gone; the first MiB gone, as a careless `dd` leaves it.
        for (variant, wiped) in [0, 512, MIB].into_iter().enumerate() {
            let volume = rig.attach_unseen(&format!("pvc-{index}-{variant}"), 1, SIZE);
            let image = rig.image(&volume);
            make(image.to_str().expect("UTF-8"));
            let zeros = vec![0; usize::try_from(wiped).expect("a MiB")];
            rig.poke(&volume, 0, &zeros);
            if rig.is_blank(&volume) {
                // It had nothing else than what was wiped.
                rig.detach(&volume);
                continue;
            }
            let copy = rig.copy(&volume);
            for fs in ["ext4", "xfs"] {
                // What is still the file system that is asked for is mounted, and that writes to it.
                if kind != Some(fs) {
                    let staged = rig.node().stage(&volume.stage(fs)).await;
                    assert!(staged.is_err(), "{what}, {wiped} bytes wiped, {fs} asked");
                }
            }
            assert!(rig.is_same(&volume, &copy), "{what}, {wiped} bytes wiped: it was written to");
            let staged = rig.node().stage(&volume.stage_encrypted("ext4", KEY)).await;
            assert!(staged.is_err(), "{what}, {wiped} bytes wiped, encrypted ext4 asked");
            if (what, wiped) == ("LUKS2", 512) {
                // cryptsetup puts the first header back from the second one: the volume is whole again.
                assert!(rig.opens(&volume, ANOTHER), "{what}: the volume is lost");
            } else {
                assert!(rig.is_same(&volume, &copy), "{what}, {wiped} bytes wiped: it was written to");
            }
            assert!(rig.mounts().is_empty() && rig.mapped().is_empty(), "{what}");
            looked_at += 1;
            rig.detach(&volume);
            fs::remove_file(copy).and_then(|()| fs::remove_file(image)).expect("files of the rig");
        }
    }
    assert!(looked_at > 30, "{looked_at} images");
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_node_that_becomes_another_disks_before_mkfs_runs_does_that_disk_no_harm() {
    let rig = Loops::new().await;
    let (volume, other) = (rig.attach("pvc-1", 1, 64 * MIB), rig.attach("pvc-2", 2, 64 * MIB));
    let dev = rig.root.join("dev");
    let script = format!(
        "#!/bin/bash\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\ncd {} && mv sda sdc && mv sdb sda && mv sdc sdb\nexec mkfs.ext4 \"$@\"\n",
        dev.display()
    );
    rig.tool("mkfs.ext4", &script);
    let staged = rig.node().stage(&volume.stage("ext4")).await;
    assert!(matches!(staged, Err(StageError::Mount(MountError::Wrong { .. }))), "{staged:?}");
    assert!(rig.is_blank(&other), "the other disk is untouched");
    assert!(!rig.is_blank(&volume), "what was proven blank was formatted");
    assert!(rig.mounts().is_empty(), "and nothing else was mounted in its place");
    rig.move_node("sda", "sdc");
    rig.move_node("sdb", "sda");
    rig.move_node("sdc", "sdb");
    fs::remove_file(rig.root.join("tools/mkfs.ext4")).expect("a file of the rig");
    rig.node().stage(&volume.stage("ext4")).await.expect("now it is mounted");
}

/// Stands in the place of a tool: cuts one call of all that are made.
const WRAPPER: &str = r#"#!/bin/bash
PATH=/usr/sbin:/usr/bin:/sbin:/bin
echo "@NAME@ $*" >>@ROOT@/tools.log
number=$(wc -l <@ROOT@/tools.log)
read -r at how <@ROOT@/cut
if [[ $number == "$at" ]]; then
    case $how in
    fail) echo "cut" >&2; exit @CODE@ ;;
    after) @REAL@ "$@"; exit @CODE@ ;;
    killed) kill -KILL $$ ;;
    esac
fi
exec @REAL@ "$@"
"#;

const TOOLS: [&str; 8] =
    ["blkid", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "e2fsck", "resize2fs", "xfs_growfs", "cryptsetup"];

/// A machine on which one call of a tool is cut.
async fn with_cut(at: usize, how: &str) -> Loops {
    let rig = Loops::new().await;
    let root = rig.root.to_str().expect("UTF-8").to_owned();
    fs::rename(rig.root.join("tools/cryptsetup"), rig.root.join("cryptsetup.rig")).expect("the rig's own");
    fs::write(rig.root.join("cut"), format!("{at} {how}\n")).expect("a file");
    for name in TOOLS {
        let own = format!("{root}/cryptsetup.rig");
        let real = if name == "cryptsetup" { own.as_str() } else { name };
        // What e2fsck ends with where it can't work; 1 means there that all is well again.
        let code = if name == "e2fsck" { "8" } else { "1" };
        let script = WRAPPER.replace("@NAME@", name).replace("@REAL@", real).replace("@CODE@", code);
        rig.tool(name, &script.replace("@ROOT@", &root));
    }
    rig
}

/// A volume's life, each step called until it succeeds; returns what tools were called.
async fn live(rig: &Loops, fs: &str, encrypted: bool) -> Result<Vec<String>, String> {
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    let stage = |volume: &Volume| {
        if encrypted { volume.stage_encrypted(fs, KEY) } else { volume.stage(fs) }
    };
    let mut history = Vec::new();
    macro_rules! until_it_succeeds {
        ($what:literal, $call:expr) => {{
            let mut tries = 0;
            loop {
                match $call.await {
                    Ok(_) => break,
                    Err(error) => history.push(format!("{}: {error}", $what)),
                }
                tries += 1;
                if tries == 4 {
                    return Err(format!("{history:#?}"));
                }
            }
        }};
    }
    until_it_succeeds!("stage", rig.node().stage(&stage(&volume)));
    rig.write(&volume.staging, "mine").map_err(|error| error.to_string())?;
    if fs != "ext4" || rig.may_grow_ext4() {
        rig.resize(&volume, 1024 * MIB);
        until_it_succeeds!("expand", rig.node().expand(&volume.expand(&volume.staging, 1024 * MIB)));
    }
    until_it_succeeds!("unstage", rig.node().unstage(&volume.unstage()));
    assert!(rig.mounts().is_empty() && rig.mapped().is_empty() && rig.kernel_disks().is_empty());
    until_it_succeeds!("stage", rig.node().stage(&stage(&volume)));
    let data = rig.read(&volume.staging).map_err(|error| format!("{history:#?}: {error}"))?;
    assert_eq!((data.as_str(), rig.mounts().len()), ("mine", 1), "{history:#?}");
    until_it_succeeds!("unstage", rig.node().unstage(&volume.unstage()));
    let log = fs::read_to_string(rig.root.join("tools.log")).expect("tools were called");
    Ok(log.lines().map(str::to_owned).collect())
}

async fn cut_every_tool(fs: &str, encrypted: bool) {
    let calls = live(&with_cut(0, "never").await, fs, encrypted).await.expect("an undisturbed life");
    assert!(calls.len() > 5, "{calls:?}");
    for (index, call) in calls.iter().enumerate() {
        for how in ["fail", "after", "killed"] {
            let rig = with_cut(index + 1, how).await;
            let lived = live(&rig, fs, encrypted).await;
            let after = lived.unwrap_or_else(|broken| panic!("{fs}, call {index} `{call}`, {how}: {broken}"));
            let formats =
                after.iter().filter(|call| call.starts_with("mkfs") && call.contains("/fd/0")).count();
            assert!(formats <= 2, "{fs}, call {index} `{call}`, {how}: {after:#?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p5_an_ext4_comes_to_the_same_end_whichever_tool_fails() {
    cut_every_tool("ext4", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p5_an_encrypted_xfs_comes_to_the_same_end_whichever_tool_fails() {
    cut_every_tool("xfs", true).await;
}
