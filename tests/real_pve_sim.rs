//! The `pve-sim` command: how it says that it is ready, and how it goes.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A running `pve-sim`, killed with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(state: &Path, more: &[&str]) -> (Running, Value) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pve-sim"))
        .args(["serve", "--time", "none", "--state"])
        .arg(state)
        .args(more)
        .stdout(Stdio::piped())
        .spawn()
        .expect("pve-sim starts");
    let stdout = child.stdout.take().expect("it was asked for");
    let running = Running(child);
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).expect("a line of text");
    (running, serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: `{line}`")))
}

fn pid(running: &Running) -> Pid {
    Pid::from_raw(i32::try_from(running.0.id()).expect("a process id")).expect("not zero")
}

fn loops(directory: &Path) -> usize {
    let backing =
        |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("loop/backing_file")).ok();
    let files = std::fs::read_dir("/sys/block").expect("/sys/block").flatten().filter_map(backing);
    files.filter(|file| Path::new(file.trim()).starts_with(directory)).count()
}

#[test]
fn it_says_where_it_is_and_ends_cleanly_when_told() {
    let state = tempfile::tempdir().expect("a temporary directory");
    let ready = state.path().join("ready.json");
    let (mut running, said) =
        serve(state.path(), &["--no-devices", "--ready-file", ready.to_str().expect("the path is text")]);
    assert!(said["url"].as_str().is_some_and(|url| url.starts_with("https://127.0.0.1:")));
    assert!(said["ca"].as_str().is_some_and(|path| Path::new(path).exists()));
    assert_eq!(said["guests"], serde_json::json!({}));
    assert_eq!(said["tokens"]["csi@pve!csi"], "PVEAPIToken=csi@pve!csi=22222222-2222-4222-8222-222222222222");
    let written: Value = (0..100)
        .find_map(|_| {
            std::thread::yield_now();
            std::fs::read_to_string(&ready).ok().or_else(|| {
                std::thread::park_timeout(std::time::Duration::from_millis(20));
                None
            })
        })
        .and_then(|text| serde_json::from_str(&text).ok())
        .expect("the ready file is written");
    assert_eq!(written, said);
    kill_process(pid(&running), Signal::TERM).expect("it runs");
    assert!(running.0.wait().expect("it ends").success());
}

/// Needs root and loop devices, and fails without them.
#[test]
fn neither_an_end_nor_a_kill_leaves_loop_devices() {
    assert!(
        rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists(),
        "this test needs root and loop devices (/dev/loop-control); it is not skipped, run it where they are"
    );
    for signal in [Signal::TERM, Signal::KILL] {
        let state = tempfile::tempdir().expect("a temporary directory");
        let (mut running, said) = serve(state.path(), &[]);
        let sys = said["guests"]["101"]["sys"].as_str().expect("VM 101 is this machine").to_owned();
        assert!(Path::new(&sys).join("block/sda").exists());
        assert_eq!(loops(state.path()), 3);
        kill_process(pid(&running), signal).expect("it runs");
        let status = running.0.wait().expect("it ends");
        assert_eq!(status.success(), signal == Signal::TERM);
        // The kernel takes a device away a moment after its last user.
        let gone = (0..100).any(|_| {
            std::thread::park_timeout(std::time::Duration::from_millis(20));
            loops(state.path()) == 0
        });
        assert!(gone, "loop devices are left after {signal:?}");
        assert_eq!(Path::new(&sys).exists(), signal == Signal::KILL);
    }
}
