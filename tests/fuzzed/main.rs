//! The properties that the fuzz targets try (`fuzz/`), over their corpus and over input made from it. What a fuzzer found is a file of the
//! corpus, and so a test.

mod properties;

use std::{fs, panic, path::Path};

use proptest::{prelude::*, sample::Index, test_runner::TestRunner};

/// How many inputs a property is tried with.
const CASES: u32 = 2_000;
/// The same of one that writes a tree of files for each.
const FEW: u32 = 100;

/// The corpus of a target: its files, in the order of their names.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.expect("a readable directory").path())
        .collect();
    files.sort();
    files.into_iter().map(|path| fs::read(path).expect("a readable file")).collect()
}

/// Changes that keep most of a text: a byte replaced, a piece cut out, doubled, or taken from another text.
fn changed(mut text: Vec<u8>, other: &[u8], changes: &[(u8, Index, Index, u8)]) -> Vec<u8> {
    for (kind, from, to, byte) in changes {
        if text.is_empty() {
            return other.to_vec();
        }
        let (a, b) = (from.index(text.len()), to.index(text.len()));
        let piece = a.min(b)..=a.max(b);
        match kind % 5 {
            0 => text[a] = *byte,
            1 => text.insert(a, *byte),
            2 => drop(text.drain(piece)),
            3 => {
                let copy = text[piece].to_vec();
                text.splice(b..b, copy);
            }
            _ if other.is_empty() => {}
            _ => {
                let (c, d) = (from.index(other.len()), to.index(other.len()));
                text.splice(a..a, other[c.min(d)..=c.max(d)].iter().copied());
            }
        }
        text.truncate(4096);
    }
    text
}

fn holds(target: &str, cases: u32) {
    let (_, property) = properties::ALL.into_iter().find(|(name, _)| *name == target).expect("a target");
    let seeds = &corpus(target);
    assert!(seeds.len() >= 3, "{target} has a corpus");
    for seed in seeds {
        property(seed);
    }
    let choice = (any::<Index>(), any::<Index>());
    let changes = prop::collection::vec((any::<u8>(), any::<Index>(), any::<Index>(), any::<u8>()), 1..6);
    let noise = prop::collection::vec(any::<u8>(), 0..200);
    let mut runner =
        TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) });
    let tried = runner.run(&(choice, changes, noise, 0..10_u8), |((one, other), changes, noise, kind)| {
        let input = match kind {
            0 => noise,
            _ => changed(one.get::<Vec<u8>>(seeds).clone(), other.get::<Vec<u8>>(seeds), &changes),
        };
        panic::catch_unwind(|| property(&input)).map_err(|_| {
            TestCaseError::fail(format!(
                "keep it as fuzz/corpus/{target}/NAME: {:?}",
                input.escape_ascii().to_string()
            ))
        })
    });
    if let Err(error) = tried {
        panic!("{target}: {error}");
    }
}

#[test]
fn names_are_printed_as_they_were_and_stay_in_their_place_in_a_url() {
    holds("handles", CASES);
}

#[test]
fn property_strings_are_read_back_and_no_value_brings_another_property() {
    holds("properties", CASES);
}

#[test]
fn parameters_make_drives_of_known_properties_only() {
    holds("parameters", CASES);
}

#[test]
fn no_answer_of_a_server_panics() {
    holds("answers", CASES);
}

#[test]
fn no_mount_table_panics() {
    holds("mounts", CASES);
}

#[test]
fn no_tree_of_devices_panics() {
    holds("sysfs", FEW);
}

#[test]
fn no_configuration_panics_or_prints_a_secret() {
    holds("configs", CASES);
}

#[test]
fn every_target_has_a_property_and_every_property_a_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("a manifest");
    for (name, _) in properties::ALL {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} has no target");
        let target = fs::read_to_string(root.join(format!("targets/{name}.rs"))).expect("a target");
        assert!(target.contains(&format!("properties::{name}(data)")), "{target}");
    }
    let targets = fs::read_dir(root.join("targets")).expect("a directory").count();
    assert_eq!(targets, properties::ALL.len());
}
