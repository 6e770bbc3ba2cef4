//! What an administrator is told in Events: each thing by its reason, once an hour, and what it is about.

use std::time::Duration;

use proxmox_csi::ccm::{Settings, addresses::Mode, provider_id::Format};
use serde_json::json;
use tokio::time::sleep;

use crate::{apiserver::ApiServer, rig::*};

/// The notes of a reason after so long, and the reconciles in between.
async fn told(running: &Running, name: &str, reason: &str, after: Duration) -> Vec<String> {
    sleep(after).await;
    running.server.notes(name, reason)
}

const HOUR: Duration = Duration::from_mins(59);

#[tokio::test(start_paused = true)]
async fn a_move_is_told_once() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    region.sim.move_vm(101, "pve2");
    assert_eq!(told(&running, "w101", "VmMoved", HOUR).await, ["VM 101 moved from `pve1` to `pve2`"]);
    region.sim.move_vm(101, "pve1");
    assert_eq!(told(&running, "w101", "VmMoved", HOUR).await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_missing_privilege_is_told_once_an_hour_with_the_remedy() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    region.hide(&[102]);
    set_ready(&running.server, "w102", false);
    let notes = told(&running, "w102", "MissingPrivilege", HOUR).await;
    assert_eq!(
        notes,
        ["VM 102 of region `r1` exists, but the token does not see it; hint: give it VM.Audit on /vms/102"]
    );
    assert_eq!(told(&running, "w102", "MissingPrivilege", HOUR).await.len(), 2);
    let metrics = running.metrics.render();
    assert!(metrics.contains("proxmox_ccm_refusals_total{reason=\"not_proven_gone\"} 2"), "{metrics}");
}

#[tokio::test(start_paused = true)]
async fn a_token_that_may_not_ask_guest_agents_is_told_of() {
    let region = Region::new("r1");
    for vmid in [101, 102, 103] {
        region.sim.set_vm_key(vmid, "agent", Some("1"));
    }
    let mut settings = Settings::default();
    settings.addresses.mode = Mode::Agent;
    let running = settled(&region, settings).await;
    let notes = told(&running, "w101", "MissingPrivilege", HOUR).await;
    assert!(notes.len() == 1 && notes[0].contains("VM.GuestAgent.Audit"), "{notes:?}");
}

#[tokio::test(start_paused = true)]
async fn a_dead_region_is_told_of_at_nodes_that_wait_for_it() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    set_ready(&running.server, "w102", false);
    region.set_dead(true);
    let notes = told(&running, "w102", "RegionUnreachable", HOUR).await;
    assert!(notes.len() == 1 && notes[0].contains("no route to host"), "{notes:?}");
    assert!(running.server.notes("w101", "RegionUnreachable").is_empty(), "it lacks nothing");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_not_heard_of_is_told_of_at_its_silent_nodes() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    set_ready(&running.server, "w103", false);
    region.fault(json!({"fault": "kill_node", "node": "pve2", "on": true}));
    let notes = told(&running, "w103", "HostUnreachable", HOUR).await;
    assert!(notes.len() == 1 && notes[0].contains("`pve2`"), "{notes:?}");
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_uuid_is_told_with_all_its_vms() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    region.set_uuid(103, &region.uuid(101));
    // It is read anew when the VM was started anew.
    sleep(secs(60)).await;
    region.sim.stop_vm(103).await;
    region.sim.start_vm(103).await.expect("it starts");
    let notes = told(&running, "w101", "DuplicateUuid", HOUR).await;
    assert!(notes.len() == 1 && notes[0].contains("VM 103 of region `r1`"), "{notes:?}");
}

#[tokio::test(start_paused = true)]
async fn a_reused_vmid_is_told_of() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    sleep(secs(60)).await;
    region.sim.stop_vm(102).await;
    region.set_uuid(102, "00000000-0000-4000-8000-000000000001");
    let notes = told(&running, "w102", "VmidReused", HOUR).await;
    assert!(notes.len() == 1 && notes[0].contains("VM 102 of region `r1` is another one now"), "{notes:?}");
}

#[tokio::test(start_paused = true)]
async fn nodes_of_others_are_told_of_once() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let mut foreign = new_node("edge", &region.uuid(101));
    foreign["spec"]["providerID"] = json!("aws:///eu/i-1");
    server.put(NODES, foreign);
    server.put(NODES, new_node("pve1.example.com", "00000000-0000-4000-8000-00000000000a"));
    let running = start(&server, &[&region]);
    let notes = told(&running, "edge", "ForeignProviderId", HOUR).await;
    assert!(notes.len() == 1 && notes[0].contains("aws:///eu/i-1"), "{notes:?}");
    let notes = told(&running, "pve1.example.com", "ProxmoxHost", HOUR).await;
    assert!(!notes.is_empty() && notes[0].contains("the Proxmox node `pve1` itself"), "{notes:?}");
}

#[tokio::test(start_paused = true)]
async fn a_refused_deletion_is_told_with_the_reason() {
    let region = Region::new("r1");
    let running = settled(&region, Settings { delete_nodes: false, ..Settings::default() }).await;
    region.sim.forget_vm(102);
    set_ready(&running.server, "w102", false);
    let notes = told(&running, "w102", "NotDeleted", HOUR).await;
    assert_eq!(notes, ["VM 102 of region `r1` is not there, and deletion of Nodes is off"]);
    assert!(running.server.get(NODES, "w102").is_some());
    assert_eq!(region.asked("/cluster/nextid"), 0, "nothing depends on it");
}

#[tokio::test(start_paused = true)]
async fn a_provider_id_that_is_not_clear_is_told_of_and_not_written() {
    let (server, region) = (ApiServer::default(), Region::new("r1"));
    let mut other = new_node("w101", &region.uuid(101));
    other["spec"]["providerID"] = json!(format!("proxmox://{}", region.uuid(101)));
    server.put(NODES, other);
    server.put(NODES, new_node("w102", &region.uuid(102)));
    let running = start(&server, &[&region]);
    let notes = told(&running, "w102", "ProviderIdUnclear", HOUR).await;
    assert!(notes.len() == 1 && notes[0].contains("--provider-id-format"), "{notes:?}");
    assert_eq!(node(&server, "w102")["spec"]["providerID"], json!(null));
    drop(running);
    let settings = Settings { provider_id: Format::Uuid, ..Settings::default() };
    let _running = start_with(&server, &[&region], settings);
    let id = json!(format!("proxmox://{}", region.uuid(102)));
    within(secs(5), "written", || node(&server, "w102")["spec"]["providerID"] == id).await;
}

#[tokio::test(start_paused = true)]
async fn an_event_that_could_not_be_written_is_written_later() {
    let region = Region::new("r1");
    let running = settled(&region, Settings::default()).await;
    let server = running.server.clone();
    sleep(secs(30)).await;
    // Long enough that what is to be said comes up in between.
    set_ready(&server, "w103", false);
    sleep(secs(2)).await;
    server.refuse_events(true);
    region.fault(json!({"fault": "kill_node", "node": "pve2", "on": true}));
    sleep(Duration::from_mins(5)).await;
    assert!(server.notes("w103", "HostUnreachable").is_empty());
    server.refuse_events(false);
    within(secs(90), "said", || server.notes("w103", "HostUnreachable").len() == 1).await;
}
