//! Plugging and unplugging in Proxmox VE's order, with its waits (qemu-server `QemuServer.pm`).

use super::Machine;
use super::command::{Controller, Disk, blockdev, limits, scsi_disk, throttle_group};
use super::qmp::QmpError;
use crate::sim::rules::conf::Conf;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long `vmstatus` waits for a QEMU (`QMPClient.pm:queue_execute`).
const STATUS: Duration = Duration::from_secs(3);
/// How long Proxmox looks for a device that is to come or to go.
const PATIENCE: Duration = Duration::from_secs(6);
/// The same for a controller that is to go.
const PATIENCE_WITH_CONTROLLER: Duration = Duration::from_secs(16);

/// What the VM has, by the ids of its devices (`QemuServer.pm:vm_devices_list`).
async fn devices(machine: &Machine) -> Result<BTreeSet<String>, QmpError> {
    let mut found = BTreeSet::new();
    let buses = machine.command("query-pci", json!({})).await?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut open: VecDeque<Value> = list(&buses).iter().flat_map(|bus| list(&bus["devices"])).collect();
    while let Some(device) = open.pop_front() {
        found.extend(device["qdev_id"].as_str().filter(|id| !id.is_empty()).map(str::to_owned));
        open.extend(list(&device["pci_bridge"]["devices"]));
    }
    let blocks = machine.command("query-block", json!({})).await?;
    found.extend(list(&blocks).iter().filter_map(|block| block["qdev"].as_str().map(str::to_owned)));
    Ok(found)
}

/// A command of the monitor for people. What it says is not read, as Proxmox does not read it
/// (`QMPHelpers.pm:qemu_deviceadd`).
async fn monitor(machine: &Machine, line: &str) -> Result<(), QmpError> {
    let said = machine.command("human-monitor-command", json!({ "command-line": line })).await?;
    if let Some(said) = said.as_str().filter(|said| !said.is_empty()) {
        tracing::warn!(vm = machine.vmid, line, said, "QEMU's monitor answered, which Proxmox does not read");
    }
    Ok(())
}

/// `QemuServer.pm:vm_deviceplug` of a SCSI disk.
pub(super) async fn plug(machine: &Machine, conf: &Conf, disk: &Disk) -> Result<(), QmpError> {
    if devices(machine).await?.contains(&format!("scsi{}", disk.slot)) {
        return Ok(());
    }
    let controller = Controller::of(conf, disk.slot).map_err(|error| QmpError::Step(error.to_string()))?;
    // `qemu_findorcreatescsihw`
    if !devices(machine).await?.contains(&controller.id) {
        monitor(machine, &format!("device_add driver={}", controller.device())).await?;
        if !wait_for(machine, &controller.id, true, PATIENCE).await? {
            return Err(QmpError::Step(format!("error on hotplug device '{}'", controller.id)));
        }
    }
    attach(machine, disk).await?;
    let device = scsi_disk(&controller, disk);
    let added = monitor(machine, &format!("device_add driver={device}")).await;
    if added.is_err() {
        // Proxmox warns, and dies of the first error.
        if let Err(error) = detach(machine, disk.slot).await {
            tracing::warn!(vm = machine.vmid, %error, "what was left of a disk stays");
        }
    }
    added
}

/// `Blockdev.pm:attach`.
async fn attach(machine: &Machine, disk: &Disk) -> Result<(), QmpError> {
    let group = throttle_group(disk.slot);
    // What an earlier one may have left.
    let _ = machine.command("object-del", json!({ "id": group })).await;
    let limited = json!({ "qom-type": "throttle-group", "id": group, "limits": limits(&disk.drive) });
    machine.command("object-add", limited).await?;
    let added = machine.command("blockdev-add", blockdev(disk)).await;
    if added.is_err() {
        let _ = machine.command("object-del", json!({ "id": group })).await;
    }
    added.map(drop)
}

/// `Blockdev.pm:detach`, from the top node down.
async fn detach(machine: &Machine, slot: u32) -> Result<(), QmpError> {
    let nodes = machine.command("query-named-block-nodes", json!({ "flat": true })).await?;
    let nodes: BTreeMap<String, Value> = nodes
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|node| Some((node["node-name"].as_str()?.to_owned(), node.clone())))
        .collect();
    let top = format!("drive-scsi{slot}");
    let had_top = nodes.contains_key(&top);
    let mut next = Some(top);
    while let Some(name) = next.take() {
        let Some(node) = nodes.get(&name) else { break };
        match machine.command("blockdev-del", json!({ "node-name": name })).await {
            Err(QmpError::Refused { reason, .. })
                if reason.contains("Failed to find node with node-name") => {}
            Err(QmpError::Refused { reason, .. }) => {
                return Err(QmpError::Step(format!("deleting blockdev '{name}' failed : {reason}")));
            }
            other => drop(other?),
        }
        let children = node["children"].as_array().into_iter().flatten();
        next = children
            .filter(|child| child["child"] == "file")
            .find_map(|child| child["node-name"].as_str().map(str::to_owned));
    }
    if had_top {
        let removed = machine.command("object-del", json!({ "id": throttle_group(slot) })).await;
        removed.map_err(|error| QmpError::Step(format!("removing throttle group failed - {error}")))?;
    }
    Ok(())
}

/// Whether the device is there, or gone, before Proxmox loses its patience (`QemuServer.pm:qemu_deviceaddverify`,
/// `qemu_devicedelverify`).
async fn wait_for(machine: &Machine, id: &str, there: bool, patience: Duration) -> Result<bool, QmpError> {
    let started = Instant::now();
    loop {
        if devices(machine).await?.contains(id) == there {
            return Ok(true);
        }
        sleep(machine.look_again).await;
        if started.elapsed() >= patience {
            return Ok(false);
        }
    }
}

async fn remove(machine: &Machine, id: &str, patience: Duration) -> Result<(), QmpError> {
    monitor(machine, &format!("device_del {id}")).await?;
    if wait_for(machine, id, false, patience).await? {
        return Ok(());
    }
    Err(QmpError::Step(format!("error on hot-unplugging device '{id}' - still busy in guest?")))
}

/// `QemuServer.pm:vm_deviceunplug` of a SCSI disk. The caller has seen that it is no boot disk.
pub(super) async fn unplug(machine: &Machine, conf: &Conf, slot: u32) -> Result<(), QmpError> {
    let id = format!("scsi{slot}");
    if !devices(machine).await?.contains(&id) {
        return Ok(());
    }
    remove(machine, &id, PATIENCE).await?;
    detach(machine, slot).await?;
    // `qemu_deletescsihw`
    let controller = Controller::of(conf, slot).map_err(|error| QmpError::Step(error.to_string()))?;
    let has = devices(machine).await?;
    let others = has.iter().any(|device| crate::sim::rules::drive::index_of(device, "scsi").is_some());
    if !has.contains(&controller.id) || (!controller.is_own && others) {
        return Ok(());
    }
    remove(machine, &controller.id, PATIENCE_WITH_CONTROLLER).await
}

impl Machine {
    /// Whether QEMU has a drive in this slot.
    pub(crate) async fn has(&self, key: &str) -> Result<bool, QmpError> {
        Ok(devices(self).await?.contains(key))
    }

    /// Tells the guest of a disk's new size (`Blockdev.pm:resize`): only the top node's reaches it.
    pub(crate) async fn resize(&self, key: &str, size: u64) -> Result<(), QmpError> {
        let blocks = self.command("query-block", json!({})).await?;
        let block = blocks.as_array().into_iter().flatten().find(|block| block["qdev"] == key);
        let node = block.and_then(|block| block["inserted"]["node-name"].as_str());
        let node = node.ok_or_else(|| QmpError::Step(format!("no block node inserted for drive '{key}'")))?;
        let size = size.next_multiple_of(1024);
        self.command("block_resize", json!({ "node-name": node, "size": size })).await.map(drop)
    }

    /// The state of the VM and the statistics of its drives, by slot (`QemuServer.pm:vmstatus`); `None` from a QEMU that
    /// does not answer in time.
    pub(crate) async fn status(&self) -> Option<(String, serde_json::Map<String, Value>)> {
        let status = self.qmp.within(STATUS, "query-status", json!({})).await.ok()?;
        let drives = self.qmp.within(STATUS, "query-blockstats", json!({})).await.ok()?;
        let by_slot = drives.as_array().into_iter().flatten().filter_map(|entry| {
            // The root file system of the guest is the simulator's and no drive of the VM.
            let slot = entry["qdev"].as_str().filter(|id| crate::sim::rules::drive::is_drive_key(id))?;
            Some((slot.to_owned(), entry["stats"].clone()))
        });
        Some((status["status"].as_str().unwrap_or("unknown").to_owned(), by_slot.collect()))
    }
}
