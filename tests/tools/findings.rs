//! `doctor`: a cluster in order, and what is wrong with configuration, servers, token, storages and VMIDs; one world for each finding.

use proxmox_csi::{
    pve::client::Token,
    sim::{http::Tls, world},
};
use serde_json::{Value, json};

use crate::{
    rig::{self, Rig},
    support::{CSI, HOLDER},
};

/// Just these findings, and the exit code that goes with them.
#[track_caller]
pub fn assert_findings(said: &rig::Said, expected: &[&str]) {
    assert_eq!(said.findings(), expected, "{}", said.out);
    let acts = expected.iter().any(|finding| !finding.starts_with("note "));
    assert_eq!(said.code, i32::from(acts));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_in_order_has_no_findings() {
    let rig = Rig::start().await;
    rig.attached("pvc-1", "shared", "worker-101").await;
    rig.attached("pvc-2", "data", "worker-102").await;
    rig.volume("pvc-3", "data").await;
    insta::assert_snapshot!("in_order", rig.tool(&["doctor"]).await.shown());
    let json = rig.doctor(&[]).await;
    assert_findings(&json, &[]);
    insta::assert_snapshot!("in_order_json", json.shown());
    let only_reads: Vec<_> = rig.bench.sim.log().into_iter().filter(|one| one.method == "GET").collect();
    let before = rig.bench.sim.log().len() - only_reads.len();
    rig.doctor(&[]).await;
    let writes = rig.bench.sim.log().iter().filter(|one| one.method != "GET").count();
    assert_eq!(writes, before, "a look changes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_full_of_trouble_reads_well() {
    let rig = Rig::start().await;
    let volume = rig.attached("pvc-1", "shared", "worker-101").await;
    rig.server.edit(rig::ATTACHMENTS, "va-pvc-1", |one| one["spec"]["nodeName"] = json!("worker-103"));
    rig.bench.volume("pvc-orphan", "data").await;
    rig.bench.sim.set_vm_key(102, "hotplug", Some("network,usb"));
    rig.bench.sim.set_vm_key(103, "scsihw", Some("lsi"));
    rig.put_node(102, "pve2");
    rig.put_class("shared", &json!({"storage": "shared", "cache": "fast"}));
    rig.reconfigure(|config| config["features"]["controllerVMID"] = json!(1));
    assert!(volume.contains("pvc-1"));
    insta::assert_snapshot!("trouble", rig.tool(&["doctor"]).await.shown());
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_the_configuration_that_mean_nothing_are_named() {
    let rig = Rig::start().await;
    rig.reconfigure(|config| {
        config["features"]["controllerVMID"] = json!(9999);
        config["clusters"][0]["colour"] = json!("blue");
    });
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &["warning config the configuration file", "warning config the configuration file"],
    );
    assert!(said.out.contains("it is spelt `controllerVmID`") && said.out.contains("colour"), "{}", said.out);
    let said = rig.doctor(&["--ignore", "config"]).await;
    assert_findings(&said, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_at_a_terminal_sees_what_is_being_looked_at_and_a_program_does_not() {
    let rig = Rig::start().await;
    let seen = rig.tool_on_terminal("doctor", "").await;
    for expected in
        ["asking the servers of region test …", "reading VM 3 of 3 in region test …", "listing storage"]
    {
        assert!(seen.out.contains(expected), "`{expected}` is not in: {}", seen.out);
    }
    let heard = rig.tool(&["doctor"]).await;
    assert!(
        !heard.err.contains("region test …") && !heard.out.contains("\u{1b}["),
        "{}{}",
        heard.out,
        heard.err
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_answer_is_told_from_one_that_is_not_trusted() {
    let rig = Rig::start().await;
    let other = Tls::generate(&[]).expect("certificates");
    let good = rig.url();
    rig.reconfigure(|config| {
        config["clusters"][0]["urls"] = json!(["https://127.0.0.1:1", "https://no-such-host.invalid:8006"]);
    });
    let said = rig.doctor(&[]).await;
    // The region is served all the same.
    assert_findings(
        &said,
        &[
            "warning server-unreachable https://127.0.0.1:1",
            "warning server-unreachable https://no-such-host.invalid:8006",
        ],
    );
    assert!(said.out.contains("nothing answers at 127.0.0.1:1"), "{}", said.out);
    assert!(said.out.contains("the name `no-such-host.invalid` can not be resolved"), "{}", said.out);

    rig.write("ca.pem", other.ca_pem());
    rig.reconfigure(|config| config["clusters"][0]["urls"] = json!([]));
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["error certificate https://pve.test:8006"]);
    assert!(said.out.contains("/etc/pve/pve-root-ca.pem"), "{}", said.out);
    assert!(
        said.out.contains("no server gave an answer"),
        "what was not seen is not called good: {}",
        said.out
    );

    rig.write("ca.pem", rig.tls.ca_pem());
    let other_port = "https://[::1]:1";
    rig.reconfigure(|config| config["clusters"][0]["url"] = json!(other_port));
    assert_findings(&rig.doctor(&[]).await, &["error server-unreachable https://[::1]:1"]);
    rig.reconfigure(|config| config["clusters"][0]["url"] = json!(good));
    assert_findings(&rig.doctor(&[]).await, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_certificate_is_told_with_its_remedy() {
    let rig = Rig::start().await;
    // The certificate is for 127.0.0.1.
    let listening = rig.bench.sim.listen("127.0.0.2:0".parse().expect("an address"), &rig.tls).await;
    let listening = listening.expect("a free port");
    let elsewhere = format!("https://{}", listening.address());
    rig.reconfigure(|config| config["clusters"][0]["url"] = json!(elsewhere));
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &[&format!("error certificate {elsewhere}")]);
    assert!(said.out.contains("the certificate is for other names"), "{}", said.out);

    let expired = Tls::expired(&[]).expect("certificates");
    let listening = rig.bench.sim.listen("127.0.0.1:0".parse().expect("an address"), &expired).await;
    let listening = listening.expect("a free port");
    let url = format!("https://{}", listening.address());
    rig.write("ca.pem", expired.ca_pem());
    rig.reconfigure(|config| config["clusters"][0]["url"] = json!(url));
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &[&format!("error certificate {url}")]);
    assert!(said.out.contains("the certificate has expired"), "{}", said.out);

    // Renewed: it is another than the configured one.
    let pin = |config: &mut Value, tls: &Tls| {
        config["clusters"][0]["url"] = json!(rig.url());
        config["clusters"][0]["fingerprint"] = json!(tls.fingerprint().to_string());
        config["clusters"][0].as_object_mut().expect("a cluster").remove("ca_file");
    };
    rig.reconfigure(|config| pin(config, &expired));
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["error certificate https://pve.test:8006"]);
    assert!(said.out.contains("if somebody renewed it, write its `fingerprint`"), "{}", said.out);
    rig.reconfigure(|config| pin(config, &rig.tls));
    assert_findings(&rig.doctor(&[]).await, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_of_two_clusters_are_no_region() {
    let (rig, mut world) = (Rig::start().await, rig::world());
    world.nodes = vec!["other1".to_owned()];
    world.vms.clear();
    let other = proxmox_csi::sim::Sim::in_memory(world).expect("a world");
    let any = "127.0.0.1:0".parse().expect("an address");
    let listening = other.listen(any, &rig.tls).await.expect("a free port");
    let url = format!("https://{}", listening.address());
    rig.reconfigure(|config| config["clusters"][0]["urls"] = json!([url]));
    let said = rig.doctor(&["--fast"]).await;
    assert!(said.findings().contains(&format!("error servers-differ {url}")), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_answers_nonsense_failed() {
    let rig = Rig::start().await;
    rig.bench.fault(json!({"fault": "refuse", "path": "/version", "text": "out of order", "times": 0}));
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["error server-failed https://pve.test:8006"]);
    assert!(said.out.contains("out of order"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_refused_is_said_once_with_what_to_look_at() {
    let rig = Rig::start().await;
    rig.reconfigure(|config| {
        config["clusters"][0]["token_secret"] = json!("00000000-0000-4000-8000-000000000000");
    });
    let said = rig.tool(&["doctor"]).await;
    insta::assert_snapshot!("token_refused", said.shown());
    assert!(!said.out.contains("00000000-0000"), "a secret is never shown");
    assert_findings(&rig.doctor(&[]).await, &["error token-refused csi@pve!holder"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_privilege_comes_with_the_line_that_gives_it() {
    let mut world = rig::world();
    let role = world.roles.get_mut("CSIHolder").expect("a role");
    role.remove("VM.Config.Disk");
    role.remove("Datastore.Allocate");
    let rig = Rig::with(world, HOLDER).await;
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["error privilege-missing /storage", "error privilege-missing /vms"]);
    for line in [
        r#"pveum role modify CSI --append 1 --privs \"VM.Config.Disk\""#,
        r#"pveum role modify CSI --append 1 --privs \"Datastore.Allocate\""#,
    ] {
        assert!(said.out.contains(line), "{line}\n{}", said.out);
    }
    // What the lines do, with the role that the hint tells to look up.
    let form = "append=1&privs=VM.Config.Disk,Datastore.Allocate";
    rig.bench.admin("PUT", "/access/roles/CSIHolder", form).await;
    assert_findings(&rig.doctor(&[]).await, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_privilege_that_is_taken_away_on_one_path_is_named_there() {
    let mut world = rig::world();
    world.roles.insert("Switch".into(), ["VM.PowerMgmt".to_owned()].into());
    let entry = |path: &str| {
        serde_json::from_value(json!({"path": path, "role": "Switch", "who": HOLDER})).expect("an ACL entry")
    };
    world.acl.push(entry("/vms/101"));
    world.acl.push(entry("/storage/data"));
    let rig = Rig::with(world, HOLDER).await;
    let said = rig.doctor(&[]).await;
    let findings = said.findings();
    assert!(findings.contains(&"error privilege-missing /vms/101".to_owned()), "{findings:?}");
    assert!(findings.contains(&"error privilege-missing /storage/data".to_owned()), "{findings:?}");
    assert!(findings.contains(&"error node-vm-hidden worker-101".to_owned()), "{findings:?}");
    let line = "pveum acl modify /vms/101 --users csi@pve --tokens 'csi@pve!holder' --roles CSI";
    assert!(said.out.contains(line), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_without_any_privilege_is_told_of_privilege_separation() {
    let rig = Rig::with(rig::world(), "nobody@pve!tok").await;
    let said = rig.doctor(&[]).await;
    assert!(said.findings().contains(&"error privilege-missing /vms".to_owned()), "{}", said.out);
    assert!(said.out.contains("privilege separation"));
    assert!(said.out.contains("pveum acl modify / --users nobody@pve --tokens 'nobody@pve!tok' --roles CSI"));
    // Nothing is seen, and nothing is called good that was not.
    assert!(!said.out.contains("the token has each privilege"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileges_for_short_lived_vms_are_a_note() {
    let rig = Rig::with(rig::world(), CSI).await;
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["note privilege-optional /vms"]);
    assert!(said.out.contains("VM.Allocate VM.Config.Options"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_proxmox_node_is_unknown_and_not_empty() {
    let rig = Rig::start().await;
    rig.bench.fault(json!({"fault": "kill_node", "node": "pve2"}));
    let said = rig.doctor(&[]).await;
    // One of two nodes is no majority.
    assert_findings(
        &said,
        &["error no-quorum cluster", "warning host-offline pve2", "warning vm-unreadable VM 103"],
    );
    assert!(said.out.contains("not every VM could be read"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn storages_are_looked_at_where_they_are_used() {
    let mut world = rig::world();
    let storage = |id: &str, edit: &dyn Fn(&mut world::Storage)| {
        let mut storage = world::Storage {
            id: id.to_owned(),
            capacity: "10G".into(),
            content: "images".into(),
            enabled: true,
            is_mountpoint: true,
            ..world::Storage::default()
        };
        edit(&mut storage);
        storage
    };
    world.storages.extend([
        storage("off", &|one| one.enabled = false),
        storage("isos", &|one| one.content = "iso,backup".into()),
        storage("thick", &|one| one.kind = world::Kind::Lvm),
        storage("full", &|one| one.shared = true),
        storage("unmounted", &|_| {}),
        storage("one", &|one| one.nodes = vec!["pve1".into()]),
        storage("plain", &|one| one.is_mountpoint = false),
        storage("unused", &|one| one.enabled = false),
    ]);
    let rig = Rig::with(world, HOLDER).await;
    for id in ["off", "isos", "thick", "full", "unmounted", "one", "plain", "nope"] {
        rig.put_class(id, &json!({"storage": id}));
    }
    rig.bench.fault(json!({"fault": "fill_storage", "storage": "full"}));
    rig.bench.fault(json!({"fault": "unmount", "storage": "unmounted"}));
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[
            "error storage-not-found nope",
            "error storage-disabled off",
            "error storage-inactive unmounted",
            "error storage-content isos",
            "warning storage-thick-lvm thick",
            "warning storage-full full",
            "note storage-nodes one",
            "note storage-unproven plain",
        ],
    );
    for line in ["pvesm set off --disable 0", "pvesm set isos --content images,iso,backup", "lvmthin"] {
        assert!(said.out.contains(line), "{line}\n{}", said.out);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_that_can_make_no_volume_is_named() {
    let rig = Rig::start().await;
    rig.put_class("a", &json!({"storage": "shared", "cache": "none,backup=1"}));
    rig.put_class("b", &json!({}));
    rig.put_class("c", &json!({"storage": "shared", "colour": "blue"}));
    rig.put_class("d", &json!({"storage": "shared", "replicate": "true"}));
    rig.put_class("e", &json!({"storage": "data"}));
    rig.server.edit(rig::CLASSES, "e", |class| class["volumeBindingMode"] = json!("Immediate"));
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[
            "error class-parameter a",
            "error class-parameter b",
            "error class-parameter d",
            "warning class-binding e",
            "note class-parameter c",
        ],
    );
}

fn vm(vmid: u32, name: &str, config: &serde_json::Value) -> world::Vm {
    let text = json!({"vmid": vmid, "node": "pve1", "name": name, "running": false, "config": config});
    serde_json::from_value(text).expect("a VM")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_under_the_owners_id_is_told_with_who_could_destroy_it() {
    let mut world = rig::world();
    world.vms.push(vm(900_000_000, "placeholder", &json!({})));
    let rig = Rig::with(world, HOLDER).await;
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["warning owner-vm VMID 900000000"]);
    assert!(said.out.contains("VM 900000000 (placeholder) on node `pve1`"), "{}", said.out);
    assert!(said.out.contains("the token may not read the access list"), "{}", said.out);
    rig.bench.sim.set_vm_key(900_000_000, "protection", Some("1"));
    assert_findings(&rig.doctor(&[]).await, &["note owner-vm VMID 900000000"]);

    // A token that may read the list is told the names.
    let root = proxmox_csi::sim::World::builtin().token("root@pam!root").expect("a token").clone();
    rig.configure(&Token { id: root.id, secret: root.secret }, |_| {});
    rig.bench.sim.set_vm_key(900_000_000, "protection", None);
    let said = rig.doctor(&[]).await;
    assert!(said.out.contains("csi@pve!holder (by CSIHolder on /)"), "{}", said.out);
    assert!(!said.out.contains("csi@pve!csi (by"), "the role has no VM.Allocate: {}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_owner_is_a_note() {
    let rig = Rig::start().await;
    rig.reconfigure(|config| config["features"] = json!({}));
    assert_findings(&rig.doctor(&[]).await, &["note owner-default VMID 9999"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn short_lived_vms_that_are_left_over_are_told_from_others_in_their_range() {
    let mut world = rig::world();
    world.vms.push(vm(999_990_000, "csi-holder", &json!({"scsi0": ""})));
    world.vms.push(vm(999_990_001, "mine", &json!({"scsi0": ""})));
    let rig = Rig::with(world, HOLDER).await;
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["warning holder-left-over VM 999990000", "warning holder-range holderVmIDs"]);
    assert!(
        said.out.contains("remove the left-over short-lived VM 999990000 of region test"),
        "{}",
        said.out
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_kubernetes_what_was_not_seen_is_said() {
    let rig = Rig::start().await;
    rig.bench.volume("pvc-1", "data").await;
    let said = rig.tool_without_cluster(&["doctor"]).await;
    insta::assert_snapshot!("without_kubernetes", said.shown());
}

#[tokio::test(flavor = "multi_thread")]
async fn kubernetes_that_can_not_be_read_is_no_empty_cluster() {
    let rig = Rig::start().await;
    rig.attached("pvc-1", "shared", "worker-101").await;
    rig.server.set_down(true);
    let said = rig.doctor(&[]).await;
    assert!(said.findings().iter().all(|one| one.contains("error kubernetes-unreadable")), "{}", said.out);
    assert_eq!(said.findings().len(), 6, "{}", said.out);
    assert_eq!(said.code, 1);
}
