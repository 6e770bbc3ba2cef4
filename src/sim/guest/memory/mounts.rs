//! The mount table: mounting, binding, unmounting, and what shared mounts pass on to their peers
//! (Linux `Documentation/filesystems/sharedsubtree.rst`).

use std::io::Result;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::device::Device;
use super::files::{DEV_FS, FileSystem, FsId, Namespace, Spot};
use super::kernel::Kernel;
use super::ondisk::{self, Entry};
use crate::host::{Condition, DeviceNumber, FsKind, Mount, MountOptions};

/// A mount.
#[derive(Debug, Clone)]
pub(super) struct Mounted {
    pub(super) id: u64,
    pub(super) parent: u64,
    pub(super) peers: Option<u64>,
    pub(super) fs: FsId,
    pub(super) root: PathBuf,
    pub(super) target: PathBuf,
    pub(super) readonly: bool,
    /// The device whose node is mounted: the node stays as long as the mount does, also when the device goes.
    pub(super) node: Option<DeviceNumber>,
    /// The name of the node that it was mounted from.
    pub(super) source: String,
}

/// What came of one try to unmount.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unmounted {
    Gone,
    Busy,
}

impl Kernel {
    /// The mount table as the node plugin reads it.
    pub(super) fn table(&self) -> Vec<Mount> {
        self.own()
            .iter()
            .filter_map(|mount| Some(self.line(mount, self.filesystems.get(&mount.fs)?)))
            .collect()
    }

    fn line(&self, mount: &Mounted, fs: &FileSystem) -> Mount {
        // Of a btrfs the table has a number that no device has; a reader takes that of the node it was mounted from.
        let of_node = self.node(&mount.source).filter(|_| fs.name == "btrfs");
        Mount {
            id: mount.id,
            parent: mount.parent,
            peers: mount.peers,
            number: of_node.unwrap_or(fs.number),
            root: mount.root.clone(),
            target: mount.target.clone(),
            readonly: mount.readonly,
            fs: fs.name.clone(),
            condition: match fs.condition {
                Condition::Writable if fs.readonly => Condition::Readonly,
                condition => condition,
            },
        }
    }

    /// The number of the device of what is mounted at a place, as a reader of the table takes it.
    pub(super) fn number_at(&self, spot: &Spot) -> Result<DeviceNumber> {
        let mount = self.mounted(spot.mount)?;
        Ok(self.line(mount, self.fs_of(spot)?).number)
    }

    /// Puts a mount at a place of another, and at the same place of that one's peers.
    fn attach(&mut self, mut mount: Mounted, at: &Spot) -> Result<()> {
        let parent = self.mounted(at.mount)?.clone();
        if parent.peers.is_some() && mount.peers.is_none() {
            self.last_peers += 1;
            mount.peers = Some(self.last_peers);
        }
        let peers = peers_of(self.own(), &parent);
        let places = peers.into_iter().filter_map(|peer| Some((peer.id, place_of(&peer, &at.inner)?)));
        let copies: Vec<(u64, PathBuf)> = places.collect();
        let all = [(parent.id, at.path.clone())].into_iter().chain(copies);
        for (parent, target) in all {
            let table = &mut self.namespaces[0];
            let id = free_id(table);
            table.push(Mounted { id, parent, target, ..mount.clone() });
        }
        Ok(())
    }

    /// The place at which something is to be mounted.
    fn mount_point(&self, target: &Path, wanted: &Entry) -> Result<Spot> {
        let spot = self.walk(target, true)?;
        let is = self.entry(&spot)?;
        match (wanted, &is) {
            (Entry::Directory, Entry::Directory) => Ok(spot),
            (Entry::File(_), Entry::File(_)) if self.node_at(&spot).is_none() => Ok(spot),
            _ => Err(Errno::NOTDIR.into()),
        }
    }

    /// Mounts the file system on a device; nothing is mounted where it fails.
    pub(super) fn mount(
        &mut self,
        device: &Arc<Device>,
        target: &Path,
        options: &MountOptions,
    ) -> Result<()> {
        let at = self.mount_point(target, &Entry::Directory)?;
        let fs = self.superblock(device, options)?;
        let mount = Mounted {
            id: 0,
            parent: 0,
            peers: None,
            fs,
            root: "/".into(),
            target: PathBuf::new(),
            readonly: options.readonly,
            node: None,
            source: device.name.clone(),
        };
        self.attach(mount, &at)
    }

    /// The file system on a device, read from it where it is not mounted yet.
    fn superblock(&mut self, device: &Arc<Device>, options: &MountOptions) -> Result<FsId> {
        if !device.is_there() {
            return Err(Errno::NXIO.into());
        }
        let of = |fs: &FileSystem| fs.device.as_ref().is_some_and(|own| Arc::ptr_eq(own, device));
        if let Some((id, fs)) = self.filesystems.iter().find(|(_, fs)| of(fs)) {
            let same = fs.name == options.kind.as_str() && fs.readonly == options.readonly;
            return if same { Ok(*id) } else { Err(Errno::BUSY.into()) };
        }
        if !self.holders(device).is_empty() {
            return Err(Errno::BUSY.into());
        }
        if device.is_readonly() && !options.readonly {
            return Err(Errno::ACCESS.into());
        }
        let found = ondisk::read(&**device)?.filter(|found| found.kind == options.kind);
        let found = found.ok_or(Errno::INVAL)?;
        let twin = self.filesystems.values().any(|fs| fs.device.is_some() && fs.uuid == found.uuid);
        match found.kind {
            FsKind::Xfs if twin && !options.flags.iter().any(|flag| flag == "nouuid") => {
                return Err(Errno::INVAL.into());
            }
            FsKind::Btrfs if twin => return Err(Errno::EXIST.into()),
            _ => {}
        }
        if found.size > device.size() {
            return Err(Errno::INVAL.into());
        }
        let whole = found.body.ok().filter(|body| !body.damaged && !found.unfinished);
        let body = whole.ok_or(Errno::UCLEAN)?;
        if body.dirty && device.is_readonly() {
            return Err(Errno::ROFS.into());
        }
        self.last_fs += 1;
        let id = self.last_fs;
        let number = match found.kind {
            FsKind::Btrfs => DeviceNumber { major: 0, minor: u32::try_from(30 + id).unwrap_or(u32::MAX) },
            FsKind::Ext4 | FsKind::Xfs => device.number,
        };
        let mut fs = FileSystem {
            device: Some(Arc::clone(device)),
            name: found.kind.to_string(),
            number,
            readonly: options.readonly,
            condition: Condition::Writable,
            size: found.size,
            uuid: found.uuid,
            errors: body.errors,
            tree: body.tree,
            unsynced: false,
        };
        // From now on there is a log to replay, unless it is unmounted.
        fs.write_out(true)?;
        self.filesystems.insert(id, fs);
        Ok(id)
    }

    /// Mounts a file system in memory by another hand.
    pub(super) fn mount_tmpfs(&mut self, target: &Path) -> Result<()> {
        let at = self.mount_point(target, &Entry::Directory)?;
        self.last_fs += 1;
        let (id, minor) = (self.last_fs, u32::try_from(30 + self.last_fs).unwrap_or(u32::MAX));
        let tmpfs = FileSystem {
            device: None,
            name: "tmpfs".to_owned(),
            number: DeviceNumber { major: 0, minor },
            readonly: false,
            condition: Condition::Writable,
            size: 1 << 30,
            uuid: uuid::Uuid::nil(),
            errors: false,
            tree: ondisk::Tree::new(),
            unsynced: false,
        };
        self.filesystems.insert(id, tmpfs);
        let mount = Mounted {
            id: 0,
            parent: 0,
            peers: None,
            fs: id,
            root: "/".into(),
            target: PathBuf::new(),
            readonly: false,
            node: None,
            source: "tmpfs".to_owned(),
        };
        self.attach(mount, &at)
    }

    /// Makes what is at one place appear at another; `None` for the device: whatever is there. `Ok(false)`: it is on another device.
    pub(super) fn bind(
        &mut self,
        source: &Path,
        device: Option<DeviceNumber>,
        target: &Path,
        readonly: bool,
    ) -> Result<bool> {
        let from = self.walk(source, true)?;
        if device.is_some_and(|device| self.number_at(&from).ok() != Some(device)) {
            return Ok(false);
        }
        let at = self.mount_point(target, &Entry::Directory)?;
        let mount = self.mounted(from.mount)?.clone();
        let readonly = readonly || mount.readonly;
        self.attach(Mounted { root: from.inner, readonly, ..mount }, &at)?;
        Ok(true)
    }

    /// Makes a device's node appear at a file.
    pub(super) fn bind_node(&mut self, device: &Arc<Device>, target: &Path) -> Result<()> {
        if !device.is_there() {
            return Err(Errno::NXIO.into());
        }
        let at = self.mount_point(target, &Entry::File(Vec::new()))?;
        let dev = self.own().iter().find(|mount| mount.fs == DEV_FS).cloned().ok_or(Errno::NOENT)?;
        let root = Path::new("/").join(&device.name);
        self.attach(Mounted { root, node: Some(device.number), source: device.name.clone(), ..dev }, &at)
    }

    /// Takes the topmost mount at a path away, and what was passed on of it to peers.
    pub(super) fn unmount(&mut self, target: &Path) -> Result<Unmounted> {
        let spot = match self.walk(target, false) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Unmounted::Gone),
            spot => spot?,
        };
        let mount = self.mounted(spot.mount)?.clone();
        if mount.target != spot.path || mount.parent == 0 {
            return Ok(Unmounted::Gone);
        }
        let has_children = |table: &Namespace, id: u64| table.iter().any(|other| other.parent == id);
        if has_children(self.own(), mount.id) || self.held.contains(&mount.target) {
            return Ok(Unmounted::Busy);
        }
        let parent = self.mounted(mount.parent)?.clone();
        let mut gone = vec![mount.id];
        if let Some(inner) = inner_of(&parent, &mount.target) {
            for peer in peers_of(self.own(), &parent) {
                let Some(place) = place_of(&peer, &inner) else { continue };
                let same = |other: &&Mounted| {
                    (other.parent, &other.target, other.fs, &other.root)
                        == (peer.id, &place, mount.fs, &mount.root)
                };
                let copy = self.own().iter().rev().find(same).map(|copy| copy.id);
                gone.extend(copy.filter(|id| !has_children(self.own(), *id)));
            }
        }
        self.namespaces[0].retain(|mount| !gone.contains(&mount.id));
        self.drop_unused();
        Ok(Unmounted::Gone)
    }

    /// File systems that are mounted nowhere any more are written out and go.
    pub(super) fn drop_unused(&mut self) {
        let used = |id: &FsId| self.namespaces.iter().flatten().any(|mount| mount.fs == *id);
        let unused: Vec<FsId> = self.filesystems.keys().filter(|id| !used(id)).copied().collect();
        for id in unused {
            if let Some(mut fs) = self.filesystems.remove(&id)
                && fs.condition == Condition::Writable
            {
                // What a dead disk does not take is lost, and nobody is told: umount(2) succeeds.
                let _ = fs.write_out(false);
            }
        }
    }

    /// Another mount namespace with all that is mounted now; returns its number.
    pub(super) fn leak_namespace(&mut self) -> usize {
        let copy = self.own().iter().map(|mount| Mounted { peers: None, ..mount.clone() }).collect();
        self.namespaces.push(copy);
        self.namespaces.len() - 1
    }

    /// The last process of a namespace ends.
    pub(super) fn end_namespace(&mut self, number: usize) {
        if let Some(namespace) = self.namespaces.get_mut(number).filter(|_| number > 0) {
            namespace.clear();
            self.drop_unused();
        }
    }

    /// The namespaces beside ours that have a device mounted.
    pub(super) fn foreign_holders(&self, device: &Arc<Device>) -> Vec<usize> {
        let of = |mount: &Mounted| {
            let fs = self.filesystems.get(&mount.fs);
            fs.and_then(|fs| fs.device.as_ref()).is_some_and(|own| Arc::ptr_eq(own, device))
        };
        let others = self.namespaces.iter().enumerate().skip(1);
        others.filter(|(_, mounts)| mounts.iter().any(of)).map(|(number, _)| number).collect()
    }

    /// Makes the mount at a path pass on what happens below it, or not.
    pub(super) fn set_shared(&mut self, target: &Path, shared: bool) -> Result<()> {
        let id = self.walk(target, true)?.mount;
        self.last_peers += 1;
        let fresh = self.last_peers;
        let mount = self.namespaces[0].iter_mut().find(|mount| mount.id == id).ok_or(Errno::INVAL)?;
        mount.peers = if shared { mount.peers.or(Some(fresh)) } else { None };
        Ok(())
    }
}

/// The lowest id that no mount has.
fn free_id(table: &Namespace) -> u64 {
    (1..u64::MAX).find(|id| !table.iter().any(|mount| mount.id == *id)).unwrap_or(u64::MAX)
}

/// The other mounts of the same part of a file system that hear of what happens in this one.
fn peers_of(table: &Namespace, of: &Mounted) -> Vec<Mounted> {
    let peer = |other: &&Mounted| other.id != of.id && other.peers == of.peers && other.fs == of.fs;
    if of.peers.is_none() { Vec::new() } else { table.iter().filter(peer).cloned().collect() }
}

/// Where a place of a file system is seen through a mount of it.
fn place_of(mount: &Mounted, inner: &Path) -> Option<PathBuf> {
    let rest = inner.strip_prefix(&mount.root).ok()?;
    Some(if rest.as_os_str().is_empty() { mount.target.clone() } else { mount.target.join(rest) })
}

/// The place in the file system of what is at a path below a mount.
fn inner_of(mount: &Mounted, path: &Path) -> Option<PathBuf> {
    let rest = path.strip_prefix(&mount.target).ok()?;
    Some(if rest.as_os_str().is_empty() { mount.root.clone() } else { mount.root.join(rest) })
}
