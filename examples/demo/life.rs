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

async fn channel(socket: &Path) -> Result<Channel, Fail> {
    Ok(Endpoint::from_shared(format!("unix://{}", socket.display()))?.connect().await?)
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
        controller: ControllerClient::new(channel(&stack.controller).await?),
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
    let sum = life.write(first)?;
    check(&life, stops).await?;

    life.unpublish(first).await?;
    life.unstage(first).await?;
    check(&life, stops).await?;
    life.stage(first, "the pod comes back: find the disk again, without a new attach").await?;
    life.publish(first).await?;
    life.verify(first, &sum, "the data is there after unstage and stage")?;
    check(&life, stops).await?;

    life.grow(first).await?;
    life.verify(first, &sum, "the data is there after growing")?;
    check(&life, stops).await?;

    life.unpublish(first).await?;
    life.unstage(first).await?;
    life.detach(first).await?;
    check(&life, stops).await?;
    life.attach(second).await?;
    life.stage(second, "on the other VM: the disk holds XFS, so it is mounted and not formatted").await?;
    life.publish(second).await?;
    life.verify(second, &sum, "the data is there on the other VM")?;
    check(&life, stops).await?;

    life.unpublish(second).await?;
    life.unstage(second).await?;
    life.detach(second).await?;
    check(&life, stops).await?;
    life.delete().await
}

impl Life<'_> {
    fn staging(&self, worker: &Worker) -> PathBuf {
        self.stack.directory.join(&worker.name).join("staging/globalmount")
    }

    fn target(&self, worker: &Worker) -> PathBuf {
        self.stack.directory.join(&worker.name).join("pods/database/mount")
    }

    async fn node(&self, worker: &Worker) -> Result<NodeClient<Channel>, Fail> {
        Ok(NodeClient::new(channel(&worker.socket).await?))
    }

    fn kernel(worker: &Worker) {
        let disks = show::disks(worker);
        if disks.is_empty() {
            Show::line("kernel", &format!("{} shows no disk but its boot disk", worker.name));
        }
        for disk in disks {
            Show::line("kernel", &format!("{} shows {disk}", worker.name));
        }
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
        Self::kernel(worker);
        self.show.end(self.stack, elapsed).await
    }

    async fn stage(&mut self, worker: &Worker, why: &str) -> Result<(), Fail> {
        self.show.title(&format!("NodeStageVolume on {}: {why}", worker.name));
        let (started, staging) = (Instant::now(), self.staging(worker));
        fs::create_dir_all(&staging)?;
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
        Self::kernel(worker);
        Show::line("kernel", &show::mount(&staging));
        self.show.end(self.stack, elapsed).await
    }

    async fn publish(&mut self, worker: &Worker) -> Result<(), Fail> {
        self.show.title(&format!("NodePublishVolume on {}: bind it into the pod", worker.name));
        let (started, target) = (Instant::now(), self.target(worker));
        fs::create_dir_all(target.parent().unwrap_or(&target))?;
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
        Show::line("kernel", &show::mount(&target));
        self.show.end(self.stack, elapsed).await
    }

    fn write(&mut self, worker: &Worker) -> Result<Vec<u8>, Fail> {
        self.show.title("The pod writes 64 MiB and syncs");
        let started = Instant::now();
        // Blocks that no file system would make up and of which no two are equal.
        let mut data = vec![0; DATA];
        for (index, block) in data.chunks_mut(4096).enumerate() {
            block.fill(b'p');
            block[..8].copy_from_slice(&u64::try_from(index)?.to_be_bytes());
        }
        let mut file = fs::File::create(self.target(worker).join("database.bin"))?;
        file.write_all(&data)?;
        file.sync_all()?;
        let sum = Sha256::digest(&data).to_vec();
        Show::line("data", &format!("SHA-256 {}", hex(&sum)));
        Show::line("took", &format!("{} ms", started.elapsed().as_millis()));
        Ok(sum)
    }

    fn verify(&mut self, worker: &Worker, sum: &[u8], what: &str) -> Result<(), Fail> {
        let mut data = Vec::new();
        fs::File::open(self.target(worker).join("database.bin"))?.read_to_end(&mut data)?;
        let found = Sha256::digest(&data).to_vec();
        if found != sum {
            return Err(format!("the data is not what was written: SHA-256 {}", hex(&found)).into());
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
        Self::kernel(worker);
        Show::line("kernel", &show::mount(&staging));
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
        Self::kernel(worker);
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
        Show::line("kernel", &show::mount(&target));
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
        Self::kernel(worker);
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
