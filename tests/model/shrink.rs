//! Leaves out of a run that fails what it fails without (Zeller, Hildebrandt 2002: ddmin).

use crate::{
    plan::{Act, Step},
    run::{Outcome, run},
    setup::Setup,
};

/// How many runs it may take.
const BUDGET: usize = 600;

/// The fewest steps found that still break the invariant, and what comes of them.
pub fn shrink(setup: &Setup, steps: &[Step], invariant: &str) -> (Vec<Step>, Outcome) {
    let mut best = steps.to_vec();
    let mut outcome = run(setup, &best);
    best.truncate(outcome.taken);
    let mut runs = 0;
    let attempt = |candidate: &[Step], runs: &mut usize| {
        *runs += 1;
        let outcome = run(setup, candidate);
        outcome.wrong.as_ref().is_some_and(|wrong| wrong.invariant == invariant).then_some(outcome)
    };
    let mut parts = 2;
    while best.len() > 1 && runs < BUDGET {
        let size = best.len().div_ceil(parts);
        let smaller = (0..best.len()).step_by(size).find_map(|from| {
            let to = (from + size).min(best.len());
            let candidate = without(&best, from, to);
            if runs >= BUDGET {
                return None;
            }
            attempt(&candidate, &mut runs).map(|outcome| (candidate, outcome))
        });
        match smaller {
            Some((mut candidate, found)) => {
                candidate.truncate(found.taken);
                (best, outcome) = (candidate, found);
                parts = (parts - 1).max(2);
            }
            None if size == 1 => break,
            None => parts = (parts * 2).min(best.len()),
        }
    }
    // What is left is made simpler.
    for at in 0..best.len() {
        for simpler in simpler(&best[at]) {
            let mut candidate = best.clone();
            candidate[at] = simpler;
            if runs < BUDGET
                && let Some(found) = attempt(&candidate, &mut runs)
            {
                (best, outcome) = (candidate, found);
            }
        }
    }
    (best, outcome)
}

/// The steps without some; the time that these took still passes.
fn without(steps: &[Step], from: usize, to: usize) -> Vec<Step> {
    let mut left = steps[..from].to_vec();
    let passed: u64 = steps[from..to].iter().map(|step| step.pause).sum();
    if let Some(last) = left.last_mut() {
        last.pause += passed;
    }
    left.extend_from_slice(&steps[to..]);
    left
}

fn simpler(step: &Step) -> Vec<Step> {
    let mut all = Vec::new();
    for pause in [0, 1_000, 10_000] {
        if pause < step.pause {
            all.push(Step { pause, ..step.clone() });
        }
    }
    if let Act::Call(call) = &step.act
        && call.tries > 1
    {
        let call = crate::plan::Call { tries: 1, ..call.clone() };
        all.push(Step { act: Act::Call(call), ..step.clone() });
    }
    all
}
