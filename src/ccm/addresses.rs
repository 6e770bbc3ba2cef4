//! `status.addresses`: what the kubelet was told, and what the guest agent sees. They are never blanked.

use std::{net::IpAddr, str::FromStr};

use k8s_openapi::api::core::v1::{Node, NodeAddress};
use kube::ResourceExt as _;

use crate::{k8s::node::taint, pve::agent::Interface, types::ParseError};

/// The annotation in which a kubelet with an external cloud provider says what `--node-ip` it was given.
pub const PROVIDED: &str = "alpha.kubernetes.io/provided-node-ip";
/// Interfaces that are not the machine's: made by container networks and by Kubernetes itself.
const VIRTUAL: &[&str] = &[
    "lo",
    "br-",
    "cali",
    "cilium_",
    "cni",
    "docker",
    "dummy",
    "flannel",
    "genev_sys",
    "kube-",
    "lxc",
    "lxd",
    "nodelocaldns",
    "ovn",
    "podman",
    "tunl",
    "veth",
    "virbr",
    "vxlan",
    "weave",
    "wg",
];

/// Where addresses come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Only what the kubelet was told.
    #[default]
    Provided,
    /// What the guest agent sees, too.
    Agent,
}

/// How addresses are chosen.
#[derive(Debug, Clone, Default)]
pub struct AddressRules {
    /// Where they come from.
    pub mode: Mode,
    /// Which are `ExternalIP`.
    pub external: CidrRules,
    /// Which come first, and which are left out.
    pub order: CidrRules,
    /// Leave out IPv6.
    pub no_ipv6: bool,
}

/// Networks, as `10.0.0.0/8,!10.1.0.0/16`: those behind `!` are left out, the others are wanted, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CidrRules {
    wanted: Vec<Cidr>,
    left_out: Vec<Cidr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cidr {
    address: IpAddr,
    bits: u32,
}

impl Cidr {
    fn contains(self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                (net.to_bits() ^ ip.to_bits()).checked_shr(32 - self.bits).unwrap_or(0) == 0
            }
            (IpAddr::V6(net), IpAddr::V6(ip)) => {
                (net.to_bits() ^ ip.to_bits()).checked_shr(128 - self.bits).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Cidr {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad =
            || ParseError::new("network", text, "it must be an address, `/` and the length of its prefix");
        let (address, bits) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(bad)?;
        Ok(Self { address, bits })
    }
}

impl FromStr for CidrRules {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut rules = Self::default();
        for rule in text.split(',').map(str::trim).filter(|rule| !rule.is_empty()) {
            match rule.strip_prefix('!') {
                Some(network) => rules.left_out.push(network.trim().parse()?),
                None => rules.wanted.push(rule.parse()?),
            }
        }
        Ok(rules)
    }
}

impl CidrRules {
    fn leaves_out(&self, address: IpAddr) -> bool {
        self.left_out.iter().any(|network| network.contains(address))
    }

    /// The place of the first network that has the address; behind all where none has.
    fn place(&self, address: IpAddr) -> usize {
        self.wanted.iter().position(|network| network.contains(address)).unwrap_or(self.wanted.len())
    }

    fn wants(&self, address: IpAddr) -> bool {
        self.place(address) < self.wanted.len() && !self.leaves_out(address)
    }
}

/// Whether the addresses of this node are a cloud provider's to write. A kubelet without one writes its own, over and over.
pub fn is_ours_to_write(node: &Node) -> bool {
    node.annotations().contains_key(PROVIDED)
        || taint(node, super::taints::UNINITIALIZED).is_some()
        || !existing(node).iter().any(|address| address.type_ == "InternalIP")
}

fn existing(node: &Node) -> &[NodeAddress] {
    node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default()
}

/// The addresses a node is to have. `interfaces`: what the agent sees, `None` where it was not asked or did not answer, which keeps
/// what is there.
pub fn desired(node: &Node, rules: &AddressRules, interfaces: Option<&[Interface]>) -> Vec<NodeAddress> {
    let mut addresses: Vec<NodeAddress> = Vec::new();
    let mut add = |kind: &str, address: String| {
        if !addresses
            .iter()
            .any(|known| known.address == address && (known.type_ == kind || kind == "InternalIP"))
        {
            addresses.push(NodeAddress { type_: kind.to_owned(), address });
        }
    };
    add("Hostname", node.name_any());
    let provided = node.annotations().get(PROVIDED).map(String::as_str).unwrap_or_default();
    for address in provided.split(',').filter_map(|text| text.trim().parse::<IpAddr>().ok()) {
        add("InternalIP", address.to_string());
    }
    let seen = interfaces.filter(|_| rules.mode == Mode::Agent);
    let mut found: Vec<IpAddr> = seen
        .into_iter()
        .flatten()
        .filter(|interface| !is_virtual(&interface.name))
        .flat_map(|interface| interface.addresses.iter().copied())
        .filter(|address| is_usable(*address, rules))
        .collect();
    // The agent's order within each network.
    found.sort_by_key(|address| rules.order.place(*address));
    for address in found {
        let kind = if rules.external.wants(address) { "ExternalIP" } else { "InternalIP" };
        add(kind, address.to_string());
    }
    // What nobody told anew stays: other kinds always, addresses where the agent is silent or left nothing.
    let is_address = |kind: &str| matches!(kind, "InternalIP" | "ExternalIP");
    let blank = seen.is_none() && (rules.mode == Mode::Agent || provided.is_empty())
        || !addresses.iter().any(|address| address.type_ == "InternalIP");
    for old in existing(node) {
        let known = addresses
            .iter()
            .any(|new| new.address == old.address && (new.type_ == old.type_ || is_address(&old.type_)));
        if old.type_ != "Hostname" && !known && (!is_address(&old.type_) || blank) {
            addresses.push(old.clone());
        }
    }
    addresses
}

fn is_virtual(name: &str) -> bool {
    VIRTUAL.iter().any(|begin| if *begin == "lo" { name == "lo" } else { name.starts_with(begin) })
}

/// Whether others can reach the machine by an address; unique local ones of IPv6 only where a rule names their network.
fn is_usable(address: IpAddr, rules: &AddressRules) -> bool {
    let named = rules.order.wants(address) || rules.external.wants(address);
    let reachable = match address {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
        IpAddr::V6(ip) => {
            !rules.no_ipv6
                && !ip.is_loopback()
                && !ip.is_unspecified()
                && !ip.is_unicast_link_local()
                && (!ip.is_unique_local() || named)
        }
    };
    reachable && !rules.order.leaves_out(address)
}

/// Whether the node has just these addresses.
pub fn holds(node: &Node, desired: &[NodeAddress]) -> bool {
    existing(node) == desired
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::NodeStatus;

    use super::{
        super::instances::tests::{UUID, node},
        *,
    };

    fn with(provided: Option<&str>, old: &[(&str, &str)]) -> Node {
        let mut node = node("", UUID);
        if let Some(provided) = provided {
            node.annotations_mut().insert(PROVIDED.into(), provided.into());
        }
        let address =
            |(kind, text): &(&str, &str)| NodeAddress { type_: (*kind).into(), address: (*text).into() };
        node.status =
            Some(NodeStatus { addresses: Some(old.iter().map(address).collect()), ..Default::default() });
        node
    }

    fn texts(addresses: &[NodeAddress]) -> Vec<String> {
        addresses.iter().map(|address| format!("{}={}", address.type_, address.address)).collect()
    }

    fn seen() -> Vec<Interface> {
        let interface = |name: &str, all: &[&str]| Interface {
            name: name.into(),
            addresses: all.iter().map(|text| text.parse().expect("an address")).collect(),
        };
        vec![
            interface("lo", &["127.0.0.1", "::1"]),
            interface("eth0", &["10.0.0.5", "203.0.113.7", "2001:db8::5", "fe80::1", "fd00::5"]),
            interface("eth1", &["192.168.7.5"]),
            interface("cilium_host", &["10.244.0.1"]),
            interface("kube-ipvs0", &["10.96.0.1"]),
        ]
    }

    fn agent(order: &str, external: &str) -> AddressRules {
        AddressRules {
            mode: Mode::Agent,
            order: order.parse().expect("networks"),
            external: external.parse().expect("networks"),
            no_ipv6: false,
        }
    }

    #[test]
    fn every_provided_address_is_internal() {
        let node = with(Some("10.0.0.5,2001:db8::5"), &[]);
        let desired = desired(&node, &AddressRules::default(), None);
        assert_eq!(texts(&desired), ["Hostname=w1", "InternalIP=10.0.0.5", "InternalIP=2001:db8::5"]);
    }

    #[test]
    fn addresses_are_never_blanked() {
        let old = [
            ("Hostname", "w1"),
            ("InternalIP", "10.0.0.9"),
            ("ExternalIP", "203.0.113.9"),
            ("InternalDNS", "x"),
        ];
        let node = with(None, &old);
        for (rules, interfaces) in [
            (AddressRules::default(), None),
            (agent("", ""), None),
            (agent("!0.0.0.0/0,!::/0", ""), Some(seen())),
        ] {
            let texts = texts(&desired(&node, &rules, interfaces.as_deref()));
            assert!(texts.contains(&"InternalIP=10.0.0.9".to_owned()), "{texts:?}");
            assert!(texts.contains(&"InternalDNS=x".to_owned()), "{texts:?}");
        }
    }

    #[test]
    fn the_order_sorts_and_only_what_is_behind_an_exclamation_mark_is_left_out() {
        let node = with(Some("10.0.0.5"), &[]);
        let rules = agent("192.168.0.0/16,10.0.0.0/8,!2001:db8::/32", "203.0.113.0/24");
        let desired = desired(&node, &rules, Some(&seen()));
        assert_eq!(
            texts(&desired),
            ["Hostname=w1", "InternalIP=10.0.0.5", "InternalIP=192.168.7.5", "ExternalIP=203.0.113.7"]
        );
    }

    #[test]
    fn virtual_interfaces_and_link_local_addresses_are_left_out() {
        let texts = texts(&desired(&with(None, &[]), &agent("", ""), Some(&seen())));
        for bad in ["127.0.0.1", "10.244.0.1", "10.96.0.1", "fe80::1", "fd00::5"] {
            assert!(!texts.iter().any(|text| text.ends_with(&format!("={bad}"))), "{bad}: {texts:?}");
        }
        assert!(texts.contains(&"InternalIP=2001:db8::5".to_owned()));
    }

    #[test]
    fn a_kubelet_that_writes_its_own_addresses_is_left_alone() {
        assert!(!is_ours_to_write(&with(None, &[("InternalIP", "10.0.0.5")])));
        assert!(is_ours_to_write(&with(Some("10.0.0.5"), &[("InternalIP", "10.0.0.5")])));
        assert!(is_ours_to_write(&with(None, &[("Hostname", "w1")])));
    }

    #[test]
    fn networks_hold_what_they_say() {
        for (network, address, inside) in [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("0.0.0.0/0", "1.2.3.4", true),
            ("::/0", "2001:db8::1", true),
            ("::/0", "1.2.3.4", false),
            ("10.0.0.5/32", "10.0.0.5", true),
        ] {
            let cidr: Cidr = network.parse().expect("a network");
            assert_eq!(cidr.contains(address.parse().expect("an address")), inside, "{network} {address}");
        }
        for bad in ["10.0.0.0", "10.0.0.0/33", "x/8", "::/129"] {
            assert!(bad.parse::<CidrRules>().is_err(), "{bad}");
        }
    }
}
