//! The driver on models of the 82576, in this process.

#[cfg(feature = "smoltcp")]
mod fault_run;
#[cfg(feature = "smoltcp")]
mod faults;
mod hostile;
mod many_queues;
mod sharing;
#[cfg(feature = "smoltcp")]
mod stack;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Fault, Faults, Igb, Port};
use vfio_remap::{Device, ErrorKind};
use vfio_remap_ethernet::{Frame, Model, Nic, Pool, QueuePair, Settings};

const LONG: Duration = Duration::from_secs(60);
const BURST: usize = 32;
const BUFFERS: usize = 600;

/// A card of a pair.
struct End {
    nic: Arc<Nic>,
    queues: QueuePair,
    pool: Pool,
    sequence: u64,
    /// The number of the last frame that has come, and how many have.
    last: Option<u64>,
    received: u64,
}

impl End {
    fn new(number: u8, port: Port, faults: &Faults, settings: Settings) -> Self {
        let model = Igb::new([2, 0, 0, 0, 0, number]).with_wire(port).with_faults(faults);
        let device = Device::new(Arc::new(Emulated::new(model).unwrap()));
        let nic = Nic::new(device, settings).unwrap();
        assert_eq!((nic.model(), nic.address().0), (Model::I82576, [2, 0, 0, 0, 0, number]));
        let (queues, pool) = (nic.queue().unwrap(), nic.pool(BUFFERS).unwrap());
        Self { nic, queues, pool, sequence: 0, last: None, received: 0 }
    }

    /// Sends a burst with rising numbers to `to`, as far as there are buffers and room.
    fn send(&mut self, to: [u8; 6]) {
        self.queues.transmitter.reclaim(&mut self.pool);
        let mut frames = Vec::with_capacity(BURST);
        let mut bytes = [0; 60];
        bytes[..6].copy_from_slice(&to);
        bytes[6..12].copy_from_slice(&self.nic.address().0);
        bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
        while frames.len() < BURST.min(self.queues.transmitter.room()) {
            bytes[14..22].copy_from_slice(&self.sequence.to_be_bytes());
            let Some(frame) = self.pool.frame_of(&bytes) else { break };
            self.sequence += 1;
            frames.push(frame);
        }
        self.queues.transmitter.transmit(&mut frames, &mut self.pool).unwrap();
        frames.into_iter().for_each(|frame| self.pool.put(frame).unwrap());
    }

    /// Receives what has come: frames in order, none twice.
    fn receive(&mut self) {
        let mut frames: Vec<Frame> = Vec::with_capacity(BURST);
        self.queues.receiver.receive(&mut self.pool, &mut frames, BURST).unwrap();
        for frame in frames {
            let mut number = [0; 8];
            frame.read(14, &mut number);
            let number = u64::from_be_bytes(number);
            assert!(self.last.is_none_or(|last| last < number), "{number} after {:?}", self.last);
            self.last = Some(number);
            self.received += 1;
            self.pool.put(frame).unwrap();
        }
    }

    /// Sees that all buffers are back.
    fn stop(self) {
        let Self { nic, queues, mut pool, .. } = self;
        queues.transmitter.stop(&mut pool).unwrap();
        queues.receiver.stop(&mut pool).unwrap();
        assert_eq!(pool.len(), BUFFERS);
        drop(pool);
        nic.close().unwrap();
    }
}

/// Two cards that are joined, and send to each other until both have received `count`.
fn exchange(count: u64, faults: [&Faults; 2], settings: Settings) -> [End; 2] {
    let (one, other) = Port::pair();
    let mut ends = [End::new(1, one, faults[0], settings), End::new(2, other, faults[1], settings)];
    ends.iter().for_each(|end| _ = end.nic.wait_for_link(LONG).unwrap());
    let end = Instant::now() + LONG;
    let addresses = [ends[1].nic.address().0, ends[0].nic.address().0];
    while ends.iter().any(|end| end.received < count) {
        for (card, to) in ends.iter_mut().zip(addresses) {
            card.send(to);
            card.receive();
        }
        assert!(Instant::now() < end, "{:?}", ends.map(|end| (end.received, end.nic.statistics())));
    }
    ends
}

#[test]
fn two_cards_send_to_each_other() {
    let none = Faults::default();
    for interrupts in [false, true] {
        let settings = Settings::DEFAULT.with_interrupts(interrupts);
        let ends = exchange(5000, [&none, &none], settings);
        for end in &ends {
            let statistics = end.nic.statistics().unwrap();
            assert!(statistics.received >= end.received, "{statistics:?}");
            assert_eq!((statistics.crc_errors, end.nic.generation()), (0, 0));
        }
        ends.into_iter().for_each(End::stop);
    }
}

#[test]
fn each_fault_is_recovered_from() {
    let settings = Settings::DEFAULT.with_timeout(Duration::from_millis(100));
    for fault in Fault::ALL {
        if fault == Fault::Removal {
            continue;
        }
        let faults = Faults::new((1..=5).map(|at| (at * 700, fault)));
        let none = Faults::default();
        let ends = exchange(4000, [&faults, &none], settings);
        assert_eq!(faults.remaining(), 0, "{fault:?}: {:?}", faults.injected());
        ends.into_iter().for_each(End::stop);
    }
}

#[test]
fn a_card_that_is_removed_is_an_error_until_it_is_back() {
    let faults = Faults::new([(500, Fault::Removal)]);
    let (one, other) = Port::pair();
    let mut card = End::new(1, one, &faults, Settings::DEFAULT);
    card.nic.wait_for_link(LONG).unwrap();
    let to = [2, 0, 0, 0, 0, 2];
    while faults.remaining() > 0 {
        card.send(to);
        while other.receive().is_some() {}
    }
    let end = Instant::now() + LONG;
    let error = loop {
        let mut frames = Vec::new();
        match card.queues.receiver.receive(&mut card.pool, &mut frames, BURST) {
            Ok(_) => assert!(Instant::now() < end, "nobody has noticed"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    assert_eq!(card.nic.reset().unwrap_err().kind(), ErrorKind::Gone);
    faults.plug_in();
    card.nic.reset().unwrap();
    card.nic.wait_for_link(LONG).unwrap();
    let begin = card.nic.statistics().unwrap().sent;
    while card.nic.statistics().unwrap().sent < begin + 100 {
        card.send(to);
        while other.receive().is_some() {}
        assert!(Instant::now() < end);
    }
    card.stop();
}

#[test]
fn frames_that_had_come_before_a_reset_are_received() {
    const COUNT: u64 = 20;
    let (one, network) = Port::pair();
    let mut card = End::new(1, one, &Faults::default(), Settings::DEFAULT);
    card.nic.wait_for_link(LONG).unwrap();
    card.receive();
    let mut bytes = [0; 60];
    bytes[..6].copy_from_slice(&card.nic.address().0);
    for number in 0..COUNT {
        bytes[14..22].copy_from_slice(&number.to_be_bytes());
        network.send(&bytes);
    }
    let end = Instant::now() + LONG;
    while card.nic.statistics().unwrap().received < COUNT {
        assert!(Instant::now() < end);
    }
    card.nic.reset().unwrap();
    // A few at a time: what is left waits for the next.
    for _ in 0..COUNT / 5 {
        let mut frames = Vec::new();
        assert_eq!(card.queues.receiver.receive(&mut card.pool, &mut frames, 5).unwrap(), 5);
        frames.into_iter().for_each(|frame| card.pool.put(frame).unwrap());
    }
    // And it goes on.
    card.nic.wait_for_link(LONG).unwrap();
    card.receive();
    network.send(&bytes);
    while card.received == 0 {
        card.receive();
        assert!(Instant::now() < end);
    }
    card.stop();
}

/// A write to the tail costs more than a frame. A card that may wait for buffers is told of them at once.
#[test]
fn a_card_is_told_of_a_quarter_of_the_ring_at_a_time() {
    const TAIL: u64 = 0x18;
    let (port, network) = Port::pair();
    let settings = Settings::DEFAULT.with_receive_entries(64);
    let mut card = End::new(1, port, &Faults::default(), settings);
    card.nic.wait_for_link(LONG).unwrap();
    card.receive();
    let tail = card.nic.device().bar(0).unwrap();
    let tail = tail.trapped_register::<u32>(card.queues.receiver.registers().start + TAIL).unwrap();
    let mut bytes = [0; 60];
    bytes[..6].copy_from_slice(&card.nic.address().0);
    let mut sent = 0;
    let mut send = |count: u64, nic: &Nic| {
        (0..count).for_each(|_| network.send(&bytes));
        sent += count;
        let end = Instant::now() + LONG;
        while nic.statistics().unwrap().received < sent {
            assert!(Instant::now() < end);
        }
    };
    let mut receive = |limit, count| {
        let mut frames = Vec::new();
        let received = card.queues.receiver.receive(&mut card.pool, &mut frames, limit).unwrap();
        assert_eq!(received, count);
        frames.into_iter().for_each(|frame| card.pool.put(frame).unwrap());
        tail.read().unwrap()
    };
    send(45, &card.nic);
    assert_eq!(receive(15, 15), 63, "fifteen are less than a quarter");
    assert_eq!(receive(15, 15), 63 + 30 - 64);
    assert_eq!(receive(15, 15), 63 + 30 - 64);
    assert_eq!(receive(15, 0), 63 + 45 - 64, "nothing has come");
    drop(tail);
    card.stop();
}

#[test]
fn a_card_that_others_have_reset_is_set_up_for_a_new_queue() {
    let (port, network) = Port::pair();
    let End { nic, queues, mut pool, .. } =
        End::new(1, port, &Faults::default(), Settings::DEFAULT);
    nic.wait_for_link(LONG).unwrap();
    assert!(nic.device().reset().unwrap().is_over());
    // Nobody looks at these queues any more.
    queues.transmitter.stop(&mut pool).unwrap();
    queues.receiver.stop(&mut pool).unwrap();
    let queues = nic.queue().unwrap();
    nic.wait_for_link(LONG).unwrap();
    let mut card = End { nic, queues, pool, sequence: 0, last: None, received: 0 };
    card.send([0xff; 6]);
    let end = Instant::now() + LONG;
    while network.receive().is_none() {
        assert!(Instant::now() < end);
    }
    card.stop();
}

/// Programs poll a million times a second, or come by a hundred times: they notice either way.
#[test]
fn a_program_that_seldom_looks_notices_what_is_wrong() {
    const LOOKS: u32 = 1000;
    let seldom = || std::thread::sleep(Duration::from_millis(2));
    let faults = Faults::new([(0, Fault::StuckRing)]);
    let (port, _network) = Port::pair();
    let settings = Settings::DEFAULT.with_timeout(Duration::from_millis(100));
    let mut card = End::new(1, port, &faults, settings);
    card.nic.wait_for_link(LONG).unwrap();
    card.send([0xff; 6]);
    for generation in 0..2 {
        let mut looks = 0;
        while card.nic.generation() == generation {
            assert!(looks < LOOKS, "not after {looks} looks");
            looks += 1;
            seldom();
            match generation {
                // The ring is stuck.
                0 => _ = card.queues.transmitter.reclaim(&mut card.pool),
                _ => card.receive(),
            }
        }
        if generation == 0 {
            card.receive();
            assert!(card.nic.device().reset().unwrap().is_over());
        }
    }
    card.stop();
}

#[test]
fn memory_of_a_queue_that_cannot_be_stopped_is_kept() {
    let faults = Faults::new([(0, Fault::Removal)]);
    let (port, _network) = Port::pair();
    let End { nic, mut queues, mut pool, .. } = End::new(1, port, &faults, Settings::DEFAULT);
    nic.wait_for_link(LONG).unwrap();
    let all = BTreeSet::from_iter(addresses(&mut pool));
    // The card has buffers, and is removed as it sends.
    queues.receiver.receive(&mut pool, &mut Vec::new(), BURST).unwrap();
    let mut frames = vec![pool.frame_of(&[0xff; 60]).unwrap()];
    queues.transmitter.transmit(&mut frames, &mut pool).unwrap();
    let end = Instant::now() + LONG;
    while faults.remaining() > 0 {
        assert!(Instant::now() < end);
    }
    queues.transmitter.stop(&mut pool).unwrap_err();
    queues.receiver.stop(&mut pool).unwrap_err();
    let theirs: BTreeSet<_> = &all - &BTreeSet::from_iter(addresses(&mut pool));
    assert_eq!(theirs.len(), usize::from(Settings::DEFAULT.receive_entries));
    assert_eq!(nic.queue().unwrap_err().kind(), ErrorKind::InUse);
    // Nobody else gets it, as long as the card is not known to be quiet.
    drop(pool);
    let mut others = nic.pool(4 * BUFFERS).unwrap();
    assert!(addresses(&mut others).iter().all(|address| !theirs.contains(address)));
    drop(others);
    faults.plug_in();
    nic.reset().unwrap();
    let mut others = nic.pool(4 * BUFFERS).unwrap();
    assert!(addresses(&mut others).iter().any(|address| theirs.contains(address)));
    let card = End {
        queues: nic.queue().unwrap(),
        pool: nic.pool(BUFFERS).unwrap(),
        nic,
        sequence: 0,
        last: None,
        received: 0,
    };
    drop(others);
    card.stop();
}

/// Of the buffers that are in a pool.
fn addresses(pool: &mut Pool) -> Vec<u64> {
    let frames: Vec<_> = std::iter::from_fn(|| pool.frame(0)).collect();
    let addresses = frames.iter().map(|frame| frame.buffer().iova().0).collect();
    frames.into_iter().for_each(|frame| pool.put(frame).unwrap());
    addresses
}
