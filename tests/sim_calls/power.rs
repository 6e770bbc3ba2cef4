//! Starting, stopping, suspending, moving and destroying VMs, with and without the HA manager.

use super::cluster::Cluster;
use serde_json::{Value, json};
use std::time::Duration;

const VM: &str = "/nodes/pve1/qemu/102";

/// Two nodes that share a storage, one VM that runs, and a manager that acts where it is asked for.
fn cluster(manager: bool) -> Cluster {
    Cluster::of(&format!(
        "
nodes: [pve1, pve2]
ha_manager: {manager}
storages:
- {{id: local}}
- {{id: shared, shared: true}}
vms:
- vmid: 102
  node: pve1
  name: w3
  guest: false
  config: {{scsi0: 'shared:102/vm-102-disk-0.raw,size=1G', agent: '1', memory: '1024'}}
tokens:
- {{id: root@pam!t, secret: s}}
"
    ))
}

/// The kind and log of the task that a call starts, which must end well.
async fn task(cluster: &Cluster, method: &str, path: &str, form: &[(&str, &str)]) -> (String, Vec<String>) {
    let upid = cluster.done(method, path, form).await.as_str().expect("a task").to_owned();
    let log = cluster.ask("GET", &format!("/nodes/pve1/tasks/{upid}/log"), &[]).await;
    let lines = log.body["data"].as_array().expect("lines").iter();
    let lines = lines.filter_map(|line| line["t"].as_str()).map(str::to_owned).collect();
    (upid.split(':').nth(5).expect("a kind").to_owned(), lines)
}

async fn until(what: &str, is: impl Fn() -> bool) {
    for _ in 0..300 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    panic!("it never comes about that {what}");
}

fn running(cluster: &Cluster) -> bool {
    cluster.sim.vm(102).is_some_and(|vm| vm.running)
}

/// qemu-server `API2/Qemu.pm:vm_start`, `vm_stop`, `vm_shutdown`, `migrate_vm`.
#[tokio::test(start_paused = true)]
async fn what_the_ha_manager_looks_after_is_asked_for_and_done_by_it() {
    let cluster = cluster(true);
    cluster.done("POST", "/cluster/ha/resources", &[("sid", "vm:102")]).await;
    let (kind, log) = task(&cluster, "POST", &format!("{VM}/status/shutdown"), &[]).await;
    assert_eq!((kind.as_str(), log[0].as_str()), ("hastop", "Requesting HA stop for VM 102"));
    assert!(running(&cluster), "the task asks, the manager acts");
    until("the manager stops it", || !running(&cluster)).await;
    let resource = cluster.done("GET", "/cluster/ha/resources/vm:102", &[]).await;
    assert_eq!(resource["state"], "stopped");
    assert!(resource.get("request").is_none());

    let (kind, log) = task(&cluster, "POST", &format!("{VM}/status/start"), &[]).await;
    assert_eq!((kind.as_str(), log[0].as_str()), ("hastart", "Requesting HA start for VM 102"));
    until("the manager starts it", || running(&cluster)).await;

    let form = [("target", "pve2"), ("online", "1")];
    let (kind, log) = task(&cluster, "POST", &format!("{VM}/migrate"), &form).await;
    assert_eq!(
        (kind.as_str(), log[0].as_str()),
        ("hamigrate", "Requesting HA migration for VM 102 to node pve2")
    );
    until("the manager moves it", || cluster.sim.vm(102).is_some_and(|vm| vm.node == "pve2")).await;
    assert!(running(&cluster));
}

/// pve-ha-manager `HA/Config.pm:$service_check_ha_state`, `API2/HA/Resources.pm:check_service_state`.
#[tokio::test(start_paused = true)]
async fn an_ignored_resource_is_started_at_once_and_one_in_error_not_at_all() {
    let cluster = cluster(false);
    cluster.done("POST", "/cluster/ha/resources", &[("sid", "102"), ("state", "ignored")]).await;
    let (kind, _) = task(&cluster, "POST", &format!("{VM}/status/stop"), &[]).await;
    assert_eq!(kind, "qmstop");
    cluster.done("PUT", "/cluster/ha/resources/102", &[("state", "started")]).await;
    cluster.sim.set_ha_state(102, Some("error"));
    let text = cluster.fails("POST", &format!("{VM}/status/start"), &[]).await;
    assert_eq!(text, "command 'ha-manager set vm:102 --state started' failed: exit code 255");
    let text = cluster.fails("PUT", "/cluster/ha/resources/102", &[("state", "stopped")]).await;
    assert_eq!(text, "service 'vm:102' in error state, must be disabled and fixed first");
    let overrule = [("overrule-shutdown", "1")];
    let text = cluster.fails("POST", &format!("{VM}/status/stop"), &overrule).await;
    assert_eq!(text, json!({ "overrule-shutdown": "Not applicable for HA resources." }).to_string());
    let text = cluster.fails("POST", "/cluster/ha/resources", &[("sid", "vm:999")]).await;
    assert_eq!(text, "resource 'vm:999' does not exist in cluster");
}

/// qemu-server `API2/Qemu.pm:destroy_vm`.
#[tokio::test(start_paused = true)]
async fn a_vm_that_jobs_or_the_ha_manager_know_is_destroyed_only_with_purge() {
    let cluster = cluster(false);
    cluster.done("POST", "/cluster/ha/resources", &[("sid", "vm:102"), ("state", "ignored")]).await;
    let rule = [("type", "node-affinity"), ("rule", "r1"), ("resources", "vm:102"), ("nodes", "pve1")];
    cluster.done("POST", "/cluster/ha/rules", &rule).await;
    let job = [("id", "nightly"), ("schedule", "daily"), ("vmid", "102,103"), ("storage", "local")];
    cluster.done("POST", "/cluster/backup", &job).await;
    cluster.sim.stop_vm(102).await;
    let text = cluster.fails("DELETE", VM, &[]).await;
    assert_eq!(text, "unable to remove VM 102 - used in HA resources and purge parameter not set.");
    let (_, log) = task(&cluster, "DELETE", VM, &[("purge", "1")]).await;
    let says = |text: &str| log.iter().any(|line| line == text);
    assert!(says("purging VM 102 from related configurations.."), "{log:?}");
    assert!(says("NOTE: removed VM 102 from HA resource configuration."), "{log:?}");
    assert_eq!(cluster.done("GET", "/cluster/ha/resources", &[]).await, json!([]));
    assert_eq!(cluster.done("GET", "/cluster/ha/rules", &[]).await, json!([]));
    assert_eq!(cluster.done("GET", "/cluster/backup/nightly", &[]).await["vmid"], "103");
}

/// qemu-server `QemuServer.pm:check_volume_storage_type`, `check_storage_availability`.
#[tokio::test(start_paused = true)]
async fn a_vm_does_not_start_from_a_storage_that_is_not_for_images() {
    let cluster = cluster(false);
    cluster.sim.stop_vm(102).await;
    cluster.done("PUT", "/storage/shared", &[("content", "iso")]).await;
    let text = cluster.fails("POST", &format!("{VM}/status/start"), &[]).await;
    assert_eq!(text, "storage 'shared' does not support content-type 'images'");
    let text = cluster.fails("POST", &format!("{VM}/migrate"), &[("target", "pve2")]).await;
    assert_eq!(
        text,
        "shared:102/vm-102-disk-0.raw: content type 'images' is not available on storage 'shared'"
    );
    cluster.done("PUT", "/storage/shared", &[("content", "images"), ("nodes", "pve1")]).await;
    let text = cluster.fails("POST", &format!("{VM}/migrate"), &[("target", "pve2")]).await;
    assert_eq!(text, "storage 'shared' is not available on node 'pve2'");
    cluster.done("POST", &format!("{VM}/status/start"), &[]).await;
    assert!(running(&cluster));
}

/// qemu-server `QemuServer.pm:_do_vm_stop`, `vm_stop_cleanup`.
#[tokio::test(start_paused = true)]
async fn a_stop_applies_what_is_pending_and_leaves_a_stopped_vm_alone() {
    let cluster = cluster(false);
    cluster.done("PUT", &format!("{VM}/config"), &[("cores", "4"), ("delete", "agent")]).await;
    let waiting = |key: &str| cluster.sim.vm(102).is_some_and(|vm| vm.pending(key).is_some());
    assert!(waiting("cores"));
    cluster.done("POST", &format!("{VM}/status/stop"), &[]).await;
    let vm = cluster.sim.vm(102).expect("it is there");
    assert_eq!((vm.current("cores"), vm.current("agent"), vm.running), (Some("4"), None, false));
    assert!(!waiting("cores") && !vm.is_pending_delete("agent"));
    cluster.sim.set_vm_key(102, "lock", Some("backup"));
    cluster.done("POST", &format!("{VM}/status/stop"), &[]).await;
    let text = cluster.fails("POST", &format!("{VM}/status/start"), &[]).await;
    assert_eq!(text, "VM is locked (backup)");
}

/// qemu-server `API2/Qemu.pm:vm_start`, `vm_reset`, `vm_suspend`: where it is noticed that there is no such VM.
#[tokio::test(start_paused = true)]
async fn a_vm_that_is_not_there_is_missed_in_the_task_or_at_once() {
    let cluster = cluster(false);
    let none = "/nodes/pve1/qemu/999/status";
    let file = "Configuration file 'nodes/pve1/qemu-server/999.conf' does not exist";
    let found = "unable to find configuration file for VM 999 on node 'pve1'";
    assert_eq!(cluster.ask("POST", &format!("{none}/start"), &[]).await.status, 200);
    assert_eq!(cluster.fails("POST", &format!("{none}/start"), &[]).await, file);
    assert_eq!(cluster.ask("POST", &format!("{none}/stop"), &[]).await.status, 200);
    assert_eq!(cluster.fails("POST", &format!("{none}/stop"), &[]).await, found);
    for call in ["reset", "reboot", "suspend", "resume"] {
        let answer = cluster.ask("POST", &format!("{none}/{call}"), &[]).await;
        assert_eq!((answer.status, answer.reason.as_str()), (500, found), "{call}");
    }
}

/// qemu-server `QemuServer/RunState.pm:vm_suspend`, `vm_resume`, `QemuServer.pm:vm_start`.
#[tokio::test(start_paused = true)]
async fn a_vm_that_is_suspended_to_disk_keeps_its_memory_there_until_it_goes_on() {
    let cluster = cluster(false);
    let state = "shared:102/vm-102-state-suspend-2026-11-20.raw";
    let (kind, _) = task(&cluster, "POST", &format!("{VM}/status/suspend"), &[("todisk", "1")]).await;
    assert_eq!(kind, "qmsuspend");
    assert!(!running(&cluster));
    let vm = cluster.sim.vm(102).expect("it is there");
    assert_eq!((vm.current("lock"), vm.current("vmstate")), (Some("suspended"), Some(state)));
    let size = cluster.sim.volumes().into_iter().find(|volume| volume.key.volid() == state);
    assert_eq!(size.map(|volume| volume.size), Some((2 * 1024 + 500) << 20));
    let text = cluster.fails("PUT", &format!("{VM}/config"), &[("cores", "4")]).await;
    assert_eq!(text, "VM is locked (suspended)");
    let (kind, _) = task(&cluster, "POST", &format!("{VM}/status/resume"), &[]).await;
    assert_eq!(kind, "qmresume");
    let vm = cluster.sim.vm(102).expect("it is there");
    assert!(vm.running && vm.current("lock").is_none() && vm.current("vmstate").is_none());
    assert!(!cluster.volids().contains(&state.to_owned()), "{:?}", cluster.volids());

    cluster.done("POST", &format!("{VM}/status/suspend"), &[]).await;
    let now = cluster.done("GET", &format!("{VM}/status/current"), &[]).await;
    assert_eq!((&now["status"], &now["qmpstatus"]), (&json!("running"), &json!("paused")));
    let text = cluster.fails("POST", &format!("{VM}/status/shutdown"), &[]).await;
    assert_eq!(text, "VM is paused - cannot shutdown");
    cluster.done("POST", &format!("{VM}/status/resume"), &[]).await;
    cluster.done("POST", "/cluster/ha/resources", &[("sid", "vm:102")]).await;
    let text = cluster.fails("POST", &format!("{VM}/status/suspend"), &[("todisk", "1")]).await;
    assert_eq!(text, "Cannot suspend HA managed VM to disk");
}

/// pve-manager `HTTPServer.pm:rest_handler`.
#[tokio::test(start_paused = true)]
async fn some_calls_take_a_ticket_and_no_parameter_contradicts_the_path() {
    let cluster = cluster(false);
    for (method, path, form) in [
        ("POST", "/access/ticket", [("username", "root@pam"), ("password", "secret")]),
        ("PUT", "/access/password", [("userid", "root@pam"), ("password", "secret12")]),
    ] {
        let answer = cluster.ask(method, path, &form).await;
        let text = format!(
            "Permission check failed (URI '{path}' not available with API token, need proper ticket."
        );
        assert_eq!((answer.status, answer.reason), (403, text));
    }
    let twice = cluster.fails("PUT", &format!("{VM}/config"), &[("vmid", "103"), ("cores", "2")]).await;
    let text = "duplicate parameter (already defined in URI) with conflicting values!";
    assert_eq!(twice, json!({ "vmid": text }).to_string());
    cluster.done("PUT", &format!("{VM}/config"), &[("vmid", "102"), ("onboot", "1")]).await;
}

/// qemu-server `API2/Qemu/Agent.pm`: what other clients ask a guest for.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_frozen_says_so_until_it_is_thawed() {
    let cluster = cluster(false);
    let agent = async |call: &str| {
        let answer = cluster.done("POST", &format!("{VM}/agent/{call}"), &[]).await;
        answer["result"].clone()
    };
    assert_eq!(agent("ping").await, json!({}));
    assert_eq!(agent("fsfreeze-status").await, "thawed");
    assert_eq!(agent("fsfreeze-freeze").await, 1);
    assert_eq!(agent("fsfreeze-status").await, "frozen");
    assert_eq!(agent("fsfreeze-thaw").await, 1);
    assert_eq!(agent("fsfreeze-thaw").await, 0);
    assert_eq!(agent("fsfreeze-status").await, "thawed");
    let disks = cluster.done("GET", &format!("{VM}/agent/get-fsinfo"), &[]).await;
    assert_eq!(disks["result"][0]["mountpoint"], Value::from("/"));
}
