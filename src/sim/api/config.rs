//! Reading a config (qemu-server `API2/Qemu.pm:vm_config`, `vm_pending`).

use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::rules::{cloudinit, options, pending};
use serde_json::{Map, Value, json};

/// `GET config`: with pending changes merged, unless `current=1`; a snapshot's values with `snapshot=`
/// (`API2/Qemu.pm:vm_config`).
pub(super) fn get(call: &Call) -> Result<Reply, PveError> {
    let vmid = call.vmid();
    call.sim.read(|state| {
        let conf = &state.vm_on(call.node(), vmid)?.conf;
        let values = match call.get("snapshot") {
            Some(_) if call.flag("current") => {
                return Err(PveError::parameter(
                    "snapshot",
                    "cannot use 'snapshot' parameter with 'current'",
                ));
            }
            Some(name) => conf
                .snapshots
                .get(name)
                .cloned()
                .ok_or_else(|| PveError::die(format!("snapshot '{name}' does not exist")))?,
            None if call.flag("current") => conf.current.clone(),
            None => conf.merged(),
        };
        let mut data: Map<String, Value> =
            values.iter().map(|(key, value)| (key.clone(), options::to_json(key, value))).collect();
        if let Some(password) = data.get_mut("cipassword") {
            *password = cloudinit::HIDDEN.into();
        }
        data.insert("digest".to_owned(), json!(conf.digest()));
        Ok(Value::Object(data).into())
    })
}

/// `GET pending` (`API2/Qemu.pm:vm_pending`).
pub(super) fn pending(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| Ok(pending::listing(&state.vm_on(call.node(), call.vmid())?.conf).into()))
}
