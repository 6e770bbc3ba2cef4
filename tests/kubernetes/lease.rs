//! Who may act: the rules of client-go, by our own clock.

use std::time::Duration;

use proxmox_csi::k8s::lease::{Election, Ended, Leadership, Settings};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::apiserver::ApiServer;

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";

struct Candidate {
    identity: String,
    leadership: Leadership,
    stop: CancellationToken,
    ended: JoinHandle<Ended>,
}

fn candidate(server: &ApiServer, host: &str) -> Candidate {
    let settings = Settings::new("kube-system", "proxmox-ccm", host);
    let identity = settings.identity.clone();
    let (election, leadership) = Election::new(server.client(), settings);
    let stop = CancellationToken::new();
    Candidate { identity, leadership, ended: tokio::spawn(election.run(stop.clone())), stop }
}

fn holder(server: &ApiServer) -> String {
    let lease = server.get(LEASES, "proxmox-ccm").expect("a lease");
    lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()
}

/// A lease of a process that is not there any more.
fn old_lease(holder: &str, renewed: &str) -> Value {
    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "proxmox-ccm", "namespace": "kube-system"},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15, "leaseTransitions": 4,
            "acquireTime": "2020-01-01T00:00:00.000000Z", "renewTime": renewed}})
}

#[tokio::test(start_paused = true)]
async fn the_first_candidate_creates_the_lease_and_keeps_it() {
    let server = ApiServer::default();
    let mut first = candidate(&server, "a");
    assert_eq!(first.leadership.acquired().await, None);
    let second = candidate(&server, "b");
    sleep(Duration::from_mins(5)).await;
    assert!(first.leadership.holds() && !second.leadership.holds());
    assert_eq!(holder(&server), first.identity);
    let spec = server.get(LEASES, "proxmox-ccm").expect("a lease")["spec"].clone();
    assert_eq!((&spec["leaseDurationSeconds"], &spec["leaseTransitions"]), (&json!(15), &json!(0)));
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_taken_only_after_it_was_seen_unchanged_for_its_whole_duration() {
    let server = ApiServer::default();
    // By its own date it expired years ago: that clock is another machine's.
    server.put(LEASES, old_lease("dead", "2020-01-01T00:00:00.000000Z"));
    let mut next = candidate(&server, "b");
    sleep(Duration::from_secs(14)).await;
    assert!(!next.leadership.holds());
    // A sign of life begins it anew.
    server.put(LEASES, old_lease("dead", "2020-01-01T00:00:01.000000Z"));
    sleep(Duration::from_secs(14)).await;
    assert!(!next.leadership.holds());
    assert_eq!(next.leadership.acquired().await.as_deref(), Some("dead"));
    assert_eq!(holder(&server), next.identity);
    assert_eq!(server.get(LEASES, "proxmox-ccm").expect("a lease")["spec"]["leaseTransitions"], 5);
}

#[tokio::test(start_paused = true)]
async fn of_many_candidates_one_holds_the_lease() {
    let server = ApiServer::default();
    server.put(LEASES, old_lease("dead", "2020-01-01T00:00:00.000000Z"));
    let all: Vec<_> = (0..5).map(|n| candidate(&server, &format!("host-{n}"))).collect();
    for _ in 0..600 {
        sleep(Duration::from_millis(100)).await;
        assert!(all.iter().filter(|one| one.leadership.holds()).count() <= 1);
    }
    assert_eq!(all.iter().filter(|one| one.leadership.holds()).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_can_not_renew_loses_before_another_can_take_it() {
    let server = ApiServer::default();
    let mut first = candidate(&server, "a");
    first.leadership.acquired().await;
    let second = candidate(&server, "b");
    sleep(Duration::from_secs(5)).await;
    server.set_down(true);
    sleep(Duration::from_secs(11)).await;
    assert!(!first.leadership.holds());
    assert_eq!(first.ended.await.expect("no panic"), Ended::Lost);
    server.set_down(false);
    sleep(Duration::from_secs(30)).await;
    assert!(second.leadership.holds());
}

#[tokio::test(start_paused = true)]
async fn a_short_outage_is_survived() {
    let server = ApiServer::default();
    let mut first = candidate(&server, "a");
    first.leadership.acquired().await;
    sleep(Duration::from_secs(4)).await;
    server.set_down(true);
    sleep(Duration::from_secs(5)).await;
    server.set_down(false);
    sleep(Duration::from_mins(1)).await;
    assert!(first.leadership.holds());
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_another_holds_is_lost_at_once() {
    let server = ApiServer::default();
    let mut first = candidate(&server, "a");
    first.leadership.acquired().await;
    server.put(LEASES, old_lease("usurper", "2030-01-01T00:00:00.000000Z"));
    sleep(Duration::from_secs(3)).await;
    assert!(!first.leadership.holds());
    assert_eq!(first.ended.await.expect("no panic"), Ended::Lost);
    assert_eq!(holder(&server), "usurper");
}

#[tokio::test(start_paused = true)]
async fn a_stopped_holder_gives_the_lease_back() {
    let server = ApiServer::default();
    let mut first = candidate(&server, "a");
    first.leadership.acquired().await;
    let mut second = candidate(&server, "b");
    sleep(Duration::from_secs(5)).await;
    first.stop.cancel();
    assert_eq!(first.ended.await.expect("no panic"), Ended::Released);
    assert!(!first.leadership.holds());
    assert_eq!(holder(&server), "");
    let taken = tokio::time::timeout(Duration::from_secs(5), second.leadership.acquired()).await;
    assert_eq!(taken.expect("within one retry"), None, "it was given back, not taken");
}

#[tokio::test(start_paused = true)]
async fn a_renewal_is_one_request() {
    let server = ApiServer::default();
    let mut first = candidate(&server, "a");
    first.leadership.acquired().await;
    let before = server.requests();
    sleep(Duration::from_mins(10)).await;
    let asked = server.requests() - before;
    assert!((290..=301).contains(&asked), "{asked} requests in ten minutes, one every two seconds");
}

#[tokio::test(start_paused = true)]
async fn a_candidate_that_hears_of_the_api_server_is_alive() {
    let server = ApiServer::default();
    let mut first = candidate(&server, "a");
    first.leadership.acquired().await;
    let second = candidate(&server, "b");
    sleep(Duration::from_mins(1)).await;
    assert!(second.leadership.is_alive() && !second.leadership.holds());
    server.set_down(true);
    sleep(Duration::from_mins(1)).await;
    assert!(!second.leadership.is_alive());
}
