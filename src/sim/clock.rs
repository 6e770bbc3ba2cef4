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
}

impl Clock {
    /// A clock that reads `epoch` seconds now.
    pub fn new(profile: Profile, epoch: u64) -> Self {
        Self { profile, epoch, start: Instant::now() }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Seconds since 1970.
    pub fn now(&self) -> u64 {
        self.epoch + self.elapsed().as_secs()
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
