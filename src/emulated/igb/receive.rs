//! Receive queues (82576 datasheet §7.1).

use super::fault::Fate;
use super::filter::{self, Match};
use super::interrupt;
use super::offload::MIN_FRAME;
use super::packet::{self, Headers, Network, UDP};
use super::registers::{
    CTRL, CTRL_VLAN, RCTL, RCTL_ENABLE, RCTL_STRIP_CRC, RXCSUM, RXCSUM_HASH, RXCSUM_IP,
    RXCSUM_TRANSPORT, VET,
};
use super::ring::{Descriptors, QUEUES};
use super::rss::Flow;
use super::statistics::{CRC_ERRORS, MISSED, NO_BUFFERS, OVERSIZED};
use super::wire::{MAX_FRAME, MAX_FRAMES};
use super::{Budget, Igb};
use crate::emulated::Bus;
use crate::error::Result;

/// SRRCTL: the buffer's size in KiB, how descriptors look, and whether a frame without one is dropped.
const BUFFER_SIZE: u32 = 0x7f;
const DESCRIPTOR_TYPE: u32 = 7 << 25;
const THRESHOLD_SHIFT: u32 = 20;
const DROP: u32 = 1 << 31;
/// The sizes that RCTL knows.
const BUFFER_SIZES: [usize; 4] = [2048, 1024, 512, 256];

const DONE: u32 = 1;
const END_OF_PACKET: u32 = 1 << 1;
const IGNORE_SUM: u32 = 1 << 2;
const TAGGED: u32 = 1 << 3;
const UDP_SUM: u32 = 1 << 4;
const TRANSPORT_SUM: u32 = 1 << 5;
const NETWORK_SUM: u32 = 1 << 6;
const INEXACT: u32 = 1 << 7;
const TRANSPORT_ERROR: u32 = 1 << 29;
const NETWORK_ERROR: u32 = 1 << 30;

const THRESHOLD: u32 = 1 << 4;

/// The descriptors of each queue in one turn.
type Rings = [Option<Descriptors>; QUEUES];

/// A received frame's part of its descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arrival {
    flow: Flow,
    /// How long it was on the wire, without its check sequence.
    len: usize,
    packet_type: u16,
    /// Of an advanced descriptor: identification and checksum, if there is no hash.
    network_id: u16,
    sum: u16,
    status: u32,
    tag: u16,
    /// It waits for buffers.
    waits: bool,
}

impl Igb {
    /// Receives frames within the budget. Returns whether there were any.
    pub(super) fn receive(&mut self, bus: &Bus, budget: &mut Budget) -> bool {
        let mut rings: Rings = Default::default();
        let mut touched = 0u32;
        let mut any = false;
        while !budget.is_spent() {
            let arrival = match self.held.take() {
                Some(arrival) => arrival,
                None => {
                    let Some(usable) = self.next_frame() else { break };
                    any = true;
                    budget.spend(self.frame.len());
                    let arrival = if usable { self.admit(bus) } else { None };
                    let Some(arrival) = arrival else { continue };
                    arrival
                }
            };
            match self.deliver(bus, &arrival, &mut rings) {
                Ok(Delivery::Done) => {
                    any = true;
                    touched |= 1 << arrival.flow.queue;
                }
                Ok(Delivery::Dropped) => {
                    self.statistics.count(MISSED);
                    self.interrupts.causes |= interrupt::MISSED;
                }
                Ok(Delivery::NoBuffers) => {
                    self.hold(arrival);
                    break;
                }
                Err(error) => {
                    log::debug!("igb: a receive queue cannot be read: {error}");
                    self.hold(arrival);
                    break;
                }
            }
        }
        for queue in (0..QUEUES).filter(|queue| touched & 1 << queue != 0) {
            self.interrupts.raise_queue(&self.registers, queue, false);
        }
        any
    }

    /// Keeps the frame until there are buffers for it. Later frames wait behind it.
    fn hold(&mut self, arrival: Arrival) {
        if !arrival.waits {
            self.statistics.count(NO_BUFFERS);
        }
        self.held = Some(Arrival { waits: true, ..arrival });
    }

    /// Takes the next frame: one that was looped back, or one from the wire. Returns whether it can be
    /// received, which needs a link, and no loopback if it is from the wire.
    fn next_frame(&mut self) -> Option<bool> {
        if let Some(frame) = self.looped.pop_front() {
            self.frame = frame;
            return Some(true);
        }
        let received = self.wire.receive(&mut self.frame);
        received.then_some(self.link && !self.is_looped())
    }

    /// Discards the frames that came while the receiver was disabled.
    pub(super) fn lose_frames(&mut self) {
        for _ in 0..MAX_FRAMES {
            if !self.wire.receive(&mut self.frame) {
                return;
            }
        }
    }

    /// Filters the frame, chooses its queue, and checks it.
    fn admit(&mut self, bus: &Bus) -> Option<Arrival> {
        let registers = &self.registers;
        if !registers.has(RCTL, RCTL_ENABLE) || self.frame.len() > MAX_FRAME {
            return None;
        }
        if self.frame.len() < MIN_FRAME {
            self.frame.resize(MIN_FRAME, 0);
        }
        self.statistics.arrived(&self.frame);
        if filter::is_oversized(registers, &self.frame) {
            self.statistics.count(OVERSIZED);
            return None;
        }
        let found = filter::admit(registers, &self.frame)?;
        if !self.survives(bus) {
            return None;
        }
        let registers = &self.registers;
        let vlan = registers.get(VET) as u16;
        let headers = Headers::parse(&self.frame, vlan);
        let flow = Flow::of(registers, &self.frame, &headers);
        let mut arrival = Arrival {
            flow,
            len: self.frame.len(),
            packet_type: headers.packet_type(),
            status: DONE | END_OF_PACKET | self.checks(&headers),
            ..Arrival::default()
        };
        if found == Match::Inexact {
            arrival.status |= INEXACT;
        }
        if !registers.has(RXCSUM, RXCSUM_HASH) {
            let start = (registers.get(RXCSUM) & 0xff) as usize;
            arrival.sum = packet::fold(packet::sum(self.frame.get(start..).unwrap_or(&[])));
            if let Some((Network::V4, at)) = headers.network {
                let id = self.frame.get(at + 4..at + 6).map(|id| [id[0], id[1]]);
                arrival.network_id = u16::from_be_bytes(id.unwrap_or_default());
            }
        }
        if registers.has(CTRL, CTRL_VLAN)
            && let Some(tag) = packet::tag(&self.frame, vlan)
        {
            arrival.tag = tag;
            arrival.status |= TAGGED;
            self.frame.drain(12..16);
        }
        if !registers.has(RCTL, RCTL_STRIP_CRC) {
            let sequence = packet::check_sequence(&self.frame);
            self.frame.extend_from_slice(&sequence);
        }
        Some(arrival)
    }

    /// Injects the frame's fault, if any. Returns whether the frame remains.
    fn survives(&mut self, bus: &Bus) -> bool {
        match self.inject(bus, false) {
            Fate::Whole | Fate::Stuck => return true,
            Fate::Corrupt => {
                let mut frame = std::mem::take(&mut self.frame);
                let corrupt = self.corrupt(&mut frame);
                self.frame = frame;
                if corrupt {
                    return true;
                }
            }
            Fate::Lost => {}
            Fate::Stopped => return false,
        }
        self.statistics.count(CRC_ERRORS);
        false
    }

    /// The checksum bits of a descriptor's status.
    fn checks(&self, headers: &Headers) -> u32 {
        let mut status = 0;
        let wanted = self.registers.get(RXCSUM);
        let network = headers.check_network(&self.frame).filter(|_| wanted & RXCSUM_IP != 0);
        if let Some(right) = network {
            status |= NETWORK_SUM | if right { 0 } else { NETWORK_ERROR };
        }
        let transport = headers.check_transport(&self.frame);
        if let Some(right) = transport.filter(|_| wanted & RXCSUM_TRANSPORT != 0) {
            let is_udp = headers.transport.is_some_and(|(protocol, _)| protocol == UDP);
            status |= TRANSPORT_SUM | if right { 0 } else { TRANSPORT_ERROR };
            status |= if is_udp { UDP_SUM } else { 0 };
        }
        status
    }

    /// Writes the frame to buffers of its queue.
    fn deliver(&mut self, bus: &Bus, arrival: &Arrival, rings: &mut Rings) -> Result<Delivery> {
        let ring = self.receivers.get(arrival.flow.queue);
        let Some(ring) = ring.filter(|ring| ring.is_enabled()) else {
            return Ok(Delivery::Dropped);
        };
        let split = ring.split();
        let size = match (split & BUFFER_SIZE) as usize * 1024 {
            0 => BUFFER_SIZES[(self.registers.get(RCTL) >> 16 & 3) as usize],
            size => size,
        };
        let needed = self.frame.len().div_ceil(size) as u32;
        let descriptors = &mut rings[arrival.flow.queue];
        if descriptors.as_ref().is_none_or(|descriptors| descriptors.ready() < needed) {
            *descriptors = ring.descriptors();
        }
        let enough = descriptors.as_mut().filter(|descriptors| descriptors.ready() >= needed);
        let Some(descriptors) = enough else {
            let too_long =
                ring.descriptors().is_some_and(|descriptors| needed >= descriptors.count);
            let dropped = split & DROP != 0 || too_long;
            return Ok(if dropped { Delivery::Dropped } else { Delivery::NoBuffers });
        };
        let legacy = split & DESCRIPTOR_TYPE == 0;
        let hashed = self.registers.has(RXCSUM, RXCSUM_HASH);
        for (part, index) in self.frame.chunks(size).zip(1..) {
            let [low, high, ..] = descriptors.next(bus)?;
            let buffer = u64::from(low) | u64::from(high) << 32;
            let last = index == needed;
            let words = if legacy {
                arrival.legacy([low, high], part.len(), last)
            } else {
                arrival.advanced(part.len(), last, hashed)
            };
            // These are posted writes: the device does not learn of a failure.
            let written = bus.dma_write(buffer, part);
            let written =
                written.and_then(|()| write_back(bus, descriptors.address(), words, legacy));
            if let Err(error) = written {
                log::debug!("igb: a frame cannot be written: {error}");
            }
            descriptors.advance();
        }
        if ring.is_enabled() {
            ring.set_head(descriptors.head);
        }
        let threshold = (split >> THRESHOLD_SHIFT & 0x1f) * 16;
        if threshold != 0 && descriptors.ready() <= threshold {
            self.interrupts.causes |= THRESHOLD;
        }
        self.statistics.received(&self.frame, arrival.len);
        Ok(Delivery::Done)
    }
}

/// How a delivery ended.
enum Delivery {
    Done,
    Dropped,
    NoBuffers,
}

impl Arrival {
    fn advanced(&self, len: usize, last: bool, hashed: bool) -> [u32; 4] {
        if !last {
            return [0, 0, DONE, len as u32];
        }
        let kind = u32::from(self.flow.kind) | u32::from(self.packet_type) << 4;
        let second = if hashed {
            self.flow.hash
        } else {
            u32::from(self.network_id) | u32::from(self.sum) << 16
        };
        [kind, second, self.status, len as u32 | u32::from(self.tag) << 16]
    }

    fn legacy(&self, [low, high]: [u32; 2], len: usize, last: bool) -> [u32; 4] {
        if !last {
            return [low, high, len as u32, DONE];
        }
        let checked = self.status & (NETWORK_SUM | TRANSPORT_SUM) != 0;
        let status = self.status & 0xff | if checked { 0 } else { IGNORE_SUM };
        let errors = self.status >> 24;
        let last = status | errors << 8 | u32::from(self.tag) << 16;
        [low, high, len as u32 | u32::from(self.sum) << 16, last]
    }
}

/// Writes a descriptor, and then its status with the done bit.
fn write_back(bus: &Bus, at: u64, words: [u32; 4], legacy: bool) -> Result<()> {
    let status = if legacy { 3 } else { 2 };
    let mut first = words;
    first[status] &= !DONE;
    bus.dma_write(at, first.map(u32::to_le_bytes).as_flattened())?;
    bus.dma_write(at.wrapping_add(4 * status as u64), &words[status].to_le_bytes())
}
