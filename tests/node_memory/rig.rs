//! A machine in memory as the rig of the scenarios.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use proxmox_csi::{
    host::{FsKind, Host},
    node::{MountPath, Node},
    sim::{
        Image,
        guest::memory::{self, Drive, Machine},
    },
    types::Wwn,
};

use crate::node_suite::{KEY, Rig, Volume, node_options};

/// A machine whose root is a private mount, as where the tests on loop devices run.
pub(crate) type Memory = Rigged<false>;
/// A machine whose root is a shared mount, as systemd makes it: mounts pass on what happens below them.
pub(crate) type SharedRoot = Rigged<true>;

/// A machine, and what its volumes hold.
pub(crate) struct Rigged<const SHARED: bool> {
    pub(crate) machine: Machine,
    node: Node,
    disks: Mutex<BTreeMap<String, Contents>>,
}

/// What a volume holds, its size, and the slot it is in.
#[derive(Clone)]
struct Contents {
    image: Image,
    size: u64,
    slot: u32,
}

impl<const SHARED: bool> Rigged<SHARED> {
    fn contents(&self, volume: &Volume) -> Contents {
        self.disks
            .lock()
            .expect("no test panics here")
            .get(&volume.name)
            .expect("a volume of the rig")
            .clone()
    }

    fn slot(&self, volume: &Volume) -> u32 {
        self.contents(volume).slot
    }

    /// What a volume holds, and its size.
    pub(crate) fn image(&self, volume: &Volume) -> (Image, u64) {
        let Contents { image, size, .. } = self.contents(volume);
        (image, size)
    }

    fn keep(&self, name: &str, lun: u8, size: u64) -> (Volume, Drive) {
        let volume = Volume::new(name, lun, size, self.path(&format!("staging/{name}")));
        let slot = u32::from(lun);
        let mut disks = self.disks.lock().expect("no test panics here");
        let kept =
            disks.entry(name.to_owned()).or_insert_with(|| Contents { image: Image::default(), size, slot });
        (kept.size, kept.slot) = (size, slot);
        let wwn = u64::from_str_radix(volume.published.wwn.to_string().trim_start_matches("0x"), 16).ok();
        (volume, Drive { image: kept.image.clone(), size, wwn, readonly: false })
    }
}

/// A namespace that goes with this.
pub(crate) struct Holder(Machine, usize);

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.end_namespace(self.1);
    }
}

impl<const SHARED: bool> Rig for Rigged<SHARED> {
    type Copy = Image;
    type Holder = Holder;

    async fn new() -> Self {
        let machine = Machine::new(None).patient_for(Duration::from_millis(500));
        machine.make_directory("/var/lib/node".as_ref()).expect("a directory");
        let node = Node::new(Arc::new(machine.clone()), node_options());
        let rig = Self { machine, node, disks: Mutex::default() };
        rig.machine.set_shared("/".as_ref(), SHARED).expect("the root is there");
        rig
    }

    async fn alone() -> Self {
        Self::new().await
    }

    fn node(&self) -> &Node {
        &self.node
    }

    fn host(&self) -> Arc<dyn Host> {
        Arc::new(self.machine.clone())
    }

    fn restarted(&self) -> Node {
        Node::new(self.host(), node_options())
    }

    fn path(&self, name: &str) -> MountPath {
        MountPath::new(&format!("/var/lib/node/{name}")).expect("a legal path")
    }

    fn attach(&self, name: &str, lun: u8, size: u64) -> Volume {
        let (volume, drive) = self.keep(name, lun, size);
        self.machine.plug(u32::from(lun), drive);
        volume
    }

    fn attach_unseen(&self, name: &str, lun: u8, size: u64) -> Volume {
        let (volume, drive) = self.keep(name, lun, size);
        self.machine.plug_quietly(u32::from(lun), drive);
        volume
    }

    fn detach(&self, volume: &Volume) {
        self.machine.unplug(self.slot(volume));
    }

    fn resize(&self, volume: &Volume, size: u64) {
        self.machine.resize(self.slot(volume), size);
        self.disks.lock().expect("no test panics here").get_mut(&volume.name).expect("a volume").size = size;
    }

    fn rename(&self, volume: &Volume, wwn: Wwn) {
        self.machine.rename(self.slot(volume), wwn);
    }

    fn write_protect(&self, volume: &Volume) {
        self.machine.write_protect(self.slot(volume));
    }

    fn set_state(&self, volume: &Volume, state: &str) {
        self.machine.set_state(self.slot(volume), state);
    }

    fn list_size(&self, volume: &Volume, size: u64) {
        self.machine.list_size(self.slot(volume), Some(size));
    }

    fn break_from(&self, volume: &Volume, offset: u64) {
        self.machine.break_at(self.slot(volume), offset..u64::MAX);
    }

    fn disk_of(&self, volume: &Volume) -> String {
        self.machine.name_in_slot(self.slot(volume)).expect("the kernel has it")
    }

    fn move_node(&self, name: &str, to: &str) {
        self.machine.move_node(name, Some(to));
    }

    fn kernel_disks(&self) -> Vec<String> {
        self.machine.disk_names()
    }

    fn mapped(&self) -> Vec<String> {
        self.machine.mapping_names()
    }

    fn is_free(&self, volume: &Volume) -> bool {
        self.machine.name_in_slot(self.slot(volume)).is_none()
    }

    fn mounts_below(&self, path: &MountPath) -> Vec<String> {
        let targets = self.machine.table().into_iter().map(|mount| mount.target);
        let below = targets.filter(|target| target.starts_with(path.as_path()));
        below.map(|target| target.display().to_string()).collect()
    }

    fn may_grow_ext4(&self) -> bool {
        true
    }

    fn poke(&self, volume: &Volume, offset: u64, bytes: &[u8]) {
        self.image(volume).0.write(bytes, offset);
    }

    fn peek(&self, volume: &Volume, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.image(volume).0.read(&mut bytes, offset);
        bytes
    }

    fn is_blank(&self, volume: &Volume) -> bool {
        self.image(volume).0.is_blank()
    }

    fn copy(&self, volume: &Volume) -> Image {
        self.image(volume).0.snapshot()
    }

    fn is_same(&self, volume: &Volume, copy: &Image) -> bool {
        self.image(volume).0.is_same(copy)
    }

    fn put_back(&self, volume: &Volume, copy: Image) {
        self.image(volume).0.restore(&copy);
    }

    fn mkfs(&self, volume: &Volume, fs: &str) {
        let (image, size) = self.image(volume);
        memory::Volume::make(&image, size, fs.parse().expect("a file system")).expect("it is large enough");
    }

    fn damage(&self, volume: &Volume, _: &str, beyond: bool, marked: bool) {
        let (image, size) = self.image(volume);
        memory::Volume::damage(&image, size, beyond, marked).expect("there is a file system");
    }

    fn is_clean(&self, volume: &Volume) -> bool {
        let (image, size) = self.image(volume);
        memory::Volume::read(&image, size).is_some_and(|found| found.kind == FsKind::Ext4 && !found.dirty)
    }

    fn encrypt(&self, volume: &Volume) {
        let (image, size) = self.image(volume);
        memory::Volume::encrypt(&image, size, KEY.as_bytes(), false).expect("it is large enough");
    }

    fn opens(&self, volume: &Volume, passphrase: &str) -> bool {
        let (image, size) = self.image(volume);
        memory::Volume::opens(&image, size, passphrase.as_bytes())
    }

    fn inspect_encrypted(&self, volume: &Volume, _: bool) {
        let (image, size) = self.image(volume);
        assert_eq!(memory::Volume::read(&image, size), None, "nothing is in plain text on the disk");
    }

    fn write(&self, directory: &MountPath, text: &str) -> io::Result<()> {
        self.machine.write(&directory.as_path().join("data"), text.as_bytes())
    }

    fn read(&self, directory: &MountPath) -> io::Result<String> {
        let bytes = self.machine.read(&directory.as_path().join("data"))?;
        Ok(String::from_utf8(bytes).expect("text"))
    }

    fn write_disk(&self, path: &MountPath, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.machine.write_device(path.as_path(), bytes, offset)
    }

    fn exists(&self, path: &MountPath) -> bool {
        self.machine.has(path.as_path())
    }

    fn sync(&self) {
        self.machine.sync_all();
    }

    fn make_directory(&self, path: &MountPath) {
        self.machine.make_directory(path.as_path()).expect("a directory");
    }

    fn link(&self, path: &MountPath, to: &MountPath) {
        self.machine.link(path.as_path(), to.as_path()).expect("a link");
    }

    fn mount_tmpfs(&self, path: &MountPath) {
        self.machine.mount_tmpfs(path.as_path()).expect("a mount");
    }

    fn bind(&self, from: &MountPath, to: &MountPath) {
        self.machine.bind_by_hand(from.as_path(), to.as_path()).expect("a mount");
    }

    fn unmount(&self, path: &MountPath) {
        assert!(self.machine.unmount_by_hand(path.as_path()).expect("a mount"), "nobody uses it");
    }

    fn set_shared(&self, path: &MountPath, shared: bool) {
        self.machine.set_shared(path.as_path(), shared).expect("a mount");
    }

    async fn hold_all_mounts(&self) -> Holder {
        Holder(self.machine.clone(), self.machine.leak_namespace())
    }

    fn fail_filesystem(&self, volume: &Volume, fs: &str) {
        self.machine.fail_filesystem(volume.staging.as_path(), fs == "xfs").expect("it is mounted");
    }

    async fn open_as_before(&self, volume: &Volume) {
        let disk = self.disk_of(volume);
        let mapping = format!("{disk}-encrypted");
        assert!(self.machine.unlock_by_hand(&disk, KEY.as_bytes(), &mapping), "the key is the volume's");
        self.make_directory(&volume.staging);
        self.machine.mount_by_hand("dm-0", volume.staging.as_path(), FsKind::Xfs).expect("a mount");
        self.machine.use_keyring();
    }
}
