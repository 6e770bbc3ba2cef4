//! Each kind of fault, played in process and over HTTP, does what it says and can be taken back.

use super::cluster::{Answer, Cluster};
use axum::body::Body;
use http::Request;
use proxmox_csi::sim::faults::Fault;
use serde_json::{Value, json};
use std::time::Duration;
use tower::ServiceExt as _;

const VM: &str = "/nodes/pve1/qemu/102";
const CONTENT: &str = "/nodes/pve1/storage/data/content";
const ALLOC: &[(&str, &str)] = &[("filename", "vm-9999-a.raw"), ("vmid", "9999"), ("size", "1G")];

/// How a fault is played.
#[derive(Debug, Clone, Copy)]
enum Way {
    InProcess,
    OverHttp,
}

const WAYS: [Way; 2] = [Way::InProcess, Way::OverHttp];

async fn control(cluster: &Cluster, method: &str, body: String) -> u16 {
    let request = Request::builder().method(method).uri("/_sim/faults").body(Body::from(body));
    let request = request.expect("a request");
    cluster.sim.router().oneshot(request).await.expect("the router cannot fail").status().as_u16()
}

impl Way {
    async fn play(self, cluster: &Cluster, fault: Value) {
        match self {
            Self::InProcess => {
                let fault: Fault = serde_json::from_value(fault).expect("the fault is well formed");
                cluster.sim.inject(fault).expect("what it names is there");
            }
            Self::OverHttp => assert_eq!(control(cluster, "POST", fault.to_string()).await, 200, "{fault}"),
        }
    }

    async fn take_all_back(self, cluster: &Cluster) {
        match self {
            Self::InProcess => cluster.sim.clear_faults(),
            Self::OverHttp => assert_eq!(control(cluster, "DELETE", String::new()).await, 200),
        }
    }
}

async fn alloc(cluster: &Cluster) -> Answer {
    cluster.ask("POST", CONTENT, ALLOC).await
}

fn allocated(cluster: &Cluster) -> bool {
    cluster.volids().contains(&"data:9999/vm-9999-a.raw".to_owned())
}

/// The status that the log has of the last request: 0 where no answer has reached anybody.
fn last_status(cluster: &Cluster) -> u16 {
    cluster.sim.log().last().expect("there was a request").status
}

#[tokio::test(start_paused = true)]
async fn a_request_is_refused_as_often_as_the_fault_says() {
    for way in WAYS {
        let cluster = Cluster::new();
        for status in [500, 503, 595] {
            let fault =
                json!({ "fault": "refuse", "path": "/version", "status": status, "text": "no", "times": 2 });
            way.play(&cluster, fault).await;
            for expected in [status, status, 200] {
                assert_eq!(cluster.ask("GET", "/version", &[]).await.status, expected, "{way:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_request_does_nothing_and_a_lost_answer_hides_what_was_done() {
    for way in WAYS {
        let cluster = Cluster::new();
        way.play(&cluster, json!({ "fault": "lose_request", "method": "POST", "path": "/content" })).await;
        alloc(&cluster).await;
        assert_eq!((last_status(&cluster), allocated(&cluster)), (0, false), "{way:?}");
        way.play(&cluster, json!({ "fault": "lose_answer", "method": "POST", "path": "/content" })).await;
        alloc(&cluster).await;
        assert_eq!((last_status(&cluster), allocated(&cluster)), (0, true), "{way:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_delay_comes_before_the_deed_or_before_the_answer() {
    for way in WAYS {
        for (fault, done_by_then) in [("delay", false), ("delay_answer", true)] {
            let cluster = Cluster::new();
            way.play(&cluster, json!({ "fault": fault, "path": "/content", "ms": 7000 })).await;
            let begun = cluster.sim.clock().elapsed();
            let middle = async {
                tokio::time::sleep(Duration::from_secs(3)).await;
                allocated(&cluster)
            };
            let (answer, there) = tokio::join!(alloc(&cluster), middle);
            assert_eq!((answer.status, there), (200, done_by_then), "{way:?} {fault}");
            assert!(cluster.sim.clock().elapsed() >= begun + Duration::from_secs(7), "{way:?} {fault}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_fails_before_or_after_its_work_or_takes_longer() {
    for way in WAYS {
        let cluster = Cluster::new();
        let volume = format!("{CONTENT}/data:9999%2Fvm-9999-a.raw");
        alloc(&cluster).await;
        way.play(&cluster, json!({ "fault": "fail_task", "worker": "imgdel", "text": "disk on fire" })).await;
        assert_eq!(cluster.fails("DELETE", &volume, &[]).await, "disk on fire");
        assert!(allocated(&cluster), "{way:?}");
        let fault = json!({ "fault": "fail_task", "worker": "imgdel", "text": "too late", "after": true });
        way.play(&cluster, fault).await;
        assert_eq!(cluster.fails("DELETE", &volume, &[]).await, "too late");
        assert!(!allocated(&cluster), "{way:?}");
        alloc(&cluster).await;
        way.play(&cluster, json!({ "fault": "delay_task", "worker": "imgdel", "ms": 9000 })).await;
        let begun = cluster.sim.clock().elapsed();
        cluster.done("DELETE", &volume, &[]).await;
        assert!(cluster.sim.clock().elapsed() >= begun + Duration::from_secs(9), "{way:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_is_held_makes_others_time_out() {
    for way in WAYS {
        let cluster = Cluster::new();
        way.play(&cluster, json!({ "fault": "hold_lock", "lock": "vm/102" })).await;
        let text = cluster.fails("PUT", &format!("{VM}/config"), &[("cores", "2")]).await;
        assert_eq!(text, "can't lock file '/var/lock/qemu-server/lock-102.conf' - got timeout", "{way:?}");
        way.take_all_back(&cluster).await;
        cluster.set(102, &[("cores", "2")]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_dead_or_cut_off_does_not_answer() {
    for way in WAYS {
        for fault in ["kill_node", "cut_node"] {
            let cluster = Cluster::new();
            way.play(&cluster, json!({ "fault": fault, "node": "pve2" })).await;
            assert_eq!(cluster.ask("GET", "/nodes/pve2/status", &[]).await.status, 595, "{way:?} {fault}");
            let nodes = cluster.done("GET", "/nodes", &[]).await;
            assert_eq!((&nodes[0]["status"], &nodes[1]["status"]), (&json!("online"), &json!("offline")));
            way.take_all_back(&cluster).await;
            assert_eq!(cluster.ask("GET", "/nodes/pve2/status", &[]).await.status, 200, "{way:?} {fault}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_quorum_no_config_is_written() {
    for way in WAYS {
        let cluster = Cluster::new();
        way.play(&cluster, json!({ "fault": "lose_quorum" })).await;
        let text = cluster.fails("PUT", &format!("{VM}/config"), &[("cores", "2")]).await;
        assert!(
            text.starts_with("unable to open file '/etc/pve/nodes/pve1/qemu-server/102.conf.tmp."),
            "{text}"
        );
        let text = cluster.fails("POST", "/nodes/pve1/qemu/100/status/start", &[]).await;
        assert_eq!(text, "cluster not ready - no quorum?", "{way:?}");
        way.take_all_back(&cluster).await;
        cluster.set(102, &[("cores", "2")]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_may_not_let_go_and_a_qemu_may_not_answer() {
    for way in WAYS {
        let cluster = Cluster::new();
        alloc(&cluster).await;
        cluster.set(102, &[("scsi1", "data:9999/vm-9999-a.raw")]).await;
        way.play(&cluster, json!({ "fault": "hang_unplug", "vmid": 102 })).await;
        let text = cluster.fails("PUT", &format!("{VM}/unlink"), &[("idlist", "scsi1")]).await;
        assert!(text.contains("still busy in guest?"), "{way:?}: {text}");
        way.take_all_back(&cluster).await;
        cluster.vm("PUT", 102, "/unlink", &[("idlist", "scsi1")]).await;
        way.play(&cluster, json!({ "fault": "hang_qemu", "vmid": 102 })).await;
        let now = cluster.done("GET", &format!("{VM}/status/current"), &[]).await;
        assert_eq!((&now["status"], now.get("blockstat")), (&json!("running"), None), "{way:?}");
        way.take_all_back(&cluster).await;
        let now = cluster.done("GET", &format!("{VM}/status/current"), &[]).await;
        assert!(now.get("blockstat").is_some(), "{way:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_storage_has_no_room_and_an_expired_token_no_rights() {
    for way in WAYS {
        let cluster = Cluster::new();
        way.play(&cluster, json!({ "fault": "fill_storage", "storage": "data" })).await;
        assert_eq!((alloc(&cluster).await.status, allocated(&cluster)), (500, false), "{way:?}");
        let status = cluster.done("GET", "/nodes/pve1/storage/data/status", &[]).await;
        assert_eq!(status["avail"], 0);
        way.take_all_back(&cluster).await;
        way.play(&cluster, json!({ "fault": "expire_token", "token": "root@pam!t" })).await;
        let answer = alloc(&cluster).await;
        assert_eq!((answer.status, answer.reason.as_str()), (401, "Authentication failed!"), "{way:?}");
        way.take_all_back(&cluster).await;
        let fault =
            json!({ "fault": "drop_privilege", "who": "root@pam", "privilege": "Datastore.AllocateSpace" });
        way.play(&cluster, fault).await;
        let answer = alloc(&cluster).await;
        let text = "Permission check failed (/storage/data, Datastore.AllocateSpace)";
        assert_eq!((answer.status, answer.reason.as_str()), (403, text), "{way:?}");
        way.take_all_back(&cluster).await;
        assert_eq!(alloc(&cluster).await.status, 200, "{way:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn qemu_and_config_part_in_both_directions() {
    for way in WAYS {
        let cluster = Cluster::new();
        alloc(&cluster).await;
        let volume = "data:9999/vm-9999-a.raw";
        let slots = async || {
            let now = cluster.done("GET", &format!("{VM}/status/current"), &[]).await;
            now["blockstat"].as_object().expect("it runs").keys().cloned().collect::<Vec<_>>()
        };
        way.play(&cluster, json!({ "fault": "drift", "vmid": 102, "slot": "scsi7", "volume": volume })).await;
        assert_eq!(slots().await, ["scsi7"], "{way:?}");
        way.play(&cluster, json!({ "fault": "drift", "vmid": 102, "slot": "scsi7" })).await;
        assert!(slots().await.is_empty(), "{way:?}");
        let config = cluster.done("GET", &format!("{VM}/config"), &[]).await;
        assert!(config.get("scsi7").is_none(), "{way:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_fault_that_names_what_is_not_there_is_refused() {
    let cluster = Cluster::new();
    for fault in [
        json!({ "fault": "hang_qemu", "vmid": 999 }),
        json!({ "fault": "kill_node", "node": "pve9" }),
        json!({ "fault": "fill_storage", "storage": "nope" }),
        json!({ "fault": "expire_token", "token": "nobody@pve!x" }),
        json!({ "fault": "drop_privilege", "who": "root@pam", "privilege": "VM.Fly" }),
        json!({ "fault": "hold_lock", "lock": "vm/999" }),
        json!({ "fault": "no such fault" }),
    ] {
        assert_eq!(control(&cluster, "POST", fault.to_string()).await, 400, "{fault}");
    }
}
