//! What administrators hear of the driver: Events about claims, volumes and nodes.

use std::{sync::Arc, time::Duration};

use proxmox_csi::{
    k8s::{cluster::KubeCluster, events::Recorder, notices::Notices},
    pve::{Client, client::Token},
    sim::{Sim, World},
    telemetry::metrics::Metrics,
    types::cluster::Cluster,
    volume::Volumes,
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tonic::Code;

use crate::{
    apiserver::ApiServer,
    rig::{NODES, new_node},
    support::{Bench, CSI, GIB, REGION, in_process, new_volume, settings},
};

const DRIVER: &str = "csi.proxmox.sinextra.dev";
const VOLUMES: &str = "/api/v1/persistentvolumes";
const CLAIMS: &str = "/api/v1/namespaces/apps/persistentvolumeclaims";

/// A controller between a simulated Proxmox and a fake API server.
struct Rig {
    bench: Bench,
    server: ApiServer,
    metrics: Metrics,
}

impl Rig {
    fn new() -> Self {
        Self::of(World::builtin())
    }

    fn of(world: World) -> Self {
        let secret = world.token(CSI).expect("the token").secret.clone();
        let sim = Sim::in_memory(world).expect("the world can be made");
        let (server, metrics) = (ApiServer::default(), Metrics::default());
        for vmid in sim.vmids() {
            let uuid = sim.vm(vmid).and_then(|vm| vm.conf.uuid().map(str::to_owned)).expect("a uuid");
            server.put(NODES, new_node(&format!("worker-{vmid}"), &uuid));
        }
        let region: proxmox_csi::types::Region = REGION.parse().expect("a region");
        let token = Token { id: CSI.to_owned(), secret };
        let client = Client::new(region.clone(), in_process(&sim), &token, metrics.clone()).expect("a token");
        let recorder = Recorder::new(server.client(), DRIVER, "test");
        let notices = Notices::start(server.client(), recorder, metrics.csi().clone());
        let cluster: Arc<dyn Cluster> =
            Arc::new(KubeCluster::new(server.client(), Some(region)).with_notices(notices));
        let bench = Bench::of(sim, Volumes::new(vec![client], cluster, settings()));
        Self { bench, server, metrics }
    }

    /// A volume, its PV and its claim.
    async fn volume(&self, name: &str) -> String {
        let handle = self.bench.volume(name, "shared").await.volume_id;
        self.bind(name, &handle);
        handle
    }

    /// The PV and the claim of a volume.
    fn bind(&self, name: &str, handle: &str) {
        let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {"name": format!("claim-{name}"), "namespace": "apps", "uid": format!("uid-{name}")}});
        self.server.put(CLAIMS, claim);
        let volume = json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
            "spec": {"csi": {"driver": DRIVER, "volumeHandle": handle},
                "claimRef": {"namespace": "apps", "name": format!("claim-{name}"), "uid": format!("uid-{name}")}},
            "status": {"phase": "Bound"}});
        self.server.put(VOLUMES, volume);
    }

    /// What was said since the last time, as `kind/name reason`, with the notes.
    async fn said(&self) -> Vec<(String, String)> {
        // Nobody waits for an Event; here the queue is given the time to empty.
        sleep(Duration::from_secs(1)).await;
        let events = self.server.events().into_iter();
        events
            .map(|[namespace, kind, name, reason, note]| {
                assert_eq!(namespace, if kind == "PersistentVolumeClaim" { "apps" } else { "default" });
                (format!("{kind}/{name} {reason}"), note)
            })
            .collect()
    }

    #[track_caller]
    fn expect(said: &[(String, String)], what: &str, notes: &[&str]) {
        let found = said.iter().find(|(said, _)| said == what);
        let (_, note) = found.unwrap_or_else(|| panic!("`{what}` was not said: {said:?}"));
        for expected in notes {
            assert!(note.contains(expected), "`{expected}` is not in: {note}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_administrator_must_mend_is_said_where_they_look() {
    let rig = Rig::new();
    let volume = rig.volume("pvc-1").await;
    let set = |vmid: u32, key: &str, value: Option<&str>| rig.bench.sim.set_vm_key(vmid, key, value);

    set(101, "hotplug", Some("network"));
    rig.bench.attach(&volume, "worker-101").await.expect_err("hotplug is off");
    set(101, "hotplug", None);
    set(102, "scsihw", Some("lsi"));
    rig.bench.attach(&volume, "worker-102").await.expect_err("no such controller");
    set(102, "scsihw", Some("virtio-scsi-single"));
    set(101, "lock", Some("backup"));
    rig.bench.attach(&volume, "worker-101").await.expect_err("it is locked");
    set(101, "lock", None);
    let said = rig.said().await;
    Rig::expect(&said, "Node/worker-101 HotplugOff", &["qm set 101 --hotplug"]);
    Rig::expect(&said, "Node/worker-102 ScsiController", &["--scsihw virtio-scsi-single"]);
    Rig::expect(&said, "Node/worker-101 VmLocked", &["backup", "qm unlock 101"]);

    rig.bench.attach(&volume, "worker-101").await.expect("attached");
    rig.bench.attach(&volume, "worker-102").await.expect_err("another VM has it");
    let said = rig.said().await;
    Rig::expect(&said, "PersistentVolumeClaim/claim-pvc-1 VolumeHeld", &["VM 101", "qm set 101 --delete"]);
    assert_eq!(said.len(), 4, "{said:?}");
}

#[tokio::test(start_paused = true)]
async fn a_full_bus_and_a_full_storage_are_said() {
    let rig = Rig::new();
    let volume = rig.volume("pvc-1").await;
    for slot in 1..=30 {
        rig.bench.sim.set_vm_key(103, &format!("scsi{slot}"), Some("none,media=cdrom"));
    }
    let refused = rig.bench.attach(&volume, "worker-103").await;
    assert_eq!(refused.expect_err("no slot is free").code(), Code::ResourceExhausted);
    let said = rig.said().await;
    Rig::expect(&said, "Node/worker-103 NoFreeSlot", &["scsi1 to scsi30"]);

    rig.server.put(
        CLAIMS,
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {"name": "big", "namespace": "apps", "uid": "uid-big"}}),
    );
    let mut request = new_volume("pvc-big", "shared");
    request.capacity_range.as_mut().expect("a range").required_bytes = 1_000_000 * GIB;
    let of_claim = [("csi.storage.k8s.io/pvc/name", "big"), ("csi.storage.k8s.io/pvc/namespace", "apps")];
    request.parameters.extend(of_claim.map(|(key, value)| (key.to_owned(), value.to_owned())));
    rig.bench.create(request).await.expect_err("there is no room");
    Rig::expect(&rig.said().await, "PersistentVolumeClaim/big StorageFull", &["shared", "free on node"]);
}

#[tokio::test(start_paused = true)]
async fn a_missing_privilege_is_said_with_the_command_that_gives_it() {
    let rig = Rig::new();
    let volume = rig.volume("pvc-1").await;
    let narrow = "roleid=CSI&privs=VM.Audit,Datastore.Audit,Datastore.AllocateSpace,Datastore.Allocate";
    crate::support::admin(&rig.bench.sim, "PUT", "/access/roles/CSI", narrow).await;
    let refused = rig.bench.attach(&volume, "worker-101").await;
    assert_eq!(refused.expect_err("a privilege lacks").code(), Code::PermissionDenied);
    let remedy = "pveum acl modify /vms --tokens 'csi@pve!csi' --roles CSI";
    Rig::expect(
        &rig.said().await,
        "PersistentVolumeClaim/claim-pvc-1 MissingPrivilege",
        &["VM.Config.Disk", "-privs VM.Config.Disk", remedy],
    );
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_a_snapshot_keeps_is_said_of_the_released_volume() {
    let mut world = World::builtin();
    // A snapshot takes all disks of a VM, and raw files can't be snapshotted.
    let boot = "local:101/vm-101-disk-0.qcow2,size=1G";
    world.vms[0].config.insert("scsi0".into(), boot.into());
    let rig = Rig::of(world);
    let mut request = new_volume("pvc-1", "local");
    request.parameters.insert("storageFormat".into(), "qcow2".into());
    let volume = rig.bench.create(request).await.expect("a volume").volume_id;
    rig.bind("pvc-1", &volume);
    rig.bench.attach(&volume, "worker-101").await.expect("attached");
    crate::support::admin(&rig.bench.sim, "POST", "/nodes/pve1/qemu/101/snapshot", "snapname=before").await;
    sleep(Duration::from_secs(30)).await;
    rig.bench.detach(&volume, "worker-101").await.expect("detached");
    rig.server.edit(VOLUMES, "pvc-1", |volume| volume["status"]["phase"] = json!("Released"));
    rig.bench.delete(&volume).await.expect_err("a rollback would need it");
    Rig::expect(
        &rig.said().await,
        "PersistentVolume/pvc-1 VolumeInSnapshot",
        &["snapshot `before`", "qm delsnapshot 101 before"],
    );
}

#[tokio::test(start_paused = true)]
async fn a_change_that_stays_pending_is_said() {
    let rig = Rig::new();
    let volume = rig.volume("pvc-1").await;
    rig.bench.attach(&volume, "worker-101").await.expect("attached");
    // Another volume that waits for the slot: taking ours out would drop it.
    let other = rig.volume("pvc-2").await;
    let slot = rig.bench.slots(101, &volume).current[0].clone();
    rig.bench.sim.set_vm_key(101, "hotplug", Some("network"));
    let form = format!("{slot}={}", crate::support::volid(&other).replace(':', "%3A").replace('/', "%2F"));
    crate::support::admin(&rig.bench.sim, "PUT", "/nodes/pve1/qemu/101/config", &form).await;
    rig.bench.sim.set_vm_key(101, "hotplug", None);
    rig.bench.detach(&volume, "worker-101").await.expect_err("another volume waits for the slot");
    Rig::expect(&rig.said().await, "Node/worker-101 PendingChange", &[&slot, "--revert"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_retried_is_said_once_and_what_passes_by_itself_never() {
    let rig = Rig::new();
    let volume = rig.volume("pvc-1").await;
    rig.bench.sim.set_vm_key(101, "hotplug", Some("network"));
    for _ in 0..20 {
        rig.bench.attach(&volume, "worker-101").await.expect_err("hotplug is off");
        sleep(Duration::from_secs(30)).await;
    }
    assert_eq!(rig.said().await.len(), 1);
    let text = rig.metrics.render();
    for expected in [
        "proxmox_csi_events_total{reason=\"HotplugOff\",result=\"written\"} 1",
        "proxmox_csi_events_total{reason=\"HotplugOff\",result=\"repeated\"} 19",
    ] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
    rig.bench.sim.set_vm_key(101, "hotplug", None);
    rig.bench.fault(json!({"fault": "lose_answer", "path": "/cluster/resources"}));
    rig.bench.attach(&volume, "worker-101").await.expect_err("the answer is lost");
    assert_eq!(rig.said().await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_call_neither_waits_for_nor_fails_with_the_api_server_and_is_heard_later() {
    let rig = Rig::new();
    let volume = rig.volume("pvc-1").await;
    rig.bench.attach(&volume, "worker-101").await.expect("attached");
    let held = || rig.bench.attach(&volume, "worker-102");
    // Found while the API server answers; then only Events can't be written.
    let nodes: Vec<Value> =
        rig.server.names(NODES).iter().filter_map(|name| rig.server.get(NODES, name)).collect();
    assert_eq!(nodes.len(), 3);
    rig.server.refuse_events(true);
    let started = Instant::now();
    let refused = held().await.expect_err("another VM has it");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(rig.said().await.is_empty());
    rig.server.refuse_events(false);
    held().await.expect_err("another VM has it");
    assert_eq!(rig.said().await.len(), 1, "what could not be said is said at the next try");
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_can_not_let_go_is_said() {
    let rig = Rig::new();
    let volume = rig.volume("pvc-1").await;
    rig.bench.attach(&volume, "worker-101").await.expect("attached");
    rig.bench.sim.set_vm_key(101, "protection", Some("1"));
    rig.bench.detach(&volume, "worker-101").await.expect_err("it is protected");
    rig.bench.sim.set_vm_key(101, "protection", None);
    Rig::expect(&rig.said().await, "Node/worker-101 VmProtected", &["qm set 101 --protection 0"]);

    rig.bench.fault(json!({"fault": "hang_qemu", "vmid": 101}));
    let other = rig.volume("pvc-2").await;
    rig.bench.attach(&other, "worker-101").await.expect_err("qemu is silent");
    rig.bench.fault(json!({"fault": "hang_qemu", "vmid": 101, "on": false}));
    Rig::expect(&rig.said().await, "Node/worker-101 QemuSilent", &["VM 101"]);

    rig.bench.detach(&volume, "worker-101").await.expect("detached");
    let drift =
        json!({"fault": "drift", "vmid": 101, "slot": "scsi9", "volume": crate::support::volid(&other)});
    rig.bench.fault(drift);
    rig.bench.detach(&other, "worker-101").await.expect_err("its qemu has a drive that may be the volume");
    Rig::expect(&rig.said().await, "Node/worker-101 UnknownDrive", &["scsi9", "VM 101"]);
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_vm_is_none_or_two_is_said() {
    let rig = Rig::new();
    let volume = rig.volume("pvc-1").await;
    let smbios =
        |vmid: u32| rig.bench.sim.vm(vmid).expect("a vm").current("smbios1").expect("a uuid").to_owned();
    let (first, third) = (smbios(101), smbios(103));
    rig.bench.sim.set_vm_key(103, "smbios1", Some(&first));
    rig.bench.attach(&volume, "worker-101").await.expect_err("two VMs have its uuid");
    rig.bench.sim.set_vm_key(103, "smbios1", Some(&third));
    let said = rig.said().await;
    Rig::expect(&said, "Node/worker-101 DuplicateUuid", &["101", "103", "qm set VMID --smbios1"]);

    rig.bench.sim.set_vm_key(101, "smbios1", Some("uuid=00000000-0000-4000-8000-000000000000"));
    rig.bench.attach(&volume, "worker-101").await.expect_err("no VM has its uuid");
    Rig::expect(&rig.said().await, "Node/worker-101 NoSuchVm", &["no VM in region", "worker-101"]);
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_is_elsewhere_or_another_vms_or_in_no_fit_slot_is_said() {
    let rig = Rig::new();
    // On pve1; worker-103 runs on pve2.
    let local = rig.bench.volume("pvc-1", "local").await.volume_id;
    rig.bind("pvc-1", &local);
    rig.bench.attach(&local, "worker-103").await.expect_err("it is local to another node");
    Rig::expect(&rig.said().await, "PersistentVolumeClaim/claim-pvc-1 VolumeElsewhere", &["pve1", "pve2"]);

    // A disk that VM 101 owns, as a PV made by hand.
    let owned = format!("{REGION}/pve1/local/101/vm-101-disk-0.raw");
    rig.bind("pvc-2", &owned);
    rig.server.edit(VOLUMES, "pvc-2", |volume| volume["status"]["phase"] = json!("Released"));
    rig.bench.delete(&owned).await.expect_err("a VM owns it");
    Rig::expect(&rig.said().await, "PersistentVolume/pvc-2 VolumeOfVm", &["101"]);

    let third = rig.volume("pvc-3").await;
    let volid = crate::support::volid(&third);
    rig.bench.sim.stop_vm(101).await;
    rig.bench.sim.set_vm_key(101, "virtio3", Some(&format!("{volid},size=1G")));
    rig.bench.attach(&third, "worker-101").await.expect_err("virtio is no slot for volumes");
    Rig::expect(&rig.said().await, "PersistentVolumeClaim/claim-pvc-3 DriveUnusable", &["virtio3"]);
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_is_away_and_refused_credentials_are_said() {
    let rig = Rig::new();
    let away = rig.bench.volume("pvc-1", "local").await.volume_id;
    rig.bind("pvc-1", &away);
    rig.bench.fault(json!({"fault": "kill_node", "node": "pve1"}));
    sleep(Duration::from_secs(40)).await;
    rig.bench.expand(&away, 2 * GIB).await.expect_err("the node that has the volume is down");
    let claim = "PersistentVolumeClaim/claim-pvc-1";
    let hint = "pvesm status --storage local";
    Rig::expect(&rig.said().await, &format!("{claim} StorageInactive"), &["`pve1`", hint]);

    rig.bench.fault(json!({"fault": "kill_node", "node": "pve1", "on": false}));
    rig.bench.fault(json!({"fault": "expire_token", "token": CSI}));
    sleep(Duration::from_mins(2)).await;
    rig.bench.attach(&away, "worker-101").await.expect_err("the token is refused");
    Rig::expect(&rig.said().await, &format!("{claim} CredentialsRefused"), &[CSI, REGION]);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_kept_is_said_of_its_volume() {
    let rig = Rig::new();
    let volume = rig.volume("pvc-1").await;
    rig.server.edit(VOLUMES, "pvc-1", |volume| {
        volume["metadata"]["annotations"] = json!({"csi.proxmox.sinextra.dev/lifecycle": "keep"});
        volume["status"]["phase"] = json!("Released");
    });
    rig.bench.delete(&volume).await.expect("the volume goes");
    Rig::expect(&rig.said().await, "PersistentVolume/pvc-1 DiskKept", &[&crate::support::volid(&volume)]);
}
