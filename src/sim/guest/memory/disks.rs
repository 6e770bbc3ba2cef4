//! Disks as [`Host`](crate::host::Host) has them: opened, measured, taken out; and mappings, opened and closed.

use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::{Instant, sleep};

use super::Machine;
use super::device::{Device, Pin};
use super::kernel::Kernel;
use super::luks::Refused;
use crate::host::{
    Disk, OpenDisk,
    error::{OpenError, PathError, ReleaseError, ToolError},
    luks::{GrowMappingError, LockError, Mapping, Passphrase, UnlockError},
};
use crate::types::Bytes;

const POLL: Duration = Duration::from_millis(50);

/// What an opened disk of a machine is held by. Every [`OpenDisk`] that reaches it was made by it.
pub(super) fn pin_of(disk: &OpenDisk) -> Arc<Pin> {
    disk.pin().expect("an open disk goes back to the machine that opened it")
}

/// An error of a tool that says this.
pub(super) fn failed(tool: &'static str, said: impl Into<String>) -> ToolError {
    ToolError::Failed { tool, status: "exit status: 1".to_owned(), said: said.into() }
}

fn io(name: &str, what: &'static str, source: std::io::Error) -> OpenError {
    let source = PathError { what, path: format!("/dev/{name}").into(), source };
    OpenError::Io { name: name.to_owned(), source }
}

/// Whether two listings are of one disk.
fn same(a: &Disk, b: &Disk) -> bool {
    (&a.name, a.number, a.wwn, a.lun) == (&b.name, b.number, b.wwn, b.lun)
}

fn is_offline(state: &str) -> bool {
    matches!(state, "offline" | "transport-offline")
}

impl Kernel {
    /// The device behind the node of a name, which has to have the number that sysfs names.
    fn open_node(&self, disk: &Disk) -> Result<Arc<Device>, OpenError> {
        let path = std::path::Path::new("/dev").join(&disk.name);
        let Some(number) = self.node(&disk.name) else {
            return Err(OpenError::NoNode { name: disk.name.clone(), path });
        };
        let device = self.device(number).ok_or_else(|| io(&disk.name, "open", Errno::NXIO.into()))?;
        if number != disk.number {
            return Err(OpenError::Number { path, expected: disk.number, found: number.to_string() });
        }
        Ok(device)
    }

    fn open(&self, disk: &Disk) -> Result<Arc<Device>, OpenError> {
        let name = disk.name.clone();
        match self.disks.get(&name).map(|shown| shown.state.clone()) {
            Some(state) if is_offline(&state) => return Err(OpenError::Offline { name, state }),
            Some(state) if state != "running" => return Err(OpenError::NotRunning { name, state }),
            _ => {}
        }
        let device = self.open_node(disk)?;
        let again = self.listed(&name).ok_or_else(|| io(&name, "read", Errno::NOENT.into()))?;
        if again.wwn != disk.wwn {
            return Err(OpenError::Changed { name, listed: disk.wwn, answered: again.wwn });
        }
        let opened = Bytes::new(device.size());
        if opened != again.size {
            return Err(OpenError::Size { name, opened, listed: again.size });
        }
        Ok(device)
    }
}

impl Machine {
    pub(super) fn open_disk(&self, disk: &Disk) -> Result<OpenDisk, OpenError> {
        let device = self.kernel().open(disk)?;
        Ok(OpenDisk::new(disk.clone(), Arc::new(Pin::new(device))))
    }

    pub(super) fn is_in_use(&self, disk: &OpenDisk) -> Result<bool, OpenError> {
        let pin = pin_of(disk);
        let kernel = self.kernel();
        if !pin.device.is_there() {
            return Err(io(&disk.disk().name, "claim", Errno::NXIO.into()));
        }
        Ok(kernel.is_claimed(&pin.device))
    }

    pub(super) fn measured(&self, disk: &Disk) -> Result<Disk, OpenError> {
        let mut kernel = self.kernel();
        kernel.measure(&disk.name);
        match kernel.listed(&disk.name) {
            Some(now) if same(&now, disk) => Ok(now),
            Some(now) => {
                Err(OpenError::Changed { name: disk.name.clone(), listed: disk.wwn, answered: now.wwn })
            }
            None => Err(io(&disk.name, "write to", Errno::NOENT.into())),
        }
    }

    /// Waits until nothing has the device for itself; what has it, where it does not go. `Ok(false)`: the device went.
    async fn claimed(&self, device: &Arc<Device>) -> Result<bool, String> {
        let deadline = Instant::now() + self.busy_timeout;
        loop {
            {
                let kernel = self.kernel();
                if !device.is_there() {
                    return Ok(false);
                }
                if !kernel.is_claimed(device) {
                    return Ok(true);
                }
                if Instant::now() >= deadline {
                    let others = kernel.foreign_holders(device);
                    return Err(if others.is_empty() {
                        String::new()
                    } else {
                        format!(": mounted in the namespace of process {others:?}")
                    });
                }
            }
            sleep(POLL).await;
        }
    }

    fn unheld(&self, disk: &Disk) -> Result<(), ReleaseError> {
        let kernel = self.kernel();
        let holders =
            kernel.disks.get(&disk.name).map(|shown| kernel.holders(&shown.device)).unwrap_or_default();
        if holders.is_empty() {
            return Ok(());
        }
        Err(ReleaseError::Held { name: disk.name.clone(), holders: holders.join(", ") })
    }

    pub(super) async fn release_disk(&self, disk: OpenDisk) -> Result<(), ReleaseError> {
        let listed = disk.disk().clone();
        self.unheld(&listed)?;
        let device = Arc::clone(&pin_of(&disk).device);
        drop(disk);
        let busy = |by| ReleaseError::Busy { name: listed.name.clone(), after: self.busy_timeout, by };
        if !self.claimed(&device).await.map_err(busy)? {
            return Ok(());
        }
        sleep(POLL).await;
        let mut kernel = self.kernel();
        // In between it may have been pulled, or mounted by another hand: then it stays.
        if kernel.is_claimed(&device) {
            return Err(busy(String::new()));
        }
        if kernel.listed(&listed.name).is_some_and(|now| same(&now, &listed)) && device.is_there() {
            kernel.delete(&listed.name);
        }
        Ok(())
    }

    pub(super) fn discard_disk(&self, disk: &Disk) -> Result<(), ReleaseError> {
        self.unheld(disk)?;
        let mut kernel = self.kernel();
        let name = || disk.name.clone();
        if !kernel.listed(&disk.name).is_some_and(|now| same(&now, disk)) {
            return Ok(());
        }
        let Some(shown) = kernel.disks.get(&disk.name) else { return Ok(()) };
        if !is_offline(&shown.state) {
            return Err(ReleaseError::NotOffline { name: name() });
        }
        if kernel.is_mounted(&shown.device) {
            return Err(ReleaseError::Busy { name: name(), after: Duration::ZERO, by: String::new() });
        }
        kernel.delete(&disk.name);
        Ok(())
    }

    pub(super) async fn unlock_disk(
        &self,
        disk: &OpenDisk,
        key: &Passphrase,
        name: &str,
    ) -> Result<Mapping, UnlockError> {
        let tool = |said: &str| UnlockError::Tool {
            name: disk.disk().name.clone(),
            source: failed("cryptsetup", said),
        };
        let device = Arc::clone(&pin_of(disk).device);
        // What it costs to make a key of a passphrase.
        sleep(Duration::from_millis(600)).await;
        let mut kernel = self.kernel();
        if !device.is_there() {
            return Err(tool("Device does not exist or access denied."));
        }
        if kernel.mappings.iter().any(|mapping| mapping.name == name) {
            return Err(tool(&format!("Device {name} already exists.")));
        }
        if kernel.is_claimed(&device) {
            return Err(tool("Cannot use the device, which is in use (already mapped or mounted)."));
        }
        kernel.unlock(&device, key, name).map_err(|refused| match refused {
            Refused::WrongPassphrase => UnlockError::WrongPassphrase { name: disk.disk().name.clone() },
            Refused::NoHeader => tool("Device is not a valid LUKS device."),
        })
    }

    pub(super) fn open_mapped(&self, mapping: &Mapping) -> Result<OpenDisk, OpenError> {
        let kernel = self.kernel();
        let name = mapping.device.name.clone();
        if kernel.same_mapping(mapping).is_none() && kernel.node(&name).is_some() {
            return Err(OpenError::Changed { name, listed: None, answered: None });
        }
        let device = kernel.open_node(&mapping.device)?;
        Ok(OpenDisk::new(mapping.device.clone(), Arc::new(Pin::new(device))))
    }

    pub(super) async fn lock_mapping(&self, mapping: &Mapping) -> Result<(), LockError> {
        let device = match self.kernel().same_mapping(mapping) {
            Some(opened) => Arc::clone(&opened.device),
            None => return Ok(()),
        };
        let busy = |by| LockError::Busy { name: mapping.name.clone(), after: self.busy_timeout, by };
        self.claimed(&device).await.map_err(busy)?;
        sleep(POLL).await;
        let mut kernel = self.kernel();
        if kernel.is_claimed(&device) {
            return Err(busy(String::new()));
        }
        if kernel.same_mapping(mapping).is_some() {
            kernel.close(&mapping.name);
        }
        Ok(())
    }

    pub(super) fn grow_mapped(
        &self,
        mapping: &Mapping,
        key: Option<&Passphrase>,
    ) -> Result<(), GrowMappingError> {
        let kernel = self.kernel();
        let name = || mapping.name.clone();
        if kernel.keyring && key.is_none() {
            let source = failed("cryptsetup", "Nothing to read on input.");
            return Err(GrowMappingError::Passphrase { name: name(), source });
        }
        let gone = || GrowMappingError::Tool {
            name: name(),
            source: failed("cryptsetup", "the device is not active"),
        };
        let device = &kernel.same_mapping(mapping).ok_or_else(gone)?.device;
        let (over, offset) = device.over().filter(|(over, _)| over.is_there()).ok_or_else(gone)?;
        device.set_size(over.size().saturating_sub(offset));
        Ok(())
    }
}
