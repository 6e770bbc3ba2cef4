//! The simulator's guests over real loop devices. These tests need root and loop devices, and fail without them: what
//! they promise cannot be shown in another way. They leave nothing behind, also when they fail: loop devices go with
//! their last user, trees with the simulator.

use axum::body::Body;
use http::Request;
use proxmox_csi::sim::clock::Profile;
use proxmox_csi::sim::faults::Fault;
use proxmox_csi::sim::guest::GuestRoots;
use proxmox_csi::sim::{Options, Sim, World};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tower::ServiceExt as _;

const SIZE: u64 = 8 << 20;

/// A cluster with its directory.
struct Bench {
    sim: Sim,
    directory: tempfile::TempDir,
}

impl Bench {
    fn start() -> Self {
        assert!(
            rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists(),
            "this test needs root and loop devices (/dev/loop-control); it is not skipped, run it where they are"
        );
        let directory = tempfile::tempdir().expect("a temporary directory");
        let options =
            Options { time: Profile::None, state: Some(directory.path().to_owned()), ..Options::default() };
        let sim = Sim::start(World::builtin(), options).expect("the built-in world starts");
        Self { sim, directory }
    }

    fn roots(&self, vmid: u32) -> GuestRoots {
        self.sim.guest_roots(vmid).expect("the VM stands for this machine")
    }

    async fn call(&self, method: &str, path: &str, form: &str) -> u16 {
        let request = Request::builder()
            .method(method)
            .uri(format!("/api2/json{path}"))
            .header("authorization", "PVEAPIToken=csi@pve!csi=22222222-2222-4222-8222-222222222222")
            .body(Body::from(form.to_owned()))
            .expect("a valid request");
        self.sim.router().oneshot(request).await.expect("the router cannot fail").status().as_u16()
    }

    /// Makes a volume and plugs it into a slot of a VM on pve1.
    async fn plug(&self, vmid: u32, slot: u32, name: &str, options: &str) {
        let form = format!("vmid=9999&filename={name}&size=8M");
        self.call("POST", "/nodes/pve1/storage/data/content", &form).await;
        let form = format!("scsi{slot}=data:9999/{name}{options}");
        assert_eq!(self.call("PUT", &format!("/nodes/pve1/qemu/{vmid}/config"), &form).await, 200);
    }

    async fn unplug(&self, vmid: u32, slot: u32) {
        let path = format!("/nodes/pve1/qemu/{vmid}/unlink");
        assert_eq!(self.call("PUT", &path, &format!("idlist=scsi{slot}")).await, 200);
    }

    /// Loop devices over files of this bench.
    fn loops(&self) -> usize {
        let mut count = 0;
        for entry in std::fs::read_dir("/sys/block").expect("/sys/block").flatten() {
            let file = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            count += usize::from(Path::new(file.trim()).starts_with(self.directory.path()));
        }
        count
    }
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path.as_ref())
        .unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
}

/// The disk with this WWN, found as a node plugin finds it.
fn find(roots: &GuestRoots, wwn: &str) -> Option<String> {
    let line = format!("naa.{wwn}\n");
    std::fs::read_dir(roots.sys.join("block")).expect("block").flatten().find_map(|entry| {
        let found = std::fs::read_to_string(entry.path().join("device/wwid")).ok()?;
        (found == line).then(|| entry.file_name().to_string_lossy().into_owned())
    })
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within five seconds: {what}");
}

const WWN: &str = "3c51aabbccddeeff";

#[tokio::test(flavor = "multi_thread")]
async fn a_plugged_disk_is_a_block_device_with_the_measured_attributes() {
    let bench = Bench::start();
    let roots = bench.roots(101);
    assert!(read(roots.sys.join("class/dmi/id/product_uuid")).len() == 37);
    bench.plug(101, 3, "vm-9999-a.raw", &format!(",wwn=0x{WWN},serial=pvc-abcdef,ssd=1")).await;
    let name = find(&roots, WWN).expect("the disk is there");
    let block = roots.sys.join("block").join(&name);
    assert_eq!(read(block.join("size")), format!("{}\n", SIZE / 512));
    assert_eq!(read(block.join("queue/rotational")), "0\n");
    assert_eq!(read(block.join("device/model")), "QEMU HARDDISK   \n");
    let page = std::fs::read(block.join("device/vpd_pg83")).expect("page 83");
    assert_eq!(
        page,
        b"\x00\x83\x00\x1b\x02\x00\x00\x0bdrive-scsi3\x01\x03\x00\x08\x3c\x51\xaa\xbb\xcc\xdd\xee\xff"
    );
    assert_eq!(std::fs::read(block.join("device/vpd_pg80")).expect("page 80"), b"\x00\x80\x00\x0apvc-abcdef");
    // The boot disk has no WWN: reading its wwid fails as the kernel's does.
    let boot = std::fs::read(roots.sys.join("block/sda/device/wwid")).expect_err("no wwid");
    assert_eq!(boot.kind(), ErrorKind::InvalidInput);
    // The address of the disk: LUN is the slot, and the host is found through the controller's path.
    let device = block.join("device").canonicalize().expect("a directory");
    assert!(device.to_string_lossy().contains("/0000:01:04.0/virtio"), "{}", device.display());
    assert!(device.file_name().is_some_and(|name| name.to_string_lossy().ends_with(":0:0:3")));
    // The node has the number that sysfs names.
    let node = roots.dev.join(&name);
    let metadata = std::fs::metadata(&node).expect("the node");
    assert!(metadata.file_type().is_block_device());
    let number = format!("{}:{}\n", rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    assert_eq!(read(block.join("dev")), number);
    assert_eq!(
        std::fs::read_link(roots.dev.join("disk/by-id").join(format!("wwn-0x{WWN}"))).ok(),
        Some(PathBuf::from(format!("../../{name}")))
    );
    bench.sim.shutdown().await;
    assert!(!roots.sys.exists());
    until("the loop devices are gone", || bench.loops() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn data_moves_with_the_volume_to_another_vm() {
    let bench = Bench::start();
    bench.plug(101, 1, "vm-9999-a.raw", &format!(",wwn=0x{WWN}")).await;
    let node = bench.roots(101).dev.join(find(&bench.roots(101), WWN).expect("the disk is there"));
    let mut disk = OpenOptions::new().write(true).open(&node).expect("the device opens");
    disk.write_all(b"seen by both").expect("the device takes writes");
    disk.sync_all().expect("the device syncs");
    drop(disk);
    bench.unplug(101, 1).await;
    assert_eq!(find(&bench.roots(101), WWN), None);
    assert!(!node.exists());
    bench.plug(102, 7, "vm-9999-a.raw", &format!(",wwn=0x{WWN}")).await;
    let node = bench.roots(102).dev.join(find(&bench.roots(102), WWN).expect("the disk is there"));
    let mut found = [0; 12];
    File::open(node).expect("the device opens").read_exact(&mut found).expect("the device reads");
    assert_eq!(&found, b"seen by both");
    bench.sim.shutdown().await;
    until("the loop devices are gone", || bench.loops() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_disk_comes_back_by_a_scan_of_its_lun() {
    let bench = Bench::start();
    let roots = bench.roots(101);
    bench.plug(101, 5, "vm-9999-a.raw", &format!(",wwn=0x{WWN}")).await;
    let name = find(&roots, WWN).expect("the disk is there");
    let block = roots.sys.join("block").join(&name);
    let sequence = read(block.join("diskseq"));
    let device = block.join("device").canonicalize().expect("a directory");
    let host = device.ancestors().nth(2).and_then(Path::file_name).expect("hostH").to_owned();
    let scan = roots.sys.join("class/scsi_host").join(host).join("scan");
    let before = bench.loops();
    std::fs::write(device.join("delete"), "1").expect("delete is writable");
    until("the disk is gone", || !block.exists() && !roots.dev.join(&name).exists()).await;
    until("its loop device is gone", || bench.loops() == before - 1).await;
    assert!(scan.exists(), "the host stays");
    assert_eq!(bench.sim.vm(101).map(|vm| vm.guest_disks().len()), Some(2), "the hypervisor keeps the disk");
    // Another LUN, then its own.
    std::fs::write(&scan, "0 0 4").expect("scan is writable");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(find(&roots, WWN), None);
    std::fs::write(&scan, "0 0 5").expect("scan is writable");
    until("the disk is back", || find(&roots, WWN).is_some()).await;
    let again = find(&roots, WWN).expect("the disk is there");
    assert_ne!(read(roots.sys.join("block").join(again).join("diskseq")), sequence);
    // Detaching a deleted disk works.
    std::fs::write(device.join("delete"), "1\n").expect("delete is writable");
    until("the disk is gone", || find(&roots, WWN).is_none()).await;
    bench.unplug(101, 5).await;
    assert!(!scan.exists());
    bench.sim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grown_disk_is_seen_at_once() {
    let bench = Bench::start();
    let roots = bench.roots(101);
    bench.plug(101, 1, "vm-9999-a.raw", &format!(",wwn=0x{WWN}")).await;
    let name = find(&roots, WWN).expect("the disk is there");
    let mut disk = File::open(roots.dev.join(&name)).expect("the device opens");
    assert_eq!(disk.seek(SeekFrom::End(0)).ok(), Some(SIZE));
    assert_eq!(bench.call("PUT", "/nodes/pve1/qemu/101/resize", "disk=scsi1&size=16M").await, 200);
    let size = roots.sys.join("block").join(&name).join("size");
    until("sysfs shows the new size", || read(&size) == format!("{}\n", 2 * SIZE / 512)).await;
    assert_eq!(disk.seek(SeekFrom::End(0)).ok(), Some(2 * SIZE));
    drop(disk);
    // Stopping the VM takes every disk away, starting it brings them back.
    assert!(bench.sim.stop_vm(101).await);
    assert_eq!(std::fs::read_dir(roots.sys.join("block")).map(Iterator::count).ok(), Some(0));
    bench.sim.start_vm(101).await.expect("the VM starts");
    assert_eq!(std::fs::read_dir(roots.sys.join("block")).map(Iterator::count).ok(), Some(2));
    bench.sim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_in_use_keeps_its_loop_device_until_it_is_closed() {
    let bench = Bench::start();
    bench.plug(101, 1, "vm-9999-a.raw", &format!(",wwn=0x{WWN}")).await;
    let name = find(&bench.roots(101), WWN).expect("the disk is there");
    let open = File::open(bench.roots(101).dev.join(name)).expect("the device opens");
    let before = bench.loops();
    bench.unplug(101, 1).await;
    assert_eq!(find(&bench.roots(101), WWN), None, "it left the tree");
    assert_eq!(bench.loops(), before);
    drop(open);
    until("the loop device is gone", || bench.loops() == before - 1).await;
    bench.sim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blind_guest_sees_a_disk_after_a_pci_rescan() {
    let bench = Bench::start();
    let roots = bench.roots(101);
    bench.sim.inject(Fault::BlindGuest { vmid: 101, on: true }).expect("VM 101 is this machine");
    bench.plug(101, 1, "vm-9999-a.raw", &format!(",wwn=0x{WWN}")).await;
    assert_eq!(find(&roots, WWN), None);
    std::fs::write(roots.sys.join("bus/pci/rescan"), "1").expect("rescan is writable");
    until("the disk is there", || find(&roots, WWN).is_some()).await;
    bench.sim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_cluster_leaves_nothing_behind() {
    let bench = Bench::start();
    bench.plug(101, 1, "vm-9999-a.raw", "").await;
    let Bench { sim, directory } = bench;
    let guests = directory.path().join("guests");
    assert!(guests.exists());
    drop(sim);
    until("the trees are gone", || !guests.exists()).await;
}
