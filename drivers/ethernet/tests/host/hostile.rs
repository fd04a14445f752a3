//! A device that writes what it likes into rings, and a peer that sends noise.
//!
//! The device is a model of the card, and another one in its address space, which writes wherever it is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use vfio_remap::emulated::igb::{Faults, Igb, Port, Wire};
use vfio_remap::emulated::{Bus, Emulated, Model, Shape};
use vfio_remap::transport::{RegionInfo, Transport};
use vfio_remap::{Device, ErrorKind, Result};
use vfio_remap_ethernet::{Frame, Nic, Settings};

use super::{BUFFERS, BURST, End, LONG};

/// Registers of the first queues: where they begin, and the address of the ring in them.
const RECEIVE: u64 = 0xc000;
const TRANSMIT: u64 = 0xe000;
const ENTRIES: u16 = 32;
const SETTINGS: Settings =
    Settings::DEFAULT.with_receive_entries(ENTRIES).with_transmit_entries(ENTRIES);
/// A descriptor is done; it ends a packet.
const DONE: u64 = 1;
const END: u64 = 1 << 1;
const SENT: u64 = 1 << 32;

/// Writes to memory what is written to its register: an address, and bytes.
struct Scribbler;

impl Model for Scribbler {
    fn shape(&self) -> Shape {
        Shape::new("scribbler", vec![RegionInfo::trapped(0x1000)])
    }

    fn read(&mut self, _: &Bus, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, bus: &Bus, _: u32, _: u64, data: &[u8]) -> Result<()> {
        let (address, bytes) = data.split_first_chunk().unwrap();
        bus.dma_write(u64::from_le_bytes(*address), bytes)
    }

    fn reset(&mut self, _: &Bus) {}
}

/// A card that does what the test says, beside what it does by itself.
struct Card {
    end: End,
    scribbler: Emulated,
    network: Port,
}

impl Card {
    fn new() -> Self {
        let (port, network) = Port::pair();
        let model = Igb::new([2, 0, 0, 0, 0, 1]).with_wire(port).with_faults(&Faults::default());
        let model = Emulated::new(model).unwrap();
        let scribbler = model.polled_beside(Scribbler).unwrap();
        let nic = Nic::new(Device::new(Arc::new(model)), SETTINGS).unwrap();
        nic.wait_for_link(LONG).unwrap();
        let (queues, pool) = (nic.queue().unwrap(), nic.pool(BUFFERS).unwrap());
        let mut end = End { nic, queues, pool, sequence: 0, last: None, received: 0 };
        end.receive();
        Self { end, scribbler, network }
    }

    /// Writes a word of a descriptor.
    fn scribble(&self, ring: u64, index: u16, word: u64, value: u64) {
        let bar = self.end.nic.device().bar(0).unwrap();
        let [low, high] = [0, 4].map(|at| {
            let register = bar.trapped_register::<u32>(ring + at).unwrap();
            u64::from(register.read().unwrap())
        });
        let address = (high << 32 | low) + 16 * u64::from(index % ENTRIES) + 8 * word;
        let bytes = [address, value].map(u64::to_le_bytes);
        self.scribbler.write_at(0, 0, bytes.as_flattened()).unwrap();
    }

    /// What the driver makes of it: frames that lie in their buffers.
    fn receive(&mut self) -> usize {
        let mut frames: Vec<Frame> = Vec::with_capacity(BURST);
        let End { queues, pool, .. } = &mut self.end;
        let count = queues.receiver.receive(pool, &mut frames, BURST).unwrap();
        assert_eq!(count, frames.len());
        for frame in frames {
            assert!((1..=pool.buffer_size()).contains(&frame.len()), "{}", frame.len());
            assert_eq!(frame.to_vec().len(), frame.len());
            pool.put(frame).unwrap();
        }
        count
    }

    /// All is well again after a reset: frames come and go, and all buffers are back.
    fn recovers(mut self) {
        self.end.nic.reset().unwrap();
        self.end.nic.wait_for_link(LONG).unwrap();
        // What the device has claimed before is received first.
        while self.receive() > 0 {}
        while self.network.receive().is_some() {}
        let mut bytes = [0; 60];
        bytes[..6].copy_from_slice(&self.end.nic.address().0);
        self.network.send(&bytes);
        let end = Instant::now() + LONG;
        while self.receive() == 0 {
            assert!(Instant::now() < end, "nothing comes");
        }
        while self.network.receive().is_none() {
            self.end.send([0xff; 6]);
            assert!(Instant::now() < end, "nothing goes");
        }
        self.end.stop();
    }
}

#[test]
fn lengths_that_a_device_claims_stay_within_the_buffer() {
    let mut card = Card::new();
    let size = card.end.pool.buffer_size() as u64;
    let lengths = [0, 1, 60, size, size + 1, 0x7fff, 0xffff];
    let flags = [DONE, DONE | END, DONE | END | 1 << 31, u64::from(u32::MAX)];
    let mut index = 0;
    let (mut whole, mut dropped) = (0, 0);
    for len in lengths {
        for flags in flags {
            // Ends a packet that goes on, which is dropped.
            for status in [len << 32 | flags, 1 << 32 | DONE | END] {
                card.scribble(RECEIVE, index, 1, status);
                index += 1;
                let came = card.receive();
                whole += came;
                dropped += 1 - came;
            }
        }
    }
    // Of each length that fits, one packet is whole, and so are those that end another packet, but after the one
    // that goes on.
    assert_eq!((whole, dropped), (3 + 3 * lengths.len(), 56 - 3 - 3 * lengths.len()));
    card.recovers();
}

#[test]
fn a_ring_that_claims_everything_done_gives_each_buffer_once() {
    let mut card = Card::new();
    // Also descriptors that the driver has given nothing in.
    for round in 0..4 {
        for index in 0..ENTRIES {
            card.scribble(RECEIVE, index, 1, 60 << 32 | END | DONE);
        }
        let came = card.receive();
        assert!(came < usize::from(ENTRIES), "{came} in round {round}");
        for index in 0..ENTRIES {
            card.scribble(TRANSMIT, index, 1, SENT);
        }
        card.end.send([0xff; 6]);
        for index in 0..ENTRIES {
            card.scribble(TRANSMIT, index, 1, SENT);
        }
        let outstanding = card.end.queues.transmitter.outstanding();
        let back = card.end.queues.transmitter.reclaim(&mut card.end.pool);
        assert!(back <= outstanding, "{back} of {outstanding}");
        assert_eq!(card.end.queues.transmitter.outstanding(), outstanding - back);
    }
    card.recovers();
}

#[test]
fn noise_in_the_rings_is_survived() {
    let mut card = Card::new();
    let mut random = 0x5eed;
    let mut random = move || {
        // xorshift64* (Vigna 2014).
        random ^= random >> 12;
        random ^= random << 25;
        random ^= random >> 27;
        u64::wrapping_mul(random, 0x2545_f491_4f6c_dd1d)
    };
    for _ in 0..2000 {
        for ring in [RECEIVE, TRANSMIT] {
            let (place, value) = (random(), random());
            card.scribble(ring, (place >> 32) as u16, place & 1, value);
        }
        card.receive();
        card.end.send([0xff; 6]);
        assert!(card.end.queues.transmitter.outstanding() < usize::from(ENTRIES));
        assert!(card.end.queues.receiver.outstanding() < usize::from(ENTRIES));
    }
    card.recovers();
}

/// A wire by which frames of noise come, of all lengths up to 16 KiB, for the card and for others.
struct Noise {
    next: Arc<AtomicU64>,
    stops: Arc<AtomicBool>,
    wire: Port,
}

const LONGEST_NOISE: u64 = 16 << 10;
const FRAMES: u64 = 8000;

impl Wire for Noise {
    fn send(&mut self, frame: &[u8]) {
        self.wire.send(frame);
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        if self.stops.load(Ordering::Relaxed) {
            return Wire::receive(&mut self.wire, frame);
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // Short and long ones by turns.
        let len = number * 5003 % (LONGEST_NOISE + 1);
        let word = |at: u64| (number << 20 ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        frame.clear();
        frame.extend((0..=len / 8).flat_map(word));
        frame.truncate(len as usize);
        if number & 1 == 0 && len >= 34 {
            frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
            // IPv4 or IPv6, with headers that claim anything.
            frame[12..15]
                .copy_from_slice(&[[8, 0, 0x45], [0x86, 0xdd, 0x60]][number as usize / 2 % 2]);
            frame[23] = [6, 17, 1, 44][number as usize / 4 % 4];
        }
        true
    }
}

#[test]
fn noise_of_a_peer_does_not_disturb() {
    for mtu in [1500, 9000] {
        let (wire, network) = Port::pair();
        let (next, stops) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let noise = Noise { next: next.clone(), stops: stops.clone(), wire };
        let model = Emulated::new(Igb::new([2, 0, 0, 0, 0, 1]).with_wire(noise)).unwrap();
        let nic = Nic::new(Device::new(Arc::new(model)), SETTINGS.with_mtu(mtu)).unwrap();
        nic.set_promiscuous(true).unwrap();
        let (queues, pool) = (nic.queue().unwrap(), nic.pool(BUFFERS).unwrap());
        let longest = nic.longest_frame();
        let end = End { nic, queues, pool, sequence: 0, last: None, received: 0 };
        let mut card = Card { end, scribbler: Emulated::polled(Scribbler).unwrap(), network };
        let end = Instant::now() + LONG;
        let mut frames: Vec<Frame> = Vec::with_capacity(BURST);
        let (mut came, mut most) = (0, 0);
        while next.load(Ordering::Relaxed) < FRAMES {
            let End { queues, pool, .. } = &mut card.end;
            came += queues.receiver.receive(pool, &mut frames, BURST).unwrap();
            for frame in frames.drain(..) {
                most = most.max(frame.len());
                let _ = (frame.checksums(), frame.hash(), frame.vlan(), frame.to_vec());
                pool.put(frame).unwrap();
            }
            assert!(Instant::now() < end, "{next:?} frames were sent");
        }
        assert!(
            came > FRAMES as usize / 100 && most <= longest,
            "{came} frames of {most} bytes at most"
        );
        assert!(mtu == 1500 || most > 8000, "jumbo frames come, too: {most}");
        stops.store(true, Ordering::Relaxed);
        card.recovers();
    }
}

#[test]
fn a_packet_that_no_card_sends_is_refused() {
    let mut card = Card::new();
    let End { queues, pool, nic, .. } = &mut card.end;
    for len in [0, 1, 16, nic.longest_frame() + 1, pool.buffer_size()] {
        let mut frames: Vec<_> = pool.frame(len).into_iter().collect();
        let error = queues.transmitter.transmit(&mut frames, pool).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{len} bytes: {error}");
        pool.put(frames.remove(0)).unwrap();
    }
    card.recovers();
}
