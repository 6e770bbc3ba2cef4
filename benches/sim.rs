//! How fast the simulator answers in process, on one core, and whether a large cluster slows it: `cargo bench --bench sim`.
//!
//! Time is what the thread spent on a core, so that other work of the machine does not count.
//!
//! No harness of its own: what is measured is requests per second of a mix, not nanoseconds of a function, and one number
//! per mix is what the docs state. With a number as argument it exits with 1 where a mix is slower than that; a listing
//! of the whole cluster is measured by what it lists, and is not among them.

use axum::body::Body;
use http::Request;
use proxmox_csi::sim::clock::Profile;
use proxmox_csi::sim::{Options, Sim, World};
use serde_json::Value;
use std::process::ExitCode;
use std::time::Duration;
use tower::ServiceExt as _;

/// How long a mix is driven.
const TIME: Duration = Duration::from_secs(1);

fn world(vms: u32, volumes: u32) -> World {
    use std::fmt::Write as _;
    let mut text = "nodes: [pve1, pve2, pve3]\nstorages:\n- {id: local, capacity: 1T}\n- {id: shared, shared: true, capacity: 100T}\n\
                    - {id: thick, type: lvm, shared: true, capacity: 100T}\n\
                    tokens:\n- {id: csi@pve!csi, secret: s}\nroles:\n  CSI: [VM.Audit, VM.Config.Disk, \
                    Datastore.Allocate, Datastore.AllocateSpace, Datastore.Audit]\nacl:\n- {path: /, who: csi@pve, role: CSI}\nvms:\n"
        .to_owned();
    // One volume of each VM is its boot disk.
    let each = volumes / vms;
    for index in 0..vms {
        let (vmid, node) = (1000 + index, index % 3 + 1);
        let _ = write!(text, "- {{vmid: {vmid}, node: pve{node}, name: w{index}, config: {{");
        for slot in 1..each {
            let volume = match slot % 2 {
                0 => format!("shared:9999/vm-9999-pvc-{index}-{slot}.raw"),
                _ => format!("thick:vm-9999-pvc-{index}-{slot}"),
            };
            let _ = write!(text, "scsi{slot}: \"{volume},size=1G\", ");
        }
        text.push_str("agent: \"1\"}}\n");
    }
    World::from_yaml(&text).expect("the file is well formed")
}

/// What came back: the status, and the body as text.
async fn call(sim: &Sim, method: &str, path: &str, form: &str) -> (u16, String) {
    let request = Request::builder()
        .method(method)
        .uri(format!("/api2/json{path}"))
        .header("authorization", "PVEAPIToken=csi@pve!csi=s")
        .header("content-type", "application/x-www-form-urlencoded")
        .body(Body::from(form.to_owned()))
        .expect("a request");
    let response = sim.service().oneshot(request).await.expect("an answer");
    let status = response.status().as_u16();
    let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("a body");
    (status, String::from_utf8_lossy(&body).into_owned())
}

/// A call that has to succeed.
async fn good(sim: &Sim, method: &str, path: &str, form: &str) -> String {
    let (status, body) = call(sim, method, path, form).await;
    assert_eq!(status, 200, "{method} {path}: {body}");
    body
}

/// A call that starts a task, and questions until it has ended well; returns how many requests that took.
async fn task(sim: &Sim, method: &str, path: &str, form: &str) -> u32 {
    let body: Value = serde_json::from_str(&good(sim, method, path, form).await).expect("JSON");
    let upid = body["data"].as_str().expect("a task id").replace(':', "%3A").replace('!', "%21");
    let node = path.split('/').nth(2).expect("a node");
    for polls in 1..1000 {
        let status = good(sim, "GET", &format!("/nodes/{node}/tasks/{upid}/status"), "").await;
        if status.contains("\"exitstatus\":\"OK\"") {
            return polls + 1;
        }
        assert!(!status.contains("exitstatus"), "{status}");
        tokio::task::yield_now().await;
    }
    panic!("{method} {path} does not end")
}

/// Seconds that the main thread has spent on a core (`proc_pid_schedstat(5)`); on the runtime of one thread that is all.
fn on_core() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").expect("Linux has it");
    let nanoseconds: u64 =
        text.split(' ').next().and_then(|field| field.parse().ok()).expect("a number first");
    Duration::from_nanos(nanoseconds).as_secs_f64()
}

/// Requests per second of one kind of work, which is handed a number and says how many requests it made.
async fn rate(name: &str, work: impl AsyncFn(u32) -> u32) -> f64 {
    for warm in 0..20 {
        work(warm).await;
    }
    let begun = on_core();
    let (mut requests, mut round) = (0, 20);
    while on_core() - begun < TIME.as_secs_f64() {
        requests += work(round).await;
        round += 1;
    }
    let rate = f64::from(requests) / (on_core() - begun);
    println!("  {name:<56} {rate:>9.0} requests/s");
    rate
}

/// The VM of a round, as the path of its calls.
fn path(round: u32, vms: u32) -> String {
    let index = round * 7 % vms;
    format!("/nodes/pve{}/qemu/{}", index % 3 + 1, 1000 + index)
}

/// A volume from its allocation to its deletion, as the driver goes: changes are tasks that are asked after.
async fn life(sim: &Sim, vms: u32, round: u32, storage: &str) -> u32 {
    let (file, name) = match storage {
        "thick" => (format!("vm-9999-bench-{round}"), format!("vm-9999-bench-{round}")),
        _ => (format!("vm-9999-bench-{round}.raw"), format!("9999/vm-9999-bench-{round}.raw")),
    };
    let at = path(round, vms);
    let node = at.split('/').nth(2).expect("a node");
    let alloc = format!("vmid=9999&filename={file}&size=1G");
    good(sim, "POST", &format!("/nodes/{node}/storage/{storage}/content"), &alloc).await;
    let volume = format!("{storage}%3A{}", name.replace('/', "%2F"));
    let serial = format!("scsi30={volume}%2Cbackup%3D0%2Cdiscard%3Don%2Cserial%3Dpvc-{round}");
    let attach = task(sim, "POST", &format!("{at}/config"), &serial).await;
    good(sim, "GET", &format!("{at}/pending"), "").await;
    good(sim, "GET", &format!("{at}/status/current"), "").await;
    let grow = task(sim, "PUT", &format!("{at}/resize"), "disk=scsi30&size=2G").await;
    let detach = task(sim, "POST", &format!("{at}/config"), "delete=scsi30").await;
    good(sim, "GET", &format!("/nodes/{node}/storage/{storage}/status"), "").await;
    let delete = format!("/nodes/{node}/storage/{storage}/content/{volume}");
    4 + attach + grow + detach + task(sim, "DELETE", &delete, "").await
}

/// All mixes over a cluster; returns the slowest rate of those that stand for work of the driver.
async fn drive(vms: u32, volumes: u32) -> f64 {
    let begun = tokio::time::Instant::now();
    let options = Options { time: Profile::None, ..Options::default() };
    let sim = Sim::start(world(vms, volumes), options).expect("the world can be made");
    println!("{vms} VMs, {} volumes (made in {} ms)", sim.volumes().len(), begun.elapsed().as_millis());
    let sim = &sim;
    let mut least = f64::MAX;
    for (name, what) in [
        ("GET version", "/version"),
        ("GET cluster/nextid?vmid=", "/cluster/nextid?vmid=9999"),
        ("GET storage/status", "/nodes/pve1/storage/shared/status"),
        ("GET a volume", "/nodes/pve1/storage/shared/content/shared%3A9999%2Fvm-9999-pvc-0-2.raw"),
    ] {
        let one = async |_| {
            good(sim, "GET", what, "").await;
            1
        };
        least = least.min(rate(name, one).await);
    }
    for what in ["config", "pending", "status/current"] {
        let one = async |round: u32| {
            good(sim, "GET", &format!("{}/{what}", path(round, vms)), "").await;
            1
        };
        least = least.min(rate(&format!("GET {what} of a VM with {} disks", volumes / vms), one).await);
    }
    for storage in ["shared", "thick"] {
        let name = format!("a volume's life on `{storage}`, tasks and questions");
        least = least.min(rate(&name, async |round| life(sim, vms, round, storage).await).await);
    }
    let listing = async |_| {
        good(sim, "GET", "/cluster/resources", "").await;
        1
    };
    let whole = rate("GET cluster/resources, all of it", listing).await;
    println!("  {:<56} {:>9.0} entries/s", "", whole * f64::from(vms + 3 + 9));
    least
}

fn main() -> ExitCode {
    // Cargo hands `--bench` on.
    let least: Option<f64> = std::env::args().skip(1).find_map(|argument| argument.parse().ok());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let rates = runtime.block_on(async { [drive(10, 100).await, drive(1000, 10_000).await] });
    match least {
        Some(least) if rates.iter().any(|rate| *rate < least) => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}
