//! What the process tells of itself: the whole set of metrics, and the way of a call through the log down to Proxmox's tasks.

mod support;

use std::{
    collections::BTreeSet,
    io::Write,
    sync::{Arc, Mutex},
    time::Duration,
};

use proxmox_csi::{
    csi::{
        controller::ControllerService,
        identity::{DRIVER_NAME, IdentityService, Readiness},
        proto::{self, controller_client::ControllerClient},
        server::Server,
    },
    pve::{Client, client::Token},
    runtime::Operations,
    sim::{Sim, World},
    telemetry::metrics::Metrics,
    types::VmId,
    volume::{Settings, Volumes},
};
use serde_json::Value;
use support::{CSI, REGION, in_process, new_volume, nodes_of, publish};
use tokio::{net::UnixStream, sync::watch};
use tokio_util::sync::CancellationToken;

/// Every metric with one value.
fn filled() -> Metrics {
    let metrics = Metrics::default();
    let took = Duration::from_millis(3);
    // One set of labels each: a family has no order.
    metrics.pve().request("resources", "read", took, "refused");
    drop(metrics.pve().waiting("r1", "read"));
    drop(metrics.pve().in_flight("r1", "pve1", "read"));
    metrics.pve().task("qmconfig", took, "ok");
    metrics.pve().failover("r1");
    metrics.pve().login("r1", "ok");
    metrics.pve().reload("r1");
    metrics.csi().rpc("CreateVolume").answered("Ok");
    drop(metrics.csi().queued("r1"));
    metrics.csi().swept("r1", tokio::time::Instant::now());
    metrics.csi().lease(|| true);
    metrics.csi().event("HotplugOff", "written");
    metrics.ccm().poll("r1", true, 1.0);
    metrics.ccm().reconcile();
    metrics.ccm().action("labels");
    metrics.ccm().refusal("quorum");
    metrics
}

#[tokio::test(start_paused = true)]
async fn the_whole_set_of_metrics_is_known() {
    let metrics = filled();
    tokio::time::sleep(Duration::from_secs(7)).await;
    // How long something took is another number each time; which one it is, is shown once.
    let text = metrics.render();
    let shown = text.lines().filter(|line| !line.contains("_bucket{") && !line.contains("_sum"));
    let shown = shown.collect::<Vec<_>>().join("\n").replace(env!("CARGO_PKG_VERSION"), "VERSION");
    insta::assert_snapshot!(shown);
}

#[tokio::test(start_paused = true)]
async fn metrics_have_base_units_help_and_bounded_labels() {
    let text = filled().render();
    // What is configured, written in this program, or of the size of a Proxmox cluster. Never a volume, a VM or a pod.
    let bounded = [
        "action", "class", "code", "le", "node", "outcome", "reason", "region", "request", "result", "rpc",
        "task", "version",
    ];
    let (mut named, mut helped) = (BTreeSet::new(), BTreeSet::new());
    for line in text.lines() {
        match line.split(' ').collect::<Vec<_>>().as_slice() {
            ["#", "EOF"] | ["#", "UNIT", ..] => {}
            ["#", "HELP", name, words @ ..] => {
                assert!(words.len() > 3, "{line}");
                helped.insert((*name).to_owned());
            }
            ["#", "TYPE", name, kind] => {
                named.insert((*name).to_owned());
                let seconds = name.ends_with("_seconds");
                assert!(seconds || *kind != "histogram", "{name} has no unit");
                assert!(!["_ms", "_millis", "_kb", "_total"].iter().any(|end| name.ends_with(end)), "{name}");
            }
            _ => {
                let Some((_, labels)) = line.split_once('{') else { continue };
                let labels = labels.split_once('}').expect("labels end").0;
                for label in labels.split(',').filter_map(|pair| pair.split_once('=')) {
                    assert!(bounded.contains(&label.0), "{line}");
                }
            }
        }
    }
    assert_eq!(named, helped, "each has a help text");
    assert!(named.len() > 18, "{named:?}");
}

#[test]
fn metrics_of_the_driver_before_this_one_keep_their_names() {
    let text = filled().render();
    for kept in [
        "# TYPE proxmox_api_request_duration_seconds histogram",
        "proxmox_api_request_duration_seconds_bucket{le=\"+Inf\",request=\"resources\"} 1",
        "proxmox_api_request_errors_total{request=\"resources\"} 1",
    ] {
        assert!(text.contains(kept), "{kept}\n{text}");
    }
}

#[test]
fn a_call_that_a_caller_made_up_is_no_label() {
    let metrics = Metrics::default();
    metrics.csi().rpc("Evil\"} 1\n").answered("Unimplemented");
    let text = metrics.render();
    assert!(
        text.contains("csi_rpc_duration_seconds_count{rpc=\"other\",code=\"Unimplemented\"} 1"),
        "{text}"
    );
}

fn read(path: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read `{}`: {error}", path.display()))
}

#[tokio::test(start_paused = true)]
async fn every_metric_request_and_event_is_in_the_reference() {
    let reference = read("docs/observability.md");
    let in_table = |name: &str| reference.lines().any(|line| line.starts_with(&format!("| `{name}`")));
    let text = filled().render();
    let metrics =
        text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(['{', ' ']).next());
    let histogram = |name: &str| {
        ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end).map(str::to_owned))
    };
    for metric in metrics.filter(|name| !name.starts_with("proxmox_ccm_")) {
        let name = histogram(metric).unwrap_or_else(|| metric.to_owned());
        assert!(in_table(&name), "`{name}` is not in the table of metrics");
    }

    let mut requests = 0;
    for file in ["access", "agent", "cluster", "ha", "login", "qemu", "storage", "task"] {
        for call in read(&format!("src/pve/{file}.rs")).split("Call::new(").skip(1) {
            let Some(name) = call.trim_start().strip_prefix('"').and_then(|rest| rest.split('"').next())
            else {
                continue;
            };
            requests += 1;
            assert!(reference.contains(&format!("`{name}`")), "request `{name}` is not named");
        }
    }
    assert!(requests > 15, "{requests}");

    let source = read("src/csi/notice.rs");
    let words = source.split('"').skip(1).step_by(2);
    let is_reason = |word: &&str| {
        word.starts_with(|c: char| c.is_ascii_uppercase()) && word.chars().all(|c| c.is_ascii_alphanumeric())
    };
    let reasons: BTreeSet<&str> = words.filter(is_reason).collect();
    assert!(reasons.len() > 15, "{reasons:?}");
    for reason in reasons {
        assert!(in_table(reason), "`{reason}` is not in the table of Events");
    }
    for file in ["delete", "create", "expand", "modify", "attach", "detach"] {
        let source = read(&format!("src/volume/{file}.rs"));
        for said in source.split("Notice::normal(").chain(source.split("Notice::warning(")).skip(1) {
            let reason = said.strip_prefix('"').and_then(|rest| rest.split('"').next()).unwrap_or_default();
            assert!(!said.starts_with('"') || in_table(reason), "`{reason}` is not in the table of Events");
        }
    }
}

/// What was logged, as JSON lines.
#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Captured {
    fn lines(&self) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().expect("no panic").clone()).expect("text");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

/// The id of the call that a line belongs to.
fn id_of(line: &Value) -> Option<&str> {
    line["spans"].as_array()?.iter().find(|span| span["name"] == "rpc")?["id"].as_str()
}

#[tokio::test]
async fn a_call_is_followed_by_its_id_down_to_the_tasks_of_proxmox_and_no_secret_is_logged() {
    let captured = Captured::default();
    let writer = captured.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter("trace")
        .with_writer(move || writer.clone())
        .json()
        .flatten_event(true)
        .finish();
    let guard = tracing::subscriber::set_default(subscriber);

    let world = World::builtin();
    let secret = world.token(CSI).expect("the token").secret.clone();
    let sim = Sim::in_memory(world).expect("the world can be made");
    let metrics = Metrics::default();
    let token = Token { id: CSI.to_owned(), secret: secret.clone() };
    let region = REGION.parse().expect("a region");
    let client = Client::new(region, in_process(&sim), &token, metrics.clone()).expect("a legal token");
    let operations = Operations::default();
    let settings = Settings { owner: VmId::new(9999).expect("a VMID"), holders: 999_990_000..=999_999_999 };
    let controller =
        ControllerService::new(Volumes::new(vec![client], nodes_of(&sim), settings), operations.clone());
    let (_readiness, told) = watch::channel(Readiness::Ready);
    let server = Server::new(IdentityService::new(DRIVER_NAME, told), operations, metrics.clone())
        .with_controller(controller);
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("csi.sock");
    let stop = CancellationToken::new();
    let (path, stopped) = (socket.clone(), stop.clone());
    let serving = tokio::spawn(async move { server.serve(&path, stopped, Duration::from_secs(5)).await });
    while !socket.exists() {
        tokio::task::yield_now().await;
    }
    let connect = tower::service_fn(move |_| {
        let path = socket.clone();
        async move { UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://localhost");
    let channel = endpoint.connect_with_connector(connect).await.expect("it listens");
    let mut calls = ControllerClient::new(channel.clone());

    let mut request = new_volume("pvc-1", "shared");
    request.secrets.insert("encryption-passphrase".to_owned(), "hush-hush".to_owned());
    let made = calls.create_volume(request).await.expect("a volume").into_inner().volume.expect("one");
    let mut request = publish(&made.volume_id, "worker-101");
    request.secrets.insert("encryption-passphrase".to_owned(), "hush-hush".to_owned());
    calls.controller_publish_volume(request).await.expect("attached");
    let missing = proto::ControllerPublishVolumeRequest::default();
    calls.controller_publish_volume(missing).await.expect_err("fields are missing");
    // A service that is not served, and nothing but the socket beside the socket.
    let groups = proto::group_controller_client::GroupControllerClient::new(channel)
        .create_volume_group_snapshot(proto::CreateVolumeGroupSnapshotRequest::default())
        .await;
    assert_eq!(groups.expect_err("there is none").code(), tonic::Code::Unimplemented);
    let beside: Vec<_> = std::fs::read_dir(directory.path()).expect("a directory").collect();
    assert_eq!(beside.len(), 1, "{beside:?}");
    stop.cancel();
    serving.await.expect("no panic").expect("it ends in order");
    drop(guard);

    let lines = captured.lines();
    let ended = |rpc: &str| {
        let of = |line: &&Value| line["message"] == "call ended" && line["spans"][0]["rpc"] == rpc;
        lines.iter().find(of).unwrap_or_else(|| panic!("no end of {rpc}"))
    };
    let (create, attach) = (ended("CreateVolume"), ended("ControllerPublishVolume"));
    let (create, attach) = (id_of(create).expect("an id"), id_of(attach).expect("an id"));
    assert_ne!(create, attach);
    assert_eq!(lines.iter().filter(|line| line["message"] == "call failed").count(), 2);

    // Each request to Proxmox and each task is logged with the id of the call that it is for.
    let of = |id: &str, message: &str| -> Vec<&Value> {
        lines.iter().filter(|line| line["message"] == message && id_of(line) == Some(id)).collect()
    };
    let asked = |id: &str, what: &str| {
        of(id, "proxmox answered")
            .iter()
            .any(|line| line["request"].as_str().is_some_and(|text| text.starts_with(what)))
    };
    assert!(asked(create, "POST /nodes/pve1/storage/shared/content"));
    assert!(asked(attach, "POST /nodes/pve1/qemu/101/config"));
    assert!(!asked(create, "POST /nodes/pve1/qemu/101/config"));
    let started = of(attach, "proxmox task started");
    let upid = started.first().expect("a task")["upid"].as_str().expect("an id");
    assert!(upid.starts_with("UPID:pve1:") && upid.contains(":qmconfig:101:csi@pve!csi:"), "{upid}");
    assert!(of(attach, "proxmox task ended").iter().any(|line| line["upid"] == upid));
    let requests = lines.iter().filter(|line| line["message"] == "proxmox answered");
    assert!(requests.clone().count() > 5 && requests.clone().all(|line| id_of(line).is_some()));

    // p9: at the highest verbosity, too. The simulator logs what it is sent in the same process.
    let shown = metrics.render();
    for filled in
        ["proxmox_csi_index_age_seconds{region=\"test\"}", "proxmox_csi_vm_queue_length{region=\"test\"} 0"]
    {
        assert!(shown.contains(filled), "{filled}\n{shown}");
    }
    let text = String::from_utf8(captured.0.lock().expect("no panic").clone()).expect("text");
    assert!(!text.contains(&secret) && !text.contains("hush-hush"));
    assert!(!metrics.render().contains(&secret));
}
