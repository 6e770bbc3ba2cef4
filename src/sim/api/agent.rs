//! The guest agent and QEMU's monitor (qemu-server `API2/Qemu/Agent.pm`, `QemuServer/Agent.pm`, `API2/Qemu.pm:monitor`).

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

/// `agent/{command}`: what a small Linux guest says.
pub(super) async fn command(call: &Call, command: &str) -> Result<Reply, PveError> {
    available(call).await?;
    let result = match command {
        "ping" => json!({}),
        "get-host-name" => json!({ "host-name": call.sim.read(|state| {
            let name = state.vms.get(&call.vmid()).and_then(|vm| vm.conf.current.get("name").cloned());
            name.unwrap_or_default()
        }) }),
        "get-fsinfo" => filesystems(call),
        "network-get-interfaces" => interfaces(call),
        "exec" => return Ok(json!({ "pid": 300 + call.vmid() }).into()),
        "exec-status" => return Err(PveError::die("Agent error: Invalid parameter 'pid'")),
        _ => {
            return Err(PveError::NotImplemented(format!("agent command '{command}' is not modelled")));
        }
    };
    Ok(json!({ "result": result }).into())
}

/// The loopback interface, and for each card of the config one with the addresses that cloud-init gives it (`netN`, `ipconfigN`:
/// qemu-server `QemuServer/Cloudinit.pm:nocloud_network`).
fn interfaces(call: &Call) -> Value {
    let statistics = json!({ "tx-bytes": 0, "tx-dropped": 0, "tx-errs": 0, "tx-packets": 0, "rx-bytes": 0,
        "rx-dropped": 0, "rx-errs": 0, "rx-packets": 0 });
    let mut all = vec![json!({
        "name": "lo", "hardware-address": "00:00:00:00:00:00", "statistics": statistics,
        "ip-addresses": [
            { "prefix": 8, "ip-address-type": "ipv4", "ip-address": "127.0.0.1" },
            { "prefix": 128, "ip-address-type": "ipv6", "ip-address": "::1" },
        ],
    })];
    let conf = call.sim.read(|state| state.vms.get(&call.vmid()).map(|vm| vm.conf.current.clone()));
    let conf = conf.unwrap_or_default();
    for (key, addresses) in &conf {
        let Some(index) = key.strip_prefix("ipconfig") else { continue };
        let Some(card) = conf.get(&format!("net{index}")) else { continue };
        let mac = card.split(',').next().and_then(|model| model.split_once('=')).map_or("", |(_, mac)| mac);
        let given = |kind: &str| {
            let text = addresses.split(',').find_map(|part| part.strip_prefix(kind))?;
            let (address, prefix) = text.split_once('/')?;
            Some((address.to_owned(), prefix.parse::<u8>().ok()?))
        };
        let told: Vec<Value> = [("ip=", "ipv4"), ("ip6=", "ipv6")]
            .into_iter()
            .filter_map(|(kind, name)| {
                let (address, prefix) = given(kind)?;
                Some(json!({ "prefix": prefix, "ip-address-type": name, "ip-address": address }))
            })
            .collect();
        all.push(json!({
            "name": format!("eth{index}"), "hardware-address": mac.to_lowercase(), "statistics": statistics,
            "ip-addresses": told,
        }));
    }
    json!(all)
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

/// `POST monitor`: `info block`, which shows what QEMU has open.
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
