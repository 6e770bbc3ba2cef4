//! The node over a guest of the simulator: what the API plugs in, the node finds, formats, grows and lets go.
//!
//! Needs root, loop devices and a mount namespace of its own; run it with
//! `unshare --mount --propagation private cargo test --test real_life`.

use std::{fs, path::Path, sync::Arc, time::Duration};

use axum::body::Body;
use proxmox_csi::{
    host::{
        Host as _,
        linux::{LinuxHost, LinuxOptions},
    },
    node::{Access, Expand, MountFlags, MountPath, Node, NodeOptions, Publish, Stage, Unpublish, Unstage},
    sim::{Options, Sim, World, clock::Profile, faults::Fault},
    types::{
        Bytes, ScsiSlot, VolumeHandle, Wwn,
        params::FilesystemOptions,
        publish::{Contents, PublishedDisk},
        sharing::Sharing,
    },
};
use tower::ServiceExt as _;

async fn call(sim: &Sim, method: &str, path: &str, form: String) {
    let request = http::Request::builder()
        .method(method)
        .uri(format!("/api2/json{path}"))
        .header("authorization", "PVEAPIToken=csi@pve!csi=22222222-2222-4222-8222-222222222222")
        .body(Body::from(form))
        .expect("a valid request");
    let response = sim.router().oneshot(request).await.expect("the router cannot fail");
    assert_eq!(response.status().as_u16(), 200, "{method} {path}");
}

/// Unmounts what a failed test left, so that the guest's devices can go.
struct Mounts<'a>(&'a Path);

impl Drop for Mounts<'_> {
    fn drop(&mut self) {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let targets = table.lines().filter_map(|line| line.split(' ').nth(4));
        for target in targets.filter(|target| Path::new(target).starts_with(self.0)) {
            let _ = std::process::Command::new("umount").arg(target).status();
        }
    }
}

/// A cluster whose VM 101 stands for this machine, and the node there.
fn guest(directory: &Path) -> (Sim, Arc<LinuxHost>, Node) {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/mnt")).ok();
    assert!(
        namespace("self").is_some() && namespace("self") != namespace("1"),
        "these tests mount disks; run them with\n    \
         unshare --mount --propagation private cargo test --test real_life"
    );
    let state = directory.join("state");
    fs::create_dir(&state).expect("a directory");
    let options = Options { time: Profile::None, state: Some(state), ..Options::default() };
    let sim = Sim::start(World::builtin(), options).expect("the built-in world starts");
    let roots = sim.guest_roots(101).expect("the VM stands for this machine");
    let host = Arc::new(LinuxHost::new(LinuxOptions {
        sysfs_root: roots.sys,
        dev_root: roots.dev,
        ..LinuxOptions::default()
    }));
    let mut options = NodeOptions::new("node-1");
    options.find_timeout = Duration::from_secs(5);
    let node = Node::new(Arc::<LinuxHost>::clone(&host), options);
    (sim, host, node)
}

/// Makes a volume and plugs it into slot 3 of VM 101; returns what the node is asked for.
async fn plug(sim: &Sim, directory: &Path) -> Stage {
    let volume = "region/pve1/data/9999/vm-9999-pvc-1.raw".to_owned();
    let handle: VolumeHandle = volume.parse().expect("a handle");
    let wwn = Wwn::of_volume(&handle.region, handle.zone.as_ref(), &handle.volid);
    let form = "vmid=9999&filename=vm-9999-pvc-1.raw&size=512M".to_owned();
    call(sim, "POST", "/nodes/pve1/storage/data/content", form).await;
    let plug = format!("scsi3=data:9999/vm-9999-pvc-1.raw,wwn={wwn}");
    call(sim, "PUT", "/nodes/pve1/qemu/101/config", plug).await;
    Stage {
        volume,
        staging: path(directory, "globalmount"),
        disk: PublishedDisk {
            wwn,
            slot: ScsiSlot::new(3),
            size: Some(Bytes::VOLUME_STEP),
            contents: Contents::Blank,
        },
        access: Access::Filesystem { kind: "xfs".parse().ok(), flags: MountFlags::default() },
        sharing: Sharing::OneNode,
        options: FilesystemOptions { noatime: true, ..FilesystemOptions::default() },
        key: None,
    }
}

fn path(directory: &Path, name: &str) -> MountPath {
    MountPath::new(directory.join(name).to_str().expect("UTF-8")).expect("a legal path")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_behind_a_controller_that_the_guest_never_saw_is_found_by_a_scan_of_the_bus() {
    let directory = tempfile::tempdir().expect("a directory");
    let (sim, host, node) = guest(directory.path());
    let _mounts = Mounts(directory.path());
    sim.inject(Fault::BlindGuest { vmid: 101, on: true }).expect("VM 101 is this machine");
    let stage = plug(&sim, directory.path()).await;
    assert!(host.disks().await.expect("the list").iter().all(|disk| disk.wwn != Some(stage.disk.wwn)));
    node.stage(&stage).await.expect("it is found in the end");
    let unstage = Unstage { volume: stage.volume.clone(), staging: stage.staging.clone() };
    node.unstage(&unstage).await.expect("the kernel lets go");
    sim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_lives_through_its_whole_life_on_a_guest() {
    let directory = tempfile::tempdir().expect("a directory");
    let (sim, host, node) = guest(directory.path());
    let _mounts = Mounts(directory.path());
    let identity = host.identity().await.expect("the VM has one");
    assert!(identity.uuid.is_some() && identity.no_vm.is_none(), "{identity:?}");
    let stage = plug(&sim, directory.path()).await;
    let (volume, staging, disk, access) =
        (stage.volume.clone(), stage.staging.clone(), stage.disk.clone(), stage.access.clone());
    let (wwn, target) = (disk.wwn, path(directory.path(), "pods/1/mount"));
    let unstage = Unstage { volume: volume.clone(), staging: staging.clone() };
    node.stage(&stage).await.expect("it is found and formatted");
    fs::write(staging.as_path().join("data"), "mine").expect("it is mounted");
    node.unstage(&unstage).await.expect("the kernel lets go");
    assert!(host.disks().await.expect("the list").iter().all(|disk| disk.wwn != Some(wwn)));

    node.stage(&stage).await.expect("a scan of its LUN brings it back");
    assert_eq!(fs::read_to_string(staging.as_path().join("data")).expect("the data"), "mine");
    let publish = Publish {
        volume: volume.clone(),
        staging: staging.clone(),
        target: target.clone(),
        disk,
        access,
        sharing: Sharing::OneNode,
        readonly: false,
        encrypted: false,
    };
    node.publish(&publish).await.expect("it is published");
    call(&sim, "PUT", "/nodes/pve1/qemu/101/resize", "disk=scsi3&size=1G".to_owned()).await;
    let (path, required) = (target.clone(), Some(Bytes::GIB));
    let expand = Expand { volume: volume.clone(), path, required, limit: None, key: None };
    assert_eq!(node.expand(&expand).await.expect("it grows"), Bytes::GIB);

    node.unpublish(&Unpublish { volume, target }).await.expect("it is unpublished");
    node.unstage(&unstage).await.expect("the kernel lets go");
    call(&sim, "PUT", "/nodes/pve1/qemu/101/unlink", "idlist=scsi3".to_owned()).await;
    sim.shutdown().await;
}
