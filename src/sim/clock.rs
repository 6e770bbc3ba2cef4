//! Time: everything that waits in the simulator waits here, on tokio's clock, so that a test may pause it.

use std::time::Duration;
use tokio::time::Instant;

/// What things cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// The times measured on a real cluster (medians, two shared cores).
    #[default]
    Recorded,
    /// Nothing costs time. Limits (10 s for a lock, 5 s for a hung QEMU) stay: they are behaviour.
    None,
}

/// An act that takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// An answer from pveproxy itself.
    Answer,
    /// Forwarding to pvedaemon.
    Forward,
    /// A failed authentication.
    AuthFailure,
    /// Making a volume.
    Alloc,
    /// Removing a volume, in its task.
    Free,
    /// One image of a content listing: a run of qemu-img.
    ListImage,
    /// Putting a disk into a running VM.
    Plug,
    /// Taking a disk out of a running VM.
    Unplug,
    /// Changing the config of a VM.
    Configure,
    /// Growing a volume.
    Resize,
    /// Starting or stopping a VM, creating or destroying one.
    Power,
    /// A node that does not answer: the time until the address lookup gives up.
    DeadNode,
}

impl Cost {
    fn recorded(self) -> Duration {
        Duration::from_millis(match self {
            Self::Answer => 2,
            Self::Forward | Self::Free => 45,
            Self::AuthFailure | Self::DeadNode => 3000,
            Self::Alloc | Self::Configure => 10,
            Self::ListImage => 19,
            Self::Plug => 90,
            Self::Unplug => 2050,
            Self::Resize => 100,
            Self::Power => 60,
        })
    }
}

/// A clock that starts at a given second and runs with tokio's.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    profile: Profile,
    epoch: u64,
    start: Instant,
    /// Time that had passed before this process began.
    before: Duration,
}

impl Clock {
    /// A clock that reads `epoch` seconds now.
    pub fn new(profile: Profile, epoch: u64) -> Self {
        Self { profile, epoch, start: Instant::now(), before: Duration::ZERO }
    }

    /// The same clock, which stood still while nobody ran it: `before` has passed since its start.
    #[must_use]
    pub fn going_on(self, before: Duration) -> Self {
        Self { before, ..self }
    }

    /// Time since the cluster's start.
    pub fn elapsed(&self) -> Duration {
        self.before + self.start.elapsed()
    }

    /// Seconds since 1970.
    pub fn now(&self) -> u64 {
        self.epoch + self.elapsed().as_secs()
    }

    /// The time as logs show it, in UTC.
    pub fn local(&self) -> String {
        date_of(self.now())
    }

    /// Waits as long as the act takes.
    pub async fn spend(&self, cost: Cost) {
        self.spend_times(cost, 1).await;
    }

    /// Waits as long as the act takes `count` times.
    pub async fn spend_times(&self, cost: Cost, count: u32) {
        if self.profile == Profile::Recorded && count > 0 {
            tokio::time::sleep(cost.recorded() * count).await;
        }
    }
}

/// A time as logs show it, in UTC.
pub(crate) fn date_of(time: u64) -> String {
    let (days, seconds) = (time / 86_400, time % 86_400);
    // Civil date from days since 1970 (Howard Hinnant's algorithm).
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}
