//! What a guest says through its agent: its addresses, its files, what it runs (qemu-server `API2/Qemu/Agent.pm`).
//!
//! Nothing is run: a command ends with 0 and says nothing, unless a fault scripts it (`agent_exec`). A file that was
//! written can be read.

use crate::sim::http::{Call, Reply};
use crate::sim::records::Run;
use crate::sim::rules::error::PveError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

/// What an interface has counted.
fn statistics() -> Value {
    json!({ "tx-bytes": 0, "tx-dropped": 0, "tx-errs": 0, "tx-packets": 0, "rx-bytes": 0, "rx-dropped": 0, "rx-errs": 0,
        "rx-packets": 0 })
}

/// The loopback interface, and one for each `netN` that cloud-init gives an address: the static one of `ipconfigN`,
/// or for `ip=dhcp` a documentation address made of the VM's id (the agent's `network-get-interfaces`, which
/// `API2/Qemu/Agent.pm:register_command` hands on).
pub(super) fn interfaces(call: &Call) -> Value {
    let mut found = vec![json!({
        "name": "lo", "hardware-address": "00:00:00:00:00:00", "statistics": statistics(),
        "ip-addresses": [
            { "prefix": 8, "ip-address-type": "ipv4", "ip-address": "127.0.0.1" },
            { "prefix": 128, "ip-address-type": "ipv6", "ip-address": "::1" },
        ],
    })];
    let vmid = call.vmid();
    let values =
        call.sim.read(|state| state.vms.get(&vmid).map(|vm| vm.conf.current.clone())).unwrap_or_default();
    for index in 0..32_u32 {
        let (Some(net), Some(ip)) =
            (values.get(&format!("net{index}")), values.get(&format!("ipconfig{index}")))
        else {
            continue;
        };
        let hardware =
            net.split(',').find_map(|part| part.split_once('=').filter(|(_, mac)| mac.contains(':')));
        let hardware = hardware.map_or_else(String::new, |(_, mac)| mac.to_ascii_lowercase());
        let mut addresses = Vec::new();
        for part in ip.split(',') {
            let address = match part.split_once('=') {
                Some(("ip", "dhcp")) => format!("198.51.100.{}/24", vmid % 250 + 1),
                Some(("ip" | "ip6", address)) if address.contains('/') => address.to_owned(),
                _ => continue,
            };
            if let Some((address, prefix)) = address.split_once('/') {
                let kind = if address.contains(':') { "ipv6" } else { "ipv4" };
                let prefix: u8 = prefix.parse().unwrap_or(24);
                addresses.push(json!({ "prefix": prefix, "ip-address-type": kind, "ip-address": address }));
            }
        }
        found.push(json!({
            "name": format!("eth{index}"), "hardware-address": hardware, "statistics": statistics(),
            "ip-addresses": addresses,
        }));
    }
    json!(found)
}

/// `agent/fsfreeze-…`: how the filesystems are, or how many have been frozen or thawed
/// (qemu-server `QemuServer/Agent.pm:guest_fs_freeze`, `guest_fs_thaw`).
pub(super) fn freeze(call: &Call, command: &str) -> Value {
    call.sim.change(|state| {
        let system = state.systems.entry(call.vmid()).or_default();
        let before = system.frozen;
        match command {
            "fsfreeze-freeze" => system.frozen = true,
            "fsfreeze-thaw" => system.frozen = false,
            _ => return json!(if before { "frozen" } else { "thawed" }),
        }
        json!(u8::from(before != system.frozen))
    })
}

/// The processors, all of them online (the agent's `get-vcpus`, which `API2/Qemu/Agent.pm:register_command` hands
/// on).
pub(super) fn processors(call: &Call) -> Value {
    let count = call.sim.read(|state| {
        let conf = state.vms.get(&call.vmid()).map(|vm| vm.conf.current.clone()).unwrap_or_default();
        let number = |key: &str| conf.get(key).and_then(|value| value.parse::<u32>().ok()).unwrap_or(1);
        number("cores") * number("sockets")
    });
    json!(
        (0..count)
            .map(|id| json!({ "logical-id": id, "online": true, "can-offline": id > 0 }))
            .collect::<Vec<_>>()
    )
}

/// `agent/exec`: a command begins, and has ended by the time somebody asks (`API2/Qemu/Agent.pm:exec`,
/// `QemuServer/Agent.pm:qemu_exec`).
pub(super) fn exec(call: &Call) -> Reply {
    let command = call.text("command").replace('\0', " ");
    let vmid = call.vmid();
    let pid = call.sim.change(|state| {
        let (exitcode, out, err) = state.faults.exec_of(vmid, &command).unwrap_or_default();
        let runs = &mut state.systems.entry(vmid).or_default().runs;
        let pid = runs.last_key_value().map_or(300 + vmid, |(last, _)| last + 1);
        runs.insert(pid, Run { command, exitcode, out, err });
        // A guest that is asked for weeks forgets the oldest.
        while runs.len() > 1000 {
            runs.pop_first();
        }
        pid
    });
    json!({ "pid": pid }).into()
}

/// `agent/exec-status` (`Agent.pm:qemu_exec_status`).
pub(super) fn exec_status(call: &Call) -> Result<Reply, PveError> {
    let pid: u32 = call.text("pid").parse().unwrap_or(0);
    let run = call.sim.read(|state| state.systems.get(&call.vmid())?.runs.get(&pid).cloned());
    let run = run.ok_or_else(|| PveError::die("Agent error: Invalid parameter 'pid'"))?;
    let mut answer = json!({ "exited": 1, "exitcode": run.exitcode });
    for (key, text) in [("out-data", run.out), ("err-data", run.err)] {
        if !text.is_empty() {
            answer[key] = json!(text);
        }
    }
    Ok(answer.into())
}

/// `agent/file-write`. With `encode=0` the caller has encoded the contents already (`API2/Qemu/Agent.pm:file-write`).
pub(super) fn file_write(call: &Call) -> Result<Reply, PveError> {
    let content = call.text("content");
    let encoded = call.get("encode").is_some() && !call.flag("encode");
    let content = if encoded { content.to_owned() } else { BASE64.encode(content) };
    BASE64.decode(&content).map_err(|_| {
        PveError::die(
            "can't write to file: Agent error: Guest agent command failed, error was 'Invalid Base64 data'",
        )
    })?;
    call.sim.change(|state| {
        let files = &mut state.systems.entry(call.vmid()).or_default().files;
        files.insert(call.text("file").to_owned(), content);
    });
    Ok(Reply::null())
}

/// `agent/file-read` (`API2/Qemu/Agent.pm:file-read`).
pub(super) fn file_read(call: &Call) -> Result<Reply, PveError> {
    let path = call.text("file");
    let content = call.sim.read(|state| state.systems.get(&call.vmid())?.files.get(path).cloned());
    let content = content.ok_or_else(|| {
        PveError::die(format!(
            "can't open file: Agent error: failed to open file '{path}': No such file or directory"
        ))
    })?;
    let bytes = BASE64.decode(&content).unwrap_or_default();
    let encoded = call.get("decode").is_some() && !call.flag("decode");
    let shown = if encoded { content } else { String::from_utf8_lossy(&bytes).into_owned() };
    Ok(json!({ "content": shown, "bytes-read": bytes.len() }).into())
}
