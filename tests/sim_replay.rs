//! The simulator against recordings of a real Proxmox VE 9.2: how many answers differ may only go down.

use proxmox_csi::sim::World;
use proxmox_csi::sim::misreading::Misreading;
use proxmox_csi::sim::replay::{Outcome, Record, Script, Verdict, replay};
use std::path::Path;

/// Recording, and the number of records whose answers differ. Lower it as the simulator learns; it never rises.
const RATCHET: &[(&str, usize)] = &[("pve-transcripts.jsonl", 0), ("pve-transcripts-holder.jsonl", 0)];

fn read(file: &str) -> Vec<Record> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Record::read(&text).expect("a recording is one record per line")
}

async fn play(records: &[Record]) -> Vec<Outcome> {
    let script = Script::builtin(&records[0].name).expect("the built-in scripts can be read");
    replay(records, &script).await.expect("the built-in worlds start")
}

fn different(outcomes: &[Outcome]) -> Vec<&Outcome> {
    outcomes.iter().filter(|outcome| matches!(outcome.verdict, Verdict::Different(_))).collect()
}

#[tokio::test(start_paused = true)]
async fn the_recordings_differ_in_no_more_places_than_before() {
    for (file, most) in RATCHET {
        let outcomes = play(&read(file)).await;
        let found = different(&outcomes);
        assert!(
            found.len() <= *most,
            "{file}: {} records differ, {most} did before; the last is {:?}",
            found.len(),
            found.last()
        );
    }
}

/// A transcript that tells of another Proxmox VE than there is: 404 for a VM that does not exist.
#[tokio::test(start_paused = true)]
async fn a_planted_misreading_is_caught() {
    let mut records = read("pve-transcripts.jsonl");
    records.truncate(70);
    let before = different(&play(&records).await).len();
    for (name, change) in [("B13-alloc-noext", "status"), ("B40-volume-get-nonexistent", "reason")] {
        let mut planted = records.clone();
        let Some(response) =
            planted.iter_mut().find(|record| record.name == name).and_then(|record| record.response.as_mut())
        else {
            panic!("{name} is in the recording");
        };
        match change {
            "status" => response.status = 404,
            _ => response.reason = Some("no such volume".to_owned()),
        }
        let outcomes = play(&planted).await;
        let caught = different(&outcomes);
        assert_eq!(caught.len(), before + 1);
        assert!(caught.iter().any(|outcome| outcome.name == name), "{name} was not noticed");
    }
}

/// Two rules that are easily got wrong: what is missing is 404, and a detached disk is just gone.
#[tokio::test(start_paused = true)]
async fn a_simulator_that_misreads_proxmox_is_caught() {
    let records = read("pve-transcripts.jsonl");
    for (misreading, witness) in [(Misreading::MissingIs404, "C02"), (Misreading::DetachedVanishes, "E")] {
        let script = Script::builtin(&records[0].name).expect("the built-in scripts can be read");
        let outcomes = replay(&records, &script.misreading(misreading)).await.expect("the worlds start");
        let caught = different(&outcomes);
        assert!(
            caught.iter().any(|outcome| outcome.name.starts_with(witness)),
            "{misreading:?} is caught by {:?}",
            caught.iter().map(|outcome| &outcome.name).collect::<Vec<_>>()
        );
    }
}

const MINE: &str = r"
nodes: [alpha]
storages: [{id: local}, {id: tank, type: zfspool, properties: {pool: tank}}]
vms: [{vmid: 100, node: alpha, name: w1, running: false}]
tokens: [{id: root@pam!me, secret: s}]
";

fn text_of_mine(reason: &str) -> String {
    let path = "/api2/json/nodes/alpha/storage/tank/content";
    let request = serde_json::json!({
        "method": "POST", "path": path, "auth": "token root@pam!me",
        "form": { "filename": "vm-100-a", "vmid": 100, "size": "1G" },
    });
    let ok = serde_json::json!({ "status": 200, "reason": "OK", "body": { "data": "tank:vm-100-a" } });
    let message = format!("{reason}\n");
    let refused = serde_json::json!({
        "status": 500, "reason": reason, "body": { "data": null, "message": message },
    });
    let lines = [
        serde_json::json!({ "seq": 1, "name": "make", "request": request, "response": ok }),
        serde_json::json!({ "seq": 2, "name": "a note", "observation": { "out": "somebody looked" } }),
        serde_json::json!({ "seq": 703, "name": "again", "request": request, "response": refused }),
    ];
    let text: Vec<String> = lines.iter().map(ToString::to_string).collect();
    text.join("\n")
}

fn mine(reason: &str) -> Vec<Record> {
    Record::read(&text_of_mine(reason)).expect("a recording is one record per line")
}

#[tokio::test(start_paused = true)]
async fn a_recording_of_ones_own_is_replayed_in_its_own_world() {
    let world = || Some(World::from_yaml(MINE).expect("a world"));
    let right = mine("zfs error: cannot create 'tank/vm-100-a': dataset already exists");
    let script = Script::for_recording(&right, world()).expect("a script");
    let outcomes = replay(&right, &script).await.expect("the world starts");
    let found: Vec<_> = outcomes.iter().map(|outcome| (outcome.seq, &outcome.verdict)).collect();
    assert_eq!(found, [(1, &Verdict::Equal), (703, &Verdict::Equal)]);
    let wrong = mine("volume exists");
    let script = Script::for_recording(&wrong, world()).expect("a script");
    let outcomes = replay(&wrong, &script).await.expect("the world starts");
    assert!(matches!(&outcomes[1].verdict, Verdict::Different(all) if all.len() == 2), "{outcomes:?}");
    let none = Script::for_recording(&wrong, None).expect("a script");
    let error = replay(&wrong, &none).await.expect_err("no world");
    assert!(error.to_string().contains("--world"), "{error}");
}

#[test]
fn the_command_prints_what_differs_and_exits_with_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let (world, recording) = (directory.path().join("world.yaml"), directory.path().join("mine.jsonl"));
    std::fs::write(&world, MINE).expect("writable");
    let run = |reason: &str| {
        std::fs::write(&recording, text_of_mine(reason)).expect("writable");
        let command = std::process::Command::new(env!("CARGO_BIN_EXE_pve-sim"))
            .arg("replay")
            .arg(&recording)
            .arg("--world")
            .arg(&world)
            .output()
            .expect("the command runs");
        (command.status.code(), String::from_utf8_lossy(&command.stdout).into_owned())
    };
    let (code, _) = run("zfs error: cannot create 'tank/vm-100-a': dataset already exists");
    assert_eq!(code, Some(0));
    let (code, printed) = run("volume exists");
    assert_eq!(code, Some(1));
    assert!(printed.contains("again") && printed.contains("volume exists"), "{printed}");
}
