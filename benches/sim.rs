//! How fast the simulator answers in process, on one core, and whether a large cluster slows it: `cargo bench --bench sim`.
//!
//! Time is what the thread spent on a core, so that other work of the machine does not count.
//!
//! No harness of its own: what is measured is requests per second of a mix, not nanoseconds of a function, and one number
//! per mix is what the docs state. With a number as argument it exits with 1 where a mix is slower than that.

use axum::body::Body;
use http::Request;
use proxmox_csi::sim::clock::Profile;
use proxmox_csi::sim::{Options, Sim, World};
use std::process::ExitCode;
use std::time::Duration;
use tower::ServiceExt as _;

/// How long a mix is driven.
const TIME: Duration = Duration::from_secs(1);

fn world(vms: u32, volumes: u32) -> World {
    use std::fmt::Write as _;
    let mut text = "nodes: [pve1, pve2, pve3]\nstorages:\n- {id: local, capacity: 1T}\n- {id: shared, shared: true, capacity: 100T}\n\
                    tokens:\n- {id: csi@pve!csi, secret: s}\nroles:\n  CSI: [VM.Audit, VM.Config.Disk, \
                    Datastore.Allocate, Datastore.AllocateSpace, Datastore.Audit]\nacl:\n- {path: /, who: csi@pve, role: CSI}\nvms:\n"
        .to_owned();
    let each = volumes / vms;
    for index in 0..vms {
        let (vmid, node) = (1000 + index, index % 3 + 1);
        let _ = write!(text, "- {{vmid: {vmid}, node: pve{node}, name: w{index}, config: {{");
        for slot in 1..each {
            let _ = write!(text, "scsi{slot}: \"shared:9999/vm-9999-pvc-{index}-{slot}.raw,size=1G\", ");
        }
        text.push_str("agent: \"1\"}}\n");
    }
    World::from_yaml(&text).expect("the file is well formed")
}

async fn call(sim: &Sim, method: &str, path: &str, form: &str) -> u16 {
    let request = Request::builder()
        .method(method)
        .uri(format!("/api2/json{path}"))
        .header("authorization", "PVEAPIToken=csi@pve!csi=s")
        .header("content-type", "application/x-www-form-urlencoded")
        .body(Body::from(form.to_owned()))
        .expect("a request");
    sim.service().oneshot(request).await.expect("an answer").status().as_u16()
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
    println!("  {name:<44} {rate:>9.0} requests/s");
    rate
}

/// All mixes over a cluster; returns the slowest rate of those that stand for work of the driver.
async fn drive(vms: u32, volumes: u32) -> f64 {
    let begun = tokio::time::Instant::now();
    let options = Options { time: Profile::None, ..Options::default() };
    let sim = Sim::start(world(vms, volumes), options).expect("the world can be made");
    println!("{vms} VMs, {} volumes (made in {} ms)", sim.volumes().len(), begun.elapsed().as_millis());
    let sim = &sim;
    let path = |round: u32| {
        let index = round * 7 % vms;
        format!("/nodes/pve{}/qemu/{}", index % 3 + 1, 1000 + index)
    };
    let mut least = f64::MAX;
    for (name, what) in
        [("GET version", ""), ("GET pending", "/pending"), ("GET status/current", "/status/current")]
    {
        let one = async |round: u32| {
            let path = if what.is_empty() { "/version".to_owned() } else { format!("{}{what}", path(round)) };
            assert_eq!(call(sim, "GET", &path, "").await, 200);
            1
        };
        least = least.min(rate(name, one).await);
    }
    let life = async |round: u32| {
        let (name, at) = (format!("9999/vm-9999-bench-{round}.raw"), path(round));
        let node = at.split('/').nth(2).expect("a node");
        let alloc = format!("vmid=9999&filename=vm-9999-bench-{round}.raw&size=1G");
        assert_eq!(call(sim, "POST", &format!("/nodes/{node}/storage/shared/content"), &alloc).await, 200);
        let attach = format!("scsi30=shared%3A{}", name.replace('/', "%2F"));
        assert_eq!(call(sim, "PUT", &format!("{at}/config"), &attach).await, 200);
        assert_eq!(call(sim, "GET", &format!("{at}/pending"), "").await, 200);
        assert_eq!(call(sim, "PUT", &format!("{at}/unlink"), "idlist=scsi30").await, 200);
        let volume = format!("/nodes/{node}/storage/shared/content/shared:{name}?delay=5");
        assert_eq!(call(sim, "DELETE", &volume, "").await, 200);
        5
    };
    least = least.min(rate("a volume's life (alloc, plug, unplug, delete)", life).await);
    let listing = async |_| {
        assert_eq!(call(sim, "GET", "/cluster/resources", "").await, 200);
        1
    };
    rate("GET cluster/resources, all of it", listing).await;
    least
}

fn main() -> ExitCode {
    // Cargo hands `--bench` on.
    let least: Option<f64> = std::env::args().skip(1).find_map(|argument| argument.parse().ok());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let rates = runtime.block_on(async { [drive(3, 30).await, drive(1000, 10_000).await] });
    match least {
        Some(least) if rates.iter().any(|rate| *rate < least) => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}
