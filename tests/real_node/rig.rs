//! Loop devices of this machine as the rig of the scenarios: loop devices that look like SCSI disks in a sysfs and dev tree of their own.
//!
//! Writes to `delete`, `rescan` and `scan` take effect a few milliseconds later, as in the kernel. Everything that a rig makes it
//! takes away when it is dropped; no device that it did not make is touched.

use std::{
    fs, io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use proxmox_csi::{
    host::{
        Host,
        linux::{LinuxHost, LinuxOptions},
    },
    node::{MountPath, Node},
    types::Wwn,
};
use rustix::fs::{FileType, Mode, major, makedev, minor, mknodat};
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::node_suite::{KEY, Rig, Volume, node_options};

/// Loop devices of this machine.
pub(crate) struct Loops {
    pub(crate) root: PathBuf,
    node: Node,
    host: Arc<LinuxHost>,
    linux: LinuxOptions,
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

impl Loops {
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
        let state = State { root: root.clone(), disks: Vec::new(), next: 0, mappings: Vec::new() };
        let state = Arc::new(Mutex::new(state));
        let watched = Arc::clone(&state);
        let effects = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                watched.lock().expect("no test panics here").take_effect();
            }
        });
        let host = Arc::new(LinuxHost::new(options.clone()));
        let rig = Self {
            node: Node::new(Arc::<LinuxHost>::clone(&host), node_options()),
            host,
            root,
            linux: options,
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

    /// What cryptsetup was called with, a call in each line.
    fn cryptsetup_calls(&self) -> String {
        fs::read_to_string(self.root.join("cryptsetup.log")).unwrap_or_default()
    }

    /// The node of the disk of a volume, as the kernel has it.
    pub(crate) fn device(&self, volume: &Volume) -> PathBuf {
        let state = self.state();
        let disk = state.disks.iter().find(|disk| disk.volume == volume.handle).expect("it is attached");
        disk.plugged.as_ref().expect("the kernel has it").1.clone()
    }

    /// The file with what a volume holds.
    pub(crate) fn image(&self, volume: &Volume) -> PathBuf {
        self.root.join(format!("{}.img", volume.name))
    }

    fn open_image(&self, volume: &Volume) -> fs::File {
        fs::File::options().read(true).write(true).open(self.image(volume)).expect("the image")
    }

    /// The directory of the disk of a volume in sysfs.
    pub(crate) fn scsi(&self, volume: &Volume) -> PathBuf {
        let state = self.state();
        let disk = state.disks.iter().find(|disk| disk.volume == volume.handle).expect("it is attached");
        state.scsi(disk.lun)
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

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no test panics here")
    }
}

impl Rig for Loops {
    type Copy = PathBuf;
    type Holder = Holder;

    async fn new() -> Self {
        Self::with(Turn::Shared { _guard: TURNS.read().await })
    }

    async fn alone() -> Self {
        Self::with(Turn::Alone { _guard: TURNS.write().await })
    }

    fn node(&self) -> &Node {
        &self.node
    }

    fn host(&self) -> Arc<dyn Host> {
        Arc::<LinuxHost>::clone(&self.host)
    }

    fn restarted(&self) -> Node {
        Node::new(Arc::new(LinuxHost::new(self.linux.clone())), node_options())
    }

    fn path(&self, name: &str) -> MountPath {
        MountPath::new(self.root.join(name).to_str().expect("a path in UTF-8")).expect("a legal path")
    }

    fn attach(&self, name: &str, lun: u8, size: u64) -> Volume {
        let volume = self.attach_unseen(name, lun, size);
        self.state().plug(lun);
        volume
    }

    fn attach_unseen(&self, name: &str, lun: u8, size: u64) -> Volume {
        let volume = Volume::new(name, lun, size, self.path(&format!("staging/{name}")));
        let image = self.image(&volume);
        let file = fs::File::options().create(true).append(true).open(&image).expect("an image");
        file.set_len(size).expect("it can have that size");
        let wwn = volume.published.wwn;
        self.state().disks.push(Disk { volume: volume.handle.clone(), lun, wwn, image, plugged: None });
        volume
    }

    fn detach(&self, volume: &Volume) {
        let mut state = self.state();
        let index = state.disks.iter().position(|disk| disk.volume == volume.handle).expect("it is attached");
        state.unplug(index);
        state.disks.remove(index);
    }

    fn resize(&self, volume: &Volume, size: u64) {
        self.open_image(volume).set_len(size).expect("it can have that size");
    }

    fn rename(&self, volume: &Volume, wwn: Wwn) {
        let mut state = self.state();
        let disk = state.disks.iter_mut().find(|disk| disk.volume == volume.handle).expect("it is attached");
        disk.wwn = wwn;
        let lun = disk.lun;
        state.answer(lun);
    }

    fn write_protect(&self, volume: &Volume) {
        run("blockdev", &["--setro", self.device(volume).to_str().expect("UTF-8")]);
        fs::write(self.root.join("sys/block").join(self.disk_of(volume)).join("ro"), "1\n").expect("a file");
    }

    fn set_state(&self, volume: &Volume, state: &str) {
        fs::write(self.scsi(volume).join("state"), format!("{state}\n")).expect("a file");
    }

    fn list_size(&self, volume: &Volume, size: u64) {
        let file = self.root.join("sys/block").join(self.disk_of(volume)).join("size");
        fs::write(file, format!("{}\n", size / 512)).expect("a file");
    }

    /// A loop device whose file ends early answers with EIO behind that end.
    fn break_from(&self, volume: &Volume, offset: u64) {
        self.open_image(volume).set_len(offset).expect("it can have that size");
    }

    fn disk_of(&self, volume: &Volume) -> String {
        let state = self.state();
        let disk = state.disks.iter().find(|disk| disk.volume == volume.handle).expect("it is attached");
        disk.plugged.as_ref().expect("the kernel has it").0.clone()
    }

    fn move_node(&self, name: &str, to: &str) {
        let dev = self.root.join("dev");
        fs::rename(dev.join(name), dev.join(to)).expect("the tree is writable");
    }

    fn kernel_disks(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.join("sys/block")).expect("the tree is there");
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect()
    }

    fn mapped(&self) -> Vec<String> {
        self.state().mappings.iter().map(|mapping| mapping.name.clone()).collect()
    }

    fn is_free(&self, volume: &Volume) -> bool {
        run("losetup", &["--associated", self.image(volume).to_str().expect("UTF-8")]).is_empty()
    }

    fn mounts_below(&self, path: &MountPath) -> Vec<String> {
        mounts_below(path.as_path())
    }

    fn may_grow_ext4(&self) -> bool {
        let status = fs::read_to_string("/proc/self/status").expect("our own status");
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("what we may do");
        let capabilities = u64::from_str_radix(effective.trim(), 16).expect("hex");
        // CAP_SYS_RESOURCE
        capabilities >> 24 & 1 == 1
    }

    fn poke(&self, volume: &Volume, offset: u64, bytes: &[u8]) {
        self.open_image(volume).write_all_at(bytes, offset).expect("it can be written");
    }

    fn peek(&self, volume: &Volume, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.open_image(volume).read_exact_at(&mut bytes, offset).expect("it can be read");
        bytes
    }

    fn is_blank(&self, volume: &Volume) -> bool {
        fs::read(self.image(volume)).expect("the image").iter().all(|byte| *byte == 0)
    }

    fn copy(&self, volume: &Volume) -> PathBuf {
        let (image, copy) = (self.image(volume), self.root.join(format!("{}.copy", volume.name)));
        run("cp", &["--sparse=always", image.to_str().expect("UTF-8"), copy.to_str().expect("UTF-8")]);
        copy
    }

    fn is_same(&self, volume: &Volume, copy: &PathBuf) -> bool {
        let images = [self.image(volume), copy.clone()];
        Command::new("cmp").arg("--quiet").args(images).status().expect("cmp runs").success()
    }

    fn put_back(&self, volume: &Volume, copy: PathBuf) {
        fs::rename(copy, self.image(volume)).expect("a file");
    }

    fn mkfs(&self, volume: &Volume, fs: &str) {
        let image = self.image(volume);
        let image = image.to_str().expect("UTF-8");
        match fs {
            "ext4" => drop(run("mkfs.ext4", &["-q", "-e", "remount-ro", image])),
            fs => drop(run(&format!("mkfs.{fs}"), &["-q", image])),
        }
    }

    fn damage(&self, volume: &Volume, fs: &str, beyond: bool, marked: bool) {
        let image = self.image(volume);
        let image = image.to_str().expect("UTF-8");
        if fs == "xfs" {
            // Of the root inode the kernel reads a checksum that is wrong.
            let root = run("xfs_db", &["-r", "-c", "sb 0", "-c", "p rootino", image]);
            let inode = format!("inode {}", root.trim().rsplit(' ').next().expect("a number"));
            run("xfs_db", &["-x", "-c", &inode, "-c", "write -c core.magic 0", image]);
            return;
        }
        // Free blocks that are miscounted; or the root directory is gone, which takes a person's answer.
        let request = if beyond { "clri <2>" } else { "set_super_value free_blocks_count 7" };
        run("debugfs", &["-w", "-R", request, image]);
        if marked {
            run("debugfs", &["-w", "-R", "set_super_value state 2", image]);
        }
    }

    fn is_clean(&self, volume: &Volume) -> bool {
        let state = run("dumpe2fs", &["-h", self.image(volume).to_str().expect("UTF-8")]);
        state.contains("Filesystem state:         clean\n")
    }

    fn encrypt(&self, volume: &Volume) {
        let (image, key) = (self.image(volume), self.root.join("key"));
        fs::write(&key, KEY).expect("a file");
        let fixed = ["luksFormat", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        let files = ["--key-file", key.to_str().expect("UTF-8"), image.to_str().expect("UTF-8")];
        run("cryptsetup", &[&fixed[..], &files[..]].concat());
    }

    /// What cryptsetup itself says of a passphrase.
    fn opens(&self, volume: &Volume, passphrase: &str) -> bool {
        let mut child = Command::new("cryptsetup")
            .args(["open", "--test-passphrase", "--key-file", "-"])
            .arg(self.image(volume))
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("cryptsetup runs");
        let mut stdin = child.stdin.take().expect("a pipe");
        io::Write::write_all(&mut stdin, passphrase.as_bytes()).expect("it listens");
        drop(stdin);
        child.wait().expect("it ends").success()
    }

    fn inspect_encrypted(&self, volume: &Volume, staged: bool) {
        if staged {
            // By this path the driver before this one closes it, should it take over again.
            let table = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
            let line = table.lines().find(|line| line.contains(&volume.staging.to_string()));
            assert!(line.is_some_and(|line| line.contains("/dev/mapper/proxmox-csi-3c5")), "{line:?}");
            return;
        }
        let dump = run("cryptsetup", &["luksDump", self.image(volume).to_str().expect("UTF-8")]);
        for line in
            ["Version:       \t2", "Subsystem:     \tproxmox-csi", "Iterations: 1000", "aes-xts-plain64"]
        {
            assert!(dump.contains(line), "{dump}");
        }
        let calls = self.cryptsetup_calls();
        assert!(calls.contains("luksFormat"), "{calls}");
        assert!(!calls.contains("s3cret") && !calls.contains("phrase "), "{calls}");
    }

    fn write(&self, directory: &MountPath, text: &str) -> io::Result<()> {
        fs::write(directory.as_path().join("data"), text)
    }

    fn read(&self, directory: &MountPath) -> io::Result<String> {
        fs::read_to_string(directory.as_path().join("data"))
    }

    fn write_disk(&self, path: &MountPath, offset: u64, bytes: &[u8]) -> io::Result<()> {
        fs::File::options().write(true).open(path.as_path())?.write_all_at(bytes, offset)
    }

    fn exists(&self, path: &MountPath) -> bool {
        path.as_path().exists()
    }

    fn sync(&self) {
        run("sync", &[]);
    }

    fn make_directory(&self, path: &MountPath) {
        fs::create_dir_all(path.as_path()).expect("a directory");
    }

    fn link(&self, path: &MountPath, to: &MountPath) {
        std::os::unix::fs::symlink(to.as_path(), path.as_path()).expect("a link");
    }

    fn mount_tmpfs(&self, path: &MountPath) {
        run("mount", &["-t", "tmpfs", "tmpfs", &path.to_string()]);
    }

    fn bind(&self, from: &MountPath, to: &MountPath) {
        run("mount", &["--bind", &from.to_string(), &to.to_string()]);
    }

    fn unmount(&self, path: &MountPath) {
        run("umount", &[&path.to_string()]);
    }

    fn set_shared(&self, path: &MountPath, shared: bool) {
        let how = if shared { "--make-shared" } else { "--make-private" };
        run("mount", &[how, &path.to_string()]);
    }

    async fn hold_all_mounts(&self) -> Holder {
        let holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sleep", "60"])
            .spawn()
            .expect("unshare runs");
        let namespace = || fs::read_link(format!("/proc/{}/ns/mnt", holder.id())).ok();
        let ours = fs::read_link("/proc/self/ns/mnt").ok();
        while namespace() == ours {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Holder(holder)
    }

    fn fail_filesystem(&self, volume: &Volume, fs: &str) {
        if fs == "xfs" {
            run("xfs_io", &["-x", "-c", "shutdown", &volume.staging.to_string()]);
            return;
        }
        let device = self.device(volume);
        let name = device.file_name().expect("a name").to_str().expect("UTF-8");
        fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "on purpose").expect("the kernel has it");
    }

    async fn open_as_before(&self, volume: &Volume) {
        let key = self.root.join("key");
        fs::write(&key, KEY).expect("a file");
        let script = format!(
            "DM_DISABLE_UDEV=1 {root}/tools/cryptsetup open --key-file - {device} {disk}-encrypted <{root}/key",
            root = self.root.display(),
            device = self.device(volume).display(),
            disk = self.disk_of(volume),
        );
        tokio::process::Command::new("bash").args(["-c", &script]).status().await.expect("bash runs");
        let nodes = fs::read_dir(self.root.join("dev")).expect("the tree is there");
        let mut paths = nodes.map(|node| node.expect("an entry").path());
        let mapped = paths.find(|path| path.to_string_lossy().contains("/dm-")).expect("there is a mapping");
        self.make_directory(&volume.staging);
        run("mount", &[mapped.to_str().expect("UTF-8"), &volume.staging.to_string()]);
        fs::write(self.root.join("keyring"), "").expect("a file");
    }
}

/// A process in another mount namespace.
pub(crate) struct Holder(std::process::Child);

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().expect("it can be killed");
        self.0.wait().expect("and reaped");
    }
}

impl Drop for Loops {
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
