//! What a person wants to see: what was asked, what Proxmox was told, what the kernel shows, how long it took.

use std::{fs, path::Path, time::Duration};

use serde::Deserialize;

use crate::{
    Fail,
    stack::{Stack, Worker},
};

/// One request that the simulator answered.
#[derive(Debug, Deserialize)]
struct Entry {
    n: u64,
    method: String,
    path: String,
    status: u16,
    elapsed_ms: u64,
}

/// Prints steps; remembers how much of the simulator's log has been shown.
pub struct Show {
    seen: u64,
    step: u32,
}

impl Show {
    pub fn new() -> Self {
        Self { seen: 0, step: 0 }
    }

    /// The number of the last step that was printed.
    pub fn steps(&self) -> u32 {
        self.step
    }

    /// Begins a step.
    pub fn title(&mut self, text: &str) {
        self.step += 1;
        println!("\n{:>2}. {text}", self.step);
    }

    /// A line of a step: who, and what.
    pub fn line(who: &str, text: &str) {
        println!("      {who:<8} {text}");
    }

    /// What Proxmox was told since the last time, and how long the call took as a whole.
    pub async fn end(&mut self, stack: &Stack, elapsed: Duration) -> Result<(), Fail> {
        let entries: Vec<Entry> = serde_json::from_value(get(stack, "/_sim/log").await?)?;
        let new: Vec<&Entry> = entries.iter().filter(|entry| entry.n > self.seen).collect();
        let (reads, changes): (Vec<&Entry>, Vec<&Entry>) =
            new.iter().copied().partition(|entry| entry.method == "GET");
        for change in &changes {
            let path = change.path.strip_prefix("/api2/json").unwrap_or(&change.path);
            let path = path.replace("%3A", ":").replace("%2F", "/");
            Self::line(
                "proxmox",
                &format!("{} {path} -> {} ({} ms)", change.method, change.status, change.elapsed_ms),
            );
        }
        if !new.is_empty() {
            Self::line(
                "proxmox",
                &format!("{} requests: {} reads, {} changes", new.len(), reads.len(), changes.len()),
            );
        }
        self.seen = entries.iter().map(|entry| entry.n).max().unwrap_or(self.seen);
        Self::line("took", &format!("{} ms", elapsed.as_millis()));
        Ok(())
    }
}

/// Asks the simulator itself.
pub async fn get(stack: &Stack, path: &str) -> Result<serde_json::Value, Fail> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let ca = reqwest::Certificate::from_pem(&fs::read(&stack.ca)?)?;
    let client = reqwest::Client::builder().tls_certs_only([ca]).build()?;
    let body = client.get(format!("{}{path}", stack.url)).send().await?.bytes().await?;
    Ok(serde_json::from_slice(&body)?)
}

/// The PVE node of a VM.
pub async fn node_of(stack: &Stack, vmid: u32) -> Result<String, Fail> {
    let state = get(stack, "/_sim/state").await?;
    let node = state["vms"][vmid.to_string()]["node"].as_str();
    Ok(node.ok_or_else(|| format!("pve-sim does not say where VM {vmid} is"))?.to_owned())
}

/// The SMBIOS uuid of a VM.
pub async fn uuid_of(stack: &Stack, vmid: u32) -> Result<String, Fail> {
    let state = get(stack, "/_sim/state").await?;
    let smbios = state["vms"][vmid.to_string()]["conf"]["current"]["smbios1"].as_str().unwrap_or_default();
    let uuid = smbios.split(',').find_map(|part| part.strip_prefix("uuid="));
    Ok(uuid.ok_or_else(|| format!("VM {vmid} has no uuid"))?.to_owned())
}

/// The disks that a worker's kernel shows, but the boot disk, as one line each.
pub fn disks(worker: &Worker) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(worker.sys.join("block"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let read = |path: &Path| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let disks = names.iter().filter_map(|name| {
        let block = worker.sys.join("block").join(name);
        let wwid = read(&block.join("device/wwid"));
        let sectors: u64 = read(&block.join("size")).parse().unwrap_or(0);
        let number = read(&block.join("dev"));
        let target = fs::canonicalize(block.join("device")).ok()?;
        let address = target.file_name()?.to_string_lossy().into_owned();
        wwid.starts_with("naa.")
            .then(|| format!("{name}: {} MiB, {wwid}, SCSI {address}, block device {number}", sectors / 2048))
    });
    disks.collect()
}

/// A mount as the kernel lists it: file system, size and options.
pub fn mount(target: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let line =
        table.lines().rfind(|line| line.split(' ').nth(4).is_some_and(|path| Path::new(path) == target));
    let Some(line) = line else { return "nothing is mounted there".to_owned() };
    let fields: Vec<&str> = line.split(' ').collect();
    let dash = fields.iter().position(|field| *field == "-").unwrap_or(0);
    let size = nix::sys::statvfs::statvfs(target).map(|stat| (stat.blocks() * stat.fragment_size()) >> 20);
    format!(
        "{} of {} MiB on block device {}, {}",
        fields.get(dash + 1).copied().unwrap_or("?"),
        size.map_or_else(|_| "?".to_owned(), |size| size.to_string()),
        fields.get(2).copied().unwrap_or("?"),
        fields.get(5).copied().unwrap_or("?"),
    )
}
