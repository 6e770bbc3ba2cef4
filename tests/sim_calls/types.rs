//! What each type of storage allows and says: ZFS pools, Ceph pools, and where directories over a network differ from
//! those of a node.

use super::cluster::Cluster;
use serde_json::{Value, json};

const WORLD: &str = r#"
nodes: [pve1, pve2]
storages:
- {id: local, content: "images,iso,snippets"}
- {id: tank, type: zfspool, capacity: 10G, properties: {pool: tank/vm}}
- {id: sparse, type: zfspool, capacity: 10G, properties: {pool: fast, sparse: "1", blocksize: 64k}}
- {id: ceph, type: rbd, capacity: 10G, properties: {pool: vms}}
- {id: nfs1, type: nfs}
- {id: thin, type: lvmthin, capacity: 20G, properties: {vgname: vg0, thinpool: thin}}
- {id: thick, type: lvm, capacity: 1G, properties: {vgname: vg1}}
- {id: twin, type: lvm, capacity: 1G, properties: {vgname: vg1}}
- {id: isos, content: "iso"}
- {id: only2, nodes: [pve2]}
- {id: "off", enabled: false}
vms:
- {vmid: 100, node: pve1, name: w1, running: false, guest: false, config: {scsi0: "", boot: " "}}
- {vmid: 101, node: pve1, name: w2, running: false, guest: false, config: {scsi0: "", boot: " "}}
- {vmid: 102, node: pve1, name: w3, guest: false, config: {scsi0: "", boot: " "}}
tokens:
- {id: root@pam!t, secret: s}
"#;

fn content(storage: &str) -> String {
    format!("/nodes/pve1/storage/{storage}/content")
}

async fn refused(cluster: &Cluster, storage: &str, name: &str, size: &str) -> String {
    let form = [("filename", name), ("vmid", "9999"), ("size", size)];
    cluster.fails("POST", &content(storage), &form).await
}

async fn size_of(cluster: &Cluster, volid: &str) -> u64 {
    let storage = volid.split(':').next().expect("a storage");
    let data = cluster.done("GET", &format!("{}/{volid}", content(storage)), &[]).await;
    data["size"].as_u64().expect("a size")
}

async fn listed(cluster: &Cluster, storage: &str) -> Vec<Value> {
    cluster.done("GET", &content(storage), &[]).await.as_array().expect("a list").clone()
}

async fn status(cluster: &Cluster, storage: &str) -> (u64, u64, u64) {
    let data = cluster.done("GET", &format!("/nodes/pve1/storage/{storage}/status"), &[]).await;
    let number = |key: &str| data[key].as_u64().expect("a number");
    (number("total"), number("used"), number("avail"))
}

/// `ZFSPoolPlugin.pm:alloc_image`, `RBDPlugin.pm:alloc_image`.
#[tokio::test(start_paused = true)]
async fn names_must_be_the_owners_and_sizes_are_rounded() {
    let cluster = Cluster::of(WORLD);
    for storage in ["tank", "ceph"] {
        assert_eq!(
            refused(&cluster, storage, "pvc-1", "1G").await,
            "illegal name 'pvc-1' - should be 'vm-9999-*'"
        );
        assert_eq!(
            refused(&cluster, storage, "vm-9998-a", "1G").await,
            "illegal name 'vm-9998-a' - should be 'vm-9999-*'"
        );
        let volid = cluster.alloc(storage, "vm-9999-a", "1025").await;
        assert_eq!(volid, format!("{storage}:vm-9999-a"));
        assert_eq!(size_of(&cluster, &volid).await, 2 << 20, "{storage} rounds up to a MiB");
    }
    assert_eq!(
        refused(&cluster, "tank", "vm-9999-a.qcow2", "1G").await,
        "unsupported format 'qcow2' at /usr/share/perl5/PVE/Storage/ZFSPoolPlugin.pm line 292."
    );
    assert_eq!(
        refused(&cluster, "tank", "vm-9999-b", "0").await,
        "zfs error: cannot create 'tank/vm/vm-9999-b': volume size cannot be zero"
    );
    assert_eq!(
        refused(&cluster, "tank", "vm-9999-b+c", "1G").await,
        "zfs error: cannot create 'tank/vm/vm-9999-b+c': invalid character '+' in name"
    );
    let empty = cluster.alloc("ceph", "vm-9999-empty", "0").await;
    assert_eq!(
        cluster.fails("GET", &format!("{}/{empty}", content("ceph")), &[]).await,
        "volume 'ceph:vm-9999-empty' has size zero"
    );
}

/// `ZFSPoolPlugin.pm:zfs_delete_zvol`, `zfs_get_properties`, `RBDPlugin.pm:free_image`, `rbd_volume_info`.
#[tokio::test(start_paused = true)]
async fn a_name_that_is_taken_and_a_volume_that_is_gone_have_their_own_words() {
    let cluster = Cluster::of(WORLD);
    for storage in ["tank", "ceph"] {
        cluster.alloc(storage, "vm-9999-a", "1G").await;
    }
    assert_eq!(
        refused(&cluster, "tank", "vm-9999-a", "1G").await,
        "zfs error: cannot create 'tank/vm/vm-9999-a': dataset already exists"
    );
    assert!(
        refused(&cluster, "ceph", "vm-9999-a", "1G").await.ends_with("rbd image vm-9999-a already exists")
    );
    let gone = |storage: &str| format!("{}/{storage}:vm-9999-gone", content(storage));
    cluster.done("DELETE", &gone("tank"), &[]).await;
    let missing = "rbd error: rbd: error opening image vm-9999-gone: (2) No such file or directory";
    assert_eq!(cluster.fails("DELETE", &gone("ceph"), &[]).await, missing);
    assert_eq!(cluster.fails("GET", &gone("ceph"), &[]).await, missing);
    assert_eq!(
        cluster.fails("GET", &gone("tank"), &[]).await,
        "zfs error: cannot open 'tank/vm/vm-9999-gone': dataset does not exist"
    );
}

/// `ZFSPoolPlugin.pm:list_images`, `RBDPlugin.pm:list_images`.
#[tokio::test(start_paused = true)]
async fn listings_have_the_fields_of_the_type() {
    let cluster = Cluster::of(WORLD);
    for storage in ["tank", "ceph"] {
        cluster.alloc(storage, "vm-9999-a", "1G").await;
        let expected = json!({
            "volid": format!("{storage}:vm-9999-a"), "name": "vm-9999-a", "format": "raw", "size": 1 << 30,
            "vmid": 9999, "parent": null, "content": "images",
        });
        assert_eq!(listed(&cluster, storage).await, [expected]);
    }
}

/// `ZFSPoolPlugin.pm:zfs_create_zvol`, `status`; `libzfs_dataset.c:zvol_volsize_to_reservation`.
#[tokio::test(start_paused = true)]
async fn a_zfs_volume_reserves_its_size_unless_it_is_sparse() {
    let cluster = Cluster::of(WORLD);
    cluster.alloc("tank", "vm-9999-a", "6G").await;
    let (total, used, available) = status(&cluster, "tank").await;
    assert!(used > 6 << 30, "{used}");
    assert_eq!(available, total - used);
    assert_eq!(
        refused(&cluster, "tank", "vm-9999-b", "6G").await,
        "zfs error: cannot create 'tank/vm/vm-9999-b': out of space"
    );
    cluster.set(100, &[("scsi1", "tank:vm-9999-a")]).await;
    let text =
        cluster.fails("PUT", "/nodes/pve1/qemu/100/resize", &[("disk", "scsi1"), ("size", "12G")]).await;
    assert_eq!(
        text,
        "zfs error: cannot set property for 'tank/vm/vm-9999-a': size is greater than available space"
    );
    for name in ["vm-9999-a", "vm-9999-b", "vm-9999-c"] {
        cluster.alloc("sparse", name, "6G").await;
        cluster.alloc("ceph", name, "6G").await;
    }
    let (_, used, _) = status(&cluster, "ceph").await;
    assert!(used < 1 << 20, "{used}");
}

/// `ZFSPoolPlugin.pm:volume_rollback_is_possible`; Ceph goes back to any (`Plugin.pm:volume_rollback_is_possible`).
#[tokio::test(start_paused = true)]
async fn zfs_goes_back_to_the_most_recent_snapshot_only_and_ceph_to_any() {
    for storage in ["tank", "ceph"] {
        let cluster = Cluster::of(WORLD);
        let volid = cluster.alloc(storage, "vm-9999-a", "1G").await;
        cluster.set(100, &[("scsi1", &volid)]).await;
        for (snapshot, bytes) in [("s1", b"one"), ("s2", b"two")] {
            cluster.write(&volid, 0, bytes);
            cluster.vm("POST", 100, "/snapshot", &[("snapname", snapshot)]).await;
        }
        cluster.write(&volid, 0, b"now");
        if storage == "tank" {
            let text = cluster.fails("POST", "/nodes/pve1/qemu/100/snapshot/s1/rollback", &[]).await;
            assert_eq!(text, "can't rollback, 's1' is not most recent snapshot on 'tank:vm-9999-a'");
            let vm = cluster.sim.vm(100).expect("the VM");
            assert_eq!(vm.current("lock"), None, "a rollback that is refused leaves no lock");
            assert_eq!(cluster.read(&volid, 0, 3), b"now");
            cluster.vm("POST", 100, "/snapshot/s2/rollback", &[]).await;
            assert_eq!(cluster.read(&volid, 0, 3), b"two");
        } else {
            cluster.vm("POST", 100, "/snapshot/s1/rollback", &[]).await;
            assert_eq!(cluster.read(&volid, 0, 3), b"one");
        }
        for snapshot in ["s1", "s2"] {
            cluster.vm("DELETE", 100, &format!("/snapshot/{snapshot}"), &[]).await;
        }
        assert_eq!(cluster.files(), 1);
    }
}

/// `ZFSPoolPlugin.pm:volume_has_feature`: nothing comes out of a snapshot but by rollback. Ceph clones it, and keeps it
/// as long as the clone stands (`RBDPlugin.pm:clone_image`, `volume_snapshot_delete`).
#[tokio::test(start_paused = true)]
async fn a_snapshot_of_zfs_is_neither_copied_nor_cloned_and_one_of_ceph_is_held_by_its_clones() {
    let cluster = Cluster::of(WORLD);
    for (vmid, storage) in [(100, "tank"), (101, "ceph")] {
        let volid = cluster.alloc(storage, "vm-9999-a", "1G").await;
        cluster.set(vmid, &[("scsi1", &volid)]).await;
        cluster.write(&volid, 0, b"then");
        cluster.vm("POST", vmid, "/snapshot", &[("snapname", "s1")]).await;
        cluster.write(&volid, 0, b"now!");
    }
    for (full, kind) in [("1", "Full"), ("0", "Linked")] {
        let form = [("newid", "200"), ("snapname", "s1"), ("full", full)];
        assert_eq!(
            cluster.fails("POST", "/nodes/pve1/qemu/100/clone", &form).await,
            format!("{kind} clone feature is not supported for a snapshot of 'tank:vm-9999-a' (scsi1)")
        );
    }
    let has = cluster.done("GET", "/nodes/pve1/qemu/100/feature", &[("feature", "copy"), ("snapname", "s1")]);
    assert_eq!(has.await["hasFeature"], 0);
    cluster.vm("POST", 101, "/clone", &[("newid", "200"), ("snapname", "s1"), ("full", "0")]).await;
    assert_eq!(cluster.slot(200, "scsi1"), "ceph:vm-200-disk-0");
    assert_eq!(cluster.read("ceph:vm-200-disk-0", 0, 4), b"then");
    let rows = listed(&cluster, "ceph").await;
    let clone = rows.iter().find(|row| row["volid"] == "ceph:vm-200-disk-0").expect("the clone");
    assert_eq!(clone["parent"], "vm-9999-a@s1");
    let text = cluster.fails("DELETE", "/nodes/pve1/qemu/101/snapshot/s1", &[]).await;
    assert!(text.starts_with("rbd unprotect vm-9999-a snap 's1' error: "), "{text}");
    assert_eq!(cluster.sim.vm(101).expect("the VM").current("lock"), Some("snapshot-delete"));
    let text = cluster.fails("DELETE", &format!("{}/ceph:vm-9999-a", content("ceph")), &[]).await;
    assert!(text.starts_with("rbd unprotect vm-9999-a snap 's1' error: "), "{text}");
    cluster.vm("DELETE", 200, "", &[]).await;
    cluster.done("DELETE", &format!("{}/ceph:vm-9999-a", content("ceph")), &[]).await;
}

/// `create_base`, `clone_image` of the plugins; `Storage.pm:volume_is_base_and_used`.
#[tokio::test(start_paused = true)]
async fn linked_clones_of_a_template_name_their_base_and_hold_it() {
    for (storage, base, clone, parent) in [
        ("tank", "base-100-disk-0", "base-100-disk-0/vm-200-disk-0", Some("base-100-disk-0@__base__")),
        ("ceph", "base-100-disk-0", "base-100-disk-0/vm-200-disk-0", Some("base-100-disk-0@__base__")),
        (
            "nfs1",
            "100/base-100-disk-0.raw",
            "100/base-100-disk-0.raw/200/vm-200-disk-0.qcow2",
            Some("../100/base-100-disk-0.raw"),
        ),
        ("thin", "base-100-disk-0", "vm-200-disk-0", None),
    ] {
        let cluster = Cluster::of(WORLD);
        cluster.set(100, &[("scsi1", &format!("{storage}:1"))]).await;
        cluster.write(&cluster.slot(100, "scsi1"), 0, b"template");
        cluster.vm("POST", 100, "/template", &[]).await;
        assert_eq!(cluster.slot(100, "scsi1"), format!("{storage}:{base}"));
        assert_eq!(cluster.read(&format!("{storage}:{base}"), 0, 8), b"template");
        cluster.vm("POST", 100, "/clone", &[("newid", "200")]).await;
        assert_eq!(cluster.slot(200, "scsi1"), format!("{storage}:{clone}"));
        let name = clone.rsplit_once("base-100-disk-0/").map_or(clone, |(_, name)| name);
        let short = name.strip_prefix("100/base-100-disk-0.raw/").unwrap_or(name);
        let file = format!("{storage}:{short}");
        assert_eq!(cluster.read(&file, 0, 8), b"template", "{storage}");
        let rows = listed(&cluster, storage).await;
        let row = rows.iter().find(|row| row["volid"] == format!("{storage}:{clone}")).expect("the clone");
        if let Some(parent) = parent {
            assert_eq!(row["parent"], parent);
        }
        // The clone's own name leads to it with and without the base in front.
        let by_name = cluster.done("GET", &format!("{}/{file}", content(storage)), &[]).await;
        assert_eq!(by_name["size"], 1 << 30);
        let path = format!("{}/{storage}:{base}", content(storage)).replace("100/base", "100%2Fbase");
        if parent.is_some() {
            let inner = base.rsplit('/').next().map_or(base, |_| base);
            assert_eq!(
                cluster.fails("DELETE", &path, &[]).await,
                format!("base volume '{inner}' is still in use by linked clones")
            );
            cluster.vm("DELETE", 200, "", &[]).await;
        }
        cluster.done("DELETE", &path, &[]).await;
    }
}

/// `Plugin.pm:$get_vm_disk_number`: a directory on the node counts the disks of every format, one over a network does not.
#[tokio::test(start_paused = true)]
async fn directories_over_a_network_are_shared_and_number_each_format_by_itself() {
    let cluster = Cluster::of(WORLD);
    for (storage, second) in [("local", "vm-100-disk-1.qcow2"), ("nfs1", "vm-100-disk-0.qcow2")] {
        cluster.set(100, &[("scsi1", &format!("{storage}:1"))]).await;
        cluster.set(100, &[("scsi2", &format!("{storage}:1,format=qcow2"))]).await;
        assert_eq!(cluster.slot(100, "scsi2"), format!("{storage}:100/{second}"));
        cluster.set(100, &[("delete", "scsi1,scsi2")]).await;
    }
    let shared = |storage: &'static str| {
        let cluster = &cluster;
        async move { cluster.done("GET", &format!("/storage/{storage}"), &[]).await["shared"].clone() }
    };
    assert_eq!(shared("nfs1").await, 1);
    assert_eq!(shared("ceph").await, 1);
    assert_eq!(shared("tank").await, Value::Null);
}

/// `RBDPlugin.pm:free_image`, `ZFSPoolPlugin.pm:zfs_delete_zvol`: both notice that QEMU has the volume open.
#[tokio::test(start_paused = true)]
async fn what_a_running_vm_has_open_is_not_deleted_on_zfs_and_ceph() {
    let cluster = Cluster::of(WORLD);
    for (storage, text) in [
        ("tank", "zfs error: cannot destroy 'tank/vm/vm-9999-a': dataset is busy"),
        ("ceph", "rbd rm 'vm-9999-a' error: rbd: error: image still has watchers"),
    ] {
        let volid = cluster.alloc(storage, "vm-9999-a", "1G").await;
        cluster.set(102, &[("scsi1", &volid)]).await;
        let path = format!("{}/{volid}", content(storage));
        assert_eq!(cluster.fails("DELETE", &path, &[]).await, text);
        cluster.set(102, &[("delete", "scsi1")]).await;
        cluster.done("DELETE", &path, &[]).await;
    }
}

/// Two entries for one volume group, as recorded in H-E2-lchain-content-after-delsnap (`LVMPlugin.pm:list_images`).
#[tokio::test(start_paused = true)]
async fn two_storages_on_one_volume_group_see_each_others_volumes() {
    let cluster = Cluster::of(WORLD);
    cluster.alloc("thick", "vm-9999-a", "512M").await;
    assert_eq!(listed(&cluster, "twin").await[0]["volid"], "twin:vm-9999-a");
    assert_eq!(status(&cluster, "twin").await, status(&cluster, "thick").await);
    assert!(
        refused(&cluster, "twin", "vm-9999-a", "4M").await.contains("already exists in volume group \"vg1\"")
    );
    assert!(
        refused(&cluster, "twin", "vm-9999-b", "1G").await.contains("insufficient free space (128 extents)")
    );
    cluster.done("DELETE", &format!("{}/twin:vm-9999-a", content("twin")), &[]).await;
    assert!(listed(&cluster, "thick").await.is_empty());
}

/// `API2/Qemu.pm:$check_storage_access`, `clone_vm`, `move_vm_disk`, `Storage.pm:volume_list`,
/// `storage_check_enabled`.
#[tokio::test(start_paused = true)]
async fn storages_for_other_content_other_nodes_or_switched_off_take_no_disk() {
    let cluster = Cluster::of(WORLD);
    let config = "/nodes/pve1/qemu/100/config";
    let images = json!({ "storage": "storage 'isos' does not support vm images" }).to_string();
    assert_eq!(cluster.fails("PUT", config, &[("scsi1", "isos:1")]).await, images);
    cluster.set(100, &[("scsi1", "local:1")]).await;
    for (path, form) in [
        ("move_disk", vec![("disk", "scsi1"), ("storage", "isos")]),
        ("clone", vec![("newid", "200"), ("storage", "isos"), ("full", "1")]),
    ] {
        assert_eq!(cluster.fails("POST", &format!("/nodes/pve1/qemu/100/{path}"), &form).await, images);
    }
    // An allocation asks for no content type, and a listing shows none that is not there (recorded as H71).
    cluster.alloc("isos", "vm-9999-a.raw", "64M").await;
    assert!(listed(&cluster, "isos").await.is_empty());
    assert_eq!(
        refused(&cluster, "only2", "vm-9999-a.raw", "64M").await,
        "storage 'only2' is not available on node 'pve1'"
    );
    assert_eq!(refused(&cluster, "off", "vm-9999-a.raw", "64M").await, "storage 'off' is disabled");
}

/// `API2/Qemu.pm:$update_vm_api` (`$check_replication`), `move_vm_disk`; `QemuConfig.pm:get_replicatable_volumes`.
#[tokio::test(start_paused = true)]
async fn a_replicated_vm_takes_only_what_can_be_replicated() {
    let cluster = Cluster::of(WORLD);
    let job = [("id", "100-0"), ("type", "local"), ("target", "pve2")];
    assert_eq!(cluster.fails("POST", "/cluster/replication", &job).await, "No replicatable volumes found");
    cluster.set(100, &[("scsi1", "thin:1")]).await;
    assert_eq!(
        cluster.fails("POST", "/cluster/replication", &job).await,
        "missing replicate feature on volume 'thin:vm-100-disk-0'"
    );
    cluster.set(100, &[("delete", "scsi1"), ("scsi2", "tank:1")]).await;
    cluster.done("POST", "/cluster/replication", &job).await;
    let refusal = "cannot add non-replicatable volume to a replicated VM";
    let volid = cluster.alloc("thin", "vm-9999-a", "64M").await;
    for value in ["thin:1", volid.as_str()] {
        assert_eq!(cluster.fails("PUT", "/nodes/pve1/qemu/100/config", &[("scsi3", value)]).await, refusal);
    }
    cluster.set(100, &[("scsi3", &format!("{volid},replicate=0"))]).await;
    cluster.set(100, &[("scsi4", "nfs1:1"), ("scsi5", "tank:1")]).await;
    cluster.set(101, &[("scsi1", "thin:1")]).await;
    let moved = [("disk", "scsi1"), ("target-vmid", "100"), ("target-disk", "scsi9")];
    assert_eq!(
        cluster.fails("POST", "/nodes/pve1/qemu/101/move_disk", &moved).await,
        "Cannot move disk to a replicated VM. Storage does not support replication!"
    );
    cluster.done("DELETE", "/cluster/replication/100-0", &[]).await;
    cluster.vm("POST", 101, "/move_disk", &moved).await;
}

/// `BlockJob.pm:mirror`: a running VM goes on with the copy, and the source can be deleted.
#[tokio::test(start_paused = true)]
async fn a_disk_of_a_running_vm_moves_under_it() {
    let cluster = Cluster::of(WORLD);
    cluster.set(102, &[("scsi1", "thick:0.5")]).await;
    let source = cluster.slot(102, "scsi1");
    cluster.write(&source, 0, b"live");
    let form = [("disk", "scsi1"), ("storage", "ceph"), ("delete", "1")];
    cluster.vm("POST", 102, "/move_disk", &form).await;
    let target = cluster.slot(102, "scsi1");
    assert!(target.starts_with("ceph:"), "{target}");
    assert_eq!(cluster.read(&target, 0, 4), b"live");
    assert!(listed(&cluster, "thick").await.is_empty());
    let vm = cluster.sim.vm(102).expect("the VM");
    assert!(vm.open_volumes().any(|key| key.volid() == target), "QEMU still has the source open");
}
