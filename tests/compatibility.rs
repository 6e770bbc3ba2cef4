//! What a cluster of the driver before this one brings along: names, handles, contexts and disks that it made. Each is served as it
//! is, and what is printed is what that driver could go on with.

mod support;

use std::collections::BTreeMap;

use proxmox_csi::{
    csi::{
        identity::{DRIVER_NAME, IdentityService, Readiness},
        proto::{self, controller_server::Controller as _, identity_server::Identity as _},
    },
    types::{
        params::Parameters,
        props::PropertyString,
        topology::{REGION_KEY, ZONE_KEY},
    },
};
use serde_json::json;
use support::{Bench, GIB, assert_refused, new_volume, publish};
use tonic::{Code, Request};

/// A volume made by hand or by another driver: on a storage of pve1, under an owner of its own.
async fn allocated(bench: &Bench, storage: &str, owner: u32, name: &str) -> String {
    let form = format!("vmid={owner}&filename={name}&size=1G");
    let path = format!("/nodes/pve1/storage/{storage}/content");
    let made = bench.admin("POST", &path, &form).await;
    made["data"].as_str().expect("a volid").split_once(':').expect("a storage").1.to_owned()
}

/// Plugs a volume in as the driver before this one did: its options, and a WWN that names the slot.
async fn attached_by_the_driver_before(bench: &Bench, vmid: u32, slot: u32, volid: &str) -> String {
    // "PVC-ID" and two digits, in ASCII.
    let wwn = format!("0x5056432d49443{}3{}", slot / 10, slot % 10);
    let drive = format!("{volid},backup=0,iothread=1,wwn={wwn}");
    let drive = drive.replace(':', "%3A").replace('/', "%2F").replace('=', "%3D").replace(',', "%2C");
    bench.admin("PUT", &format!("/nodes/pve1/qemu/{vmid}/config"), &format!("scsi{slot}={drive}")).await;
    wwn
}

#[tokio::test]
async fn the_driver_keeps_its_name_unless_another_is_set() {
    let (_, told) = tokio::sync::watch::channel(Readiness::Ready);
    for name in [DRIVER_NAME, "csi.example.org"] {
        let service = IdentityService::new(name, told.clone());
        let info = service.get_plugin_info(Request::new(proto::GetPluginInfoRequest {})).await;
        let info = info.expect("an answer").into_inner();
        assert_eq!((info.name.as_str(), info.vendor_version.is_empty()), (name, false));
    }
    assert_eq!(DRIVER_NAME, "csi.proxmox.sinextra.dev");
}

#[tokio::test(start_paused = true)]
async fn volumes_of_every_handle_form_and_owner_are_attached_and_detached() {
    let bench = Bench::new();
    let local = allocated(&bench, "local", 9999, "vm-9999-pvc-1.raw").await;
    let qcow2 = allocated(&bench, "local", 9999, "vm-9999-pvc-2.qcow2").await;
    let shared = allocated(&bench, "shared", 9999, "vm-9999-pvc-3.raw").await;
    let other_owner = allocated(&bench, "shared", 10000, "vm-10000-pvc-4.raw").await;
    let by_hand = allocated(&bench, "local", 100, "vm-100-disk-1.raw").await;
    let free_name = allocated(&bench, "local", 9999, "pvc-without-an-owner.raw").await;
    for handle in [
        format!("test/pve1/local/{local}"),
        format!("test/pve1/local/{qcow2}"),
        format!("test//shared/{shared}"),
        // Older releases wrote the zone of a shared volume, too.
        format!("test/pve1/shared/{shared}"),
        format!("test/pve2/shared/{shared}"),
        format!("test//shared/{other_owner}"),
        format!("test/pve1/local/{by_hand}"),
        format!("test/pve1/local/{free_name}"),
    ] {
        let context = bench.attach(&handle, "worker-101").await.unwrap_or_else(|e| panic!("{handle}: {e}"));
        assert_eq!(bench.slots(101, &handle).qemu, 1, "{handle}");
        assert!(context["DevicePath"].starts_with("/dev/disk/by-id/wwn-0x"), "{handle}");
        bench.detach(&handle, "worker-101").await.unwrap_or_else(|e| panic!("{handle}: {e}"));
        assert_eq!(bench.slots(101, &handle), support::Slots::default(), "{handle}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_volume_has_the_handle_and_the_topology_that_it_always_had() {
    let bench = Bench::new();
    let local = bench.volume("pvc-0e6cf7a5-5b4b-4b32-a1b5-5b4b3f1d2c11", "local").await;
    assert_eq!(local.volume_id, "test/pve1/local/9999/vm-9999-pvc-0e6cf7a5-5b4b-4b32-a1b5-5b4b3f1d2c11.raw");
    let segments = |volume: &proto::Volume| volume.accessible_topology[0].segments.clone();
    assert_eq!((REGION_KEY, ZONE_KEY), ("topology.kubernetes.io/region", "topology.kubernetes.io/zone"));
    let region = (REGION_KEY.to_owned(), "test".to_owned());
    let zone = (ZONE_KEY.to_owned(), "pve1".to_owned());
    assert_eq!(segments(&local), BTreeMap::from([region.clone(), zone]));
    let shared = bench.volume("pvc-1", "shared").await;
    assert_eq!(shared.volume_id, "test//shared/9999/vm-9999-pvc-1.raw");
    assert_eq!(segments(&shared), BTreeMap::from([region]));
}

#[tokio::test(start_paused = true)]
async fn a_volume_without_a_size_has_ten_gibibytes_and_odd_sizes_are_rounded_up() {
    let bench = Bench::new();
    let mut request = new_volume("pvc-1", "shared");
    request.capacity_range = None;
    assert_eq!(bench.create(request).await.expect("a volume").capacity_bytes, 10 * GIB);
    let mut request = new_volume("pvc-2", "shared");
    request.capacity_range = Some(proto::CapacityRange { required_bytes: GIB + 1, limit_bytes: 0 });
    assert_eq!(bench.create(request).await.expect("a volume").capacity_bytes, GIB + GIB / 2);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_the_driver_before_attached_keeps_its_wwn_and_is_detached() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let wwn = attached_by_the_driver_before(&bench, 101, 5, &support::volid(&volume)).await;
    assert_eq!(wwn, "0x5056432d49443035");
    let context = bench.attach(&volume, "worker-101").await.expect("it is attached");
    assert_eq!(context["DevicePath"], format!("/dev/disk/by-id/wwn-{wwn}"));
    assert_eq!(context["lun"], "5");
    assert_eq!(bench.slots(101, &volume).current, ["scsi5"], "it was left where it is");
    bench.detach(&volume, "worker-101").await.expect("detached");
    // Attached anew it has a name of its own, which that driver's node plugin finds by the same key.
    let context = bench.attach(&volume, "worker-101").await.expect("attached");
    let own = context["DevicePath"].strip_prefix("/dev/disk/by-id/wwn-0x").expect("a link by its WWN");
    assert!(own.len() == 16 && own.starts_with('3') && own.chars().all(|c| c.is_ascii_hexdigit()), "{own}");
    let slot = bench.slots(101, &volume).current[0].trim_start_matches("scsi").to_owned();
    assert_eq!(context["lun"], slot);
}

#[test]
fn no_existing_volume_is_refused_for_what_stands_in_it() {
    let all = [
        ("storage", "local-lvm"),
        ("storageFormat", "raw"),
        ("aio", "io_uring"),
        ("backup", "T"),
        ("cache", "none"),
        ("iothread", "f"),
        ("ssd", "TRUE"),
        ("diskIOPS", "100"),
        ("diskMBps", "20"),
        ("blockSize", "4096"),
        ("inodeSize", "256"),
        ("replicate", "0"),
        ("replicateSchedule", "*/15"),
        ("replicateZones", "pve-1,pve-2"),
        ("resizeRequired", "true"),
        ("resizeSizeBytes", "1073741824"),
        ("csi.storage.k8s.io/pv/name", "pvc-1"),
        ("storage.kubernetes.io/csiProvisionerIdentity", "1-csi.proxmox.sinextra.dev"),
    ];
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let drive = |context: &BTreeMap<String, String>| {
        let (parameters, warnings) = Parameters::of_existing_volume(context);
        let mut drive = PropertyString::with_bare("s:vm-9999-x").expect("a volid");
        parameters.drive.write_to(&mut drive).expect("legal options");
        (drive.to_string(), warnings)
    };
    let (string, warnings) = drive(&map(&all));
    assert_eq!(
        string,
        "s:vm-9999-x,aio=io_uring,backup=1,cache=none,discard=on,iops_rd=100,iops_wr=100,iothread=0,mbps_rd=20,mbps_wr=20,replicate=0,ssd=1"
    );
    assert_eq!(warnings, [""; 0]);
    // What was left out, and what can't be understood.
    assert_eq!(drive(&map(&[])).0, "s:vm-9999-x,backup=0,iothread=1,replicate=0");
    let stray = [("iops_rd", "1"), ("iops_wr", "2"), ("mbps_rd", "3"), ("mbps_wr", "4")];
    assert_eq!(
        drive(&map(&stray)).0,
        "s:vm-9999-x,backup=0,iops_rd=1,iops_wr=2,iothread=1,mbps_rd=3,mbps_wr=4,replicate=0"
    );
    let (string, warnings) =
        drive(&map(&[("ssd", "perhaps"), ("colour", "blue"), ("cache", "none,wwn=0x1")]));
    assert_eq!(string, "s:vm-9999-x,backup=0,iothread=1,replicate=0");
    assert!(warnings.len() >= 2, "{warnings:?}");
    for yes in ["1", "t", "T", "true", "TRUE", "True"] {
        assert!(drive(&map(&[("ssd", yes)])).0.contains(",ssd=1"), "{yes}");
    }
    for no in ["0", "f", "F", "false", "FALSE", "False"] {
        assert!(!drive(&map(&[("ssd", no)])).0.contains("ssd=1"), "{no}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_replicated_volume_is_refused_and_one_that_exists_is_served() {
    let bench = Bench::new();
    let mut request = new_volume("pvc-1", "shared");
    request.parameters.insert("replicate".to_owned(), "true".to_owned());
    assert_refused(bench.create(request).await, Code::InvalidArgument, &["replicate"]);
    assert!(
        bench.sim.volumes().is_empty() || bench.sim.volumes().iter().all(|v| !v.key.name.contains("pvc-1"))
    );
    // The placeholder VM under whose id the storage replicates it is a real one.
    let name = allocated(&bench, "local", 10001, "vm-10001-pvc-2.raw").await;
    bench.admin("POST", "/nodes/pve1/qemu", "vmid=10001&name=placeholder").await;
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    let handle = format!("test/pve1/local/{name}");
    let mut request = publish(&handle, "worker-101");
    let context = [("replicate", "true"), ("replicateSchedule", "*/15"), ("replicateZones", "pve1,pve2")];
    request.volume_context.extend(context.map(|(key, value)| (key.to_owned(), value.to_owned())));
    bench.controller.controller_publish_volume(Request::new(request)).await.expect("attached");
    bench.detach(&handle, "worker-101").await.expect("detached");
}

#[tokio::test(start_paused = true)]
async fn retries_of_what_was_half_done_before_a_restart_go_on_where_it_stopped() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.fault(json!({"fault": "lose_answer", "method": "POST", "path": "/nodes/pve1/qemu/101/config"}));
    bench.attach(&volume, "worker-101").await.expect_err("the answer is lost");
    // Another process, which remembers nothing.
    let token = proxmox_csi::sim::World::builtin().token(support::CSI).expect("the token").secret.clone();
    let token = proxmox_csi::pve::client::Token { id: support::CSI.to_owned(), secret: token };
    let bench = Bench::over(&bench.sim, &token);
    bench.attach(&volume, "worker-101").await.expect("attached");
    assert_eq!(bench.slots(101, &volume).current.len(), 1);
    bench.detach(&volume, "worker-101").await.expect("detached");
    bench.delete(&volume).await.expect("deleted");
}
