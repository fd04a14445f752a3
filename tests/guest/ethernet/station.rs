//! A card whose other end is QEMU's user network: a gateway at 10.0.2.2 that answers ARP and pings.

use std::sync::Arc;
use std::time::Instant;

use vfio_remap_ethernet::{Frame, MacAddress, Nic, Pool, QueuePair, Settings};

use super::{BURST, LONG, bring_up};

const US: [u8; 4] = [10, 0, 2, 15];
pub const GATEWAY: [u8; 4] = [10, 0, 2, 2];
pub const BUFFERS: usize = 600;

/// A frame of a protocol that follows the header.
pub fn ethernet(to: MacAddress, from: MacAddress, protocol: u16, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &protocol.to_be_bytes(), payload].concat()
}

/// Who has `address`?
pub fn arp_request(from: MacAddress, address: [u8; 4]) -> Vec<u8> {
    let payload = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &from.0, &US, &[0; 6], &address].concat();
    ethernet(MacAddress::BROADCAST, from, 0x0806, &payload)
}

/// Whose address it is that was asked for.
pub fn arp_reply(frame: &[u8], address: [u8; 4]) -> Option<MacAddress> {
    let is_reply = frame.get(12..14)? == [8, 6] && frame.get(20..22)? == [0, 2];
    let answered = is_reply && frame.get(28..32)? == address;
    answered.then(|| MacAddress(frame[22..28].try_into().unwrap()))
}

fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|word| u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
    let sum: u32 = words.map(u32::from).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

/// An echo request (RFC 792) for the gateway.
pub fn ping(to: MacAddress, from: MacAddress, sequence: u16, data: &[u8]) -> Vec<u8> {
    let mut echo = [&[8, 0, 0, 0, 0x12, 0x34][..], &sequence.to_be_bytes(), data].concat();
    let sum = checksum(&echo);
    echo[2..4].copy_from_slice(&sum.to_be_bytes());
    let length = (20 + echo.len() as u16).to_be_bytes();
    let mut header =
        [&[0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, 1, 0, 0][..], &US, &GATEWAY].concat();
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    ethernet(to, from, 0x0800, &[header, echo].concat())
}

/// The data of the answer to an echo request.
pub fn pong(frame: &[u8], sequence: u16) -> Option<&[u8]> {
    let is_echo =
        frame.get(12..14)? == [8, 0] && frame.get(23) == Some(&1) && frame.get(34) == Some(&0);
    let length = usize::from(u16::from_be_bytes(frame.get(16..18)?.try_into().unwrap()));
    (is_echo && frame.get(40..42)? == sequence.to_be_bytes()).then(|| frame.get(42..14 + length))?
}

/// A card with one pair of queues, and its buffers.
pub struct Station {
    pub nic: Arc<Nic>,
    pub queues: QueuePair,
    pub pool: Pool,
    pub frames: Vec<Frame>,
}

impl Station {
    pub fn new(name: &str, settings: Settings) -> Self {
        let nic = bring_up(name, settings);
        let pool = nic.pool(BUFFERS).unwrap();
        let queues = nic.queue().unwrap();
        Self { nic, queues, pool, frames: Vec::with_capacity(BURST) }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.queues.transmitter.reclaim(&mut self.pool);
        let mut frames = vec![self.pool.frame_of(bytes).expect("there is a buffer")];
        assert_eq!(self.queues.transmitter.transmit(&mut frames, &mut self.pool).unwrap(), 1);
    }

    /// Receives until `find` has found what it looks for.
    pub fn receive<T>(&mut self, what: &str, mut find: impl FnMut(&[u8]) -> Option<T>) -> T {
        let end = Instant::now() + LONG;
        loop {
            self.queues.receiver.receive(&mut self.pool, &mut self.frames, BURST).unwrap();
            for frame in std::mem::take(&mut self.frames) {
                let found = find(&frame.to_vec());
                self.pool.put(frame).unwrap();
                if let Some(found) = found {
                    return found;
                }
            }
            assert!(Instant::now() < end, "no {what}: {:?}", self.nic.statistics());
            std::thread::yield_now();
        }
    }

    pub fn gateway(&mut self) -> MacAddress {
        // The card gets buffers before there is something to receive.
        self.queues.receiver.receive(&mut self.pool, &mut self.frames, BURST).unwrap();
        self.send(&arp_request(self.nic.address(), GATEWAY));
        self.receive("answer to ARP", |frame| arp_reply(frame, GATEWAY))
    }

    /// Sees that all buffers are back, and that nothing is left of the card.
    pub fn stop(self) {
        let Self { nic, queues: QueuePair { receiver, transmitter, .. }, mut pool, .. } = self;
        assert_eq!(transmitter.stop(&mut pool).unwrap(), 0);
        receiver.stop(&mut pool).unwrap();
        assert_eq!(pool.len(), BUFFERS);
        drop(pool);
        nic.close().unwrap();
    }
}
