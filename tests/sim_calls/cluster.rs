//! A simulated cluster whose volumes are files, asked as root.

use axum::body::Body;
use http::Request;
use hyper::ext::ReasonPhrase;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proxmox_csi::sim::clock::Profile;
use proxmox_csi::sim::{Options, Sim, World};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;
use tower::ServiceExt as _;

const WORLD: &str = r#"
nodes: [pve1, pve2]
storages:
- {id: local, content: "images,iso,snippets"}
- {id: data}
- {id: btr, type: btrfs}
- {id: chain, properties: {snapshot-as-volume-chain: "1"}}
- {id: thin, type: lvmthin, capacity: 20G, properties: {vgname: vg0, thinpool: thin}}
- {id: thick, type: lvm, capacity: 2G, properties: {vgname: vg1}}
- {id: safe, type: lvm, capacity: 2G, properties: {vgname: vg2, saferemove: "1"}}
vms:
- {vmid: 100, node: pve1, name: w1, running: false, guest: false, config: {scsi0: "", boot: " "}}
- {vmid: 101, node: pve1, name: w2, running: false, guest: false, config: {scsi0: "", boot: " "}}
- {vmid: 102, node: pve1, name: w3, guest: false, config: {scsi0: "", boot: " "}}
tokens:
- {id: root@pam!t, secret: s}
"#;

/// An answer of the API.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub reason: String,
    pub body: Value,
}

/// The cluster; its files go with it.
pub struct Cluster {
    pub sim: Sim,
    files: TempDir,
}

impl Cluster {
    pub fn new() -> Self {
        Self::of(WORLD)
    }

    /// The same with a ZFS and a Ceph pool.
    pub fn wide() -> Self {
        let more = "- {id: tank, type: zfspool}\n- {id: ceph, type: rbd}\nvms:";
        Self::of(&WORLD.replace("vms:", more))
    }

    pub fn of(world: &str) -> Self {
        let world = World::from_yaml(world).expect("the test world is well formed");
        let files = tempfile::tempdir().expect("a directory");
        let state = Some(files.path().to_owned());
        let options = Options { time: Profile::None, state, ..Options::default() };
        Self { sim: Sim::start(world, options).expect("the test world is sound"), files }
    }

    /// Sends a call and returns its answer, whatever it is.
    pub async fn ask(&self, method: &str, path: &str, form: &[(&str, &str)]) -> Answer {
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let pairs: Vec<String> = form.iter().map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect();
        let (mut target, mut body) = (format!("/api2/json{path}"), pairs.join("&"));
        if matches!(method, "GET" | "DELETE") && !form.is_empty() {
            target = format!("{target}?{body}");
            body.clear();
        }
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header("authorization", "PVEAPIToken=root@pam!t=s")
            .header("content-type", "application/x-www-form-urlencoded")
            .body(Body::from(body))
            .expect("a request");
        let response = self.sim.router().oneshot(request).await.expect("the router cannot fail");
        let reason = response.extensions().get::<ReasonPhrase>();
        let reason = reason.map(|r| String::from_utf8_lossy(r.as_bytes()).into_owned()).unwrap_or_default();
        let status = response.status().as_u16();
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("a body");
        Answer { status, reason, body: serde_json::from_slice(&bytes).unwrap_or(Value::Null) }
    }

    /// Sends a call that must succeed and returns its data; a task is awaited and must end well.
    pub async fn done(&self, method: &str, path: &str, form: &[(&str, &str)]) -> Value {
        let answer = self.ask(method, path, form).await;
        assert_eq!(answer.status, 200, "{method} {path} {form:?}: {answer:?}");
        let data = answer.body["data"].clone();
        if let Some(upid) = data.as_str().filter(|text| text.starts_with("UPID:")) {
            let status = self.sim.wait_task(upid, Duration::from_mins(1)).await;
            assert_eq!(status.as_deref(), Some("OK"), "{method} {path} {form:?}");
        }
        data
    }

    /// Sends a call that must fail, at once or in its task, and returns the text.
    pub async fn fails(&self, method: &str, path: &str, form: &[(&str, &str)]) -> String {
        let answer = self.ask(method, path, form).await;
        if answer.status != 200 {
            return match answer.body["errors"].as_object() {
                Some(errors) => Value::from(errors.clone()).to_string(),
                None => answer.reason,
            };
        }
        let upid = answer.body["data"].as_str().filter(|text| text.starts_with("UPID:"));
        let upid = upid.unwrap_or_else(|| panic!("{method} {path} {form:?} succeeds: {answer:?}"));
        let status = self.sim.wait_task(upid, Duration::from_mins(1)).await.expect("the task ends");
        assert_ne!(status, "OK", "{method} {path} {form:?}");
        status
    }

    /// Sends a call that may fail, and waits for its task.
    pub async fn try_to(&self, method: &str, path: &str, form: &[(&str, &str)]) {
        let answer = self.ask(method, path, form).await;
        assert_ne!(answer.status, 501, "{method} {path} {form:?}: {answer:?}");
        if let Some(upid) = answer.body["data"].as_str().filter(|text| text.starts_with("UPID:")) {
            self.sim.wait_task(upid, Duration::from_mins(2)).await.expect("the task ends");
        }
    }

    /// All volumes there are.
    pub fn volids(&self) -> Vec<String> {
        self.sim.volumes().iter().map(|volume| volume.key.volid()).collect()
    }

    /// Allocates a volume on pve1 for the owner 9999.
    pub async fn alloc(&self, storage: &str, name: &str, size: &str) -> String {
        let path = format!("/nodes/pve1/storage/{storage}/content");
        let data = self.done("POST", &path, &[("filename", name), ("vmid", "9999"), ("size", size)]).await;
        data.as_str().expect("a volume id").to_owned()
    }

    /// Changes the config of a VM on pve1.
    pub async fn set(&self, vmid: u32, form: &[(&str, &str)]) {
        self.done("PUT", &format!("/nodes/pve1/qemu/{vmid}/config"), form).await;
    }

    /// Calls below a VM on pve1 that must succeed.
    pub async fn vm(&self, method: &str, vmid: u32, rest: &str, form: &[(&str, &str)]) {
        self.done(method, &format!("/nodes/pve1/qemu/{vmid}{rest}"), form).await;
    }

    /// The volume in a slot of a VM.
    pub fn slot(&self, vmid: u32, slot: &str) -> String {
        let vm = self.sim.vm(vmid).expect("a VM");
        let value = vm.current(slot).unwrap_or_else(|| panic!("VM {vmid} has no {slot}"));
        value.split(',').next().expect("a volume").to_owned()
    }

    /// The file of a volume.
    pub fn image(&self, volid: &str) -> PathBuf {
        let dump = self.sim.dump();
        let volumes = dump["volumes"].as_array().expect("volumes");
        let found = volumes.iter().find(|volume| volume["volid"] == volid);
        let found = found.unwrap_or_else(|| panic!("no volume {volid}"));
        PathBuf::from(found["image"].as_str().expect("a volume has a file"))
    }

    /// Writes into a volume.
    pub fn write(&self, volid: &str, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.image(volid)).expect("the file is there");
        file.write_all_at(bytes, at).expect("a write");
    }

    /// Reads from a volume.
    pub fn read(&self, volid: &str, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let file = File::open(self.image(volid)).expect("the file is there");
        file.read_exact_at(&mut bytes, at).expect("a read");
        bytes
    }

    /// How many files the storage keeps for its volumes, their snapshots included.
    pub fn files(&self) -> usize {
        fn count(directory: &std::path::Path) -> usize {
            let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
            let entries = entries.map(|entry| entry.expect("an entry").path());
            entries.map(|path| if path.is_dir() { count(&path) } else { 1 }).sum()
        }
        count(&self.files.path().join("storage"))
    }
}
