//! The decision table of docs/ccm.md, row by row: the number of a row is in the names of its tests.

use std::{collections::BTreeSet, time::Duration};

use proxmox_csi::{ccm::Settings, sim::World, telemetry::metrics::Metrics};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{apiserver::ApiServer, rig::*};

const STRANGER: &str = "00000000-0000-4000-8000-000000000001";
const ALL: [&str; 3] = ["w101", "w102", "w103"];

/// What turns a misfortune on and off.
type Switch<'a> = Box<dyn Fn(bool) + 'a>;

fn giving_up() -> Settings {
    Settings { out_of_service: true, ..Settings::default() }
}

/// A token that sees the VMs of the built-in world one by one, and no others.
fn seeing_one_by_one() -> World {
    let mut world = World::builtin();
    let base = world.acl.iter().find(|entry| entry.who == TOKEN).expect("an entry").clone();
    world.acl.retain(|entry| entry.who != TOKEN);
    for vmid in [101, 102, 103] {
        let mut entry = base.clone();
        entry.path = format!("/vms/{vmid}");
        world.acl.push(entry);
    }
    world
}

#[tokio::test(start_paused = true)]
async fn row_01_a_vm_with_the_nodes_uuid_exists_and_gives_its_labels() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = &running.server;
    assert_eq!(label(server, "w101", ZONE).as_deref(), Some("pve1"));
    assert_eq!(label(server, "w103", ZONE).as_deref(), Some("pve2"));
    assert_eq!(node(server, "w103")["spec"]["providerID"], "proxmox://r1/103");
    assert_eq!(taints(server, "w101"), BTreeSet::from(["mine".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn row_02_a_stopped_vm_is_tainted_and_untainted() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    region.sim.stop_vm(101).await;
    sleep(secs(60)).await;
    assert!(!taints(&server, "w101").contains(SHUTDOWN), "its kubelet is not silent yet");
    set_ready(&server, "w101", false);
    within(secs(30), "tainted", || taints(&server, "w101").contains(SHUTDOWN)).await;
    sleep(Duration::from_mins(5)).await;
    assert!(!taints(&server, "w101").contains(OUT_OF_SERVICE), "only when asked for");
    region.sim.start_vm(101).await.expect("it starts");
    set_ready(&server, "w101", true);
    within(secs(2), "untainted", || !taints(&server, "w101").contains(SHUTDOWN)).await;
    assert!(taints(&server, "w101").contains("mine"));
}

#[tokio::test(start_paused = true)]
async fn row_02_a_stopped_vm_is_given_up_after_a_second_look_and_taken_back_behind_its_old_volumes() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    let attachment = json!({"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment",
        "metadata": {"name": "va-1", "creationTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {"attacher": "csi.proxmox.sinextra.dev", "nodeName": "w101", "source": {}}});
    server.put(ATTACHMENTS, attachment);
    region.sim.stop_vm(101).await;
    set_ready(&server, "w101", false);
    assert_eq!(region.asked("/status/current"), 0, "not before it is needed");
    let took = within(secs(60), "given up", || taints(&server, "w101").contains(OUT_OF_SERVICE)).await;
    assert!(took >= secs(30), "{took:?}");
    assert_eq!(region.asked("/status/current"), 1, "its host was asked");
    region.sim.start_vm(101).await.expect("it starts");
    set_ready(&server, "w101", true);
    sleep(secs(60)).await;
    assert!(taints(&server, "w101").contains(OUT_OF_SERVICE), "an old volume is attached");
    let mut later = server.get(ATTACHMENTS, "va-1").expect("it");
    later["metadata"]["creationTimestamp"] = json!("2999-01-01T00:00:00Z");
    server.put(ATTACHMENTS, later);
    within(secs(31), "taken back", || !taints(&server, "w101").contains(OUT_OF_SERVICE)).await;
}

#[tokio::test(start_paused = true)]
async fn row_02_an_out_of_service_taint_of_somebody_else_stays() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    server.edit(NODES, "w101", |node| {
        node["spec"]["taints"] =
            json!([{"key": OUT_OF_SERVICE, "value": "nodeshutdown", "effect": "NoExecute"}]);
    });
    sleep(Duration::from_mins(5)).await;
    assert!(taints(&server, "w101").contains(OUT_OF_SERVICE));
}

#[tokio::test(start_paused = true)]
async fn row_02_a_listing_that_says_stopped_is_not_believed_while_the_host_says_otherwise() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    region.sim.stop_vm(101).await;
    set_ready(&server, "w101", false);
    sleep(secs(15)).await;
    // Its host goes on telling what it told last, and the VM is started.
    region.hand(0).stale = true;
    region.sim.start_vm(101).await.expect("it starts");
    sleep(Duration::from_mins(10)).await;
    assert!(!taints(&server, "w101").contains(OUT_OF_SERVICE));
    assert!(server.events_about("w101").contains("NotGivenUp"));
    assert!(region.asked("/status/current") > 0);
    let asked = region.asked("/status/current");
    assert!(asked <= 21, "{asked} times in ten minutes: at most every 30 s");
}

#[tokio::test(start_paused = true)]
async fn row_02_a_vm_that_the_ha_manager_is_about_to_start_is_not_off() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    region.sim.stop_vm(101).await;
    region.sim.set_ha_state(101, Some("request_start"));
    set_ready(&server, "w101", false);
    sleep(Duration::from_mins(5)).await;
    assert_eq!(taints(&server, "w101"), BTreeSet::from(["mine".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn row_03_a_vm_suspended_to_disk_gets_the_plain_taint_at_most() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    region.sim.set_vm_key(101, "lock", Some("suspended"));
    region.sim.stop_vm(101).await;
    set_ready(&server, "w101", false);
    sleep(Duration::from_mins(10)).await;
    assert!(taints(&server, "w101").contains(SHUTDOWN));
    assert!(!taints(&server, "w101").contains(OUT_OF_SERVICE));
}

#[tokio::test(start_paused = true)]
async fn row_04_stopped_right_after_a_migration_is_an_old_value() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    // What is on a local storage does not come along here.
    region.sim.set_vm_key(101, "scsi0", None);
    set_ready(&server, "w101", false);
    region.sim.set_vm_key(101, "lock", Some("migrate"));
    sleep(Duration::from_mins(2)).await;
    region.sim.stop_vm(101).await;
    sleep(Duration::from_mins(2)).await;
    assert!(!taints(&server, "w101").contains(SHUTDOWN), "it is being migrated");
    region.sim.set_vm_key(101, "lock", None);
    region.sim.move_vm(101, "pve2");
    // The host it came to has not told yet that it runs.
    sleep(secs(10)).await;
    region.sim.start_vm(101).await.expect("it runs");
    sleep(secs(60)).await;
    assert_eq!(taints(&server, "w101"), BTreeSet::from(["mine".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn row_05_of_two_vms_with_one_uuid_only_the_recorded_one_is_a_node() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let uuid = region.uuid(101);
    region.set_uuid(103, &uuid);
    server.put(NODES, new_node("unrecorded", &uuid));
    let mut recorded = new_node("recorded", &uuid);
    recorded["spec"]["providerID"] = json!("proxmox://r1/103");
    server.put(NODES, recorded);
    let _running = start(&server, &[&region]);
    within(secs(5), "initialised", || !taints(&server, "recorded").contains(UNINITIALIZED)).await;
    assert_eq!(label(&server, "recorded", ZONE).as_deref(), Some("pve2"));
    sleep(secs(60)).await;
    assert!(taints(&server, "unrecorded").contains(UNINITIALIZED));
    assert_eq!(label(&server, "unrecorded", ZONE), None);
    for name in ["recorded", "unrecorded"] {
        assert!(server.events_about(name).contains("DuplicateUuid"), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn row_05_a_vm_restored_twice_leaves_the_node_alone_when_the_first_one_goes() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    let before = node(&server, "w101");
    for vmid in [102, 103] {
        region.set_uuid(vmid, &region.uuid(101));
        region.sim.stop_vm(vmid).await;
    }
    region.sim.forget_vm(101);
    for name in ALL {
        set_ready(&server, name, false);
    }
    sleep(Duration::from_mins(40)).await;
    let after = node(&server, "w101");
    assert_eq!(after["metadata"]["labels"], before["metadata"]["labels"]);
    assert_eq!(after["spec"], before["spec"]);
}

#[tokio::test(start_paused = true)]
async fn row_06_a_template_is_no_node() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let uuid = region.uuid(101);
    region.set_uuid(103, &uuid);
    region.sim.stop_vm(103).await;
    region.sim.set_vm_key(103, "template", Some("1"));
    server.put(NODES, new_node("w101", &uuid));
    let _running = start(&server, &[&region]);
    within(secs(5), "initialised", || !taints(&server, "w101").contains(UNINITIALIZED)).await;
    assert_eq!(node(&server, "w101")["spec"]["providerID"], "proxmox://r1/101");
    assert!(server.events_about("w101").is_empty(), "no twin");
}

#[tokio::test(start_paused = true)]
async fn row_07_a_vm_that_is_being_fenced_may_still_write() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    region.sim.stop_vm(101).await;
    region.sim.set_ha_state(101, Some("fence"));
    set_ready(&server, "w101", false);
    sleep(Duration::from_mins(30)).await;
    assert_eq!(taints(&server, "w101"), BTreeSet::from(["mine".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn row_08_a_fenced_vm_that_finds_no_new_host_is_given_up() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    set_ready(&server, "w101", false);
    region.sim.set_ha_state(101, Some("recovery"));
    let took = within(secs(60), "given up", || taints(&server, "w101").contains(OUT_OF_SERVICE)).await;
    assert!(took >= secs(30), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn row_08_a_fenced_vm_is_not_given_up_by_servers_that_disagree_or_see_too_few_hosts() {
    let region = Region::new("r1").with_two_servers();
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    set_ready(&server, "w101", false);
    region.sim.set_ha_state(101, Some("recovery"));
    sleep(secs(12)).await;
    region.hand(1).cut_off = true;
    region.hand(0).stale = true;
    sleep(Duration::from_mins(10)).await;
    assert!(!taints(&server, "w101").contains(OUT_OF_SERVICE), "one of them is cut off");
    region.hand(1).cut_off = false;
    region.hand(1).dead = true;
    sleep(Duration::from_mins(10)).await;
    assert!(!taints(&server, "w101").contains(OUT_OF_SERVICE), "one of them does not answer");
    region.hand(1).dead = false;
    within(secs(60), "given up", || taints(&server, "w101").contains(OUT_OF_SERVICE)).await;
}

#[tokio::test(start_paused = true)]
async fn row_09_a_vm_that_the_ha_manager_started_elsewhere_is_labelled_there() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    region.sim.set_ha_state(103, Some("started"));
    sleep(secs(30)).await;
    region.fault(json!({"fault": "kill_node", "node": "pve2", "on": true}));
    set_ready(&server, "w103", false);
    sleep(Duration::from_mins(2)).await;
    assert_eq!(label(&server, "w103", ZONE).as_deref(), Some("pve2"));
    region.sim.move_vm(103, "pve1");
    within(secs(12), "relabelled", || label(&server, "w103", ZONE).as_deref() == Some("pve1")).await;
    assert_eq!(taints(&server, "w103"), BTreeSet::from(["mine".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn row_10_a_vm_on_a_host_that_is_not_heard_of_may_run_there() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    sleep(secs(30)).await;
    region.fault(json!({"fault": "kill_node", "node": "pve2", "on": true}));
    set_ready(&server, "w103", false);
    // Longer than the last status of its VMs is shown.
    sleep(Duration::from_mins(30)).await;
    assert_eq!(taints(&server, "w103"), BTreeSet::from(["mine".to_owned()]));
    assert_eq!(label(&server, "w103", ZONE).as_deref(), Some("pve2"));
    assert!(server.events_about("w103").contains("HostUnreachable"));
}

#[tokio::test(start_paused = true)]
async fn row_11_a_vmid_that_is_another_vm_now_is_a_stranger() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(60)).await;
    region.sim.stop_vm(102).await;
    region.set_uuid(102, STRANGER);
    region.sim.start_vm(102).await.expect("it starts");
    region.sim.move_vm(102, "pve2");
    sleep(Duration::from_mins(5)).await;
    let zone = label(&server, "w102", ZONE);
    assert_eq!(zone.as_deref(), Some("pve1"), "the stranger's place is not the node's");
    assert!(server.events_about("w102").contains("VmidReused"));
    assert!(server.get(NODES, "w102").is_some(), "its kubelet lives");
    set_ready(&server, "w102", false);
    let took = within(secs(120), "deleted", || server.get(NODES, "w102").is_none()).await;
    assert!(took >= secs(60), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn row_11_without_sight_of_every_vm_a_stranger_proves_nothing() {
    let region = Region::of("r1", seeing_one_by_one());
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(60)).await;
    set_ready(&server, "w102", false);
    region.sim.stop_vm(102).await;
    region.set_uuid(102, STRANGER);
    sleep(Duration::from_mins(10)).await;
    assert!(server.get(NODES, "w102").is_some());
    assert!(server.events_about("w102").contains("MissingPrivilege"));
}

#[tokio::test(start_paused = true)]
async fn row_12_a_node_goes_only_after_its_vm_was_seen_gone_twice_and_its_kubelet_is_silent() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    region.sim.forget_vm(102);
    sleep(Duration::from_mins(5)).await;
    assert!(server.get(NODES, "w102").is_some(), "its kubelet lives");
    set_ready(&server, "w102", false);
    sleep(secs(55)).await;
    assert!(server.get(NODES, "w102").is_some(), "seen gone for less than a minute");
    within(secs(60), "deleted", || server.get(NODES, "w102").is_none()).await;
    assert!(server.events_about("w102").contains("DeletingNode"));
    assert_eq!(server.names(NODES), ["w101", "w103"]);
}

#[tokio::test(start_paused = true)]
async fn row_12_a_vmid_that_exists_unseen_is_a_lost_privilege() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(30)).await;
    set_ready(&server, "w102", false);
    // Nothing is allowed there, and nothing says so: the list of privileges leaves the path out.
    admin(
        &region,
        "PUT",
        "/access/acl",
        "path=%2Fvms%2F102&roles=NoAccess&tokens=csi%40pve%21csi&users=csi%40pve",
    )
    .await;
    sleep(Duration::from_mins(30)).await;
    assert!(server.get(NODES, "w102").is_some());
    let notes = server.notes("w102", "MissingPrivilege");
    assert!(notes.iter().any(|note| note.contains("VM.Audit on /vms/102")), "{notes:?}");
}

#[tokio::test(start_paused = true)]
async fn row_12_a_vm_restored_where_the_token_does_not_see_it_keeps_its_node() {
    // Its old VMID is free, and it lives under another one that is hidden in each of the ways there are.
    let one_by_one = Region::of("r1", seeing_one_by_one());
    let no_role = Region::new("r1");
    let no_access = Region::new("r1");
    let of_pool = Region::new("r1");
    let mut world = seeing_one_by_one();
    let mut entry = world.acl.iter().find(|entry| entry.who == TOKEN).expect("an entry").clone();
    (entry.path, entry.propagate) = ("/vms".to_owned(), false);
    world.acl.push(entry);
    let not_below = Region::of("r1", world);
    let all = [&one_by_one, &no_role, &no_access, &of_pool, &not_below];
    for (index, region) in all.into_iter().enumerate() {
        let running = settled(region, Settings::default()).await;
        let server = running.server.clone();
        sleep(secs(30)).await;
        let uuid = region.uuid(102);
        region.sim.forget_vm(102);
        let form = format!("vmid=104&name=restored&smbios1=uuid%3D{uuid}");
        let acl = "/access/acl";
        let us = "tokens=csi%40pve%21csi&users=csi%40pve";
        match index {
            // A role without VM.Audit shows as a path that lacks it.
            1 => {
                admin(region, "POST", "/access/roles", "roleid=Other&privs=VM.Console").await;
                admin(region, "PUT", acl, &format!("path=%2Fvms%2F104&roles=Other&{us}")).await;
            }
            // These two do not show at all: only that 104 is in use does, when nobody sees it.
            2 => admin(region, "PUT", acl, &format!("path=%2Fvms%2F104&roles=NoAccess&{us}")).await,
            3 => {
                admin(region, "POST", "/pools", "poolid=secret").await;
                admin(region, "PUT", "/pools", "poolid=secret&vms=104").await;
                admin(region, "PUT", acl, &format!("path=%2Fpool%2Fsecret&roles=NoAccess&{us}")).await;
            }
            _ => {}
        }
        admin(region, "POST", "/nodes/pve1/qemu", &form).await;
        // The lowest free VMID is what a restore takes without a wish: here 100 is taken, and 102 is, too.
        if index == 2 || index == 3 {
            admin(region, "POST", "/nodes/pve1/qemu", "vmid=102&name=other").await;
            admin(region, "POST", "/nodes/pve1/qemu", "vmid=100&name=another").await;
        }
        set_ready(&server, "w102", false);
        sleep(Duration::from_mins(30)).await;
        assert!(server.get(NODES, "w102").is_some(), "case {index}");
        let events = server.events_about("w102");
        assert!(
            events.contains("MissingPrivilege") || events.contains("NotDeleted"),
            "case {index}: {events:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn row_12_with_the_access_control_list_in_sight_no_hidden_path_is_missed() {
    let mut region = Region::new("r1");
    region.token = "csi@pve!csi";
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    let us = "tokens=csi%40pve%21csi&users=csi%40pve";
    admin(&region, "POST", "/access/roles", "roleid=Auditor&privs=Sys.Audit").await;
    admin(&region, "PUT", "/access/acl", &format!("path=%2Faccess&roles=Auditor&{us}")).await;
    // Far from the lowest VMIDs.
    admin(&region, "PUT", "/access/acl", &format!("path=%2Fvms%2F77777&roles=NoAccess&{us}")).await;
    let uuid = region.uuid(102);
    region.sim.forget_vm(102);
    let form = format!("vmid=77777&name=restored&smbios1=uuid%3D{uuid}");
    admin(&region, "POST", "/nodes/pve1/qemu", &form).await;
    set_ready(&server, "w102", false);
    sleep(Duration::from_mins(30)).await;
    assert!(server.get(NODES, "w102").is_some());
    let notes = server.notes("w102", "MissingPrivilege");
    assert!(notes.iter().any(|note| note.contains("/vms/77777")), "{notes:?}");
}

#[tokio::test(start_paused = true)]
async fn row_12_a_vm_that_is_back_within_a_minute_keeps_its_node() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    set_ready(&server, "w102", false);
    for _ in 0..20 {
        region.hands(|hand| hand.lost.extend([102]));
        sleep(secs(50)).await;
        region.hands(|hand| hand.lost.clear());
        sleep(secs(15)).await;
    }
    assert!(server.get(NODES, "w102").is_some());
}

#[tokio::test(start_paused = true)]
async fn row_12_without_quorum_nothing_is_proven() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(30)).await;
    region.sim.forget_vm(102);
    region.fault(json!({"fault": "kill_node", "node": "pve2", "on": true}));
    set_ready(&server, "w102", false);
    sleep(Duration::from_mins(30)).await;
    assert!(server.get(NODES, "w102").is_some(), "one host of two");
    let notes = server.notes("w102", "NotDeleted");
    assert!(notes.iter().any(|note| note.contains("quorate")), "{notes:?}");
    region.sim.clear_faults();
    within(Duration::from_mins(3), "deleted", || server.get(NODES, "w102").is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn row_12_of_two_servers_one_that_is_cut_off_proves_nothing() {
    let region = Region::new("r1").with_two_servers();
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(30)).await;
    set_ready(&server, "w102", false);
    // The first server believes that all hosts are there and that the VM is gone; the second knows better.
    region.hand(0).lost.insert(102);
    sleep(Duration::from_mins(30)).await;
    assert!(server.get(NODES, "w102").is_some(), "the other server has the VM");
    // Both have lost it, and the second is silent: one word is not enough.
    region.sim.forget_vm(102);
    region.hand(1).dead = true;
    sleep(Duration::from_mins(30)).await;
    assert!(server.get(NODES, "w102").is_some(), "one word is not enough");
    region.hand(1).dead = false;
    region.hand(1).cut_off = true;
    sleep(Duration::from_mins(30)).await;
    assert!(server.get(NODES, "w102").is_some(), "the word of one that is cut off does not count");
    region.hand(1).cut_off = false;
    within(Duration::from_mins(10), "deleted", || server.get(NODES, "w102").is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn row_12_a_silent_region_may_have_the_vm() {
    let (one, two) = (Region::new("r1"), Region::new("r2"));
    two.set_dead(true);
    for vmid in [101, 102, 103] {
        // The built-in worlds are twins; these are other machines.
        two.set_uuid(vmid, &format!("00000000-0000-4000-8000-000000000{vmid}"));
    }
    let server = ApiServer::default();
    server.put(NODES, new_node("w101", &one.uuid(101)));
    server.put(NODES, new_node("far", "00000000-0000-4000-8000-000000000103"));
    let _running = start(&server, &[&one, &two]);
    within(secs(5), "initialised", || !taints(&server, "w101").contains(UNINITIALIZED)).await;
    one.sim.forget_vm(101);
    set_ready(&server, "w101", false);
    sleep(Duration::from_mins(10)).await;
    assert!(server.get(NODES, "w101").is_some(), "it may be in the region that is silent");
    assert!(taints(&server, "far").contains(UNINITIALIZED));
    for name in ["w101", "far"] {
        assert!(server.events_about(name).contains("RegionUnreachable"), "{name}");
    }
    two.set_dead(false);
    within(secs(15), "initialised", || !taints(&server, "far").contains(UNINITIALIZED)).await;
    assert_eq!(node(&server, "far")["spec"]["providerID"], "proxmox://r2/103");
    within(Duration::from_mins(2), "deleted", || server.get(NODES, "w101").is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn row_13_nodes_of_cluster_api_get_the_uuid_and_are_left_to_it() {
    for told_to in [false, true] {
        let (server, region) = (ApiServer::default(), Region::new("r1"));
        region.sim.set_vm_key(101, "tags", Some("go-proxmox;ip_net0_10.0.0.5"));
        // Its kubelet has no external cloud provider: no taint to wait for, and addresses of its own.
        let mut machine = new_node("machine", &region.uuid(101));
        machine["metadata"]["annotations"] = json!({"cluster.x-k8s.io/machine": "m1"});
        machine["spec"] = json!({});
        machine["status"]["addresses"] = json!([{"type": "InternalIP", "address": "10.0.0.5"}]);
        server.put(NODES, machine);
        let settings = Settings { delete_cluster_api: told_to, ..Settings::default() };
        let _running = start_with(&server, &[&region], settings);
        within(secs(5), "labelled", || label(&server, "machine", ZONE).is_some()).await;
        let id = format!("proxmox://{}", region.uuid(101));
        within(secs(5), "providerID", || node(&server, "machine")["spec"]["providerID"] == json!(id)).await;
        let now = node(&server, "machine");
        assert_eq!(now["metadata"]["annotations"]["proxmox.sinextra.dev/instance-id"], "101");
        assert_eq!(now["status"]["addresses"], json!([{"type": "InternalIP", "address": "10.0.0.5"}]));
        region.sim.forget_vm(101);
        set_ready(&server, "machine", false);
        sleep(Duration::from_mins(10)).await;
        assert_eq!(server.get(NODES, "machine").is_none(), told_to);
        assert_eq!(server.events_about("machine").contains("NotDeleted"), !told_to);
    }
}

#[tokio::test(start_paused = true)]
async fn row_14_more_than_one_node_or_a_tenth_are_not_deleted() {
    for (nodes, gone, halted) in [(3, 1, false), (3, 2, true), (20, 2, false), (20, 3, true)] {
        let (server, region) = (ApiServer::default(), Region::of("r1", many(0, nodes)));
        for vmid in region.sim.vmids() {
            server.put(NODES, new_node(&format!("n{vmid}"), &region.uuid(vmid)));
        }
        let running = start(&server, &[&region]);
        sleep(secs(30)).await;
        for vmid in region.sim.vmids().into_iter().take(gone) {
            region.sim.forget_vm(vmid);
            set_ready(&server, &format!("n{vmid}"), false);
        }
        sleep(Duration::from_mins(20)).await;
        let left = usize::try_from(nodes).expect("few") - if halted { 0 } else { gone };
        assert_eq!(server.names(NODES).len(), left, "{gone} of {nodes}");
        assert_eq!(server.events_about("n1000").contains("DeletionHalted"), halted, "{gone} of {nodes}");
        let counted = running.metrics.render().contains("refusals_total{reason=\"too_many_at_once\"}");
        assert_eq!(counted, halted);
    }
}

#[tokio::test(start_paused = true)]
async fn row_15_silence_and_lost_sight_delete_and_blank_nothing() {
    let region = Region::new("r1");
    let running = settled(&region, giving_up()).await;
    let server = running.server.clone();
    sleep(secs(30)).await;
    for name in ALL {
        set_ready(&server, name, false);
    }
    let before: Vec<Value> = ALL.map(|name| node(&server, name)["metadata"]["labels"].clone()).into();
    let refused = |path: &str, status: u16| {
        let fault =
            json!({"fault": "refuse", "path": path, "status": status, "text": "it is refused", "times": 0});
        let region = &region;
        let switch: Switch<'_> =
            Box::new(move |on| if on { region.fault(fault.clone()) } else { region.sim.clear_faults() });
        switch
    };
    let kinds: [(&str, Switch<'_>); 12] = [
        ("the region is dead", Box::new(|on| region.set_dead(on))),
        ("the region hangs", Box::new(|on| region.hands(|hand| hand.hangs = on))),
        (
            "the token is expired",
            Box::new(|on| region.fault(json!({"fault": "expire_token", "token": TOKEN, "on": on}))),
        ),
        ("one VM is hidden", Box::new(|on| region.hide(if on { &[102] } else { &[] }))),
        ("every VM is hidden", Box::new(|on| region.hide(if on { &[101, 102, 103] } else { &[] }))),
        (
            "a host is dead",
            Box::new(|on| region.fault(json!({"fault": "kill_node", "node": "pve2", "on": on}))),
        ),
        ("401", refused("/cluster/resources", 401)),
        ("403", refused("/cluster/resources", 403)),
        ("500", refused("/cluster", 500)),
        ("595", refused("/cluster/resources", 595)),
        ("no oracle", refused("/cluster/nextid", 500)),
        ("no privileges", refused("/access/permissions", 500)),
    ];
    for (what, set) in kinds {
        set(true);
        sleep(Duration::from_mins(10)).await;
        assert_eq!(server.names(NODES), ALL, "{what}");
        for (name, labels) in ALL.iter().zip(&before) {
            assert_eq!(node(&server, name)["metadata"]["labels"], *labels, "{what}");
            let addresses = node(&server, name)["status"]["addresses"].clone();
            assert_eq!(addresses.as_array().map(Vec::len), Some(2), "{what}");
            assert_eq!(taints(&server, name), BTreeSet::from(["mine".to_owned()]), "{what}");
        }
        set(false);
        sleep(secs(90)).await;
    }
    assert!(server.events_about("w102").contains("MissingPrivilege"));
    assert!(server.events_about("w102").contains("RegionUnreachable"));
    assert!(server.events_about("w103").contains("HostUnreachable"));
}

#[tokio::test(start_paused = true)]
async fn row_15_a_dead_or_hanging_region_holds_up_no_other() {
    for hangs in [false, true] {
        let (one, two) = (Region::new("r1"), Region::new("r2"));
        two.hands(|hand| (hand.dead, hand.hangs) = (!hangs, hangs));
        let server = ApiServer::default();
        let _running = start(&server, &[&one, &two]);
        sleep(secs(60)).await;
        server.put(NODES, new_node("w103", &one.uuid(103)));
        within(secs(2), "initialised", || !taints(&server, "w103").contains(UNINITIALIZED)).await;
        one.sim.move_vm(103, "pve1");
        within(secs(12), "moved", || label(&server, "w103", ZONE).as_deref() == Some("pve1")).await;
    }
}

#[tokio::test(start_paused = true)]
async fn row_15_a_hanging_host_holds_up_no_other_node() {
    let region = Region::of("r1", many(0, 40));
    let server = ApiServer::default();
    for vmid in region.sim.vmids() {
        server.put(NODES, new_node(&format!("n{vmid}"), &region.uuid(vmid)));
    }
    // Twenty VMs are on it, and no config of theirs can be read.
    region.fault(json!({"fault": "delay", "path": "/nodes/pve2/", "ms": 120_000, "times": 0}));
    let _running = start_with(&server, &[&region], giving_up());
    within(secs(30), "initialised", || !taints(&server, "n1000").contains(UNINITIALIZED)).await;
    region.sim.move_vm(1002, "pve2");
    within(secs(40), "moved", || label(&server, "n1002", ZONE).as_deref() == Some("pve2")).await;
    assert!(taints(&server, "n1001").contains(UNINITIALIZED), "its config can't be read");
    assert!(server.events_about("n1001").contains("ConfigUnreadable"));
}

#[tokio::test(start_paused = true)]
async fn row_16_nodes_of_others_and_proxmox_hosts_are_left_alone() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let mut foreign = new_node("edge", &region.uuid(101));
    foreign["spec"]["providerID"] = json!("k3s://edge");
    let mut elsewhere = new_node("elsewhere", &region.uuid(101));
    elsewhere["spec"]["providerID"] = json!("proxmox://r9/101");
    let host = new_node("pve1", "00000000-0000-4000-8000-00000000000a");
    let lost = new_node("lost", "00000000-0000-4000-8000-00000000000b");
    for node in [foreign, elsewhere, host, lost] {
        server.put(NODES, node);
    }
    let _running = start(&server, &[&region]);
    for (name, reason) in [
        ("edge", "ForeignProviderId"),
        ("elsewhere", "RegionNotConfigured"),
        ("pve1", "ProxmoxHost"),
        ("lost", "VmNotFound"),
    ] {
        within(secs(5), reason, || server.events_about(name).contains(reason)).await;
        set_ready(&server, name, false);
    }
    sleep(Duration::from_mins(10)).await;
    assert_eq!(server.writes().len(), 0, "nothing but events");
    assert_eq!(server.names(NODES).len(), 4);
}

#[tokio::test(start_paused = true)]
async fn row_17_names_mean_nothing() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    region.sim.set_vm_key(102, "name", Some("renamed"));
    region.sim.set_vm_key(101, "name", Some("w102"));
    set_ready(&server, "w102", false);
    sleep(Duration::from_mins(10)).await;
    assert!(server.get(NODES, "w102").is_some());
    assert_eq!(node(&server, "w102")["spec"]["providerID"], "proxmox://r1/102");
    region.sim.move_vm(102, "pve2");
    within(secs(12), "zone", || label(&server, "w102", ZONE).as_deref() == Some("pve2")).await;
}

#[tokio::test(start_paused = true)]
async fn row_18_without_a_provided_address_those_that_are_there_stay() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let mut bare = new_node("w101", &region.uuid(101));
    bare["metadata"]["annotations"] = json!({});
    bare["status"]["addresses"] = json!([{"type": "InternalIP", "address": "10.0.0.9"}]);
    server.put(NODES, bare);
    ccm(&server, &[&region], Settings::default(), &Metrics::default()).once().await.expect("one pass");
    assert!(!taints(&server, "w101").contains(UNINITIALIZED));
    let addresses = node(&server, "w101")["status"]["addresses"].clone();
    let internal = json!({"type": "InternalIP", "address": "10.0.0.9"});
    assert!(addresses.as_array().expect("addresses").contains(&internal), "{addresses}");
}
