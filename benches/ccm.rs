//! What the cloud-controller loop costs at rest: 1,000 nodes over three regions: `cargo bench --bench ccm`.
//!
//! Time is simulated, so that requests are the same on every machine; processor time and memory are real. The simulator and the API
//! server are in the same process: what the simulator takes is measured without the loop, and taken off.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "the fake server and the rig offer more than this uses"
)]

use std::time::Duration;

use proxmox_csi::{
    ccm::Settings,
    k8s::lease::{self, Election},
    sim::World,
};
use serde_json::Value;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

#[path = "../tests/kubernetes/apiserver.rs"]
mod apiserver;
#[path = "../tests/kubernetes/rig.rs"]
mod rig;
#[path = "../tests/support/mod.rs"]
mod support;

use apiserver::ApiServer;
use rig::{NODES, Region, many, new_node, start_with};

const NODE_COUNT: u32 = 1000;
const MINUTES: u32 = 10;

/// Processor time of this thread.
fn processor() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells it");
    let nanoseconds = text.split_whitespace().next().and_then(|text| text.parse().ok());
    Duration::from_nanos(nanoseconds.expect("its first number"))
}

/// Processor time since then.
fn spent_since(begun: Duration) -> Duration {
    processor().saturating_sub(begun)
}

/// A line of `/proc/self/status` in MiB.
fn memory(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("Linux tells it");
    let line = text.lines().find_map(|line| line.strip_prefix(key)).expect("a line of this name");
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().expect("a number") / 1024
}

fn few(requests: u64) -> u32 {
    u32::try_from(requests).expect("they are few")
}

/// Processor time of one listing of each region, by the simulator alone.
async fn listings(regions: &[Region]) -> Duration {
    const TIMES: u32 = 20;
    let token = World::builtin().token(rig::TOKEN).expect("a token").header();
    let begun = processor();
    for _ in 0..TIMES {
        for region in regions {
            let request = http::Request::get("/api2/json/cluster/resources").header("authorization", &token);
            let request = request.body(bytes::Bytes::new()).expect("a request");
            let answer = region.transport().oneshot(request).await.expect("an answer");
            assert!(answer.status().is_success(), "{answer:?}");
        }
    }
    spent_since(begun) / TIMES
}

async fn rest() {
    let share = NODE_COUNT.div_ceil(3);
    let regions: Vec<Region> =
        ["r1", "r2", "r3"].into_iter().zip(0..).map(|(name, n)| Region::of(name, many(n, share))).collect();
    let server = ApiServer::default();
    let mut left = NODE_COUNT;
    for region in &regions {
        for vmid in region.sim.vmids() {
            if left > 0 {
                server.put(NODES, new_node(&format!("{}-{vmid}", region.name), &region.uuid(vmid)));
                left -= 1;
            }
        }
    }
    let settings = lease::Settings::new("kube-system", "proxmox-ccm", "bench");
    let (election, mut leadership) = Election::new(server.client(), settings);
    let stop = CancellationToken::new();
    let elected = tokio::spawn(election.run(stop.clone()));
    leadership.acquired().await;

    let (before, begun) = (memory("VmRSS:"), processor());
    let running = start_with(&server, &regions.iter().collect::<Vec<_>>(), Settings::default());
    sleep(Duration::from_mins(5)).await;
    let initialised = spent_since(begun);
    let is_done = |node: &Value| node["spec"]["providerID"].is_string();
    let names = server.names(NODES);
    let done = names.iter().filter_map(|name| server.get(NODES, name)).filter(is_done).count();
    println!(
        "{done} of {} nodes initialised in {} ms of processor time, servers included",
        names.len(),
        initialised.as_millis()
    );
    assert_eq!(done, names.len());

    server.writes();
    regions.iter().for_each(Region::forget_asked);
    let (asked, begun) = (server.requests(), processor());
    sleep(Duration::from_mins(u64::from(MINUTES))).await;
    let spent = spent_since(begun);
    let per_minute = |requests: u64| f64::from(few(requests)) / f64::from(MINUTES);
    let of = |part: &str| regions.iter().map(|region| region.asked(part)).sum::<u64>();
    println!("at rest, in a minute:");
    println!("  requests to Proxmox      {:6.1}", per_minute(of("/")));
    for part in ["/cluster/resources", "/access/permissions", "/cluster/ha/", "/nodes/"] {
        println!("    {part:22} {:6.1}", per_minute(of(part)));
    }
    println!("  requests to Kubernetes   {:6.1}", per_minute(server.requests() - asked));
    let writes = server.writes();
    let (leases, others): (Vec<_>, Vec<_>) = writes.iter().partition(|line| line.contains("/leases/"));
    println!("    renewals of the lease  {:6.1}", per_minute(leases.len().try_into().expect("few")));
    println!("    other writes           {:6.1}", per_minute(others.len().try_into().expect("few")));
    let polls = few(of("/cluster/resources")) / 3;
    let simulators = listings(&regions).await * polls / MINUTES;
    let both = spent / MINUTES;
    println!(
        "  processor time           {:6} ms, and {} ms of the simulator",
        both.saturating_sub(simulators).as_millis(),
        simulators.as_millis()
    );
    println!("memory: {before} MiB before the loop, {} MiB at most with it", memory("VmHWM:"));
    drop(running);
    stop.cancel();
    elected.await.expect("no panic");
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(rest());
}
