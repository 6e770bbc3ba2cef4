//! The simulator against recordings of a real Proxmox VE 9.2: how many answers differ may only go down.

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
