//! The life of a volume, from its making to its end.

use crate::{
    rig::{STAGING, Setup},
    support::GIB,
};

const TARGET: &str = "/var/lib/kubelet/pods/1/mount";

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_lives_on_two_guests_and_dies() {
    let rig = Setup::of(&[101, 102]).boot().await;
    let (first, second) = (rig.guest(101), rig.guest(102));
    let mut pvc = rig.volume("pvc-1", "shared").await;
    rig.attach(&mut pvc, 101).await;
    first.stage(&pvc).await;
    first.publish(&pvc, TARGET, false).await;
    let sum =
        first.sh(&format!("cd {TARGET}; head -c 16000000 /dev/urandom >data; sync; sha256sum data")).await;
    first.unpublish(&pvc, TARGET).await;
    first.unstage(&pvc).await;
    // The guest's kernel has given it back before Proxmox takes it.
    assert_eq!(first.disks().await, "");
    rig.detach(&pvc, 101).await;

    rig.attach(&mut pvc, 102).await;
    second.stage(&pvc).await;
    second.publish(&pvc, TARGET, false).await;
    assert_eq!(second.sh(&format!("cd {TARGET}; sha256sum data")).await, sum);
    rig.bench.expand(&pvc.volume.volume_id, 2 * GIB).await.expect("it grows");
    second.expand(&pvc, TARGET, 2).await;
    let size: u64 = second
        .sh(&format!("stat -f -c '%S %b' {TARGET} | awk '{{print $1*$2}}'"))
        .await
        .parse()
        .expect("bytes");
    assert!(size > 1_900_000_000, "the file system has {size} bytes");
    assert_eq!(second.sh(&format!("cd {TARGET}; sha256sum data")).await, sum);
    second.unpublish(&pvc, TARGET).await;
    second.unstage(&pvc).await;
    rig.detach(&pvc, 102).await;
    let left = second
        .sh(&format!("grep -c {STAGING} /proc/mounts; ls -d /sys/bus/pci/devices/0000:01:* | wc -l"))
        .await;
    // Its boot disk's controller alone is left behind the bridge.
    assert_eq!(left.lines().collect::<Vec<_>>(), ["0", "1"]);
    rig.bench.delete(&pvc.volume.volume_id).await.expect("it is deleted");
    assert!(rig.sim().volumes().iter().all(|volume| !volume.key.name.contains("pvc-1")));
    rig.sim().shutdown().await;
}
