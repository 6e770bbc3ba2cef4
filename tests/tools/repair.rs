//! `doctor --repair`: what it does, what it leaves alone, and that it looks again.

use proxmox_csi::{
    doctor::{
        book::Book,
        repair::{self, Done},
        view::{self, Depth, Progress, Settings, Source},
    },
    k8s::inventory,
    pve::{Client, client::Token},
    sim::World,
    telemetry::metrics::Metrics,
    types::VmId,
    volume::Volumes,
};
use serde_json::json;

use crate::{
    findings::assert_findings,
    rig::{self, LEASES, Rig},
    support::{HOLDER, REGION, in_process, nodes_of, volid},
};

const REPAIR: &[&str] = &["doctor", "--repair", "--yes", "-o", "json"];

/// A volume in a slot of worker-101 that no VolumeAttachment accounts for.
async fn dangling(rig: &Rig) -> String {
    let volume = rig.volume("pvc-1", "shared").await;
    rig.bench.attach(&volume, "worker-101").await.expect("attached");
    volume
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dangling_slot_is_emptied_and_the_lease_given_back() {
    let rig = Rig::start().await;
    let volume = dangling(&rig).await;
    let said = rig.tool(&["doctor", "--repair", "--yes"]).await;
    insta::assert_snapshot!("repaired", said.shown());
    assert_eq!(rig.bench.slots(101, &volume), crate::support::Slots::default());
    let lease = rig.server.get(LEASES, "proxmox-csi-controller").expect("a lease");
    assert_eq!(lease["spec"]["holderIdentity"], json!(""));
    assert_findings(&rig.doctor(&[]).await, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_that_was_not_agreed_to() {
    let rig = Rig::start().await;
    let volume = dangling(&rig).await;
    // Without the flag it is a plan; without a terminal nobody can be asked.
    let plan = rig.doctor(&[]).await;
    assert!(
        plan.out.contains("detach `test//shared/900000000/vm-900000000-pvc-1.raw` from VM 101"),
        "{}",
        plan.out
    );
    let said = rig.tool(&["doctor", "--repair"]).await;
    assert_eq!(said.code, 1);
    assert!(said.err.contains("add --yes"), "{}", said.err);
    assert_eq!(rig.bench.slots(101, &volume).qemu, 1);
    assert!(rig.server.names(LEASES).is_empty(), "not even the lease was taken");
    let said = rig.tool_without_cluster(REPAIR).await;
    assert_eq!(said.code, 3, "{}", said.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_at_a_terminal_is_asked_and_only_a_yes_is_one() {
    let rig = Rig::start().await;
    let volume = dangling(&rig).await;
    for typed in ["n\n", "\n", "yess\n"] {
        let said = rig.tool_on_terminal("doctor --repair", typed).await;
        assert!(said.out.contains("Do this repair? [y/N]"), "{}", said.out);
        assert_eq!(said.code, 1, "{}", said.out);
        assert_eq!(rig.bench.slots(101, &volume).qemu, 1, "{typed:?}");
    }
    assert!(rig.server.names(LEASES).is_empty(), "not even the lease was taken");
    let said = rig.tool_on_terminal("doctor --repair", "y\n").await;
    assert!(said.out.contains("Do this repair? [y/N]"), "{}", said.out);
    assert_eq!(rig.bench.slots(101, &volume), crate::support::Slots::default(), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_nothing_is_repaired_while_a_controller_holds_the_lease() {
    let rig = Rig::start().await;
    let volume = dangling(&rig).await;
    rig.server.put(
        LEASES,
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": "proxmox-csi-controller", "namespace": "proxmox"},
            "spec": {"holderIdentity": "controller-0", "leaseDurationSeconds": 600}}),
    );
    let said = rig.tool(REPAIR).await;
    assert_eq!(said.code, 1);
    assert!(said.err.contains("another process holds the Lease `proxmox-csi-controller`"), "{}", said.err);
    assert_eq!(rig.bench.slots(101, &volume).qemu, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_what_may_be_in_use_is_not_repaired() {
    let handle = "test//shared/900000000/vm-900000000-pvc-1.raw";
    let mounted = json!([format!("kubernetes.io/csi/{}^{handle}", rig::DRIVER)]);
    for (why, change) in [
        ("says that it is in use", json!({"volumesInUse": mounted})),
        (
            "is silent, so that it may still be mounted",
            json!({"conditions": [{"type": "Ready", "status": "Unknown"}]}),
        ),
    ] {
        let rig = Rig::start().await;
        let volume = dangling(&rig).await;
        rig.server.edit(rig::NODES, "worker-101", |node| {
            for (key, value) in change.as_object().expect("keys") {
                node["status"][key] = value.clone();
            }
        });
        let said = rig.tool(REPAIR).await;
        assert_findings(&said, &[&format!("warning slot-dangling {handle}")]);
        assert!(said.out.contains(why), "{why}\n{}", said.out);
        assert_eq!(rig.bench.slots(101, &volume).qemu, 1, "{why}");
    }
    // A VM that does not run has nothing mounted, whatever its kubelet said last.
    let rig = Rig::start().await;
    let volume = dangling(&rig).await;
    rig.server
        .edit(rig::NODES, "worker-101", |node| node["status"]["conditions"][0]["status"] = json!("Unknown"));
    rig.bench.sim.stop_vm(101).await;
    assert_findings(&rig.tool(REPAIR).await, &[]);
    assert!(rig.bench.slots(101, &volume).current.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_left_over_short_lived_vm_goes_and_its_volume_stays() {
    let rig = Rig::start().await;
    let volume = rig.volume("pvc-1", "shared").await;
    rig.bench.admin("POST", "/nodes/pve1/qemu", "vmid=999990000&name=csi-holder").await;
    rig.until_vm(999_990_000).await;
    rig.bench.admin("POST", "/nodes/pve1/qemu/999990000/config", &format!("scsi0={}", volid(&volume))).await;
    rig.until_slot(999_990_000, "scsi0").await;
    rig.bench.admin("POST", "/nodes/pve1/qemu", "vmid=999990001&name=mine").await;
    rig.until_vm(999_990_001).await;
    let said = rig.tool(REPAIR).await;
    assert_findings(&said, &["warning holder-range holderVmIDs"]);
    assert!(said.out.contains("\"outcome\": \"repaired\""), "{}", said.out);
    assert!(rig.bench.sim.vm(999_990_000).is_none());
    assert!(rig.bench.sim.vm(999_990_001).is_some(), "a VM of others stays");
    assert!(rig.bench.sim.volumes().iter().any(|one| volume.ends_with(&one.key.name)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repair_that_fails_is_told_and_the_rest_is_done() {
    let rig = Rig::start().await;
    let stuck = dangling(&rig).await;
    let free = rig.volume("pvc-2", "shared").await;
    rig.bench.attach(&free, "worker-102").await.expect("attached");
    rig.bench.fault(json!({"fault": "hang_unplug", "vmid": 101}));
    let said = rig.tool(REPAIR).await;
    assert_eq!(said.code, 1);
    assert!(said.out.contains("still busy in guest?"), "{}", said.out);
    assert_eq!(rig.bench.slots(101, &stuck).current, ["scsi1"]);
    assert!(rig.bench.slots(102, &free).current.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_a_repair_is_looked_at_again_before_it_is_done() {
    let rig = Rig::start().await;
    let volume = dangling(&rig).await;
    let token = World::builtin().token(HOLDER).expect("a token").clone();
    let token = Token { id: token.id, secret: token.secret };
    let client = || {
        let region = REGION.parse().expect("a region");
        Client::new(region, in_process(&rig.bench.sim), &token, Metrics::default()).expect("a legal token")
    };
    let owner = VmId::new(900_000_000).expect("a VMID");
    let settings = Settings { driver: rig::DRIVER.to_owned(), owner, holders: 999_990_000..=999_999_999 };
    let sources = [Source { client: client(), servers: Vec::new(), who: token.id.clone() }];
    let look = async || {
        let inventory = inventory::read(&rig.server.client(), rig::DRIVER, None).await;
        let nodes = nodes_of(&rig.bench.sim).nodes().await.expect("nodes");
        let depth = Depth { servers: false, listings: false };
        let view =
            view::look(settings.clone(), &sources, Some(inventory), nodes, depth, &Progress::silent()).await;
        let book = Book::of(&view);
        (view, book)
    };
    let (seen, book) = look().await;
    let plan = repair::plan(&seen, &book);
    assert_eq!(plan.len(), 1, "{plan:?}");

    // A pod came to want it after the plan was made.
    rig.put_pod("web", "worker-101", "pvc-1");
    let settings = proxmox_csi::volume::Settings { owner, holders: 999_990_000..=999_999_999 };
    let volumes = Volumes::new(vec![client()], nodes_of(&rig.bench.sim), settings);
    let mut done = Vec::new();
    let look = || -> futures_util::future::BoxFuture<'_, _> { Box::pin(look()) };
    repair::carry_out(&plan, &volumes, look, |_, one| done.push(one.clone())).await;
    assert_eq!(done, [Done::Skipped]);
    assert_eq!(rig.bench.slots(101, &volume).qemu, 1);
}
