//! Threads that share cards which fail: each notices, one brings the card back, and all go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vfio_remap::Device;
use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Fault, Faults, Igb, Port};
use vfio_remap_ethernet::{Frame, Nic, Pool, QueuePair, Settings};

use super::{BURST, LONG};

const QUEUES: u16 = 4;
const ENTRIES: u16 = 64;
const BUFFERS: usize = 200;
const SEEDS: u64 = 3;
const FAULTS: usize = 60;
const APART: std::ops::RangeInclusive<u64> = 20..=300;
/// Frames that a queue sends, and a card receives, once all faults have struck.
const REST: u64 = 200;

/// A card, and what its threads have in common.
struct Shared {
    nic: Arc<Nic>,
    faults: Faults,
    /// Frames that have come since all faults have struck.
    calm: AtomicU64,
}

impl Shared {
    fn new(number: u8, port: Port, seed: u64) -> Self {
        let faults = Faults::seeded(seed, &Fault::ALL, FAULTS, APART);
        let model = Igb::new([2, 0, 0, 0, 0, number]).with_wire(port).with_faults(&faults);
        let settings = Settings::DEFAULT
            .with_queues(QUEUES)
            .with_receive_entries(ENTRIES)
            .with_transmit_entries(ENTRIES)
            .with_interrupts(number == 1)
            .with_timeout(Duration::from_millis(100));
        let device = Device::new(Arc::new(Emulated::new(model).unwrap()));
        let nic = Nic::new(device, settings).unwrap();
        Self { nic, faults, calm: AtomicU64::new(0) }
    }

    /// A thread has met an error: it, and maybe others, bring the card back.
    fn bring_back(&self) {
        let end = Instant::now() + LONG;
        while self.faults.remaining() > 0 || self.nic.link().is_err() {
            self.faults.plug_in();
            if self.nic.reset().is_ok() {
                return;
            }
            assert!(Instant::now() < end, "it does not come back");
        }
        self.faults.plug_in();
        self.nic.reset().unwrap();
    }
}

/// A frame of UDP, whose addresses and ports decide on the queue.
fn packet(to: u8, port: u16) -> [u8; 60] {
    let mut bytes = [0; 60];
    bytes[..6].copy_from_slice(&[2, 0, 0, 0, 0, to]);
    bytes[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 3 - to]);
    bytes[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    bytes[17] = 46;
    bytes[22..24].copy_from_slice(&[64, 17]);
    bytes[26..34].copy_from_slice(&[10, 0, 0, 3 - to, 10, 0, 0, to]);
    bytes[34..36].copy_from_slice(&port.to_be_bytes());
    bytes[39] = 26;
    bytes
}

/// What a thread does with its queues, until all is calm; its pool, with all buffers.
fn work(cards: &[Shared; 2], me: usize, queues: QueuePair, mut pool: Pool) {
    let card = &cards[me];
    let QueuePair { mut receiver, mut transmitter, .. } = queues;
    let mut frames: Vec<Frame> = Vec::with_capacity(BURST);
    let (mut port, mut sent) = (0u16, 0);
    let end = Instant::now() + 2 * LONG;
    let is_calm = || cards.iter().all(|card| card.faults.remaining() == 0);
    while !is_calm()
        || sent < REST
        || cards.iter().any(|card| card.calm.load(Ordering::Relaxed) < REST)
    {
        assert!(Instant::now() < end, "{:?}", card.nic.statistics());
        for _ in 0..4 {
            port = port.wrapping_add(1);
            frames.extend(pool.frame_of(&packet(2 - me as u8, port)));
        }
        let done = transmitter.transmit(&mut frames, &mut pool);
        sent += done.as_ref().map_or(0, |count| *count as u64 * u64::from(is_calm()));
        frames.drain(..).for_each(|frame| pool.put(frame).unwrap());
        let came = receiver.receive(&mut pool, &mut frames, BURST);
        // Those that have come are there also if it fails.
        let count = frames.len() as u64;
        frames.drain(..).for_each(|frame| pool.put(frame).unwrap());
        if is_calm() {
            card.calm.fetch_add(count, Ordering::Relaxed);
        }
        let waited = if count == 0 { receiver.wait(Duration::from_millis(1)) } else { Ok(true) };
        if done.is_err() || came.is_err() || waited.is_err() {
            card.bring_back();
        }
    }
    // The card may still be one that is gone, or hangs.
    let buffers = pool.len() + receiver.outstanding() + transmitter.outstanding();
    assert_eq!(buffers, BUFFERS, "buffers are lost");
    let stopped = transmitter.stop(&mut pool).map(drop).and(receiver.stop(&mut pool));
    match stopped {
        Ok(()) => assert_eq!(pool.len(), BUFFERS, "buffers are lost"),
        Err(_) => card.bring_back(),
    }
}

#[test]
fn threads_that_share_a_failing_card_all_go_on() {
    (0..SEEDS).for_each(run);
}

fn run(seed: u64) {
    let (one, other) = Port::pair();
    let cards = [Shared::new(1, one, 2 * seed), Shared::new(2, other, 2 * seed + 1)];
    let pairs: Vec<_> = (0..2 * usize::from(QUEUES))
        .map(|thread| {
            let nic = &cards[thread % 2].nic;
            (thread % 2, nic.queue().unwrap(), nic.pool(BUFFERS).unwrap())
        })
        .collect();
    thread::scope(|scope| {
        for (me, queues, pool) in pairs {
            let cards = &cards;
            scope.spawn(move || work(cards, me, queues, pool));
        }
    });
    for card in cards {
        assert_eq!(card.faults.injected().len(), FAULTS);
        assert!(card.nic.generation() > 0);
        card.nic.close().unwrap();
    }
}
