//! The whole driver as processes: the simulator, one controller, and a node plugin for each VM that is this machine.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::{Fail, guest::Guest};

/// How long a process may take to be ready, and to end.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a kernel may take to boot on a slow machine.
const BOOT: Duration = Duration::from_mins(2);
/// The name of the region in the demo's configuration.
pub const REGION: &str = "homelab";

/// A worker VM: this machine, or one of its own.
#[derive(Debug, Clone)]
pub struct Worker {
    pub name: String,
    pub vmid: u32,
    pub pve_node: String,
    pub socket: PathBuf,
    pub sys: PathBuf,
    pub dev: PathBuf,
    /// What it is where it is not this machine.
    pub guest: Option<Guest>,
}

impl Worker {
    /// Where its node plugin listens.
    pub fn endpoint(&self) -> String {
        match &self.guest {
            Some(guest) => guest.csi.clone(),
            None => format!("unix://{}", self.socket.display()),
        }
    }
}

/// The running processes and where they are.
pub struct Stack {
    pub directory: PathBuf,
    pub url: String,
    pub ca: PathBuf,
    pub controller: PathBuf,
    pub workers: Vec<Worker>,
    processes: Vec<(String, Child)>,
}

/// What `pve-sim` says when it is ready.
#[derive(Deserialize)]
struct Ready {
    url: String,
    ca: PathBuf,
    tokens: BTreeMap<String, String>,
    guests: BTreeMap<u32, Reached>,
}

/// Where a guest is: trees of this machine, or ports of its own.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Reached {
    sys: PathBuf,
    dev: PathBuf,
    ports: BTreeMap<String, u16>,
}

impl Stack {
    /// Starts everything below `directory`, which must be empty. What was started is stopped by [`Stack::stop`], and by the kernel
    /// should this process die.
    pub async fn start(
        directory: &Path,
        time: &str,
        world: Option<&Path>,
        stack: &mut Option<Stack>,
    ) -> Result<(), Fail> {
        let this = stack.insert(Stack {
            directory: directory.to_owned(),
            url: String::new(),
            ca: PathBuf::new(),
            controller: directory.join("controller/csi.sock"),
            workers: Vec::new(),
            processes: Vec::new(),
        });
        this.run(time, world).await
    }

    async fn run(&mut self, time: &str, world: Option<&Path>) -> Result<(), Fail> {
        let ready_file = self.directory.join("pve-sim.json");
        let state = self.directory.join("pve");
        let mut arguments = vec![
            "serve".into(),
            "--state".into(),
            state.display().to_string(),
            "--time".into(),
            time.into(),
            "--ready-file".into(),
            ready_file.display().to_string(),
        ];
        arguments.extend(world.map(|world| format!("--world={}", world.display())));
        self.spawn("pve-sim", "pve-sim", &arguments)?;
        self.wait_for("pve-sim", &ready_file).await?;
        let ready: Ready = serde_json::from_slice(&fs::read(&ready_file)?)?;
        let token = ready.tokens.get("csi@pve!holder").and_then(|header| header.strip_prefix("PVEAPIToken="));
        let (token_id, secret) =
            token.and_then(|token| token.split_once('=')).ok_or("pve-sim has no token csi@pve!holder")?;
        (self.url, self.ca) = (ready.url, ready.ca);

        let mut nodes = String::from("nodes:\n");
        for (vmid, guest) in &ready.guests {
            let real = if guest.ports.is_empty() { None } else { Some(Guest::at(&guest.ports)?) };
            let uuid = match &real {
                Some(_) => crate::show::uuid_of(self, *vmid).await?,
                None => fs::read_to_string(guest.sys.join("class/dmi/id/product_uuid"))?,
            };
            let name = format!("worker-{vmid}");
            let (uuid, region) = (uuid.trim(), REGION);
            writeln!(nodes, "  - {{name: {name}, region: {region}, vmid: {vmid}, uuid: {uuid}}}")?;
            self.workers.push(Worker {
                socket: self.directory.join(format!("{name}/csi.sock")),
                name,
                vmid: *vmid,
                pve_node: crate::show::node_of(self, *vmid).await?,
                sys: guest.sys.clone(),
                dev: guest.dev.clone(),
                guest: real,
            });
        }
        let (config, nodes_file) = (self.directory.join("config.yaml"), self.directory.join("nodes.yaml"));
        fs::write(&nodes_file, nodes)?;
        fs::write(
            &config,
            format!(
                "clusters:\n  - url: {}\n    ca_file: {}\n    token_id: {token_id}\n    token_secret: {secret}\n    region: {REGION}\n",
                self.url,
                self.ca.display()
            ),
        )?;

        self.spawn(
            "controller",
            "proxmox-csi",
            &[
                "controller".into(),
                format!("--csi-address=unix://{}", self.controller.display()),
                format!("--cloud-config={}", config.display()),
                format!("--nodes={}", nodes_file.display()),
            ],
        )?;
        for worker in self.workers.clone().into_iter().filter(|worker| worker.guest.is_none()) {
            self.spawn(
                &worker.name,
                "proxmox-csi",
                &[
                    "node".into(),
                    format!("--csi-address=unix://{}", worker.socket.display()),
                    format!("--node-id={}", worker.name),
                    format!("--region={REGION}"),
                    format!("--zone={}", worker.pve_node),
                    // As many as a VM has slots for.
                    "--max-volumes=30".into(),
                    format!("--sysfs-root={}", worker.sys.display()),
                    format!("--dev-root={}", worker.dev.display()),
                ],
            )?;
        }
        self.wait_for("controller", &self.controller.clone()).await?;
        for worker in self.workers.clone() {
            match &worker.guest {
                Some(guest) => Self::booted(&worker, guest).await?,
                None => self.wait_for(&worker.name, &worker.socket).await?,
            }
        }
        Ok(())
    }

    /// Waits until the node plugin in a guest listens, and forgets what the kernel said until then.
    async fn booted(worker: &Worker, guest: &Guest) -> Result<(), Fail> {
        let started = Instant::now();
        while guest.sh("[ -S /run/csi/csi.sock ]").await.is_err() {
            if started.elapsed() > BOOT {
                return Err(format!("{} does not boot", worker.name).into());
            }
            sleep(Duration::from_millis(200)).await;
        }
        guest.news().await.map(drop)
    }

    fn spawn(&mut self, name: &str, binary: &str, arguments: &[String]) -> Result<(), Fail> {
        // The binaries lie next to the examples' directory.
        let own = std::env::current_exe()?;
        let path =
            own.parent().and_then(Path::parent).ok_or("this program lies in no directory")?.join(binary);
        if !path.exists() {
            return Err(format!("`{}` is missing; hint: `cargo build --bins` first", path.display()).into());
        }
        let log = fs::File::create(self.directory.join(format!("{name}.log")))?;
        let child = Command::new(&path)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C reaches this program alone, which then ends the others in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot start `{}`: {error}", path.display()))?;
        self.processes.push((name.to_owned(), child));
        Ok(())
    }

    async fn wait_for(&mut self, name: &str, path: &Path) -> Result<(), Fail> {
        let started = Instant::now();
        while !path.exists() {
            let process = self.processes.iter_mut().find(|(other, _)| other == name);
            let ended = process.and_then(|(_, child)| child.try_wait().ok().flatten());
            if ended.is_some() || started.elapsed() > PATIENCE {
                let log = fs::read_to_string(self.directory.join(format!("{name}.log"))).unwrap_or_default();
                return Err(format!("`{name}` does not get ready; its log:\n{log}").into());
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// The log of a process.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.directory.join(format!("{name}.log"))).unwrap_or_default()
    }

    /// Takes away what is still mounted, ends the processes in order, and tells what is left over after that: nothing, if all is well.
    pub async fn stop(mut self) -> Vec<String> {
        let mut left = Vec::new();
        for target in self.mounts().into_iter().rev() {
            if let Err(error) = umount2(&target, MntFlags::empty()) {
                left.push(format!("`{}` is still mounted: {error}", target.display()));
            }
        }
        // The controller and the nodes first, the simulator last: it takes its disks away.
        for (name, mut child) in self.processes.drain(..).rev() {
            if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
            if timeout(PATIENCE, child.wait()).await.is_err() {
                left.push(format!("`{name}` did not end after SIGTERM and was killed"));
                let _ = child.kill().await;
            }
        }
        let started = Instant::now();
        while !loops(&self.directory).is_empty() && started.elapsed() < Duration::from_secs(5) {
            sleep(Duration::from_millis(50)).await;
        }
        left.extend(loops(&self.directory).into_iter().map(|device| format!("{device} is still there")));
        left
    }

    /// The mounts below the directory, in the order of mounting.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let paths = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
        paths.filter(|path| path.starts_with(&self.directory)).collect()
    }
}

/// The loop devices whose files lie below a directory.
pub fn loops(directory: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    devices
        .filter(|device| {
            let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
            Path::new(backing.trim_end()).starts_with(directory)
        })
        .map(|device| format!("/dev/{}", device.file_name().to_string_lossy()))
        .collect()
}
