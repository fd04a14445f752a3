//! Injected faults under the driver: what was acknowledged and flushed is there
//! afterwards, and nothing hangs.
//!
//! Each seed is a run of its own, on a controller that fails at commands which the seed gives:
//! `VFIO_REMAP_TEST_FAULT_SEEDS=17` repeats the run of seed 17, `0..500` are more of them.

use std::collections::HashMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use vfio_remap::emulated::nvme::Fault;

use crate::fault_worker::{Outcome, Run};

/// Seeds, each with so many faults: a thousand in all.
const SEEDS: std::ops::Range<u64> = 0..20;
const FAULTS: usize = 50;
/// How many runs there are at a time: they wait more than they work.
const AT_A_TIME: usize = 4;
/// Within this the driver answers: what it states is more, but this model is ready at once.
const SOON: Duration = Duration::from_secs(30);
/// How long one run may take on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(400);

#[test]
fn a_thousand_faults_lose_nothing_that_was_flushed() {
    let chosen = std::env::var("VFIO_REMAP_TEST_FAULT_SEEDS").ok();
    let seeds: Vec<u64> = chosen.as_deref().map_or_else(|| SEEDS.collect(), seeds);
    let mut struck: HashMap<Fault, usize> = HashMap::new();
    let mut longest = Duration::ZERO;
    for group in seeds.chunks(AT_A_TIME) {
        let runs: Vec<_> = group.iter().map(|&seed| (seed, start(seed))).collect();
        for (seed, run) in runs {
            match run.recv_timeout(PATIENCE) {
                Ok(outcome) => {
                    assert_eq!(outcome.struck.len(), FAULTS, "seed {seed}");
                    longest = longest.max(outcome.longest);
                    for fault in outcome.struck {
                        *struck.entry(fault).or_default() += 1;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("the run of seed {seed} hangs"),
                Err(RecvTimeoutError::Disconnected) => panic!("the run of seed {seed} has failed"),
            }
        }
    }
    println!("{struck:?}; the slowest answer took {longest:?}");
    assert!(longest < SOON, "an answer took {longest:?}");
    let expected = seeds.len() * FAULTS;
    assert_eq!(struck.values().sum::<usize>(), expected);
    if chosen.is_none() {
        assert!(Fault::ALL.iter().all(|fault| struck[fault] > expected / 10), "{struck:?}");
    }
}

/// Starts a run in a thread of its own; nothing comes of one that has panicked.
fn start(seed: u64) -> mpsc::Receiver<Outcome> {
    let (sender, receiver) = mpsc::channel();
    let run = move || {
        let outcome = Run::new(seed, FAULTS).perform();
        // Nobody listens any more where another has failed.
        let _ = sender.send(outcome);
    };
    std::thread::Builder::new().name(format!("seed {seed}")).spawn(run).unwrap();
    receiver
}

fn seeds(text: &str) -> Vec<u64> {
    let number = |text: &str| text.parse::<u64>().expect("a seed is a number");
    match text.split_once("..") {
        Some((first, end)) => (number(first)..number(end)).collect(),
        None => vec![number(text)],
    }
}
