//! Encrypted volumes: headers and passphrases by the real cryptsetup; what would be a mapping is a loop device over the data (see
//! `cryptsetup.sh`), since not every kernel that runs these tests has device mapper.

use std::{
    fs,
    os::unix::fs::{FileExt as _, FileTypeExt as _},
    path::Path,
    process::{Command, Stdio},
};

use proxmox_csi::{
    csi::{
        node::NodeService,
        proto::{self, node_server::Node as _},
    },
    host::{
        error::FormatError,
        luks::{GrowMappingError, Passphrase},
    },
    node::{Access, Expand, ExpandError, Publish, PublishError, StageError, Stats, UnstageError},
    runtime::Operations,
    types::{Bytes, publish::Contents},
};
use tonic::{Code, Status};

use crate::{
    growth::{expand, size_of},
    rig::{MIB, Rig, mounts_below, run},
};

/// Every byte counts: also the one that would end a line or a C string.
const KEY: &str = "s3cret\npass\0phrase ";

/// What cryptsetup itself says of a passphrase.
fn opens(image: &Path, passphrase: &str) -> bool {
    let mut child = Command::new("cryptsetup")
        .args(["open", "--test-passphrase", "--key-file", "-"])
        .arg(image)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("cryptsetup runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    std::io::Write::write_all(&mut stdin, passphrase.as_bytes()).expect("it listens");
    drop(stdin);
    child.wait().expect("it ends").success()
}

/// Writes a header by hand.
fn encrypt(image: &Path, more: &[&str]) {
    let key = image.with_extension("key");
    fs::write(&key, KEY).expect("a file");
    let fixed = ["luksFormat", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let files = ["--key-file", key.to_str().expect("UTF-8"), image.to_str().expect("UTF-8")];
    run("cryptsetup", &[&fixed, more, &files].concat());
}

/// Puts something on the image at a path.
type Write = fn(&str);

fn is_blank(image: &Path) -> bool {
    fs::read(image).expect("the image").iter().all(|byte| *byte == 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn p9_an_encrypted_volume_lives_with_its_passphrase_on_no_command_line() {
    let rig = Rig::new().await;
    for (lun, fs) in [(1, "ext4"), (2, "xfs"), (3, "btrfs")] {
        let volume = rig.attach(&format!("pvc-{lun}"), lun, 512 * MIB);
        let target = rig.path(&format!("pods/{lun}/mount"));
        for _ in 0..2 {
            rig.node.stage(&volume.stage_encrypted(fs, KEY)).await.expect("it is staged");
            rig.node.publish(&volume.publish(&target)).await.expect("it is published");
        }
        fs::write(target.as_path().join("data"), "mine").expect("it takes writes");
        assert_eq!(rig.mapped().len(), 1, "{fs}");
        // By this path the driver before this one closes it, should it take over again.
        let table = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
        let staged = table.lines().find(|line| line.contains(&volume.staging.to_string()));
        assert!(staged.is_some_and(|line| line.contains("/dev/mapper/proxmox-csi-3c5")), "{fs}: {staged:?}");
        rig.node.unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
        rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
        assert!(rig.mapped().is_empty() && rig.kernel_disks().is_empty(), "{fs}: nothing stays open");

        assert!(opens(&volume.image, KEY) && !opens(&volume.image, KEY.trim_end()), "{fs}: byte for byte");
        let dump = run("cryptsetup", &["luksDump", volume.image.to_str().expect("UTF-8")]);
        for line in
            ["Version:       \t2", "Subsystem:     \tproxmox-csi", "Iterations: 1000", "aes-xts-plain64"]
        {
            assert!(dump.contains(line), "{fs}: {dump}");
        }
        rig.node.stage(&volume.stage_encrypted(fs, KEY)).await.expect("it is opened and not formatted");
        assert_eq!(fs::read_to_string(volume.staged_file("data")).expect("the data"), "mine");
        rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    }
    let calls = rig.cryptsetup_calls();
    assert_eq!(calls.lines().filter(|call| call.starts_with("luksFormat")).count(), 3, "{calls}");
    assert!(!calls.contains("s3cret") && !calls.contains("phrase "), "{calls}");
    assert!(mounts_below(&rig.root).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_passphrase_is_unauthenticated_and_leaves_nothing() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node.stage(&volume.stage_encrypted("ext4", KEY)).await.expect("it is staged");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    let wrong = rig.node.stage(&volume.stage_encrypted("ext4", "guess")).await.expect_err("it is wrong");
    let status = Status::from(wrong);
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(!status.message().contains("guess"), "{status}");
    let missing = Status::from(rig.node.stage(&volume.stage("ext4")).await.expect_err("there is none"));
    assert_eq!(missing.code(), Code::FailedPrecondition);
    assert!(missing.message().contains("node-stage-secret-name") && !missing.message().contains("wipe"));
    assert!(rig.mapped().is_empty() && mounts_below(&rig.root).is_empty());
    rig.node.stage(&volume.stage_encrypted("ext4", KEY)).await.expect("it is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn p9_an_empty_passphrase_is_none() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let service = NodeService::new(rig.node.clone(), Operations::default());
    let secrets = [("encryption-passphrase".to_owned(), String::new())].into();
    let request = proto::NodeStageVolumeRequest { secrets, ..crate::stage_request(&volume, "ext4") };
    let refused = service.node_stage_volume(tonic::Request::new(request)).await.expect_err("it is refused");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(is_blank(&volume.image), "nothing was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_volume_that_holds_anything_is_never_encrypted() {
    let rig = Rig::new().await;
    let size = 256 * MIB;
    let cases: [(&str, Write); 4] = [
        ("a file system in plain text", |path| drop(run("mkfs.ext4", &["-q", path]))),
        ("swap", |path| drop(run("mkswap", &[path]))),
        ("a byte in the head", |path| write(path, 5 * MIB + 1, b"x")),
        ("a byte in the tail", |path| write(path, 256 * MIB - 1, b"x")),
    ];
    for (index, (what, prepare)) in cases.iter().enumerate() {
        let volume = rig.attach_unseen(&format!("pvc-{index}"), 1, size);
        let image = volume.image.to_str().expect("UTF-8");
        prepare(image);
        let copy = format!("{image}.copy");
        run("cp", &["--sparse=always", image, &copy]);
        let refused = rig.node.stage(&volume.stage_encrypted("ext4", KEY)).await;
        assert!(
            matches!(refused, Err(StageError::Refused { .. } | StageError::Format(_))),
            "{what}: {refused:?}"
        );
        run("cmp", &[image, &copy]);
        rig.detach(&volume);
    }
    for contents in [Contents::Unwiped, Contents::Unknown] {
        let mut volume = rig.attach("pvc-9", 9, size);
        volume.published.contents = contents;
        let refused = rig.node.stage(&volume.stage_encrypted("ext4", KEY)).await;
        assert!(matches!(refused, Err(StageError::Refused { .. })), "{refused:?}");
        assert!(is_blank(&volume.image));
        rig.detach(&volume);
    }
    assert!(rig.mapped().is_empty());
}

fn write(path: &str, offset: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(path).expect("the image");
    file.write_all_at(bytes, offset).expect("it can be written");
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_what_is_inside_is_formatted_only_while_nothing_was_written_through_the_mapping() {
    let rig = Rig::new().await;
    // Cut off between the header and the file system.
    let volume = rig.attach_unseen("pvc-1", 1, 512 * MIB);
    encrypt(&volume.image, &[]);
    rig.node.stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it goes on where it was");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");

    // Written to, if only noise: the first place that is read, and one that is a sample.
    for (lun, place) in [(2, 16 * MIB), (3, 512 * MIB - 1), (4, 16 * MIB + 128 * MIB)] {
        let volume = rig.attach_unseen(&format!("pvc-{lun}"), lun, 512 * MIB);
        encrypt(&volume.image, &[]);
        write(volume.image.to_str().expect("UTF-8"), place, b"x");
        let refused = rig.node.stage(&volume.stage_encrypted("xfs", KEY)).await;
        let not_blank = matches!(refused, Err(StageError::Format(FormatError::NotBlank { .. })));
        assert!(not_blank, "{place}: {refused:?}");
        assert!(rig.mapped().is_empty(), "a stage that fails leaves nothing open");
    }

    // Allocated blank by nobody's word.
    let mut volume = rig.attach_unseen("pvc-5", 5, 512 * MIB);
    encrypt(&volume.image, &[]);
    volume.published.contents = Contents::Unknown;
    let refused = rig.node.stage(&volume.stage_encrypted("xfs", KEY)).await;
    assert!(matches!(refused, Err(StageError::Refused { .. })), "{refused:?}");
    assert!(rig.mapped().is_empty() && mounts_below(&rig.root).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_raw_block_volume_is_its_mapping() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 64 * MIB);
    let target = rig.path("pods/1/volume");
    let stage = proxmox_csi::node::Stage { access: Access::Block, ..volume.stage_encrypted("ext4", KEY) };
    let publish = Publish { access: Access::Block, encrypted: true, ..volume.publish(&target) };
    let early = rig.node.publish(&publish).await;
    assert!(matches!(early, Err(PublishError::Locked { .. })), "{early:?}");
    for _ in 0..2 {
        rig.node.stage(&stage).await.expect("it is staged");
        rig.node.publish(&publish).await.expect("it is published");
    }
    assert!(fs::metadata(target.as_path()).expect("it is there").file_type().is_block_device());
    let inside = 48 * MIB;
    assert_eq!(rig.node.stats(&target).await.expect("it is there"), Stats::Block(Bytes::new(inside)));
    let file = fs::File::options().write(true).open(target.as_path()).expect("it opens");
    file.write_all_at(b"raw", 4096).expect("it takes writes");
    drop(file);
    volume.resize(128 * MIB);
    let size = rig.node.expand(&expand(&volume, &target, 128 * MIB)).await.expect("it has grown");
    assert_eq!(size, Bytes::new(128 * MIB));
    let now = rig.node.stats(&target).await.expect("it is there");
    assert_eq!(now, Stats::Block(Bytes::new(inside + 64 * MIB)));

    let used = rig.node.unstage(&volume.unstage()).await;
    assert!(matches!(used, Err(UnstageError::Published { .. })), "{used:?}");
    rig.node.unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.mapped().is_empty() && rig.kernel_disks().is_empty());
    let mut bytes = [0; 3];
    let image = fs::File::open(&volume.image).expect("the image");
    image.read_exact_at(&mut bytes, 16 * MIB + 4096).expect("it can be read");
    assert_eq!(&bytes, b"raw", "behind the header");

    // Without its key it is not given away as a raw disk, which a pod would write over.
    let mut back = volume.clone();
    back.published.size = None;
    let plain = rig.node.stage(&back.stage_block()).await;
    assert!(matches!(plain, Err(StageError::Refused { .. })), "{plain:?}");
    let plain = rig.node.publish(&Publish { access: Access::Block, ..back.publish(&target) }).await;
    assert!(matches!(plain, Err(PublishError::Locked { .. })), "{plain:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pod_encrypts_in_its_raw_block_volume_is_its_own() {
    let rig = Rig::new().await;
    let volume = rig.attach_unseen("pvc-1", 1, 64 * MIB);
    encrypt(&volume.image, &[]);
    let target = rig.path("pods/1/volume");
    rig.node.stage(&volume.stage_block()).await.expect("it is staged");
    rig.node.publish(&Publish { access: Access::Block, ..volume.publish(&target) }).await.expect("as it is");
    assert_eq!(rig.node.stats(&target).await.expect("it is there"), Stats::Block(Bytes::new(64 * MIB)));
    assert!(rig.mapped().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_file_system_grows_online_and_at_stage() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node.stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    let before = size_of(&rig, &volume.staging).await;
    volume.resize(1024 * MIB);
    rig.node.expand(&expand(&volume, &volume.staging, 1024 * MIB)).await.expect("no key is needed");
    let online = size_of(&rig, &volume.staging).await;
    assert!(online > before + 400 * MIB);
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    volume.resize(1536 * MIB);
    rig.node.stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    assert!(size_of(&rig, &volume.staging).await > online + 400 * MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mapping_of_the_driver_before_is_served_grown_and_closed() {
    let rig = Rig::new().await;
    let mut volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node.stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    // As that driver attached, opened and mounted it.
    volume.published.wwn = "0x5056432d49443031".parse().expect("a name");
    volume.published.size = None;
    volume.published.contents = Contents::Unknown;
    rig.rename(&volume, volume.published.wwn);
    rig.node.stage(&volume.stage_block()).await.expect_err("it is found, and encrypted");
    let disk = rig.kernel_disks().pop().expect("the kernel has it");
    let key = rig.root.join("key");
    fs::write(&key, KEY).expect("a file");
    let script = format!(
        "DM_DISABLE_UDEV=1 {root}/tools/cryptsetup open --key-file - {device} {disk}-encrypted <{root}/key",
        root = rig.root.display(),
        device = rig.device(&volume).display(),
    );
    tokio::process::Command::new("bash").args(["-c", &script]).status().await.expect("bash runs");
    assert_eq!(rig.mapped(), [format!("{disk}-encrypted")]);
    let mapped = dm_node(&rig);
    fs::create_dir_all(volume.staging.as_path()).expect("a directory");
    run("mount", &[mapped.to_str().expect("UTF-8"), volume.staging.as_path().to_str().expect("UTF-8")]);

    let target = rig.path("pods/1/mount");
    rig.node.stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged already");
    rig.node.publish(&volume.publish(&target)).await.expect("it is published");
    let before = size_of(&rig, &target).await;
    volume.resize(1024 * MIB);
    fs::write(rig.root.join("keyring"), "").expect("a file");
    let grow = expand(&volume, &target, 1024 * MIB);
    let locked = rig.node.expand(&grow).await;
    let wants = matches!(locked, Err(ExpandError::Mapping(GrowMappingError::Passphrase { .. })));
    assert!(wants, "{locked:?}");
    let grow = Expand { key: Some(Passphrase::new(KEY)), ..grow };
    rig.node.expand(&grow).await.expect("with its key it grows");
    assert!(size_of(&rig, &target).await > before + 400 * MIB);

    rig.node.unpublish(&volume.unpublish(&target)).await.expect("it is unpublished");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    assert!(rig.mapped().is_empty() && rig.kernel_disks().is_empty() && mounts_below(&rig.root).is_empty());
}

fn dm_node(rig: &Rig) -> std::path::PathBuf {
    let nodes = fs::read_dir(rig.root.join("dev")).expect("the tree is there");
    let paths = nodes.map(|node| node.expect("an entry").path());
    let mut dm = paths.filter(|path| path.to_string_lossy().contains("/dm-"));
    dm.next().expect("there is a mapping")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_disk_that_was_pulled_is_staged_again() {
    let rig = Rig::new().await;
    for mounted in [true, false] {
        let volume = rig.attach("pvc-1", 1, 512 * MIB);
        rig.node.stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
        if mounted {
            fs::write(volume.staged_file("data"), "mine").expect("it is mounted");
            run("sync", &[]);
        } else {
            run("umount", &[&volume.staging.to_string()]);
        }
        rig.detach(&volume);
        let back = rig.attach("pvc-1", 1, 512 * MIB);
        rig.node.stage(&back.stage_encrypted("xfs", KEY)).await.expect("what is dead gives way");
        assert_eq!(fs::read_to_string(back.staged_file("data")).expect("the data"), "mine");
        assert_eq!((rig.mapped().len(), mounts_below(&rig.root).len()), (1, 1));
        rig.detach(&back);
        rig.node.unstage(&back.unstage()).await.expect("nothing is left to lose");
        assert!(rig.mapped().is_empty() && mounts_below(&rig.root).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_fails_inside_closes_what_it_opened() {
    let rig = Rig::new().await;
    let volume = rig.attach("pvc-1", 1, 512 * MIB);
    rig.node.stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    rig.node.unstage(&volume.unstage()).await.expect("it is unstaged");
    let other = rig.node.stage(&volume.stage_encrypted("ext4", KEY)).await.expect_err("it holds xfs");
    assert!(Status::from(other).message().contains("`xfs` and `ext4` was asked for"));
    assert!(rig.mapped().is_empty(), "the kubelet never unstages what failed");
    let restarted = rig.restarted();
    restarted.stage(&volume.stage_encrypted("xfs", KEY)).await.expect("it is staged");
    rig.node.unstage(&volume.unstage()).await.expect("whoever staged it");
    assert!(rig.mapped().is_empty());
}
