//! Writes into a guest's tree: `delete` and `rescan` of a disk, `scan` of a host, `rescan` of the PCI bus.

use super::{Guests, Inner};
use rustix::fs::inotify::{self, WatchFlags};
use rustix::io::Errno;
use std::io::Result;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What a watched directory belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watched {
    /// `device/` of a disk.
    Disk { vmid: u32, slot: u32 },
    /// `scsi_host/hostH/` of a controller.
    Host { vmid: u32, slot: u32 },
    /// `bus/pci/`.
    Bus { vmid: u32 },
}

impl Guests {
    pub(super) fn watch_directory(
        &self,
        inner: &mut Inner,
        directory: &Path,
        watched: Watched,
    ) -> Result<()> {
        let watch =
            inotify::add_watch(&self.inotify, directory, WatchFlags::CLOSE_WRITE | WatchFlags::ONLYDIR)?;
        inner.watches.insert(watch, watched);
        Ok(())
    }

    /// Starts to serve writes; ends with the last handle. Must be called within a tokio runtime.
    pub fn watch(self: &Arc<Self>) {
        let weak = Arc::downgrade(self);
        #[expect(
            deprecated,
            reason = "unsound only for types that may swap their descriptor; OwnedFd does not, and the new \
                      constructor is unsafe, which is kept to host/linux"
        )]
        let registered =
            self.inotify.try_clone().and_then(|fd| AsyncFd::with_interest(fd, Interest::READABLE));
        let descriptor = match registered {
            Ok(descriptor) => descriptor,
            Err(error) => {
                tracing::error!(%error, "cannot watch the guests' trees; writes into them have no effect");
                return;
            }
        };
        tokio::spawn(async move {
            while let Ok(mut ready) = descriptor.readable().await {
                let Some(guests) = Weak::upgrade(&weak) else { return };
                // It fails only when the closure panicked; the next write gets its chance.
                let _ = tokio::task::spawn_blocking(move || guests.serve_writes()).await;
                ready.clear_ready();
            }
        });
    }

    /// Carries out all writes that have been seen.
    fn serve_writes(&self) {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        let mut written: Vec<(i32, String)> = Vec::new();
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
                    written.extend(name.map(|name| (event.wd(), name)));
                }
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        for (watch, file) in written {
            let mut inner = self.lock();
            let Some(watched) = inner.watches.get(&watch).copied() else { continue };
            if let Err(error) = self.serve(&mut inner, watched, &file) {
                tracing::error!(?watched, file, %error, "a write into a guest's tree failed");
            }
        }
    }

    fn serve(&self, inner: &mut Inner, watched: Watched, file: &str) -> Result<()> {
        match (watched, file) {
            (Watched::Disk { vmid, slot }, "delete") if Self::take(inner, watched, file) == "1" => {
                Self::delete(inner, vmid, slot)
            }
            // The hypervisor tells the guest of a new size by itself; a rescan finds nothing more.
            (Watched::Disk { .. }, "rescan") => {
                Self::take(inner, watched, file);
                Ok(())
            }
            (Watched::Host { vmid, slot }, "scan") => {
                let text = Self::take(inner, watched, file);
                if scans(&text, slot) { self.scan(inner, vmid, slot) } else { Ok(()) }
            }
            (Watched::Bus { vmid }, "rescan") if Self::take(inner, watched, file) == "1" => {
                let unseen: Vec<u32> = inner.guests.get(&vmid).map_or_else(Vec::new, |guest| {
                    guest
                        .disks
                        .iter()
                        .filter(|(_, disk)| disk.host.is_none())
                        .map(|(slot, _)| *slot)
                        .collect()
                });
                unseen.into_iter().try_for_each(|slot| self.discover(inner, vmid, slot))
            }
            _ => Ok(()),
        }
    }

    /// What was written, without white space around it. The file is emptied for the next write.
    fn take(inner: &Inner, watched: Watched, file: &str) -> String {
        let path: Option<PathBuf> = match watched {
            Watched::Disk { vmid, slot } => {
                Self::place(inner, vmid, slot).map(|(tree, place)| tree.disk_watch(place))
            }
            Watched::Host { vmid, slot } => {
                Self::place(inner, vmid, slot).map(|(tree, place)| tree.host_watch(place))
            }
            Watched::Bus { vmid } => inner.guests.get(&vmid).map(|guest| guest.tree.bus_watch()),
        };
        let Some(path) = path.map(|directory| directory.join(file)) else { return String::new() };
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if !text.is_empty() {
            // Emptying closes the file once more, which finds it empty.
            let _ = std::fs::OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(0));
        }
        text.trim().to_owned()
    }

    fn place(inner: &Inner, vmid: u32, slot: u32) -> Option<(&super::Tree, super::Place)> {
        let guest = inner.guests.get(&vmid)?;
        let host = guest.disks.get(&slot)?.host?;
        Some((&guest.tree, super::Place { slot, host }))
    }
}

/// Whether a scan of `channel id lun` covers the disk at channel 0, id 0 of this LUN; `-` stands for all.
fn scans(text: &str, slot: u32) -> bool {
    let covers = |field: &str, number: u32| field == "-" || field.parse() == Ok(number);
    let fields: Vec<&str> = text.split_whitespace().collect();
    matches!(fields.as_slice(), [channel, id, lun] if covers(channel, 0) && covers(id, 0) && covers(lun, slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_names_channel_id_and_lun() {
        assert!(scans("0 0 3", 3));
        assert!(scans("- - -", 3));
        assert!(!scans("0 0 4", 3));
        assert!(!scans("1 2", 3));
    }
}
