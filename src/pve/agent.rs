//! What a VM's guest agent tells of its network.

use std::net::IpAddr;

use http::Method;
use serde::Deserialize;

use super::{
    ApiError,
    client::{Call, Client},
    limits::Class,
};
use crate::types::{NodeName, VmId};

/// A network interface in a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name in the VM.
    pub name: String,
    /// Its addresses, in the guest's order.
    pub addresses: Vec<IpAddr>,
}

#[derive(Deserialize)]
struct RawResult {
    result: Vec<RawInterface>,
}

#[derive(Deserialize)]
struct RawInterface {
    name: String,
    #[serde(default, rename = "ip-addresses")]
    addresses: Vec<RawAddress>,
}

#[derive(Deserialize)]
struct RawAddress {
    #[serde(rename = "ip-address")]
    address: String,
}

fn read(raw: RawResult) -> Vec<Interface> {
    // A zone behind `%` says which link a link-local address is on.
    let address = |raw: RawAddress| raw.address.split('%').next().and_then(|text| text.parse().ok());
    let interface = |raw: RawInterface| Interface {
        name: raw.name,
        addresses: raw.addresses.into_iter().filter_map(address).collect(),
    };
    raw.result.into_iter().map(interface).collect()
}

impl Client {
    /// The network interfaces of a running VM, asked of the agent in it; an error where there is none. Needs `VM.GuestAgent.Audit`
    /// (before PVE 9: `VM.Monitor`). Source: qemu-server `API2/Qemu/Agent.pm`.
    pub async fn guest_interfaces(&self, node: &NodeName, vmid: VmId) -> Result<Vec<Interface>, ApiError> {
        let call = Call::new(
            "guest_interfaces",
            Method::GET,
            &[&"nodes", node, &"qemu", &vmid, &"agent", &"network-get-interfaces"],
        )
        .class(Class::Slow);
        let raw: RawResult = self.call(call).await?;
        Ok(read(raw))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_as_the_agent_tells_them() {
        let text = r#"{"result":[
            {"name":"lo","hardware-address":"00:00:00:00:00:00","ip-addresses":[
                {"ip-address":"127.0.0.1","ip-address-type":"ipv4","prefix":8}]},
            {"name":"eth0","ip-addresses":[
                {"ip-address":"10.0.0.5","ip-address-type":"ipv4","prefix":24},
                {"ip-address":"fe80::1%eth0","ip-address-type":"ipv6","prefix":64}]},
            {"name":"wg0"}]}"#;
        let interfaces = read(serde_json::from_str(text).expect("the agent's JSON"));
        assert_eq!(interfaces.len(), 3);
        assert_eq!(interfaces[1].addresses.len(), 2);
        assert_eq!(interfaces[2].addresses, Vec::<IpAddr>::new());
    }
}
