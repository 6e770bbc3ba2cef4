//! Network devices of a VM, as far as their hardware addresses go (qemu-server `QemuServer/Network.pm:parse_net`,
//! `add_random_macs`).

use sha1::{Digest as _, Sha1};

/// Whether a part of the value is the model with its address: `virtio=BC:24:11:00:00:01`.
fn has_mac(part: &str) -> bool {
    part.split_once('=').is_some_and(|(_, mac)| mac.len() == 17 && mac.matches(':').count() == 5)
}

/// An address under PVE's prefix, which is made of a salt (pve-common `Tools.pm:random_ether_addr`).
pub fn address(salt: &str) -> String {
    let hash = Sha1::digest(salt);
    let bytes: Vec<String> = hash.iter().take(3).map(|byte| format!("{byte:02X}")).collect();
    format!("BC:24:11:{}", bytes.join(":"))
}

/// The value with an address, where it has none (`QemuServer/Network.pm:add_random_macs`).
pub fn with_address(value: &str, salt: &str) -> String {
    if value.split(',').any(has_mac) { value.to_owned() } else { with_other_address(value, salt) }
}

/// The value with another address, as every clone gets one (`API2/Qemu.pm:clone_vm`).
pub fn with_other_address(value: &str, salt: &str) -> String {
    let is_model = |part: &&str| has_mac(part) || part.starts_with("model=") || !part.contains('=');
    let Some(part) = value.split(',').find(is_model) else { return value.to_owned() };
    let model = part.strip_prefix("model=").unwrap_or_else(|| part.split('=').next().unwrap_or_default());
    let device = format!("{model}={}", address(salt));
    let others = value.split(',').filter(|other| *other != part && !other.starts_with("macaddr="));
    std::iter::once(device.as_str()).chain(others).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_an_address_gets_one_and_a_clone_another() {
        let made = with_address("virtio,bridge=vmbr0", "a");
        assert!(made.starts_with("virtio=BC:24:11:") && made.ends_with(",bridge=vmbr0"), "{made}");
        assert_eq!(with_address(&made, "b"), made);
        let other = with_other_address(&made, "b");
        assert!(other != made && other.ends_with(",bridge=vmbr0"), "{other}");
        let named = with_address("model=e1000,bridge=vmbr0,firewall=1", "a");
        assert!(
            named.starts_with("e1000=BC:24:11:") && named.ends_with(",bridge=vmbr0,firewall=1"),
            "{named}"
        );
    }
}
