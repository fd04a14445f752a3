//! A card that hears itself: its transmitter is led to its receiver.

use std::sync::Arc;
use std::time::Instant;

use vfio_remap_ethernet::{Checksum, Frame, Nic, Pool, QueuePair, Settings};

use super::{BURST, LONG, bring_up};

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// A frame that comes last, for its protocol: one of those for experiments (IEEE 802a).
const LAST: [u8; 2] = [0x88, 0xb6];

/// A card that hears itself.
pub struct Loop {
    pub nic: Arc<Nic>,
    pub pairs: Vec<QueuePair>,
    pub pool: Pool,
}

impl Loop {
    pub fn new(name: &str, settings: Settings) -> Self {
        let nic = bring_up(name, settings);
        nic.set_loopback(true).unwrap();
        let mut pool = nic.pool(300 + 300 * usize::from(settings.queues)).unwrap();
        let mut pairs: Vec<_> = (0..settings.queues).map(|_| nic.queue().unwrap()).collect();
        for pair in &mut pairs {
            assert_eq!(pair.receiver.receive(&mut pool, &mut Vec::new(), BURST).unwrap(), 0);
        }
        Self { nic, pairs, pool }
    }

    pub fn frame(&mut self, bytes: &[u8]) -> Frame {
        self.pool.frame_of(bytes).expect("there is a buffer")
    }

    pub fn send(&mut self, mut frames: Vec<Frame>) {
        let transmitter = &mut self.pairs[0].transmitter;
        let end = Instant::now() + LONG;
        while !frames.is_empty() {
            transmitter.transmit(&mut frames, &mut self.pool).unwrap();
            transmitter.reclaim(&mut self.pool);
            assert!(Instant::now() < end);
        }
    }

    /// Sends frames, and receives from any queue until the last has come: its number, and all before it.
    pub fn exchange(&mut self, frames: Vec<Frame>) -> Vec<(u16, Received)> {
        self.send(frames);
        let last = self.ethernet(LAST, &[0; 46]);
        let last = self.frame(&last);
        self.send(vec![last]);
        let mut found = Vec::new();
        let end = Instant::now() + LONG;
        // Other queues have what came before it.
        let mut is_over = false;
        loop {
            let before = found.len();
            for pair in &mut self.pairs {
                let mut frames = Vec::with_capacity(BURST);
                pair.receiver.receive(&mut self.pool, &mut frames, BURST).unwrap();
                for frame in frames {
                    let received = Received {
                        bytes: frame.to_vec(),
                        vlan: frame.vlan(),
                        hash: frame.hash(),
                        ip: frame.checksums().ip,
                        transport: frame.checksums().transport,
                    };
                    self.pool.put(frame).unwrap();
                    found.push((pair.receiver.queue(), received));
                }
            }
            if let Some(at) = found.iter().position(|(_, frame)| frame.bytes[12..14] == LAST) {
                found.remove(at);
                is_over = true;
            } else if is_over && found.len() == before {
                return found;
            }
            assert!(Instant::now() < end, "{:?}", self.nic.statistics());
        }
    }

    pub fn exchange_one(&mut self, frame: Frame) -> Received {
        let mut found = self.exchange(vec![frame]);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0).1
    }

    /// A frame to itself.
    pub fn ethernet(&self, protocol: [u8; 2], payload: &[u8]) -> Vec<u8> {
        let us = self.nic.address().0;
        [&us[..], &us, &protocol, payload].concat()
    }

    pub fn stop(mut self) {
        for pair in self.pairs {
            assert_eq!(pair.transmitter.stop(&mut self.pool).unwrap(), 0);
            pair.receiver.stop(&mut self.pool).unwrap();
        }
        drop(self.pool);
        self.nic.close().unwrap();
    }
}

#[derive(Debug)]
pub struct Received {
    pub bytes: Vec<u8>,
    pub vlan: Option<u16>,
    pub hash: Option<u32>,
    pub ip: Checksum,
    pub transport: Checksum,
}
