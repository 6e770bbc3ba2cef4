//! Running state of VMs (qemu-server `QemuServer.pm:vmstatus`, `API2/Qemu.pm:vm_status`, `vmlist`).

use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::drive::{index_of, parse_size};
use crate::sim::rules::error::PveError;
use crate::sim::state::Vm;
use serde_json::{Value, json};
use std::sync::LazyLock;
use std::time::Duration;

/// How long `vmstatus` waits for a QEMU that does not answer.
const QMP_PATIENCE: Duration = Duration::from_secs(3);

/// Pressure stall information of a running VM.
const PRESSURES: &[&str] = &[
    "pressurecpufull",
    "pressurecpusome",
    "pressureiofull",
    "pressureiosome",
    "pressurememoryfull",
    "pressurememorysome",
];

/// What a VM shows in lists (`QemuServer.pm:vmstatus`).
pub(super) fn vm_totals(vm: &Vm, vmid: u32, now: u64) -> Value {
    let number =
        |key: &str, default: u64| vm.conf.current.get(key).and_then(|v| v.parse().ok()).unwrap_or(default);
    let boot = vm.conf.boot_order();
    let maxdisk = Conf::disks(&vm.conf.current)
        .find(|(slot, _)| boot.iter().any(|name| name == slot))
        .and_then(|(_, drive)| parse_size(drive.options.get("size")?))
        .unwrap_or(0);
    let mut entry = json!({
        "vmid": vmid,
        "name": vm.conf.current.get("name").cloned().unwrap_or_else(|| format!("VM {vmid}")),
        "status": if vm.running { "running" } else { "stopped" },
        "cpus": number("sockets", 1) * number("cores", 1),
        "cpu": 0,
        "mem": 0,
        "memhost": 0,
        "maxmem": number("memory", 512) << 20,
        "disk": 0,
        "maxdisk": maxdisk,
        "netin": 0,
        "netout": 0,
        "uptime": if vm.running { now.saturating_sub(vm.started) + 1 } else { 0 },
    });
    if vm.conf.current.get("vcpus").is_some_and(|value| value != "0") {
        entry["cpus"] = json!(number("vcpus", 1));
    }
    if let Some(balloon) =
        vm.conf.current.get("balloon").and_then(|value| value.parse::<u64>().ok()).filter(|b| *b > 0)
    {
        entry["balloon_min"] = json!(balloon << 20);
        entry["shares"] = json!(number("shares", 1000));
    }
    if vm.conf.current.keys().any(|key| index_of(key, "serial").is_some()) {
        entry["serial"] = json!(1);
    }
    if vm.conf.current.get("template").is_some_and(|value| value == "1") {
        entry["template"] = json!(1);
    }
    for key in ["lock", "tags"] {
        if let Some(value) = vm.conf.current.get(key) {
            entry[key] = json!(value);
        }
    }
    entry
}

/// One drive of query-blockstats; only the keys matter, the numbers are those of an idle disk.
static BLOCKSTAT: LazyLock<Value> = LazyLock::new(|| {
    json!({
        "account_failed": true, "account_invalid": true, "failed_flush_operations": 0, "failed_rd_operations": 0,
        "failed_unmap_operations": 0, "failed_wr_operations": 0, "flush_operations": 0, "flush_total_time_ns": 0,
        "idle_time_ns": 1_000_000, "invalid_flush_operations": 0, "invalid_rd_operations": 0,
        "invalid_unmap_operations": 0, "invalid_wr_operations": 0, "rd_bytes": 0, "rd_merged": 0, "rd_operations": 0,
        "rd_total_time_ns": 0, "timed_stats": [], "unmap_bytes": 0, "unmap_merged": 0, "unmap_operations": 0,
        "unmap_total_time_ns": 0, "wr_bytes": 0, "wr_highest_offset": 0, "wr_merged": 0, "wr_operations": 0,
        "wr_total_time_ns": 0,
    })
});

/// `GET status/current`. A QEMU that does not answer costs 3 s, and its blockstat is missing altogether
/// (`API2/Qemu.pm:vm_status`).
pub(super) async fn current(call: &Call) -> Result<Reply, PveError> {
    let now = call.sim.clock().elapsed().as_secs();
    let (vmid, node) = (call.vmid(), call.node());
    let hung = call.sim.read(|state| state.vm_on(node, vmid).map(|vm| vm.running && vm.hung))?;
    let real = match call.sim.real_machine(vmid) {
        Some(machine) => Some(machine.status().await),
        None => None,
    };
    if hung && real.is_none() {
        tokio::time::sleep(QMP_PATIENCE).await;
    }
    call.sim.read(|state| {
        let vm = state.vm_on(node, vmid)?;
        let eight = state.version.is_eight();
        let mut entry = vm_totals(vm, vmid, now);
        if eight && let Some(entry) = entry.as_object_mut() {
            entry.remove("memhost");
        }
        entry["ha"] = match &vm.hastate {
            Some(state) if state != "ignored" => json!({ "managed": 1, "state": state }),
            _ => json!({ "managed": 0 }),
        };
        entry["qmpstatus"] = if vm.paused { json!("paused") } else { entry["status"].clone() };
        if vm.conf.current.get("agent").is_some_and(|agent| agent.starts_with('1')) {
            entry["agent"] = json!(1);
        }
        if vm.running {
            entry["pid"] = json!(1000 + vmid);
            for key in PRESSURES.iter().filter(|_| !eight) {
                entry[*key] = json!(0);
            }
        }
        // A real QEMU is asked, and nothing is known of one that does not answer.
        let answer = match real {
            Some(answer) => answer,
            None if hung => None,
            None => {
                let drives = vm.drives.keys().map(|slot| (slot.clone(), BLOCKSTAT.clone()));
                Some((entry["qmpstatus"].as_str().unwrap_or_default().to_owned(), drives.collect()))
            }
        };
        if let Some((status, drives)) = answer.filter(|_| vm.running) {
            entry["qmpstatus"] = json!(status);
            entry["blockstat"] = Value::Object(drives);
            entry["running-machine"] =
                json!(if eight { "pc-i440fx-9.2+pve1" } else { "pc-i440fx-10.0+pve0" });
            entry["running-qemu"] = json!(if eight { "9.2.0" } else { "10.0.13" });
        }
        Ok(entry.into())
    })
}

/// `GET /nodes/N/qemu` (`API2/Qemu.pm:vmlist`).
pub(super) fn list(call: &Call) -> Reply {
    let now = call.sim.clock().elapsed().as_secs();
    let entries: Vec<Value> = call.sim.read(|state| {
        state
            .vms
            .iter()
            .filter(|(vmid, vm)| {
                vm.node == call.node() && state.access.has(&call.user, &format!("/vms/{vmid}"), &["VM.Audit"])
            })
            .map(|(vmid, vm)| {
                let mut entry = vm_totals(vm, *vmid, now);
                if vm.running {
                    entry["pid"] = json!(1000 + vmid);
                    for key in PRESSURES {
                        entry[*key] = json!(0);
                    }
                }
                if call.flag("full") {
                    entry["qmpstatus"] = entry["status"].clone();
                }
                entry
            })
            .collect()
    });
    entries.into()
}

/// `GET status`: the parts of it (`API2/Qemu.pm:vmcmdidx`).
pub(super) fn index(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| state.vm_on(call.node(), call.vmid()).map(|_| ()))?;
    let parts = ["current", "reboot", "reset", "resume", "shutdown", "start", "stop", "suspend"];
    Ok(json!(parts.map(|part| json!({ "subdir": part }))).into())
}
