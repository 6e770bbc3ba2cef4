//! Taking a disk out of the kernel: nothing is made of it, nothing holds it, it is written out, it is gone.

use std::{io, path::Path, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    LinuxHost, POLL,
    call::to_its_end,
    device::Device,
    device_of,
    disks::{self, Tree},
    mountinfo,
};
use crate::host::{
    Disk, Host as _, OpenDisk,
    error::{DisksError, PathError, ReleaseError},
};

impl LinuxHost {
    /// [`crate::host::Host::release`].
    pub(super) async fn release_disk(&self, disk: OpenDisk) -> Result<(), ReleaseError> {
        let listed = disk.disk().clone();
        self.unheld(&listed).await?;
        let device = device_of(&disk);
        drop(disk);
        self.flush_and_delete(&listed, device).await?;
        self.gone(&listed).await
    }

    /// [`crate::host::Host::discard`].
    pub(super) async fn discard_disk(&self, disk: &Disk) -> Result<(), ReleaseError> {
        self.unheld(disk).await?;
        let (tree, listed) = (self.tree.clone(), disk.clone());
        let work = move || delete_offline(&tree, &listed);
        let node = self.tree.node(&disk.name);
        let deleted = to_its_end("delete", &node, self.options.call_timeout, work).await;
        let failed = |source| DisksError::Read(self.sysfs_error(source));
        deleted.map_err(failed)??;
        self.gone(disk).await
    }

    /// Refuses a disk that other devices are made of.
    async fn unheld(&self, disk: &Disk) -> Result<(), ReleaseError> {
        let name = disk.name.clone();
        let holders = self.on_tree(move |tree| tree.holders(&name)).await;
        let holders = holders.map_err(|source| DisksError::Read(self.sysfs_error(source)))?;
        if holders.is_empty() {
            return Ok(());
        }
        Err(ReleaseError::Held { name: disk.name.clone(), holders: holders.join(", ") })
    }

    /// Waits until a disk that was deleted is gone.
    async fn gone(&self, disk: &Disk) -> Result<(), ReleaseError> {
        let deadline = Instant::now() + self.options.gone_timeout;
        while self.disks().await?.iter().any(|now| same(now, disk)) {
            if Instant::now() >= deadline {
                let after = self.options.gone_timeout;
                return Err(ReleaseError::Stays { name: disk.name.clone(), after });
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Waits until nothing in the kernel holds the device, flushes it and deletes it. The claim is held meanwhile, so that nothing
    /// can be mounted in between. `Ok` also where the device went by itself.
    async fn flush_and_delete(&self, disk: &Disk, device: Arc<Device>) -> Result<(), ReleaseError> {
        let name = &disk.name;
        let flush = |source| ReleaseError::Flush { name: name.clone(), source };
        let deadline = Instant::now() + self.options.busy_timeout;
        let claim = loop {
            match self.claim(&device).await {
                Ok(claim) => break claim,
                Err(error) if disks::is_gone(&error) => return Ok(()),
                Err(error) if error.kind() != io::ErrorKind::ResourceBusy => return Err(flush(error)),
                Err(_) if Instant::now() < deadline => sleep(POLL).await,
                Err(_) => {
                    let number = disk.number;
                    let holders = self.read("look for holders of", device.node(), move || {
                        mountinfo::foreign_holders(number)
                    });
                    let by = held_by(&holders.await.unwrap_or_default());
                    let after = self.options.busy_timeout;
                    return Err(ReleaseError::Busy { name: name.clone(), after, by });
                }
            }
        };
        let (tree, listed) = (self.tree.clone(), disk.clone());
        let work = move || {
            let present =
                |tree: &Tree| tree.disk(&listed.name).map(|now| now.is_some_and(|now| same(&now, &listed)));
            let flushed = device.flush();
            let delete = |source| ReleaseError::Delete { name: listed.name.clone(), source };
            if !present(&tree).map_err(delete)? {
                // It was taken away meanwhile: there is nothing to flush to.
                return Ok(());
            }
            flushed.map_err(|source| ReleaseError::Flush { name: listed.name.clone(), source })?;
            tree.delete(&listed.name).map_err(delete)?;
            drop((claim, device));
            Ok(())
        };
        let node = self.tree.node(name);
        to_its_end("flush and delete", &node, self.options.flush_timeout, work).await.map_err(flush)?
    }
}

/// In words who has a disk mounted elsewhere; nothing where nobody has.
pub(super) fn held_by(processes: &[u32]) -> String {
    if processes.is_empty() {
        return String::new();
    }
    format!(": mounted in the namespace of process {processes:?}")
}

/// Deletes a disk without a claim, which an offline one grants to nobody: instead it must be offline and mounted nowhere.
fn delete_offline(tree: &Tree, listed: &Disk) -> Result<(), ReleaseError> {
    let name = || listed.name.clone();
    let delete = |source| ReleaseError::Delete { name: name(), source };
    if !tree.disk(&listed.name).map_err(delete)?.is_some_and(|now| same(&now, listed)) {
        return Ok(());
    }
    if !tree.state(&listed.name).map_err(delete)?.is_some_and(|state| disks::is_offline(&state)) {
        return Err(ReleaseError::NotOffline { name: name() });
    }
    let read = |source| delete(PathError { what: "read", path: mountinfo::OURS.into(), source });
    let table = mountinfo::read(Path::new(mountinfo::OURS)).map_err(read)?;
    let ours = mountinfo::mounts(&table).iter().any(|mount| mount.number == listed.number);
    let others = mountinfo::foreign_holders(listed.number);
    if ours || !others.is_empty() {
        return Err(ReleaseError::Busy { name: name(), after: Duration::ZERO, by: held_by(&others) });
    }
    tree.delete(&listed.name).map_err(delete)
}

/// Whether two listings are of one disk.
pub(super) fn same(a: &Disk, b: &Disk) -> bool {
    (&a.name, a.number, a.wwn, a.lun) == (&b.name, b.number, b.wwn, b.lun)
}
