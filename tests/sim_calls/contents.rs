//! What is written into a volume is found wherever Proxmox would show it, and nowhere else.

use super::cluster::Cluster;

const MIB: u64 = 1 << 20;
/// Storages with one volume each, whose name says the format.
const ALL: &[(&str, &str)] = &[
    ("data", "vm-9999-a.raw"),
    ("data", "vm-9999-a.qcow2"),
    ("btr", "vm-9999-a.raw"),
    ("chain", "vm-9999-a.qcow2"),
    ("thin", "vm-9999-a"),
    ("thick", "vm-9999-a"),
];

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_given_to_another_vm_keeps_its_contents() {
    for (storage, name) in ALL {
        let cluster = Cluster::new();
        let volid = cluster.alloc(storage, name, "64M").await;
        cluster.set(100, &[("scsi1", &volid)]).await;
        cluster.write(&volid, 5 * MIB, b"of VM 100");
        cluster.vm("POST", 100, "/move_disk", &[("disk", "scsi1"), ("target-vmid", "101")]).await;
        let moved = cluster.slot(101, "scsi1");
        assert!(moved.contains("vm-101-disk-0"), "{moved}");
        assert!(cluster.image(&moved).ends_with(moved.split(':').next_back().expect("a name")));
        assert_eq!(cluster.read(&moved, 5 * MIB, 9), b"of VM 100", "{storage}");
        // The old name is free, and a volume that takes it is blank.
        let again = cluster.alloc(storage, name, "64M").await;
        assert_eq!(cluster.read(&again, 5 * MIB, 9), [0; 9], "{storage}");
        assert_eq!(cluster.read(&moved, 5 * MIB, 9), b"of VM 100", "{storage}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_keeps_what_was_there_and_a_rollback_brings_it_back() {
    for (storage, name) in ALL.iter().filter(|(_, name)| !name.ends_with("raw")).chain([&ALL[2]]) {
        if *storage == "thick" {
            continue;
        }
        let cluster = Cluster::new();
        let volid = cluster.alloc(storage, name, "64M").await;
        cluster.set(100, &[("scsi1", &volid)]).await;
        cluster.write(&volid, MIB, b"before");
        cluster.vm("POST", 100, "/snapshot", &[("snapname", "s1")]).await;
        cluster.write(&volid, MIB, b"after!");
        cluster.vm("PUT", 100, "/resize", &[("disk", "scsi1"), ("size", "128M")]).await;
        cluster.vm("POST", 100, "/snapshot/s1/rollback", &[]).await;
        assert_eq!(cluster.read(&volid, MIB, 6), b"before", "{storage}");
        let length = std::fs::metadata(cluster.image(&volid)).expect("the file").len();
        assert_eq!(length, 64 * MIB, "{storage}");
        cluster.vm("DELETE", 100, "/snapshot/s1", &[]).await;
        assert_eq!(cluster.files(), 1, "{storage}: a file of the snapshot is left");
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_clone_of_a_snapshot_has_what_the_snapshot_has() {
    for (storage, name) in [("data", "vm-9999-a.qcow2"), ("btr", "vm-9999-a.raw"), ("thin", "vm-9999-a")] {
        let cluster = Cluster::new();
        let volid = cluster.alloc(storage, name, "64M").await;
        cluster.set(100, &[("scsi1", &volid)]).await;
        cluster.write(&volid, MIB, b"before");
        cluster.vm("POST", 100, "/snapshot", &[("snapname", "s1")]).await;
        cluster.write(&volid, MIB, b"after!");
        cluster.vm("POST", 100, "/clone", &[("newid", "200"), ("snapname", "s1"), ("full", "1")]).await;
        assert_eq!(cluster.read(&cluster.slot(200, "scsi1"), MIB, 6), b"before", "{storage}");
        cluster.vm("POST", 100, "/clone", &[("newid", "201"), ("full", "1")]).await;
        assert_eq!(cluster.read(&cluster.slot(201, "scsi1"), MIB, 6), b"after!", "{storage}");
    }
}

/// Recorded as H-E3d-btr-data: the linked clone of a snapshot on btrfs has what was written after it.
#[tokio::test(start_paused = true)]
async fn a_linked_clone_of_a_snapshot_is_right_on_lvmthin_and_wrong_on_btrfs() {
    for (storage, name, found) in [("thin", "vm-9999-a", b"before"), ("btr", "vm-9999-a.raw", b"after!")] {
        let cluster = Cluster::new();
        let volid = cluster.alloc(storage, name, "64M").await;
        cluster.set(100, &[("scsi1", &volid)]).await;
        cluster.write(&volid, MIB, b"before");
        cluster.vm("POST", 100, "/snapshot", &[("snapname", "s1")]).await;
        cluster.write(&volid, MIB, b"after!");
        cluster.vm("POST", 100, "/clone", &[("newid", "200"), ("snapname", "s1"), ("full", "0")]).await;
        let clone = cluster.slot(200, "scsi1");
        assert_eq!(cluster.read(&clone, MIB, 6), found, "{storage}");
        // It is a volume of its own from here on.
        cluster.write(&clone, MIB, b"clone!");
        assert_eq!(cluster.read(&volid, MIB, 6), b"after!", "{storage}");
    }
}

#[tokio::test(start_paused = true)]
async fn moves_imports_and_copies_take_the_contents_along() {
    let cluster = Cluster::new();
    let volid = cluster.alloc("data", "vm-9999-a.raw", "64M").await;
    cluster.write(&volid, 63 * MIB, b"the end");
    cluster.set(100, &[("scsi1", "thin:0,import-from=data:9999/vm-9999-a.raw")]).await;
    let imported = cluster.slot(100, "scsi1");
    assert_eq!(cluster.read(&imported, 63 * MIB, 7), b"the end");
    cluster.write(&imported, 0, b"changed");
    cluster.vm("POST", 100, "/move_disk", &[("disk", "scsi1"), ("storage", "thick"), ("delete", "1")]).await;
    let moved = cluster.slot(100, "scsi1");
    assert!(moved.starts_with("thick:"), "{moved}");
    assert_eq!(cluster.read(&moved, 0, 7), b"changed");
    assert_eq!(cluster.read(&moved, 63 * MIB, 7), b"the end");
    assert_eq!(cluster.read(&volid, 0, 7), [0; 7], "the source of an import stays as it was");
    assert_eq!(cluster.files(), 2, "the source of the move is gone");
}

/// `Plugin.pm:volume_has_feature`, recorded as D24.
#[tokio::test(start_paused = true)]
async fn a_raw_file_has_no_snapshot_and_keeps_what_it_holds() {
    let cluster = Cluster::new();
    let volid = cluster.alloc("data", "vm-9999-a.raw", "64M").await;
    cluster.write(&volid, 0, b"data");
    cluster.set(100, &[("scsi1", &volid)]).await;
    let text = cluster.fails("POST", "/nodes/pve1/qemu/100/snapshot", &[("snapname", "s1")]).await;
    assert_eq!(text, "snapshot feature is not available");
    assert_eq!(cluster.read(&volid, 0, 4), b"data");
}

/// `LVMPlugin.pm:lvcreate`, `free_lvm_volumes_locked`: thick LVM wipes signatures and the first 4 KiB, and nothing else.
#[tokio::test(start_paused = true)]
async fn a_new_volume_of_thick_lvm_shows_what_an_old_one_held() {
    let cluster = Cluster::new();
    for (storage, old) in [("thick", b"old data"), ("safe", &[0; 8]), ("thin", &[0; 8])] {
        let volid = cluster.alloc(storage, "vm-9999-a", "128M").await;
        for at in [0, 0x10040, 8 * MIB, 100 * MIB] {
            cluster.write(&volid, at, b"old data");
        }
        cluster.done("DELETE", &format!("/nodes/pve1/storage/{storage}/content/{volid}"), &[]).await;
        let fresh = cluster.alloc(storage, "vm-9999-b", "64M").await;
        for at in [0, 0x10040] {
            assert_eq!(cluster.read(&fresh, at, 8), [0; 8], "{storage}: a signature at {at}");
        }
        assert_eq!(&cluster.read(&fresh, 8 * MIB, 8), old, "{storage}");
        let length = std::fs::metadata(cluster.image(&fresh)).expect("the file").len();
        assert_eq!(length, 64 * MIB);
    }
}

/// `LVMPlugin.pm:volume_resize`: lvextend wipes nothing at all.
#[tokio::test(start_paused = true)]
async fn a_volume_of_thick_lvm_that_grows_shows_what_others_held() {
    let cluster = Cluster::new();
    for (storage, old) in [("thick", b"old data"), ("safe", &[0; 8]), ("thin", &[0; 8])] {
        let kept = cluster.alloc(storage, "vm-9999-kept", "64M").await;
        let gone = cluster.alloc(storage, "vm-9999-gone", "64M").await;
        cluster.write(&kept, 0, b"kept");
        cluster.write(&gone, 8 * MIB, b"old data");
        cluster.done("DELETE", &format!("/nodes/pve1/storage/{storage}/content/{gone}"), &[]).await;
        cluster.set(100, &[("scsi1", &kept)]).await;
        cluster.vm("PUT", 100, "/resize", &[("disk", "scsi1"), ("size", "128M")]).await;
        assert_eq!(cluster.read(&kept, 0, 4), b"kept");
        assert_eq!(&cluster.read(&kept, (64 + 8) * MIB, 8), old, "{storage}");
        cluster.set(100, &[("delete", "scsi1")]).await;
    }
}

/// `LvmThinPlugin.pm:volume_snapshot`, `status`: a thin pool counts each block once.
#[tokio::test(start_paused = true)]
async fn a_snapshot_in_a_thin_pool_takes_what_is_written_over() {
    let cluster = Cluster::new();
    let volid = cluster.alloc("thin", "vm-9999-a", "64M").await;
    cluster.set(100, &[("scsi1", &volid)]).await;
    let used = async || {
        let status = cluster.done("GET", "/nodes/pve1/storage/thin/status", &[]).await;
        status["used"].as_u64().expect("a number")
    };
    for at in 0..8 {
        cluster.write(&volid, at * MIB, &vec![1; 1 << 20]);
    }
    let before = used().await;
    cluster.vm("POST", 100, "/snapshot", &[("snapname", "s1")]).await;
    assert_eq!(used().await, before, "a snapshot shares its blocks");
    cluster.write(&volid, 0, &vec![2; 2 << 20]);
    assert_eq!(used().await, before + 2 * MIB);
    cluster.vm("POST", 100, "/snapshot", &[("snapname", "s2")]).await;
    cluster.write(&volid, 4 * MIB, &vec![3; 1 << 20]);
    assert_eq!(used().await, before + 3 * MIB);
    cluster.vm("DELETE", 100, "/snapshot/s1", &[]).await;
    assert_eq!(used().await, before + MIB);
}
