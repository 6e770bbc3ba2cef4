//! The demo as a person runs it: it tells the whole life of a volume, and leaves nothing behind however it ends.
//!
//! Needs root, loop devices, and a mount namespace of its own: `make real`.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn demo() -> PathBuf {
    let binary = Path::new(env!("CARGO_BIN_EXE_proxmox-csi"));
    let path = binary.parent().expect("a directory").join("examples/demo");
    assert!(path.exists(), "`{}` is missing: run `cargo build --bins --example demo` first", path.display());
    path
}

/// Starts the demo in a directory for temporary files that is its own, so that what it leaves can be told from what others do.
fn start(arguments: &[&str], tmp: &Path) -> Child {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("a mount table");
    let shared = mounts.lines().any(|line| line.contains(" shared:"));
    assert!(!shared, "mounts would leak: run it by `make real`, or `unshare --mount --propagation private`");
    Command::new(demo())
        .args(["--time", "none"])
        .args(arguments)
        .env("TMPDIR", tmp)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the demo starts")
}

/// Nothing that knows the directory is left: no mount, no loop device, no process, no file.
#[track_caller]
fn assert_clean(tmp: &Path) {
    let tmp = tmp.to_str().expect("a name of text");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("a mount table");
    assert!(!mounts.contains(tmp), "{mounts}");
    for device in fs::read_dir("/sys/block").expect("devices").flatten() {
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        assert!(!backing.contains(tmp), "{}: {backing}", device.path().display());
    }
    for process in fs::read_dir("/proc").expect("processes").flatten() {
        let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        assert!(!command.contains(tmp), "{}: {command}", process.path().display());
    }
    let files: Vec<_> = fs::read_dir(tmp).expect("the directory").flatten().map(|file| file.path()).collect();
    assert!(files.is_empty(), "{files:?}");
}

#[test]
fn the_demo_tells_the_life_of_a_volume_and_leaves_nothing() {
    let tmp = tempfile::tempdir().expect("a directory");
    let output = start(&[], tmp.path()).wait_with_output().expect("the demo ends");
    let text = String::from_utf8(output.stdout).expect("text");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{error}");
    for expected in [
        "CreateVolume: 1 GiB on storage `shared`",
        "POST /nodes/pve1/qemu/101/config -> 200",
        "kernel   xfs of 960 MiB",
        "verified: the data is there after unstage and stage",
        "PUT /nodes/pve1/qemu/101/resize -> 200",
        "kernel   xfs of 1984 MiB",
        "verified: the data is there after growing",
        "verified: the data is there on the other VM",
        "no VM and no storage knows the volume any more",
        "No mount, loop device, process or file is left.",
    ] {
        assert!(text.contains(expected), "`{expected}` is not in:\n{text}");
    }
    assert_clean(tmp.path());
}

#[test]
fn a_demo_that_fails_at_any_stage_leaves_nothing() {
    for step in ["1", "2", "3", "4", "7", "10", "14", "16"] {
        let tmp = tempfile::tempdir().expect("a directory");
        let output = start(&["--fail-after", step], tmp.path()).wait_with_output().expect("the demo ends");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert!(error.contains("was to fail") && !error.contains("left over"), "step {step}: {error}");
        assert_clean(tmp.path());
    }
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing() {
    for (signal, after) in [(Signal::SIGINT, "4"), (Signal::SIGTERM, "3")] {
        let tmp = tempfile::tempdir().expect("a directory");
        let mut child = start(&["--pause-after", after], tmp.path());
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        lines
            .find(|line| line.as_ref().is_ok_and(|line| line.contains("Paused")))
            .expect("it gets there")
            .expect("text");
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
        kill(pid, signal).expect("the demo runs");
        // What it still prints must have a reader.
        lines.for_each(drop);
        assert!(!child.wait().expect("the demo ends").success());
        assert_clean(tmp.path());
    }
}
