//! A machine for the tests: loop devices that look like SCSI disks in a sysfs and dev tree of their own.
//!
//! Writes to `delete`, `rescan` and `scan` take effect a few milliseconds later, as in the kernel. Everything that a rig makes it
//! takes away when it is dropped; no device that it did not make is touched.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use proxmox_csi::{
    host::{
        linux::{LinuxHost, LinuxOptions},
        luks::{KeyCost, Passphrase, Pbkdf},
    },
    node::{Access, MountFlags, MountPath, Node, NodeOptions, Publish, Stage, Unpublish, Unstage},
    types::{
        Bytes, ScsiSlot, VolumeHandle, Wwn,
        params::FilesystemOptions,
        publish::{Contents, PublishedDisk},
        sharing::Sharing,
    },
};
use rustix::fs::{FileType, Mode, major, makedev, minor, mknodat};
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) struct Rig {
    pub(crate) root: PathBuf,
    pub(crate) node: Node,
    pub(crate) linux: LinuxOptions,
    pub(crate) options: NodeOptions,
    state: Arc<Mutex<State>>,
    effects: tokio::task::JoinHandle<()>,
    // Dropped last and in this order: the next test begins when all is gone.
    _directory: tempfile::TempDir,
    _turn: Turn,
}

static TURNS: RwLock<()> = RwLock::const_new(());

enum Turn {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

struct State {
    root: PathBuf,
    disks: Vec<Disk>,
    next: u8,
    mappings: Vec<Mapping>,
}

struct Disk {
    volume: String,
    lun: u8,
    wwn: Wwn,
    image: PathBuf,
    /// The kernel's name and the loop device, while the kernel has it.
    plugged: Option<(String, PathBuf)>,
}

/// What stands for a mapping: a loop device over the data of an encrypted disk.
struct Mapping {
    name: String,
    /// The kernel's name and the loop device.
    dm: String,
    device: PathBuf,
    /// The claim of the disk, as device mapper has it.
    _claim: fs::File,
}

impl Rig {
    /// A machine beside those of other tests.
    pub(crate) async fn new() -> Self {
        Self::with(Turn::Shared { _guard: TURNS.read().await })
    }

    /// A machine while there is no other: for tests that copy the mount namespace, and with it what others mounted.
    pub(crate) async fn alone() -> Self {
        Self::with(Turn::Alone { _guard: TURNS.write().await })
    }

    fn with(turn: Turn) -> Self {
        assert_private_namespace();
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path().to_owned();
        for path in [
            "sys/block",
            "sys/devices",
            "sys/class/scsi_host/host2",
            "sys/bus/pci",
            "dev/mapper",
            "tools",
            "mapped",
        ] {
            fs::create_dir_all(root.join(path)).expect("the tree can be made");
        }
        for (path, text) in [("scan", ""), ("proc_name", "virtio_scsi\n")] {
            fs::write(root.join("sys/class/scsi_host/host2").join(path), text).expect("a file");
        }
        fs::write(root.join("sys/bus/pci/rescan"), "").expect("a file");
        let mut options = LinuxOptions {
            sysfs_root: root.join("sys"),
            dev_root: root.join("dev"),
            busy_timeout: Duration::from_millis(500),
            ..LinuxOptions::default()
        };
        options.tool_directories.insert(0, root.join("tools"));
        let mut node = NodeOptions::new("node-1");
        node.find_timeout = Duration::from_secs(3);
        node.size_timeout = Duration::from_secs(3);
        node.key_cost = KeyCost { pbkdf: Pbkdf::Pbkdf2, iterations: Some(1000), ..KeyCost::default() };
        let state = State { root: root.clone(), disks: Vec::new(), next: 0, mappings: Vec::new() };
        let state = Arc::new(Mutex::new(state));
        let watched = Arc::clone(&state);
        let effects = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                watched.lock().expect("no test panics here").take_effect();
            }
        });
        let rig = Self {
            node: Node::new(Arc::new(LinuxHost::new(options.clone())), node.clone()),
            root,
            linux: options,
            options: node,
            state,
            effects,
            _directory: directory,
            _turn: turn,
        };
        rig.tool(
            "cryptsetup",
            &include_str!("cryptsetup.sh").replace("@ROOT@", rig.root.to_str().expect("UTF-8")),
        );
        rig
    }

    /// Puts a script in the place of a tool.
    pub(crate) fn tool(&self, name: &str, script: &str) {
        let path = self.root.join("tools").join(name);
        fs::write(&path, script).expect("a file");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it can be run");
    }

    /// The node after a restart of its process.
    pub(crate) fn restarted(&self) -> Node {
        Node::new(Arc::new(LinuxHost::new(self.linux.clone())), self.options.clone())
    }

    /// The names of the open mappings.
    pub(crate) fn mapped(&self) -> Vec<String> {
        self.state().mappings.iter().map(|mapping| mapping.name.clone()).collect()
    }

    /// What cryptsetup was called with, a call in each line.
    pub(crate) fn cryptsetup_calls(&self) -> String {
        fs::read_to_string(self.root.join("cryptsetup.log")).unwrap_or_default()
    }

    /// The node of the disk of a volume, as the kernel has it.
    pub(crate) fn device(&self, volume: &Volume) -> PathBuf {
        let state = self.state();
        let disk = state.disks.iter().find(|disk| disk.volume == volume.handle).expect("it is attached");
        disk.plugged.as_ref().expect("the kernel has it").1.clone()
    }

    /// A volume of zeros that the hypervisor has plugged in; the kernel has it as well.
    pub(crate) fn attach(&self, name: &str, lun: u8, size: u64) -> Volume {
        let volume = self.attach_unseen(name, lun, size);
        self.state().plug(lun);
        volume
    }

    /// A volume that the hypervisor has plugged in and the kernel never heard of.
    pub(crate) fn attach_unseen(&self, name: &str, lun: u8, size: u64) -> Volume {
        let volume = format!("region//rbd/vm-9999-{name}");
        let handle: VolumeHandle = volume.parse().expect("a handle");
        let wwn = Wwn::of_volume(&handle.region, None, &handle.volid);
        let image = self.root.join(format!("{name}.img"));
        let file = fs::File::options().create(true).append(true).open(&image).expect("an image");
        file.set_len(size).expect("it can have that size");
        let disk = Disk { volume: volume.clone(), lun, wwn, image: image.clone(), plugged: None };
        self.state().disks.push(disk);
        let published = PublishedDisk {
            wwn,
            slot: ScsiSlot::new(lun),
            size: Some(Bytes::new(size)),
            contents: Contents::Blank,
        };
        Volume { handle: volume, published, image, staging: self.path(&format!("staging/{name}")) }
    }

    /// The hypervisor takes the disk away, whatever the guest does with it.
    pub(crate) fn detach(&self, volume: &Volume) {
        let mut state = self.state();
        let index = state.disks.iter().position(|disk| disk.volume == volume.handle).expect("it is attached");
        state.unplug(index);
        state.disks.remove(index);
    }

    /// Makes a disk answer another name.
    pub(crate) fn rename(&self, volume: &Volume, wwn: Wwn) {
        let mut state = self.state();
        let disk = state.disks.iter_mut().find(|disk| disk.volume == volume.handle).expect("it is attached");
        disk.wwn = wwn;
        let lun = disk.lun;
        state.answer(lun);
    }

    /// Mounts a disk by another hand and takes it off the list of SCSI disks; returns its number.
    pub(crate) fn mount_elsewhere(&self, volume: &Volume, target: &MountPath) -> String {
        let mut state = self.state();
        let disk = state.disks.iter_mut().find(|disk| disk.volume == volume.handle).expect("it is attached");
        let (name, device) = disk.plugged.as_ref().expect("the kernel has it");
        run("mount", &[device.to_str().expect("UTF-8"), &target.to_string()]);
        let block = self.root.join("sys/block").join(name);
        let number = fs::read_to_string(block.join("dev")).expect("its number");
        fs::remove_dir_all(block).expect("the tree is writable");
        number.trim().to_owned()
    }

    /// The disk takes no writes any more.
    pub(crate) fn write_protect(&self, volume: &Volume) {
        let state = self.state();
        let disk = state.disks.iter().find(|disk| disk.volume == volume.handle).expect("it is attached");
        let (name, device) = disk.plugged.as_ref().expect("the kernel has it");
        run("blockdev", &["--setro", device.to_str().expect("UTF-8")]);
        fs::write(self.root.join("sys/block").join(name).join("ro"), "1\n").expect("a file");
    }

    /// The kernel puts the disk at a LUN in a state.
    pub(crate) fn set_state(&self, lun: u8, state: &str) {
        fs::write(self.state().scsi(lun).join("state"), format!("{state}\n")).expect("a file");
    }

    /// The names of the disks that the kernel has.
    pub(crate) fn kernel_disks(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.join("sys/block")).expect("the tree is there");
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect()
    }

    pub(crate) fn path(&self, name: &str) -> MountPath {
        MountPath::new(self.root.join(name).to_str().expect("a path in UTF-8")).expect("a legal path")
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no test panics here")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.effects.abort();
        for target in mounts_below(&self.root).iter().rev() {
            run("umount", &[target]);
        }
        if let Ok(mut state) = self.state.lock() {
            for mapping in state.mappings.drain(..) {
                run("losetup", &["--detach", mapping.device.to_str().expect("UTF-8")]);
            }
            for index in 0..state.disks.len() {
                state.unplug(index);
            }
        }
    }
}

impl State {
    fn plug(&mut self, lun: u8) {
        let Some(index) = self.disks.iter().position(|disk| disk.lun == lun && disk.plugged.is_none()) else {
            return;
        };
        let name = format!("sd{}", char::from(b'a' + self.next));
        self.next += 1;
        let device = run("losetup", &["--find", "--show", self.disks[index].image.to_str().expect("UTF-8")]);
        // The mark of `write_protect` outlives a detach, should a test have been killed before it took it back.
        run("blockdev", &["--setrw", device.trim()]);
        let device = PathBuf::from(device.trim());
        let rdev = fs::metadata(&device).expect("the loop device").rdev();
        let (block, scsi) = (self.root.join("sys/block").join(&name), self.scsi(lun));
        fs::create_dir_all(&scsi).expect("the tree is writable");
        fs::create_dir_all(&block).expect("the tree is writable");
        for (file, text) in [("delete", ""), ("rescan", ""), ("state", "running\n")] {
            fs::write(scsi.join(file), text).expect("a file");
        }
        fs::write(block.join("dev"), format!("{}:{}\n", major(rdev), minor(rdev))).expect("a file");
        fs::write(block.join("ro"), "0\n").expect("a file");
        self.disks[index].plugged = Some((name.clone(), device));
        self.answer(lun);
        self.measure(index);
        let node = self.root.join("dev").join(&name);
        let number = makedev(major(rdev), minor(rdev));
        mknodat(rustix::fs::CWD, &node, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, number)
            .expect("a node");
        // Last, so that nobody finds half a disk.
        std::os::unix::fs::symlink(&scsi, block.join("device")).expect("a link");
    }

    fn answer(&self, lun: u8) {
        let disk = self.disks.iter().find(|disk| disk.lun == lun && disk.plugged.is_some());
        let Some(disk) = disk else { return };
        let hex = disk.wwn.to_string();
        let bytes = (2..18).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex"));
        let mut page = b"\x00\x83\x00\x0c\x01\x03\x00\x08".to_vec();
        page.extend(bytes);
        fs::write(self.scsi(lun).join("wwid"), disk.wwn.wwid() + "\n").expect("a file");
        fs::write(self.scsi(lun).join("vpd_pg83"), page).expect("a file");
    }

    fn measure(&self, index: usize) {
        let Some((name, device)) = &self.disks[index].plugged else { return };
        run("losetup", &["--set-capacity", device.to_str().expect("UTF-8")]);
        let size: u64 = run("blockdev", &["--getsize64", device.to_str().expect("UTF-8")])
            .trim()
            .parse()
            .expect("a size");
        let file = self.root.join("sys/block").join(name).join("size");
        // At once, as the kernel does it: nobody reads half a size.
        let new = self.root.join(format!("{name}.size"));
        fs::write(&new, format!("{}\n", size / 512)).expect("a file");
        fs::rename(new, file).expect("the tree is writable");
    }

    fn scsi(&self, lun: u8) -> PathBuf {
        self.root.join(format!("sys/devices/2:0:0:{lun}"))
    }

    fn unplug(&mut self, index: usize) {
        let lun = self.disks[index].lun;
        let Some((name, device)) = self.disks[index].plugged.take() else { return };
        let _ = fs::remove_dir_all(self.root.join("sys/block").join(&name));
        let _ = fs::remove_dir_all(self.scsi(lun));
        let _ = fs::remove_file(self.root.join("dev").join(&name));
        let device = device.to_str().expect("UTF-8");
        // A write protection outlives the detach: the next user of the loop device, in whatever process, would have it.
        run("blockdev", &["--setrw", device]);
        run("losetup", &["--detach", device]);
    }

    /// Does what the script in the place of cryptsetup asks for.
    fn map(&mut self, asked: &str) {
        let words: Vec<&str> = asked.split_whitespace().collect();
        let block = self.root.join("sys/block");
        match words[..] {
            ["open", name, number, offset] => {
                let disk = self.disks.iter().find_map(|disk| {
                    let (sd, device) = disk.plugged.as_ref()?;
                    let own = fs::read_to_string(block.join(sd).join("dev")).ok()?;
                    (own.trim() == number).then(|| (sd.clone(), device.clone()))
                });
                let (sd, under) = disk.expect("the disk is plugged in");
                let claim =
                    fs::File::options().read(true).custom_flags(0o200).open(&under).expect("nobody has it");
                let args = ["--find", "--show", "--offset", offset, under.to_str().expect("UTF-8")];
                let device = PathBuf::from(run("losetup", &args).trim());
                let rdev = fs::metadata(&device).expect("the loop device").rdev();
                let dm = format!("dm-{}", self.next);
                self.next += 1;
                let tree = block.join(&dm);
                for directory in ["dm", "slaves"] {
                    fs::create_dir_all(tree.join(directory)).expect("the tree is writable");
                }
                let size = run("blockdev", &["--getsz", device.to_str().expect("UTF-8")]);
                for (file, text) in [
                    ("dev", format!("{}:{}\n", major(rdev), minor(rdev))),
                    ("ro", "0\n".to_owned()),
                    ("size", size),
                    ("dm/name", format!("{name}\n")),
                    ("dm/uuid", format!("CRYPT-LUKS2-0123-{name}\n")),
                ] {
                    fs::write(tree.join(file), text).expect("a file");
                }
                std::os::unix::fs::symlink(block.join(&sd), tree.join("slaves").join(&sd)).expect("a link");
                fs::create_dir_all(block.join(&sd).join("holders").join(&dm)).expect("the tree is writable");
                let number = makedev(major(rdev), minor(rdev));
                for node in [&dm, &format!("mapper/{name}")] {
                    let node = self.root.join("dev").join(node);
                    mknodat(rustix::fs::CWD, &node, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, number)
                        .expect("a node");
                }
                fs::write(self.root.join("mapped").join(name), "").expect("a file");
                self.mappings.push(Mapping { name: name.to_owned(), dm, device, _claim: claim });
            }
            ["close", name] => {
                let index =
                    self.mappings.iter().position(|mapping| mapping.name == name).expect("it is open");
                let mapping = self.mappings.remove(index);
                run("losetup", &["--detach", mapping.device.to_str().expect("UTF-8")]);
                fs::remove_dir_all(block.join(&mapping.dm)).expect("the tree is writable");
                for node in [&mapping.dm, &format!("mapper/{name}")] {
                    fs::remove_file(self.root.join("dev").join(node)).expect("the tree is writable");
                }
                for disk in self.disks.iter().filter_map(|disk| disk.plugged.as_ref()) {
                    let _ = fs::remove_dir(block.join(&disk.0).join("holders").join(&mapping.dm));
                }
                fs::remove_file(self.root.join("mapped").join(name)).expect("the tree is writable");
            }
            ["resize", name] => {
                let mapping = self.mappings.iter().find(|mapping| mapping.name == name).expect("it is open");
                let device = mapping.device.to_str().expect("UTF-8");
                run("losetup", &["--set-capacity", device]);
                let size = run("blockdev", &["--getsz", device]);
                fs::write(block.join(&mapping.dm).join("size"), size).expect("a file");
            }
            _ => panic!("`{asked}` is nothing to ask for"),
        }
    }

    /// What was written to the files takes effect.
    fn take_effect(&mut self) {
        let asked = self.root.join("asked");
        if let Ok(text) = fs::read_to_string(&asked) {
            fs::remove_file(asked).expect("the tree is writable");
            self.map(&text);
            fs::write(self.root.join("answered"), "").expect("the tree is writable");
        }
        let scan = self.root.join("sys/class/scsi_host/host2/scan");
        for line in taken(&scan).lines() {
            let lun = line.strip_prefix("0 0 ").unwrap_or_else(|| panic!("`{line}` is no scan of one LUN"));
            self.plug(lun.parse().expect("a LUN"));
        }
        for index in 0..self.disks.len() {
            if self.disks[index].plugged.is_none() {
                continue;
            }
            let scsi = self.scsi(self.disks[index].lun);
            if !taken(&scsi.join("delete")).is_empty() {
                self.unplug(index);
            } else if !taken(&scsi.join("rescan")).is_empty() {
                self.measure(index);
            }
        }
    }
}

/// What was written to a file, which is empty then.
fn taken(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    if !text.is_empty() {
        fs::write(path, "").expect("a file of the rig");
    }
    text
}

/// A volume as a caller knows it.
#[derive(Clone)]
pub(crate) struct Volume {
    pub(crate) handle: String,
    pub(crate) published: PublishedDisk,
    pub(crate) image: PathBuf,
    pub(crate) staging: MountPath,
}

impl Volume {
    /// The hypervisor grows the disk; the kernel learns of it when it asks.
    pub(crate) fn resize(&self, size: u64) {
        let file = fs::File::options().write(true).open(&self.image).expect("the image");
        file.set_len(size).expect("it can have that size");
    }

    pub(crate) fn stage(&self, fs: &str) -> Stage {
        Stage {
            volume: self.handle.clone(),
            staging: self.staging.clone(),
            disk: self.published.clone(),
            access: filesystem(fs),
            sharing: Sharing::OneNode,
            options: FilesystemOptions::default(),
            key: None,
        }
    }

    pub(crate) fn stage_encrypted(&self, fs: &str, passphrase: &str) -> Stage {
        Stage { key: Some(Passphrase::new(passphrase)), ..self.stage(fs) }
    }

    pub(crate) fn stage_block(&self) -> Stage {
        Stage { access: Access::Block, ..self.stage("ext4") }
    }

    pub(crate) fn publish(&self, target: &MountPath) -> Publish {
        Publish {
            volume: self.handle.clone(),
            staging: self.staging.clone(),
            target: target.clone(),
            disk: self.published.clone(),
            access: filesystem("ext4"),
            sharing: Sharing::OneNode,
            readonly: false,
            encrypted: false,
        }
    }

    pub(crate) fn unpublish(&self, target: &MountPath) -> Unpublish {
        Unpublish { volume: self.handle.clone(), target: target.clone() }
    }

    pub(crate) fn unstage(&self) -> Unstage {
        Unstage { volume: self.handle.clone(), staging: self.staging.clone() }
    }

    pub(crate) fn staged_file(&self, name: &str) -> PathBuf {
        self.staging.as_path().join(name)
    }
}

pub(crate) fn filesystem(fs: &str) -> Access {
    Access::Filesystem { kind: Some(fs.parse().expect("a file system")), flags: MountFlags::default() }
}

/// Runs a tool that must succeed; returns what it printed.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().unwrap_or_else(|error| panic!("`{tool}`: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{tool} {}` failed: {said}", args.join(" "));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The mounts below a directory, in the order of mounting.
pub(crate) fn mounts_below(root: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
    let targets = table.lines().filter_map(|line| line.split(' ').nth(4));
    targets.filter(|target| Path::new(target).starts_with(root)).map(str::to_owned).collect()
}

/// These tests mount; they must not do so where the rest of the machine sees it.
fn assert_private_namespace() {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/mnt")).ok();
    assert!(
        namespace("self").is_some() && namespace("self") != namespace("1"),
        "these tests mount disks and need root and a mount namespace of their own; run them with\n    \
         unshare --mount --propagation private cargo test --test real_node"
    );
}
