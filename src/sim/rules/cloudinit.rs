//! Cloud-init: which drive carries it, what is written there, and which changes are not written there yet
//! (qemu-server `QemuServer/Cloudinit.pm`, `QemuServer.pm:vmconfig_hotplug_pending`, `$cloudinit_record_changed`).

use super::conf::{Conf, Values};
use super::drive::{Drive, index_of, is_drive_key};
use super::error::PveError;
use super::schema::split_list;
use serde_json::{Value, json};
use sha1::{Digest as _, Sha1};
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// Bytes of the drive (`Cloudinit.pm:CLOUDINIT_DISK_SIZE`).
pub const SIZE: u64 = 4 << 20;

/// What a password is shown as.
pub const HIDDEN: &str = "**********";

/// The keys that `GET cloudinit` lists (`API2/Qemu.pm:$cloudinitoptions`).
const OPTIONS: &[&str] =
    &["cicustom", "cipassword", "citype", "ciupgrade", "ciuser", "nameserver", "searchdomain", "sshkeys"];

/// The node's resolver, where the config names none (`Cloudinit.pm:get_dns_conf`).
const RESOLVER: (&str, &str) = ("192.0.2.53", "example.com");

/// Whether a key is for cloud-init alone (`QemuServer.pm:$confdesc_cloudinit`).
pub fn is_option(key: &str) -> bool {
    OPTIONS.contains(&key) || index_of(key, "ipconfig").is_some()
}

/// Whether a change of the key is noted until the drive is written anew (`QemuServer.pm:cloudinit_pending_properties`).
fn is_noted(key: &str) -> bool {
    is_option(key) || key == "name" || index_of(key, "net").is_some()
}

/// Whether a volume carries cloud-init, or is to be made for it: `local:100/vm-100-cloudinit.qcow2`, `local:cloudinit`
/// (`Drive.pm:drive_is_cloudinit`).
pub fn is_drive(file: &str) -> bool {
    let Some((_, name)) = file.rsplit_once([':', '/']) else { return false };
    let own = name.strip_prefix("vm-").and_then(|rest| {
        let (id, rest) = rest.split_once('-')?;
        (!id.is_empty() && id.chars().all(|c| c.is_ascii_digit())).then_some(rest)
    });
    let rest = own.unwrap_or(name).strip_prefix("cloudinit");
    let formats = ["", ".raw", ".qcow", ".qed", ".qcow2", ".vmdk", ".cloop"];
    rest.is_some_and(|ending| formats.contains(&ending))
}

/// The key of a VM's cloud-init drive other than `except` (`QemuConfig.pm:has_cloudinit`).
pub fn drive_of<'a>(values: &'a Values, except: Option<&str>) -> Option<&'a str> {
    let drives = values.iter().filter(|(key, _)| is_drive_key(key) && !key.starts_with("unused"));
    let mut drives = drives.filter(|(key, _)| except != Some(key.as_str()));
    drives
        .find(|(key, value)| Drive::stored(key, value).is_some_and(|drive| is_drive(&drive.file)))
        .map(|(key, _)| key.as_str())
}

/// Notes that a running VM's key has changed from `old` to `new`. A VM without a drive has no such notes, which
/// `write_vm_config` leaves out (`QemuServer.pm:vmconfig_hotplug_pending`).
pub fn note(conf: &mut Conf, key: &str, old: Option<&str>, new: Option<&str>) {
    if !is_noted(key) || drive_of(&conf.current, None).is_none() {
        return;
    }
    let notes = &mut conf.cloudinit;
    let before = notes.get(key).cloned();
    let mut added: BTreeSet<String> =
        notes.remove("added").iter().flat_map(|list| split_list(list)).map(str::to_owned).collect();
    match (old, new) {
        // Back to what the drive has.
        (_, Some(new)) if before.as_deref() == Some(new) => {
            notes.remove(key);
            added.remove(key);
        }
        (_, Some(_)) if before.is_some() => {}
        (Some(old), _) if before.is_none() && !added.contains(key) => {
            notes.insert(key.to_owned(), old.to_owned());
        }
        (None, Some(_)) => drop(added.insert(key.to_owned())),
        (Some(_), None) => drop(added.remove(key)),
        _ => {}
    }
    if !added.is_empty() {
        let added: Vec<String> = added.into_iter().collect();
        notes.insert("added".to_owned(), added.join(","));
    }
}

fn shown(key: &str, value: &str) -> Value {
    if key == "cipassword" { HIDDEN.into() } else { super::options::to_json(key, value) }
}

/// `GET cloudinit`: what the drive has, and what it is to have (`API2/Qemu.pm:cloudinit_pending`).
pub fn listing(conf: &Conf) -> Vec<Value> {
    let (current, notes) = (&conf.current, &conf.cloudinit);
    let added = notes.get("added").map_or("", String::as_str);
    let mut entries: Vec<Value> = split_list(added)
        .map(|key| {
            let pending = current.get(key).map(|value| shown(key, value));
            json!({ "key": key, "pending": pending })
        })
        .collect();
    for key in OPTIONS.iter().filter(|key| !added.contains(**key)) {
        let Some(value) = current.get(*key).filter(|value| !matches!(value.as_str(), "" | "0")) else {
            continue;
        };
        entries.push(match notes.get(*key) {
            Some(old) => json!({ "key": key, "value": shown(key, old), "pending": shown(key, value) }),
            None => json!({ "key": key, "value": shown(key, value) }),
        });
    }
    let gone = notes.keys().filter(|key| *key != "added" && !current.contains_key(*key));
    entries.extend(gone.map(|key| json!({ "key": key, "delete": 1 })));
    entries
}

/// A password as the config keeps it: one that is hashed already as it is (`API2/Qemu.pm:$update_vm_api`, key
/// `cipassword`). PVE hashes with crypt(3), the simulator with SHA-1: it is not the password, and no guest logs in.
pub fn keep_password(password: &str, salt: u32) -> String {
    let mut parts = password.split('$');
    let is_hash = parts.next() == Some("")
        && parts.next().is_some_and(|kind| matches!(kind, "1" | "5" | "6" | "2a" | "2y"))
        && parts.filter(|part| !part.is_empty()).count() >= 2;
    if is_hash {
        return password.to_owned();
    }
    format!("$5${salt:08x}${}", hex(&format!("{salt} {password}")))
}

fn hex(text: &str) -> String {
    Sha1::digest(text).iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// What a drive carries: `user`, `network` or `meta` (`Cloudinit.pm:dump_cloudinit_config`). A password that is not for
/// the caller is hidden.
pub fn dump(conf: &Values, vmid: u32, what: &str, hide: bool) -> Result<String, PveError> {
    // `Cloudinit.pm:get_cloudinit_format`, `Helpers.pm:windows_version`
    let windows = conf.get("ostype").is_some_and(|os| os.starts_with('w'));
    let nocloud = match conf.get("citype").map(String::as_str) {
        Some(kind) => kind == "nocloud",
        None => !windows,
    };
    let network = || if nocloud { network_of_nocloud(conf) } else { network_of_configdrive(conf) };
    match what {
        "user" => Ok(user(conf, vmid, hide)),
        "network" => network(),
        _ => {
            let id = hex(&format!("{}{}", user(conf, vmid, false), network()?));
            Ok(if nocloud {
                format!("instance-id: {id}\n")
            } else {
                format!(
                    "{{\n     \"uuid\": \"{id}\",\n     \"network_config\": {{ \"content_path\": \"/content/0000\" }}\n}}\n"
                )
            })
        }
    }
}

/// `Cloudinit.pm:cloudinit_userdata`, `get_hostname_fqdn`.
fn user(conf: &Values, vmid: u32, hide: bool) -> String {
    let name = conf.get("name").cloned().unwrap_or_else(|| format!("VM{vmid}"));
    let (host, fqdn) = match (name.split_once('.'), conf.get("searchdomain")) {
        (Some((host, _)), _) => (host.to_owned(), name.clone()),
        (None, Some(domain)) => (name.clone(), format!("{name}.{domain}")),
        (None, None) => (name.clone(), name.clone()),
    };
    let mut text = format!("#cloud-config\nhostname: {host}\nmanage_etc_hosts: true\nfqdn: {fqdn}\n");
    let login = conf.get("ciuser").map(String::as_str);
    if let Some(login) = login {
        let _ = writeln!(text, "user: {login}");
    }
    if login == Some("root") {
        text.push_str("disable_root: False\n");
    }
    if let Some(password) = conf.get("cipassword") {
        let _ = writeln!(text, "password: {}", if hide { HIDDEN } else { password });
    }
    if let Some(keys) = conf.get("sshkeys") {
        text.push_str("ssh_authorized_keys:\n");
        let keys = percent_encoding::percent_decode_str(keys).decode_utf8_lossy().into_owned();
        for key in keys.split('\n').filter(|key| !key.trim().is_empty()) {
            let _ = writeln!(text, "  - {key}");
        }
    }
    text.push_str("chpasswd:\n  expire: False\n");
    if login != Some("root") {
        text.push_str("users:\n  - default\n");
    }
    if conf.get("ciupgrade").is_none_or(|value| value != "0") {
        text.push_str("package_upgrade: true\n");
    }
    text
}

/// An interface that cloud-init sets up: its number, its hardware address, and the parts of its `ipconfigN`.
struct Interface<'a> {
    number: u32,
    mac: Option<&'a str>,
    ip: Option<&'a str>,
    gateway: Option<&'a str>,
    ip6: Option<&'a str>,
    gateway6: Option<&'a str>,
}

fn interfaces(conf: &Values) -> impl Iterator<Item = Interface<'_>> {
    conf.iter().filter_map(|(key, net)| {
        let number = index_of(key, "net")?;
        let config = conf.get(&format!("ipconfig{number}"))?;
        let part = |name: &str| {
            config.split(',').filter_map(|part| part.split_once('=')).find(|(key, _)| *key == name)
        };
        let part = |name: &str| part(name).map(|(_, value)| value);
        let mac = net
            .split(',')
            .filter_map(|part| part.split_once('='))
            .find(|(key, value)| *key == "macaddr" || (value.len() == 17 && value.matches(':').count() == 5));
        let mac = mac.map(|(_, mac)| mac);
        let (ip, gateway, ip6, gateway6) = (part("ip"), part("gw"), part("ip6"), part("gw6"));
        Some(Interface { number, mac, ip, gateway, ip6, gateway6 })
    })
}

/// An IPv4 address and its netmask (`Cloudinit.pm:split_ip4`).
fn split_ip4(ip: &str) -> Result<(&str, String), PveError> {
    let parts = ip.split_once('/').and_then(|(address, bits)| Some((address, bits.parse::<u32>().ok()?)));
    let (address, bits) = parts.ok_or_else(|| PveError::die(format!("not a CIDR: {ip}")))?;
    let mask = u32::MAX.checked_shl(32 - bits.min(32)).unwrap_or(0);
    Ok((address, std::net::Ipv4Addr::from(mask).to_string()))
}

/// Search domains and name servers (`Cloudinit.pm:get_dns_conf`).
fn resolver(conf: &Values) -> (Vec<&str>, Vec<&str>) {
    let domains = conf.get("searchdomain").map_or(RESOLVER.1, String::as_str);
    let servers = conf.get("nameserver").map_or(RESOLVER.0, String::as_str);
    (domains.split_whitespace().collect(), servers.split_whitespace().collect())
}

/// `Cloudinit.pm:nocloud_network`.
fn network_of_nocloud(conf: &Values) -> Result<String, PveError> {
    let mut text = "version: 1\nconfig:\n".to_owned();
    for Interface { number, mac, ip, gateway, ip6, gateway6 } in interfaces(conf) {
        let mac = mac
            .ok_or_else(|| PveError::die(format!("network interface 'net{number}' has no mac address")))?
            .to_ascii_lowercase();
        let _ = write!(
            text,
            "    - type: physical\n      name: eth{number}\n      mac_address: '{mac}'\n      subnets:\n"
        );
        match ip {
            Some("dhcp") => text.push_str("      - type: dhcp4\n"),
            Some(ip) => {
                let (address, mask) = split_ip4(ip)?;
                let _ = write!(
                    text,
                    "      - type: static\n        address: '{address}'\n        netmask: '{mask}'\n"
                );
                if let Some(gateway) = gateway {
                    let _ = writeln!(text, "        gateway: '{gateway}'");
                }
            }
            None => {}
        }
        match ip6 {
            Some("dhcp") => text.push_str("      - type: dhcp6\n"),
            Some("auto") => text.push_str("      - type: ipv6_slaac\n"),
            Some(ip) => {
                let _ = write!(text, "      - type: static6\n        address: '{ip}'\n");
                if let Some(gateway) = gateway6 {
                    let _ = writeln!(text, "        gateway: '{gateway}'");
                }
            }
            None => {}
        }
    }
    let (domains, servers) = resolver(conf);
    text.push_str("    - type: nameserver\n");
    for (title, entries) in [("address", servers), ("search", domains)] {
        if !entries.is_empty() {
            let _ = writeln!(text, "      {title}:");
        }
        for entry in entries {
            let _ = writeln!(text, "      - '{entry}'");
        }
    }
    Ok(text)
}

/// `Cloudinit.pm:configdrive2_network`.
fn network_of_configdrive(conf: &Values) -> Result<String, PveError> {
    let mut text = "auto lo\niface lo inet loopback\n\n".to_owned();
    let (domains, servers) = resolver(conf);
    if !servers.is_empty() {
        let _ = writeln!(text, "        dns_nameservers {}", servers.join(" "));
    }
    if !domains.is_empty() {
        let _ = writeln!(text, "        dns_search {}", domains.join(" "));
    }
    let fixed = |family: &str, number: u32, address: &str, mask: &str, gateway: Option<&str>| {
        let gateway = gateway.map_or_else(String::new, |gateway| format!("        gateway {gateway}\n"));
        format!(
            "iface eth{number} {family} static\n        address {address}\n        netmask {mask}\n{gateway}"
        )
    };
    for Interface { number, ip, gateway, ip6, gateway6, .. } in interfaces(conf) {
        let _ = writeln!(text, "auto eth{number}");
        match ip {
            Some("dhcp") => {
                let _ = writeln!(text, "iface eth{number} inet dhcp");
            }
            Some(ip) => {
                let (address, mask) = split_ip4(ip)?;
                text.push_str(&fixed("inet", number, address, &mask, gateway));
            }
            None => {}
        }
        match ip6 {
            Some(how @ ("auto" | "dhcp")) => {
                let _ = writeln!(text, "iface eth{number} inet6 {how}");
            }
            Some(ip) => {
                let (address, mask) = ip.split_once('/').unwrap_or((ip, ""));
                text.push_str(&fixed("inet6", number, address, mask, gateway6));
            }
            None => {}
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(pairs: &[(&str, &str)]) -> Conf {
        let current = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Conf { current, ..Conf::default() }
    }

    fn change(conf: &mut Conf, key: &str, new: Option<&str>) {
        let old = conf.current.get(key).cloned();
        note(conf, key, old.as_deref(), new);
        match new {
            Some(new) => conf.current.insert(key.to_owned(), new.to_owned()),
            None => conf.current.remove(key),
        };
    }

    #[test]
    fn a_drive_is_known_by_its_name() {
        for file in ["local:cloudinit", "local:100/vm-100-cloudinit.qcow2", "thin:vm-100-cloudinit"] {
            assert!(is_drive(file), "{file}");
        }
        for file in ["none", "local:iso/cloudinit.iso", "thin:vm-100-disk-0", "thin:vm-x-cloudinit"] {
            assert!(!is_drive(file), "{file}");
        }
    }

    #[test]
    fn changes_are_noted_until_they_are_taken_back_or_written() {
        let mut conf = conf(&[("ide2", "local:100/vm-100-cloudinit.qcow2,media=cdrom"), ("ciuser", "ann")]);
        change(&mut conf, "ciuser", Some("bob"));
        change(&mut conf, "ciuser", Some("eve"));
        change(&mut conf, "ipconfig0", Some("ip=dhcp"));
        change(&mut conf, "nameserver", Some("192.0.2.1"));
        change(&mut conf, "nameserver", None);
        assert_eq!(
            listing(&conf),
            [
                json!({ "key": "ipconfig0", "pending": "ip=dhcp" }),
                json!({ "key": "ciuser", "value": "ann", "pending": "eve" }),
            ]
        );
        change(&mut conf, "ciuser", Some("ann"));
        change(&mut conf, "ipconfig0", None);
        assert!(conf.cloudinit.is_empty(), "{:?}", conf.cloudinit);
        change(&mut conf, "ciuser", None);
        assert_eq!(listing(&conf), [json!({ "key": "ciuser", "delete": 1 })]);
    }

    #[test]
    fn nothing_is_noted_without_a_drive_and_of_other_keys() {
        let mut bare = conf(&[("ciuser", "ann")]);
        change(&mut bare, "ciuser", Some("bob"));
        assert!(bare.cloudinit.is_empty());
        let mut with = conf(&[("ide2", "local:100/vm-100-cloudinit.qcow2,media=cdrom"), ("cores", "1")]);
        change(&mut with, "cores", Some("2"));
        assert!(with.cloudinit.is_empty());
    }

    #[test]
    fn a_drive_carries_what_proxmox_writes() {
        let conf = conf(&[
            ("name", "w1"),
            ("searchdomain", "k8s.example.com"),
            ("ciuser", "root"),
            ("cipassword", "$5$x$y"),
            ("sshkeys", "ssh-ed25519%20AAAA%20ann%0A"),
            ("net0", "virtio=BC:24:11:00:00:01,bridge=vmbr0"),
            ("ipconfig0", "ip=192.0.2.10/24,gw=192.0.2.1,ip6=auto"),
        ]);
        let text = dump(&conf.current, 100, "user", true).expect("it is well formed");
        assert_eq!(
            text,
            "#cloud-config\nhostname: w1\nmanage_etc_hosts: true\nfqdn: w1.k8s.example.com\nuser: root\n\
             disable_root: False\npassword: **********\nssh_authorized_keys:\n  - ssh-ed25519 AAAA ann\nchpasswd:\n  \
             expire: False\npackage_upgrade: true\n"
        );
        let text = dump(&conf.current, 100, "network", true).expect("it is well formed");
        assert_eq!(
            text,
            "version: 1\nconfig:\n    - type: physical\n      name: eth0\n      mac_address: 'bc:24:11:00:00:01'\n      \
             subnets:\n      - type: static\n        address: '192.0.2.10'\n        netmask: '255.255.255.0'\n        \
             gateway: '192.0.2.1'\n      - type: ipv6_slaac\n    - type: nameserver\n      address:\n      - \
             '192.0.2.53'\n      search:\n      - 'k8s.example.com'\n"
        );
        let id = |conf: &Conf| dump(&conf.current, 100, "meta", true).expect("it is well formed");
        let mut other = conf.clone();
        other.current.insert("ciuser".to_owned(), "ann".to_owned());
        assert_ne!(id(&conf), id(&other));
        assert!(id(&conf).starts_with("instance-id: "));
    }

    #[test]
    fn a_password_is_kept_as_a_hash_and_a_hash_as_it_is() {
        assert_eq!(keep_password("$6$salt$hash", 1), "$6$salt$hash");
        assert_eq!(keep_password("$5$rounds=5000$salt$hash", 1), "$5$rounds=5000$salt$hash");
        let kept = keep_password("hunter2", 1);
        assert!(kept.starts_with("$5$00000001$") && !kept.contains("hunter2"), "{kept}");
        assert_ne!(kept, keep_password("hunter2", 2));
    }
}
