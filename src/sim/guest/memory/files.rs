//! File systems as the kernel has them, and the way from a path to what is there.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::Result;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::device::{Device, Storage as _};
use super::kernel::Kernel;
use super::mounts::Mounted;
use super::ondisk::{self, Body, Entry, Tree};
use crate::host::{Condition, DeviceNumber, FsKind};

/// Which file system; never used again.
pub(super) type FsId = u64;
/// That of the machine itself, and that with the nodes of devices.
pub(super) const ROOT_FS: FsId = 1;
pub(super) const DEV_FS: FsId = 2;

/// A mount table.
pub(super) type Namespace = Vec<Mounted>;

/// A file system that is mounted somewhere.
#[derive(Debug)]
pub(super) struct FileSystem {
    /// The device; none of one in memory.
    pub(super) device: Option<Arc<Device>>,
    pub(super) name: String,
    pub(super) number: DeviceNumber,
    pub(super) readonly: bool,
    pub(super) condition: Condition,
    pub(super) size: u64,
    pub(super) uuid: uuid::Uuid,
    pub(super) errors: bool,
    pub(super) tree: Tree,
    /// Something was written that the device has not got yet.
    pub(super) unsynced: bool,
}

impl FileSystem {
    fn in_memory(name: &str, minor: u32) -> Self {
        Self {
            device: None,
            name: name.to_owned(),
            number: DeviceNumber { major: 0, minor },
            readonly: false,
            condition: Condition::Writable,
            size: 8 << 30,
            uuid: uuid::Uuid::nil(),
            errors: false,
            tree: Tree::new(),
            unsynced: false,
        }
    }

    /// Refuses what a file system that has shut down, or whose disk is gone, does not do any more.
    pub(super) fn usable(&self) -> Result<()> {
        let dead = self.device.as_ref().is_some_and(|device| !device.answers());
        if dead || self.condition == Condition::ShutDown { Err(Errno::IO.into()) } else { Ok(()) }
    }

    fn writable(&self) -> Result<()> {
        self.usable()?;
        if self.readonly || self.condition != Condition::Writable { Err(Errno::ROFS.into()) } else { Ok(()) }
    }

    /// Gives the device what it has not got yet; `dirty`: it stays mounted.
    pub(super) fn write_out(&mut self, dirty: bool) -> Result<()> {
        let Some(device) = self.device.clone() else { return Ok(()) };
        self.usable()?;
        if device.is_readonly() || self.readonly {
            return Ok(());
        }
        let body = Body { dirty, errors: self.errors, damaged: false, tree: self.tree.clone() };
        ondisk::write_body(&*device, &body)?;
        self.unsynced = false;
        Ok(())
    }

    /// Makes it as large as its device.
    pub(super) fn grow(&mut self) -> Result<()> {
        let Some(device) = self.device.clone() else { return Ok(()) };
        self.writable()?;
        if let Some(found) = ondisk::read(&*device)? {
            ondisk::grow(&*device, &found)?;
            self.size = device.size();
        }
        Ok(())
    }

    pub(super) fn kind(&self) -> Option<FsKind> {
        self.name.parse().ok().filter(|_| !self.name.is_empty())
    }
}

/// What a path leads to.
#[derive(Debug, Clone)]
pub(super) struct Spot {
    /// The id of the mount.
    pub(super) mount: u64,
    /// The place in its file system.
    pub(super) inner: PathBuf,
    /// The path without links.
    pub(super) path: PathBuf,
}

/// How many links a path may lead through (Linux `include/linux/namei.h`, `MAXSYMLINKS`).
const LINKS: u32 = 40;

impl Kernel {
    /// The machine's own file systems, as after it has started.
    pub(super) fn boot(&mut self) {
        let dev = PathBuf::from("/dev");
        let mut root = FileSystem::in_memory("ext4", 1);
        root.tree.insert(dev.clone(), Entry::Directory);
        self.filesystems = BTreeMap::from([(ROOT_FS, root), (DEV_FS, FileSystem::in_memory("devtmpfs", 6))]);
        self.last_fs = self.last_fs.max(DEV_FS);
        self.last_peers = 2;
        let mount = |id, parent, fs, target: PathBuf| Mounted {
            id,
            parent,
            peers: Some(id),
            fs,
            root: "/".into(),
            target,
            readonly: false,
            node: None,
            source: String::new(),
        };
        self.namespaces = vec![vec![mount(1, 0, ROOT_FS, "/".into()), mount(2, 1, DEV_FS, dev)]];
    }

    /// The files of the machine itself, which a restart does not lose.
    pub(super) fn boot_disk(&mut self) -> Tree {
        self.filesystems.get_mut(&ROOT_FS).map(|root| std::mem::take(&mut root.tree)).unwrap_or_default()
    }

    pub(super) fn put_back(&mut self, tree: Tree) {
        if let Some(root) = self.filesystems.get_mut(&ROOT_FS) {
            root.tree = tree;
        }
    }

    pub(super) fn own(&self) -> &Namespace {
        &self.namespaces[0]
    }

    pub(super) fn mounted(&self, id: u64) -> Result<&Mounted> {
        Ok(self.own().iter().find(|mount| mount.id == id).ok_or(Errno::NOENT)?)
    }

    pub(super) fn fs_of(&self, spot: &Spot) -> Result<&FileSystem> {
        let id = self.mounted(spot.mount)?.fs;
        Ok(self.filesystems.get(&id).ok_or(Errno::NOENT)?)
    }

    /// The file system at a place, to be written to.
    fn fs_to_write(&mut self, spot: &Spot) -> Result<&mut FileSystem> {
        let mount = self.mounted(spot.mount)?;
        let (id, readonly) = (mount.fs, mount.readonly);
        let fs = self.filesystems.get_mut(&id).ok_or(Errno::NOENT)?;
        fs.writable()?;
        if readonly { Err(Errno::ROFS.into()) } else { Ok(fs) }
    }

    /// Crosses what is mounted at a place.
    fn cross(&self, spot: &mut Spot) {
        while let Some(over) =
            self.own().iter().rev().find(|mount| mount.parent == spot.mount && mount.target == spot.path)
        {
            spot.mount = over.id;
            spot.inner.clone_from(&over.root);
        }
    }

    /// Follows a path; at its end a link only where it is asked for.
    pub(super) fn walk(&self, path: &Path, follow: bool) -> Result<Spot> {
        let root = self.own().first().ok_or(Errno::NOENT)?;
        let start = Spot { mount: root.id, inner: root.root.clone(), path: "/".into() };
        let mut spot = start.clone();
        let mut links = 0;
        let mut rest: VecDeque<OsString> = names(path);
        while let Some(name) = rest.pop_front() {
            let fs = self.fs_of(&spot)?;
            fs.usable()?;
            if name == ".." {
                return Err(Errno::INVAL.into());
            }
            let is_root = spot.inner == Path::new("/");
            if self.mounted(spot.mount)?.node.is_some()
                || !(is_root || matches!(fs.tree.get(&spot.inner), Some(Entry::Directory)))
            {
                return Err(Errno::NOTDIR.into());
            }
            let inner = spot.inner.join(&name);
            match fs.tree.get(&inner) {
                None => return Err(Errno::NOENT.into()),
                Some(Entry::Link(to)) if follow || !rest.is_empty() => {
                    links += 1;
                    if links > LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let mut way = names(to);
                    way.append(&mut rest);
                    rest = way;
                    if to.is_absolute() {
                        spot = start.clone();
                    }
                }
                Some(_) => {
                    spot = Spot { mount: spot.mount, inner, path: spot.path.join(&name) };
                    self.cross(&mut spot);
                }
            }
        }
        Ok(spot)
    }

    /// What is at a place.
    pub(super) fn entry(&self, spot: &Spot) -> Result<Entry> {
        let fs = self.fs_of(spot)?;
        if spot.inner == Path::new("/") {
            return Ok(Entry::Directory);
        }
        Ok(fs.tree.get(&spot.inner).cloned().ok_or(Errno::NOENT)?)
    }

    /// The directory of a path, which has to be there, and the place of the path in it.
    fn parent_of(&self, path: &Path) -> Result<Spot> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::EXIST.into());
        };
        let parent = self.walk(parent, true)?;
        if self.entry(&parent)? != Entry::Directory {
            return Err(Errno::NOTDIR.into());
        }
        Ok(Spot { mount: parent.mount, inner: parent.inner.join(name), path: parent.path.join(name) })
    }

    /// Makes or replaces what is at a path.
    pub(super) fn put(&mut self, path: &Path, entry: Entry) -> Result<()> {
        let spot = match self.walk(path, true) {
            Ok(spot) => spot,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => self.parent_of(path)?,
            Err(error) => return Err(error),
        };
        let fs = self.fs_to_write(&spot)?;
        if spot.inner == Path::new("/") || fs.tree.get(&spot.inner) == Some(&Entry::Directory) {
            return Err(Errno::ISDIR.into());
        }
        fs.tree.insert(spot.inner, entry);
        fs.unsynced = true;
        Ok(())
    }

    /// Makes a directory with all above it.
    pub(super) fn make_directories(&mut self, path: &Path) -> Result<()> {
        match self.walk(path, true) {
            Ok(spot) if self.entry(&spot)? == Entry::Directory => return Ok(()),
            Ok(_) => return Err(Errno::EXIST.into()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        if let Some(parent) = path.parent() {
            self.make_directories(parent)?;
        }
        let spot = self.parent_of(path)?;
        let fs = self.fs_to_write(&spot)?;
        fs.tree.insert(spot.inner, Entry::Directory);
        fs.unsynced = true;
        Ok(())
    }

    /// Makes an empty file, where there is none.
    pub(super) fn make_file(&mut self, path: &Path) -> Result<()> {
        if let Some(parent) = path.parent() {
            self.make_directories(parent)?;
        }
        match self.walk(path, false) {
            Ok(spot) if matches!(self.entry(&spot), Ok(Entry::File(_))) => Ok(()),
            Ok(_) => Err(Errno::EXIST.into()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.put(path, Entry::File(Vec::new()))
            }
            Err(error) => Err(error),
        }
    }

    /// Removes an empty directory or file. What is mounted on stays.
    pub(super) fn remove(&mut self, path: &Path) -> Result<()> {
        let spot = match self.walk(path, false) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            spot => spot?,
        };
        if self.mounted(spot.mount)?.target == spot.path {
            return Err(Errno::BUSY.into());
        }
        match self.entry(&spot)? {
            Entry::File(bytes) if !bytes.is_empty() => {
                return Err(std::io::Error::other(
                    "it is a file with contents, which this driver did not make",
                ));
            }
            Entry::Directory => {
                let below = |other: &PathBuf| other.starts_with(&spot.inner) && *other != spot.inner;
                if self.fs_of(&spot)?.tree.keys().any(below) {
                    return Err(Errno::NOTEMPTY.into());
                }
            }
            _ => {}
        }
        let fs = self.fs_to_write(&spot)?;
        fs.tree.remove(&spot.inner);
        fs.unsynced = true;
        Ok(())
    }

    /// The device whose node is bound at a path.
    pub(super) fn node_at(&self, spot: &Spot) -> Option<DeviceNumber> {
        self.mounted(spot.mount).ok().filter(|mount| mount.target == spot.path)?.node
    }

    /// Writes to the device whose node is bound at a path.
    pub(super) fn write_device(&self, path: &Path, bytes: &[u8], offset: u64) -> Result<()> {
        let number = self.node_at(&self.walk(path, true)?).ok_or(Errno::NOTBLK)?;
        self.device(number).ok_or(Errno::NXIO)?.write_at(bytes, offset)
    }

    /// Reads a file.
    pub(super) fn read_file(&self, path: &Path) -> Result<Vec<u8>> {
        let spot = self.walk(path, true)?;
        self.fs_of(&spot)?.usable()?;
        match self.entry(&spot)? {
            Entry::File(bytes) => Ok(bytes),
            _ => Err(Errno::ISDIR.into()),
        }
    }
}

/// The names in a path, without the root.
fn names(path: &Path) -> VecDeque<OsString> {
    let name = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(name).collect()
}
