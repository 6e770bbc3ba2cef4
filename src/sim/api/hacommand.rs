//! Starting, stopping and moving a VM that the HA manager looks after: the call asks the manager, and its task ends once
//! it has been asked (qemu-server `API2/Qemu.pm:vm_start`, `vm_stop`, `vm_shutdown`, `migrate_vm`, pve-ha-manager
//! `CLI/ha_manager.pm`). What comes of it is in `hamanager`.

use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::state::State;
use serde_json::json;

/// What the manager is asked for.
pub(super) enum Wish<'a> {
    Start,
    /// Seconds the guest has to shut down; 0 pulls the plug.
    Stop(u64),
    Migrate(&'a str),
}

/// Whether a VM is the manager's to start and stop: an ignored resource is not (pve-ha-manager
/// `HA/Config.pm:vm_is_ha_managed`, `$service_check_ha_state`).
pub(super) fn is_managed(state: &State, vmid: u32) -> bool {
    state.ha.get(&format!("vm:{vmid}")).is_some_and(|section| section.get("state") != Some(&json!("ignored")))
}

/// Whether a VM is a resource, an ignored one too (`HA/Config.pm:service_is_configured`).
pub(super) fn is_configured(state: &State, vmid: u32) -> bool {
    state.ha.contains_key(&format!("vm:{vmid}"))
}

/// Refuses requests for a resource in error, which must be disabled first (`API2/HA/Resources.pm:check_service_state`).
pub(super) fn check_service(state: &State, sid: &str) -> Result<(), PveError> {
    let state_said = super::ha::vmid_of(sid).and_then(|vmid| state.vms.get(&vmid)?.hastate.as_deref());
    if state_said == Some("error") {
        return Err(PveError::die(format!(
            "service '{sid}' in error state, must be disabled and fixed first"
        )));
    }
    Ok(())
}

/// Asks the manager, where the VM is one of its; nothing where it is not (`API2/Qemu.pm:vm_start`,
/// `CLI/ha_manager.pm:stop`).
pub(super) fn ask(call: &Call, wish: &Wish<'_>) -> Option<Reply> {
    let vmid = call.vmid();
    if !call.sim.read(|state| is_managed(state, vmid)) {
        return None;
    }
    let sid = format!("vm:{vmid}");
    let (worker, line, command, request) = match wish {
        Wish::Start => (
            "hastart",
            format!("Requesting HA start for VM {vmid}"),
            format!("set {sid} --state started"),
            None,
        ),
        Wish::Stop(timeout) => (
            "hastop",
            format!("Requesting HA stop for VM {vmid}"),
            format!("crm-command stop {sid} {timeout}"),
            Some("stop".to_owned()),
        ),
        Wish::Migrate(node) => (
            "hamigrate",
            format!("Requesting HA migration for VM {vmid} to node {node}"),
            format!("migrate {sid} {node}"),
            Some(format!("migrate {node}")),
        ),
    };
    let sim = call.sim.clone();
    let upid =
        call.sim.start_task(call.node(), worker, &vmid.to_string(), &call.user, move |log| async move {
            log.line(line);
            let asked = sim.change(|state| {
                check_service(state, &sid)?;
                if let Some(request) = request {
                    // A command for the manager's next round (`HA/Config.pm:queue_crm_commands`).
                    state.ha_requests.insert(sid, request);
                } else if let Some(section) = state.ha.get_mut(&sid) {
                    section.insert("state".to_owned(), json!("started"));
                }
                Ok::<_, PveError>(())
            });
            asked.map_err(|error| {
                log.line(error.message());
                PveError::die(format!("command 'ha-manager {command}' failed: exit code 255"))
            })
        });
    Some(json!(upid).into())
}
