//! A node itself (pve-manager `API2/Nodes.pm`), and the parts of the tree that only list what is below them.

use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;

/// A listing of what is below a path.
fn parts(names: &[&str], key: &str) -> Reply {
    json!(names.iter().map(|name| json!({ key: name })).collect::<Vec<Value>>()).into()
}

/// `GET /nodes/{node}` (`Nodes.pm:index`).
pub(super) fn index() -> Reply {
    const PARTS: &[&str] =
        &["lxc", "qemu", "replication", "status", "storage", "tasks", "time", "version", "vzdump"];
    parts(PARTS, "name")
}

/// `GET /cluster` (`Cluster.pm:index`).
pub(super) fn cluster_index() -> Reply {
    parts(&["backup", "ha", "nextid", "options", "replication", "resources", "status", "tasks"], "name")
}

/// What is below a VM.
const OF_A_VM: &[&str] =
    &["agent", "clone", "config", "feature", "migrate", "monitor", "pending", "resize", "snapshot", "status"];

/// `GET /nodes/{node}/qemu/{vmid}` (qemu-server `API2/Qemu.pm:vmdiridx`).
pub(super) fn vm_index(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| state.vm_on(call.node(), call.vmid()).map(|_| ()))?;
    Ok(parts(OF_A_VM, "subdir"))
}

/// `GET /nodes/{node}/status` (`Nodes.pm:status`): a machine of 8 cores and 32 GiB, of which each running VM takes its
/// memory.
pub(super) fn status(call: &Call) -> Reply {
    let (version, used) = call.sim.read(|state| {
        let running = state.vms.values().filter(|vm| vm.node == call.node() && vm.running);
        let memory = |vm: &crate::sim::state::Vm| {
            vm.conf.current.get("memory").and_then(|value| value.parse::<u64>().ok()).unwrap_or(512) << 20
        };
        (state.version, running.map(memory).sum::<u64>() + 2 * GIB)
    });
    let total = 32 * GIB;
    let used = used.min(total);
    let kernel = if version.is_eight() { "6.8.12-10-pve" } else { "6.17.2-1-pve" };
    json!({
        "uptime": call.sim.clock().elapsed().as_secs() + 1, "idle": 0, "wait": 0.0, "cpu": 0.05,
        "loadavg": ["0.10", "0.10", "0.10"],
        "kversion": format!("Linux {kernel} #1 SMP PREEMPT_DYNAMIC PVE"),
        "current-kernel": { "sysname": "Linux", "release": kernel, "version": "#1 SMP PREEMPT_DYNAMIC PVE",
            "machine": "x86_64" },
        "boot-info": { "mode": "efi", "secureboot": 0 },
        "cpuinfo": { "cores": 8, "cpus": 8, "sockets": 1, "model": "Simulated CPU", "mhz": "3000.000", "hvm": "1",
            "user_hz": 100, "flags": "" },
        "memory": { "total": total, "used": used, "free": total - used, "available": total - used },
        "ksm": { "shared": 0 },
        "swap": { "total": 0, "used": 0, "free": 0 },
        "rootfs": { "total": 100 * GIB, "used": 10 * GIB, "free": 90 * GIB, "avail": 90 * GIB },
        "pveversion": format!("pve-manager/{}/{}", version.release(), version.repository()),
    })
    .into()
}

/// `POST /nodes/{node}/status`: the node goes down, and with `reboot` comes back (`Nodes.pm:node_cmd`).
pub(super) fn command(call: &Call) -> Reply {
    let fault = match call.text("command") {
        "reboot" => crate::sim::faults::Fault::RebootNode { node: call.node().to_owned(), ms: 60_000 },
        _ => crate::sim::faults::Fault::KillNode { node: call.node().to_owned(), on: true },
    };
    let sim = call.sim.clone();
    // The answer leaves before the node does.
    tokio::spawn(async move {
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        // The node is in the path, so it is known.
        let _ = sim.inject(fault);
    });
    Reply::null()
}

/// `GET /nodes/{node}/time` (`API2/Nodes.pm:time`).
pub(super) fn time(call: &Call) -> Reply {
    let now = call.sim.clock().now();
    json!({ "time": now, "localtime": now, "timezone": "UTC" }).into()
}

/// `GET /nodes/{node}/lxc`: there are no containers here (pve-container `API2/LXC.pm`).
pub(super) fn containers() -> Reply {
    json!([]).into()
}
