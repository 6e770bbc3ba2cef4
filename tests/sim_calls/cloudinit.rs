//! The cloud-init drive of a VM: made, changed, written, given away (qemu-server `QemuServer/Cloudinit.pm`,
//! `API2/Qemu.pm:create_disks`, `QemuServer.pm:vmconfig_register_unused_drive`); CD-ROMs and files from the web.

use super::cluster::Cluster;
use serde_json::json;

const VM: &str = "/nodes/pve1/qemu/100";
const DRIVE: &str = "local:100/vm-100-cloudinit.qcow2";

async fn with_drive() -> Cluster {
    let cluster = Cluster::new();
    let net = "virtio=BC:24:11:00:00:01,bridge=vmbr0";
    cluster.set(100, &[("ide2", "local:cloudinit"), ("ciuser", "ann"), ("net0", net)]).await;
    cluster
}

#[tokio::test(start_paused = true)]
async fn a_vm_has_one_cloud_init_drive_which_goes_with_its_slot() {
    let cluster = with_drive().await;
    let vm = cluster.sim.vm(100).expect("it is there");
    assert_eq!(vm.current("ide2"), Some(format!("{DRIVE},media=cdrom").as_str()));
    let volume = cluster.sim.volumes().into_iter().find(|volume| volume.key.volid() == DRIVE);
    assert_eq!(volume.map(|volume| volume.size), Some(4 << 20));
    let text = cluster.fails("PUT", &format!("{VM}/config"), &[("ide0", "local:cloudinit")]).await;
    assert_eq!(text, "ide0 - cloud-init drive is already attached at 'ide2'");
    cluster.set(100, &[("delete", "ide2")]).await;
    assert!(!cluster.volids().contains(&DRIVE.to_owned()), "it is no disk that becomes unused");
    let vm = cluster.sim.vm(100).expect("it is there");
    assert!(vm.conf.current.keys().all(|key| !key.starts_with("unused")));
    cluster.set(100, &[("ide0", "thin:cloudinit")]).await;
    assert_eq!(cluster.slot(100, "ide0"), "thin:vm-100-cloudinit");
}

#[tokio::test(start_paused = true)]
async fn what_a_running_vm_is_to_have_is_shown_until_the_drive_is_written() {
    let cluster = with_drive().await;
    let of_vm = async || cluster.done("GET", &format!("{VM}/cloudinit"), &[]).await;
    assert_eq!(of_vm().await, json!([{ "key": "ciuser", "value": "ann" }]));
    cluster.vm("POST", 100, "/status/start", &[]).await;
    cluster.set(100, &[("ciuser", "bob"), ("ipconfig0", "ip=dhcp"), ("cipassword", "hunter22")]).await;
    let shown = of_vm().await;
    let shown = shown.as_array().expect("a list");
    assert!(shown.contains(&json!({ "key": "ciuser", "value": "ann", "pending": "bob" })), "{shown:?}");
    assert!(shown.contains(&json!({ "key": "ipconfig0", "pending": "ip=dhcp" })), "{shown:?}");
    assert!(shown.contains(&json!({ "key": "cipassword", "value": "**********" })), "{shown:?}");
    let config = cluster.done("GET", &format!("{VM}/config"), &[]).await;
    assert_eq!((&config["ciuser"], &config["cipassword"]), (&json!("bob"), &json!("**********")));
    let kept = cluster.sim.vm(100).and_then(|vm| vm.current("cipassword").map(str::to_owned));
    assert!(kept.is_some_and(|kept| kept.starts_with("$5$")), "a password is kept as a hash");
    cluster.done("PUT", &format!("{VM}/cloudinit"), &[]).await;
    let shown = of_vm().await;
    assert!(shown.as_array().expect("a list").iter().all(|entry| entry.get("pending").is_none()), "{shown}");

    cluster.set(100, &[("ciuser", "eve")]).await;
    let before = cluster.sim.vm(100).expect("it is there").conf.digest();
    assert_eq!(of_vm().await[1]["pending"], "eve");
    cluster.vm("POST", 100, "/status/stop", &[]).await;
    cluster.vm("POST", 100, "/status/start", &[]).await;
    assert!(!of_vm().await.to_string().contains("pending"), "a start writes the drive");
    assert_ne!(cluster.sim.vm(100).expect("it is there").conf.digest(), before);
}

#[tokio::test(start_paused = true)]
async fn the_drive_can_be_read_as_the_guest_would_read_it() {
    let cluster = with_drive().await;
    let keys = "ssh-ed25519%20AAAA%20ann";
    cluster.set(100, &[("ipconfig0", "ip=192.0.2.9/24,gw=192.0.2.1"), ("sshkeys", keys)]).await;
    let dump = async |kind: &str| {
        let text = cluster.done("GET", &format!("{VM}/cloudinit/dump"), &[("type", kind)]).await;
        text.as_str().expect("a text").to_owned()
    };
    let user = dump("user").await;
    assert!(user.contains("hostname: w1\n") && user.contains("  - ssh-ed25519 AAAA ann\n"), "{user}");
    let network = dump("network").await;
    assert!(network.contains("mac_address: 'bc:24:11:00:00:01'"), "{network}");
    assert!(network.contains("address: '192.0.2.9'\n        netmask: '255.255.255.0'"), "{network}");
    let before = dump("meta").await;
    cluster.set(100, &[("ciuser", "bob")]).await;
    assert_ne!(before, dump("meta").await, "another user is another instance");
    cluster.set(100, &[("citype", "configdrive2")]).await;
    assert!(dump("network").await.contains("iface eth0 inet static\n        address 192.0.2.9\n"));
    cluster.set(100, &[("ipconfig0", "ip=192.0.2.9")]).await;
    let text = cluster.fails("POST", &format!("{VM}/status/start"), &[]).await;
    assert_eq!(text, "not a CIDR: 192.0.2.9");
}

/// `API2/Qemu.pm:update_vm_api`: CD-ROMs take other rights, another medium no hotplug, and a new one is booted from.
#[tokio::test(start_paused = true)]
async fn another_medium_comes_at_once_and_a_new_drive_waits() {
    let cluster = Cluster::new();
    let url = [("url", "https://example.com/a.iso"), ("content", "iso"), ("filename", "a.iso")];
    cluster.done("POST", "/nodes/pve1/storage/local/download-url", &url).await;
    cluster.set(100, &[("ide2", "none,media=cdrom"), ("boot", "order=net0")]).await;
    cluster.vm("POST", 100, "/status/start", &[]).await;
    cluster.set(100, &[("ide2", "local:iso/a.iso,media=cdrom"), ("ide0", "none,media=cdrom")]).await;
    let vm = cluster.sim.vm(100).expect("it is there");
    assert_eq!(vm.current("ide2"), Some("local:iso/a.iso,media=cdrom,size=1M"));
    assert_eq!((vm.current("ide0"), vm.pending("ide0")), (None, Some("none,media=cdrom")));
    let text = cluster.fails("PUT", &format!("{VM}/config"), &[("scsi3", "local:iso/a.iso")]).await;
    assert_eq!(text, json!({ "scsi3": "explicit 'media=cdrom' is required for iso images" }).to_string());
}

/// pve-storage `API2/Storage/Status.pm:download_url`, pve-common `Tools.pm:download_file_from_url`.
#[tokio::test(start_paused = true)]
async fn a_file_from_the_web_is_there_once_its_task_has_ended() {
    let cluster = Cluster::new();
    let fault = json!({ "fault": "download", "url": "big", "size": 5_000_000 });
    cluster.sim.inject(serde_json::from_value(fault).expect("well formed")).expect("it needs no target");
    let to = |storage: &str| format!("/nodes/pve1/storage/{storage}/download-url");
    let form = |url: &'static str, name: &'static str| [("url", url), ("content", "iso"), ("filename", name)];
    cluster.done("POST", &to("local"), &form("https://example.com/big.iso", "big one.iso")).await;
    let listed = cluster.done("GET", "/nodes/pve1/storage/local/content", &[("content", "iso")]).await;
    assert_eq!(
        (&listed[0]["volid"], &listed[0]["size"]),
        (&json!("local:iso/big_one.iso"), &json!(5_000_000))
    );
    let text = cluster.fails("POST", &to("local"), &form("https://example.com/x.iso", "big_one.iso")).await;
    assert!(text.starts_with("refusing to override existing file '"), "{text}");
    let text = cluster.fails("POST", &to("local"), &form("https://nowhere.invalid/x.iso", "x.iso")).await;
    assert_eq!(text, "download failed: exit code 8");
    for (storage, url, name, text) in [
        (
            "data",
            "https://example.com/x.iso",
            "x.iso",
            "storage 'data' is not configured for content-type 'iso'",
        ),
        (
            "thick",
            "https://example.com/x.iso",
            "x.iso",
            "can't upload to storage type 'lvm', not a file based storage!",
        ),
        ("local", "https://example.com/x.iso", "x.txt", r#"{"filename":"wrong file extension"}"#),
        ("local", "ftp://example.com/x.iso", "x.iso", r#"{"url":"value does not match the regex pattern"}"#),
    ] {
        assert_eq!(cluster.fails("POST", &to(storage), &form(url, name)).await, text);
    }
    let query = [("url", "https://example.com/a/big.iso?x=1")];
    let found = cluster.done("GET", "/nodes/pve1/query-url-metadata", &query).await;
    assert_eq!((&found["filename"], &found["size"]), (&json!("big.iso"), &json!(5_000_000)));
    let query = [("url", "https://nowhere.invalid/x.iso")];
    let text = cluster.fails("GET", "/nodes/pve1/query-url-metadata", &query).await;
    assert!(text.starts_with("invalid server response: '500 Can't connect to nowhere.invalid:443"), "{text}");
}
