//! Transmit queues (82576 datasheet §7.2).

use super::fault::Fate;
use super::interrupt;
use super::offload::{Context, Outgoing, Request};
use super::registers::{TCTL, TCTL_ENABLE, TCTL_PAD, VET};
use super::ring::{Descriptors, QUEUES, Ring};
use super::statistics::{SEGMENTED, SEGMENTED_FAILED};
use super::{Budget, Igb};
use crate::emulated::Bus;
use crate::error::Result;

/// The longest packet that is taken for segmentation, in bytes: its length has 18 bits.
const MAX_PACKET: usize = 1 << 18;
/// How many descriptors of one queue are taken in a turn.
const SHARE: usize = 32;
/// How many looped-back frames wait.
const MAX_LOOPED: usize = 64;

const EXTENDED: u32 = 1 << 29;
const TYPE: u32 = 0xf << 20;
const TYPE_CONTEXT: u32 = 2 << 20;
const TYPE_DATA: u32 = 3 << 20;
const END_OF_PACKET: u32 = 1 << 24;
const INSERT_SUM: u32 = 1 << 26;
const REPORT: u32 = 1 << 27;
const INSERT_TAG: u32 = 1 << 30;
const SEGMENT: u32 = 1 << 31;
const NETWORK_SUM: u32 = 1 << 8;
const TRANSPORT_SUM: u32 = 1 << 9;
const DONE: u32 = 1;

/// A transmit queue.
#[derive(Default)]
pub(super) struct Transmitter {
    pub(super) ring: Option<Ring>,
    contexts: [Context; 2],
    /// The data of the packet that is being read, and what is to be done to it.
    data: Vec<u8>,
    request: Option<Request>,
    /// The packet cannot be sent.
    bad: bool,
    /// The packet whose frames are being sent, and how they fare.
    outgoing: Option<Outgoing>,
    fate: Fate,
    /// The head at which it is stuck.
    stuck: Option<u32>,
}

impl Transmitter {
    /// Discards the packet that was begun, and the contexts.
    pub(super) fn reset(&mut self) {
        self.contexts = Default::default();
        self.abandon();
        self.outgoing = None;
        self.fate = Fate::Whole;
        self.stuck = None;
    }

    /// Whether the queue is stuck. It is not once the driver has written the head.
    fn is_stuck(&mut self, head: u32) -> bool {
        let Some(stuck) = self.stuck else { return false };
        if stuck != head {
            self.reset();
        }
        stuck == head
    }

    fn abandon(&mut self) {
        self.data.clear();
        self.request = None;
        self.bad = false;
    }

    /// Takes a descriptor: a context, or data, which it reads.
    fn take(&mut self, bus: &Bus, words: [u32; 4]) {
        let [_, _, command, status] = words;
        if command & EXTENDED == 0 {
            self.take_data(bus, words, Request::default);
        } else if command & TYPE == TYPE_DATA {
            let context = self.contexts[(status >> 4 & 1) as usize];
            self.take_data(bus, words, || Request {
                context,
                network_sum: status & NETWORK_SUM != 0,
                transport_sum: status & TRANSPORT_SUM != 0,
                segment: command & SEGMENT != 0,
                legacy_sum: None,
                tag: (command & INSERT_TAG != 0).then(|| context.tag()),
            });
        } else if command & TYPE == TYPE_CONTEXT {
            self.contexts[(words[3] >> 4 & 1) as usize] = Context(words);
        }
    }

    fn take_data(&mut self, bus: &Bus, words: [u32; 4], request: impl FnOnce() -> Request) {
        let [low, high, command, _] = words;
        self.request.get_or_insert_with(request);
        let (address, len) = (u64::from(low) | u64::from(high) << 32, command as usize & 0xffff);
        let at = self.data.len();
        if self.bad || len == 0 {
            return;
        }
        if at + len > MAX_PACKET {
            self.bad = true;
            return;
        }
        self.data.resize(at + len, 0);
        if let Err(error) = bus.dma_read(address, &mut self.data[at..]) {
            log::debug!("igb: a packet cannot be read: {error}");
            self.bad = true;
        }
    }

    /// Ends a packet with its last descriptor. If it is to be segmented, returns whether that is possible.
    fn finish(&mut self, words: [u32; 4]) -> Option<bool> {
        let mut request = self.request.take().unwrap_or_default();
        let [_, _, command, status] = words;
        if command & EXTENDED == 0 {
            let sum = ((status >> 8 & 0xff) as usize, (command >> 16 & 0xff) as usize);
            request.legacy_sum = (command & INSERT_SUM != 0).then_some(sum);
            request.tag = (command & INSERT_TAG != 0).then_some((status >> 16) as u16);
        }
        let data = std::mem::take(&mut self.data);
        let outgoing = if self.bad { Err(data) } else { Outgoing::new(data, request) };
        let sendable = outgoing.is_ok();
        match outgoing {
            Ok(outgoing) => self.outgoing = Some(outgoing),
            Err(data) => {
                log::debug!("igb: a packet of {} bytes cannot be sent", data.len());
                self.data = data;
            }
        }
        self.abandon();
        request.segment.then_some(sendable)
    }

    /// Puts the next frame of the packet into `frame`, in place of its content.
    fn next(&mut self, vlan: u16, pad: bool, frame: &mut Vec<u8>) -> bool {
        let Some(outgoing) = &mut self.outgoing else { return false };
        let next = outgoing.next(vlan, pad, frame);
        if !next && let Some(outgoing) = self.outgoing.take() {
            // Its memory is reused for the next packet, unless that has been begun.
            let data = outgoing.into_data();
            if self.data.is_empty() {
                self.data = data;
                self.data.clear();
            }
        }
        next
    }
}

/// How a descriptor was taken.
enum Taken {
    Silently,
    /// It was written back.
    Reported,
    /// It was not: its ring is stuck.
    Stuck,
    /// There is no such descriptor any more.
    Stopped,
}

impl Igb {
    /// Sends packets of all queues within the budget. Returns whether there were any.
    pub(super) fn transmit(&mut self, bus: &Bus, budget: &mut Budget) -> bool {
        if !self.registers.has(TCTL, TCTL_ENABLE) || !(self.link || self.is_looped()) {
            return false;
        }
        let start = self.next_queue;
        self.next_queue = (start + 1) % QUEUES;
        let mut busy = false;
        for queue in (0..QUEUES).map(|queue| (start + queue) % QUEUES) {
            if budget.is_spent() {
                return true;
            }
            match self.serve(bus, queue, budget) {
                Ok(served) => busy |= served,
                Err(error) => log::debug!("igb: transmit queue {queue} cannot be read: {error}"),
            }
        }
        busy
    }

    /// Takes descriptors of a queue. Returns whether there were any.
    fn serve(&mut self, bus: &Bus, queue: usize, budget: &mut Budget) -> Result<bool> {
        let Some(mut ring) = self.transmitters[queue].ring.as_ref().and_then(Ring::descriptors)
        else {
            let disabled = !self.transmitters[queue].ring.as_ref().is_some_and(Ring::is_enabled);
            if disabled {
                self.transmitters[queue].reset();
            }
            return Ok(false);
        };
        if self.transmitters[queue].is_stuck(ring.head) {
            return Ok(false);
        }
        let (start, mut reported) = (ring.head, false);
        let sent = self.send_frames(queue, budget);
        let mut outcome = Ok(());
        for _ in 0..SHARE {
            // A complete packet is sent before the next one is begun.
            let waits = self.transmitters[queue].outgoing.is_some();
            if waits || ring.ready() == 0 || budget.is_spent() || !self.is_open(queue) {
                break;
            }
            match self.take_descriptor(bus, queue, &mut ring, budget) {
                Ok(Taken::Silently) => {}
                Ok(Taken::Reported) => reported = true,
                Ok(Taken::Stuck) => break,
                Ok(Taken::Stopped) => return Ok(true),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
            self.send_frames(queue, budget);
        }
        let moved = ring.head != start;
        if moved
            && let Some(registers) = &self.transmitters[queue].ring
            && registers.is_enabled()
        {
            registers.set_head(ring.head);
        }
        if reported {
            self.interrupts.raise_queue(&self.registers, queue, true);
        }
        outcome.map(|()| moved || sent)
    }

    fn is_open(&self, queue: usize) -> bool {
        self.transmitters[queue].ring.as_ref().is_some_and(Ring::is_enabled)
    }

    /// Takes the descriptor at the head, which moves on.
    fn take_descriptor(
        &mut self,
        bus: &Bus,
        queue: usize,
        descriptors: &mut Descriptors,
        budget: &mut Budget,
    ) -> Result<Taken> {
        let words = descriptors.next(bus)?;
        let address = descriptors.address();
        let command = words[2];
        let is_context = command & EXTENDED != 0 && command & TYPE != TYPE_DATA;
        let is_last = command & END_OF_PACKET != 0 && !is_context;
        let fate = if is_last { self.inject(bus, true) } else { Fate::Whole };
        let transmitter = &mut self.transmitters[queue];
        match fate {
            Fate::Stopped => return Ok(Taken::Stopped),
            Fate::Stuck => {
                transmitter.stuck = Some(descriptors.head);
                return Ok(Taken::Stuck);
            }
            Fate::Whole | Fate::Corrupt | Fate::Lost => {}
        }
        budget.spend(command as usize & 0xffff);
        transmitter.take(bus, words);
        if is_last {
            transmitter.fate = fate;
            match transmitter.finish(words) {
                Some(true) => self.statistics.count(SEGMENTED),
                Some(false) => self.statistics.count(SEGMENTED_FAILED),
                None => {}
            }
        }
        descriptors.advance();
        if command & REPORT == 0 {
            return Ok(Taken::Silently);
        }
        let head = self.transmitters[queue].ring.as_ref().and_then(Ring::head_write_back);
        let written = match head {
            Some(at) => bus.dma_write(at, &descriptors.head.to_le_bytes()),
            None => {
                let status = if command & EXTENDED == 0 { words[3] | DONE } else { DONE };
                bus.dma_write(address.wrapping_add(12), &status.to_le_bytes())
            }
        };
        // This is a posted write: the device does not learn of a failure.
        if let Err(error) = written {
            log::debug!("igb: a transmit descriptor cannot be written back: {error}");
        }
        Ok(Taken::Reported)
    }

    /// Sends frames of the complete packet within the budget. Returns whether there were any.
    fn send_frames(&mut self, queue: usize, budget: &mut Budget) -> bool {
        let (vlan, pad) = (self.registers.get(VET) as u16, self.registers.has(TCTL, TCTL_PAD));
        let looped = self.is_looped();
        let mut any = false;
        let mut frame = std::mem::take(&mut self.sent);
        while !budget.is_spent()
            && (self.link || looped)
            && self.transmitters[queue].next(vlan, pad, &mut frame)
        {
            any = true;
            budget.spend(frame.len());
            self.statistics.sent(&frame);
            let arrives = match self.transmitters[queue].fate {
                Fate::Lost => false,
                Fate::Corrupt => self.corrupt(&mut frame),
                Fate::Whole | Fate::Stuck | Fate::Stopped => true,
            };
            if !arrives {
                continue;
            }
            if !looped {
                self.wire.send(&frame);
            } else if self.looped.len() < MAX_LOOPED {
                self.looped.push_back(frame.clone());
            } else {
                self.interrupts.causes |= interrupt::MISSED;
                self.statistics.count(super::statistics::MISSED);
            }
        }
        self.sent = frame;
        any
    }
}
