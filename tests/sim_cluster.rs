//! The simulated cluster as a whole: the HA manager, the release before, faults that change the cluster, calls that are
//! not modelled. On a paused clock.

use axum::body::Body;
use http::Request;
use hyper::ext::ReasonPhrase;
use proxmox_csi::sim::faults::Fault;
use proxmox_csi::sim::{Sim, World};
use serde_json::{Value, json};
use std::time::Duration;
use tower::ServiceExt as _;

const WORLD: &str = "
nodes: [pve1, pve2, pve3]
ha_manager: true
storages:
- {id: local}
- {id: shared, shared: true}
vms:
- {vmid: 100, node: pve1, name: w1, config: {scsi0: 'shared:100/vm-100-disk-0.raw,size=1G', agent: '1', onboot: '1'}}
- {vmid: 101, node: pve1, name: w2}
tokens:
- {id: root@pam!t1, secret: s}
- {id: op@pve!t1, secret: s}
roles: {op: [VM.Audit, VM.Config.Options, VM.Config.Disk, Datastore.Audit]}
acl: [{path: /, who: op@pve, role: op}]
";

const ROOT: &str = "root@pam!t1";

struct Answer {
    status: u16,
    reason: String,
    data: Value,
}

fn world(text: &str) -> Sim {
    Sim::in_memory(World::from_yaml(text).expect("the file is well formed")).expect("the world can be made")
}

async fn call(sim: &Sim, who: &str, method: &str, path: &str, form: &str) -> Answer {
    let request = Request::builder()
        .method(method)
        .uri(path.strip_prefix("/_sim").map_or_else(|| format!("/api2/json{path}"), |_| path.to_owned()))
        .header("authorization", format!("PVEAPIToken={who}=s"))
        .header("content-type", "application/x-www-form-urlencoded")
        .body(Body::from(form.to_owned()))
        .expect("a request");
    let response = sim.service().oneshot(request).await.expect("an answer");
    let reason = response.extensions().get::<ReasonPhrase>();
    let reason = reason.map_or_else(String::new, |r| String::from_utf8_lossy(r.as_bytes()).into_owned());
    let status = response.status().as_u16();
    let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("a body");
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let data = if path.starts_with("/_sim") { body } else { body["data"].clone() };
    Answer { status, reason, data }
}

fn play(sim: &Sim, fault: Value) {
    let fault: Fault = serde_json::from_value(fault).expect("the fault is well formed");
    sim.inject(fault).expect("what it names is there");
}

/// Waits until what is asked for is so.
async fn until(what: &str, is: impl Fn() -> bool) {
    for _ in 0..600 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    panic!("it never comes about that {what}");
}

#[tokio::test(start_paused = true)]
async fn the_ha_manager_keeps_a_resource_as_it_is_to_be_and_brings_it_back_elsewhere() {
    let sim = world(WORLD);
    let ha = "/cluster/ha/resources";
    assert_eq!(call(&sim, ROOT, "POST", ha, "sid=vm:100&state=started").await.status, 200);
    let rule = "type=node-affinity&rule=r1&resources=vm:100&nodes=pve3:2,pve2:1";
    assert_eq!(call(&sim, ROOT, "POST", "/cluster/ha/rules", rule).await.status, 200);
    sim.stop_vm(100).await;
    until("it runs again", || sim.vm(100).is_some_and(|vm| vm.running)).await;
    assert_eq!(call(&sim, ROOT, "PUT", &format!("{ha}/vm:100"), "state=stopped").await.status, 200);
    until("it stops", || sim.vm(100).is_some_and(|vm| !vm.running)).await;
    assert_eq!(call(&sim, ROOT, "PUT", &format!("{ha}/vm:100"), "state=started").await.status, 200);
    until("it runs", || sim.vm(100).is_some_and(|vm| vm.running)).await;

    play(&sim, json!({ "fault": "kill_node", "node": "pve1" }));
    tokio::time::sleep(Duration::from_secs(10)).await;
    let seen = call(&sim, ROOT, "GET", "/cluster/resources?type=vm", "").await.data;
    assert_eq!((&seen[0]["hastate"], &seen[0]["node"]), (&json!("fence"), &json!("pve1")));
    until("it is on the node that the rule likes best", || {
        sim.vm(100).is_some_and(|vm| vm.node == "pve3" && vm.running)
    })
    .await;
    assert_eq!(
        sim.vm(101).map(|vm| vm.node),
        Some("pve1".to_owned()),
        "what is no resource stays where it was"
    );

    let motion = call(&sim, ROOT, "POST", &format!("{ha}/vm:100/migrate"), "node=pve2").await;
    assert_eq!(motion.data["requested-node"], "pve2");
    until("it has moved", || sim.vm(100).is_some_and(|vm| vm.node == "pve2")).await;
}

#[tokio::test(start_paused = true)]
async fn a_resource_with_a_local_disk_is_in_error_after_its_node_is_gone() {
    let sim = world(WORLD);
    assert_eq!(call(&sim, ROOT, "POST", "/cluster/ha/resources", "sid=vm:101").await.status, 200);
    play(&sim, json!({ "fault": "kill_node", "node": "pve1" }));
    tokio::time::sleep(Duration::from_secs(90)).await;
    let status = call(&sim, ROOT, "GET", "/cluster/ha/status/current", "").await.data;
    let service = status.as_array().expect("a list").iter().find(|entry| entry["sid"] == "vm:101");
    assert_eq!(service.expect("the resource")["state"], "error");
}

#[tokio::test(start_paused = true)]
async fn the_release_before_has_groups_and_one_privilege_for_the_agent() {
    let eight = world(&format!("version: '8.4'\n{}", WORLD.replace("VM.Config.Options", "VM.Monitor")));
    let nine = world(WORLD);
    let version = call(&eight, ROOT, "GET", "/version", "").await.data;
    assert_eq!(version["release"], "8.4");
    assert_eq!(call(&eight, ROOT, "GET", "/cluster/ha/rules", "").await.status, 501);
    let group = "group=g1&nodes=pve1,pve2:2";
    assert_eq!(call(&eight, ROOT, "POST", "/cluster/ha/groups", group).await.status, 200);
    assert_eq!(call(&eight, ROOT, "POST", "/cluster/ha/resources", "sid=vm:100&group=g1").await.status, 200);
    assert_eq!(call(&eight, ROOT, "GET", "/cluster/ha/groups", "").await.data[0]["nodes"], "pve1,pve2:2");
    let used = call(&eight, ROOT, "DELETE", "/cluster/ha/groups/g1", "").await;
    assert_eq!(used.reason, "delete ha group failed: ha group is used by service 'vm:100'");
    let gone = call(&nine, ROOT, "POST", "/cluster/ha/groups", group).await;
    assert_eq!(gone.reason, "cannot create group: ha groups have been migrated to rules");

    let agent = "/nodes/pve1/qemu/100/agent/network-get-interfaces";
    assert_eq!(call(&eight, "op@pve!t1", "GET", agent, "").await.status, 200);
    let refused = call(&nine, "op@pve!t1", "GET", agent, "").await;
    assert_eq!(
        refused.reason,
        "Permission check failed (/vms/100, VM.GuestAgent.Audit|VM.GuestAgent.Unrestricted)"
    );
    let new = "storage=d2&type=dir&path=/d2&snapshot-as-volume-chain=1";
    assert_eq!(call(&eight, ROOT, "POST", "/storage", new).await.status, 400);
    assert_eq!(call(&nine, ROOT, "POST", "/storage", new).await.status, 200);
    let now = call(&eight, ROOT, "GET", "/nodes/pve1/qemu/100/status/current", "").await.data;
    assert!(now.get("pressurecpusome").is_none() && now.get("blockstat").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_is_held_makes_who_waits_time_out() {
    let sim = world(WORLD);
    let change = async || call(&sim, ROOT, "PUT", "/nodes/pve1/qemu/100/config", "description=x").await;
    play(&sim, json!({ "fault": "hold_lock", "lock": "vm/100" }));
    let refused = change().await;
    assert_eq!(refused.reason, "can't lock file '/var/lock/qemu-server/lock-100.conf' - got timeout");
    play(&sim, json!({ "fault": "hold_lock", "lock": "vm/100", "on": false }));
    assert_eq!(change().await.status, 200);
    play(&sim, json!({ "fault": "hold_lock", "lock": "storage/*/shared" }));
    let form = "vmid=9999&filename=vm-9999-a.raw&size=1M";
    let refused = call(&sim, ROOT, "POST", "/nodes/pve1/storage/shared/content", form).await;
    assert_eq!(refused.reason, "cfs-lock 'storage-shared' error: got lock request timeout");
    sim.clear_faults();
    assert_eq!(call(&sim, ROOT, "POST", "/nodes/pve1/storage/shared/content", form).await.status, 200);
    let unknown: Fault =
        serde_json::from_value(json!({ "fault": "hold_lock", "lock": "vm/7" })).expect("a fault");
    assert!(sim.inject(unknown).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_privilege_that_is_dropped_is_missed_until_it_is_back() {
    let sim = world(WORLD);
    let read = async || call(&sim, "op@pve!t1", "GET", "/nodes/pve1/qemu/100/config", "").await;
    assert_eq!(read().await.status, 200);
    play(&sim, json!({ "fault": "drop_privilege", "who": "op@pve", "privilege": "VM.Audit" }));
    assert_eq!(read().await.reason, "Permission check failed (/vms/100, VM.Audit)");
    assert_eq!(call(&sim, "op@pve!t1", "GET", "/cluster/resources?type=vm", "").await.data, json!([]));
    play(&sim, json!({ "fault": "drop_privilege", "who": "op@pve", "privilege": "VM.Audit", "on": false }));
    assert_eq!(read().await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn qemu_and_config_can_part_in_both_directions() {
    let sim = world(WORLD);
    let form = "vmid=9999&filename=vm-9999-a.raw&size=1M";
    assert_eq!(call(&sim, ROOT, "POST", "/nodes/pve1/storage/shared/content", form).await.status, 200);
    play(&sim, json!({ "fault": "drift", "vmid": 100, "slot": "scsi0" }));
    play(
        &sim,
        json!({ "fault": "drift", "vmid": 100, "slot": "scsi4", "volume": "shared:9999/vm-9999-a.raw" }),
    );
    let now = call(&sim, ROOT, "GET", "/nodes/pve1/qemu/100/status/current", "").await.data;
    let drives: Vec<&String> = now["blockstat"].as_object().expect("it runs").keys().collect();
    assert_eq!(drives, ["scsi4"]);
    let config = call(&sim, ROOT, "GET", "/nodes/pve1/qemu/100/config", "").await.data;
    assert!(config.get("scsi0").is_some() && config.get("scsi4").is_none());
}

/// pve-manager `Service/pvestatd.pm:update_storage_status` tells of active storages only, pmxcfs forgets what it was told after 5 minutes, and
/// `API2Tools.pm:extract_storage_stats` calls what it was not told of `unknown`.
#[tokio::test(start_paused = true)]
async fn a_storage_that_is_not_active_is_shown_as_it_was_for_five_minutes() {
    let sim = world(&WORLD.replace("{id: local}", "{id: local, is_mountpoint: true}"));
    let shown = async |id: &str| {
        let rows = call(&sim, ROOT, "GET", "/cluster/resources?type=storage", "").await.data;
        let rows = rows.as_array().expect("rows").iter().filter(|row| row["storage"] == id).cloned();
        rows.map(|row| (row["status"].clone(), row["maxdisk"].is_u64())).collect::<Vec<_>>()
    };
    let made = "filename=vm-9999-a.raw&vmid=9999&size=1G";
    assert_eq!(call(&sim, ROOT, "POST", "/nodes/pve1/storage/local/content", made).await.status, 200);
    let volume = async || {
        let path = "/nodes/pve1/storage/local/content/local:9999%2Fvm-9999-a.raw";
        let answer = call(&sim, ROOT, "GET", path, "").await;
        (answer.status, answer.reason)
    };
    assert_eq!(volume().await.0, 200);
    let (there, unknown) = (vec![(json!("available"), true); 3], vec![(json!("unknown"), false); 3]);
    assert_eq!(shown("local").await, there);
    for storage in ["local", "shared"] {
        play(&sim, json!({"fault": "unmount", "storage": storage}));
    }
    // A look at one volume activates nothing, and says of it what it says of one that was never there.
    let text = "volume_size_info on 'local:9999/vm-9999-a.raw' failed - no format";
    assert_eq!(volume().await, (500, text.to_owned()));
    tokio::time::sleep(Duration::from_secs(290)).await;
    assert_eq!(shown("local").await, there);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(shown("local").await, unknown);
    // A directory that is no mount point is there in any case.
    assert_eq!(shown("shared").await, there);
    play(&sim, json!({"fault": "unmount", "storage": "local", "on": false}));
    assert_eq!(shown("local").await, there);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_reboots_takes_its_vms_down_and_starts_those_that_boot_with_it() {
    let sim = world(&WORLD.replace("ha_manager: true", ""));
    play(&sim, json!({ "fault": "reboot_node", "node": "pve1", "ms": 30_000 }));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(call(&sim, ROOT, "GET", "/nodes/pve1/qemu/100/config", "").await.status, 595);
    assert!([100, 101].iter().all(|vmid| sim.vm(*vmid).is_some_and(|vm| !vm.running)));
    until("the one with onboot runs", || sim.vm(100).is_some_and(|vm| vm.running)).await;
    assert!(sim.vm(101).is_some_and(|vm| !vm.running));
    assert_eq!(call(&sim, ROOT, "GET", "/nodes/pve1/qemu/100/config", "").await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_modelled_is_answered_501_and_counted_and_what_is_not_in_the_schema_fails_loudly() {
    let sim = world(WORLD);
    for _ in 0..3 {
        assert_eq!(call(&sim, ROOT, "GET", "/nodes/pve1/aplinfo", "").await.status, 501);
    }
    let nowhere = call(&sim, ROOT, "GET", "/nodes/pve1/nowhere", "").await;
    assert_eq!(
        (nowhere.status, nowhere.reason.as_str()),
        (501, "Method 'GET /nodes/pve1/nowhere' not implemented")
    );
    let counted = call(&sim, ROOT, "GET", "/_sim/unmodelled", "").await.data;
    assert_eq!(counted["'GET /nodes/{node}/aplinfo' is not modelled by the simulator"], 3);
    assert_eq!(counted["Method 'GET /nodes/pve1/nowhere' not implemented"], 1);
    let wrong = call(&sim, ROOT, "POST", "/nodes/pve1/qemu/100/config", "scsi31=x&nonsense=1").await;
    assert_eq!((wrong.status, wrong.reason.as_str()), (400, "Parameter verification failed."));
    let role = call(&sim, ROOT, "POST", "/access/roles", "roleid=r&privs=VM.Nonsense").await;
    assert_eq!(role.reason, "create role failed: invalid privilege 'VM.Nonsense'");
}

#[tokio::test(start_paused = true)]
async fn an_iso_image_is_uploaded_given_to_a_drive_and_missed_once_it_is_gone() {
    let sim = world(&WORLD.replace("{id: local}", "{id: local, content: 'images,iso'}"));
    let body = "--b\r\nContent-Disposition: form-data; name=\"content\"\r\n\r\niso\r\n--b\r\nContent-Disposition: form-data; \
                name=\"filename\"; filename=\"seed.iso\"\r\n\r\n0123456789\r\n--b--\r\n";
    let request = Request::post("/api2/json/nodes/pve1/storage/local/upload")
        .header("authorization", format!("PVEAPIToken={ROOT}=s"))
        .header("content-type", "multipart/form-data; boundary=b")
        .body(Body::from(body))
        .expect("a request");
    assert_eq!(sim.service().oneshot(request).await.expect("an answer").status(), 200);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let listed = call(&sim, ROOT, "GET", "/nodes/pve1/storage/local/content?content=iso", "").await.data;
    assert_eq!((&listed[0]["volid"], &listed[0]["size"]), (&json!("local:iso/seed.iso"), &json!(10)));
    sim.stop_vm(100).await;
    let drive = "ide0=local%3Aiso%2Fseed.iso%2Cmedia%3Dcdrom";
    assert_eq!(call(&sim, ROOT, "PUT", "/nodes/pve1/qemu/100/config", drive).await.status, 200);
    let start = async || {
        let upid = call(&sim, ROOT, "POST", "/nodes/pve1/qemu/100/status/start", "").await.data;
        sim.wait_task(upid.as_str().expect("a task"), Duration::from_mins(1)).await
    };
    assert_eq!(start().await.as_deref(), Some("OK"));
    sim.stop_vm(100).await;
    let volume = "/nodes/pve1/storage/local/content/local:iso%2Fseed.iso";
    assert_eq!(call(&sim, ROOT, "DELETE", volume, "").await.status, 200);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(start().await.as_deref(), Some("volume 'local:iso/seed.iso' does not exist"));
}

/// Each key is written as it comes, so that the first one fails and nothing waits (qemu-server `API2/Qemu.pm:update_vm_api`).
#[tokio::test(start_paused = true)]
async fn a_change_of_a_config_without_quorum_leaves_nothing_pending() {
    let sim = world(WORLD);
    let before = sim.vm(101).expect("a vm").conf;
    play(&sim, json!({ "fault": "lose_quorum" }));
    for form in ["scsi3=local:1", "delete=scsi0", "description=x", "memory=4096"] {
        let answer = call(&sim, ROOT, "PUT", "/nodes/pve1/qemu/101/config", form).await;
        assert_eq!(answer.status, 500, "{form}");
        assert!(answer.reason.contains("Permission denied"), "{form}: {}", answer.reason);
    }
    assert_eq!(sim.vm(101).expect("a vm").conf, before);
}
