//! A cluster that goes on where an earlier process has left it: what lives outside of the state is brought into
//! agreement with it.

use super::Sim;
use super::start::StartError;
use super::state::QemuDrive;
use super::world::Guest;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// How a task ends whose worker has vanished (pve-common `Tools.pm:upid_read_status`).
const VANISHED: &str = "unexpected status";

impl Sim {
    /// Ends the tasks that ran, makes volumes and their files agree, and shows the disks of running VMs to their guests.
    /// QEMU is a process of its own: it has what it had, whatever its config says by now.
    pub(super) fn resume(&self) -> Result<(), StartError> {
        let now = self.clock().now();
        self.change(|state| {
            for task in state.tasks.iter_mut().filter(|task| task.status.is_none()) {
                task.status = Some(VANISHED.to_owned());
                task.endtime = Some(now);
            }
        });
        self.settle()?;
        let machines: Vec<(u32, Option<String>)> = self.change(|state| {
            let with_devices = self.guests().is_some();
            let machines = state.vms.iter().filter(|(_, vm)| vm.guest == Guest::Machine);
            let found: Vec<_> =
                machines.map(|(vmid, vm)| (*vmid, vm.conf.uuid().map(str::to_owned))).collect();
            if with_devices {
                return found;
            }
            for (vmid, _) in &found {
                if let Some(vm) = state.vms.get_mut(vmid) {
                    vm.guest = Guest::Memory;
                }
            }
            Vec::new()
        });
        let with_qemu = self.inner.real.is_some();
        let real: Vec<u32> = self.change(|state| {
            let all = state.vms.iter().filter(|(_, vm)| vm.guest == Guest::Qemu);
            let all: Vec<(u32, bool)> = all.map(|(vmid, vm)| (*vmid, vm.running)).collect();
            for (vmid, _) in all.iter().filter(|_| !with_qemu) {
                if let Some(vm) = state.vms.get_mut(vmid) {
                    vm.guest = Guest::Memory;
                }
            }
            all.into_iter().filter(|(_, running)| with_qemu && *running).map(|(vmid, _)| vmid).collect()
        });
        for vmid in real {
            // Ours died with the simulator that had it: its guest boots again.
            self.change(|state| {
                if let Some(vm) = state.vms.get_mut(&vmid) {
                    (vm.paused, vm.hung, vm.stuck) = (false, false, false);
                }
            });
            self.power_machine(vmid).map_err(|error| StartError::Power(vmid, error))?;
        }
        for (vmid, uuid) in machines {
            let Some(guests) = self.guests() else { continue };
            guests
                .add_machine(vmid, uuid.as_deref())
                .map_err(|error| StartError::Guests(guests.directory().to_owned(), error))?;
            let drives: Vec<(String, QemuDrive)> = self.read(|state| {
                let drives = state.vms.get(&vmid).map(|vm| vm.drives.clone());
                drives.unwrap_or_default().into_iter().collect()
            });
            for (slot, drive) in drives {
                self.show(vmid, &slot, &drive)
                    .map_err(|error| StartError::Plug(vmid, drive.drive.file.clone(), error))?;
            }
        }
        Ok(())
    }

    /// A volume whose file is gone was being deleted; a file that no volume has was being made. Both are finished off,
    /// so that a volume that is made later is blank.
    fn settle(&self) -> Result<(), StartError> {
        let Some(images) = self.inner.images.clone() else { return Ok(()) };
        let known: BTreeSet<PathBuf> = self.change(|state| {
            let gone: Vec<_> = state
                .volumes
                .iter()
                .filter(|(_, volume)| volume.image.as_ref().is_some_and(|image| !image.exists()))
                .map(|(key, _)| key.clone())
                .collect();
            for key in gone {
                tracing::warn!(volume = key.volid(), "its file is gone, and so is the volume");
                state.volumes.remove(&key);
            }
            state.volumes.values().filter_map(|volume| volume.image.clone()).collect()
        });
        // Snapshots of a volume are in a directory of its own.
        let kept: BTreeSet<PathBuf> =
            self.read(|state| state.volumes.keys().map(|key| self.snapshots_of(key)).collect());
        let failed = |error| StartError::Storage(images.clone(), error);
        for file in files_below(&images).map_err(failed)? {
            let of_volume = file.parent().is_some_and(|directory| kept.contains(directory));
            if !known.contains(&file) && !of_volume {
                tracing::warn!(file = %file.display(), "removed: it belongs to no volume");
                std::fs::remove_file(&file).map_err(failed)?;
            }
        }
        Ok(())
    }
}

fn files_below(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}
