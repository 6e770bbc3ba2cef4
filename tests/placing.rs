//! Where new volumes go: topology, several regions, shared storages of some nodes, over the simulator in process.

mod support;

use std::{collections::BTreeMap, time::Duration};

use proxmox_csi::{
    csi::proto::CreateVolumeRequest,
    sim::{Sim, World, faults::Fault, world::Storage},
};
use serde_json::json;
use support::{Bench, CSI, GIB, REGION, assert_refused, at, new_volume, of_all_types, places, token};
use tonic::Code;

fn segments(volume: &proxmox_csi::csi::proto::Volume) -> Vec<BTreeMap<String, String>> {
    volume.accessible_topology.iter().map(|topology| topology.segments.clone()).collect()
}

fn count(sim: &Sim, name: &str) -> usize {
    sim.volumes().iter().filter(|v| v.key.name.contains(name)).count()
}

/// Three nodes, and a shared storage that two of them have.
fn restricted() -> World {
    let mut world = World::builtin();
    world.nodes.push("pve3".into());
    let storage = Storage {
        id: "pair".into(),
        shared: true,
        nodes: vec!["pve1".into(), "pve2".into()],
        ..world.storages[2].clone()
    };
    world.storages.push(storage);
    world
}

#[tokio::test(start_paused = true)]
async fn a_volume_goes_where_the_scheduler_wants_it_first() {
    let bench = Bench::new();
    for (index, zones) in [["pve2", "pve1"], ["pve1", "pve2"]].iter().enumerate() {
        let mut request = new_volume(&format!("pvc-{index}"), "local");
        request.accessibility_requirements = Some(places(&zones.map(|zone| at(REGION, zone))));
        let volume = bench.create(request).await.expect("a volume");
        assert_eq!(segments(&volume), [at(REGION, zones[0]).segments]);
        assert!(volume.volume_id.starts_with(&format!("test/{}/", zones[0])));
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_place_is_passed_over_for_another_that_will_do() {
    let mut world = World::builtin();
    world.storages[1].nodes = vec!["pve2".into()];
    let bench = Bench::with(world, CSI);
    let mut request = new_volume("pvc-1", "data");
    request.accessibility_requirements = Some(places(&[at(REGION, "pve1"), at(REGION, "pve2")]));
    assert_eq!(segments(&bench.create(request).await.expect("a volume")), [at(REGION, "pve2").segments]);
    let refused = bench.create(new_volume("pvc-2", "data")).await;
    assert_refused(refused, Code::ResourceExhausted, &["`data`", "`pve1`"]);
}

#[tokio::test(start_paused = true)]
async fn a_volume_on_a_shared_storage_of_some_nodes_can_be_reached_from_each_of_them() {
    let bench = Bench::with(restricted(), CSI);
    let volume = bench.volume("pvc-1", "pair").await;
    assert_eq!(volume.volume_id, "test//pair/9999/vm-9999-pvc-1.raw");
    assert_eq!(segments(&volume), [at(REGION, "pve1").segments, at(REGION, "pve2").segments]);
    // One that all nodes have is reached from the whole region.
    assert_eq!(segments(&bench.volume("pvc-3", "shared").await), [at(REGION, "").segments]);

    let mut elsewhere = new_volume("pvc-2", "pair");
    elsewhere.accessibility_requirements = Some(places(&[at(REGION, "pve3")]));
    assert_refused(bench.create(elsewhere.clone()).await, Code::ResourceExhausted, &["`pair`", "`pve3`"]);
    elsewhere.accessibility_requirements = Some(places(&[at(REGION, "pve3"), at(REGION, "pve2")]));
    bench.create(elsewhere).await.expect("one of the places will do");
    assert_eq!(count(&bench.sim, "pvc-2"), 1);
}

#[tokio::test(start_paused = true)]
async fn of_several_regions_the_preferred_one_that_has_the_storage_gets_the_volume() {
    let here = Sim::in_memory(World::builtin()).expect("a world");
    let mut world = World::builtin();
    world.storages[1].id = "fast".into();
    let there = Sim::in_memory(world).expect("a world");
    let bench = Bench::across(&[("east", &here), ("west", &there)], &token(CSI));
    let both = |name, storage, zones: &[(&str, &str)]| {
        let mut request = new_volume(name, storage);
        let zones: Vec<_> = zones.iter().map(|(region, zone)| at(region, zone)).collect();
        request.accessibility_requirements = Some(places(&zones));
        request
    };
    // WaitForFirstConsumer: the node that the scheduler chose comes first.
    let volume = bench.create(both("pvc-1", "local", &[("west", "pve2"), ("east", "pve1")])).await;
    assert_eq!(volume.expect("a volume").volume_id, "west/pve2/local/9999/vm-9999-pvc-1.raw");
    // Only one of them has such a storage.
    let volume = bench.create(both("pvc-2", "fast", &[("east", "pve1"), ("west", "pve1")])).await;
    assert_eq!(volume.expect("a volume").volume_id, "west/pve1/fast/9999/vm-9999-pvc-2.raw");
    let refused = bench.create(both("pvc-3", "nope", &[("east", "pve1"), ("west", "pve1")])).await;
    assert_refused(refused, Code::InvalidArgument, &["`nope`", "`east` or region `west`", "fast"]);
    // Immediate, without a word of where: nothing says which region is meant.
    let mut anywhere = new_volume("pvc-4", "local");
    anywhere.accessibility_requirements = None;
    assert_refused(bench.create(anywhere).await, Code::InvalidArgument, &["WaitForFirstConsumer"]);
    // And a region that is not configured gets none.
    let refused = bench.create(both("pvc-5", "local", &[("north", "pve1")])).await;
    assert_refused(refused, Code::ResourceExhausted, &["`north`", "east, west"]);
}

#[tokio::test(start_paused = true)]
async fn p5_a_name_is_looked_for_in_every_place_before_it_is_allocated_after_a_restart() {
    let bench = Bench::new();
    let in_order = |zones: [&str; 2]| {
        let mut request = new_volume("pvc-1", "local");
        request.accessibility_requirements = Some(places(&zones.map(|zone| at(REGION, zone))));
        request
    };
    let first = bench.create(in_order(["pve1", "pve2"])).await.expect("a volume");
    // The answer was lost with the controller, and the scheduler has changed its mind.
    for restarted in [bench.restarted(), bench.restarted()] {
        let again = restarted.create(in_order(["pve2", "pve1"])).await.expect("a volume");
        assert_eq!(again, first);
    }
    assert_eq!(count(&bench.sim, "pvc-1"), 1);
    // One that has listed the storages meanwhile knows it from there.
    let restarted = bench.restarted();
    restarted.list(0, "").await.expect("a listing");
    assert_eq!(restarted.create(in_order(["pve2", "pve1"])).await.expect("a volume"), first);
    assert_eq!(count(&bench.sim, "pvc-1"), 1);
}

/// A volume of that name on a local storage, in one of these zones, the first of them if possible.
fn in_order(name: &str, zones: &[&str]) -> CreateVolumeRequest {
    let mut request = new_volume(name, "local");
    let zones: Vec<_> = zones.iter().map(|zone| at(REGION, zone)).collect();
    request.accessibility_requirements = Some(places(&zones));
    request
}

/// Long enough for listings in the background to end, and for what was last heard of a region to be old.
const A_WHILE: Duration = Duration::from_secs(40);

#[tokio::test(start_paused = true)]
async fn p5_a_name_that_may_be_on_a_node_that_is_away_is_allocated_nowhere_else() {
    for restarted in [false, true] {
        let mut bench = Bench::new();
        let first = bench.create(in_order("pvc-1", &["pve1", "pve2"])).await.expect("a volume");
        tokio::time::sleep(A_WHILE).await;
        if restarted {
            bench = bench.restarted();
        }
        bench.fault(json!({"fault": "kill_node", "node": "pve1"}));
        tokio::time::sleep(A_WHILE).await;
        for zones in [&["pve2", "pve1"][..], &["pve1"], &["pve1", "pve2"]] {
            let refused = bench.create(in_order("pvc-1", zones)).await;
            assert_refused(refused, Code::Unavailable, &["`pvc-1`", "`local`", "`pve1`"]);
        }
        assert_eq!(count(&bench.sim, "pvc-1"), 1, "restarted: {restarted}");
        bench.fault(json!({"fault": "kill_node", "node": "pve1", "on": false}));
        assert_eq!(bench.create(in_order("pvc-1", &["pve2", "pve1"])).await.expect("found"), first);
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_away_stops_no_name_that_is_proven_not_to_be_there() {
    let bench = Bench::new();
    // The storages of all nodes are listed once one of them was needed.
    bench.create(in_order("pvc-1", &["pve2"])).await.expect("a volume");
    tokio::time::sleep(A_WHILE).await;
    bench.fault(json!({"fault": "kill_node", "node": "pve1"}));
    tokio::time::sleep(A_WHILE).await;
    let volume = bench.create(in_order("pvc-2", &["pve1", "pve2"])).await.expect("a volume");
    assert_eq!(segments(&volume), [at(REGION, "pve2").segments]);
    // Nothing was made, and the scheduler may try another node.
    assert_refused(
        bench.create(in_order("pvc-3", &["pve1"])).await,
        Code::ResourceExhausted,
        &["`local`", "not available on node `pve1`"],
    );
    // A controller that never saw the node can tell nothing of it, but it is not asked about it where the scheduler
    // names one zone.
    let restarted = bench.restarted();
    let refused = restarted.create(in_order("pvc-3", &["pve2", "pve1"])).await;
    assert_refused(refused, Code::Unavailable, &["`pve1`", "WaitForFirstConsumer"]);
    restarted.create(in_order("pvc-3", &["pve2"])).await.expect("a volume");
    assert_eq!(count(&bench.sim, "pvc-3"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_says_itself_that_it_has_no_such_storage_stops_no_volume() {
    let here = Sim::in_memory(World::builtin()).expect("a world");
    let mut world = World::builtin();
    world.storages.iter_mut().filter(|one| one.id == "local").for_each(|one| one.is_mountpoint = true);
    let there = Sim::in_memory(world).expect("a world");
    let unmount = |on| Fault::Unmount { storage: "local".to_owned(), on };
    there.inject(unmount(true)).expect("a storage");
    let regions = [("east", &here), ("west", &there)];
    let request = |name: &str, first: &str, second: &str| {
        let mut request = new_volume(name, "local");
        request.accessibility_requirements = Some(places(&[at(first, "pve1"), at(second, "pve1")]));
        request
    };
    let bench = Bench::across(&regions, &token(CSI));
    // What the cluster tells of it is minutes old, so that it was there a moment ago.
    let refused = bench.create(request("pvc-1", "east", "west")).await;
    assert_refused(refused, Code::Unavailable, &["`pvc-1`", "`local`", "`pve1`"]);
    tokio::time::sleep(Duration::from_mins(6)).await;
    bench.create(request("pvc-1", "east", "west")).await.expect("a volume");
    there.inject(unmount(false)).expect("a storage");
    tokio::time::sleep(A_WHILE).await;
    let volume = bench.create(request("pvc-2", "west", "east")).await.expect("a volume");
    assert!(volume.volume_id.starts_with("west/pve1/"), "{volume:?}");
    // What was there once is not taken for gone.
    there.inject(unmount(true)).expect("a storage");
    for later in [A_WHILE, Duration::from_mins(6)] {
        tokio::time::sleep(later).await;
        let refused = bench.create(request("pvc-2", "east", "west")).await;
        assert_refused(refused, Code::Unavailable, &["`pvc-2`", "`local`", "`pve1`"]);
    }
    assert_eq!((count(&here, "pvc-2"), count(&there, "pvc-2")), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_name_that_exists_where_it_may_not_be_is_refused_and_made_nowhere_else() {
    let bench = Bench::new();
    let first = bench.create(in_order("pvc-1", &["pve1"])).await.expect("a volume");
    tokio::time::sleep(A_WHILE).await;
    let elsewhere = bench.create(in_order("pvc-1", &["pve2"])).await;
    assert_refused(elsewhere, Code::AlreadyExists, &[&first.volume_id, "pvc-1"]);
    let on_another = bench.create(new_volume("pvc-1", "shared")).await;
    assert_refused(on_another, Code::AlreadyExists, &[&first.volume_id, "pvc-1"]);
    assert_eq!(count(&bench.sim, "pvc-1"), 1);
    // A name that another one begins with is another name.
    bench.create(in_order("pvc", &["pve2"])).await.expect("a volume");
    bench.create(in_order("pvc-10", &["pve2"])).await.expect("a volume");
    // A node that is away is not taken for empty.
    bench.fault(json!({"fault": "kill_node", "node": "pve1"}));
    tokio::time::sleep(A_WHILE).await;
    let elsewhere = bench.create(in_order("pvc-1", &["pve2"])).await;
    assert_refused(elsewhere, Code::Unavailable, &["`pvc-1`", "`local`", "`pve1`"]);
    bench.fault(json!({"fault": "kill_node", "node": "pve1", "on": false}));
    tokio::time::sleep(A_WHILE).await;
    // Somebody deleted it: what was listed is asked before it stands in the way.
    bench.admin("DELETE", "/nodes/pve1/storage/local/content/local:9999/vm-9999-pvc-1.raw", "").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let made = bench.create(in_order("pvc-1", &["pve2"])).await.expect("a volume");
    assert_eq!(segments(&made), [at(REGION, "pve2").segments]);
    assert_eq!(count(&bench.sim, "vm-9999-pvc-1.raw"), 1);
}

#[tokio::test(start_paused = true)]
async fn p5_an_allocation_in_doubt_is_tried_on_no_other_storage() {
    let bench = Bench::new();
    let path = "nodes/pve1/storage/local/content";
    bench.fault(json!({"fault": "lose_answer", "method": "POST", "path": path}));
    bench.create(in_order("pvc-1", &["pve1"])).await.expect_err("in doubt");
    let refused = bench.create(new_volume("pvc-1", "shared")).await;
    assert_refused(refused, Code::Unavailable, &["`pvc-1`", "`local`", "`pve1`"]);
    assert_eq!(count(&bench.sim, "pvc-1"), 1);
}

#[tokio::test(start_paused = true)]
async fn p2_a_listing_that_leaves_out_what_the_token_may_not_use_proves_no_name_new() {
    let bench = Bench::new();
    let in_order = |name: &str, zones: [&str; 2]| {
        let mut request = new_volume(name, "local");
        request.accessibility_requirements = Some(places(&zones.map(|zone| at(REGION, zone))));
        request
    };
    let first = bench.create(in_order("pvc-1", ["pve1", "pve2"])).await.expect("a volume");
    // Without Datastore.Allocate, and VM.Config.Disk for the owner, a listing is empty, and an allocation goes well.
    let narrow = "roleid=CSI&privs=VM.Audit,Datastore.Audit,Datastore.AllocateSpace";
    bench.admin("PUT", "/access/roles/CSI", narrow).await;
    let restarted = bench.restarted();
    let other = restarted.create(in_order("pvc-2", ["pve1", "pve2"])).await;
    tokio::time::sleep(std::time::Duration::from_mins(1)).await;
    let again = restarted.create(in_order("pvc-1", ["pve2", "pve1"])).await;
    assert_eq!(count(&bench.sim, "pvc-1"), 1, "{other:?}, {again:?}");
    again.expect_err("it can not be told");
    bench.admin("PUT", "/access/roles/CSI", &format!("{narrow},VM.Config.Disk,Datastore.Allocate")).await;
    tokio::time::sleep(std::time::Duration::from_mins(1)).await;
    assert_eq!(restarted.create(in_order("pvc-1", ["pve2", "pve1"])).await.expect("it is found"), first);
}

#[tokio::test(start_paused = true)]
async fn p5_nothing_is_final_while_an_allocation_is_in_doubt() {
    let bench = Bench::new();
    bench.fault(json!({"fault": "lose_answer", "method": "POST", "path": "/content"}));
    let lost = bench.create(new_volume("pvc-1", "shared")).await;
    assert_refused(lost, Code::Unavailable, &["pvc-1"]);
    // A provisioner that hears INVALID_ARGUMENT now forgets the claim, and the disk stays.
    let narrow = "roleid=CSI&privs=VM.Audit,VM.Config.Disk,Datastore.Allocate,Datastore.AllocateSpace";
    bench.admin("PUT", "/access/roles/CSI", narrow).await;
    tokio::time::sleep(std::time::Duration::from_mins(1)).await;
    let blind = bench.create(new_volume("pvc-1", "shared")).await;
    assert_refused(
        blind,
        Code::Unavailable,
        &["may have been allocated on node", "Datastore.Audit on /storage/shared"],
    );
    assert_refused(
        bench.create(new_volume("pvc-2", "shared")).await,
        Code::InvalidArgument,
        &["Datastore.Audit"],
    );
    bench.admin("PUT", "/access/roles/CSI", &format!("{narrow},Datastore.Audit")).await;
    tokio::time::sleep(std::time::Duration::from_mins(1)).await;
    bench.create(new_volume("pvc-1", "shared")).await.expect("it is found");
    assert_eq!(count(&bench.sim, "pvc-1"), 1);
}

#[tokio::test(start_paused = true)]
async fn p5_a_name_is_looked_for_in_every_region() {
    let here = Sim::in_memory(World::builtin()).expect("a world");
    let there = Sim::in_memory(World::builtin()).expect("a world");
    let regions = [("east", &here), ("west", &there)];
    let in_order = |first, second| {
        let mut request = new_volume("pvc-1", "local");
        request.accessibility_requirements = Some(places(&[at(first, "pve1"), at(second, "pve1")]));
        request
    };
    let bench = Bench::across(&regions, &token(CSI));
    let first = bench.create(in_order("east", "west")).await.expect("a volume");
    let restarted = Bench::across(&regions, &token(CSI));
    assert_eq!(restarted.create(in_order("west", "east")).await.expect("a volume"), first);
    assert_eq!((count(&here, "pvc-1"), count(&there, "pvc-1")), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn once_the_storages_were_listed_a_volume_is_allocated_without_being_looked_for() {
    let bench = Bench::new();
    let anywhere = |name: &str| {
        let mut request = new_volume(name, "local");
        request.accessibility_requirements = Some(places(&[at(REGION, "pve1"), at(REGION, "pve2")]));
        request
    };
    bench.create(anywhere("pvc-1")).await.expect("a volume");
    // The first one had the storages listed in the background.
    tokio::time::sleep(Duration::from_secs(30)).await;
    bench.sim.clear_log();
    for name in ["pvc-2", "pvc-3"] {
        bench.create(anywhere(name)).await.expect("a volume");
    }
    let asked = bench.sim.log().into_iter().filter(|e| e.path.contains("/content")).map(|e| e.method);
    assert_eq!(asked.collect::<Vec<_>>(), ["POST", "POST"]);
    // A repeated one is found all the same, and one that somebody deleted is made again.
    let again = bench.create(anywhere("pvc-2")).await.expect("found");
    bench.admin("DELETE", "/nodes/pve1/storage/local/content/local:9999/vm-9999-pvc-2.raw", "").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(bench.create(anywhere("pvc-2")).await.expect("made again"), again);
    assert_eq!(count(&bench.sim, "pvc-2"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_volume_lives_and_dies_on_every_type_of_storage() {
    let bench = Bench::with(of_all_types(), CSI);
    // As long as a name of CSI may be, which no LVM takes.
    let long = format!("pvc-{}", "x".repeat(124));
    for (storage, zone, ending) in [
        ("local", "pve1", ".raw"),
        ("shared", "", ".raw"),
        ("a-nfs", "", ".raw"),
        ("a-cifs", "", ".raw"),
        ("a-btrfs", "pve1", ".raw"),
        ("a-lvmthin", "pve1", ""),
        ("a-zfspool", "pve1", ""),
        ("a-rbd", "", ""),
    ] {
        for name in ["pvc-1", long.as_str()] {
            let volume = bench.volume(name, storage).await;
            assert_eq!(bench.volume(name, storage).await, volume, "{storage}");
            let id = volume.volume_id;
            let directory = if ending.is_empty() { "" } else { "9999/" };
            let begin = format!("test/{zone}/{storage}/{directory}vm-9999-pvc-");
            assert!(id.starts_with(&begin) && id.ends_with(ending), "{id}");
            let disk = id.rsplit('/').next().expect("a disk").trim_end_matches(ending);
            assert!(disk.len() <= 100, "{disk}");
            bench.attach(&id, "worker-101").await.unwrap_or_else(|status| panic!("{storage}: {status}"));
            bench.expand(&id, 2 * GIB).await.unwrap_or_else(|status| panic!("{storage}: {status}"));
            assert_refused(bench.delete(&id).await, Code::FailedPrecondition, &["VM 101"]);
            bench.detach(&id, "worker-101").await.unwrap_or_else(|status| panic!("{storage}: {status}"));
            for _ in 0..2 {
                bench.delete(&id).await.unwrap_or_else(|status| panic!("{storage}: {status}"));
            }
        }
        assert_eq!(count(&bench.sim, "vm-9999-pvc"), 0, "{storage}");
    }
    assert!(bench.sim.unmodelled().is_empty(), "{:?}", bench.sim.unmodelled());
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_is_on_thick_lvm_already_lives_on_and_is_said_to_be_unwiped() {
    let bench = Bench::with(of_all_types(), CSI);
    let form = "vmid=9999&filename=vm-9999-pvc-1&size=1G";
    bench.admin("POST", "/nodes/pve1/storage/a-lvm/content", form).await;
    let id = "test/pve1/a-lvm/vm-9999-pvc-1";
    assert_refused(bench.create(new_volume("pvc-1", "a-lvm")).await, Code::InvalidArgument, &["a-lvm"]);
    for _ in 0..2 {
        let context = bench.attach(id, "worker-101").await.expect("attached");
        assert!(context.values().any(|value| value == "unwiped"), "{context:?}");
    }
    bench.expand(id, 2 * GIB).await.expect("grown");
    bench.detach(id, "worker-101").await.expect("detached");
    for _ in 0..2 {
        bench.delete(id).await.expect("deleted");
    }
    assert_eq!(count(&bench.sim, "vm-9999-pvc"), 0);
}

#[tokio::test(start_paused = true)]
async fn qcow2_images_are_for_file_storages_and_what_a_storage_can_not_do_is_said() {
    let bench = Bench::with(of_all_types(), CSI);
    let qcow2 = |storage: &str| {
        let mut request = new_volume("pvc-1", storage);
        request.parameters.insert("storageFormat".into(), "qcow2".into());
        request
    };
    for storage in ["local", "shared", "a-nfs", "a-cifs"] {
        let id = bench.create(qcow2(storage)).await.expect("a volume").volume_id;
        assert!(id.ends_with("/9999/vm-9999-pvc-1.qcow2"), "{id}");
        bench.attach(&id, "worker-101").await.expect("attached");
        bench.detach(&id, "worker-101").await.expect("detached");
        bench.delete(&id).await.expect("deleted");
    }
    for (storage, why) in [
        ("a-btrfs", "raw images only"),
        ("a-lvmthin", "qcow2 images need a file storage"),
        ("a-zfspool", "qcow2 images need a file storage"),
        ("a-rbd", "qcow2 images need a file storage"),
        ("a-lvm", "blocks that still hold what was there before"),
    ] {
        assert_refused(bench.create(qcow2(storage)).await, Code::InvalidArgument, &[storage, why]);
    }
    assert_eq!(count(&bench.sim, "vm-9999-pvc"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_exists_in_the_other_format_is_refused() {
    let bench = Bench::new();
    bench.volume("pvc-1", "shared").await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    let mut other = new_volume("pvc-1", "shared");
    other.parameters.insert("storageFormat".into(), "qcow2".into());
    assert_refused(bench.create(other).await, Code::AlreadyExists, &["vm-9999-pvc-1.raw", "format"]);
    assert_eq!(count(&bench.sim, "pvc-1"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_region_out_of_reach_stops_no_volume_in_another_once_it_was_listed() {
    let here = Sim::in_memory(World::builtin()).expect("a world");
    let there = Sim::in_memory(World::builtin()).expect("a world");
    let bench = Bench::across(&[("east", &here), ("west", &there)], &token(CSI));
    let request = |name: &str| {
        let mut request = new_volume(name, "local");
        request.accessibility_requirements = Some(places(&[at("east", "pve1"), at("west", "pve1")]));
        request
    };
    let cut = json!({"fault": "lose_request", "method": "GET", "path": "/cluster/resources", "times": 50});
    let cut: proxmox_csi::sim::faults::Fault = serde_json::from_value(cut).expect("a fault");
    there.inject(cut.clone()).expect("a fault");
    assert_refused(bench.create(request("pvc-1")).await, Code::Unavailable, &["pvc-1"]);
    assert_eq!(count(&here, "pvc-1"), 0, "it may be in the region that can't be looked at");
    there.clear_faults();
    bench.create(request("pvc-1")).await.expect("a volume");
    tokio::time::sleep(Duration::from_secs(30)).await;
    there.inject(cut).expect("a fault");
    let volume = bench.create(request("pvc-2")).await.expect("a volume");
    assert_eq!((volume.capacity_bytes, count(&here, "pvc-2")), (GIB, 1));
}

#[tokio::test(start_paused = true)]
async fn each_region_serves_its_own_nodes_and_no_volume_goes_across() {
    let here = Sim::in_memory(World::builtin()).expect("a world");
    let there = Sim::in_memory(World::builtin()).expect("a world");
    let bench = Bench::across(&[("east", &here), ("west", &there)], &token(CSI));
    // Both have a VM 101, with the same uuid even.
    let uses = |sim: &Sim, name: &str| {
        let vm = sim.vm(101).expect("a vm");
        vm.open_volumes().filter(|volume| volume.name.contains(name)).count()
    };
    let confs = || [&here, &there].map(|sim| sim.vm(101).expect("a vm").conf);
    for storage in ["local", "shared"] {
        for (region, node, elsewhere) in
            [("east", "worker-101", "west-101"), ("west", "west-101", "worker-101")]
        {
            let (own, other) = if region == "east" { (&here, &there) } else { (&there, &here) };
            let name = format!("pvc-{region}-{storage}");
            let mut request = new_volume(&name, storage);
            request.accessibility_requirements = Some(places(&[at(region, "pve1")]));
            let id = bench.create(request).await.expect("a volume").volume_id;
            assert!(id.starts_with(region), "{id}");
            let before = confs();
            let refused = bench.attach(&id, elsewhere).await;
            assert_refused(refused, Code::FailedPrecondition, &["`east`", "`west`", elsewhere]);
            assert_eq!(confs(), before);
            bench.attach(&id, node).await.expect("attached");
            assert_eq!((uses(own, &name), uses(other, &name)), (1, 0), "{id}");
            bench.detach(&id, elsewhere).await.expect("it never was there");
            bench.expand(&id, 2 * GIB).await.expect("grown");
            bench.modify(&id, &[("diskIOPS", "100")]).await.expect("changed");
            assert_refused(bench.delete(&id).await, Code::FailedPrecondition, &["VM 101"]);
            assert_eq!(uses(own, &name), 1, "{id}");
            bench.detach(&id, node).await.expect("detached");
            assert_eq!(uses(own, &name), 0, "{id}");
            bench.delete(&id).await.expect("deleted");
            assert_eq!((count(own, &name), count(other, &name)), (0, 0), "{id}");
        }
    }
}
