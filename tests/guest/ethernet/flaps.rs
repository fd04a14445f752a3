//! A link that goes down and comes up while frames pass.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vfio_remap_ethernet::{MacAddress, Nic, Settings};

use super::station::{Station, ping, pong};
use super::{BURST, LONG, on_both};
use crate::machine::Machine;

const SETTINGS: Settings = Settings::DEFAULT.with_interrupts(true).with_poll(Duration::ZERO);
const FLAPS: usize = 20;
/// How many pings at least are answered between two flaps.
const PINGS: u64 = 100;
/// How long an answer is waited for before there are more pings: none comes while the link is down.
const PACE: Duration = Duration::from_millis(2);
const SEQUENCE: u16 = 1;

/// How far pings are, by their numbers.
#[derive(Default)]
struct Progress {
    /// Those before were given to the card.
    given: AtomicU64,
    /// Those before were sent, as the card says.
    completed: AtomicU64,
    /// The last that was answered, and one.
    answered: AtomicU64,
    is_over: AtomicBool,
}

/// Pings the gateway until it is told to end. Which pings were answered.
fn traffic(station: &mut Station, gateway: MacAddress, progress: &Progress) -> BTreeSet<u64> {
    let Station { nic, queues, pool, frames } = station;
    let mut answered = BTreeSet::new();
    let mut outgoing = Vec::with_capacity(BURST);
    let mut next: u64 = 0;
    while !progress.is_over.load(Ordering::SeqCst) {
        while outgoing.len() < BURST {
            // Of all sizes.
            let mut data = vec![0; 8 + next as usize * 37 % 1400];
            data[..8].copy_from_slice(&next.to_be_bytes());
            let bytes = ping(gateway, nic.address(), SEQUENCE, &data);
            let Some(frame) = pool.frame_of(&bytes) else { break };
            outgoing.push(frame);
            next += 1;
        }
        queues.transmitter.transmit(&mut outgoing, pool).unwrap();
        queues.transmitter.reclaim(pool);
        let given = next - outgoing.len() as u64;
        progress.given.store(given, Ordering::SeqCst);
        let completed = given - queues.transmitter.outstanding() as u64;
        progress.completed.store(completed, Ordering::SeqCst);
        // All answers, so that none waits in QEMU, where it would be lost when the link goes down.
        queues.receiver.wait(PACE).unwrap();
        while queues.receiver.receive(pool, frames, BURST).unwrap() > 0 {
            for frame in frames.drain(..) {
                if let Some(data) = pong(&frame.to_vec(), SEQUENCE) {
                    let number = u64::from_be_bytes(data[..8].try_into().unwrap());
                    assert_eq!(data.len(), 8 + number as usize * 37 % 1400);
                    assert!(answered.insert(number), "{number} was answered twice");
                    progress.answered.fetch_max(number + 1, Ordering::SeqCst);
                }
                pool.put(frame).unwrap();
            }
        }
    }
    for frame in outgoing {
        pool.put(frame).unwrap();
    }
    answered
}

/// Has the link go down and come up, each of which interrupts. The pings that were sent, and said to be so, while
/// it was up.
fn flap(name: &str, nic: &Nic, progress: &Progress, say: impl Fn(String)) -> Vec<Range<u64>> {
    let mut spans = Vec::new();
    let mut traffic = |flap| {
        // What is being given to the card just now may have met a link that was down.
        let begin = progress.given.load(Ordering::SeqCst) + BURST as u64;
        let end = Instant::now() + LONG;
        while [&progress.answered, &progress.completed]
            .iter()
            .any(|count| count.load(Ordering::SeqCst) < begin + PINGS)
        {
            assert!(Instant::now() < end, "{name}, flap {flap}: no traffic");
            std::thread::sleep(PACE);
        }
        spans.push(begin..progress.completed.load(Ordering::SeqCst));
    };
    for flap in 0..FLAPS {
        traffic(flap);
        for (state, is_up) in [("off", false), ("on", true)] {
            say(format!("set_link {name} {state}"));
            let is_told = nic.wait_for_link_change(LONG).unwrap();
            assert!(is_told, "{name}, flap {flap}: no interrupt when it was {state}");
            while nic.link().unwrap().is_some() != is_up {
                let is_told = nic.wait_for_link_change(LONG).unwrap();
                assert!(is_told, "{name}, flap {flap}: nothing said that it is {state}");
            }
        }
    }
    traffic(FLAPS);
    spans
}

#[test]
fn a_link_flaps_under_traffic_and_loses_nothing_completed() {
    let machine = Mutex::new(Machine::open());
    let say = |command: String| assert_eq!(machine.lock().unwrap().say(&command), "");
    on_both(|name, _| {
        let mut station = Station::new(name, SETTINGS);
        let gateway = station.gateway();
        let nic = station.nic.clone();
        assert!(nic.link_vector().unwrap().is_some());
        // What has come so far.
        while nic.wait_for_link_change(Duration::from_millis(1)).unwrap() {}
        let progress = Progress::default();
        let (answered, spans) = std::thread::scope(|scope| {
            let pings = scope.spawn(|| traffic(&mut station, gateway, &progress));
            let flaps = scope.spawn(|| flap(name, &nic, &progress, say));
            // Also if it has failed.
            let spans = flaps.join();
            progress.is_over.store(true, Ordering::SeqCst);
            (pings.join().unwrap(), spans.unwrap())
        });
        assert_eq!(spans.len(), FLAPS + 1);
        for span in spans {
            assert!(span.end - span.start >= PINGS, "{name}: {span:?}");
            let lost: Vec<_> = span.clone().filter(|number| !answered.contains(number)).collect();
            let count = lost.len();
            assert!(
                count == 0,
                "{name}: {count} of {span:?} were not answered, {:?} first",
                lost[0]
            );
        }
        drop(nic);
        station.stop();
    });
}
