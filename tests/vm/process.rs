//! `pve-sim` as a process, whose VMs are processes too.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::rig::{Kernel, world};

/// Ends it at once when the test ends, however that is.
struct PveSim(Child);

impl Drop for PveSim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Processes that know the directory, but `pve-sim` itself.
fn machines(directory: &Path) -> Vec<String> {
    let directory = directory.to_str().expect("a name of text");
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    let commands = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    let commands = commands.map(|command| String::from_utf8_lossy(&command).replace('\0', " "));
    commands.filter(|command| command.starts_with("qemu") && command.contains(directory)).collect()
}

async fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_mins(1), "{what}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_die_with_a_pve_sim_that_was_killed_and_come_back_with_it() {
    let directory = tempfile::Builder::new().prefix("vm").tempdir().expect("a directory");
    let (state, ready, file) =
        (directory.path().join("s"), directory.path().join("ready"), directory.path().join("world.yaml"));
    let world = world(Kernel::Linux6_1, &[101, 102], &[], "");
    fs::write(&file, serde_saphyr::to_string(&world).expect("YAML")).expect("a file");
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pve-sim"));
        command
            .arg("serve")
            .arg("--world")
            .arg(&file)
            .arg("--state")
            .arg(&state)
            .arg("--ready-file")
            .arg(&ready);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        PveSim(command.spawn().expect("it starts"))
    };
    let mut first = start();
    wait_for("it is not ready", || ready.exists()).await;
    let told: serde_json::Value =
        serde_json::from_slice(&fs::read(&ready).expect("the file")).expect("a line of JSON");
    assert!(told["guests"]["101"]["ports"]["7001"].is_u64(), "{told}");
    assert_eq!(machines(directory.path()).len(), 2);
    first.0.kill().expect("it runs");
    wait_for("a QEMU outlives its simulator", || machines(directory.path()).is_empty()).await;

    fs::remove_file(&ready).expect("it is there");
    let second = start();
    wait_for("it is not ready again", || ready.exists()).await;
    assert_eq!(machines(directory.path()).len(), 2, "what ran before runs again");
    drop(second);
    wait_for("a QEMU outlives its simulator", || machines(directory.path()).is_empty()).await;
}
