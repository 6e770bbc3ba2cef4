//! Worker VMs that are real: QEMU processes of the simulator, each with a kernel of its own, and the node plugin in
//! them. The controller runs in the test's process, as in `tests/support`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use proxmox_csi::{
    csi::proto::{self, identity_client::IdentityClient, node_client::NodeClient},
    sim::{
        Options, Sim, World,
        clock::Profile,
        world::{Guest as Kind, Qemu},
    },
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::support::{self, Bench, CSI, GIB};

/// How long a guest may take to boot: it shares two slow processors with everything else.
const BOOT: Duration = Duration::from_mins(2);
/// How long one script or call may take in a guest.
const PATIENCE: Duration = Duration::from_mins(3);
/// Where volumes are staged in a guest.
pub(crate) const STAGING: &str = "/var/lib/kubelet/staging/globalmount";

/// A kernel of Debian's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kernel {
    /// Of Debian 12.
    Linux6_1,
    /// Of Debian 13.
    Linux6_12,
}

impl Kernel {
    fn series(self) -> &'static str {
        match self {
            Self::Linux6_1 => "6.1",
            Self::Linux6_12 => "6.12",
        }
    }
}

/// What the guests boot, built once for each kernel.
fn image(kernel: Kernel) -> PathBuf {
    static BUILT: Mutex<BTreeMap<Kernel, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let make = || {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest-image/build.sh");
        let output = Command::new(script)
            .args([kernel.series(), env!("CARGO_BIN_EXE_proxmox-csi")])
            .output()
            .expect("bash runs the script");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "no image for the guests:\n{said}");
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    };
    built.entry(kernel).or_insert_with(make).clone()
}

/// How the VMs are made.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) kernel: Kernel,
    /// Those of the built-in world that run: 101 and 102 on pve1, 103 on pve2.
    pub(crate) vms: Vec<u32>,
    /// Keys of their configs.
    pub(crate) config: Vec<(&'static str, &'static str)>,
    /// More for the kernel's command line.
    pub(crate) append: &'static str,
    pub(crate) time: Profile,
}

impl Setup {
    /// The VMs, on Linux 6.1, without Proxmox's pauses.
    pub(crate) fn of(vms: &[u32]) -> Self {
        Self {
            kernel: Kernel::Linux6_1,
            vms: vms.to_vec(),
            config: Vec::new(),
            append: "",
            time: Profile::None,
        }
    }

    pub(crate) fn kernel(self, kernel: Kernel) -> Self {
        Self { kernel, ..self }
    }

    /// Boots the VMs.
    pub(crate) async fn boot(self) -> Rig {
        let directory = tempfile::Builder::new().prefix("vm").tempdir().expect("a directory");
        let world = world(self.kernel, &self.vms, &self.config, self.append);
        let state = directory.path().join("s");
        std::fs::create_dir(&state).expect("a directory");
        let options = Options { time: self.time, state: Some(state), ..Options::default() };
        let sim = Sim::start(world, options).expect("the world starts");
        sim.machines_ready().await.expect("QEMU runs");
        let bench = Bench::over(&sim, &support::token(CSI));
        let rig = Rig { bench, directory };
        for vmid in &self.vms {
            rig.guest(*vmid).booted().await;
        }
        rig
    }
}

/// The built-in world with these VMs alone, each of them real.
pub(crate) fn world(kernel: Kernel, vms: &[u32], config: &[(&str, &str)], append: &str) -> World {
    let image = image(kernel);
    let mut world = World::builtin();
    world.vms.retain(|vm| vms.contains(&vm.vmid));
    for vm in &mut world.vms {
        vm.guest = Kind::Qemu;
        let keys = [("memory", "256"), ("cores", "1")];
        vm.config.extend(keys.iter().chain(config).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    }
    let settings = serde_json::json!({
        "kernel": image.join("vmlinux"),
        "initrd": image.join("initrd"),
        "root": image.join("root.img"),
        "append": format!(
            "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check cryptomgr.notests csi.node=worker-{{vmid}} \
             csi.region={} csi.zone={{node}} csi.args=--luks-pbkdf,pbkdf2,--luks-iterations,1000 {append}",
            support::REGION
        ),
        "ports": [7000, 7001],
    });
    world.qemu = Some(serde_json::from_value::<Qemu>(settings).expect("settings of QEMU"));
    world
}

/// A cluster with real guests. It goes with its directory, whatever becomes of the test.
pub(crate) struct Rig {
    pub(crate) bench: Bench,
    directory: TempDir,
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let consoles =
                std::fs::read_dir(self.directory.path().join("s/qemu")).into_iter().flatten().flatten();
            for console in consoles.filter(|entry| entry.path().extension().is_some_and(|e| e == "console")) {
                let text = std::fs::read(console.path()).unwrap_or_default();
                let text = String::from_utf8_lossy(&text).into_owned();
                let lines: Vec<&str> = text.lines().collect();
                let last = lines[lines.len().saturating_sub(40)..].join("\n");
                eprintln!("--- the end of {}:\n{last}", console.path().display());
            }
        }
    }
}

impl Rig {
    pub(crate) fn sim(&self) -> &Sim {
        &self.bench.sim
    }

    /// The guest of a VM that runs.
    pub(crate) fn guest(&self, vmid: u32) -> Guest {
        let access = self.sim().guest_access(vmid).expect("its QEMU runs");
        Guest { vmid, shell: access.ports[&7001], csi: access.ports[&7000] }
    }

    /// Starts a VM that is off.
    pub(crate) async fn start(&self, vmid: u32) {
        self.sim().start_vm(vmid).await.expect("it starts");
        self.guest(vmid).booted().await;
    }

    /// The file with the blocks of a volume.
    pub(crate) fn image(&self, pvc: &Pvc) -> PathBuf {
        let state = self.sim().dump();
        let volid = support::volid(&pvc.volume.volume_id);
        let volumes = state["volumes"].as_array().expect("a list");
        let volume = volumes.iter().find(|volume| volume["volid"] == volid.as_str()).expect("it exists");
        PathBuf::from(volume["image"].as_str().expect("contents are kept"))
    }

    /// Waits until Proxmox says this of a QEMU.
    pub(crate) async fn qmp_status(&self, vmid: u32, wanted: &str) {
        let started = Instant::now();
        loop {
            let path = format!("/nodes/pve1/qemu/{vmid}/status/current");
            let status = self.bench.admin("GET", &path, "").await;
            if status["data"]["qmpstatus"] == wanted {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "not `{wanted}` but {}", status["data"]["qmpstatus"]);
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Makes a volume of 1 GiB.
    pub(crate) async fn volume(&self, name: &str, storage: &str) -> Pvc {
        let volume = self.bench.volume(name, storage).await;
        Pvc {
            volume,
            context: BTreeMap::new(),
            capability: support::mount(),
            staging: STAGING.to_owned(),
            secrets: BTreeMap::new(),
        }
    }

    /// Plugs a volume into a VM.
    pub(crate) async fn attach(&self, pvc: &mut Pvc, vmid: u32) {
        let answer = self.bench.attach(&pvc.volume.volume_id, &format!("worker-{vmid}")).await;
        pvc.context = answer.expect("it is attached");
    }

    /// Takes a volume out of a VM.
    pub(crate) async fn detach(&self, pvc: &Pvc, vmid: u32) {
        let answer = self.bench.detach(&pvc.volume.volume_id, &format!("worker-{vmid}")).await;
        answer.expect("it is detached");
    }
}

/// A volume, as Kubernetes speaks of it.
#[derive(Debug, Clone)]
pub(crate) struct Pvc {
    pub(crate) volume: proto::Volume,
    pub(crate) context: BTreeMap<String, String>,
    pub(crate) capability: proto::VolumeCapability,
    pub(crate) staging: String,
    pub(crate) secrets: BTreeMap<String, String>,
}

impl Pvc {
    /// The same with another file system.
    pub(crate) fn formatted_as(mut self, kind: &str) -> Self {
        use proto::volume_capability::{AccessType, MountVolume};
        let mount = MountVolume { fs_type: kind.to_owned(), ..MountVolume::default() };
        self.capability.access_type = Some(AccessType::Mount(mount));
        self
    }

    /// The same at another staging path.
    pub(crate) fn staged_at(mut self, path: &str) -> Self {
        path.clone_into(&mut self.staging);
        self
    }

    /// The slot that it is in.
    pub(crate) fn slot(&self) -> String {
        format!("scsi{}", self.context["lun"])
    }

    /// What the disk answers to who it is: `naa.…`.
    pub(crate) fn wwid(&self) -> String {
        let path = &self.context["DevicePath"];
        format!("naa.{}", path.rsplit("0x").next().expect("a WWN"))
    }
}

/// A guest that runs.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) vmid: u32,
    shell: u16,
    csi: u16,
}

impl Guest {
    /// Runs a script; returns its exit status and what it said on both outputs.
    pub(crate) async fn run(&self, script: &str) -> Result<(i32, String), std::io::Error> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.shell)).await?;
        let text = format!("exec 2>&1\n(\n{script}\n)\necho; echo \"status $?\"\nexit\n");
        // `$?` behind the empty `echo` would be that one's.
        let text = text.replace("echo; echo \"status $?\"", "status=$?; echo; echo \"status $status\"");
        stream.write_all(text.as_bytes()).await?;
        stream.shutdown().await?;
        let mut said = Vec::new();
        // What was started in the background may keep the connection.
        while !String::from_utf8_lossy(&said)
            .rsplit_once("\nstatus ")
            .is_some_and(|(_, end)| end.ends_with('\n'))
        {
            if stream.read_buf(&mut said).await? == 0 {
                break;
            }
        }
        let said = String::from_utf8_lossy(&said).into_owned();
        let (text, status) = said.trim_end().rsplit_once("\nstatus ").unwrap_or((said.as_str(), ""));
        let status = status.parse().map_err(|_| std::io::Error::other(format!("cut off: {said}")))?;
        Ok((status, text.trim_end().to_owned()))
    }

    /// Runs a script that must succeed; returns what it said.
    pub(crate) async fn sh(&self, script: &str) -> String {
        let ran = timeout(PATIENCE, self.run(script)).await;
        let ran = ran.unwrap_or_else(|_| panic!("VM {}: `{script}` hangs", self.vmid));
        let (status, said) = ran.unwrap_or_else(|error| panic!("VM {}: `{script}`: {error}", self.vmid));
        assert_eq!(status, 0, "VM {}: `{script}` says:\n{said}", self.vmid);
        said
    }

    /// Waits until the node plugin answers.
    async fn booted(&self) {
        let started = Instant::now();
        loop {
            let probe = async {
                let channel = self.channel(Duration::from_secs(5)).await.ok()?;
                IdentityClient::new(channel).probe(proto::ProbeRequest {}).await.ok()
            };
            if timeout(Duration::from_secs(5), probe).await.ok().flatten().is_some() {
                return;
            }
            if started.elapsed() > BOOT {
                let log = timeout(Duration::from_secs(10), self.run("cat /run/node.log")).await;
                panic!("VM {} has no node plugin: {log:?}", self.vmid);
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn channel(&self, limit: Duration) -> Result<Channel, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", self.csi)).expect("an address");
        endpoint.timeout(limit).connect().await
    }

    /// The node plugin in the guest.
    pub(crate) async fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel(PATIENCE).await.expect("the guest listens"))
    }

    pub(crate) async fn try_stage(&self, pvc: &Pvc) -> Result<(), Status> {
        let request = proto::NodeStageVolumeRequest {
            volume_id: pvc.volume.volume_id.clone(),
            publish_context: pvc.context.clone(),
            staging_target_path: pvc.staging.clone(),
            volume_capability: Some(pvc.capability.clone()),
            volume_context: pvc.volume.volume_context.clone(),
            secrets: pvc.secrets.clone(),
        };
        // The kubelet makes it.
        self.sh(&format!("mkdir -p {}", pvc.staging)).await;
        self.node().await.node_stage_volume(request).await.map(drop)
    }

    pub(crate) async fn stage(&self, pvc: &Pvc) {
        self.try_stage(pvc).await.expect("it is staged");
    }

    pub(crate) async fn try_unstage(&self, pvc: &Pvc) -> Result<(), Status> {
        let request = proto::NodeUnstageVolumeRequest {
            volume_id: pvc.volume.volume_id.clone(),
            staging_target_path: pvc.staging.clone(),
        };
        self.node().await.node_unstage_volume(request).await.map(drop)
    }

    pub(crate) async fn unstage(&self, pvc: &Pvc) {
        self.try_unstage(pvc).await.expect("it is unstaged");
    }

    pub(crate) async fn publish(&self, pvc: &Pvc, target: &str, readonly: bool) {
        let request = proto::NodePublishVolumeRequest {
            volume_id: pvc.volume.volume_id.clone(),
            publish_context: pvc.context.clone(),
            staging_target_path: pvc.staging.clone(),
            target_path: target.to_owned(),
            volume_capability: Some(pvc.capability.clone()),
            readonly,
            volume_context: pvc.volume.volume_context.clone(),
            ..Default::default()
        };
        self.sh(&format!("mkdir -p $(dirname {target})")).await;
        self.node().await.node_publish_volume(request).await.expect("it is published");
    }

    pub(crate) async fn unpublish(&self, pvc: &Pvc, target: &str) {
        let request = proto::NodeUnpublishVolumeRequest {
            volume_id: pvc.volume.volume_id.clone(),
            target_path: target.to_owned(),
        };
        self.node().await.node_unpublish_volume(request).await.expect("it is unpublished");
    }

    /// Grows the file system to what the disk has.
    pub(crate) async fn expand(&self, pvc: &Pvc, path: &str, gib: i64) {
        let request = proto::NodeExpandVolumeRequest {
            volume_id: pvc.volume.volume_id.clone(),
            volume_path: path.to_owned(),
            staging_target_path: pvc.staging.clone(),
            capacity_range: Some(proto::CapacityRange { required_bytes: gib * GIB, limit_bytes: 0 }),
            volume_capability: Some(pvc.capability.clone()),
            secrets: pvc.secrets.clone(),
        };
        self.node().await.node_expand_volume(request).await.expect("it is expanded");
    }

    /// The disks that the guest's kernel shows, beside its boot disk.
    pub(crate) async fn disks(&self) -> String {
        self.sh("for d in /sys/block/sd*; do [ -e $d ] && [ $(cat $d/device/vpd_pg83 | strings | grep -c 'drive-scsi0$') = 0 ] && \
                 echo ${d##*/} $(cat $d/size) $(cat $d/device/wwid 2>/dev/null); done; true")
            .await
    }
}
