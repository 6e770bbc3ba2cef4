//! The guest agent and QEMU's monitor (qemu-server `API2/Qemu/Agent.pm`, `QemuServer/Agent.pm`, `API2/Qemu.pm:monitor`).

use super::guest;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::rules::plugin;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Duration;

/// How long PVE waits for an agent that does not answer.
const AGENT_TIMEOUT: Duration = Duration::from_secs(3);

/// Refuses unless an agent answers (`Agent.pm:assert_agent_available`).
async fn available(call: &Call) -> Result<(), PveError> {
    let vmid = call.vmid();
    let (running, answers) = call.sim.read(|state| {
        let vm = state.vm_on(call.node(), vmid)?;
        let option = vm.conf.current.get("agent").map(String::as_str).unwrap_or_default();
        let enabled = option.split(',').any(|part| matches!(part, "1" | "enabled=1"));
        if !enabled {
            return Err(PveError::die("No QEMU guest agent configured"));
        }
        Ok((vm.running, !vm.hung && !state.silent_agents.contains(&vmid)))
    })?;
    if !running {
        return Err(PveError::die(format!("VM {vmid} is not running")));
    }
    if !answers {
        tokio::time::sleep(AGENT_TIMEOUT).await;
        return Err(PveError::die("QEMU guest agent is not running"));
    }
    Ok(())
}

/// `agent/{command}`: what a small Linux guest says (`API2/Qemu/Agent.pm:register_command`).
pub(super) async fn command(call: &Call, command: &str) -> Result<Reply, PveError> {
    available(call).await?;
    let result = match command {
        "ping" | "set-user-password" => json!({}),
        "get-host-name" => json!({ "host-name": call.sim.read(|state| {
            let name = state.vms.get(&call.vmid()).and_then(|vm| vm.conf.current.get("name").cloned());
            name.unwrap_or_default()
        }) }),
        "get-fsinfo" => filesystems(call),
        "network-get-interfaces" => guest::interfaces(call),
        "exec" => return Ok(guest::exec(call)),
        "exec-status" => return guest::exec_status(call),
        "file-read" => return guest::file_read(call),
        "file-write" => return guest::file_write(call),
        "get-osinfo" => json!({
            "id": "debian", "name": "Debian GNU/Linux", "pretty-name": "Debian GNU/Linux 13 (trixie)",
            "version": "13 (trixie)", "version-id": "13", "machine": "x86_64", "kernel-release": "6.12.48+deb13-amd64",
            "kernel-version": "#1 SMP PREEMPT_DYNAMIC Debian",
        }),
        "get-time" => json!(call.sim.clock().now() * 1_000_000_000),
        "get-timezone" => json!({ "zone": "UTC", "offset": 0 }),
        "get-users" => json!([]),
        "get-vcpus" => guest::processors(call),
        "info" => json!({ "version": "10.0.2", "supported_commands": [] }),
        "fsfreeze-status" | "fsfreeze-freeze" | "fsfreeze-thaw" => guest::freeze(call, command),
        "fstrim" => json!({ "paths": [] }),
        "shutdown" => {
            crate::sim::api::power::cut(&call.sim, call.vmid()).await;
            Value::Null
        }
        _ => {
            return Err(PveError::NotImplemented(format!("agent command '{command}' is not modelled")));
        }
    };
    Ok(json!({ "result": result }).into())
}

/// The root filesystem on the boot disk.
fn filesystems(call: &Call) -> Value {
    let size = call.sim.read(|state| {
        let vm = state.vms.get(&call.vmid());
        vm.and_then(|vm| vm.drives.get("scsi0")).map_or(0, |drive| drive.size)
    });
    json!([{
        "name": "sda", "type": "ext4", "mountpoint": "/", "total-bytes": size, "used-bytes": size / 3,
        "disk": [{
            "bus": 0, "target": 0, "unit": 0, "bus-type": "scsi", "dev": "/dev/sda",
            "serial": "0QEMU_QEMU_HARDDISK_drive-scsi0",
            "pci-controller": { "domain": 0, "bus": 1, "slot": 1, "function": 0 },
        }],
    }])
}

/// `POST monitor`: `info block`, which shows what QEMU has open (`API2/Qemu.pm:monitor`).
pub(super) fn monitor(call: &Call) -> Result<Reply, PveError> {
    let vmid = call.vmid();
    call.sim.read(|state| {
        let vm = state.vm_on(call.node(), vmid)?;
        if !vm.running {
            return Err(PveError::die(format!("VM {vmid} not running")));
        }
        if call.text("command") != "info block" {
            return Err(PveError::NotImplemented(format!("monitor command '{}' is not modelled", call.text("command"))));
        }
        let mut out = String::new();
        for (index, (slot, drive)) in vm.drives.iter().enumerate() {
            let path = state.path_of(&drive.volume);
            let config = state.config_of(&drive.volume)?;
            let driver = if config.kind.is_directory() { "file" } else { "host_device" };
            let format = plugin::format_of(config, &drive.volume.name);
            let separator = if index > 0 { "\r\n" } else { "" };
            let cache = "writeback";
            let _ = write!(
                out,
                "{separator}drive-{slot}: json:{{\"throttle-group\": \"throttle-drive-{slot}\", \"driver\": \"throttle\", \
                 \"file\": {{\"driver\": \"{format}\", \"file\": {{\"driver\": \"{driver}\", \"filename\": \"{path}\"}}}}}} \
                 (throttle)\r\n    Attached to:      {slot}\r\n    Cache mode:       {cache}\r\n    Detect zeroes:    on\r\n"
            );
        }
        Ok(json!(out).into())
    })
}
