//! The simulator's API against answers recorded from a running Proxmox VE 9.2 cluster. The names of tests and comments
//! such as `C24` are those of the recordings.

use axum::body::Body;
use http::Request;
use hyper::ext::ReasonPhrase;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proxmox_csi::sim::clock::Profile;
use proxmox_csi::sim::faults::Fault;
use proxmox_csi::sim::{Options, Sim, World};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use tower::ServiceExt as _;

const WORLD: &str = r#"
nodes: [pve1, pve2]
storages:
- {id: local, content: "images,iso,backup,vztmpl,rootdir,snippets,import", capacity: 3G}
- {id: shd, shared: true, capacity: 100G}
vms:
- {vmid: 100, node: pve1, name: w1, running: false, config: {boot: "order=scsi0;net0", net0: "virtio=BC:24:11:8A:F3:DA", memory: "512"}}
- {vmid: 101, node: pve1, name: w2, running: false}
- {vmid: 102, node: pve1, name: w3}
tokens:
- {id: root@pam!csi, secret: s}
- {id: csi@pve!csi, secret: s}
- {id: csimin@pve!csi, secret: s}
- {id: csivm@pve!csi, secret: s}
- {id: hold@pve!csi, secret: s}
- {id: nobody@pve!tok, secret: s}
- {id: privsep@pve!csi, secret: s, privsep: true}
roles:
  csi: [VM.Audit, VM.Config.Disk, Datastore.Allocate, Datastore.AllocateSpace, Datastore.Audit]
  csimin: [VM.Audit, VM.Config.Disk, Datastore.AllocateSpace, Datastore.Audit]
  vm: [VM.Audit, VM.Config.Disk]
  storage: [Datastore.AllocateSpace, Datastore.Audit]
  holder: [VM.Allocate, VM.Audit, VM.Config.Disk, VM.Config.Options, Datastore.Allocate, Datastore.AllocateSpace, Datastore.Audit]
acl:
- {path: /, who: csi@pve, role: csi}
- {path: /, who: csimin@pve, role: csimin}
- {path: /vms/100, who: csivm@pve, role: vm}
- {path: /storage, who: csivm@pve, role: storage}
- {path: /, who: hold@pve, role: holder}
- {path: /, who: privsep@pve, role: csi}
"#;

const CSI: &str = "csi@pve!csi";
const ROOT: &str = "root@pam!csi";
const NOBODY: &str = "nobody@pve!tok";

/// An answer of the API.
#[derive(Debug, Clone)]
struct Answer {
    status: u16,
    reason: String,
    body: Value,
}

impl Answer {
    fn data(&self) -> &Value {
        &self.body["data"]
    }

    fn keys(&self) -> BTreeSet<&str> {
        self.data().as_object().map(|o| o.keys().map(String::as_str).collect()).unwrap_or_default()
    }

    /// Panics unless the answer is this error, in reason phrase and body.
    fn is_error(&self, status: u16, text: &str) {
        assert_eq!((self.status, self.reason.as_str()), (status, text), "{self:?}");
        assert_eq!(self.body["message"], format!("{text}\n"), "{self:?}");
        assert_eq!(self.body["data"], Value::Null);
    }

    /// Panics unless the answer refuses exactly these parameters.
    fn refuses(&self, errors: &Value) {
        self.is_error(400, "Parameter verification failed.");
        assert_eq!(&self.body["errors"], errors);
    }

    fn is_null(&self) {
        assert_eq!((self.status, self.data()), (200, &Value::Null), "{self:?}");
    }
}

fn start(time: Profile) -> Sim {
    let world = World::from_yaml(WORLD).expect("the test world is well formed");
    Sim::start(world, Options { time, ..Options::default() }).expect("the test world is sound")
}

fn form(pairs: &[(&str, &str)]) -> String {
    let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    pairs.iter().map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect::<Vec<_>>().join("&")
}

async fn ask(sim: &Sim, token: Option<&str>, method: &str, path: &str, pairs: &[(&str, &str)]) -> Answer {
    let in_query = matches!(method, "GET" | "DELETE") && !pairs.is_empty();
    let target =
        if in_query { format!("/api2/json{path}?{}", form(pairs)) } else { format!("/api2/json{path}") };
    let mut request = Request::builder().method(method).uri(target);
    if let Some(token) = token {
        request = request.header("authorization", format!("PVEAPIToken={token}"));
    }
    let body = if in_query || pairs.is_empty() { Body::empty() } else { Body::from(form(pairs)) };
    let request = request
        .header("content-type", "application/x-www-form-urlencoded")
        .body(body)
        .expect("a valid request");
    let response = sim.router().oneshot(request).await.expect("the router cannot fail");
    let status = response.status().as_u16();
    let reason = response
        .extensions()
        .get::<ReasonPhrase>()
        .map_or("OK".to_owned(), |reason| String::from_utf8_lossy(reason.as_bytes()).into_owned());
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.expect("the body is whole");
    let body = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).expect("JSON") };
    Answer { status, reason, body }
}

async fn call(sim: &Sim, user: &str, method: &str, path: &str, pairs: &[(&str, &str)]) -> Answer {
    ask(sim, Some(&format!("{user}=s")), method, path, pairs).await
}

/// Waits for the task a call has started and returns its exit status.
async fn finish(sim: &Sim, started: &Answer) -> String {
    let upid = started.data().as_str().unwrap_or_else(|| panic!("not a task: {started:?}"));
    assert!(upid.starts_with("UPID:pve"), "{upid}");
    sim.wait_task(upid, Duration::from_mins(1)).await.expect("the task ends")
}

async fn log_of(sim: &Sim, user: &str, started: &Answer) -> Vec<String> {
    let upid = started.data().as_str().expect("a task");
    let path = format!("/nodes/pve1/tasks/{}/log", utf8_percent_encode(upid, NON_ALPHANUMERIC));
    let answer = call(sim, user, "GET", &path, &[]).await;
    answer
        .data()
        .as_array()
        .expect("lines")
        .iter()
        .map(|line| line["t"].as_str().unwrap_or_default().to_owned())
        .collect()
}

async fn alloc(sim: &Sim, storage: &str, file: &str, size: &str) -> String {
    let path = format!("/nodes/pve1/storage/{storage}/content");
    let answer = call(sim, CSI, "POST", &path, &[("vmid", "9999"), ("filename", file), ("size", size)]).await;
    answer.data().as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned()
}

const CONTENT: &str = "/nodes/pve1/storage/local/content";
const CONFIG: &str = "/nodes/pve1/qemu/100/config";
const UNLINK: &str = "/nodes/pve1/qemu/100/unlink";
const RESIZE: &str = "/nodes/pve1/qemu/100/resize";
const RUNNING: &str = "/nodes/pve1/qemu/102/config";

#[tokio::test(start_paused = true)]
async fn a01_to_a17_http_and_authentication() {
    let sim = start(Profile::Recorded);
    let answer = call(&sim, ROOT, "GET", "/version", &[]).await;
    assert_eq!(answer.data(), &json!({"release": "9.2", "repoid": "14a22df32fc2a3d1", "version": "9.2.11"}));
    for (token, text) in [
        (None, "No ticket"),
        (Some("csi@pve!csi=wrong"), "Authentication failed!"),
        (Some("csi@pve"), "Authentication failed!"),
        (Some("csi@pve!other=s"), "Authentication failed!"),
    ] {
        let begun = tokio::time::Instant::now();
        let answer = ask(&sim, token, "GET", "/version", &[]).await;
        assert_eq!((answer.status, answer.reason.as_str(), &answer.body), (401, text, &Value::Null));
        assert_eq!(begun.elapsed().as_secs(), 3, "every failure costs three seconds");
    }
    // A13, A14
    let answer = call(&sim, ROOT, "GET", "/nope", &[]).await;
    assert_eq!((answer.status, answer.reason.as_str()), (501, "Method 'GET /nope' not implemented"));
    assert_eq!(answer.body, json!({"data": null, "message": "Method 'GET /nope' not implemented"}));
    assert_eq!(
        call(&sim, ROOT, "DELETE", "/version", &[]).await.reason,
        "Method 'DELETE /version' not implemented"
    );
    assert_eq!(sim.unmodelled().len(), 2);
    // A16, A17
    let bad = [("vmid", "abc"), ("filename", "x"), ("size", "1T"), ("bogus", "1")];
    call(&sim, ROOT, "POST", CONTENT, &bad).await.refuses(&json!({
        "bogus": "property is not defined in schema and the schema does not allow additional properties",
        "size": "value does not match the regex pattern",
        "vmid": "type check ('integer') failed - got 'abc'",
    }));
    call(&sim, ROOT, "POST", CONTENT, &[("vmid", "9999")]).await.refuses(&json!({
        "filename": "property is missing and it is not optional",
        "size": "property is missing and it is not optional",
    }));
    // A08, A09, A22
    call(&sim, CSI, "POST", "/nodes/pve1/qemu/100/status/start", &[])
        .await
        .is_error(403, "Permission check failed (/vms/100, VM.PowerMgmt)");
    call(&sim, NOBODY, "GET", CONFIG, &[])
        .await
        .is_error(403, "Permission check failed (/vms/100, VM.Audit)");
    call(&sim, CSI, "GET", "/nodes/nope/qemu/100/config", &[]).await.is_error(
        500,
        "hostname lookup 'nope' failed - failed to get address info for: nope: Name or service not known",
    );
}

#[tokio::test(start_paused = true)]
async fn a23_a_dead_node_answers_595_after_three_seconds() {
    let sim = start(Profile::Recorded);
    sim.inject(Fault::KillNode { node: "pve2".to_owned(), on: true }).expect("pve2 is there");
    let begun = tokio::time::Instant::now();
    let answer = call(&sim, ROOT, "GET", "/nodes/pve2/storage", &[]).await;
    assert_eq!(
        (answer.status, answer.reason.as_str(), &answer.body),
        (595, "No route to host", &Value::Null)
    );
    assert_eq!(begun.elapsed().as_secs(), 3);
    let nodes = call(&sim, CSI, "GET", "/nodes", &[]).await;
    assert_eq!(nodes.data()[1]["status"], "offline");
    // Its VMs keep their last status for five minutes.
    assert!(sim.move_vm(102, "pve2"));
    let status = async || {
        let answer = call(&sim, CSI, "GET", "/cluster/resources", &[("type", "vm")]).await;
        answer.data()[2]["status"].clone()
    };
    assert_eq!(status().await, "running");
    tokio::time::sleep(Duration::from_secs(301)).await;
    assert_eq!(status().await, "unknown");
}

#[tokio::test(start_paused = true)]
async fn a10_a18_listings_show_what_the_caller_may_see() {
    let sim = start(Profile::None);
    let nodes = call(&sim, NOBODY, "GET", "/nodes", &[]).await;
    let keys: BTreeSet<&str> =
        nodes.data()[0].as_object().expect("an entry").keys().map(String::as_str).collect();
    assert_eq!(keys, BTreeSet::from(["id", "level", "node", "ssl_fingerprint", "status", "type"]));
    assert_eq!(call(&sim, NOBODY, "GET", "/nodes/pve1/storage", &[]).await.data(), &json!([]));
    let resources = call(&sim, NOBODY, "GET", "/cluster/resources", &[("type", "vm")]).await;
    assert_eq!(resources.data(), &json!([]));
    let permissions = call(&sim, CSI, "GET", "/access/permissions", &[]).await;
    let paths = ["/", "/access", "/access/groups", "/nodes", "/pool", "/sdn", "/storage", "/vms"];
    for path in paths {
        assert_eq!(permissions.data()[path]["Datastore.Allocate"], 1, "{path}");
        assert_eq!(permissions.data()[path].as_object().map(serde_json::Map::len), Some(5), "{path}");
    }
    // C00
    call(&sim, "privsep@pve!csi", "GET", "/nodes/pve1/storage/local/status", &[])
        .await
        .is_error(403, "Permission check failed (/storage/local, Datastore.Audit|Datastore.AllocateSpace)");
    // J03, J04
    let vms = call(&sim, CSI, "GET", "/cluster/resources", &[("type", "vm")]).await;
    let keys: BTreeSet<&str> =
        vms.data()[0].as_object().expect("an entry").keys().map(String::as_str).collect();
    let recorded = "disk cpu node type maxcpu netin maxdisk template status memhost diskwrite netout diskread uptime \
                    mem maxmem name vmid id";
    assert_eq!(keys, recorded.split_whitespace().collect());
    let storages = call(&sim, CSI, "GET", "/cluster/resources", &[("type", "storage")]).await;
    assert_eq!(storages.data().as_array().map(Vec::len), Some(4));
    let keys: BTreeSet<&str> =
        storages.data()[0].as_object().expect("an entry").keys().map(String::as_str).collect();
    let recorded = "maxdisk content id type node storage shared disk status plugintype";
    assert_eq!(keys, recorded.split_whitespace().collect());
    // A30, H82, H83
    call(&sim, NOBODY, "GET", "/cluster/nextid", &[("vmid", "100")])
        .await
        .refuses(&json!({"vmid": "VM 100 already exists"}));
    assert_eq!(call(&sim, NOBODY, "GET", "/cluster/nextid", &[("vmid", "9999")]).await.data(), "9999");
    assert_eq!(call(&sim, ROOT, "GET", "/cluster/nextid", &[]).await.data(), "103");
}

#[tokio::test(start_paused = true)]
async fn b04_to_b32_storage_status_and_allocation() {
    let sim = start(Profile::None);
    let status = call(&sim, CSI, "GET", "/nodes/pve1/storage/local/status", &[]).await;
    let recorded = "total enabled active used shared content type avail";
    assert_eq!(status.keys(), recorded.split_whitespace().collect());
    call(&sim, ROOT, "GET", "/nodes/pve1/storage/nope/status", &[])
        .await
        .refuses(&json!({"storage": "No such storage."}));
    assert_eq!(alloc(&sim, "local", "vm-9999-pvc-1.raw", "1G").await, "local:9999/vm-9999-pvc-1.raw");
    let post = async |file: &str, size: &str, more: &[(&str, &str)]| {
        let mut pairs = vec![("vmid", "9999"), ("filename", file), ("size", size)];
        pairs.extend(more);
        call(&sim, CSI, "POST", CONTENT, &pairs).await
    };
    // B12
    post("vm-9999-pvc-1.raw", "1G", &[])
        .await
        .is_error(500, "disk image '/var/lib/vz/images/9999/vm-9999-pvc-1.raw' already exists");
    // B13, B14, B15
    let unparsable = "unable to parse volume filename 'vm-9999-pvc-2'";
    post("vm-9999-pvc-2", "1G", &[]).await.is_error(500, unparsable);
    post("vm-9999-pvc-2", "1G", &[("format", "raw")]).await.is_error(500, unparsable);
    post("vm-9999-pvc-2.raw", "1G", &[("format", "qcow2")])
        .await
        .refuses(&json!({"format": "different storage formats (qcow2 != raw)"}));
    // B17: sparse, so that the storage's size is no limit. B18: absurd.
    assert_eq!(post("vm-9999-pvc-3.raw", "100G", &[]).await.status, 200);
    post("vm-9999-pvc-6.raw", "99999999G", &[]).await.is_error(
        500,
        "unable to create image: qemu-img: /var/lib/vz/images/9999/vm-9999-pvc-6.raw: The image size is too large for \
         file format 'raw'",
    );
    for size in ["1024K", "1T", "1.5G"] {
        post("vm-9999-t.raw", size, &[])
            .await
            .refuses(&json!({"size": "value does not match the regex pattern"}));
    }
    // B27: a plain number counts KiB.
    post("vm-9999-1m.raw", "1025", &[]).await;
    let found = call(&sim, CSI, "GET", &format!("{CONTENT}/local%3A9999%2Fvm-9999-1m.raw"), &[]).await;
    assert_eq!(found.data()["size"], 1_049_600);
    // B31, B32
    call(
        &sim,
        ROOT,
        "POST",
        "/nodes/pve1/storage/nope/content",
        &[("vmid", "9999"), ("filename", "vm-9999-x.raw"), ("size", "1M")],
    )
    .await
    .is_error(500, "storage 'nope' does not exist");
    call(&sim, NOBODY, "POST", CONTENT, &[("vmid", "9999"), ("filename", "vm-9999-n.raw"), ("size", "1M")])
        .await
        .is_error(403, "Permission check failed (/storage/local, Datastore.AllocateSpace)");
}

#[tokio::test(start_paused = true)]
async fn b34_to_b42_volumes_are_listed_and_found() {
    let sim = start(Profile::None);
    alloc(&sim, "local", "vm-9999-a.raw", "1G").await;
    let list = call(&sim, CSI, "GET", CONTENT, &[("vmid", "9999")]).await;
    let recorded = "content volid parent vmid format ctime size used";
    let keys: BTreeSet<&str> =
        list.data()[0].as_object().expect("an entry").keys().map(String::as_str).collect();
    assert_eq!(keys, recorded.split_whitespace().collect());
    assert_eq!(list.data()[0]["volid"], "local:9999/vm-9999-a.raw");
    // C67: a volume the caller may not use is left out without a word.
    assert_eq!(call(&sim, "csivm@pve!csi", "GET", CONTENT, &[("vmid", "9999")]).await.data(), &json!([]));
    // B37 to B39: three ways to write the name.
    for name in ["local%3A9999%2Fvm-9999-a.raw", "local:9999/vm-9999-a.raw", "9999%2Fvm-9999-a.raw"] {
        let found = call(&sim, CSI, "GET", &format!("{CONTENT}/{name}"), &[]).await;
        assert_eq!(
            found.data(),
            &json!({"path": "/var/lib/vz/images/9999/vm-9999-a.raw", "size": 1_073_741_824, "used": 4096, "format": "raw"})
        );
    }
    call(&sim, CSI, "GET", &format!("{CONTENT}/local%3A9999%2Fvm-9999-nope.raw"), &[])
        .await
        .is_error(500, "volume_size_info on 'local:9999/vm-9999-nope.raw' failed - no format");
    call(&sim, CSI, "GET", "/nodes/pve1/storage/shd/content/local%3A9999%2Fvm-9999-a.raw", &[])
        .await
        .refuses(&json!({"volume": "storage ID mismatch (local != shd)\n"}));
    call(&sim, CSI, "GET", &format!("{CONTENT}/local%3Afoo"), &[])
        .await
        .is_error(500, "unable to parse directory volume name 'foo'");
    // A local volume is on one node only, a shared one on both.
    let elsewhere = "/nodes/pve2/storage/local/content/local%3A9999%2Fvm-9999-a.raw";
    assert_eq!(call(&sim, CSI, "GET", elsewhere, &[]).await.status, 500);
    alloc(&sim, "shd", "vm-9999-b.raw", "1G").await;
    let shared = "/nodes/pve2/storage/shd/content/shd%3A9999%2Fvm-9999-b.raw";
    assert_eq!(call(&sim, CSI, "GET", shared, &[]).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn b50_to_b63_deletion_and_its_task() {
    let sim = start(Profile::None);
    alloc(&sim, "local", "vm-9999-a.raw", "1G").await;
    let volume = format!("{CONTENT}/local%3A9999%2Fvm-9999-a.raw");
    call(&sim, NOBODY, "DELETE", &volume, &[])
        .await
        .is_error(403, "Permission check failed (/storage/local, Datastore.Allocate)");
    let task = call(&sim, CSI, "DELETE", &volume, &[]).await;
    assert!(task.data().as_str().is_some_and(|upid| upid.ends_with(":imgdel:9999@local:csi@pve!csi:")));
    assert_eq!(finish(&sim, &task).await, "OK");
    assert_eq!(log_of(&sim, CSI, &task).await, ["Removed volume 'local:9999/vm-9999-a.raw'", "TASK OK"]);
    // B53, B56: deleting what is not there is no error.
    let again = call(&sim, CSI, "DELETE", &volume, &[]).await;
    assert_eq!(finish(&sim, &again).await, "OK");
    call(&sim, CSI, "DELETE", &volume, &[("delay", "5")]).await.is_null();
    // B54
    let upid = task.data().as_str().expect("a task");
    let status = format!("/nodes/pve1/tasks/{}/status", utf8_percent_encode(upid, NON_ALPHANUMERIC));
    let answer = call(&sim, CSI, "GET", &status, &[]).await;
    let recorded = "starttime id tokenid status node pstart user pid exitstatus type upid";
    assert_eq!(answer.keys(), recorded.split_whitespace().collect());
    assert_eq!(answer.data()["user"], "csi@pve");
    // B61, B63, H09
    call(&sim, NOBODY, "GET", &status, &[])
        .await
        .is_error(403, "Permission check failed (/nodes/pve1, Sys.Audit)");
    call(&sim, ROOT, "GET", "/nodes/pve1/tasks/garbage/status", &[])
        .await
        .refuses(&json!({"upid": "unable to parse worker upid"}));
    let elsewhere = status.replace("/nodes/pve1/", "/nodes/pve2/");
    call(&sim, CSI, "GET", &elsewhere, &[]).await.refuses(&json!({"upid": "no such task"}));
    // B64
    let list = call(&sim, ROOT, "GET", "/nodes/pve1/tasks", &[("limit", "1")]).await;
    assert_eq!(list.body["total"], 3);
    let keys: BTreeSet<&str> =
        list.data()[0].as_object().expect("an entry").keys().map(String::as_str).collect();
    let recorded = "tokenid type endtime pid upid id starttime status node pstart user";
    assert_eq!(keys, recorded.split_whitespace().collect());
}

#[tokio::test(start_paused = true)]
async fn c01_to_c17_attaching_to_a_stopped_vm() {
    let sim = start(Profile::None);
    let config = call(&sim, CSI, "GET", CONFIG, &[]).await;
    assert_eq!(config.data()["memory"], "512");
    assert_eq!(config.data()["cores"], 2);
    call(&sim, CSI, "GET", "/nodes/pve1/qemu/555/config", &[])
        .await
        .is_error(500, "Configuration file 'nodes/pve1/qemu-server/555.conf' does not exist");
    let first = alloc(&sim, "local", "vm-9999-pvc-10.raw", "1G").await;
    let second = alloc(&sim, "local", "vm-9999-pvc-11.raw", "1G").await;
    let value = format!("{first},wwn=0x5056432d00000010,serial=pvc10,backup=0,discard=on,iothread=1,ssd=1");
    call(&sim, CSI, "PUT", CONFIG, &[("scsi1", &value)]).await.is_null();
    let config = call(&sim, CSI, "GET", CONFIG, &[]).await;
    assert_eq!(
        config.data()["scsi1"],
        "local:9999/vm-9999-pvc-10.raw,backup=0,discard=on,iothread=1,serial=pvc10,size=1G,ssd=1,wwn=0x5056432d00000010"
    );
    let digest = config.data()["digest"].as_str().expect("a digest").to_owned();
    // C12: the same again changes nothing.
    call(&sim, CSI, "PUT", CONFIG, &[("scsi1", &value)]).await.is_null();
    assert_eq!(call(&sim, CSI, "GET", CONFIG, &[]).await.data()["digest"], digest);
    // C13: an occupied slot is replaced without a word, and the foreign volume is just dropped.
    call(&sim, CSI, "PUT", CONFIG, &[("scsi1", &second)]).await.is_null();
    let vm = sim.vm(100).expect("VM 100");
    assert_eq!(vm.current("scsi1"), Some("local:9999/vm-9999-pvc-11.raw,size=1G"));
    assert_eq!(vm.current("unused0"), None);
    // C15, C16
    let stale = [("scsi2", first.as_str()), ("digest", digest.as_str())];
    call(&sim, CSI, "PUT", CONFIG, &stale)
        .await
        .is_error(500, "checksum mismatch (file change by other user?)");
    let fresh = sim.vm(100).expect("VM 100").conf.digest();
    call(&sim, CSI, "PUT", CONFIG, &[("scsi2", &first), ("digest", &fresh)]).await.is_null();
    // C17, C21: nothing guards a volume.
    call(&sim, CSI, "PUT", CONFIG, &[("scsi3", &first)]).await.is_null();
    call(&sim, CSI, "PUT", "/nodes/pve1/qemu/101/config", &[("scsi1", &first)]).await.is_null();
}

#[tokio::test(start_paused = true)]
async fn c24_to_c38_refused_changes() {
    let sim = start(Profile::None);
    let volume = alloc(&sim, "local", "vm-9999-pvc-12.raw", "1G").await;
    let put = async |pairs: &[(&str, &str)]| call(&sim, CSI, "PUT", CONFIG, pairs).await;
    put(&[("scsi4", "nope:9999/vm-9999-nope.raw")]).await.is_error(500, "storage 'nope' does not exist");
    put(&[("scsi4", "local:bogus")]).await.is_error(500, "unable to parse directory volume name 'bogus'");
    put(&[("scsi31", &volume)]).await.refuses(&json!({
        "scsi31": "property is not defined in schema and the schema does not allow additional properties",
    }));
    put(&[("scsi4", &format!("{volume},wwn=5056432d00000010"))]).await.refuses(&json!({
        "scsi4": "invalid format - format error\nscsi4.wwn: value does not match the regex pattern\n",
    }));
    put(&[("scsi4", &format!("{volume},serial={}", "a".repeat(61)))]).await.refuses(&json!({
        "scsi4": "invalid format - format error\nscsi4.serial: value may only be 60 characters long\n",
    }));
    put(&[("scsi2", "/dev/loop7")]).await.is_error(
        500,
        "Only root can pass arbitrary filesystem paths. at /usr/share/perl5/PVE/Storage.pm line 651.",
    );
    // C31, C33: a missing volume is an error of the task.
    let task = call(&sim, CSI, "POST", CONFIG, &[("scsi6", "local:9999/vm-9999-nope.raw")]).await;
    assert_eq!(finish(&sim, &task).await, "volume 'local:9999/vm-9999-nope.raw' does not exist");
    assert_eq!(
        log_of(&sim, CSI, &task).await,
        [
            "update VM 100: -scsi6 local:9999/vm-9999-nope.raw",
            "TASK ERROR: volume 'local:9999/vm-9999-nope.raw' does not exist",
        ]
    );
    // C34, C35
    call(&sim, CSI, "POST", CONFIG, &[("scsi6", &volume), ("background_delay", "5")]).await.is_null();
    call(&sim, CSI, "POST", CONFIG, &[("scsi7", "local:9999/vm-9999-nope.raw"), ("background_delay", "5")])
        .await
        .is_error(500, "failed to update VM 100: volume 'local:9999/vm-9999-nope.raw' does not exist");
    // C36, C37, C38
    put(&[("delete", "scsi9")]).await.is_null();
    put(&[("delete", "scsi99")]).await.refuses(&json!({"delete": "unknown option 'scsi99'"}));
    put(&[]).await.is_error(500, "no options specified");
    // C60 to C62
    call(&sim, "csimin@pve!csi", "PUT", CONFIG, &[("scsi1", &volume)]).await.is_null();
    call(&sim, "csivm@pve!csi", "PUT", CONFIG, &[("scsi2", &volume)])
        .await
        .is_error(403, "Permission check failed (/vms/9999, VM.Config.Disk)");
    call(&sim, NOBODY, "PUT", CONFIG, &[("scsi2", &volume)]).await.is_error(
        403,
        "Permission check failed (/vms/100, VM.Config.Disk|VM.Config.CDROM|VM.Config.CPU|VM.Config.Memory|\
         VM.Config.Network|VM.Config.HWType|VM.Config.Options|VM.Config.Cloudinit)",
    );
    // Another key than a disk needs another privilege.
    put(&[("description", "x")]).await.is_error(403, "Permission check failed (/vms/100, VM.Config.Options)");
}

#[tokio::test(start_paused = true)]
async fn c40_to_c57_detaching_from_a_stopped_vm() {
    let sim = start(Profile::None);
    let foreign = alloc(&sim, "local", "vm-9999-a.raw", "1G").await;
    call(&sim, CSI, "PUT", CONFIG, &[("scsi1", &foreign)]).await.is_null();
    call(&sim, CSI, "PUT", UNLINK, &[("idlist", "scsi1"), ("force", "1")]).await.is_null();
    call(&sim, CSI, "PUT", UNLINK, &[("idlist", "scsi1")]).await.is_null();
    let vm = sim.vm(100).expect("VM 100");
    assert_eq!((vm.current("scsi1"), vm.current("unused0")), (None, None));
    assert_eq!(
        sim.volumes().iter().filter(|v| v.key.volid() == foreign).count(),
        1,
        "force spares foreign volumes"
    );
    // C50 to C55: an owned volume becomes unused0, and deleting that destroys it.
    let pairs = [("vmid", "100"), ("filename", "vm-100-pvc-x.raw"), ("size", "1M")];
    call(&sim, CSI, "POST", CONTENT, &pairs).await;
    call(&sim, CSI, "PUT", CONFIG, &[("scsi1", "local:100/vm-100-pvc-x.raw")]).await.is_null();
    call(&sim, CSI, "PUT", UNLINK, &[("idlist", "scsi1")]).await.is_null();
    assert_eq!(sim.vm(100).expect("VM 100").current("unused0"), Some("local:100/vm-100-pvc-x.raw"));
    call(&sim, CSI, "PUT", CONFIG, &[("delete", "unused0")]).await.is_null();
    assert_eq!(call(&sim, CSI, "GET", &format!("{CONTENT}/100%2Fvm-100-pvc-x.raw"), &[]).await.status, 500);
    // Protection guards drives from being taken out, not from being put in.
    sim.set_vm_key(100, "protection", Some("1"));
    call(&sim, CSI, "PUT", CONFIG, &[("scsi1", &foreign)]).await.is_null();
    call(&sim, CSI, "PUT", UNLINK, &[("idlist", "scsi1")])
        .await
        .is_error(500, "can't remove drive 'scsi1' - protection mode enabled");
}

#[tokio::test(start_paused = true)]
async fn c70_to_c81_resizing() {
    let sim = start(Profile::None);
    let volume = alloc(&sim, "local", "vm-9999-a.raw", "1G").await;
    call(&sim, CSI, "PUT", CONFIG, &[("scsi1", &volume)]).await.is_null();
    let resize = async |pairs: &[(&str, &str)]| {
        let task = call(&sim, CSI, "PUT", RESIZE, pairs).await;
        let status = finish(&sim, &task).await;
        (status, log_of(&sim, CSI, &task).await)
    };
    let ok = |lines: &[&str]| ("OK".to_owned(), lines.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>());
    assert_eq!(resize(&[("disk", "scsi1"), ("size", "+1G")]).await, ok(&["Image resized.", "TASK OK"]));
    assert_eq!(sim.vm(100).expect("VM 100").current("scsi1"), Some("local:9999/vm-9999-a.raw,size=2G"));
    assert_eq!(resize(&[("disk", "scsi1"), ("size", "2G")]).await, ok(&["TASK OK"]));
    let (status, log) = resize(&[("disk", "scsi1"), ("size", "1G")]).await;
    assert_eq!(status, "shrinking disks is not supported");
    assert_eq!(log, ["TASK ERROR: shrinking disks is not supported"]);
    assert_eq!(resize(&[("disk", "scsi9"), ("size", "5G")]).await.0, "disk 'scsi9' does not exist");
    call(&sim, CSI, "PUT", RESIZE, &[("disk", "scsi1"), ("size", "5X")])
        .await
        .refuses(&json!({"size": "value does not match the regex pattern"}));
    resize(&[("disk", "scsi1"), ("size", "3221225473")]).await;
    assert_eq!(
        sim.vm(100).expect("VM 100").current("scsi1"),
        Some("local:9999/vm-9999-a.raw,size=3221225473")
    );
    let stale = "0000000000000000000000000000000000000000";
    let (status, _) = resize(&[("disk", "scsi1"), ("size", "+1G"), ("digest", stale)]).await;
    assert_eq!(status, "checksum mismatch (file change by other user?)");
    let task =
        call(&sim, CSI, "PUT", "/nodes/pve1/qemu/555/resize", &[("disk", "scsi1"), ("size", "+1G")]).await;
    let missing = "Configuration file 'nodes/pve1/qemu-server/555.conf' does not exist";
    assert_eq!(finish(&sim, &task).await, missing);
}

#[tokio::test(start_paused = true)]
async fn d04_to_d16_locks() {
    let sim = start(Profile::Recorded);
    let volume = alloc(&sim, "local", "vm-9999-a.raw", "1G").await;
    let held = sim.hold_vm_lock(100).await.expect("nobody holds it");
    let timeout = "can't lock file '/var/lock/qemu-server/lock-100.conf' - got timeout";
    let begun = tokio::time::Instant::now();
    call(&sim, CSI, "PUT", CONFIG, &[("scsi2", &volume)]).await.is_error(500, timeout);
    assert_eq!(begun.elapsed().as_secs(), 10);
    let task = call(&sim, CSI, "POST", CONFIG, &[("scsi2", &volume)]).await;
    let running = call(&sim, CSI, "GET", "/nodes/pve1/tasks", &[("source", "active"), ("vmid", "100")]).await;
    assert_eq!(running.data()[0]["upid"], *task.data());
    assert_eq!(call(&sim, CSI, "GET", CONFIG, &[]).await.status, 200, "reads are not held up");
    assert_eq!(finish(&sim, &task).await, timeout);
    drop(held);
    // D10 to D16
    sim.set_vm_key(100, "lock", Some("backup"));
    assert_eq!(call(&sim, CSI, "GET", CONFIG, &[]).await.data()["lock"], "backup");
    for method in ["PUT", "POST"] {
        call(&sim, CSI, method, CONFIG, &[("scsi2", &volume)]).await.is_error(500, "VM is locked (backup)");
    }
    let task = call(&sim, CSI, "PUT", RESIZE, &[("disk", "scsi0"), ("size", "+1G")]).await;
    assert_eq!(finish(&sim, &task).await, "VM is locked (backup)");
    let status = call(&sim, CSI, "GET", "/nodes/pve1/qemu/100/status/current", &[]).await;
    assert_eq!((&status.data()["lock"], &status.data()["qmpstatus"]), (&json!("backup"), &json!("stopped")));
    assert!(!status.keys().contains("blockstat"));
}

/// The entry of a key in `GET pending`.
async fn pending(sim: &Sim, key: &str) -> Option<Value> {
    let answer = call(sim, CSI, "GET", "/nodes/pve1/qemu/102/pending", &[]).await;
    answer.data().as_array().expect("a list").iter().find(|entry| entry["key"] == key).cloned()
}

async fn blockstat(sim: &Sim) -> Option<BTreeSet<String>> {
    let answer = call(sim, CSI, "GET", "/nodes/pve1/qemu/102/status/current", &[]).await;
    Some(answer.data().get("blockstat")?.as_object()?.keys().cloned().collect())
}

#[tokio::test(start_paused = true)]
async fn m02_to_m11_without_hotplug_changes_stay_pending() {
    let sim = start(Profile::None);
    let first = alloc(&sim, "local", "vm-9999-1.raw", "1G").await;
    let second = alloc(&sim, "local", "vm-9999-2.raw", "1G").await;
    call(&sim, CSI, "PUT", RUNNING, &[("scsi1", &first)]).await.is_null();
    assert_eq!(blockstat(&sim).await, Some(BTreeSet::from(["scsi0".to_owned(), "scsi1".to_owned()])));
    sim.set_vm_key(102, "hotplug", Some("0"));
    call(&sim, CSI, "PUT", RUNNING, &[("scsi5", &second)]).await.is_null();
    let merged = call(&sim, CSI, "GET", RUNNING, &[]).await;
    assert_eq!(merged.data()["scsi5"], "local:9999/vm-9999-2.raw,size=1G", "looks attached");
    let current = call(&sim, CSI, "GET", RUNNING, &[("current", "1")]).await;
    assert!(!current.keys().contains("scsi5"));
    assert_eq!(
        pending(&sim, "scsi5").await,
        Some(json!({"key": "scsi5", "pending": "local:9999/vm-9999-2.raw,size=1G"}))
    );
    // M06: unlinking what is only pending.
    call(&sim, CSI, "PUT", "/nodes/pve1/qemu/102/unlink", &[("idlist", "scsi5")]).await.is_null();
    assert_eq!(pending(&sim, "scsi5").await, None);
    // M08: the disk stays, and the config looks as if it had gone.
    call(&sim, CSI, "PUT", "/nodes/pve1/qemu/102/unlink", &[("idlist", "scsi1")]).await.is_null();
    assert!(!call(&sim, CSI, "GET", RUNNING, &[]).await.keys().contains("scsi1"));
    assert_eq!(
        pending(&sim, "scsi1").await,
        Some(json!({"key": "scsi1", "value": "local:9999/vm-9999-1.raw,size=1G", "delete": 1}))
    );
    assert!(blockstat(&sim).await.is_some_and(|slots| slots.contains("scsi1")));
    // M11
    call(&sim, CSI, "PUT", RUNNING, &[("revert", "scsi1")]).await.is_null();
    assert_eq!(
        pending(&sim, "scsi1").await,
        Some(json!({"key": "scsi1", "value": "local:9999/vm-9999-1.raw,size=1G"}))
    );
    let digest = pending(&sim, "digest").await.expect("the digest is in the list");
    assert_eq!(digest["value"], sim.vm(102).expect("VM 102").conf.digest());
}

#[tokio::test(start_paused = true)]
async fn m20_to_m31_a_hung_qemu() {
    let sim = start(Profile::Recorded);
    let first = alloc(&sim, "local", "vm-9999-1.raw", "1G").await;
    let second = alloc(&sim, "local", "vm-9999-2.raw", "1G").await;
    call(&sim, CSI, "PUT", RUNNING, &[("scsi1", &first)]).await.is_null();
    sim.inject(Fault::HangQemu { vmid: 102, on: true }).expect("VM 102 is there");
    let begun = tokio::time::Instant::now();
    call(&sim, CSI, "PUT", RUNNING, &[("scsi6", &second)]).await.refuses(&json!({
        "scsi6": "hotplug problem - VM 102 qmp command 'query-pci' failed - got timeout\n",
    }));
    assert_eq!(begun.elapsed().as_secs(), 5);
    assert!(pending(&sim, "scsi6").await.is_some_and(|entry| entry.get("pending").is_some()));
    let begun = tokio::time::Instant::now();
    assert_eq!(blockstat(&sim).await, None);
    assert_eq!(begun.elapsed().as_secs(), 3);
    // M26: an unrelated change does not retry it.
    call(&sim, ROOT, "PUT", RUNNING, &[("description", "x")]).await.is_null();
    sim.inject(Fault::HangQemu { vmid: 102, on: false }).expect("VM 102 is there");
    assert!(pending(&sim, "scsi6").await.is_some_and(|entry| entry.get("value").is_none()));
    // M29: the same again does.
    call(&sim, CSI, "PUT", RUNNING, &[("scsi6", &second)]).await.is_null();
    assert_eq!(
        pending(&sim, "scsi6").await,
        Some(json!({"key": "scsi6", "value": "local:9999/vm-9999-2.raw,size=1G"}))
    );
    assert!(blockstat(&sim).await.is_some_and(|slots| slots.contains("scsi6")));
}

#[tokio::test(start_paused = true)]
async fn f25_to_f39_a_guest_that_does_not_let_go() {
    let sim = start(Profile::Recorded);
    let volume = alloc(&sim, "local", "vm-9999-3.raw", "1G").await;
    call(&sim, CSI, "PUT", RUNNING, &[("scsi3", &volume)]).await.is_null();
    sim.inject(Fault::HangUnplug { vmid: 102, on: true }).expect("VM 102 is there");
    let begun = tokio::time::Instant::now();
    let text = "hotplug problem - error on hot-unplugging device 'virtioscsi3' - still busy in guest?\n";
    call(&sim, CSI, "PUT", "/nodes/pve1/qemu/102/unlink", &[("idlist", "scsi3")])
        .await
        .refuses(&json!({ "scsi3": text }));
    assert_eq!(begun.elapsed().as_secs(), 17);
    assert_eq!(pending(&sim, "scsi3").await.map(|entry| entry["delete"].clone()), Some(json!(1)));
    assert!(blockstat(&sim).await.is_some_and(|slots| !slots.contains("scsi3")), "the disk itself is gone");
    // F34
    call(&sim, CSI, "PUT", "/nodes/pve1/qemu/102/unlink", &[("idlist", "scsi3")]).await.is_null();
    assert_eq!(pending(&sim, "scsi3").await, None);
    // As a task, the exception shows its code.
    call(&sim, CSI, "PUT", RUNNING, &[("scsi4", &volume)]).await.is_null();
    let task = call(&sim, CSI, "POST", RUNNING, &[("delete", "scsi4")]).await;
    assert_eq!(
        finish(&sim, &task).await,
        "400 Parameter verification failed. scsi4: hotplug problem - error on hot-unplugging device 'virtioscsi4' - \
         still busy in guest?"
    );
}

#[tokio::test(start_paused = true)]
async fn f28_an_occupied_slot_of_a_running_vm_is_replaced() {
    let sim = start(Profile::None);
    let first = alloc(&sim, "local", "vm-9999-1.raw", "1G").await;
    let second = alloc(&sim, "local", "vm-9999-2.raw", "2G").await;
    call(&sim, CSI, "PUT", RUNNING, &[("scsi1", &first)]).await.is_null();
    call(&sim, CSI, "PUT", RUNNING, &[("scsi1", &second)]).await.is_null();
    let disks = sim.vm(102).expect("VM 102").guest_disks();
    assert_eq!(
        disks.iter().find(|disk| disk.slot == 1).map(|disk| disk.volume.volid()),
        Some(second.clone())
    );
    // F19, F20: an option that cannot be changed live stays pending.
    call(&sim, CSI, "PUT", RUNNING, &[("scsi1", &format!("{second},discard=on"))]).await.is_null();
    let entry = pending(&sim, "scsi1").await.expect("scsi1 is there");
    assert_eq!(entry["pending"], "local:9999/vm-9999-2.raw,discard=on,size=2G");
    assert_eq!(entry["value"], "local:9999/vm-9999-2.raw,size=2G");
}

/// Keys are written one by one: those before the bad one stay pending, and nothing is plugged.
#[tokio::test(start_paused = true)]
async fn a_call_with_one_bad_key_leaves_others_pending() {
    let sim = start(Profile::Recorded);
    let first = alloc(&sim, "local", "vm-9999-1.raw", "1G").await;
    let third = alloc(&sim, "local", "vm-9999-3.raw", "1G").await;
    let pairs =
        [("scsi1", first.as_str()), ("scsi2", "local:9999/vm-9999-nope.raw"), ("scsi3", third.as_str())];
    call(&sim, CSI, "PUT", RUNNING, &pairs)
        .await
        .is_error(500, "volume 'local:9999/vm-9999-nope.raw' does not exist");
    assert!(pending(&sim, "scsi1").await.is_some_and(|entry| entry.get("value").is_none()));
    assert_eq!(blockstat(&sim).await, Some(BTreeSet::from(["scsi0".to_owned()])));
    // Deleting and setting one slot, and unplugging several, one after another.
    call(&sim, CSI, "PUT", RUNNING, &[("delete", "scsi1"), ("scsi1", &first)])
        .await
        .refuses(&json!({"delete": "you can't use '-scsi1' and -delete scsi1' at the same time"}));
    call(&sim, CSI, "PUT", RUNNING, &[("scsi1", &first), ("scsi3", &third)]).await.is_null();
    let begun = tokio::time::Instant::now();
    call(&sim, CSI, "PUT", RUNNING, &[("delete", "scsi1,scsi3,scsi9")]).await.is_null();
    assert_eq!(begun.elapsed().as_secs(), 4);
    assert!(!sim.vm(102).expect("VM 102").conf.has_pending());
}

#[tokio::test(start_paused = true)]
async fn p13_the_boot_disk_of_a_running_vm_stays() {
    let sim = start(Profile::None);
    call(&sim, CSI, "PUT", "/nodes/pve1/qemu/102/unlink", &[("idlist", "scsi0")])
        .await
        .refuses(&json!({"scsi0": "hotplug problem - can't unplug bootdisk 'scsi0'\n"}));
    assert_eq!(pending(&sim, "scsi0").await.map(|entry| entry["delete"].clone()), Some(json!(1)));
    assert_eq!(pending(&sim, "boot").await.map(|entry| entry["pending"].clone()), Some(json!(" ")));
    call(&sim, CSI, "PUT", RUNNING, &[("revert", "scsi0,boot")]).await.is_null();
    assert!(!sim.vm(102).expect("VM 102").conf.has_pending());
    // P16
    call(&sim, ROOT, "DELETE", "/nodes/pve1/qemu/102", &[])
        .await
        .is_error(500, "VM 102 is running - destroy failed");
}

#[tokio::test(start_paused = true)]
async fn m41_a_volume_in_use_is_deleted_and_the_vm_cannot_start_again() {
    let sim = start(Profile::None);
    let volume = alloc(&sim, "local", "vm-9999-1.raw", "1G").await;
    call(&sim, CSI, "PUT", RUNNING, &[("scsi7", &volume)]).await.is_null();
    call(&sim, CSI, "DELETE", &format!("{CONTENT}/local%3A9999%2Fvm-9999-1.raw"), &[("delay", "5")])
        .await
        .is_null();
    assert!(sim.stop_vm(102).await);
    let task = call(&sim, ROOT, "POST", "/nodes/pve1/qemu/102/status/start", &[]).await;
    assert_eq!(finish(&sim, &task).await, "volume 'local:9999/vm-9999-1.raw' does not exist");
    call(&sim, CSI, "PUT", "/nodes/pve1/qemu/102/unlink", &[("idlist", "scsi7")]).await.is_null();
    let task = call(&sim, ROOT, "POST", "/nodes/pve1/qemu/102/status/start", &[]).await;
    assert_eq!(finish(&sim, &task).await, "OK");
    let task = call(&sim, ROOT, "POST", "/nodes/pve1/qemu/102/status/start", &[]).await;
    assert_eq!(finish(&sim, &task).await, "VM 102 already running");
}

#[tokio::test(start_paused = true)]
async fn h_e1_and_h_e4_a_holder_grows_a_volume() {
    let sim = start(Profile::Recorded);
    let hold = "hold@pve!csi";
    call(&sim, CSI, "POST", "/nodes/pve1/qemu", &[("vmid", "9100")])
        .await
        .is_error(403, "Permission check failed");
    call(&sim, hold, "POST", "/nodes/pve1/qemu", &[("vmid", "9100"), ("memory", "16")])
        .await
        .is_error(403, "Permission check failed (/vms/9100, VM.Config.Memory)");
    let task =
        call(&sim, hold, "POST", "/nodes/pve1/qemu", &[("vmid", "9100"), ("name", "csi-holder")]).await;
    assert_eq!(finish(&sim, &task).await, "OK");
    call(&sim, hold, "POST", "/nodes/pve1/qemu", &[("vmid", "9100")])
        .await
        .is_error(500, "unable to create VM 9100 - VM 9100 already exists on node 'pve1'");
    let volume = alloc(&sim, "local", "vm-9999-pvc-e1.raw", "64M").await;
    let holder = "/nodes/pve1/qemu/9100";
    call(&sim, hold, "PUT", &format!("{holder}/config"), &[("scsi1", &format!("{volume},backup=0"))])
        .await
        .is_null();
    // The trap: VM 102 runs the same volume and does not notice.
    call(&sim, CSI, "PUT", RUNNING, &[("scsi1", &volume)]).await.is_null();
    let task =
        call(&sim, hold, "PUT", &format!("{holder}/resize"), &[("disk", "scsi1"), ("size", "128M")]).await;
    assert_eq!(finish(&sim, &task).await, "OK");
    call(&sim, hold, "PUT", &format!("{holder}/unlink"), &[("idlist", "scsi1")]).await.is_null();
    assert_eq!(sim.vm(9100).expect("the holder").current("unused0"), None);
    let in_102 =
        |sim: &Sim| sim.vm(102).expect("VM 102").guest_disks().iter().find(|d| d.slot == 1).map(|d| d.size);
    assert_eq!(in_102(&sim), Some(64 << 20));
    let resize = "/nodes/pve1/qemu/102/resize";
    let task = call(&sim, CSI, "PUT", resize, &[("disk", "scsi1"), ("size", "128M")]).await;
    assert_eq!(finish(&sim, &task).await, "OK");
    assert_eq!(in_102(&sim), Some(64 << 20), "OK, and nothing was done");
    let task = call(&sim, CSI, "PUT", resize, &[("disk", "scsi1"), ("size", "132M")]).await;
    assert_eq!(finish(&sim, &task).await, "OK");
    assert_eq!(in_102(&sim), Some(132 << 20));
    let task = call(&sim, hold, "DELETE", holder, &[]).await;
    assert_eq!(finish(&sim, &task).await, "OK");
    assert!(sim.vm(9100).is_none());
    // E66
    call(&sim, ROOT, "DELETE", holder, &[])
        .await
        .is_error(500, "Configuration file 'nodes/pve1/qemu-server/9100.conf' does not exist");
}

#[tokio::test(start_paused = true)]
async fn d21_a_raw_disk_makes_a_snapshot_of_the_vm_impossible() {
    let sim = start(Profile::None);
    let task = call(&sim, ROOT, "POST", "/nodes/pve1/qemu/101/snapshot", &[("snapname", "s1")]).await;
    assert_eq!(finish(&sim, &task).await, "snapshot feature is not available");
    let list = call(&sim, CSI, "GET", "/nodes/pve1/qemu/101/snapshot", &[]).await;
    assert_eq!(list.data()[0]["name"], "current");
    assert_eq!(list.data()[0]["digest"], sim.vm(101).expect("VM 101").conf.digest());
}

#[tokio::test(start_paused = true)]
async fn faults_hit_the_requests_they_name() {
    let sim = start(Profile::None);
    let post = async |fault: Value| {
        let request =
            Request::post("/_sim/faults").body(Body::from(fault.to_string())).expect("a valid request");
        sim.router().oneshot(request).await.expect("the router cannot fail").status().as_u16()
    };
    assert_eq!(post(json!({"fault": "refuse", "path": "/version", "status": 500, "text": "no"})).await, 200);
    call(&sim, CSI, "GET", "/version", &[]).await.is_error(500, "no");
    assert_eq!(call(&sim, CSI, "GET", "/version", &[]).await.status, 200);
    assert_eq!(post(json!({"fault": "nonsense"})).await, 400);
    assert_eq!(post(json!({"fault": "hang_qemu", "vmid": 7})).await, 400);

    // A lost answer: the work was done. A lost request: it was not.
    post(json!([{"fault": "lose_answer", "method": "POST"}])).await;
    let request = |file: &str| {
        Request::post(format!("/api2/json{CONTENT}"))
            .header("authorization", "PVEAPIToken=csi@pve!csi=s")
            .body(Body::from(format!("vmid=9999&filename={file}&size=1M")))
            .expect("a valid request")
    };
    assert!(sim.service().oneshot(request("vm-9999-a.raw")).await.is_err());
    post(json!({"fault": "lose_request", "method": "POST", "path": "/content"})).await;
    assert!(sim.service().oneshot(request("vm-9999-b.raw")).await.is_err());
    let names: Vec<String> = sim.volumes().into_iter().map(|v| v.key.volid()).collect();
    assert!(names.contains(&"local:9999/vm-9999-a.raw".to_owned()));
    assert!(!names.contains(&"local:9999/vm-9999-b.raw".to_owned()));

    // A failed task, a full storage, an expired token.
    post(json!({"fault": "fail_task", "worker": "qmconfig", "text": "unexpected status"})).await;
    let task = call(&sim, CSI, "POST", CONFIG, &[("scsi1", "local:9999/vm-9999-a.raw")]).await;
    assert_eq!(finish(&sim, &task).await, "unexpected status");
    assert_eq!(sim.vm(100).expect("VM 100").current("scsi1"), None);
    post(json!({"fault": "fill_storage", "storage": "local"})).await;
    let status = call(&sim, CSI, "GET", "/nodes/pve1/storage/local/status", &[]).await;
    assert_eq!(status.data()["avail"], 0);
    let full =
        call(&sim, CSI, "POST", CONTENT, &[("vmid", "9999"), ("filename", "vm-9999-c.raw"), ("size", "1M")])
            .await;
    assert!(full.reason.ends_with("No space left on device"), "{full:?}");
    post(json!({"fault": "expire_token", "token": CSI})).await;
    assert_eq!(call(&sim, CSI, "GET", "/version", &[]).await.status, 401);
    sim.clear_faults();
    assert_eq!(call(&sim, CSI, "GET", "/version", &[]).await.status, 200);
    assert_eq!(sim.log().iter().filter(|entry| entry.status == 0).count(), 2);
}

/// Three slow calls keep the workers of a node busy, and every call that needs one waits.
#[tokio::test(start_paused = true)]
async fn h_e7_three_waiting_calls_block_the_node() {
    let sim = start(Profile::Recorded);
    let held = sim.hold_vm_lock(100).await.expect("nobody holds it");
    let volume = alloc(&sim, "local", "vm-9999-a.raw", "1G").await;
    let waiting: Vec<_> = (1..=3)
        .map(|slot| {
            let (sim, volume) = (sim.clone(), volume.clone());
            tokio::spawn(async move {
                call(&sim, CSI, "PUT", CONFIG, &[(&format!("scsi{slot}"), volume.as_str())]).await
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = tokio::time::Instant::now();
    call(&sim, CSI, "GET", "/nodes/pve1/qemu/100/status/current", &[]).await;
    assert!(begun.elapsed() > Duration::from_secs(8), "{:?}", begun.elapsed());
    let begun = tokio::time::Instant::now();
    call(&sim, CSI, "GET", "/nodes/pve1/qemu/100/pending", &[]).await;
    assert!(begun.elapsed() < Duration::from_millis(100), "reads in pveproxy stay fast");
    drop(held);
    for call in waiting {
        assert_eq!(call.await.expect("the call ends").status, 500);
    }
}
