//! What the doctor says: findings with stable codes, what it found in order, and what it could not look at.

use std::fmt;

use serde::Serialize;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work, or data is in danger.
    Error,
    /// Something will not work one day, or is left over.
    Warning,
    /// Good to know; nobody has to act.
    Note,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        })
    }
}

macro_rules! codes {
    ($($variant:ident $text:literal $severity:ident $meaning:literal;)*) => {
        /// What kind of finding it is. The words never change: programs and runbooks go by them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Code {
            $(#[doc = $meaning] $variant,)*
        }

        impl Code {
            /// All codes, in the order in which findings are told.
            pub const ALL: &[Code] = &[$(Self::$variant,)*];

            /// The word.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// How bad it is.
            pub fn severity(self) -> Severity {
                match self { $(Self::$variant => Severity::$severity,)* }
            }

            /// What it means, in a sentence without its full stop.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }
        }
    };
}

codes! {
    Config "config" Warning "the configuration file has something that is unknown, misspelt or risky";
    ServerUnreachable "server-unreachable" Error "no connection to a server: its name is not known, or nothing answers at its address";
    Certificate "certificate" Error "the certificate of a server is not trusted, is for another name, or has expired";
    ServerFailed "server-failed" Error "a server was reached and gave no usable answer";
    ServersDiffer "servers-differ" Error "the servers of one region are of different Proxmox clusters";
    ClockSkew "clock-skew" Warning "the clock of this machine and that of Proxmox differ";
    TokenRefused "token-refused" Error "Proxmox does not take the token";
    TokenExpires "token-expires" Warning "the token expires within 30 days";
    NoQuorum "no-quorum" Error "the Proxmox cluster has lost its quorum: no config can be changed";
    HostOffline "host-offline" Warning "a Proxmox node is offline: nothing can be told or changed of its VMs";
    PrivilegeMissing "privilege-missing" Error "the token lacks a privilege that the driver needs";
    PrivilegeOptional "privilege-optional" Note "the token lacks a privilege that only some operations need";
    StorageNotFound "storage-not-found" Error "a StorageClass or a PV names a storage that the token does not see";
    StorageDisabled "storage-disabled" Error "a storage that is used is switched off";
    StorageInactive "storage-inactive" Error "a storage that is used is not available on a node that is online";
    StorageContent "storage-content" Error "a storage that is used does not take images";
    StorageThickLvm "storage-thick-lvm" Warning "a storage is thick LVM, where no volume is made or formatted";
    StorageUnknownType "storage-unknown-type" Warning "a storage is of a type of which it is not known that its volumes are blank";
    StorageFull "storage-full" Warning "a storage that is used has less than a tenth of its space left";
    StorageNodes "storage-nodes" Note "a storage is not on all Proxmox nodes that run workers";
    StorageUnproven "storage-unproven" Note "a directory that could vanish without being noticed: set `is_mountpoint` on it";
    OwnerVm "owner-vm" Warning "a VM exists under the VMID that owns the volumes; who destroys it may destroy them";
    OwnerDefault "owner-default" Note "volumes are owned by the default VMID 9999, which Proxmox hands out one day";
    HolderLeftOver "holder-left-over" Warning "a short-lived VM of the driver is still there";
    HolderRange "holder-range" Warning "VMs of others are in the range of VMIDs for short-lived VMs";
    ClusterForbidden "kubernetes-unreadable" Error "objects of Kubernetes can not be listed";
    NodeUnclear "node-unclear" Error "a Node does not say which VM it is";
    NodeRegion "node-region" Error "a Node has no region label, or one that is not configured";
    NodeZone "node-zone" Error "a Node has no zone label, or another one than the Proxmox node that its VM runs on";
    NodeVmMissing "node-vm-missing" Error "no VM has the uuid of a Node";
    NodeVmHidden "node-vm-hidden" Error "the VM of a Node exists and the token does not see it";
    NodeVmTwice "node-vm-twice" Error "several VMs have the uuid of a Node";
    NotRegistered "driver-not-registered" Warning "the node plugin is not registered on a Node";
    TopologyKeys "csinode-topology" Error "the node plugin registered without the topology keys of the driver";
    NodeId "csinode-node-id" Error "the node id that the node plugin registered is not that of its VM";
    NodeLimit "csinode-limit" Warning "the scheduler puts more volumes on a Node than its VM has slots for";
    VmScsiHardware "vm-scsihw" Error "the VM of a Node has a SCSI controller that can not carry volumes";
    VmHotplug "vm-hotplug" Error "the VM of a Node runs without hotplug of disks";
    VmProtection "vm-protection" Warning "the VM of a Node is protected, so that no drive can be removed";
    VmLocked "vm-locked" Warning "the VM of a Node is locked";
    VmSilent "vm-silent" Error "the QEMU process of a VM does not answer";
    VmUnreadable "vm-unreadable" Warning "a VM can not be read, so that it is not known what it holds";
    VmSnapshot "vm-snapshot" Warning "a snapshot of a VM holds a volume: a rollback would take its data back and plug it in again";
    VmAgent "vm-agent" Note "the VM of a Node has no guest agent";
    HaLocalVolume "ha-local-volume" Warning "a VM of the HA manager holds a local volume and could not be started elsewhere";
    ClassParameter "class-parameter" Error "a StorageClass has a parameter that can not be used";
    ClassBinding "class-binding" Warning "a StorageClass on a local storage binds before it is known where the pod runs";
    PvHandle "pv-handle" Error "the handle of a PV can not be read, or names a region that is not configured";
    PvTwice "pv-twice" Error "two PVs are one volume";
    PvStranded "pv-stranded" Error "no Node fits the node affinity of a PV";
    PvWouldStrand "pv-would-strand" Warning "no Node would fit the node affinity of a PV once zone labels are true";
    VolumeMissing "volume-missing" Error "the volume of a PV is proven not to be there";
    VolumeUnproven "volume-unproven" Warning "it can not be told whether the volume of a PV is there";
    VolumeSize "volume-size" Warning "a volume is smaller than its PV says";
    VolumeOrphan "volume-orphan" Warning "a volume of the driver's owner has no PV in this cluster";
    DoubleAttachment "double-attachment" Error "several VMs hold one volume";
    SlotDangling "slot-dangling" Warning "a VM holds a volume, and no VolumeAttachment says so";
    SlotPending "slot-pending" Warning "a change of a volume's slot is pending and would be applied at the next start of the VM";
    SlotVolumeGone "slot-volume-gone" Warning "a slot of a VM names a volume that its storage does not list";
    AttachmentMissingSlot "attachment-without-slot" Error "a VolumeAttachment says attached, and the VM does not hold the volume";
    AttachmentElsewhere "attachment-elsewhere" Error "a VolumeAttachment names one node, and the VM of another holds the volume";
    AttachmentName "attachment-name" Error "a VolumeAttachment tells the node to look for another disk than the one in the slot";
    AttachmentOrphan "attachment-orphan" Warning "a VolumeAttachment is of a PV or a Node that is not there";
    AttachmentFailed "attachment-failed" Warning "the last attach or detach of a VolumeAttachment failed";
    QemuLacks "qemu-lacks" Error "the config of a running VM has a volume, and its QEMU does not";
    QemuStray "qemu-stray" Error "the QEMU of a VM has a drive that its config does not know and that may be any volume";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl std::str::FromStr for Code {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.as_str() == text)
            .ok_or_else(|| "it is no code of a finding; `proxmox-csi doctor --codes` lists them".to_owned())
    }
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind.
    pub code: Code,
    /// How bad.
    pub severity: Severity,
    /// Where: `configuration`, `kubernetes`, or a region.
    pub area: String,
    /// What it is about: a server, storage, VM, Node, PV or volume.
    pub subject: String,
    /// What was found.
    pub text: String,
    /// What it means or what to look at, where the text does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What to type, in this order.
    pub commands: Vec<String>,
    /// What `--repair` does about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repair: Option<String>,
}

impl Finding {
    /// A finding of this kind.
    pub fn new(code: Code, area: &str, subject: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            code,
            severity: code.severity(),
            area: area.to_owned(),
            subject: subject.into(),
            text: text.into(),
            hint: None,
            commands: Vec::new(),
            repair: None,
        }
    }

    /// With what it means.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With one more thing to type.
    #[must_use]
    pub fn command(mut self, command: impl Into<String>) -> Self {
        self.commands.push(command.into());
        self
    }

    /// Of another severity than usual.
    #[must_use]
    pub fn severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }
}

/// Something that is as it should be, or that could not be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Remark {
    /// Where.
    pub area: String,
    /// What.
    pub text: String,
}

/// All that was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What is as it should be.
    pub passed: Vec<Remark>,
    /// What is not.
    pub findings: Vec<Finding>,
    /// What was not looked at, and why. It is not thereby good.
    pub unseen: Vec<Remark>,
}

impl Report {
    /// Something is as it should be.
    pub fn pass(&mut self, area: &str, text: impl Into<String>) {
        self.passed.push(Remark { area: area.to_owned(), text: text.into() });
    }

    /// Something is not.
    pub fn find(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    /// Something could not be looked at.
    pub fn unseen(&mut self, area: &str, text: impl Into<String>) {
        self.unseen.push(Remark { area: area.to_owned(), text: text.into() });
    }

    /// Says that a group of checks passed, unless something was found since `before`.
    pub fn pass_unless_found(&mut self, before: usize, area: &str, text: impl Into<String>) {
        if self.findings[before..].iter().all(|finding| finding.severity == Severity::Note) {
            self.pass(area, text);
        }
    }

    /// Whether somebody has to act.
    pub fn needs_action(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity != Severity::Note)
    }

    /// Sorts findings by severity, then by kind and subject, so that the same state always reads the same.
    pub fn sort(&mut self) {
        self.findings.sort_by(|a, b| {
            (a.severity, &a.area, a.code, &a.subject).cmp(&(b.severity, &b.area, b.code, &b.subject))
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_is_one_word_and_reads_back() {
        let words: BTreeSet<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(words.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_eq!(code.as_str().parse(), Ok(*code));
            assert!(code.as_str().chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{code}");
            assert!(!code.meaning().ends_with('.'));
        }
        assert!("nonsense".parse::<Code>().is_err());
    }

    #[test]
    fn a_note_alone_asks_nobody_to_act() {
        let mut report = Report::default();
        report.find(Finding::new(Code::VmAgent, "r", "VM 101", "no agent"));
        assert!(!report.needs_action());
        report.pass_unless_found(0, "r", "vms");
        assert_eq!(report.passed.len(), 1);
        report.find(Finding::new(Code::VmLocked, "r", "VM 101", "locked"));
        report.pass_unless_found(1, "r", "more");
        assert!(report.needs_action());
        assert_eq!(report.passed.len(), 1);
    }
}
