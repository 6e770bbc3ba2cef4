//! The Lease of the cloud-controller loop: one process acts, and the next one takes over.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::Instant;

use crate::rig::{CCM, NAMESPACE, Rig, ZONE, until};

const RIGHTS: &str = "tests/fixtures/rbac-ccm.yaml";

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_is_given_back_on_sigterm_and_taken_from_a_process_that_was_killed() {
    let rig = Rig::start(RIGHTS).await;
    let is_held_by = async |name: &str| rig.holder(CCM).await.is_some_and(|holder| holder.starts_with(name));
    let _kubelet = rig.kubelet("w101", 101).await;
    let mut first = rig.ccm("ccm-a", &[]).await;
    until("the first holds the lease", async || is_held_by("ccm-a_").await).await;
    let mut second = rig.ccm("ccm-b", &[]).await;
    until("the first acts", async || rig.label("w101", ZONE).await.as_deref() == Some("pve1")).await;
    let shown = rig.cluster.kubectl(&["get", "lease", CCM, "--namespace", NAMESPACE, "--no-headers"]).await;
    assert!(shown.split_whitespace().nth(1).is_some_and(|holder| holder.starts_with("ccm-a_")), "{shown}");

    // Given back: the next one need not wait until it expires.
    assert!(first.terminate().await.success());
    let waited = until("the second holds the lease", async || is_held_by("ccm-b_").await).await;
    assert!(waited < Duration::from_secs(14), "a lease that was given back was waited for: {waited:?}");
    assert!(rig.sim.move_vm(101, "pve2"));
    until("the second acts", async || rig.label("w101", ZONE).await.as_deref() == Some("pve2")).await;
    assert!(!second.log().contains("cannot"), "{}", second.last_words());

    // Killed: it can give nothing back, and may still be at work as far as anybody knows.
    second.kill();
    let mut third = rig.ccm("ccm-c", &[]).await;
    let waited = until("the third holds the lease", async || is_held_by("ccm-c_").await).await;
    assert!(
        waited >= Duration::from_secs(10),
        "a lease that was not given back was taken at once: {waited:?}"
    );
    assert!(rig.sim.move_vm(101, "pve1"));
    until("the third acts", async || rig.label("w101", ZONE).await.as_deref() == Some("pve1")).await;
    let lease = rig.leases.get(CCM).await.expect("it is there").spec.expect("a spec");
    assert_eq!(lease.lease_transitions, Some(2));

    assert!(third.terminate().await.success());
    assert_eq!(rig.holder(CCM).await.as_deref(), Some(""));
    rig.assert_nothing_was_refused(CCM);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_can_not_renew_its_lease_ends_before_another_may_take_it() {
    let rig = Rig::start(RIGHTS).await;
    let _kubelet = rig.kubelet("w101", 101).await;
    let mut ccm = rig.ccm("ccm-a", &[]).await;
    until("it acts", async || rig.label("w101", ZONE).await.as_deref() == Some("pve1")).await;
    let lease = rig.leases.get(CCM).await.expect("it is there").spec.expect("a spec");

    rig.cluster.api_server().signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    let status = ccm.end(Duration::from_mins(1)).await;
    let waited = stopped.elapsed();
    rig.cluster.api_server().signal(Signal::SIGCONT);
    assert_eq!(status.code(), Some(1));
    assert!(ccm.log().contains("the lease is lost"), "{}", ccm.last_words());
    let lasts =
        lease.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok()).expect("a duration");
    assert!(waited < Duration::from_secs(lasts), "it went on for {waited:?}, and the lease lasts {lasts} s");
    // It is not its own any more, so it was not given back either.
    assert!(rig.holder(CCM).await.is_some_and(|holder| holder.starts_with("ccm-a_")));
}
