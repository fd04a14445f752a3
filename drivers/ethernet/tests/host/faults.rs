//! Injected faults under streams of TCP: every byte arrives, no buffer is lost, and no call hangs.
//!
//! Each seed is a run of its own, on two cards that fail at packets which the seed gives:
//! `VFIO_REMAP_TEST_FAULT_SEEDS=17` repeats the run of seed 17, `0..20` are a thousand faults.

use std::collections::HashMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use vfio_remap::emulated::igb::Fault;

use crate::fault_run::{Outcome, check, perform};

/// Seeds, each with so many faults. `cargo lab soak` runs more.
const SEEDS: std::ops::Range<u64> = 0..6;
const FAULTS: usize = 50;
/// How many runs there are at a time: they wait more than they work.
const AT_A_TIME: usize = 3;
/// The longest time in which nothing comes: some resets, and the stack's patience.
const SILENCE: Duration = Duration::from_secs(30);
/// How long one run may take on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(400);

#[test]
fn faults_under_tcp_lose_no_byte_and_no_buffer() {
    let chosen = std::env::var("VFIO_REMAP_TEST_FAULT_SEEDS").ok();
    let seeds: Vec<u64> = chosen.as_deref().map_or_else(|| SEEDS.collect(), seeds);
    let mut struck: HashMap<Fault, usize> = HashMap::new();
    let mut all = Outcome::default();
    for group in seeds.chunks(AT_A_TIME) {
        let runs: Vec<_> = group.iter().map(|&seed| (seed, start(seed))).collect();
        for (seed, run) in runs {
            match run.recv_timeout(PATIENCE) {
                Ok(outcome) => {
                    check(seed, FAULTS, &outcome);
                    assert!(outcome.silence < SILENCE, "seed {seed}: {:?}", outcome.silence);
                    all.longest = all.longest.max(outcome.longest);
                    all.silence = all.silence.max(outcome.silence);
                    all.bytes += outcome.bytes;
                    all.resets += outcome.resets;
                    all.exchanges += outcome.exchanges;
                    for fault in outcome.struck {
                        *struck.entry(fault).or_default() += 1;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("the run of seed {seed} hangs"),
                Err(RecvTimeoutError::Disconnected) => panic!("the run of seed {seed} has failed"),
            }
        }
    }
    let Outcome { longest, silence, bytes, resets, exchanges, .. } = all;
    println!(
        "{struck:?}: {bytes} bytes, {resets} resets, {exchanges} queues; the slowest call took {longest:?}, the \
         longest silence {silence:?}"
    );
    assert_eq!(struck.values().sum::<usize>(), seeds.len() * FAULTS);
    if chosen.is_none() {
        assert!(Fault::ALL.iter().all(|fault| struck.contains_key(fault)), "{struck:?}");
    }
}

/// Starts a run in a thread of its own; nothing comes of one that has panicked.
fn start(seed: u64) -> mpsc::Receiver<Outcome> {
    let (sender, receiver) = mpsc::channel();
    let run = move || {
        let outcome = perform(seed, FAULTS);
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
