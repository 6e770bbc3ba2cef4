//! The simulator's status page in a real browser: it follows what happens, and shows texts as texts.
//!
//! Needs Chromium and its driver (Debian: chromium, chromium-driver), and fails without them.

use axum::body::Body;
use http::Request;
use proxmox_csi::sim::http::Tls;
use proxmox_csi::sim::{Options, Sim, World, clock::Profile};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tower::ServiceExt as _;

/// A headless Chromium behind its driver; both end with the test.
struct Browser {
    driver: Child,
    session: String,
    http: reqwest::Client,
    _profile: tempfile::TempDir,
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends the browser when it is told to.
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.driver),
            rustix::process::Signal::TERM,
        );
        let _ = self.driver.wait();
    }
}

impl Browser {
    async fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver, which this test needs (Debian: chromium-driver); it is not skipped");
        let lines = BufReader::new(driver.stdout.take().expect("it was asked for")).lines();
        let port = lines.map_while(Result::ok).find_map(|line| {
            let rest = line.split("successfully on port ").nth(1)?;
            rest.trim_end_matches('.').parse::<u16>().ok()
        });
        let port = port.expect("chromedriver says its port");
        let profile = tempfile::tempdir().expect("a directory");
        let mut arguments: Vec<String> = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1280,1600",
        ]
        .map(str::to_owned)
        .into();
        arguments.push(format!("--user-data-dir={}", profile.path().display()));
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "acceptInsecureCerts": true, "goog:chromeOptions": { "args": arguments },
        } } });
        let http = reqwest::Client::builder().timeout(Duration::from_mins(1)).build().expect("a client");
        let base = format!("http://127.0.0.1:{port}/session");
        let answer = http.post(&base).body(wanted.to_string()).send().await.expect("an answer");
        let answer: Value = serde_json::from_str(&answer.text().await.expect("text")).expect("JSON");
        let id = answer["value"]["sessionId"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned();
        Self { driver, session: format!("{base}/{id}"), http, _profile: profile }
    }

    async fn send(&self, what: &str, body: &Value) -> Value {
        let answer = self.http.post(format!("{}/{what}", self.session)).body(body.to_string()).send().await;
        let answer = answer.expect("an answer").text().await.expect("text");
        serde_json::from_str::<Value>(&answer).expect("JSON")["value"].clone()
    }

    async fn open(&self, url: &str) {
        self.send("url", &json!({ "url": url })).await;
    }

    /// What an expression of the page's script is.
    async fn value(&self, script: &str) -> Value {
        self.send("execute/sync", &json!({ "script": format!("return {script};"), "args": [] })).await
    }

    /// Waits until an expression is what it is to be.
    async fn becomes(&self, script: &str, wanted: Value) {
        let mut is = Value::Null;
        for _ in 0..100 {
            is = self.value(script).await;
            if is == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("`{script}` is {is} and not {wanted}");
    }

    async fn screenshot(&self) -> String {
        let answer = self.http.get(format!("{}/screenshot", self.session)).send().await.expect("an answer");
        let answer: Value = serde_json::from_str(&answer.text().await.expect("text")).expect("JSON");
        answer["value"].as_str().expect("an image").to_owned()
    }
}

async fn call(sim: &Sim, method: &str, path: &str, form: &str) {
    let token = World::builtin().token("root@pam!root").expect("there is one").header();
    let request = Request::builder()
        .method(method)
        .uri(format!("/api2/json{path}"))
        .header("authorization", token)
        .header("content-type", "application/x-www-form-urlencoded")
        .body(Body::from(form.to_owned()))
        .expect("a request");
    let answer = sim.service().oneshot(request).await.expect("an answer");
    assert!(answer.status().is_success(), "{method} {path}: {}", answer.status());
}

#[tokio::test]
async fn the_page_follows_what_happens_and_shows_texts_as_texts() {
    let options = Options { time: Profile::None, ..Options::default() };
    let sim = Sim::start(World::builtin(), options).expect("the world can be made");
    let tls = Tls::generate(&[]).expect("certificates");
    let server = sim.listen("127.0.0.1:0".parse().expect("an address"), &tls).await.expect("a port");
    let browser = Browser::start().await;
    browser.open(&format!("{}/_sim/", server.url())).await;

    browser.becomes("document.querySelectorAll('#nodes .good').length", json!(2)).await;
    browser.becomes("document.querySelectorAll('#picture path').length", json!(3)).await;
    // The mark shows that the page is never loaded anew.
    browser.value("window.mark = 1").await;

    let form = "vmid=9999&filename=vm-9999-pvc.raw&size=1G";
    call(&sim, "POST", "/nodes/pve1/storage/shared/content", form).await;
    let attach = "scsi5=shared%3A9999%2Fvm-9999-pvc.raw%2Cwwn%3D0x5056432d49443035";
    call(&sim, "PUT", "/nodes/pve1/qemu/102/config", attach).await;
    browser.becomes("document.querySelectorAll('#picture path').length", json!(4)).await;
    let row = "[...document.querySelectorAll('#volumes tr')].find(r => r.innerText.includes('vm-9999-pvc'))";
    browser.becomes(&format!("{row}.lastElementChild.innerText"), json!("102 scsi5")).await;
    if let Some(path) = std::env::var_os("PAGE_SCREENSHOT") {
        std::fs::write(path, browser.screenshot().await).expect("the screenshot is written, as base64");
    }

    let name = "%3Cimg%20src%3Dx%20onerror%3D%22window.broken%3D1%22%3E";
    call(&sim, "POST", "/nodes/pve1/qemu/102/config", &format!("description={name}&tags=a")).await;
    sim.set_vm_key(102, "name", Some("<img src=x onerror=\"window.broken=1\">"));
    browser.becomes("document.body.innerText.includes('<img src=x onerror=')", json!(true)).await;
    assert_eq!(browser.value("document.images.length").await, json!(0));
    assert_eq!(browser.value("window.broken === undefined").await, json!(true));

    sim.inject(serde_json::from_value(json!({ "fault": "kill_node", "node": "pve2" })).expect("a fault"))
        .expect("the node is there");
    sim.inject(
        serde_json::from_value(json!({ "fault": "drift", "vmid": 101, "slot": "scsi0" })).expect("a fault"),
    )
    .expect("the drive is there");
    browser.becomes("document.querySelectorAll('#nodes .bad').length", json!(1)).await;
    browser.becomes("document.querySelectorAll('#picture path.qemu').length", json!(1)).await;
    assert_eq!(browser.value("window.mark").await, json!(1));
    drop(server);
    browser.becomes("getComputedStyle(document.getElementById('lost')).display", json!("inline")).await;
}
