//! The taints that say whether a node may be used: uninitialized, shutdown, out-of-service.

use std::time::Duration;

use k8s_openapi::{
    api::core::v1::{Node, Taint},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};

use super::lifecycle::Power;
use crate::k8s::node::{taint, taints};

/// Set by the kubelet until a cloud provider has seen the node.
pub const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";
/// The VM is stopped.
pub const SHUTDOWN: &str = "node.cloudprovider.kubernetes.io/shutdown";
/// The VM is dead for certain: pods are deleted and volumes detached at once.
pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
/// The value by which an out-of-service taint is known to be ours; Kubernetes looks at the key alone.
pub const OURS: &str = "proxmox-ccm";
/// How long a VM must be seen stopped: right after a migration its new host has not told yet that it runs.
pub const SETTLED: Duration = Duration::from_secs(15);
/// How long it must be seen dead before its pods are given up.
pub const GRACE: Duration = Duration::from_secs(30);

/// What the taints of a node are decided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Whether its kubelet lives.
    pub ready: bool,
    /// What its VM does.
    pub power: Power,
    /// For how long, without a gap.
    pub lasted: Duration,
    /// Whether everything that initialises a node is done.
    pub initialised: bool,
    /// Whether out-of-service taints are set at all.
    pub out_of_service: bool,
    /// Whether the volumes that were attached when the node was given up are detached; `None` where that was not asked.
    pub old_volumes_gone: Option<bool>,
}

/// Whether the out-of-service taint would be put on: to be decided again with a fresh look at the VM.
pub fn gives_up(node: &Node, seen: Seen) -> bool {
    let dead = matches!(seen.power, Power::Off | Power::Recovery);
    seen.out_of_service
        && !seen.ready
        && dead
        && seen.lasted >= GRACE
        && taint(node, OUT_OF_SERVICE).is_none()
}

/// Our out-of-service taint, where it may come off once the old volumes are gone.
pub fn may_return(node: &Node, seen: Seen) -> Option<&Taint> {
    let ours = |taint: &&Taint| taint.value.as_deref() == Some(OURS);
    taint(node, OUT_OF_SERVICE).filter(ours).filter(|_| seen.ready && seen.power == Power::On)
}

/// The taints a node is to have, `None` where they are right.
pub fn desired(node: &Node, seen: Seen, now: Timestamp) -> Option<Vec<Taint>> {
    let mut all = taints(node).to_vec();
    if seen.initialised {
        all.retain(|taint| taint.key != UNINITIALIZED);
    }
    if seen.ready {
        all.retain(|taint| taint.key != SHUTDOWN);
    }
    if may_return(node, seen).is_some() && seen.old_volumes_gone == Some(true) {
        all.retain(|taint| taint.key != OUT_OF_SERVICE);
    }
    let make = |key: &str, value: Option<&str>, effect: &str| Taint {
        key: key.to_owned(),
        value: value.map(str::to_owned),
        effect: effect.to_owned(),
        time_added: Some(Time(now)),
    };
    let stopped = matches!(seen.power, Power::Off | Power::Suspended);
    if stopped && !seen.ready && seen.lasted >= SETTLED && taint(node, SHUTDOWN).is_none() {
        all.push(make(SHUTDOWN, None, "NoSchedule"));
    }
    if gives_up(node, seen) {
        all.push(make(OUT_OF_SERVICE, Some(OURS), "NoExecute"));
    }
    (all != taints(node)).then_some(all)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::NodeSpec;

    use super::{
        super::instances::tests::{UUID, node},
        *,
    };

    const SEEN: Seen = Seen {
        ready: false,
        power: Power::Off,
        lasted: Duration::from_mins(5),
        initialised: true,
        out_of_service: true,
        old_volumes_gone: None,
    };

    fn with(taints: &[(&str, Option<&str>)]) -> Node {
        let mut node = node("", UUID);
        let taint = |(key, value): &(&str, Option<&str>)| Taint {
            key: (*key).into(),
            value: value.map(str::to_owned),
            effect: "NoSchedule".into(),
            time_added: None,
        };
        node.spec =
            Some(NodeSpec { taints: Some(taints.iter().map(taint).collect()), ..NodeSpec::default() });
        node
    }

    fn keys(node: &Node, seen: Seen) -> Option<Vec<String>> {
        desired(node, seen, Timestamp::UNIX_EPOCH).map(|all| all.into_iter().map(|taint| taint.key).collect())
    }

    #[test]
    fn a_node_is_initialised_only_when_all_is_done_and_other_taints_stay() {
        let new = with(&[(UNINITIALIZED, Some("true")), ("mine", None)]);
        let on = Seen { ready: true, power: Power::On, ..SEEN };
        assert_eq!(keys(&new, on), Some(vec!["mine".to_owned()]));
        assert_eq!(keys(&new, Seen { initialised: false, ..on }), None);
    }

    #[test]
    fn a_stopped_vm_is_tainted_on_the_second_look_and_untainted_when_it_is_ready() {
        let plain = Seen { out_of_service: false, ..SEEN };
        assert_eq!(keys(&with(&[]), plain), Some(vec![SHUTDOWN.to_owned()]));
        assert_eq!(keys(&with(&[]), Seen { lasted: Duration::from_secs(14), ..plain }), None);
        assert_eq!(keys(&with(&[]), Seen { ready: true, ..plain }), None);
        let tainted = with(&[(SHUTDOWN, None)]);
        assert_eq!(keys(&tainted, plain), None);
        assert_eq!(keys(&tainted, Seen { ready: true, power: Power::On, ..plain }), Some(vec![]));
    }

    #[test]
    fn only_the_dead_are_given_up() {
        for (power, given_up) in [
            (Power::Off, true),
            (Power::Recovery, true),
            (Power::On, false),
            (Power::Suspended, false),
            (Power::Unsettled, false),
            (Power::HostUnreachable, false),
        ] {
            assert_eq!(gives_up(&with(&[]), Seen { power, ..SEEN }), given_up, "{power:?}");
        }
        assert!(!gives_up(&with(&[]), Seen { ready: true, ..SEEN }));
        assert!(!gives_up(&with(&[]), Seen { lasted: Duration::from_secs(29), ..SEEN }));
        assert!(!gives_up(&with(&[]), Seen { out_of_service: false, ..SEEN }));
    }

    #[test]
    fn a_suspended_vm_gets_the_plain_shutdown_taint_at_most() {
        let keys = keys(&with(&[]), Seen { power: Power::Suspended, ..SEEN });
        assert_eq!(keys, Some(vec![SHUTDOWN.to_owned()]));
    }

    #[test]
    fn only_our_own_out_of_service_taint_comes_off_and_only_behind_the_old_volumes() {
        let back = Seen { ready: true, power: Power::On, old_volumes_gone: Some(true), ..SEEN };
        let ours = with(&[(OUT_OF_SERVICE, Some(OURS))]);
        assert_eq!(keys(&ours, back), Some(vec![]));
        assert_eq!(keys(&ours, Seen { old_volumes_gone: Some(false), ..back }), None);
        assert_eq!(keys(&ours, Seen { old_volumes_gone: None, ..back }), None);
        assert_eq!(keys(&ours, Seen { ready: false, ..back }), None);
        assert_eq!(keys(&with(&[(OUT_OF_SERVICE, Some("nodeshutdown"))]), back), None);
    }
}
