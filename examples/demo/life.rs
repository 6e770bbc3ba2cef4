//! The life of a PVC, call by call, as Kubernetes makes them.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use proxmox_csi::csi::proto::{
    self, controller_client::ControllerClient, node_client::NodeClient, volume_capability,
};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};

use crate::{
    Fail,
    show::{self, Show},
    stack::{REGION, Stack, Worker},
};

const GIB: i64 = 1 << 30;
/// How much is written and verified.
const DATA: usize = 64 << 20;

/// The volume on its way.
struct Life<'a> {
    stack: &'a Stack,
    show: &'a mut Show,
    controller: ControllerClient<Channel>,
    volume: proto::Volume,
    publish: BTreeMap<String, String>,
}

async fn channel(endpoint: String) -> Result<Channel, Fail> {
    Ok(Endpoint::from_shared(endpoint)?.connect().await?)
}

fn capability() -> proto::VolumeCapability {
    let mode =
        volume_capability::AccessMode { mode: volume_capability::access_mode::Mode::SingleNodeWriter.into() };
    let mount = volume_capability::MountVolume { fs_type: "xfs".into(), ..Default::default() };
    proto::VolumeCapability {
        access_mode: Some(mode),
        access_type: Some(volume_capability::AccessType::Mount(mount)),
    }
}

/// Where the life is to end early.
#[derive(Clone, Copy)]
pub struct Stops {
    /// With an error after this step, to show what a failure leaves behind.
    pub fail_after: Option<u32>,
    /// Never after this step: it waits to be interrupted.
    pub pause_after: Option<u32>,
}

async fn check(life: &Life<'_>, stops: Stops) -> Result<(), Fail> {
    let reached = |step: Option<u32>| step.filter(|step| life.show.steps() >= *step);
    if let Some(step) = reached(stops.fail_after) {
        return Err(format!("step {step} was to fail").into());
    }
    if reached(stops.pause_after).is_some() {
        println!("\nPaused in {}. Ctrl-C ends it and takes everything away.", life.stack.directory.display());
        std::future::pending::<()>().await;
    }
    Ok(())
}

/// Runs the life.
pub async fn run(stack: &Stack, show: &mut Show, stops: Stops) -> Result<(), Fail> {
    let [first, .., second] = stack.workers.as_slice() else { return Err("two workers are needed".into()) };
    let mut life = Life {
        stack,
        show,
        controller: ControllerClient::new(channel(format!("unix://{}", stack.controller.display())).await?),
        volume: proto::Volume::default(),
        publish: BTreeMap::new(),
    };
    life.create().await?;
    check(&life, stops).await?;
    life.attach(first).await?;
    check(&life, stops).await?;
    life.stage(first, "find the disk, prove that it is blank, format it as XFS and mount it").await?;
    check(&life, stops).await?;
    life.publish(first).await?;
    check(&life, stops).await?;
    let sum = life.write(first).await?;
    check(&life, stops).await?;

    life.unpublish(first).await?;
    life.unstage(first).await?;
    check(&life, stops).await?;
    life.stage(first, "the pod comes back: find the disk again, without a new attach").await?;
    life.publish(first).await?;
    life.verify(first, &sum, "the data is there after unstage and stage").await?;
    check(&life, stops).await?;

    life.grow(first).await?;
    life.verify(first, &sum, "the data is there after growing").await?;
    check(&life, stops).await?;

    life.unpublish(first).await?;
    life.unstage(first).await?;
    life.detach(first).await?;
    check(&life, stops).await?;
    life.attach(second).await?;
    life.stage(second, "on the other VM: the disk holds XFS, so it is mounted and not formatted").await?;
    life.publish(second).await?;
    life.verify(second, &sum, "the data is there on the other VM").await?;
    check(&life, stops).await?;

    life.unpublish(second).await?;
    life.unstage(second).await?;
    life.detach(second).await?;
    check(&life, stops).await?;
    life.delete().await
}

impl Life<'_> {
    /// Where the kubelet of a worker has its directories.
    fn kubelet(&self, worker: &Worker) -> PathBuf {
        match &worker.guest {
            Some(_) => "/var/lib/kubelet".into(),
            None => self.stack.directory.join(&worker.name),
        }
    }

    fn staging(&self, worker: &Worker) -> PathBuf {
        self.kubelet(worker).join("staging/globalmount")
    }

    fn target(&self, worker: &Worker) -> PathBuf {
        self.kubelet(worker).join("pods/database/mount")
    }

    /// Makes a directory, as the kubelet does before it calls.
    async fn make(worker: &Worker, directory: &Path) -> Result<(), Fail> {
        match &worker.guest {
            Some(guest) => guest.sh(&format!("mkdir -p {}", directory.display())).await.map(drop),
            None => Ok(fs::create_dir_all(directory)?),
        }
    }

    async fn mount(worker: &Worker, target: &Path) -> Result<(), Fail> {
        let mount = match &worker.guest {
            Some(guest) => guest.mount(target).await?,
            None => show::mount(target),
        };
        Show::line("kernel", &mount);
        Ok(())
    }

    async fn node(&self, worker: &Worker) -> Result<NodeClient<Channel>, Fail> {
        Ok(NodeClient::new(channel(worker.endpoint()).await?))
    }

    async fn kernel(worker: &Worker) -> Result<(), Fail> {
        let disks = match &worker.guest {
            Some(guest) => {
                for line in guest.news().await? {
                    Show::line("kernel", &format!("{} says {line}", worker.name));
                }
                guest.disks().await?
            }
            None => show::disks(worker),
        };
        if disks.is_empty() {
            Show::line("kernel", &format!("{} shows no disk but its boot disk", worker.name));
        }
        for disk in disks {
            Show::line("kernel", &format!("{} shows {disk}", worker.name));
        }
        Ok(())
    }

    async fn create(&mut self) -> Result<(), Fail> {
        self.show.title("CreateVolume: 1 GiB on storage `shared`, from StorageClass proxmox-data-xfs");
        let started = Instant::now();
        let segments = BTreeMap::from([("topology.kubernetes.io/region".to_owned(), REGION.to_owned())]);
        let topology = proto::Topology { segments };
        let request = proto::CreateVolumeRequest {
            name: "pvc-5f1f6dd1-7a0c-4b0e-9d1c-0d2f3c1f8a11".into(),
            capacity_range: Some(proto::CapacityRange { required_bytes: GIB, limit_bytes: 0 }),
            volume_capabilities: vec![capability()],
            parameters: BTreeMap::from([
                ("storage".to_owned(), "shared".to_owned()),
                ("ssd".to_owned(), "true".to_owned()),
            ]),
            accessibility_requirements: Some(proto::TopologyRequirement {
                requisite: vec![topology.clone()],
                preferred: vec![topology],
            }),
            ..Default::default()
        };
        let response = self.controller.create_volume(request).await?.into_inner();
        self.volume = response.volume.ok_or("CreateVolume answered no volume")?;
        Show::line("volume", &self.volume.volume_id);
        self.show.end(self.stack, started.elapsed()).await
    }

    async fn attach(&mut self, worker: &Worker) -> Result<(), Fail> {
        self.show.title(&format!(
            "ControllerPublishVolume: plug it into {} (VM {} on {})",
            worker.name, worker.vmid, worker.pve_node
        ));
        let started = Instant::now();
        let request = proto::ControllerPublishVolumeRequest {
            volume_id: self.volume.volume_id.clone(),
            node_id: worker.name.clone(),
            volume_capability: Some(capability()),
            volume_context: self.volume.volume_context.clone(),
            ..Default::default()
        };
        self.publish = self.controller.controller_publish_volume(request).await?.into_inner().publish_context;
        let elapsed = started.elapsed();
        Show::line("answer", &format!("slot scsi{}, {}", self.publish["lun"], self.publish["DevicePath"]));
        Self::kernel(worker).await?;
        self.show.end(self.stack, elapsed).await
    }

    async fn stage(&mut self, worker: &Worker, why: &str) -> Result<(), Fail> {
        self.show.title(&format!("NodeStageVolume on {}: {why}", worker.name));
        let (started, staging) = (Instant::now(), self.staging(worker));
        Self::make(worker, &staging).await?;
        let request = proto::NodeStageVolumeRequest {
            volume_id: self.volume.volume_id.clone(),
            publish_context: self.publish.clone(),
            staging_target_path: staging.display().to_string(),
            volume_capability: Some(capability()),
            volume_context: self.volume.volume_context.clone(),
            ..Default::default()
        };
        self.node(worker).await?.node_stage_volume(request).await?;
        let elapsed = started.elapsed();
        Self::kernel(worker).await?;
        Self::mount(worker, &staging).await?;
        self.show.end(self.stack, elapsed).await
    }

    async fn publish(&mut self, worker: &Worker) -> Result<(), Fail> {
        self.show.title(&format!("NodePublishVolume on {}: bind it into the pod", worker.name));
        let (started, target) = (Instant::now(), self.target(worker));
        Self::make(worker, target.parent().unwrap_or(&target)).await?;
        let request = proto::NodePublishVolumeRequest {
            volume_id: self.volume.volume_id.clone(),
            publish_context: self.publish.clone(),
            staging_target_path: self.staging(worker).display().to_string(),
            target_path: target.display().to_string(),
            volume_capability: Some(capability()),
            volume_context: self.volume.volume_context.clone(),
            ..Default::default()
        };
        self.node(worker).await?.node_publish_volume(request).await?;
        let elapsed = started.elapsed();
        Self::mount(worker, &target).await?;
        self.show.end(self.stack, elapsed).await
    }

    async fn write(&mut self, worker: &Worker) -> Result<String, Fail> {
        self.show.title("The pod writes 64 MiB and syncs");
        let started = Instant::now();
        if let Some(guest) = &worker.guest {
            let target = self.target(worker);
            let script =
                format!("cd {} && head -c {DATA} /dev/urandom >database.bin && sync", target.display());
            guest.sh(&script).await?;
            let sum = Self::sum(worker, &target).await?;
            Show::line("data", &format!("SHA-256 {sum}"));
            Show::line("took", &format!("{} ms", started.elapsed().as_millis()));
            return Ok(sum);
        }
        // Blocks that no file system would make up and of which no two are equal.
        let mut data = vec![0; DATA];
        for (index, block) in data.chunks_mut(4096).enumerate() {
            block.fill(b'p');
            block[..8].copy_from_slice(&u64::try_from(index)?.to_be_bytes());
        }
        let mut file = fs::File::create(self.target(worker).join("database.bin"))?;
        file.write_all(&data)?;
        file.sync_all()?;
        let sum = hex(&Sha256::digest(&data));
        Show::line("data", &format!("SHA-256 {sum}"));
        Show::line("took", &format!("{} ms", started.elapsed().as_millis()));
        Ok(sum)
    }

    /// The sum of what the pod has.
    async fn sum(worker: &Worker, target: &Path) -> Result<String, Fail> {
        if let Some(guest) = &worker.guest {
            let said = guest.sh(&format!("sha256sum {}/database.bin", target.display())).await?;
            return Ok(said.split(' ').next().unwrap_or_default().to_owned());
        }
        let mut data = Vec::new();
        fs::File::open(target.join("database.bin"))?.read_to_end(&mut data)?;
        Ok(hex(&Sha256::digest(&data)))
    }

    async fn verify(&mut self, worker: &Worker, sum: &str, what: &str) -> Result<(), Fail> {
        let found = Self::sum(worker, &self.target(worker)).await?;
        if found != sum {
            return Err(format!("the data is not what was written: SHA-256 {found}").into());
        }
        Show::line("data", &format!("verified: {what}"));
        Ok(())
    }

    async fn unpublish(&mut self, worker: &Worker) -> Result<(), Fail> {
        self.show.title(&format!("NodeUnpublishVolume on {}: the pod is gone", worker.name));
        let started = Instant::now();
        let request = proto::NodeUnpublishVolumeRequest {
            volume_id: self.volume.volume_id.clone(),
            target_path: self.target(worker).display().to_string(),
        };
        self.node(worker).await?.node_unpublish_volume(request).await?;
        self.show.end(self.stack, started.elapsed()).await
    }

    async fn unstage(&mut self, worker: &Worker) -> Result<(), Fail> {
        self.show.title(&format!(
            "NodeUnstageVolume on {}: sync, unmount, flush, take the disk out of the kernel",
            worker.name
        ));
        let (started, staging) = (Instant::now(), self.staging(worker));
        let request = proto::NodeUnstageVolumeRequest {
            volume_id: self.volume.volume_id.clone(),
            staging_target_path: staging.display().to_string(),
        };
        self.node(worker).await?.node_unstage_volume(request).await?;
        let elapsed = started.elapsed();
        Self::kernel(worker).await?;
        Self::mount(worker, &staging).await?;
        self.show.end(self.stack, elapsed).await
    }

    async fn grow(&mut self, worker: &Worker) -> Result<(), Fail> {
        self.show.title("ControllerExpandVolume: grow it to 2 GiB while it is in use");
        let (started, target) = (Instant::now(), self.target(worker));
        let range = proto::CapacityRange { required_bytes: 2 * GIB, limit_bytes: 0 };
        let request = proto::ControllerExpandVolumeRequest {
            volume_id: self.volume.volume_id.clone(),
            capacity_range: Some(range),
            volume_capability: Some(capability()),
            ..Default::default()
        };
        self.controller.controller_expand_volume(request).await?;
        let elapsed = started.elapsed();
        Self::kernel(worker).await?;
        self.show.end(self.stack, elapsed).await?;

        self.show.title(&format!("NodeExpandVolume on {}: grow the file system", worker.name));
        let started = Instant::now();
        let request = proto::NodeExpandVolumeRequest {
            volume_id: self.volume.volume_id.clone(),
            volume_path: target.display().to_string(),
            staging_target_path: self.staging(worker).display().to_string(),
            capacity_range: Some(range),
            volume_capability: Some(capability()),
            ..Default::default()
        };
        self.node(worker).await?.node_expand_volume(request).await?;
        let elapsed = started.elapsed();
        Self::mount(worker, &target).await?;
        self.show.end(self.stack, elapsed).await
    }

    async fn detach(&mut self, worker: &Worker) -> Result<(), Fail> {
        self.show.title(&format!("ControllerUnpublishVolume: unplug it from {}", worker.name));
        let started = Instant::now();
        let request = proto::ControllerUnpublishVolumeRequest {
            volume_id: self.volume.volume_id.clone(),
            node_id: worker.name.clone(),
            ..Default::default()
        };
        self.controller.controller_unpublish_volume(request).await?;
        let elapsed = started.elapsed();
        Self::kernel(worker).await?;
        self.show.end(self.stack, elapsed).await
    }

    async fn delete(&mut self) -> Result<(), Fail> {
        self.show.title("DeleteVolume");
        let started = Instant::now();
        let request =
            proto::DeleteVolumeRequest { volume_id: self.volume.volume_id.clone(), ..Default::default() };
        self.controller.delete_volume(request).await?;
        let elapsed = started.elapsed();
        let state = show::get(self.stack, "/_sim/state").await?;
        let name = "vm-9999-pvc-5f1f6dd1";
        if state["volumes"].to_string().contains(name) || state["vms"].to_string().contains(name) {
            return Err("the volume is still known to Proxmox".into());
        }
        Show::line("proxmox", "no VM and no storage knows the volume any more");
        self.show.end(self.stack, elapsed).await
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}
