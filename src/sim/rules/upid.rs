//! Unique process ids of tasks: `UPID:node:pid:pstart:starttime:type:id:user:`
//! (pve-common `Tools.pm:upid_encode`, `upid_decode`).

/// The parts of a UPID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upid {
    /// Node that runs the task.
    pub node: String,
    /// Process id.
    pub pid: u32,
    /// Start of the process, in hundredths of a second since boot.
    pub pstart: u64,
    /// Seconds since the epoch.
    pub starttime: u64,
    /// Worker type, such as `qmconfig`.
    pub worker: String,
    /// What it works on, such as `101` or `9999@local`.
    pub id: String,
    /// User or token that started it.
    pub user: String,
}

impl std::fmt::Display for Upid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "UPID:{}:{:08X}:{:08X}:{:08X}:{}:{}:{}:",
            self.node, self.pid, self.pstart, self.starttime, self.worker, self.id, self.user
        )
    }
}

impl Upid {
    /// The parts of `text`, or `None` where PVE says `unable to parse worker upid` (pve-common
    /// `Tools.pm:upid_decode`).
    pub fn parse(text: &str) -> Option<Self> {
        let fields: Vec<&str> = text.split(':').collect();
        let [prefix, node, pid, pstart, starttime, worker, id, user, ""] = fields.as_slice() else {
            return None;
        };
        let hex = |s: &str| {
            ((8..=9).contains(&s.len()) && s.chars().all(|c| c.is_ascii_hexdigit()))
                .then(|| u64::from_str_radix(s, 16).ok())
                .flatten()
        };
        (*prefix == "UPID" && !node.is_empty() && !worker.is_empty() && !user.is_empty()).then_some(())?;
        Some(Self {
            node: (*node).to_owned(),
            pid: u32::try_from(hex(pid)?).ok()?,
            pstart: hex(pstart)?,
            starttime: hex(starttime)?,
            worker: (*worker).to_owned(),
            id: (*id).to_owned(),
            user: (*user).to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_upids_are_read_and_written_back() {
        for text in [
            "UPID:pve1:00004B43:00021E5E:6B001EFB:imgdel:9999@local:csi@pve!csi:",
            "UPID:pve1:0000552B:00023D59:6B001F4B:qmcreate:101:root@pam!csi:",
        ] {
            assert_eq!(Upid::parse(text).map(|u| u.to_string()).as_deref(), Some(text));
        }
        assert_eq!(Upid::parse("garbage"), None);
    }
}
