//! File systems, encryption and read-only volumes, as a kernel of its own has them.

use tonic::Code;

use crate::{
    rig::{Guest, Kernel, Pvc, Rig, Setup},
    support::GIB,
};

/// Bytes of the file system at a path.
async fn size_of(guest: &Guest, path: &str) -> u64 {
    let said = guest.sh(&format!("stat -f -c '%S %b' {path} | awk '{{print $1*$2}}'")).await;
    said.parse().expect("bytes")
}

/// Writes, grows while it is in use, lets it go and finds it again.
async fn lives_and_grows(rig: &Rig, guest: &Guest, pvc: &mut Pvc) {
    let target = format!("{}/pod", pvc.staging.trim_end_matches("/globalmount"));
    rig.attach(pvc, guest.vmid).await;
    guest.stage(pvc).await;
    guest.publish(pvc, &target, false).await;
    let sum =
        guest.sh(&format!("cd {target}; head -c 8000000 /dev/urandom >data; sync; sha256sum data")).await;
    let before = size_of(guest, &target).await;
    // Somebody writes on while it grows.
    guest.sh(&format!("(while [ -e {target}/data ]; do date >>{target}/log; sleep 0.05; done) </dev/null >/dev/null 2>&1 & echo $! >/tmp/writer")).await;
    rig.bench.expand(&pvc.volume.volume_id, 2 * GIB).await.expect("it grows");
    guest.expand(pvc, &target, 2).await;
    guest.sh("kill $(cat /tmp/writer)").await;
    let after = size_of(guest, &target).await;
    assert!(before < 1_080_000_000 && after > 1_900_000_000, "it went from {before} to {after}");
    guest.unpublish(pvc, &target).await;
    guest.unstage(pvc).await;
    guest.stage(pvc).await;
    assert_eq!(guest.sh(&format!("cd {}; sha256sum data", pvc.staging)).await, sum);
    guest.unstage(pvc).await;
    assert_eq!(guest.disks().await, "");
    rig.detach(pvc, guest.vmid).await;
}

/// What the kernel of the guest complains about, beside what it always says (facts of virtio-scsi: a disk that was taken out
/// and is then unplugged is not found).
async fn complaints(guest: &Guest) -> String {
    guest.sh("dmesg --level=emerg,alert,crit,err,warn 2>/dev/null | grep -v 'not found' | grep -iE 'xfs|ext4|btrfs|dm-|sd[a-z]|I/O error|WARNING|BUG' || true").await
}

async fn every_file_system_grows(kernel: Kernel) {
    let rig = Setup::of(&[101]).kernel(kernel).boot().await;
    let guest = rig.guest(101);
    for kind in ["ext4", "xfs", "btrfs"] {
        let pvc = rig.volume(&format!("pvc-{kind}"), "data").await;
        let mut pvc = pvc.formatted_as(kind).staged_at(&format!("/var/lib/kubelet/{kind}/globalmount"));
        lives_and_grows(&rig, &guest, &mut pvc).await;
    }
    assert_eq!(complaints(&guest).await, "");
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_file_system_grows_while_it_is_in_use() {
    every_file_system_grows(Kernel::Linux6_1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_file_system_grows_while_it_is_in_use_on_linux_6_12() {
    every_file_system_grows(Kernel::Linux6_12).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p9_an_encrypted_volume_is_encrypted_grown_and_closed_by_a_real_kernel() {
    const KEY: &str = "correct horse battery staple";
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut pvc = rig.volume("pvc-luks", "data").await.formatted_as("ext4");
    pvc.secrets.insert("encryption-passphrase".to_owned(), KEY.to_owned());
    lives_and_grows(&rig, &guest, &mut pvc).await;

    rig.attach(&mut pvc, 101).await;
    guest.stage(&pvc).await;
    guest.sh(&format!("echo plain-text-of-a-pod >{}/note; sync", pvc.staging)).await;
    let mapped = guest.sh("dmsetup table").await;
    assert!(mapped.contains("crypt aes-xts-plain64") && mapped.lines().count() == 1, "{mapped}");
    // On the disk itself nothing of it can be read, and nowhere the passphrase.
    let disk = guest.sh(&format!("grep -l {} /sys/block/sd*/device/wwid | cut -d/ -f4", pvc.wwid())).await;
    assert_eq!(guest.sh(&format!("strings /dev/{disk} | grep -c plain-text-of-a-pod || true")).await, "0");
    assert_eq!(guest.sh(&format!("grep -c '{KEY}' /run/node.log || true")).await, "0");
    let mut wrong = pvc.clone().staged_at("/var/lib/kubelet/other/globalmount");
    wrong.secrets.insert("encryption-passphrase".to_owned(), "guess".to_owned());
    guest.unstage(&pvc).await;
    assert_eq!(guest.sh("dmsetup table").await, "No devices found");
    assert_eq!(guest.disks().await, "");
    let refused = guest.try_stage(&wrong).await.expect_err("it is the wrong passphrase");
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    rig.detach(&pvc, 101).await;
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_mount_is_read_only_also_outside_of_the_node_plugin() {
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut pvc = rig.volume("pvc-ro", "data").await;
    rig.attach(&mut pvc, 101).await;
    guest.stage(&pvc).await;
    guest.sh(&format!("echo mine >{}/data", pvc.staging)).await;
    let target = "/var/lib/kubelet/pods/reader/mount";
    guest.publish(&pvc, target, true).await;
    // The script runs in the mount namespace of the machine, the node plugin in one of its own.
    guest.sh("[ $(readlink /proc/self/ns/mnt) != $(readlink /proc/$(pidof proxmox-csi)/ns/mnt) ]").await;
    assert_eq!(guest.sh(&format!("cat {target}/data")).await, "mine");
    let (status, said) = guest.run(&format!("echo theirs >{target}/data")).await.expect("it runs");
    assert!(status != 0 && said.contains("Read-only file system"), "{said}");
    guest.sh(&format!("echo more >>{}/data", pvc.staging)).await;
    guest.unpublish(&pvc, target).await;
    guest.unstage(&pvc).await;
    rig.detach(&pvc, 101).await;
    rig.sim().shutdown().await;
}
