//! VMs that are real QEMU processes: a kernel of their own decides what a disk looks like, when it is there and what
//! becomes of it when it is pulled.
//!
//! Disks are plugged as Proxmox VE plugs them: the same devices at the same places, in its order, with its waits and
//! its words (`hotplug`); what the VM has is asked of QEMU (`qmp`). `command` makes the command line, `process` keeps
//! the process, which dies with the simulator. Only disks in SCSI slots reach the guest. Read `hotplug::plug` first.

mod command;
mod hotplug;
mod process;
mod qmp;

pub(crate) use command::Disk;
pub use qmp::QmpError;

use super::Sim;
use super::clock::Profile;
use super::rules::conf::Conf;
use super::rules::drive::index_of;
use super::state::QemuDrive;
use super::world::Qemu;
use process::Process;
use qmp::Qmp;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{Instant, sleep};

/// How long a QEMU may take until it speaks: Proxmox VE's limit for a start (`Helpers.pm:config_aware_timeout`).
const START: Duration = Duration::from_secs(30);

/// All machines of a cluster.
#[derive(Debug)]
pub(crate) struct Machines {
    directory: PathBuf,
    settings: Qemu,
    inner: Mutex<Inner>,
    /// Takes the VM and the number of a process that has ended.
    ended: UnboundedSender<(u32, u64)>,
    look_again: Duration,
}

#[derive(Debug, Default)]
struct Inner {
    machines: BTreeMap<u32, Arc<Machine>>,
    started: u64,
}

/// A running QEMU.
#[derive(Debug)]
pub(crate) struct Machine {
    vmid: u32,
    number: u64,
    process: Process,
    qmp: Qmp,
    ports: Mutex<BTreeMap<u16, u16>>,
    console: PathBuf,
    log: PathBuf,
    look_again: Duration,
}

/// Where the guest of a QEMU is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestAccess {
    /// The port on this machine's loopback by the port in the guest.
    pub ports: BTreeMap<u16, u16>,
    /// File with what the guest's kernel and its init wrote to the first serial port.
    pub console: PathBuf,
}

impl Machines {
    /// Makes `qemu` under the directory, in place of what an earlier run has left there.
    pub(crate) fn create(
        directory: &Path,
        settings: Qemu,
        time: Profile,
        ended: UnboundedSender<(u32, u64)>,
    ) -> Result<Self> {
        let directory = directory.join("qemu");
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::create_dir_all(&directory)?;
        for file in
            [Some(&settings.kernel), settings.initrd.as_ref(), settings.root.as_ref()].into_iter().flatten()
        {
            if !file.exists() {
                return Err(Error::other(format!("`{}` of the world's `qemu` is not there", file.display())));
            }
        }
        // Proxmox sleeps a second between two looks at a device.
        let look_again = Duration::from_millis(if time == Profile::Recorded { 1000 } else { 20 });
        Ok(Self { directory, settings, inner: Mutex::default(), ended, look_again })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The running QEMU of a VM.
    pub(crate) fn get(&self, vmid: u32) -> Option<Arc<Machine>> {
        self.lock().machines.get(&vmid).cloned()
    }

    /// Starts a QEMU with these disks on its command line. It may still refuse them: see `Machine::ready`.
    pub(crate) fn start(&self, vm: &command::Vm<'_>, disks: &[Disk]) -> Result<()> {
        let vmid = vm.vmid;
        let of = |kind: &str| self.directory.join(format!("{vmid}.{kind}"));
        let (socket, console, log) = (of("qmp"), of("console"), of("log"));
        let arguments = command::line(&self.settings, vm, disks, &socket, &console)?;
        let mut inner = self.lock();
        inner.started += 1;
        let (number, ended) = (inner.started, self.ended.clone());
        let process = Process::start(&self.settings.program, &arguments, &log, move || {
            // Nobody listens any more when the cluster is gone.
            let _ = ended.send((vmid, number));
        })?;
        let qmp = Qmp::new(vmid, socket);
        let look_again = self.look_again;
        let machine =
            Machine { vmid, number, process, qmp, ports: Mutex::default(), console, log, look_again };
        inner.machines.insert(vmid, Arc::new(machine));
        Ok(())
    }

    /// Ends the QEMU of a VM at once, if there is one, and waits until its files are closed. Blocks.
    pub(crate) fn kill(&self, vmid: u32) {
        let machine = self.lock().machines.remove(&vmid);
        if let Some(machine) = machine {
            machine.process.kill();
        }
    }

    /// Forgets a process that has ended; returns whether it was the VM's.
    pub(crate) fn forget(&self, vmid: u32, number: u64) -> bool {
        let mut inner = self.lock();
        let is_its = inner.machines.get(&vmid).is_some_and(|machine| machine.number == number);
        if is_its {
            inner.machines.remove(&vmid);
        }
        is_its
    }

    /// Ends all. Blocks.
    pub(crate) fn shutdown(&self) {
        let machines = std::mem::take(&mut self.lock().machines);
        for machine in machines.values() {
            machine.process.kill();
        }
    }

    /// Process ids, ports and consoles, by VM.
    pub(crate) fn dump(&self) -> Value {
        let entry = |machine: &Arc<Machine>| {
            let access = machine.access();
            json!({ "pid": machine.process.pid(), "ports": access.ports, "console": access.console })
        };
        let machines = &self.lock().machines;
        Value::Object(machines.iter().map(|(vmid, machine)| (vmid.to_string(), entry(machine))).collect())
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Machine {
    /// Where its guest is reached. The ports are known once it is ready.
    pub(crate) fn access(&self) -> GuestAccess {
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner).clone();
        GuestAccess { ports, console: self.console.clone() }
    }

    /// Waits until QEMU answers; its guest boots from then on. The error is what it said instead.
    pub(crate) async fn ready(&self) -> std::result::Result<(), String> {
        let started = Instant::now();
        loop {
            if self.process.has_ended() {
                let said = std::fs::read_to_string(&self.log).unwrap_or_default();
                return Err(format!("QEMU exited: {}", said.trim()));
            }
            match self.qmp.once("human-monitor-command", json!({ "command-line": "info usernet" })).await {
                Ok(table) => {
                    let ports = forwarded(table.as_str().unwrap_or_default());
                    *self.ports.lock().unwrap_or_else(PoisonError::into_inner) = ports;
                    return Ok(());
                }
                Err(error) if started.elapsed() > START => return Err(error.to_string()),
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Stops the process as a debugger would, or lets it go on: a QEMU that answers nothing.
    pub(crate) fn hang(&self, on: bool) {
        self.process.hang(on);
    }

    /// One command, as Proxmox VE gives it.
    pub(crate) async fn command(&self, name: &str, arguments: Value) -> std::result::Result<Value, QmpError> {
        self.qmp.command(name, arguments).await
    }
}

/// The forwarded ports in a table of `info usernet` (QEMU `slirp/src/misc.c:slirp_connection_info`): on this machine by guest's.
fn forwarded(table: &str) -> BTreeMap<u16, u16> {
    let port = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.as_slice() {
            ["TCP[HOST_FORWARD]", _, _, here, _, there, ..] => {
                Some((there.parse().ok()?, here.parse().ok()?))
            }
            _ => None,
        }
    };
    table.lines().filter_map(port).collect()
}

impl Sim {
    /// The running QEMU of a VM, if it has a real one.
    pub(crate) fn real_machine(&self, vmid: u32) -> Option<Arc<Machine>> {
        self.inner.real.as_ref()?.get(vmid)
    }

    /// Where the guest of a VM is reached that is a QEMU of its own; `None` for any other, and while it is off.
    pub fn guest_access(&self, vmid: u32) -> Option<GuestAccess> {
        Some(self.real_machine(vmid)?.access())
    }

    /// Gives a command to the QEMU of a VM, behind Proxmox's back.
    pub async fn qmp(
        &self,
        vmid: u32,
        command: &str,
        arguments: Value,
    ) -> std::result::Result<Value, QmpError> {
        let machine = self.real_machine(vmid).ok_or(QmpError::NotRunning(vmid))?;
        machine.command(command, arguments).await
    }

    /// Waits until every QEMU of the cluster answers, so that the guests' ports are known.
    ///
    /// # Errors
    /// The VM whose QEMU ended or is silent, and what it said.
    pub async fn machines_ready(&self) -> std::result::Result<(), String> {
        for vmid in self.vmids() {
            if let Some(machine) = self.real_machine(vmid) {
                machine.ready().await.map_err(|said| format!("VM {vmid}: {said}"))?;
            }
        }
        Ok(())
    }

    /// Starts the QEMU of a VM with what it has. Blocks for a moment.
    pub(super) fn power_machine(&self, vmid: u32) -> Result<()> {
        let Some(machines) = &self.inner.real else { return Ok(()) };
        let found = self.read(|state| {
            let vm = state.vms.get(&vmid)?;
            let disks = vm.drives.iter().filter_map(|(slot, drive)| {
                let image = state.volumes.get(&drive.volume)?.image.clone()?;
                Some(Disk { slot: index_of(slot, "scsi")?, image, drive: drive.drive.clone() })
            });
            Some((vm.conf.clone(), vm.node.clone(), disks.collect::<Vec<_>>()))
        });
        let Some((conf, node, disks)): Option<(Conf, String, Vec<Disk>)> = found else { return Ok(()) };
        machines.start(&command::Vm { vmid, node: &node, conf: &conf }, &disks)
    }

    /// Plugs a drive into the QEMU of a VM (`QemuServer.pm:vm_deviceplug`). The error is Proxmox's text.
    pub(super) async fn plug_into(
        &self,
        machine: &Machine,
        key: &str,
        drive: &QemuDrive,
    ) -> std::result::Result<(), String> {
        let found = self.read(|state| {
            let conf = state.vms.get(&machine.vmid)?.conf.clone();
            Some((conf, state.volumes.get(&drive.volume)?.image.clone()?))
        });
        let (Some((conf, image)), Some(slot)) = (found, index_of(key, "scsi")) else {
            return Err(format!("can't hotplug device '{key}'\n"));
        };
        let disk = Disk { slot, image, drive: drive.drive.clone() };
        hotplug::plug(machine, &conf, &disk).await.map_err(|error| error.to_string())
    }

    /// Takes a drive out of the QEMU of a VM (`QemuServer.pm:vm_deviceunplug`). The error is Proxmox's text. The drive
    /// may be gone although an error comes.
    pub(super) async fn unplug_from(&self, machine: &Machine, key: &str) -> std::result::Result<(), String> {
        let conf = self.read(|state| state.vms.get(&machine.vmid).map(|vm| vm.conf.clone()));
        let (Some(conf), Some(slot)) = (conf, index_of(key, "scsi")) else {
            return Err(format!("can't unplug device '{key}'\n"));
        };
        hotplug::unplug(machine, &conf, slot).await.map_err(|error| error.to_string())
    }

    /// What became of a QEMU that ended by itself: its VM is off.
    pub(super) fn machine_ended(&self, vmid: u32, number: u64) {
        if !self.inner.real.as_ref().is_some_and(|machines| machines.forget(vmid, number)) {
            return;
        }
        tracing::info!(vm = vmid, "its QEMU has ended");
        self.change(|state| {
            if let Some(vm) = state.vms.get_mut(&vmid) {
                (vm.running, vm.paused, vm.hung) = (false, false, false);
                vm.drives.clear();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_ports_are_read_from_the_table() {
        let table = "Hub -1 (net0):\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\n  \
                     TCP[HOST_FORWARD]  14       127.0.0.1 43615       10.0.2.15  7001     0     0\n  \
                     TCP[HOST_FORWARD]  13       127.0.0.1 38211       10.0.2.15  7000     0     0\n  \
                     TCP[ESTABLISHED]   15       127.0.0.1 38211       10.0.2.15  7000     0     0\n";
        assert_eq!(forwarded(table), BTreeMap::from([(7000, 38211), (7001, 43615)]));
        assert!(forwarded("").is_empty());
    }
}
