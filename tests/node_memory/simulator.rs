//! A guest of the simulator: what the controller attaches, the node finds; what happens to a volume happens to its contents.

use std::{sync::Arc, time::Duration};

use proxmox_csi::{
    node::{Access, Expand, MountFlags, MountPath, Node, Publish, Stage, Unstage},
    sim::{Image, Sim, World, guest::memory::Machine},
    types::{
        Bytes, ScsiSlot, VolumeHandle, Wwn,
        params::FilesystemOptions,
        publish::{Contents, PublishedDisk},
        sharing::Sharing,
    },
};

use crate::{
    node_suite::node_options,
    support::{Bench, GIB, admin},
};

/// The node on a VM.
struct Guest {
    machine: Machine,
    node: Node,
}

fn guest(bench: &Bench, vmid: u32) -> Guest {
    let machine = bench.sim.guest_of(vmid).expect("the VM is there, and contents are in memory");
    Guest { node: Node::new(Arc::new(machine.clone()), node_options()), machine }
}

fn path(text: &str) -> MountPath {
    MountPath::new(text).expect("a legal path")
}

impl Guest {
    async fn stage(&self, volume: &str, context: &std::collections::BTreeMap<String, String>) -> Stage {
        let stage = Stage {
            volume: volume.to_owned(),
            staging: path("/var/lib/kubelet/globalmount"),
            disk: PublishedDisk::from_context(context).expect("a context of ours"),
            access: Access::Filesystem { kind: "xfs".parse().ok(), flags: MountFlags::default() },
            sharing: Sharing::OneNode,
            options: FilesystemOptions::default(),
            key: None,
        };
        self.node.stage(&stage).await.expect("the disk is found");
        stage
    }

    async fn unstage(&self, stage: &Stage) {
        let unstage = Unstage { volume: stage.volume.clone(), staging: stage.staging.clone() };
        self.node.unstage(&unstage).await.expect("the kernel lets go");
    }

    fn write(&self, text: &str) {
        self.machine
            .write("/var/lib/kubelet/globalmount/data".as_ref(), text.as_bytes())
            .expect("it is mounted");
    }

    fn read(&self) -> String {
        let bytes = self.machine.read("/var/lib/kubelet/globalmount/data".as_ref()).expect("it is there");
        String::from_utf8(bytes).expect("text")
    }
}

#[tokio::test(start_paused = true)]
async fn contents_follow_a_volume_from_vm_to_vm() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let context = bench.attach(&volume, "worker-101").await.expect("it is attached");
    let one = guest(&bench, 101);
    let staged = one.stage(&volume, &context).await;
    one.write("mine");
    let target = path("/var/lib/kubelet/pods/1/mount");
    let publish = Publish {
        volume: volume.clone(),
        staging: staged.staging.clone(),
        target: target.clone(),
        disk: staged.disk.clone(),
        access: staged.access.clone(),
        sharing: Sharing::OneNode,
        readonly: false,
        encrypted: false,
    };
    one.node.publish(&publish).await.expect("it is published");
    bench.expand(&volume, 2 * GIB).await.expect("the disk grows");
    let expand = Expand {
        volume: volume.clone(),
        path: target.clone(),
        required: Some(Bytes::new(2 << 30)),
        limit: None,
        key: None,
    };
    assert_eq!(one.node.expand(&expand).await.expect("the file system grows"), Bytes::new(2 << 30));
    let unpublish = proxmox_csi::node::Unpublish { volume: volume.clone(), target };
    one.node.unpublish(&unpublish).await.expect("it is unpublished");
    one.unstage(&staged).await;
    bench.detach(&volume, "worker-101").await.expect("it is detached");

    let context = bench.attach(&volume, "worker-102").await.expect("it is attached");
    let other = guest(&bench, 102);
    let staged = other.stage(&volume, &context).await;
    assert_eq!(other.read(), "mine");
    other.unstage(&staged).await;
    bench.detach(&volume, "worker-102").await.expect("it is detached");
    bench.delete(&volume).await.expect("it is deleted");
    let again = bench.volume("pvc-1", "shared").await.volume_id;
    assert_eq!(again, volume);
    let key =
        bench.sim.volumes().into_iter().find(|one| one.key.name.contains("pvc-1")).expect("it is there").key;
    assert!(bench.sim.image(&key).expect("contents are in memory").is_blank(), "deleted is deleted");
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_an_administrator_pulls_leaves_a_dead_mount_and_comes_back() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let context = bench.attach(&volume, "worker-101").await.expect("it is attached");
    let one = guest(&bench, 101);
    let staged = one.stage(&volume, &context).await;
    one.write("kept");
    one.machine.sync_all();
    one.write("lost");
    let slot = bench.slots(101, &volume).current.pop().expect("it is plugged in");
    admin(&bench.sim, "PUT", "/nodes/pve1/qemu/101/config", &format!("delete={slot}")).await;
    let dead = one.machine.read("/var/lib/kubelet/globalmount/data".as_ref()).expect_err("the disk is gone");
    assert_eq!(dead.raw_os_error(), Some(5), "EIO");
    assert_eq!(one.machine.table().iter().filter(|mount| mount.fs == "xfs").count(), 1, "the mount stays");

    let context = bench.attach(&volume, "worker-101").await.expect("it is attached again");
    let again = one.stage(&volume, &context).await;
    assert_eq!(one.read(), "kept");
    one.unstage(&again).await;
    assert_eq!(staged.staging, again.staging);
}

#[tokio::test(start_paused = true)]
async fn stopping_a_vm_loses_what_was_not_written_out_and_its_mounts() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let context = bench.attach(&volume, "worker-101").await.expect("it is attached");
    let one = guest(&bench, 101);
    one.stage(&volume, &context).await;
    one.write("kept");
    one.machine.sync_all();
    one.write("lost");
    assert!(bench.sim.stop_vm(101).await);
    assert!(one.machine.disk_names().is_empty());
    bench.sim.start_vm(101).await.expect("it starts");
    assert!(one.machine.table().iter().all(|mount| mount.fs != "xfs"));
    one.stage(&volume, &context).await;
    assert_eq!(one.read(), "kept");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_missed_a_controller_finds_the_disk_by_a_scan_of_the_bus() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    let one = guest(&bench, 101);
    bench.fault(serde_json::json!({ "fault": "blind_guest", "vmid": 101 }));
    let context = bench.attach(&volume, "worker-101").await.expect("it is attached");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(one.machine.disk_names().len(), 1, "only the VM's own disk");
    let staged = one.stage(&volume, &context).await;
    one.unstage(&staged).await;
}

/// Storages that the built-in world has not.
const MORE: &str = r#"
nodes: [pve1]
storages:
- {id: thin, type: lvmthin, capacity: 20G, properties: {vgname: vg0, thinpool: thin}}
- {id: thick, type: lvm, capacity: 20G, properties: {vgname: vg1}}
vms:
- {vmid: 300, node: pve1, name: w300, config: {scsi0: "", boot: " "}}
tokens: []
"#;

/// Makes a change as an administrator, and waits for its task.
async fn done(sim: &Sim, method: &str, path: &str, form: &str) -> String {
    let answer = admin(sim, method, path, form).await;
    let data = answer["data"].as_str().unwrap_or_default().to_owned();
    if data.starts_with("UPID:") {
        let status = sim.wait_task(&data, Duration::from_mins(1)).await;
        assert_eq!(status.as_deref(), Some("OK"), "{method} {path} {form}");
    }
    data
}

/// What a volume holds.
fn image(sim: &Sim, volid: &str) -> Image {
    let key = sim.volumes().into_iter().map(|volume| volume.key).find(|key| key.volid() == volid);
    sim.image(&key.unwrap_or_else(|| panic!("there is no {volid}"))).expect("contents are in memory")
}

fn text_at(image: &Image, offset: u64) -> String {
    let mut bytes = [0; 6];
    image.read(&mut bytes, offset);
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}

#[tokio::test(start_paused = true)]
async fn contents_in_memory_are_where_proxmox_would_show_them() {
    let mut world = World::builtin();
    let more = World::from_yaml(MORE).expect("a world");
    world.storages.extend(more.storages);
    world.vms.extend(more.vms);
    let sim = Sim::in_memory(world).expect("the world can be made");
    let alloc = "vmid=9999&filename=vm-9999-a&size=64M";
    let volid = done(&sim, "POST", "/nodes/pve1/storage/thin/content", alloc).await;
    let config = "/nodes/pve1/qemu/300/config";
    done(&sim, "PUT", config, &format!("scsi9={volid}")).await;
    let open = image(&sim, &volid);
    open.write(b"before", 4096);
    done(&sim, "POST", "/nodes/pve1/qemu/300/snapshot", "snapname=one").await;
    open.write(b"after!", 4096);
    done(&sim, "POST", "/nodes/pve1/qemu/300/clone", "newid=777&full=1&snapname=one").await;
    let clone = sim.vm(777).expect("the clone").current("scsi9").expect("its disk").to_owned();
    let clone = image(&sim, clone.split(',').next().expect("a volume"));
    assert_eq!((text_at(&clone, 4096), text_at(&open, 4096)), ("before".to_owned(), "after!".to_owned()));
    done(&sim, "POST", "/nodes/pve1/qemu/300/snapshot/one/rollback", "").await;
    assert_eq!(text_at(&image(&sim, &volid), 4096), "before", "rolled back");
    done(&sim, "DELETE", "/nodes/pve1/qemu/300/snapshot/one", "").await;

    // Another name on another storage, and the old name is blank again.
    done(&sim, "POST", "/nodes/pve1/qemu/300/move_disk", "disk=scsi9&storage=thick&delete=1").await;
    let moved = sim.vm(300).expect("the VM").current("scsi9").expect("its disk").to_owned();
    let moved = moved.split(',').next().expect("a volume").to_owned();
    assert!(moved.starts_with("thick:"), "{moved}");
    assert_eq!(text_at(&image(&sim, &moved), 4096), "before");
    let again = done(&sim, "POST", "/nodes/pve1/storage/thin/content", alloc).await;
    assert!(image(&sim, &again).is_blank(), "{again}");

    // Thick LVM hands out its blocks as they were, without signatures.
    image(&sim, &moved).write(b"XFSB", 0);
    image(&sim, &moved).write(b"stale!", 5 << 20);
    done(&sim, "PUT", config, "delete=scsi9").await;
    done(&sim, "DELETE", &format!("/nodes/pve1/storage/thick/content/{moved}"), "").await;
    let stale = done(&sim, "POST", "/nodes/pve1/storage/thick/content", alloc).await;
    assert_eq!(
        (text_at(&image(&sim, &stale), 0), text_at(&image(&sim, &stale), 5 << 20)),
        (String::new(), "stale!".to_owned())
    );
}

#[tokio::test(start_paused = true)]
async fn p4_what_thick_lvm_hands_out_is_not_formatted() {
    let mut world = World::builtin();
    world.storages.extend(World::from_yaml(MORE).expect("a world").storages);
    let sim = Sim::in_memory(world).expect("the world can be made");
    let machine = sim.guest_of(101).expect("a VM");
    let node = Node::new(Arc::new(machine), node_options());
    let volume = "test/pve1/thick/vm-9999-a";
    let handle: VolumeHandle = volume.parse().expect("a handle");
    let wwn = Wwn::of_volume(&handle.region, handle.zone.as_ref(), &handle.volid);
    let alloc = "vmid=9999&filename=vm-9999-a&size=512M";
    for round in 0..2 {
        let volid = done(&sim, "POST", "/nodes/pve1/storage/thick/content", alloc).await;
        done(&sim, "PUT", "/nodes/pve1/qemu/101/config", &format!("scsi5={volid},wwn={wwn}")).await;
        let image = image(&sim, &volid);
        let stage = Stage {
            volume: volume.to_owned(),
            staging: path("/var/lib/kubelet/globalmount"),
            disk: PublishedDisk { wwn, slot: ScsiSlot::new(5), size: None, contents: Contents::Blank },
            access: Access::Filesystem { kind: "xfs".parse().ok(), flags: MountFlags::default() },
            sharing: Sharing::OneNode,
            options: FilesystemOptions::default(),
            key: None,
        };
        let before = image.snapshot();
        let staged = node.stage(&stage).await;
        // The second one gets the blocks of the first; even a controller that called them blank could not have them formatted.
        assert_eq!(staged.is_ok(), round == 0, "{round}: {staged:?}");
        assert_eq!(image.is_same(&before), round == 1);
        let unstage = Unstage { volume: volume.to_owned(), staging: stage.staging.clone() };
        node.unstage(&unstage).await.expect("it is unstaged");
        done(&sim, "PUT", "/nodes/pve1/qemu/101/config", "delete=scsi5").await;
        done(&sim, "DELETE", &format!("/nodes/pve1/storage/thick/content/{volid}"), "").await;
    }
}
