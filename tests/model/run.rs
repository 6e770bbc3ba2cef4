//! One run: a seed, its steps, and what came of it.

use std::{cell::RefCell, collections::BTreeMap, time::Duration};

use tokio::task::JoinHandle;

use crate::{
    ledger::{Armed, Wrong},
    plan::{self, Act, Step},
    rig::Rig,
    setup::Setup,
};

thread_local! {
    /// Panics of tasks of the run on this thread: tokio catches them.
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Notes panics of every thread for its run, and says nothing.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|info| {
        PANICS.with_borrow_mut(|panics| panics.push(info.to_string()));
    }));
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What happened, a line each.
    pub history: Vec<String>,
    /// A hash over all of it, every request and answer too.
    pub hash: u64,
    /// What was wrong.
    pub wrong: Option<Wrong>,
    /// How many of its steps were taken.
    pub taken: usize,
    /// Requests of controllers.
    pub requests: u64,
    /// Answers by call and code.
    pub answers: BTreeMap<String, u64>,
}

/// The cluster and the steps of a seed.
pub fn planned(seed: u64, count: usize) -> (Setup, Vec<Step>) {
    let setup = Setup::of(seed);
    let steps = plan::steps(seed, count, &setup);
    (setup, steps)
}

/// Runs these steps in a runtime of their own.
pub fn run(setup: &Setup, steps: &[Step]) -> Outcome {
    PANICS.with_borrow_mut(Vec::clear);
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build().expect("a runtime");
    let outcome = runtime.block_on(live(setup.clone(), steps));
    drop(runtime);
    outcome
}

async fn live(setup: Setup, steps: &[Step]) -> Outcome {
    let rig = Rig::new(setup);
    rig.take_all_for_granted();
    let election = rig.begin();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut tasks: Vec<JoinHandle<()>> = Vec::new();
    let mut taken = 0;
    for (number, step) in steps.iter().enumerate() {
        rig.ledger().say(&format!("{number:>3}: {step}"));
        taken += 1;
        take(&rig, &step.act, &mut tasks);
        tokio::time::sleep(Duration::from_millis(step.pause)).await;
        check(&rig);
        if rig.ledger().wrong.is_some() {
            break;
        }
    }
    if rig.ledger().wrong.is_none() {
        for task in tasks {
            // A panic is found below.
            task.await.ok();
        }
        check(&rig);
    }
    if rig.ledger().wrong.is_none() {
        rig.quiesce().await;
        check(&rig);
    }
    election.abort();
    let mut ledger = rig.ledger();
    Outcome {
        history: std::mem::take(&mut ledger.lines),
        hash: ledger.hash,
        wrong: ledger.wrong.take(),
        taken,
        requests: ledger.requests,
        answers: std::mem::take(&mut ledger.answers),
    }
}

fn check(rig: &Rig) {
    rig.check();
    let panicked = PANICS.with_borrow_mut(std::mem::take);
    if let Some(panic) = panicked.first() {
        rig.ledger().wrong("nothing_panics", panic.clone());
    }
}

fn take(rig: &Rig, act: &Act, tasks: &mut Vec<JoinHandle<()>>) {
    let rig = rig.clone();
    match act.clone() {
        Act::Call(call) => tasks.push(tokio::spawn(async move {
            Box::pin(rig.call(&call)).await;
        })),
        Act::Admin(act) => tasks.push(tokio::spawn(async move { rig.administer(&act).await })),
        Act::Trouble(trouble, seconds) => {
            tasks.push(tokio::spawn(async move { rig.suffer(&trouble, seconds).await }));
        }
        Act::Cut { cut, writes, skip } => rig.ledger().cuts.push(Armed { cut, writes, skip }),
        Act::Process(process) => rig.happen(process),
    }
}
