//! `doctor`: Nodes and their VMs, PVs and volumes, attachments and slots; one world for each finding.

use serde_json::json;

use crate::{
    findings::assert_findings,
    rig::{self, Rig},
    support::{HOLDER, volid},
};

fn edit_node(rig: &Rig, name: &str, edit: impl FnOnce(&mut serde_json::Value)) {
    rig.server.edit(rig::NODES, name, edit);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_does_not_say_which_vm_it_is_is_named() {
    let rig = Rig::start().await;
    edit_node(&rig, "worker-101", |node| node["status"]["nodeInfo"]["systemUUID"] = json!(""));
    edit_node(&rig, "worker-102", |node| node["spec"]["providerID"] = json!("aws:///i-1"));
    assert_findings(&rig.doctor(&[]).await, &["error node-unclear worker-101"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_are_held_against_where_the_vm_is() {
    let rig = Rig::start().await;
    edit_node(&rig, "worker-101", |node| node["metadata"]["labels"] = json!({}));
    rig.put_node(102, "pve2");
    edit_node(&rig, "worker-103", |node| {
        node["spec"]["providerID"] = json!("proxmox://elsewhere/103");
        node["metadata"]["labels"]["topology.kubernetes.io/region"] = json!("elsewhere");
    });
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[
            "error node-region worker-101",
            "error node-region worker-103",
            "error node-zone worker-101",
            "error node-zone worker-102",
        ],
    );
    let line = "kubectl label node worker-102 topology.kubernetes.io/zone=pve1 --overwrite";
    assert!(said.out.contains(line), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_vm_and_one_with_two_are_named() {
    let rig = Rig::start().await;
    let other = "4daa5e68-83be-4e9d-9b71-8365c73aa16b";
    edit_node(&rig, "worker-101", |node| node["status"]["nodeInfo"]["systemUUID"] = json!(other));
    let smbios = rig.bench.sim.vm(103).expect("a VM").current("smbios1").expect("a uuid").to_owned();
    rig.bench.sim.set_vm_key(102, "smbios1", Some(&smbios));
    edit_node(&rig, "worker-102", |node| node["spec"]["providerID"] = json!("aws:///i-1"));
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["error node-vm-missing worker-101", "error node-vm-twice worker-103"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_node_plugin_registered_is_held_against_the_node() {
    let mut world = rig::world();
    world.vms[2]
        .config
        .extend((1..=10).map(|n| (format!("scsi{n}"), format!("local:103/vm-103-disk-{n}.raw,size=1G"))));
    let rig = Rig::with(world, HOLDER).await;
    let edit = |name: &str, edit: &dyn Fn(&mut serde_json::Value)| {
        rig.server.edit(rig::CSINODES, name, |object| edit(&mut object["spec"]["drivers"]));
    };
    edit("worker-101", &|drivers| *drivers = json!([]));
    edit("worker-102", &|drivers| {
        drivers[0]["topologyKeys"] = json!(["topology.kubernetes.io/region"]);
        drivers[0]["nodeID"] = json!("worker-102/101");
    });
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[
            "error csinode-topology worker-102",
            "error csinode-node-id worker-102",
            "warning driver-not-registered worker-101",
            "warning csinode-limit worker-103",
        ],
    );
    assert!(said.out.contains("max-volume-attachments=20"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_can_not_carry_volumes_is_named_with_the_line_that_mends_it() {
    for (key, value, expected, line) in [
        ("scsihw", Some("lsi"), "error vm-scsihw VM 101", "qm set 101 --scsihw virtio-scsi-single"),
        ("hotplug", Some("0"), "error vm-hotplug VM 101", "qm set 101 --hotplug network,disk,usb"),
        ("protection", Some("1"), "warning vm-protection VM 101", "qm set 101 --protection 0"),
        ("lock", Some("backup"), "warning vm-locked VM 101", "qm unlock 101"),
        ("agent", None, "note vm-agent VM 101", "qm set 101 --agent 1"),
    ] {
        let rig = Rig::start().await;
        rig.bench.sim.set_vm_key(101, key, value);
        let said = rig.doctor(&[]).await;
        assert_findings(&said, &[expected]);
        assert!(said.out.contains(line), "{line}\n{}", said.out);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_does_not_answer_is_named() {
    let rig = Rig::start().await;
    rig.bench.fault(json!({"fault": "hang_qemu", "vmid": 101}));
    assert_findings(&rig.doctor(&[]).await, &["error vm-silent VM 101"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_of_the_ha_manager_with_a_local_volume_is_named() {
    let mut world = rig::world();
    world.vms[0].hastate = Some("started".into());
    world.vms[1].hastate = Some("started".into());
    let rig = Rig::with(world, HOLDER).await;
    rig.attached("pvc-1", "data", "worker-101").await;
    rig.attached("pvc-2", "shared", "worker-102").await;
    assert_findings(&rig.doctor(&[]).await, &["warning ha-local-volume VM 101"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn pvs_that_are_no_volume_or_one_twice_are_named() {
    let rig = Rig::start().await;
    let volume = rig.volume("pvc-1", "shared").await;
    rig.put_pv("pvc-2", &volume.replacen("test//", "test/pve1/", 1));
    rig.put_pv("pvc-3", "nonsense");
    rig.put_pv("pvc-4", "mars//shared/900000000/vm-900000000-x.raw");
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[
            "error pv-handle mars//shared/900000000/vm-900000000-x.raw",
            "error pv-handle pvc-3",
            &format!("error pv-twice {volume}"),
        ],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pv_that_no_node_can_reach_is_named_now_and_before_a_relabel() {
    let rig = Rig::start().await;
    rig.volume("pvc-1", "data").await;
    // Both workers of pve1 have moved in truth, and their labels have not followed.
    rig.bench.sim.move_vm(101, "pve2");
    rig.bench.sim.move_vm(102, "pve2");
    let zones = ["error node-zone worker-101", "error node-zone worker-102"];
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &[zones[0], zones[1], "warning pv-would-strand pvc-1"]);
    for vmid in [101, 102] {
        rig.put_node(vmid, "pve2");
    }
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["error pv-stranded pvc-1"]);
    assert!(said.out.contains("topology.kubernetes.io/zone=pve1"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_gone_is_proven_gone() {
    let rig = Rig::start().await;
    let (kept, gone) = (rig.volume("pvc-1", "shared").await, rig.volume("pvc-2", "shared").await);
    rig.bench.delete(&gone).await.expect("deleted behind Kubernetes");
    assert_findings(&rig.doctor(&[]).await, &[&format!("error volume-missing {gone}")]);
    // Where nothing is looked for, nothing is concluded.
    let fast = rig.doctor(&["--fast"]).await;
    assert_findings(&fast, &[]);
    assert!(fast.out.contains("no storage was listed"), "{}", fast.out);
    rig.bench.delete(&kept).await.expect("deleted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_directory_that_lists_nothing_proves_nothing() {
    let mut world = rig::world();
    world.storages.iter_mut().for_each(|storage| storage.is_mountpoint = false);
    let rig = Rig::with(world, HOLDER).await;
    let gone = rig.volume("pvc-1", "shared").await;
    rig.bench.delete(&gone).await.expect("deleted behind Kubernetes");
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[
            &format!("warning volume-unproven {gone}"),
            "note storage-unproven data",
            "note storage-unproven shared",
        ],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_smaller_than_its_pv_is_named() {
    let rig = Rig::start().await;
    let volume = rig.volume("pvc-1", "shared").await;
    rig.server.edit(rig::PVS, "pvc-1", |pv| pv["spec"]["capacity"]["storage"] = json!("2Gi"));
    assert_findings(&rig.doctor(&[]).await, &[&format!("warning volume-size {volume}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_without_a_pv_is_named_and_never_repaired() {
    let rig = Rig::start().await;
    rig.volume("pvc-1", "data").await;
    let orphan = rig.bench.volume("pvc-orphan", "data").await.volume_id;
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &[&format!("warning volume-orphan {orphan}")]);
    assert!(said.out.contains("DESTROYS ITS DATA") && said.out.contains("\"plan\": []"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_volume_in_two_vms_is_named() {
    let rig = Rig::start().await;
    let volume = rig.attached("pvc-1", "shared", "worker-101").await;
    let form = format!("scsi5={}", volid(&volume));
    rig.bench.admin("POST", "/nodes/pve2/qemu/103/config", &form).await;
    rig.until_slot(103, "scsi5").await;
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[&format!("error double-attachment {volume}"), &format!("warning slot-dangling {volume}")],
    );
    assert!(said.out.contains("qm set 103 --delete scsi5"), "{}", said.out);
    assert!(said.out.contains("\"plan\": []"), "what two VMs hold is nobody's to repair: {}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_placeholder_of_a_replicated_volume_is_no_second_user_while_it_is_stopped() {
    let mut world = rig::world();
    let kind = proxmox_csi::sim::world::Kind::Zfspool;
    world.storages.push(proxmox_csi::sim::world::Storage {
        id: "zfs".into(),
        kind,
        ..world.storages[0].clone()
    });
    let rig = Rig::with(world, HOLDER).await;
    rig.bench.admin("POST", "/nodes/pve1/qemu", "vmid=10001&name=pvc-1").await;
    rig.until_vm(10001).await;
    let form = "vmid=10001&filename=vm-10001-pvc-1&size=1G";
    rig.bench.admin("POST", "/nodes/pve1/storage/zfs/content", form).await;
    let form = "scsi1=zfs%3Avm-10001-pvc-1%2Cbackup%3D1%2Creplicate%3D1";
    rig.bench.admin("PUT", "/nodes/pve1/qemu/10001/config", form).await;
    rig.put_pv("pvc-1", "test//zfs/vm-10001-pvc-1");
    let context = rig.bench.attach("test//zfs/vm-10001-pvc-1", "worker-101").await.expect("attached");
    rig.put_attachment("pvc-1", "worker-101", &context);
    assert_findings(&rig.doctor(&[]).await, &[]);
    let said = rig.tool(&["volumes"]).await;
    assert!(said.out.contains("attached"), "{}", said.out);
    rig.bench.admin("POST", "/nodes/pve1/qemu/10001/status/start", "").await;
    rig.until_running(10001).await;
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["error double-attachment test//zfs/vm-10001-pvc-1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_without_an_attachment_is_named_and_told_whether_it_is_safe_to_empty() {
    let rig = Rig::start().await;
    let volume = rig.volume("pvc-1", "shared").await;
    rig.bench.attach(&volume, "worker-101").await.expect("attached");
    let finding = format!("warning slot-dangling {volume}");
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &[&finding]);
    assert!(said.out.contains("\"repair\": \"detach it from VM 101\""), "{}", said.out);

    rig.put_pod("web", "worker-101", "pvc-1");
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &[&finding]);
    assert!(said.out.contains("not repaired: pod shop/web uses its claim"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_waits_for_the_next_start_is_named() {
    let rig = Rig::start().await;
    let volume = rig.attached("pvc-1", "shared", "worker-101").await;
    rig.bench.sim.set_vm_key(101, "hotplug", Some("network,usb"));
    rig.bench.admin("PUT", "/nodes/pve1/qemu/101/config", "delete=scsi1").await;
    rig.bench.sim.set_vm_key(101, "hotplug", None);
    assert_findings(&rig.doctor(&[]).await, &[&format!("warning slot-pending {volume}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_whose_volume_is_gone_is_named() {
    let rig = Rig::start().await;
    rig.volume("pvc-0", "shared").await;
    let volume = rig.bench.volume("pvc-1", "shared").await.volume_id;
    rig.bench.sim.stop_vm(101).await;
    rig.bench.sim.set_vm_key(101, "scsi4", Some(&format!("{},size=1G", volid(&volume))));
    let name = volid(&volume).replace('/', "%2F").replace(':', "%3A");
    rig.bench.admin("DELETE", &format!("/nodes/pve1/storage/shared/content/{name}"), "delay=5").await;
    // It was never known to Kubernetes, so that only the slot tells of it.
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[&format!("warning slot-dangling {volume}"), &format!("warning slot-volume-gone {volume}")],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attachment_that_is_not_true_is_named() {
    let rig = Rig::start().await;
    let lost = rig.attached("pvc-1", "shared", "worker-101").await;
    let moved = rig.attached("pvc-2", "shared", "worker-102").await;
    rig.bench.detach(&lost, "worker-101").await.expect("detached behind Kubernetes");
    rig.server.edit(rig::ATTACHMENTS, "va-pvc-2", |one| one["spec"]["nodeName"] = json!("worker-103"));
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[
            &format!("error attachment-without-slot {lost}"),
            &format!("error attachment-elsewhere {moved}"),
            &format!("warning slot-dangling {moved}"),
        ],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attachment_that_names_another_disk_is_named() {
    let rig = Rig::start().await;
    let volume = rig.attached("pvc-1", "shared", "worker-101").await;
    rig.server
        .edit(rig::ATTACHMENTS, "va-pvc-1", |one| one["status"]["attachmentMetadata"]["lun"] = json!("7"));
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &[&format!("error attachment-name {volume}")]);
    assert!(said.out.contains("at scsi7, and the disk in scsi1"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attachment_of_nothing_and_one_that_failed_are_named() {
    let rig = Rig::start().await;
    let volume = rig.volume("pvc-1", "shared").await;
    rig.put_attachment("pvc-1", "worker-101", &[].into());
    rig.server.edit(rig::ATTACHMENTS, "va-pvc-1", |one| {
        one["status"] = json!({"attached": false, "attachError": {"message": "no room on the bus"}});
    });
    rig.put_attachment("pvc-gone", "worker-gone", &[].into());
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &["warning attachment-orphan va-pvc-gone", &format!("warning attachment-failed {volume}")],
    );
    assert!(
        said.out.contains("no room on the bus") && said.out.contains("Node `worker-gone`"),
        "{}",
        said.out
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn drift_between_config_and_qemu_is_named_on_both_sides() {
    let rig = Rig::start().await;
    let volume = rig.attached("pvc-1", "shared", "worker-101").await;
    let stray = rig.attached("pvc-2", "shared", "worker-102").await;
    // A config that was edited by hand while the VM ran, each way.
    rig.bench.sim.set_vm_key(102, "scsi1", None);
    let drive = rig.bench.sim.vm(101).expect("a VM").current("scsi1").expect("a drive").to_owned();
    rig.bench.detach(&volume, "worker-101").await.expect("detached");
    rig.bench.sim.set_vm_key(101, "scsi1", Some(&drive));
    let said = rig.doctor(&[]).await;
    assert_findings(
        &said,
        &[
            "error qemu-stray VM 102",
            &format!("error attachment-without-slot {stray}"),
            &format!("error qemu-lacks {volume}"),
        ],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_holds_volumes_is_named() {
    let rig = Rig::start().await;
    rig.attached("pvc-1", "shared", "worker-101").await;
    // Raw files have no snapshots, so that one is written behind the API's back: with a volume chain it could be there.
    let mut world = rig::world();
    world
        .storages
        .iter_mut()
        .for_each(|one| drop(one.properties.insert("snapshot-as-volume-chain".into(), "1".into())));
    world.vms.iter_mut().for_each(|vm| drop(vm.config.insert("scsi0".into(), String::new())));
    let rig = Rig::with(world, HOLDER).await;
    let mut new = crate::support::new_volume("pvc-1", "shared");
    new.parameters.insert("storageFormat".to_owned(), "qcow2".to_owned());
    let volume = rig.bench.create(new).await.expect("a volume").volume_id;
    rig.put_pv("pvc-1", &volume);
    let context = rig.bench.attach(&volume, "worker-101").await.expect("attached");
    rig.put_attachment("pvc-1", "worker-101", &context);
    rig.bench.admin("POST", "/nodes/pve1/qemu/101/snapshot", "snapname=before").await;
    rig.until_snapshot(101).await;
    let said = rig.doctor(&[]).await;
    assert_findings(&said, &["warning vm-snapshot VM 101"]);
    assert!(said.out.contains("qm delsnapshot 101 before"), "{}", said.out);
}

#[test]
fn every_code_has_its_world_and_its_line_in_the_documentation() {
    use proxmox_csi::doctor::finding::Code;

    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let tests =
        ["findings.rs", "cluster.rs", "repair.rs"].map(|file| read(&format!("tests/tools/{file}"))).concat();
    let docs = read("docs/tools.md");
    // Those that no simulated world can bring about are shown by unit tests over what a server said.
    let elsewhere = ["clock-skew", "token-expires", "storage-unknown-type"];
    for code in Code::ALL {
        let line = format!("| `{code}` | {} | {} |", code.severity(), code.meaning());
        assert!(docs.contains(&line), "docs/tools.md lacks the line\n{line}");
        let shown = tests.contains(&format!(" {code}")) || elsewhere.contains(&code.as_str());
        assert!(shown, "no test brings about `{code}`");
    }
}
