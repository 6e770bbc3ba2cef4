//! P3, the right disk, where udev, links and names lie; and where there are many.

use tonic::Code;

use crate::{
    rig::{Rig, Setup},
    support,
};

/// Two volumes in VM 101 whose file systems hold their own names, unstaged again.
async fn two_volumes(rig: &Rig) -> [crate::rig::Pvc; 2] {
    let mut made = Vec::new();
    for name in ["pvc-a", "pvc-b"] {
        let pvc = rig.volume(name, "data").await;
        let mut pvc = pvc.staged_at(&format!("/var/lib/kubelet/{name}/globalmount"));
        rig.attach(&mut pvc, 101).await;
        let guest = rig.guest(101);
        guest.stage(&pvc).await;
        guest.sh(&format!("echo {name} >{}/name", pvc.staging)).await;
        guest.unstage(&pvc).await;
        made.push(pvc);
    }
    made.try_into().expect("two")
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_disks_are_found_without_udev_and_by_no_link_that_lies() {
    let rig = Setup { append: "noudev=1", ..Setup::of(&[101]) }.boot().await;
    let guest = rig.guest(101);
    assert_eq!(guest.sh("pidof systemd-udevd || true; ls -d /dev/disk 2>/dev/null || true").await, "");
    let [first, second] = two_volumes(&rig).await;
    guest.stage(&first).await;
    guest.sh("mkdir -p /dev/disk/by-id").await;
    // Links as a udev makes them that mixes the two up.
    let link = |wwid: &str| format!("/dev/disk/by-id/wwn-0x{}", wwid.trim_start_matches("naa."));
    let disk = guest.sh(&format!("grep -l {} /sys/block/sd*/device/wwid | cut -d/ -f4", first.wwid())).await;
    guest
        .sh(&format!("ln -s ../../{disk} {}; ln -s ../../sda {}", link(&second.wwid()), link(&first.wwid())))
        .await;
    guest.stage(&second).await;
    assert_eq!(
        guest.sh(&format!("cat {}/name {}/name", first.staging, second.staging)).await,
        "pvc-a\npvc-b"
    );
    guest.unstage(&first).await;
    guest.unstage(&second).await;
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_a_name_that_another_disk_has_by_now_misleads_nobody() {
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let [mut first, mut second] = two_volumes(&rig).await;
    rig.detach(&second, 101).await;
    guest.stage(&first).await;
    let name = guest.sh("grep pvc-a /proc/mounts | cut -d' ' -f1").await;
    // Somebody pulls the first one; its mount stays and serves nothing.
    let slot = first.slot();
    rig.bench.admin("PUT", "/nodes/pve1/qemu/101/unlink", &format!("idlist={slot}")).await;
    rig.attach(&mut second, 101).await;
    guest.stage(&second).await;
    let other = guest.sh("grep pvc-b /proc/mounts | cut -d' ' -f1").await;
    assert_ne!(other, name, "the kernel keeps the name for the dead mount");
    assert_eq!(guest.sh(&format!("cat {}/name", second.staging)).await, "pvc-b");
    guest.unstage(&first).await;
    assert_eq!(guest.sh(&format!("echo more >>{0}/name; cat {0}/name", second.staging)).await, "pvc-b\nmore");
    guest.unstage(&second).await;
    // Now the name is free: whoever comes first has it.
    rig.detach(&second, 101).await;
    rig.attach(&mut second, 101).await;
    guest.stage(&second).await;
    assert_eq!(guest.sh("grep pvc-b /proc/mounts | cut -d' ' -f1").await, name);
    rig.attach(&mut first, 101).await;
    guest.stage(&first).await;
    assert_eq!(
        guest.sh(&format!("cat {}/name {}/name", first.staging, second.staging)).await,
        "pvc-a\npvc-b\nmore"
    );
    guest.unstage(&first).await;
    guest.unstage(&second).await;
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_two_real_disks_with_one_wwn_are_refused() {
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut pvc = rig.volume("pvc-twin", "data").await;
    rig.attach(&mut pvc, 101).await;
    let other = rig.volume("pvc-other", "data").await;
    let wwn = pvc.wwid().replace("naa.", "0x");
    let twin = format!("scsi9={},wwn={wwn}", support::volid(&other.volume.volume_id));
    rig.bench.admin("PUT", "/nodes/pve1/qemu/101/config", &twin).await;
    // The kernel takes a moment to see it.
    guest
        .sh(&format!(
            "until [ $(grep -l {} /sys/block/sd*/device/wwid | wc -l) = 2 ]; do sleep 0.1; done",
            pvc.wwid()
        ))
        .await;
    let refused = guest.try_stage(&pvc).await.expect_err("either could be it");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    rig.bench.admin("PUT", "/nodes/pve1/qemu/101/unlink", "idlist=scsi9").await;
    guest.stage(&pvc).await;
    guest.unstage(&pvc).await;
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_a_q35_machine_hides_is_found_by_a_scan_of_the_bus() {
    let rig = Setup { config: vec![("machine", "q35")], ..Setup::of(&[101]) }.boot().await;
    let guest = rig.guest(101);
    let mut pvc = rig.volume("pvc-q35", "data").await;
    rig.attach(&mut pvc, 101).await;
    assert_eq!(guest.disks().await, "", "the guest is told of nothing");
    guest.stage(&pvc).await;
    guest.sh(&format!("echo mine >{}/data", pvc.staging)).await;
    guest.unstage(&pvc).await;
    rig.detach(&pvc, 101).await;
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_controller_serves_volumes_beside_its_boot_disk() {
    let rig = Setup { config: vec![("scsihw", "virtio-scsi-pci")], ..Setup::of(&[101]) }.boot().await;
    let guest = rig.guest(101);
    let [mut first, second] = two_volumes(&rig).await;
    guest.stage(&second).await;
    rig.detach(&first, 101).await;
    rig.attach(&mut first, 101).await;
    guest.stage(&first).await;
    assert_eq!(
        guest.sh(&format!("cat {}/name {}/name", first.staging, second.staging)).await,
        "pvc-a\npvc-b"
    );
    guest.unstage(&first).await;
    guest.unstage(&second).await;
    rig.sim().shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_volumes_beside_the_boot_disk_are_told_apart() {
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut volumes = Vec::new();
    for number in 1..=30 {
        let pvc = rig.volume(&format!("pvc-{number}"), "data").await;
        let mut pvc = pvc.staged_at(&format!("/var/lib/kubelet/pvc-{number}/globalmount"));
        rig.attach(&mut pvc, 101).await;
        volumes.push(pvc);
    }
    let more = rig.volume("pvc-31", "data").await;
    support::assert_refused(
        rig.bench.attach(&more.volume.volume_id, "worker-101").await,
        Code::ResourceExhausted,
        &["101"],
    );
    let blockstat = rig.bench.admin("GET", "/nodes/pve1/qemu/101/status/current", "").await;
    assert_eq!(blockstat["data"]["blockstat"].as_object().expect("QEMU answers").len(), 31);
    for pvc in [&volumes[0], &volumes[14], &volumes[29]] {
        guest.stage(pvc).await;
        guest.sh(&format!("echo {} >{}/name", pvc.wwid(), pvc.staging)).await;
        guest.unstage(pvc).await;
    }
    for pvc in [&volumes[29], &volumes[0], &volumes[14]] {
        guest.stage(pvc).await;
        assert_eq!(guest.sh(&format!("cat {}/name", pvc.staging)).await, pvc.wwid());
        guest.unstage(pvc).await;
    }
    rig.sim().shutdown().await;
}
