//! `pve-sim serve` for others: a cluster that outlives its process, nodes with addresses of their own, logins.

use proxmox_csi::pve::transport::{HttpsOptions, Transport, TransportError, Trust, https};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tower::ServiceExt as _;

const WORLD: &str = "
nodes: [pve1, pve2]
storages:
- {id: local, content: 'images,iso'}
- {id: shared, shared: true}
vms:
- {vmid: 100, node: pve1, name: w1, config: {agent: '1'}}
- {vmid: 101, node: pve2, name: w2, running: false}
tokens:
- {id: root@pam!t1, secret: s}
users: {ann@pve: secret-of-ann, root@pam: secret-of-root}
groups: {admins: [ann@pve]}
acl: [{path: /, who: '@admins', role: PVEVMAdmin}]
";

/// A running `pve-sim`, killed with the test, and what it said.
struct Running {
    child: Child,
    said: Value,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Who asks.
#[derive(Clone, Copy)]
enum As<'a> {
    Nobody,
    Token,
    Ticket(&'a str, Option<&'a str>),
}

struct Answer {
    status: u16,
    data: Value,
}

impl Running {
    fn start(directory: &Path, more: &[&str]) -> Self {
        let world = directory.join("world.yaml");
        if !world.exists() {
            std::fs::write(&world, WORLD).expect("the world is written");
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_pve-sim"))
            .args(["serve", "--time", "none", "--no-devices", "--world"])
            .arg(&world)
            .arg("--state")
            .arg(directory.join("state"))
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("pve-sim starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it was asked for")).read_line(&mut line).expect("text");
        let said = serde_json::from_str(&line).unwrap_or(Value::Null);
        Self { child, said }
    }

    /// What it complained of before it ended.
    fn complaint(mut self) -> String {
        let stderr = self.child.stderr.take().expect("it was asked for");
        assert!(!self.child.wait().expect("it ends").success());
        BufReader::new(stderr).lines().map_while(Result::ok).collect::<Vec<_>>().join("\n")
    }

    fn transport(&self, url: &str) -> Transport {
        let ca = std::fs::read(self.said["ca"].as_str().expect("a path")).expect("the certificate");
        https(&HttpsOptions { url: url.to_owned(), trust: Trust::Ca(ca) }).expect("a transport")
    }

    async fn call(&self, who: As<'_>, method: &str, path: &str, form: &str) -> Answer {
        let url = self.said["url"].as_str().expect("a URL").to_owned();
        self.call_at(&url, who, method, path, form).await.expect("an answer")
    }

    async fn call_at(
        &self,
        url: &str,
        who: As<'_>,
        method: &str,
        path: &str,
        form: &str,
    ) -> Result<Answer, TransportError> {
        let mut request = http::Request::builder().method(method).uri(format!("/api2/json{path}"));
        match who {
            As::Nobody => {}
            As::Token => request = request.header("authorization", "PVEAPIToken=root@pam!t1=s"),
            As::Ticket(ticket, csrf) => {
                request = request.header("cookie", format!("PVEAuthCookie={ticket}"));
                request = csrf
                    .into_iter()
                    .fold(request, |request, csrf| request.header("CSRFPreventionToken", csrf));
            }
        }
        let request = request
            .header("content-type", "application/x-www-form-urlencoded")
            .body(form.to_owned().into())
            .expect("a request");
        let response = self.transport(url).oneshot(request).await?;
        let body: Value = serde_json::from_slice(response.body()).unwrap_or(Value::Null);
        Ok(Answer { status: response.status().as_u16(), data: body["data"].clone() })
    }

    async fn fault(&self, fault: Value) {
        let request = http::Request::post("/_sim/faults").body(fault.to_string().into()).expect("a request");
        let url = self.said["url"].as_str().expect("a URL");
        let answer = self.transport(url).oneshot(request).await.expect("an answer");
        assert_eq!(answer.status(), 200, "{:?}", answer.body());
    }

    async fn task(&self, upid: &Value) -> String {
        let upid = upid.as_str().expect("a task").to_owned();
        let node = upid.split(':').nth(1).expect("a node").to_owned();
        for _ in 0..200 {
            let answer = self.call(As::Token, "GET", &format!("/nodes/{node}/tasks/{upid}/status"), "").await;
            if let Some(status) = answer.data["exitstatus"].as_str() {
                return status.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{upid} does not end");
    }
}

fn written(value: &str) -> String {
    percent_encoding::utf8_percent_encode(value, percent_encoding::NON_ALPHANUMERIC).to_string()
}

#[tokio::test]
async fn a_cluster_goes_on_where_a_killed_process_has_left_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut first = Running::start(directory.path(), &[]);
    let ca = std::fs::read_to_string(first.said["ca"].as_str().expect("a path")).expect("a certificate");

    let form = "vmid=9999&filename=vm-9999-a.raw&size=1G";
    assert_eq!(first.call(As::Token, "POST", "/nodes/pve1/storage/local/content", form).await.status, 200);
    let attach = format!("scsi1={}", written("local:9999/vm-9999-a.raw"));
    assert_eq!(first.call(As::Token, "PUT", "/nodes/pve1/qemu/100/config", &attach).await.status, 200);
    let done = first.call(As::Token, "POST", "/nodes/pve1/qemu/100/config", "description=kept").await.data;
    assert_eq!(first.task(&done).await, "OK");
    assert_eq!(
        first.call(As::Token, "POST", "/access/users", "userid=bob@pve&password=secret-of-bob").await.status,
        200
    );
    let acl = "path=/vms/100&users=bob@pve&roles=PVEVMUser";
    assert_eq!(first.call(As::Token, "PUT", "/access/acl", acl).await.status, 200);
    let login = "username=bob@pve&password=secret-of-bob";
    let login = first.call(As::Nobody, "POST", "/access/ticket", login).await.data;
    let ticket = login["ticket"].as_str().expect("a ticket").to_owned();
    let made = first.call(As::Token, "POST", "/access/users/bob@pve/token/t2", "privsep=0").await.data;
    first.fault(json!({ "fault": "delay_task", "worker": "qmconfig", "ms": 600_000 })).await;
    let slow = first.call(As::Token, "POST", "/nodes/pve1/qemu/100/config", "description=never").await.data;
    // Behind the API's back: QEMU has lost what its config has.
    first.fault(json!({ "fault": "drift", "vmid": 100, "slot": "scsi0" })).await;
    first.child.kill().expect("it runs");
    first.child.wait().expect("it ends");

    let second = Running::start(directory.path(), &[]);
    assert_eq!(
        std::fs::read_to_string(second.said["ca"].as_str().expect("a path")).expect("a certificate"),
        ca
    );
    assert_eq!(second.task(&done).await, "OK");
    assert_eq!(second.task(&slow).await, "unexpected status", "a task ends with the process that ran it");
    let now = second.call(As::Token, "GET", "/nodes/pve1/qemu/100/status/current", "").await.data;
    assert_eq!(now["status"], "running");
    let drives: Vec<&String> = now["blockstat"].as_object().expect("a running VM").keys().collect();
    assert_eq!(drives, ["scsi1"], "QEMU has what it had, not what its config has");
    let config = second.call(As::Ticket(&ticket, None), "GET", "/nodes/pve1/qemu/100/config", "").await;
    assert_eq!(config.status, 200, "a ticket is as good as before");
    assert_eq!(config.data["description"], "kept");
    assert_eq!(
        second.call(As::Ticket(&ticket, None), "GET", "/nodes/pve2/qemu/101/config", "").await.status,
        403
    );
    let token = format!("PVEAPIToken=bob@pve!t2={}", made["value"].as_str().expect("a secret"));
    assert_eq!(second.said["tokens"]["bob@pve!t2"], token);
    let listed = second.call(As::Token, "GET", "/nodes/pve1/storage/local/content?vmid=9999", "").await.data;
    assert_eq!(listed[0]["volid"], "local:9999/vm-9999-a.raw");
    assert!(directory.path().join("state/storage/pve1/local/images/9999/vm-9999-a.raw").exists());
}

#[tokio::test]
async fn what_a_killed_process_left_half_done_is_finished_off() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = Running::start(directory.path(), &[]);
    for name in ["a", "b"] {
        let form = format!("vmid=9999&filename=vm-9999-{name}.raw&size=1M");
        assert_eq!(
            first.call(As::Token, "POST", "/nodes/pve1/storage/local/content", &form).await.status,
            200
        );
    }
    drop(first);
    let images = directory.path().join("state/storage/pve1/local/images/9999");
    // A deletion that had taken the file, and an allocation that had made one.
    std::fs::remove_file(images.join("vm-9999-a.raw")).expect("a file");
    std::fs::write(images.join("vm-9999-c.raw"), b"old data").expect("a file");
    let second = Running::start(directory.path(), &[]);
    let listed = second.call(As::Token, "GET", "/nodes/pve1/storage/local/content?vmid=9999", "").await.data;
    let volids: Vec<&str> =
        listed.as_array().expect("a list").iter().filter_map(|v| v["volid"].as_str()).collect();
    assert_eq!(volids, ["local:9999/vm-9999-b.raw"]);
    assert!(!images.join("vm-9999-c.raw").exists(), "a new volume of this name would not be blank");
}

#[tokio::test]
async fn another_world_is_refused_unless_it_is_to_begin_anew() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = Running::start(directory.path(), &[]);
    let form = "vmid=9999&filename=vm-9999-a.raw&size=1M";
    assert_eq!(first.call(As::Token, "POST", "/nodes/pve1/storage/local/content", form).await.status, 200);
    drop(first);
    std::fs::write(directory.path().join("world.yaml"), WORLD.replace("name: w1", "name: other"))
        .expect("written");
    let complaint = Running::start(directory.path(), &[]).complaint();
    assert!(complaint.contains("goes on from another world") && complaint.contains("--fresh"), "{complaint}");
    let fresh = Running::start(directory.path(), &["--fresh"]);
    let listed = fresh.call(As::Token, "GET", "/nodes/pve1/storage/local/content?vmid=9999", "").await.data;
    assert_eq!(listed, json!([]));
}

#[tokio::test]
async fn every_node_answers_for_all_and_a_dead_one_refuses() {
    let directory = tempfile::tempdir().expect("a directory");
    let each = ["--listen", "127.0.0.1:0", "--listen", "pve1=127.0.0.1:0", "--listen", "pve2=127.0.0.1:0"];
    let cluster = Running::start(directory.path(), &each);
    let url = |node: &str| cluster.said["nodes"][node].as_str().expect("a URL").to_owned();
    let (one, two) = (url("pve1"), url("pve2"));
    let get = async |at: &str, path: &str| cluster.call_at(at, As::Token, "GET", path, "").await;

    for at in [&one, &two] {
        for path in ["/nodes/pve1/qemu/100/config", "/nodes/pve2/qemu/101/config"] {
            assert_eq!(get(at, path).await.expect("an answer").status, 200, "{path} at {at}");
        }
    }
    let local = |status: &Value| {
        let nodes = status.as_array().expect("a list").iter();
        let local: Vec<String> = nodes.filter(|n| n["local"] == 1).map(|n| n["name"].to_string()).collect();
        local.join(" ")
    };
    assert_eq!(local(&get(&two, "/cluster/status").await.expect("an answer").data), "\"pve2\"");
    let here = get(&two, "/nodes/localhost/qemu").await.expect("an answer").data;
    assert_eq!(here[0]["vmid"], 101);

    cluster.fault(json!({ "fault": "kill_node", "node": "pve2" })).await;
    assert!(get(&two, "/version").await.is_err(), "a dead node answers nothing");
    assert_eq!(get(&one, "/nodes/pve2/qemu/101/config").await.expect("an answer").status, 595);
    cluster.fault(json!({ "fault": "kill_node", "node": "pve2", "on": false })).await;
    let mut back = false;
    for _ in 0..100 {
        back = back || get(&two, "/version").await.is_ok_and(|answer| answer.status == 200);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(back, "it listens where it did");

    cluster.fault(json!({ "fault": "cut_node", "node": "pve2" })).await;
    assert_eq!(get(&two, "/nodes/pve2/qemu/101/config").await.expect("an answer").status, 200);
    assert_eq!(get(&two, "/nodes/pve1/qemu/100/config").await.expect("an answer").status, 595);
    assert_eq!(get(&one, "/nodes/pve2/qemu/101/config").await.expect("an answer").status, 595);
    let write = cluster.call_at(&two, As::Token, "PUT", "/nodes/pve2/qemu/101/config", "description=x").await;
    assert_eq!(write.expect("an answer").status, 500, "without quorum nothing is written");
    let write = cluster.call_at(&one, As::Token, "PUT", "/nodes/pve1/qemu/100/config", "description=x").await;
    assert_eq!(write.expect("an answer").status, 200, "the others go on");
}

#[tokio::test]
async fn a_ticket_reads_writes_with_its_csrf_token_and_is_renewed_by_itself() {
    let directory = tempfile::tempdir().expect("a directory");
    let cluster = Running::start(directory.path(), &[]);
    let wrong = cluster.call(As::Nobody, "POST", "/access/ticket", "username=ann@pve&password=nope").await;
    assert_eq!(wrong.status, 401);
    let login = "username=ann&realm=pve&password=secret-of-ann";
    let login = cluster.call(As::Nobody, "POST", "/access/ticket", login).await;
    let (ticket, csrf) =
        (login.data["ticket"].as_str().expect("one"), login.data["CSRFPreventionToken"].as_str());
    assert_eq!(login.data["username"], "ann@pve");
    assert_eq!(login.data["cap"]["vms"]["VM.Allocate"], 1);
    let path = "/nodes/pve1/qemu/100/config";
    assert_eq!(cluster.call(As::Ticket(ticket, None), "GET", path, "").await.status, 200);
    assert_eq!(cluster.call(As::Ticket(ticket, None), "PUT", path, "description=x").await.status, 401);
    assert_eq!(cluster.call(As::Ticket(ticket, Some("0:x")), "PUT", path, "description=x").await.status, 401);
    assert_eq!(cluster.call(As::Ticket(ticket, csrf), "PUT", path, "description=x").await.status, 200);

    let renewal = format!("username=ann@pve&password={}", written(ticket));
    let renewed = cluster.call(As::Nobody, "POST", "/access/ticket", &renewal).await;
    assert_eq!(renewed.status, 200);
    let other = format!("username=root@pam&password={}", written(ticket));
    assert_eq!(cluster.call(As::Nobody, "POST", "/access/ticket", &other).await.status, 401);

    cluster.fault(json!({ "fault": "expire_tickets" })).await;
    assert_eq!(cluster.call(As::Ticket(ticket, csrf), "GET", path, "").await.status, 401);
    assert_eq!(cluster.call(As::Nobody, "POST", "/access/ticket", &renewal).await.status, 401);
}

#[tokio::test]
async fn rights_are_given_and_taken_at_run_time_by_who_may() {
    let directory = tempfile::tempdir().expect("a directory");
    let cluster = Running::start(directory.path(), &[]);
    let login = "username=ann@pve&password=secret-of-ann";
    let login = cluster.call(As::Nobody, "POST", "/access/ticket", login).await.data;
    let ann = As::Ticket(login["ticket"].as_str().expect("one"), login["CSRFPreventionToken"].as_str());
    let root = As::Token;
    let ok = async |who: As<'_>, method: &str, path: &str, form: &str| {
        cluster.call(who, method, path, form).await.status
    };
    assert_eq!(ok(root, "POST", "/access/roles", "roleid=Look&privs=VM.Audit").await, 200);
    assert_eq!(ok(root, "POST", "/access/roles", "roleid=Pvex&privs=VM.Audit").await, 400);
    assert_eq!(ok(root, "POST", "/access/roles", "roleid=Bad&privs=VM.Nope").await, 500);
    assert_eq!(ok(root, "PUT", "/access/roles/PVEAdmin", "privs=VM.Audit").await, 500);
    assert_eq!(ok(root, "POST", "/access/users", "userid=eve@pve").await, 200);
    assert_eq!(ok(root, "PUT", "/access/acl", "path=/vms/100&users=nobody@pve&roles=Look").await, 500);
    assert_eq!(ok(root, "PUT", "/access/acl", "path=/vm/100&users=eve@pve&roles=Look").await, 400);
    assert_eq!(ok(root, "PUT", "/access/acl", "path=/vms/100&roles=Look").await, 400);
    // Who may allocate a VM may hand on what they hold there, and no more.
    assert_eq!(ok(ann, "PUT", "/access/acl", "path=/vms/100&users=eve@pve&roles=Look").await, 200);
    assert_eq!(ok(ann, "PUT", "/access/acl", "path=/vms/100&users=eve@pve&roles=Administrator").await, 400);
    assert_eq!(ok(ann, "PUT", "/access/acl", "path=/storage&users=eve@pve&roles=Look").await, 403);
    assert_eq!(ok(ann, "POST", "/access/users", "userid=x@pve").await, 403);
    let acl = cluster.call(root, "GET", "/access/acl", "").await.data;
    let given = acl.as_array().expect("a list").iter().find(|entry| entry["ugid"] == "eve@pve");
    assert_eq!(given.expect("an entry")["roleid"], "Look");
    assert_eq!(ok(root, "PUT", "/access/users/ann@pve", "enable=0").await, 200);
    assert_eq!(
        ok(ann, "GET", "/nodes/pve1/qemu/100/config", "").await,
        401,
        "a disabled user is out at once"
    );
    assert_eq!(ok(root, "DELETE", "/access/users/eve@pve", "").await, 200);
    let acl = cluster.call(root, "GET", "/access/acl", "").await.data;
    assert!(acl.as_array().expect("a list").iter().all(|entry| entry["ugid"] != "eve@pve"));
}
