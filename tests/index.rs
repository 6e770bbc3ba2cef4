//! What the controller remembers of VMs, and when it does not go by it. Acts through the RPCs.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use proxmox_csi::{
    pve::{
        Client,
        transport::{HttpRequest, TransportError, boxed},
    },
    sim::{Sim, World},
    telemetry::metrics::Metrics,
    volume::Volumes,
};
use serde_json::json;
use support::{Bench, GIB, assert_refused, new_volume, volid};
use tonic::Code;
use tower::ServiceExt as _;

/// A controller that has attached and detached a volume on VM 101 and 102 just now: it has swept, and knows both.
async fn warm() -> (Bench, String) {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await.volume_id;
    for node in ["worker-102", "worker-101"] {
        bench.attach(&volume, node).await.expect("attached");
        bench.detach(&volume, node).await.expect("detached");
    }
    (bench, volume)
}

fn requests(bench: &Bench, method: &str, part: &str) -> usize {
    bench.sim.log().iter().filter(|entry| entry.method == method && entry.path.contains(part)).count()
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_moved_since_the_last_poll_is_found_where_it_is() {
    let (bench, _) = warm().await;
    let volume = bench.volume("pvc-2", "shared").await.volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    bench.admin("POST", "/nodes/pve1/qemu/101/migrate", "target=pve2&online=1").await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert!(bench.sim.vm(101).is_some_and(|vm| vm.node == "pve2"), "the migration has ended");
    bench.detach(&volume, "worker-101").await.expect("detached where it is now");
    assert_eq!(bench.slots(101, &volume), support::Slots::default());
    bench.attach(&volume, "worker-101").await.expect("attached where it is now");
    assert_eq!(bench.slots(101, &volume).qemu, 1);
}

#[tokio::test(start_paused = true)]
async fn what_an_administrator_changed_meanwhile_is_kept() {
    let (bench, volume) = warm().await;
    bench.admin("POST", "/nodes/pve1/qemu/101/config", "scsi1=local:1&description=mine").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    bench.attach(&volume, "worker-101").await.expect("attached");
    let vm = bench.sim.vm(101).expect("the vm");
    assert!(vm.conf.current["scsi1"].contains("vm-101-disk"), "{:?}", vm.conf.current.get("scsi1"));
    assert_eq!(bench.slots(101, &volume).current, ["scsi2"]);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_is_remembered_is_asked_before_it_stands_in_the_way() {
    let (bench, volume) = warm().await;
    bench.attach(&volume, "worker-102").await.expect("attached");
    bench.admin("POST", "/nodes/pve1/qemu/102/config", "delete=scsi1").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    bench.attach(&volume, "worker-101").await.expect("attached, for VM 102 has it no more");
}

#[tokio::test(start_paused = true)]
async fn p1_a_vm_that_came_since_the_last_sweep_is_looked_at() {
    let (bench, volume) = warm().await;
    let form = format!("vmid=150&name=new&scsihw=virtio-scsi-single&scsi3={}", volid(&volume));
    bench.admin("POST", "/nodes/pve1/qemu", &form).await;
    // As soon as the region's poll shows it.
    tokio::time::sleep(Duration::from_secs(26)).await;
    assert_refused(bench.attach(&volume, "worker-101").await, Code::FailedPrecondition, &["VM 150", "scsi3"]);
}

#[tokio::test(start_paused = true)]
async fn p1_a_volume_that_was_plugged_in_by_hand_is_seen_when_the_sweep_is_a_minute_old() {
    for storage in ["local", "shared"] {
        let (bench, _) = warm().await;
        let volume = bench.volume("pvc-2", storage).await.volume_id;
        bench.admin("POST", "/nodes/pve1/qemu/102/config", &format!("scsi3={}", volid(&volume))).await;
        // Of a shared volume nothing is concluded from an earlier sweep at all.
        let wait = if storage == "local" { 61 } else { 1 };
        tokio::time::sleep(Duration::from_secs(wait)).await;
        assert_refused(
            bench.attach(&volume, "worker-101").await,
            Code::FailedPrecondition,
            &["VM 102", "scsi3"],
        );
    }
}

#[tokio::test(start_paused = true)]
async fn p1_after_an_unknown_outcome_no_earlier_sweep_counts() {
    for fault in ["lose_answer", "lose_request"] {
        let (bench, volume) = warm().await;
        bench.fault(json!({"fault": "delay_task", "worker": "qmconfig", "ms": 20_000}));
        bench.fault(json!({"fault": fault, "method": "POST", "path": "102/config"}));
        assert_refused(bench.attach(&volume, "worker-102").await, Code::Unavailable, &[]);
        let second = bench.attach(&volume, "worker-101").await;
        if fault == "lose_answer" {
            assert_refused(second, Code::FailedPrecondition, &["VM 102", "scsi1"]);
        } else {
            second.expect("attached: nothing reached Proxmox");
        }
        assert!(bench.slots(101, &volume).qemu + bench.slots(102, &volume).qemu <= 1, "{fault}");
    }
}

#[tokio::test(start_paused = true)]
async fn p1_what_a_failed_plug_left_pending_counts_for_the_next_attach_elsewhere() {
    let (bench, volume) = warm().await;
    // The plug fails, and so does the look at what it left: it waits for the next start of VM 102.
    bench.fault(json!({"fault": "hang_qemu", "vmid": 102}));
    bench.fault(json!({"fault": "refuse", "method": "GET", "path": "102/pending", "text": "no"}));
    assert_refused(bench.attach(&volume, "worker-102").await, Code::Unavailable, &["still pending"]);
    bench.fault(json!({"fault": "hang_qemu", "vmid": 102, "on": false}));
    assert_eq!(bench.slots(102, &volume).pending, ["scsi1"]);
    assert_refused(bench.attach(&volume, "worker-101").await, Code::FailedPrecondition, &["VM 102", "scsi1"]);
    bench.detach(&volume, "worker-102").await.expect("taken back");
    bench.attach(&volume, "worker-101").await.expect("attached");
}

#[tokio::test(start_paused = true)]
async fn a_drive_that_is_plugged_in_while_its_vm_is_looked_at_is_no_unknown_one() {
    let bench = Bench::new();
    let (one, other) = (bench.volume("pvc-1", "shared").await, bench.volume("pvc-2", "shared").await);
    let (one, other) = (one.volume_id, other.volume_id);
    // A first sweep has read the config of VM 102 and is about to ask its QEMU.
    bench.fault(json!({"fault": "delay", "method": "GET", "path": "102/status/current", "ms": 5_000}));
    let plug = format!("scsi7={}", support::volid(&other).replace(':', "%3A").replace('/', "%2F"));
    let by_hand = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        bench.admin("PUT", "/nodes/pve1/qemu/102/config", &plug).await;
    };
    let (attached, ()) = tokio::join!(bench.attach(&one, "worker-101"), by_hand);
    attached.expect("what QEMU has is in the config");
    assert_refused(bench.attach(&other, "worker-101").await, Code::FailedPrecondition, &["VM 102", "scsi7"]);
}

#[tokio::test(start_paused = true)]
async fn p2_what_a_failed_plug_left_pending_is_taken_back() {
    let (bench, volume) = warm().await;
    let before = bench.sim.vm(102).expect("a vm").conf;
    bench.fault(json!({"fault": "hang_qemu", "vmid": 102}));
    let refused = bench.attach(&volume, "worker-102").await;
    assert_refused(refused, Code::Unavailable, &["query-pci", "(the pending change was taken back)"]);
    assert_eq!(bench.slots(102, &volume), support::Slots::default());
    assert_eq!(bench.sim.vm(102).expect("a vm").conf, before);
    // It was in the way of nobody.
    bench.attach(&volume, "worker-101").await.expect("attached");
}

#[tokio::test(start_paused = true)]
async fn the_background_polls_and_sweeps_and_operations_ask_for_nothing_of_it() {
    let bench = Bench::new();
    let volumes = bench.volumes.clone();
    let background = tokio::spawn(async move { volumes.keep_current(|| true).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let volume = bench.volume("pvc-1", "local").await.volume_id;
    // The first touch of the VM awaits its tasks.
    bench.attach(&volume, "worker-101").await.expect("attached");
    bench.detach(&volume, "worker-101").await.expect("detached");
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_secs(17)).await;
        bench.sim.clear_log();
        bench.attach(&volume, "worker-101").await.expect("attached");
        assert_eq!(requests(&bench, "GET", "/cluster/resources"), 0);
        assert_eq!(requests(&bench, "GET", "/qemu/102/"), 0, "{:?}", bench.sim.log());
        bench.detach(&volume, "worker-101").await.expect("detached");
    }
    background.abort();
}

#[tokio::test(start_paused = true)]
async fn the_background_rests_while_nobody_asks_and_stops_with_the_lease() {
    let bench = Bench::new();
    let acts = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let (volumes, asked) = (bench.volumes.clone(), std::sync::Arc::clone(&acts));
    let may_act = move || asked.load(std::sync::atomic::Ordering::Relaxed);
    let background = tokio::spawn(async move { volumes.keep_current(may_act).await });
    let volume = bench.create(new_volume("pvc-1", "local")).await.expect("a volume").volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    tokio::time::sleep(Duration::from_mins(11)).await;
    bench.sim.clear_log();
    tokio::time::sleep(Duration::from_mins(10)).await;
    assert_eq!(requests(&bench, "GET", "/pending"), 0, "nobody asks");
    let polls = requests(&bench, "GET", "/cluster/resources");
    assert!((55..=61).contains(&polls), "{polls} polls in ten minutes");
    bench.expand(&volume, 2 * GIB).await.expect("expanded");
    tokio::time::sleep(Duration::from_mins(5)).await;
    assert!(requests(&bench, "GET", "/qemu/102/pending") >= 5, "somebody asked");
    acts.store(false, std::sync::atomic::Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(15)).await;
    bench.sim.clear_log();
    tokio::time::sleep(Duration::from_mins(5)).await;
    assert_eq!(bench.sim.log().len(), 0, "a controller without the lease asks nothing");
    background.abort();
}

#[tokio::test(start_paused = true)]
async fn p1_a_plug_whose_connection_broke_is_awaited_before_the_volume_goes_elsewhere() {
    // The connection breaks, and Proxmox gets the request 15 s later: until then no task shows of it.
    let sim = Sim::in_memory(World::builtin()).expect("a world");
    let broken = Arc::new(AtomicBool::new(false));
    let (proxmox, breaks) = (support::in_process(&sim), Arc::clone(&broken));
    let transport = boxed(tower::service_fn(move |request: HttpRequest| {
        let (proxmox, breaks) = (proxmox.clone(), Arc::clone(&breaks));
        async move {
            let plug = request.method() == "POST" && request.uri().path().ends_with("/102/config");
            if !plug || breaks.swap(true, Ordering::Relaxed) {
                return proxmox.oneshot(request).await;
            }
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(15)).await;
                proxmox.oneshot(request).await.expect("it arrives");
            });
            Err(TransportError::MaybeSent("connection reset".to_owned()))
        }
    }));
    let region = support::REGION.parse().expect("a region");
    let client = Client::new(region, transport, &support::token(support::CSI), Metrics::default());
    let volumes = vec![client.expect("a token")];
    let bench = Bench::of(sim.clone(), Volumes::new(volumes, support::nodes_of(&sim), support::settings()));
    for storage in ["shared", "local"] {
        broken.store(false, Ordering::Relaxed);
        let volume = bench.volume("pvc-1", storage).await.volume_id;
        assert_refused(bench.attach(&volume, "worker-102").await, Code::Unavailable, &["connection reset"]);
        let elsewhere = bench.attach(&volume, "worker-101").await;
        assert_refused(elsewhere, Code::FailedPrecondition, &["VM 102", "scsi1"]);
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!((bench.slots(101, &volume).qemu, bench.slots(102, &volume).qemu), (0, 1));
        bench.detach(&volume, "worker-102").await.expect("detached");
        bench.delete(&volume).await.expect("deleted");
    }
    // Nor is it detached while the plug is on its way.
    broken.store(false, Ordering::Relaxed);
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    assert_refused(bench.attach(&volume, "worker-102").await, Code::Unavailable, &["connection reset"]);
    bench.detach(&volume, "worker-102").await.expect("detached");
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(bench.slots(102, &volume), support::Slots::default());
}
