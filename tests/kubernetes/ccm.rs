//! The cloud-controller loop over a simulated Proxmox and the fake API server: what becomes of Nodes.

use std::{collections::BTreeSet, time::Duration};

use proxmox_csi::{
    ccm::{Settings, addresses::Mode, labels::ZoneMode},
    k8s::lease::{self, Election, Ended},
    telemetry::metrics::Metrics,
};
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    apiserver::{ApiServer, rights},
    rig::*,
};

#[tokio::test(start_paused = true)]
async fn a_node_is_initialised_within_two_seconds_of_its_registration() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let _running = start(&server, &[&region]);
    sleep(secs(60)).await;
    server.put(NODES, new_node("any-name", &region.uuid(103).to_uppercase()));
    within(secs(2), "taint off", || !taints(&server, "any-name").contains(UNINITIALIZED)).await;
    let node = node(&server, "any-name");
    assert_eq!(node["spec"]["providerID"], "proxmox://r1/103");
    for (key, value) in [
        ("topology.kubernetes.io/region", "r1"),
        (ZONE, "pve2"),
        ("failure-domain.beta.kubernetes.io/zone", "pve2"),
        ("topology.proxmox.sinextra.dev/zone", "pve2"),
        ("mine", "yes"),
    ] {
        assert_eq!(node["metadata"]["labels"][key], value, "{key}");
    }
    let addresses =
        json!([{"type": "Hostname", "address": "any-name"}, {"type": "InternalIP", "address": "10.0.0.5"}]);
    assert_eq!(node["status"]["addresses"], addresses);
    assert_eq!(taints(&server, "any-name"), BTreeSet::from(["mine".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn a_migration_is_in_the_labels_within_one_poll() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    sleep(secs(30)).await;
    region.sim.move_vm(101, "pve2");
    within(secs(12), "zone", || label(&running.server, "w101", ZONE).as_deref() == Some("pve2")).await;
    assert_eq!(label(&running.server, "w102", ZONE).as_deref(), Some("pve1"));
    assert!(running.server.events_about("w101").contains("VmMoved"));
}

#[tokio::test(start_paused = true)]
async fn a_sticky_zone_stays_and_our_own_label_follows() {
    let region = Region::new("r1");
    let mut settings = Settings::default();
    settings.labels.zone = ZoneMode::Sticky;
    let running = settled(&region, settings).await;
    region.sim.move_vm(101, "pve2");
    let own = "topology.proxmox.sinextra.dev/zone";
    within(secs(12), "own zone", || label(&running.server, "w101", own).as_deref() == Some("pve2")).await;
    assert_eq!(label(&running.server, "w101", ZONE).as_deref(), Some("pve1"));
}

#[tokio::test(start_paused = true)]
async fn at_rest_nothing_is_written_and_proxmox_is_asked_once_a_poll() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    sleep(secs(60)).await;
    running.server.writes();
    region.sim.clear_log();
    sleep(Duration::from_mins(10)).await;
    assert_eq!(running.server.writes(), [""; 0]);
    let asked = region.sim.log().len();
    // 60 polls, privileges and HA groups twice.
    assert!((50..70).contains(&asked), "{asked} requests in ten minutes");
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_comes_back_in_time_keeps_its_node() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    set_ready(&server, "w102", false);
    // Neither row nor VMID for a while, as between the two halves of a restore.
    let refused =
        json!({"fault": "refuse", "path": "/cluster/nextid", "status": 500, "text": "no quorum", "times": 0});
    region.hide(&[102]);
    region.fault(refused);
    sleep(Duration::from_mins(10)).await;
    region.hide(&[]);
    region.sim.clear_faults();
    sleep(Duration::from_mins(10)).await;
    assert!(server.get(NODES, "w102").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_dead_region_holds_up_no_other_and_proves_nothing_there() {
    let (one, two) = (Region::new("r1"), Region::new("r2"));
    two.set_dead(true);
    for vmid in [101, 102, 103] {
        // The built-in worlds are twins; these are other machines.
        two.sim.set_vm_key(vmid, "smbios1", Some(&format!("uuid=00000000-0000-4000-8000-000000000{vmid}")));
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
    two.set_dead(false);
    within(secs(15), "initialised", || !taints(&server, "far").contains(UNINITIALIZED)).await;
    assert_eq!(node(&server, "far")["spec"]["providerID"], "proxmox://r2/103");
    within(Duration::from_mins(2), "deleted", || server.get(NODES, "w101").is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_too_old_begins_anew() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(30)).await;
    server.set_down(true);
    sleep(secs(90)).await;
    server.edit(NODES, "w101", |node| node["metadata"]["labels"][ZONE] = json!("wrong"));
    server.compact();
    server.set_down(false);
    within(secs(120), "mended", || label(&server, "w101", ZONE).as_deref() == Some("pve1")).await;
    server.end_watches();
    server.edit(NODES, "w102", |node| node["metadata"]["labels"][ZONE] = json!("wrong"));
    within(secs(120), "mended", || label(&server, "w102", ZONE).as_deref() == Some("pve1")).await;
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_and_labels_only_write_no_more_than_they_say() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    server.put(NODES, new_node("w101", &region.uuid(101)));
    let dry = start_with(&server, &[&region], Settings { dry_run: true, ..Settings::default() });
    sleep(secs(60)).await;
    drop(dry);
    assert_eq!(server.writes(), [""; 0]);
    assert!(server.events_about("w101").is_empty());
    let labels_only = Settings { labels_only: true, ..Settings::default() };
    ccm(&server, &[&region], labels_only, &Metrics::default()).once().await.expect("one pass");
    assert_eq!(label(&server, "w101", ZONE).as_deref(), Some("pve1"));
    assert!(taints(&server, "w101").contains(UNINITIALIZED));
    assert_eq!(node(&server, "w101")["spec"]["providerID"], Value::Null);
    ccm(&server, &[&region], Settings::default(), &Metrics::default()).once().await.expect("one pass");
    assert!(!taints(&server, "w101").contains(UNINITIALIZED));
}

#[tokio::test(start_paused = true)]
async fn a_resize_is_followed() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    server.put(NODES, new_node("w101", &region.uuid(101)));
    let _running = start(&server, &[&region]);
    let kind = "node.kubernetes.io/instance-type";
    within(secs(5), "typed", || label(&server, "w101", kind).is_some()).await;
    region.sim.set_vm_key(101, "cores", Some("6"));
    region.sim.set_vm_key(101, "memory", Some("16384"));
    let resized = || label(&server, "w101", kind).is_some_and(|kind| kind.ends_with("VCPU-16GB"));
    within(secs(12), "resized", resized).await;
}

#[tokio::test(start_paused = true)]
async fn ha_groups_are_labels_and_go_away_with_them() {
    let (server, mut region) = (ApiServer::default(), Region::new("r1"));
    region.token = "root@pam!root";
    let rules = "/cluster/ha/rules";
    admin(&region, "POST", "/cluster/ha/resources", "sid=vm%3A101").await;
    admin(&region, "POST", rules, "rule=fast&type=node-affinity&nodes=pve1%3A2&resources=vm%3A101").await;
    let mut node = new_node("w101", &region.uuid(101));
    node["metadata"]["labels"]["group.topology.proxmox.sinextra.dev/old"] = json!("");
    server.put(NODES, node);
    let _running = start(&server, &[&region]);
    let group = |name: &str| label(&server, "w101", &format!("group.topology.proxmox.sinextra.dev/{name}"));
    within(secs(5), "labelled", || group("fast").is_some()).await;
    assert_eq!(group("old"), None, "another controller's label, and no group any more");
    admin(&region, "DELETE", "/cluster/ha/rules/fast", "").await;
    within(Duration::from_mins(6), "gone", || group("fast").is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn a_minority_is_not_asked_where_another_server_is_in_the_majority() {
    let region = Region::new("r1").with_two_servers();
    let running = settled(&region, Settings::default()).await;
    sleep(secs(30)).await;
    region.hand(0).cut_off = true;
    region.sim.move_vm(101, "pve2");
    within(secs(12), "moved", || label(&running.server, "w101", ZONE).as_deref() == Some("pve2")).await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_not_taken_for_a_vm_that_the_token_does_not_see_any_more() {
    let region = Region::new("r1");
    let running = settled(&region, Settings { out_of_service: true, ..Settings::default() }).await;
    let server = running.server.clone();
    sleep(secs(60)).await;
    // A stopped copy of 101, which runs and is out of sight.
    region.sim.stop_vm(103).await;
    region.set_uuid(103, &region.uuid(101));
    region.hide(&[101]);
    set_ready(&server, "w101", false);
    sleep(Duration::from_mins(40)).await;
    assert_eq!(taints(&server, "w101"), BTreeSet::from(["mine".to_owned()]));
    assert_eq!(label(&server, "w101", ZONE).as_deref(), Some("pve1"));
    assert!(server.events_about("w101").contains("MissingPrivilege"));
    // Where 101 is gone for certain, the copy is what the node is.
    region.sim.forget_vm(101);
    within(Duration::from_mins(6), "moved", || label(&server, "w101", ZONE).as_deref() == Some("pve2")).await;
    assert!(server.events_about("w101").contains("RecordedElsewhere"));
}

#[tokio::test(start_paused = true)]
async fn configs_are_read_once_and_no_request_is_made_for_each_node() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    assert_eq!(region.asked("/qemu/"), 3, "one config each");
    region.forget_asked();
    // Nodes come and go, VMs move: nothing of that is a reason to read.
    for round in 0..20 {
        region.sim.move_vm(101, ["pve1", "pve2"][round % 2]);
        set_ready(&running.server, "w102", round % 2 == 0);
        sleep(secs(60)).await;
    }
    assert_eq!(region.asked("/qemu/"), 0);
    let polls = region.asked("/cluster/resources");
    assert!((109..=121).contains(&polls), "{polls} in twenty minutes");
}

#[tokio::test(start_paused = true)]
async fn a_long_interval_between_polls_is_no_silence() {
    let (one, two) = (Region::new("r1"), Region::new("r2"));
    for vmid in [101, 102, 103] {
        two.set_uuid(vmid, &format!("00000000-0000-4000-8000-000000000{vmid}"));
    }
    let server = ApiServer::default();
    server.put(NODES, new_node("w101", &one.uuid(101)));
    let _running = start_with(&server, &[&one, &two], Settings { interval: secs(60), ..Settings::default() });
    sleep(secs(200)).await;
    one.sim.forget_vm(101);
    set_ready(&server, "w101", false);
    within(Duration::from_mins(6), "deleted", || server.get(NODES, "w101").is_none()).await;
    assert!(!server.events_about("w101").contains("RegionUnreachable"));
}

#[tokio::test(start_paused = true)]
async fn addresses_come_from_the_guest_agent_and_stay_when_it_falls_silent() {
    let (server, mut region) = (ApiServer::default(), Region::new("r1"));
    region.token = ADMIN;
    region.sim.set_vm_key(101, "agent", Some("1"));
    region.sim.set_vm_key(101, "net0", Some("virtio=BC:24:11:00:00:01,bridge=vmbr0"));
    region.sim.set_vm_key(101, "ipconfig0", Some("ip=10.0.0.5/24,gw=10.0.0.1,ip6=2001:db8::5/64"));
    region.sim.set_vm_key(101, "net1", Some("virtio=BC:24:11:00:00:02,bridge=vmbr1"));
    region.sim.set_vm_key(101, "ipconfig1", Some("ip=203.0.113.7/24"));
    server.put(NODES, new_node("w101", &region.uuid(101)));
    let mut settings = Settings::default();
    settings.addresses.mode = Mode::Agent;
    settings.addresses.external = "203.0.113.0/24".parse().expect("a network");
    let _running = start_with(&server, &[&region], settings);
    let addresses = || {
        let all = node(&server, "w101")["status"]["addresses"].clone();
        let text = |one: &Value| format!("{}={}", one["type"], one["address"]).replace('"', "");
        all.as_array().into_iter().flatten().map(text).collect::<Vec<_>>()
    };
    let wanted = ["Hostname=w101", "InternalIP=10.0.0.5", "InternalIP=2001:db8::5", "ExternalIP=203.0.113.7"];
    within(secs(30), "addresses", || addresses() == wanted).await;
    region.fault(json!({"fault": "silent_agent", "vmid": 101, "on": true}));
    sleep(Duration::from_mins(30)).await;
    assert_eq!(addresses(), wanted);
    region.sim.set_vm_key(101, "ipconfig1", Some("ip=203.0.113.8/24"));
    region.sim.clear_faults();
    within(Duration::from_mins(6), "changed", || addresses()[3] == "ExternalIP=203.0.113.8").await;
}

#[tokio::test(start_paused = true)]
async fn ha_groups_of_proxmox_8_are_labels_and_may_be_the_zone() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let missing = json!({"data": null, "message": "Method 'GET /cluster/ha/rules' not implemented"});
    region.hand(0).answers.insert("/cluster/ha/rules", (501, missing));
    let groups = json!({"data": [{"group": "slow", "nodes": "pve2,pve1:1", "type": "group"},
        {"group": "fast", "nodes": "pve1:2", "type": "group"}]});
    region.hand(0).answers.insert("/cluster/ha/groups", (200, groups));
    server.put(NODES, new_node("w101", &region.uuid(101)));
    let mut settings = Settings::default();
    settings.labels.zone_is_ha_group = true;
    let _running = start_with(&server, &[&region], settings);
    within(secs(5), "labelled", || label(&server, "w101", ZONE).as_deref() == Some("fast")).await;
    for group in ["fast", "slow"] {
        let key = format!("group.topology.proxmox.sinextra.dev/{group}");
        assert_eq!(label(&server, "w101", &key).as_deref(), Some(""), "{group}");
    }
}

#[tokio::test(start_paused = true)]
async fn where_ha_groups_can_not_be_read_a_zone_of_groups_is_refused_and_the_node_told() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    server.put(NODES, new_node("w101", &region.uuid(101)));
    let mut settings = Settings::default();
    settings.labels.zone_is_ha_group = true;
    let _running = start_with(&server, &[&region], settings);
    within(secs(30), "told", || server.events_about("w101").contains("ZoneUnknown")).await;
    assert!(taints(&server, "w101").contains(UNINITIALIZED));
    assert!(server.notes("w101", "ZoneUnknown")[0].contains("Sys.Audit on /"));
}

#[tokio::test(start_paused = true)]
async fn a_slow_and_quarrelsome_api_server_ends_in_the_same_nodes() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    server.set_lag(secs(3));
    server.conflict_every(2);
    for vmid in [101, 102, 103] {
        server.put(NODES, new_node(&format!("w{vmid}"), &region.uuid(vmid)));
    }
    let _running = start(&server, &[&region]);
    for vmid in [101, 102, 103] {
        let name = format!("w{vmid}");
        let id = json!(format!("proxmox://r1/{vmid}"));
        within(Duration::from_mins(5), "initialised", || {
            node(&server, &name)["spec"]["providerID"] == id
                && !taints(&server, &name).contains(UNINITIALIZED)
        })
        .await;
        assert_eq!(label(&server, &name, "mine").as_deref(), Some("yes"));
    }
}

#[tokio::test(start_paused = true)]
async fn the_rights_that_are_listed_are_used_and_no_others() {
    // Each test fails on a right that is not listed; this one has a use for each that is.
    let region = Region::new("r1");
    let server = ApiServer::default();
    for vmid in [101, 102, 103] {
        server.put(NODES, new_node(&format!("w{vmid}"), &region.uuid(vmid)));
    }
    let settings = lease::Settings::new("kube-system", "proxmox-ccm", "host");
    let (election, mut leadership) = Election::new(server.client(), settings);
    server.allow(rights::CCM);
    let stop = CancellationToken::new();
    let elected = tokio::spawn(election.run(stop.clone()));
    leadership.acquired().await;
    let settings = Settings { out_of_service: true, ..Settings::default() };
    let running = start_with(&server, &[&region], settings);
    for name in ["w101", "w102", "w103"] {
        within(secs(5), "initialised", || !taints(&server, name).contains(UNINITIALIZED)).await;
    }
    region.sim.stop_vm(101).await;
    set_ready(&server, "w101", false);
    within(secs(60), "given up", || taints(&server, "w101").contains(OUT_OF_SERVICE)).await;
    region.sim.start_vm(101).await.expect("it starts");
    set_ready(&server, "w101", true);
    within(secs(60), "taken back", || !taints(&server, "w101").contains(OUT_OF_SERVICE)).await;
    region.sim.forget_vm(102);
    set_ready(&server, "w102", false);
    within(Duration::from_mins(3), "deleted", || server.get(NODES, "w102").is_none()).await;
    server.compact();
    // What somebody else wrote is what a renewal does not expect, and reads anew.
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";
    server.edit(leases, "proxmox-ccm", |lease| lease["metadata"]["labels"] = json!({"mine": "yes"}));
    sleep(secs(10)).await;
    assert!(leadership.holds());
    stop.cancel();
    assert_eq!(elected.await.expect("no panic"), Ended::Released);
    assert_eq!(running.server.used(), rights::rights(rights::CCM));
}

#[tokio::test(start_paused = true)]
async fn the_loop_is_ready_while_nodes_are_compared_with_what_some_region_tells() {
    let (server, one, two) = (ApiServer::default(), Region::new("r1"), Region::new("r2"));
    let lone = ccm(&server, &[&one, &two], Settings::default(), &Metrics::default());
    let health = lone.health();
    assert!(!health.is_good(), "nothing was done yet");
    let stop = CancellationToken::new();
    let running = tokio::spawn(lone.run(stop.clone()));
    sleep(secs(5)).await;
    assert!(health.is_good());
    two.set_dead(true);
    sleep(Duration::from_mins(10)).await;
    assert!(health.is_good(), "the other region is served");
    one.set_dead(true);
    sleep(secs(90)).await;
    assert!(!health.is_good());
    one.set_dead(false);
    sleep(secs(15)).await;
    assert!(health.is_good());
    stop.cancel();
    running.await.expect("it ends");
    sleep(Duration::from_mins(3)).await;
    assert!(!health.is_good());
}
