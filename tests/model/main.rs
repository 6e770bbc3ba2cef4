//! The model test: the whole system played by chance, in one process and under a paused clock.
//!
//! A seed is a cluster and a list of steps ([`plan`]): calls as the sidecars make them, in legal and illegal order, at once and again;
//! people who change VMs, take snapshots, reuse VMIDs; nodes, storages, QEMUs and privileges that fail; requests that are lost or late;
//! controllers that crash, part from the API server, or hand over. Each write is judged when it goes out ([`judge`]), each answer when it
//! is heard ([`calls`]), the state after each step ([`invariants`]), and in the end nothing may be left ([`quiesce`]).
//!
//! `MODEL_SEED=<seed>` plays that one alone and prints its history, shrunk if it fails (`MODEL_FULL=1`: all of it); `make soak SEEDS=<count>` plays many.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "modules of one test binary; the fields of a plan say what they are"
)]

mod admin;
mod calls;
mod chance;
mod holds;
mod invariants;
mod judge;
mod ledger;
mod plan;
mod process;
mod quiesce;
mod rig;
mod run;
mod setup;
mod shrink;
#[path = "../support/mod.rs"]
mod support;
mod wire;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use run::{Outcome, planned, run};

/// Steps of a run.
const STEPS: usize = 200;
/// Runs in the test; more with `make soak`.
const SEEDS: u64 = 60;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn steps() -> usize {
    number("MODEL_STEPS").map_or(STEPS, |steps| usize::try_from(steps).expect("a number of steps"))
}

/// What went wrong with a seed, as a person reads it: shrunk.
fn report(seed: u64) -> String {
    let (setup, steps) = planned(seed, steps());
    let first = run(&setup, &steps);
    let Some(wrong) = first.wrong else { return format!("seed {seed} does not fail again") };
    let (left, outcome) = shrink::shrink(&setup, &steps, wrong.invariant);
    let mut text = format!(
        "MODEL_SEED={seed}: {}: {}\nshrunk from {} to {} steps, on {} nodes with VMs {:?}:\n",
        wrong.invariant,
        wrong.text,
        first.taken,
        left.len(),
        setup.nodes.len(),
        setup.vms.iter().map(|vm| (vm.vmid, setup.nodes[vm.node].as_str())).collect::<Vec<_>>(),
    );
    for line in &outcome.history {
        let _ = writeln!(text, "{line}");
    }
    text
}

/// Plays these seeds on two threads, each run in a runtime of its own. The seeds that fail, and what happened in all.
fn play(seeds: std::ops::Range<u64>, count: usize, progress: bool) -> (Vec<(u64, Outcome)>, Totals) {
    run::catch_panics();
    let next = AtomicU64::new(seeds.start);
    let (failed, totals) = (Mutex::new(Vec::new()), Mutex::new(Totals::default()));
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(2));
    let threads = number("MODEL_THREADS").map_or(threads, |n| usize::try_from(n).expect("small"));
    let most = number("MODEL_FAILURES").unwrap_or(1);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let (setup, steps) = planned(seed, count);
                    let outcome = run(&setup, &steps);
                    let mut totals = totals.lock().expect("no panic");
                    totals.add(&outcome);
                    if progress && totals.runs % 1000 == 0 {
                        println!("{} runs, {} requests", totals.runs, totals.requests);
                    }
                    drop(totals);
                    if outcome.wrong.is_some() {
                        let mut failed = failed.lock().expect("no panic");
                        failed.push((seed, outcome));
                        if u64::try_from(failed.len()).expect("small") >= most {
                            next.store(seeds.end, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().expect("no panic");
    failed.sort_by_key(|(seed, _)| *seed);
    (failed, totals.into_inner().expect("no panic"))
}

/// What happened in all runs.
#[derive(Debug, Default)]
struct Totals {
    runs: u64,
    steps: usize,
    requests: u64,
    answers: BTreeMap<String, u64>,
}

impl Totals {
    fn add(&mut self, outcome: &Outcome) {
        self.runs += 1;
        self.steps += outcome.taken;
        self.requests += outcome.requests;
        for (what, count) in &outcome.answers {
            *self.answers.entry(what.clone()).or_default() += count;
        }
    }
}

fn no_seed_fails(failed: &[(u64, Outcome)]) {
    let seeds: Vec<_> = failed
        .iter()
        .map(|(seed, outcome)| (*seed, outcome.wrong.as_ref().map(|wrong| wrong.invariant)))
        .collect();
    if let Some((seed, _)) = failed.first() {
        panic!("{seeds:?}\n{}", report(*seed));
    }
}

#[test]
fn no_run_of_the_whole_system_breaks_an_invariant() {
    if let Some(seed) = number("MODEL_SEED") {
        run::catch_panics();
        let (setup, steps) = planned(seed, steps());
        let outcome = run(&setup, &steps);
        if number("MODEL_FULL").is_some() || outcome.wrong.is_none() {
            println!("{}", outcome.history.join("\n"));
        }
        let report = outcome.wrong.as_ref().map(|_| report(seed));
        let _ = std::panic::take_hook();
        assert!(outcome.wrong.is_none(), "{}", report.unwrap_or_default());
        return;
    }
    let (failed, totals) = play(0..number("MODEL_SEEDS").unwrap_or(SEEDS), steps(), false);
    let _ = std::panic::take_hook();
    println!("{totals:#?}");
    no_seed_fails(&failed);
}

#[test]
#[ignore = "as long as is asked for: `make soak`"]
fn soak() {
    let from = number("MODEL_FROM").unwrap_or(0);
    let seeds = number("MODEL_SEEDS").unwrap_or(1000);
    let (failed, totals) = play(from..from + seeds, steps(), true);
    let _ = std::panic::take_hook();
    println!("{totals:#?}");
    no_seed_fails(&failed);
}

#[test]
fn one_seed_twice_is_one_history() {
    for seed in [3, 6] {
        let (setup, steps) = planned(seed, 120);
        let (first, second) = (run(&setup, &steps), run(&setup, &steps));
        let differs = first.history.iter().zip(&second.history).find(|(a, b)| a != b);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first, second, "seed {seed}");
        assert!(first.requests > 100, "something happened");
    }
}
