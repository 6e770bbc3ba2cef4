//! What volumes there are: `ListVolumes` and `ControllerGetVolume`, over the simulator in process, on a paused clock.

mod support;

use std::time::Duration;

use proxmox_csi::{
    csi::proto::{self, controller_server::Controller as _},
    sim::{Sim, World},
};
use serde_json::json;
use support::{Bench, CSI, GIB, REGION, assert_refused, at, new_volume, places, token};
use tonic::{Code, Request};

/// How often storages were listed.
fn listings(bench: &Bench) -> usize {
    bench.sim.log().iter().filter(|e| e.method == "GET" && e.path.contains("/content?")).count()
}

async fn get(bench: &Bench, id: &str) -> Result<proto::Volume, tonic::Status> {
    let request = proto::ControllerGetVolumeRequest { volume_id: id.to_owned() };
    let answer = bench.controller.controller_get_volume(Request::new(request)).await?.into_inner();
    assert!(answer.status.expect("a status").published_node_ids.is_empty(), "not advertised");
    Ok(answer.volume.expect("a volume"))
}

#[tokio::test(start_paused = true)]
async fn every_volume_is_listed_once_in_pages_of_any_size() {
    let bench = Bench::new();
    let mut made = Vec::new();
    for (name, storage, zone) in [
        ("pvc-4", "shared", "pve1"),
        ("pvc-1", "local", "pve2"),
        ("pvc-3", "data", "pve1"),
        ("pvc-2", "local", "pve1"),
        ("pvc-5", "shared", "pve2"),
    ] {
        let mut request = new_volume(name, storage);
        request.accessibility_requirements = Some(places(&[at(REGION, zone)]));
        made.push(bench.create(request).await.expect("a volume").volume_id);
    }
    made.sort_by_key(|id| id.parse::<proxmox_csi::types::VolumeHandle>().expect("a handle"));
    assert_eq!(bench.list(0, "").await.expect("a listing"), (made.clone(), String::new()));
    for most in 1..=6 {
        let (mut listed, mut token) = (Vec::new(), String::new());
        loop {
            let (page, next) = bench.list(most, &token).await.expect("a page");
            assert!(page.len() <= usize::try_from(most).expect("a size"), "{most}");
            listed.extend(page);
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(listed, made, "in pages of {most}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_page_begins_where_the_last_one_ended_whatever_was_deleted_or_made_since() {
    let bench = Bench::new();
    let mut made = Vec::new();
    for name in ["pvc-1", "pvc-3", "pvc-5"] {
        made.push(bench.volume(name, "shared").await.volume_id);
    }
    let (first, token) = bench.list(2, "").await.expect("a page");
    assert_eq!(first, made[..2]);
    // The very volume that the token stands for is deleted, one is made before it and one behind.
    bench.delete(&made[1]).await.expect("deleted");
    bench.volume("pvc-2", "shared").await;
    let new = bench.volume("pvc-4", "shared").await.volume_id;
    let rest = bench.list(0, &token).await.expect("a page");
    assert_eq!(rest, (vec![new, made[2].clone()], String::new()));
}

#[tokio::test(start_paused = true)]
async fn a_token_that_was_never_given_is_aborted() {
    let bench = Bench::new();
    for token in ["invalid-token", "elsewhere//shared/9999/vm-9999-x.raw"] {
        assert_refused(bench.list(0, token).await, Code::Aborted, &[token]);
    }
    assert_refused(bench.list(-1, "").await, Code::InvalidArgument, &["max_entries"]);
}

#[tokio::test(start_paused = true)]
async fn only_volumes_of_the_driver_are_listed() {
    let bench = Bench::new();
    let mine = bench.volume("pvc-1", "local").await.volume_id;
    for form in [
        "filename=vm-101-disk-7.raw&vmid=101&size=1M",
        // A snapshot of the driver before this one is a disk of the same owner.
        "filename=vm-9999-snapshot-0e6cf7a5.raw&vmid=9999&size=1M",
    ] {
        bench.admin("POST", "/nodes/pve1/storage/local/content", form).await;
    }
    assert_eq!(bench.list(0, "").await.expect("a listing").0, [mine]);
}

#[tokio::test(start_paused = true)]
async fn a_listing_is_used_for_a_minute_and_knows_our_own_writes_at_once() {
    let bench = Bench::new();
    let first = bench.volume("pvc-1", "shared").await.volume_id;
    bench.list(0, "").await.expect("a listing");
    bench.sim.clear_log();
    // local and data on two nodes each, and shared once: five storages, none of them listed again.
    let second = bench.volume("pvc-2", "shared").await.volume_id;
    assert_eq!(bench.list(0, "").await.expect("a listing").0, [first.clone(), second.clone()]);
    bench.delete(&first).await.expect("deleted");
    assert_eq!(bench.list(0, "").await.expect("a listing").0, std::slice::from_ref(&second));
    bench.attach(&second, "worker-101").await.expect("attached");
    bench.expand(&second, 2 * GIB).await.expect("grown");
    let request = proto::ListVolumesRequest::default();
    let answer = bench.controller.list_volumes(Request::new(request)).await.expect("a listing").into_inner();
    assert_eq!(answer.entries[0].volume.as_ref().expect("a volume").capacity_bytes, 2 * GIB);
    assert_eq!(listings(&bench), 0);
    // What others did shows after a minute.
    bench.admin("DELETE", "/nodes/pve1/storage/shared/content/shared:9999/vm-9999-pvc-2.raw", "").await;
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert!(bench.list(0, "").await.expect("a listing").0.is_empty());
    assert_eq!(listings(&bench), 5);
}

#[tokio::test(start_paused = true)]
async fn many_who_ask_at_once_share_one_listing_of_each_storage() {
    let bench = Bench::new();
    bench.volume("pvc-1", "shared").await;
    tokio::time::sleep(Duration::from_secs(70)).await;
    bench.sim.clear_log();
    let asked = futures_util::future::join_all((0..8).map(|_| bench.list(0, ""))).await;
    assert!(asked.into_iter().all(|page| page.expect("a listing").0.len() == 1));
    assert_eq!(listings(&bench), 5);
}

#[tokio::test(start_paused = true)]
async fn what_is_made_or_deleted_while_a_storage_is_listed_is_not_lost() {
    let bench = Bench::new();
    let old = bench.volume("pvc-1", "shared").await.volume_id;
    tokio::time::sleep(Duration::from_secs(70)).await;
    bench.fault(
        json!({"fault": "delay_answer", "method": "GET", "path": "/storage/shared/content?", "ms": 20_000}),
    );
    let write = async {
        // The storage has been read by now, and its answer is on the way.
        tokio::time::sleep(Duration::from_secs(5)).await;
        let new = bench.volume("pvc-2", "shared").await.volume_id;
        bench.delete(&old).await.expect("deleted");
        new
    };
    let (listed, new) = tokio::join!(bench.list(0, ""), write);
    listed.expect("a listing");
    bench.sim.clear_log();
    assert_eq!(bench.list(0, "").await.expect("a listing").0, [new]);
    assert_eq!(listings(&bench), 0);
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_can_not_be_listed_is_not_taken_for_empty() {
    let bench = Bench::new();
    let mut request = new_volume("pvc-1", "local");
    request.accessibility_requirements = Some(places(&[at(REGION, "pve2")]));
    let volume = bench.create(request).await.expect("a volume").volume_id;
    let restarted = bench.restarted();
    bench.fault(json!({"fault": "kill_node", "node": "pve2"}));
    // A controller that never saw the node's storages can't tell what volumes there are.
    assert_refused(restarted.list(0, "").await, Code::Unavailable, &["pve2"]);
    bench.fault(json!({"fault": "kill_node", "node": "pve2", "on": false}));
    assert_eq!(restarted.list(0, "").await.expect("a listing").0, std::slice::from_ref(&volume));
    bench.fault(json!({"fault": "kill_node", "node": "pve2"}));
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert_eq!(restarted.list(0, "").await.expect("what it last had").0, [volume]);
}

#[tokio::test(start_paused = true)]
async fn volumes_that_the_token_may_not_see_are_not_taken_for_absent() {
    let mut world = World::builtin();
    let blind = ["Datastore.AllocateSpace".to_owned(), "Datastore.Audit".to_owned()];
    world.roles.insert("Blind".into(), blind.into());
    let entry = json!({"path": "/storage/shared", "role": "Blind", "who": CSI});
    world.acl.push(serde_json::from_value(entry).expect("an ACL entry"));
    let bench = Bench::with(world, CSI);
    assert_refused(bench.list(0, "").await, Code::PermissionDenied, &["shared", "Datastore.Allocate"]);
}

#[tokio::test(start_paused = true)]
async fn volumes_of_all_regions_are_listed() {
    let here = Sim::in_memory(World::builtin()).expect("a world");
    let there = Sim::in_memory(World::builtin()).expect("a world");
    let bench = Bench::across(&[("east", &here), ("west", &there)], &token(CSI));
    let mut made = Vec::new();
    for (region, name) in [("east", "pvc-1"), ("west", "pvc-2")] {
        let mut request = new_volume(name, "shared");
        request.accessibility_requirements = Some(places(&[at(region, "pve1")]));
        made.push(bench.create(request).await.expect("a volume").volume_id);
    }
    assert_eq!(made, ["east//shared/9999/vm-9999-pvc-1.raw", "west//shared/9999/vm-9999-pvc-2.raw"]);
    let (first, token) = bench.list(1, "").await.expect("a page");
    let (second, end) = bench.list(1, &token).await.expect("a page");
    assert_eq!(([first, second].concat(), end), (made, String::new()));
}

#[tokio::test(start_paused = true)]
async fn one_volume_is_shown_as_it_is_and_a_missing_one_is_not_found() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await;
    let shown = get(&bench, &volume.volume_id).await.expect("a volume");
    assert_eq!(shown.capacity_bytes, GIB);
    assert_eq!((shown.volume_id, shown.accessible_topology), (volume.volume_id, volume.accessible_topology));
    for missing in ["test/pve1/local/9999/vm-9999-pvc-2.raw", "fake-vol-id-1234"] {
        assert_refused(get(&bench, missing).await, Code::NotFound, &[missing]);
    }
    assert_refused(get(&bench, "").await, Code::InvalidArgument, &["volume_id"]);
    bench.fault(json!({"fault": "kill_node", "node": "pve1"}));
    let unknown = get(&bench, "test/pve1/local/9999/vm-9999-pvc-1.raw").await;
    assert_refused(unknown, Code::Unavailable, &["pve1"]);
}
