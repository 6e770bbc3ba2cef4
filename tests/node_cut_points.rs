//! Every call that a node operation makes to its host, cut in every way: the kubelet's retry comes to the same answer and the same state.
//!
//! The calls are those of an undisturbed run, so that a new one in an operation is covered without a change here. After each try the
//! invariants hold: a volume is formatted once, its data stays, nothing is mounted twice, an OK is true.

mod node_suite;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use node_suite::{KEY, MIB, Volume, mount_capability, node_options};
use proxmox_csi::{
    csi::{
        node::NodeService,
        proto::{self, node_server::Node as _},
    },
    node::{MountPath, Node},
    runtime::Operations,
    sim::{
        Image,
        guest::{
            cut::{Cut, Scissors},
            memory::{Drive, Machine, Volume as OnDisk},
        },
    },
};
use tokio::time::{sleep, timeout};
use tonic::{Code, Request, Status};

/// What kind of volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A file system; published read-only or not, encrypted or not.
    Mounted { fs: &'static str, readonly: bool, encrypted: bool },
    /// A raw block volume.
    Raw { encrypted: bool },
}

impl Kind {
    fn is_encrypted(self) -> bool {
        matches!(self, Self::Mounted { encrypted: true, .. } | Self::Raw { encrypted: true })
    }

    fn is_raw(self) -> bool {
        matches!(self, Self::Raw { .. })
    }
}

/// The operations, in the order of a volume's life on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Stage,
    Publish,
    Stats,
    Expand,
    Unpublish,
    Unstage,
}

const LIFE: [Operation; 6] = [
    Operation::Stage,
    Operation::Publish,
    Operation::Stats,
    Operation::Expand,
    Operation::Unpublish,
    Operation::Unstage,
];

const SIZE: u64 = 512 * MIB;
const GROWN: u64 = 1024 * MIB;
const SLOT: u32 = 1;
/// How long the kubelet waits for an answer.
const PATIENCE: Duration = Duration::from_mins(2);

/// A node and one volume.
struct Rig {
    kind: Kind,
    machine: Machine,
    image: Image,
    scissors: Scissors,
    service: NodeService,
    volume: Volume,
    target: MountPath,
    /// The uuid of the file system that was found first.
    made: Option<uuid::Uuid>,
    /// Whether a pod has written its data.
    written: bool,
}

impl Rig {
    fn new(kind: Kind, image: Image, used: bool) -> Self {
        let machine = Machine::new(None);
        let volume = Volume::new(
            "pvc-1",
            1,
            SIZE,
            MountPath::new("/var/lib/kubelet/plugins/globalmount").expect("a path"),
        );
        let wwn = u64::from_str_radix(volume.published.wwn.to_string().trim_start_matches("0x"), 16).ok();
        machine.plug(SLOT, Drive { image: image.clone(), size: SIZE, wwn, readonly: false });
        let scissors = Scissors::new(Arc::new(machine.clone()));
        let target = MountPath::new("/var/lib/kubelet/pods/1/volume").expect("a path");
        let service = service(&scissors);
        let mut rig =
            Self { kind, machine, image, scissors, service, volume, target, made: None, written: used };
        rig.made = rig.uuid();
        rig
    }

    /// The process ended with all that it had open, and a new one begins.
    fn restart(&mut self) {
        self.machine.end_process();
        self.scissors = Scissors::new(Arc::new(self.machine.clone()));
        self.service = service(&self.scissors);
    }

    /// The uuid of the file system on the disk, where it can be read there.
    fn uuid(&self) -> Option<uuid::Uuid> {
        OnDisk::read(&self.image, GROWN).map(|found| found.uuid)
    }

    async fn act(&self, operation: Operation) -> Result<String, Status> {
        let secrets: BTreeMap<String, String> = if self.kind.is_encrypted() {
            [("encryption-passphrase".to_owned(), KEY.to_owned())].into()
        } else {
            BTreeMap::new()
        };
        let (fs, readonly) = match self.kind {
            Kind::Mounted { fs, readonly, .. } => (fs, readonly),
            Kind::Raw { .. } => ("", false),
        };
        let capability = if self.kind.is_raw() {
            use proto::volume_capability::{AccessType, BlockVolume};
            let access_type = Some(AccessType::Block(BlockVolume {}));
            proto::VolumeCapability { access_type, ..mount_capability("") }
        } else {
            mount_capability(fs)
        };
        let (volume_id, target_path) = (self.volume.handle.clone(), self.target.to_string());
        let staging_target_path = self.volume.staging.to_string();
        let answer = match operation {
            Operation::Stage => {
                let request = proto::NodeStageVolumeRequest {
                    volume_capability: Some(capability),
                    secrets,
                    ..self.volume.stage_request(fs)
                };
                format!("{:?}", self.service.node_stage_volume(Request::new(request)).await?.into_inner())
            }
            Operation::Publish => {
                let request = proto::NodePublishVolumeRequest {
                    volume_id,
                    publish_context: self.volume.published.to_context(),
                    staging_target_path,
                    target_path,
                    volume_capability: Some(capability),
                    readonly,
                    secrets,
                    ..Default::default()
                };
                format!("{:?}", self.service.node_publish_volume(Request::new(request)).await?.into_inner())
            }
            Operation::Stats => {
                let request = proto::NodeGetVolumeStatsRequest {
                    volume_id,
                    volume_path: target_path,
                    ..Default::default()
                };
                format!("{:?}", self.service.node_get_volume_stats(Request::new(request)).await?.into_inner())
            }
            Operation::Expand => {
                let range = proto::CapacityRange {
                    required_bytes: i64::try_from(GROWN).expect("a size"),
                    limit_bytes: 0,
                };
                let request = proto::NodeExpandVolumeRequest {
                    volume_id,
                    volume_path: target_path,
                    staging_target_path,
                    capacity_range: Some(range),
                    volume_capability: Some(capability),
                    ..Default::default()
                };
                format!("{:?}", self.service.node_expand_volume(Request::new(request)).await?.into_inner())
            }
            Operation::Unpublish => {
                let request = proto::NodeUnpublishVolumeRequest { volume_id, target_path };
                format!("{:?}", self.service.node_unpublish_volume(Request::new(request)).await?.into_inner())
            }
            Operation::Unstage => {
                let request = proto::NodeUnstageVolumeRequest { volume_id, staging_target_path };
                format!("{:?}", self.service.node_unstage_volume(Request::new(request)).await?.into_inner())
            }
        };
        Ok(answer)
    }

    /// Calls until it succeeds, as the kubelet does, and returns the answer.
    async fn call(&mut self, operation: Operation, cut: Option<Cut>) -> Result<String, String> {
        if operation == Operation::Expand {
            self.machine.resize(SLOT, GROWN);
        }
        let mut history = Vec::new();
        for attempt in 0..10_u32 {
            let called = {
                let call = timeout(PATIENCE, self.act(operation));
                tokio::select! {
                    biased;
                    answer = call => Some(answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("the kubelet gives up")))),
                    () = self.scissors.struck() => None,
                }
            };
            let ended = match called {
                Some(Ok(answer)) => Some(answer),
                Some(Err(status)) => {
                    history.push(format!("{:?}: {}", status.code(), status.message()));
                    None
                }
                None => {
                    history.push(format!("{cut:?}"));
                    if cut.is_some_and(Cut::is_deadly) {
                        self.restart();
                    }
                    None
                }
            };
            self.check_invariants().map_err(|broken| format!("{broken}: {history:#?}"))?;
            if let Some(answer) = ended {
                self.check_answer(operation).map_err(|broken| format!("{broken}: {history:#?}"))?;
                self.live_on(operation);
                return Ok(answer);
            }
            sleep(Duration::from_millis(500 << attempt)).await;
        }
        Err(format!("no end of it: {history:#?}"))
    }

    /// What a pod does after an operation.
    fn live_on(&mut self, operation: Operation) {
        if operation != Operation::Publish || self.written {
            return;
        }
        match self.kind {
            Kind::Mounted { .. } => {
                // Through the staged mount, since the pod's may be read-only.
                let file = self.volume.staging.as_path().join("data");
                self.machine.write(&file, b"mine").expect("it takes writes");
                self.machine.sync_all();
            }
            Kind::Raw { .. } => {
                self.machine.write_device(self.target.as_path(), b"mine", 4096).expect("it takes writes");
            }
        }
        self.written = true;
    }

    fn mounts_at(&self, path: &MountPath) -> usize {
        self.machine.table().iter().filter(|mount| mount.target == path.as_path()).count()
    }

    /// What holds whatever is cut.
    fn check_invariants(&mut self) -> Result<(), String> {
        for path in [&self.volume.staging, &self.target] {
            if self.mounts_at(path) > 1 {
                return Err(format!("mounted more than once at {path}: {:#?}", self.machine.table()));
            }
        }
        match (self.made, self.uuid()) {
            (Some(made), now) if now != Some(made) => {
                return Err(format!("formatted again: {made} became {now:?}"));
            }
            (None, now) => self.made = now,
            _ => {}
        }
        let staged = self.mounts_at(&self.volume.staging) == 1;
        if staged && self.written && !self.kind.is_raw() {
            let data = self.machine.read(&self.volume.staging.as_path().join("data"));
            if !data.as_ref().is_ok_and(|data| data == b"mine") {
                return Err(format!("the data is gone: {data:?}"));
            }
        }
        Ok(())
    }

    /// An OK is true when it is said.
    fn check_answer(&self, operation: Operation) -> Result<(), String> {
        let raw = self.kind.is_raw();
        let (staged, published) = (self.mounts_at(&self.volume.staging), self.mounts_at(&self.target));
        let mut mounts = self.machine.table().into_iter();
        let target = mounts.find(|mount| mount.target == self.target.as_path());
        let readonly = matches!(self.kind, Kind::Mounted { readonly: true, .. });
        let holds = match operation {
            Operation::Stage => staged == usize::from(!raw) && self.machine.disk_names().len() == 1,
            Operation::Publish => target.is_some_and(|mount| raw || mount.readonly == readonly),
            Operation::Stats => published == 1,
            Operation::Expand => {
                self.kind.is_encrypted()
                    || raw
                    || OnDisk::read(&self.image, GROWN).is_some_and(|found| found.size == GROWN)
            }
            Operation::Unpublish => published == 0 && !self.machine.has(self.target.as_path()),
            Operation::Unstage => {
                staged == 0 && self.machine.disk_names().is_empty() && self.machine.mapping_names().is_empty()
            }
        };
        holds.then_some(()).ok_or_else(|| {
            format!("{operation:?} answered OK, and it is not so: {:#?}", self.machine.table())
        })
    }

    /// All that there is: mounts, disks, mappings, files.
    fn dump(&self) -> String {
        let mounts = self.machine.table().into_iter().map(|mount| {
            let (target, root) = (mount.target.display(), mount.root.display());
            format!("{target} {root} {} {} {}", mount.fs, mount.number, mount.readonly)
        });
        let mut mounts: Vec<String> = mounts.collect();
        mounts.sort();
        let found =
            OnDisk::read(&self.image, GROWN).map(|found| (found.kind, found.size, found.dirty, found.files));
        let (disks, mappings) = (self.machine.disk_names(), self.machine.mapping_names());
        let places = [&self.volume.staging, &self.target].map(|path| self.machine.has(path.as_path()));
        format!("{mounts:#?} {disks:?} {mappings:?} {found:?} {places:?}")
    }
}

fn service(scissors: &Scissors) -> NodeService {
    NodeService::new(Node::new(Arc::new(scissors.clone()), node_options()), Operations::default())
}

/// What a volume of a kind holds after its first life: a file system with a pod's data.
async fn used(kind: Kind) -> Image {
    let mut rig = Rig::new(kind, Image::default(), false);
    for operation in [Operation::Stage, Operation::Publish, Operation::Unpublish, Operation::Unstage] {
        rig.call(operation, None).await.expect("an undisturbed call");
    }
    rig.image
}

/// Lives up to an operation; on a blank volume, or on one that was used before.
async fn before(kind: Kind, operation: Operation, from: Option<&Image>) -> Rig {
    let mut rig = Rig::new(kind, from.map(Image::snapshot).unwrap_or_default(), from.is_some());
    for earlier in LIFE.into_iter().take_while(|earlier| *earlier != operation) {
        rig.call(earlier, None).await.expect("an undisturbed call");
    }
    rig
}

/// Whether a cut leaves half a file system or half a header: that is refused for ever, since it can't be told from data.
fn leaves_half(call: &str, cut: Cut) -> bool {
    cut == Cut::DieMidway && matches!(call, "format_blank" | "format_inside" | "encrypt_blank")
}

/// Cuts every call of every operation of a kind of volume; returns how many.
async fn cut_everywhere(kind: Kind) {
    let formatted = used(kind).await;
    let mut cuts = 0;
    for operation in LIFE {
        let starts: &[Option<&Image>] =
            if operation == Operation::Stage { &[None, Some(&formatted)] } else { &[Some(&formatted)] };
        for from in starts {
            let mut rig = before(kind, operation, *from).await;
            rig.scissors.arm(None);
            let answer = rig.call(operation, None).await.expect("an undisturbed call");
            let calls = rig.scissors.disarm();
            let state = rig.dump();
            assert!(!calls.is_empty(), "an operation asks for something");
            for (at, call) in calls.iter().enumerate() {
                for cut in Cut::ALL {
                    cuts += 1;
                    let blank = from.is_none();
                    let what = format!("{kind:?}, {operation:?}, blank {blank}, call {at} {call}, {cut:?}");
                    let mut rig = before(kind, operation, *from).await;
                    rig.scissors.arm(Some((at, cut)));
                    let answered = rig.call(operation, Some(cut)).await;
                    if leaves_half(call, cut) {
                        assert_refused_for_ever(&mut rig, answered, &what).await;
                        continue;
                    }
                    match answered {
                        Ok(answered) => assert_eq!(answered, answer, "{what}"),
                        Err(broken) => panic!("{what}: {broken}"),
                    }
                    // What lingers has ended.
                    sleep(Duration::from_mins(5)).await;
                    assert_eq!(rig.dump(), state, "{what}");
                    // The rest of its life leaves nothing behind.
                    for later in LIFE.into_iter().skip_while(|later| *later <= operation) {
                        if let Err(broken) = rig.call(later, None).await {
                            panic!("{what}, then {later:?}: {broken}");
                        }
                    }
                }
            }
        }
    }
    println!("{kind:?}: {cuts} cuts");
    assert!(cuts > 100, "{cuts} cuts");
}

async fn assert_refused_for_ever(rig: &mut Rig, answered: Result<String, String>, what: &str) {
    answered.expect_err(what);
    let before = rig.image.snapshot();
    let status = rig.act(Operation::Stage).await.expect_err(what);
    assert!(matches!(status.code(), Code::FailedPrecondition | Code::Internal), "{what}: {status:?}");
    assert!(rig.image.is_same(&before), "{what}: nothing is written over it");
    rig.call(Operation::Unstage, None).await.unwrap_or_else(|broken| panic!("{what}: {broken}"));
}

const PLAIN: Kind = Kind::Mounted { fs: "xfs", readonly: false, encrypted: false };

#[tokio::test(start_paused = true)]
async fn p5_an_xfs_comes_to_the_same_end_wherever_the_node_is_cut() {
    cut_everywhere(PLAIN).await;
}

#[tokio::test(start_paused = true)]
async fn p5_an_ext4_that_is_published_read_only_comes_to_the_same_end_wherever_the_node_is_cut() {
    cut_everywhere(Kind::Mounted { fs: "ext4", readonly: true, encrypted: false }).await;
}

#[tokio::test(start_paused = true)]
async fn p5_a_btrfs_comes_to_the_same_end_wherever_the_node_is_cut() {
    cut_everywhere(Kind::Mounted { fs: "btrfs", readonly: false, encrypted: false }).await;
}

#[tokio::test(start_paused = true)]
async fn p5_an_encrypted_xfs_comes_to_the_same_end_wherever_the_node_is_cut() {
    cut_everywhere(Kind::Mounted { fs: "xfs", readonly: false, encrypted: true }).await;
}

#[tokio::test(start_paused = true)]
async fn p5_a_raw_block_volume_comes_to_the_same_end_wherever_the_node_is_cut() {
    cut_everywhere(Kind::Raw { encrypted: false }).await;
}

#[tokio::test(start_paused = true)]
async fn p5_an_encrypted_raw_block_volume_comes_to_the_same_end_wherever_the_node_is_cut() {
    cut_everywhere(Kind::Raw { encrypted: true }).await;
}
