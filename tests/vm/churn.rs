//! A volume that comes and goes all the time.

use crate::rig::{STAGING, Setup};

/// How often, unless `VM_CYCLES` says otherwise: `make test-vm` has ten minutes for everything.
const CYCLES: u32 = 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_is_clean_after_every_attach_stage_unstage_and_detach() {
    let cycles =
        std::env::var("VM_CYCLES").map_or(CYCLES, |text| text.parse().expect("VM_CYCLES is a number"));
    let rig = Setup::of(&[101]).boot().await;
    let guest = rig.guest(101);
    let mut volumes = Vec::new();
    for kind in ["ext4", "xfs"] {
        volumes.push((kind, rig.volume(&format!("pvc-{kind}"), "data").await.formatted_as(kind)));
    }
    for cycle in 0..cycles {
        for (kind, pvc) in &mut volumes {
            rig.attach(pvc, 101).await;
            guest.stage(pvc).await;
            let lines = guest.sh(&format!("echo {cycle} >>{STAGING}/log; wc -l <{STAGING}/log")).await;
            assert_eq!(lines, (cycle + 1).to_string(), "{kind}");
            guest.unstage(pvc).await;
            rig.detach(pvc, 101).await;
            // The disk is in nobody's hands: its image is looked at from here.
            let image = rig.image(pvc);
            let check = if *kind == "ext4" { ("e2fsck", ["-f", "-n"]) } else { ("xfs_repair", ["-n", "-f"]) };
            let output = std::process::Command::new(check.0)
                .args(check.1)
                .arg(&image)
                .output()
                .expect("the tool runs");
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{kind}, cycle {cycle}: {said}");
        }
    }
    let left = guest.sh("ls -d /sys/bus/pci/devices/0000:01:* | wc -l; ls /sys/block | grep -c '^sd'").await;
    assert_eq!(left, "1\n1", "only the boot disk is left");
    rig.sim().shutdown().await;
}
