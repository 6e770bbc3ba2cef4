//! Does the VM run, may it still write, is it gone? The decisions, without any IO.
//!
//! [`power`] reads a VM's row; [`fate`] says whether a Node whose VM was not found may be deleted. Whatever is not proven keeps the
//! Node: an empty or filtered listing, a silent region, a lost privilege prove nothing.

use std::time::Duration;

use super::instances::{Located, VmFacts};

/// How long a VM must be seen gone before its Node is deleted.
pub const GONE_FOR: Duration = Duration::from_mins(1);

/// What a VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// It runs, or is paused: its memory is alive.
    On,
    /// It is stopped, and nothing else is under way.
    Off,
    /// It is suspended to disk: it will go on with the page cache it had, so that its disks must not change meanwhile.
    Suspended,
    /// The HA manager has fenced its host and looks for another: it is dead for certain (pve-ha-manager `Manager.pm`, the state
    /// is entered with the dead host's lock in hand).
    Recovery,
    /// Something is under way that may end either way, or its fencing is not finished: it may still write.
    Unsettled,
    /// Its host is not heard of; it may run there, cut off.
    HostUnreachable,
}

/// What a VM does, by its row.
pub fn power(vm: &VmFacts) -> Power {
    match vm.hastate.as_deref() {
        Some("fence" | "migrate" | "relocate" | "request_start" | "request_start_balance") => {
            return Power::Unsettled;
        }
        Some("recovery") => return Power::Recovery,
        _ => {}
    }
    if !vm.host_online || vm.status == "unknown" {
        return Power::HostUnreachable;
    }
    match (vm.status.as_str(), vm.lock.as_deref()) {
        ("stopped", None) => Power::Off,
        ("stopped", Some("suspended")) => Power::Suspended,
        ("stopped", Some(_)) => Power::Unsettled,
        _ => Power::On,
    }
}

/// What PVE says of a VMID to whoever asks, whatever the token may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oracle {
    /// It was not asked yet.
    NotAsked,
    /// No answer, or not from as many servers as it takes.
    Silent,
    /// Some guest has it.
    Exists,
    /// No guest has it.
    Free,
}

/// What is known of a Node whose VM was not found.
#[expect(clippy::struct_excessive_bools, reason = "each is one line of the proof, in any combination")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// Whether its kubelet lives.
    pub ready: bool,
    /// Whether Cluster API made the Node and deletes it itself.
    pub leave_to_cluster_api: bool,
    /// Whether no Node is to be deleted.
    pub deletion_is_off: bool,
    /// Whether the recorded VMID exists.
    pub oracle: Oracle,
    /// Where the token does not see every VM, as a sentence.
    pub blind: Option<String>,
    /// Whether every region is quorate.
    pub quorate: bool,
    /// How long it was seen gone, and how long it has to be.
    pub seen_gone_for: (Duration, Duration),
}

/// What becomes of a Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It stays.
    Keep,
    /// It stays, and somebody should know why: the reason in one word, and the sentence.
    Refuse(&'static str, String),
    /// It can't be told before the oracle is asked.
    Ask,
    /// Its VM is gone as far as can be seen; to be seen again later.
    Wait,
    /// Its VM is gone; to be confirmed.
    Delete,
}

/// What becomes of a Node that was located so.
pub fn fate(located: &Located, evidence: &Evidence) -> Fate {
    const NOT_DELETED: &str = "NotDeleted";
    const PRIVILEGE: &str = "MissingPrivilege";
    let refuse = |reason, what: &str, why: &str| Fate::Refuse(reason, format!("{what}, {why}"));
    let hint = "hint: give it VM.Audit on /vms of every region";
    let blind = evidence.blind.as_deref();
    let (what, is_absent) = match located {
        Located::Vm { .. } | Located::Twins(_) | Located::NotOurs(_) | Located::Unknown(_) => {
            return Fate::Keep;
        }
        Located::Absent { recorded: None } => {
            let what = "no visible VM has its uuid, and nothing records its VMID";
            return match blind {
                Some(blind) => {
                    refuse(PRIVILEGE, what, &format!("but the token may not see it: {blind}; {hint}"))
                }
                None => Fate::Refuse("VmNotFound", what.to_owned()),
            };
        }
        Located::Absent { recorded: Some((region, vmid)) } => {
            (format!("VM {vmid} of region `{region}` is not there"), Some((region, vmid)))
        }
        Located::Replaced { region, vmid } => {
            (format!("VM {vmid} of region `{region}` is another one now"), None)
        }
    };
    match (evidence.ready, is_absent, blind) {
        // Whatever is gone, its kubelet does not know yet; or it was just deleted.
        (true, Some(_), None) => return Fate::Keep,
        (true, Some(_), Some(blind)) => {
            return refuse(PRIVILEGE, &what, &format!("or the token does not see it: {blind}; {hint}"));
        }
        (true, None, _) => {
            return refuse("VmidReused", &what, "but the kubelet lives: the node is left as it is");
        }
        (false, ..) => {}
    }
    if evidence.leave_to_cluster_api {
        return refuse(NOT_DELETED, &what, "and the Node is left to Cluster API, which made it");
    }
    if evidence.deletion_is_off {
        return refuse(NOT_DELETED, &what, "and deletion of Nodes is off");
    }
    if let Some((region, vmid)) = is_absent {
        match evidence.oracle {
            Oracle::NotAsked => return Fate::Ask,
            Oracle::Silent => {
                return refuse(
                    NOT_DELETED,
                    &what,
                    &format!("but region `{region}` could not be asked for certain whether it exists"),
                );
            }
            Oracle::Exists => {
                return Fate::Refuse(
                    PRIVILEGE,
                    format!(
                        "VM {vmid} of region `{region}` exists, but the token does not see it; hint: give it VM.Audit on /vms/{vmid}"
                    ),
                );
            }
            Oracle::Free => {}
        }
    }
    if let Some(blind) = blind {
        let why =
            format!("but the node's VM may be elsewhere, where the token does not see it: {blind}; {hint}");
        return refuse(PRIVILEGE, &what, &why);
    }
    if !evidence.quorate {
        return refuse(NOT_DELETED, &what, "but not every region is quorate");
    }
    let (seen, least) = evidence.seen_gone_for;
    if seen < least { Fate::Wait } else { Fate::Delete }
}

/// How many Nodes may go at once: one, or a tenth of them.
pub fn most_at_once(nodes: usize) -> usize {
    (nodes / 10).max(1)
}

#[cfg(test)]
mod tests {
    use super::{
        super::instances::{
            NotOurs, Unclear,
            tests::{UUID, vm},
        },
        *,
    };
    use crate::types::VmId;

    fn row(status: &str, lock: Option<&str>, hastate: Option<&str>, host_online: bool) -> Power {
        let mut vm = vm(101, UUID);
        status.clone_into(&mut vm.status);
        vm.lock = lock.map(str::to_owned);
        vm.hastate = hastate.map(str::to_owned);
        vm.host_online = host_online;
        power(&vm)
    }

    #[test]
    fn row_running_and_paused_vms_are_on() {
        for status in ["running", "paused", "prelaunch"] {
            assert_eq!(row(status, None, None, true), Power::On);
        }
        assert_eq!(row("running", Some("backup"), Some("started"), true), Power::On);
    }

    #[test]
    fn row_stopped_without_a_lock_is_off() {
        assert_eq!(row("stopped", None, None, true), Power::Off);
        assert_eq!(row("stopped", None, Some("stopped"), true), Power::Off);
    }

    #[test]
    fn row_stopped_while_ha_moves_or_starts_it_is_unsettled() {
        for hastate in ["migrate", "relocate", "request_start", "request_start_balance"] {
            assert_eq!(row("stopped", None, Some(hastate), true), Power::Unsettled, "{hastate}");
        }
    }

    #[test]
    fn row_suspended_to_disk_is_not_off() {
        assert_eq!(row("stopped", Some("suspended"), None, true), Power::Suspended);
    }

    #[test]
    fn row_stopped_under_another_lock_is_unsettled() {
        for lock in ["migrate", "backup", "suspending", "snapshot"] {
            assert_eq!(row("stopped", Some(lock), None, true), Power::Unsettled, "{lock}");
        }
    }

    #[test]
    fn row_fence_may_still_write() {
        assert_eq!(row("unknown", None, Some("fence"), false), Power::Unsettled);
        assert_eq!(row("stopped", None, Some("fence"), true), Power::Unsettled);
    }

    #[test]
    fn row_recovery_is_proven_dead() {
        assert_eq!(row("unknown", None, Some("recovery"), false), Power::Recovery);
    }

    #[test]
    fn row_ha_vm_started_on_a_new_node_is_on() {
        assert_eq!(row("running", None, Some("started"), true), Power::On);
    }

    #[test]
    fn row_host_offline_without_ha_is_never_off() {
        assert_eq!(row("stopped", None, None, false), Power::HostUnreachable);
        assert_eq!(row("running", None, None, false), Power::HostUnreachable);
        assert_eq!(row("unknown", None, None, true), Power::HostUnreachable);
    }

    fn proven() -> Evidence {
        Evidence {
            ready: false,
            leave_to_cluster_api: false,
            deletion_is_off: false,
            oracle: Oracle::Free,
            blind: None,
            quorate: true,
            seen_gone_for: (GONE_FOR, GONE_FOR),
        }
    }

    fn absent() -> Located {
        Located::Absent { recorded: Some(("r1".parse().expect("a region"), VmId::new(101).expect("a vmid"))) }
    }

    fn replaced() -> Located {
        Located::Replaced { region: "r1".parse().expect("a region"), vmid: VmId::new(101).expect("a vmid") }
    }

    fn blind() -> Evidence {
        Evidence { blind: Some("it lacks VM.Audit on `/vms`".to_owned()), ..proven() }
    }

    #[track_caller]
    fn assert_refused(located: &Located, evidence: &Evidence, reason: &str, names: &str) {
        match fate(located, evidence) {
            Fate::Refuse(why, text) => {
                assert_eq!(why, reason, "{text}");
                assert!(text.contains(names), "`{names}` is not named in: {text}");
            }
            other => panic!("{other:?} instead of a refusal that names `{names}`"),
        }
    }

    #[test]
    fn row_no_row_and_the_vmid_free_is_gone_after_two_observations() {
        assert_eq!(fate(&absent(), &proven()), Fate::Delete);
        let once = Evidence { seen_gone_for: (Duration::from_secs(59), GONE_FOR), ..proven() };
        assert_eq!(fate(&absent(), &once), Fate::Wait);
    }

    #[test]
    fn row_no_row_but_the_vmid_exists_is_a_lost_privilege() {
        let exists = Evidence { oracle: Oracle::Exists, ..proven() };
        assert_refused(&absent(), &exists, "MissingPrivilege", "VM.Audit on /vms/101");
    }

    #[test]
    fn row_no_row_and_no_oracle_is_unproven() {
        assert_eq!(fate(&absent(), &Evidence { oracle: Oracle::NotAsked, ..proven() }), Fate::Ask);
        let refused = |evidence, names| assert_refused(&absent(), &evidence, "NotDeleted", names);
        refused(Evidence { oracle: Oracle::Silent, ..proven() }, "could not be asked");
        refused(Evidence { quorate: false, ..proven() }, "quorate");
        refused(Evidence { deletion_is_off: true, ..proven() }, "is off");
        assert_eq!(fate(&absent(), &Evidence { ready: true, ..proven() }), Fate::Keep);
        assert_refused(
            &Located::Absent { recorded: None },
            &proven(),
            "VmNotFound",
            "nothing records its VMID",
        );
    }

    #[test]
    fn row_a_free_vmid_proves_nothing_where_the_token_does_not_see_every_vm() {
        let blind = blind();
        assert_refused(&absent(), &blind, "MissingPrivilege", "may be elsewhere");
        assert_refused(&absent(), &Evidence { ready: true, ..blind.clone() }, "MissingPrivilege", "/vms");
        assert_refused(&Located::Absent { recorded: None }, &blind, "MissingPrivilege", "may not see it");
    }

    #[test]
    fn row_another_uuid_under_the_vmid_is_gone_only_with_full_sight() {
        // The VMID exists: it is the other VM's.
        assert_eq!(fate(&replaced(), &Evidence { oracle: Oracle::NotAsked, ..proven() }), Fate::Delete);
        assert_refused(&replaced(), &blind(), "MissingPrivilege", "another one");
        assert_refused(&replaced(), &Evidence { ready: true, ..proven() }, "VmidReused", "kubelet lives");
    }

    #[test]
    fn row_nodes_of_cluster_api_are_left_to_it() {
        let theirs = Evidence { leave_to_cluster_api: true, oracle: Oracle::NotAsked, ..proven() };
        assert_refused(&absent(), &theirs, "NotDeleted", "Cluster API");
    }

    #[test]
    fn row_errors_foreign_nodes_and_twins_keep_the_node() {
        let twins = Located::Twins(Vec::new());
        for located in
            [Located::Unknown(Unclear::NoUuid), Located::NotOurs(NotOurs::Foreign("x".into())), twins]
        {
            assert_eq!(fate(&located, &proven()), Fate::Keep);
        }
    }

    #[test]
    fn row_one_node_or_a_tenth_may_go_at_once() {
        assert_eq!([0, 1, 9, 10, 19, 20, 1000].map(most_at_once), [1, 1, 1, 1, 1, 2, 100]);
    }
}
