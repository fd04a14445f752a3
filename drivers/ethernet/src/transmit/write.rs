//! Writing the descriptors of packets.

use vfio_remap::device::{Descriptors, DmaBuffer};

use super::super::context::{Offloaded, offloaded};
use super::super::descriptors::{Descriptor, transmit};
use super::super::model::Model;
use super::super::offload::Request;
use super::super::pool::Frame;
use super::Slot;

/// After how many descriptors the card says what it has sent, and at the end of each burst.
const REPORT_AFTER: usize = 32;
/// No descriptor has bytes of two such pages. The cards take that, but QEMU's models of them drop a packet
/// with bytes that its IOMMU translates to places apart (10.0 to 11.1 at least).
const PAGE: usize = 4096;

/// What the descriptors of all packets of a queue have.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    model: Model,
    command: u32,
    /// By how many bits the length of a packet is shifted in the options; 32 is not at all.
    length_shift: u32,
}

impl Kind {
    pub fn new(model: Model) -> Self {
        let (kind, length_shift) = match model {
            Model::I82576 => (transmit::ADVANCED_DATA, transmit::PAYLOAD_SHIFT),
            Model::I82574 => (transmit::EXTENDED_DATA, 32),
        };
        let command = kind | transmit::EXTENDED | transmit::INSERT_CRC;
        Self { model, command, length_shift }
    }

    #[inline]
    fn options(self, len: usize) -> u32 {
        (len as u32).checked_shl(self.length_shift).unwrap_or(0)
    }
}

impl Frame {
    /// Whether one descriptor says all.
    #[inline]
    pub fn is_simple(&self) -> bool {
        self.request.is_plain() && self.pieces() == 1
    }

    /// How many descriptors its bytes need.
    #[inline]
    pub fn pieces(&self) -> usize {
        pieces(self.buffer.iova().0, self.len)
    }
}

#[inline]
fn pieces(iova: u64, len: usize) -> usize {
    (iova as usize % PAGE + len).div_ceil(PAGE)
}

/// Writes descriptors from the tail on.
pub struct Writer<'q> {
    pub kind: Kind,
    pub descriptors: &'q Descriptors<Descriptor>,
    pub slots: &'q mut [Slot],
    /// The context that the card has.
    pub context: &'q mut Option<[u64; 2]>,
    pub mask: usize,
    pub tail: usize,
    /// Where the batch begins whose last descriptor is reported.
    pub first: usize,
    /// In the middle of a packet, what all of its descriptors have.
    pub packet: Option<Offloaded>,
}

impl Writer<'_> {
    /// Writes a frame: the last of the burst, or not.
    #[inline]
    pub fn write(&mut self, frame: Frame, is_last: bool) {
        if self.packet.is_some() || !frame.is_simple() {
            return self.write_parts(frame, is_last);
        }
        let Frame { buffer, len, .. } = frame;
        let command = self.kind.command | len as u32 | transmit::END_OF_PACKET;
        let iova = buffer.iova().0;
        self.end(iova, command, self.kind.options(len), buffer, is_last);
    }

    /// Writes a frame that is more than a descriptor: a context before it, and pieces.
    fn write_parts(&mut self, frame: Frame, is_last: bool) {
        let Frame { buffer, len, request, packet, .. } = frame;
        let all = match self.packet.take() {
            Some(all) => all,
            None if request.flags & !Request::GOES_ON == 0 => {
                let options = self.kind.options(packet as usize);
                Offloaded { context: None, command: 0, options }
            }
            None => offloaded(self.kind.model, request, packet as usize),
        };
        if let Some(words) = all.context.filter(|words| *self.context != Some(*words)) {
            self.descriptors.store(self.tail, Descriptor::of_context(words));
            *self.context = all.context;
            self.step();
        }
        let goes_on = request.has(Request::GOES_ON);
        if goes_on {
            self.packet = Some(Offloaded { context: None, ..all });
        }
        let (mut iova, mut left) = (buffer.iova().0, len);
        loop {
            let size = left.min(PAGE - iova as usize % PAGE);
            let mut command = self.kind.command | all.command | size as u32;
            if size == left {
                if goes_on {
                    self.put(iova, command, all.options);
                    self.hold(buffer);
                    return self.step();
                }
                command |= transmit::END_OF_PACKET;
                return self.end(iova, command, all.options, buffer, is_last);
            }
            self.put(iova, command, all.options);
            self.step();
            iova += size as u64;
            left -= size;
        }
    }

    /// Writes the last descriptor of a packet.
    #[inline]
    fn end(&mut self, iova: u64, command: u32, options: u32, buffer: DmaBuffer, is_last: bool) {
        let mut command = command;
        if is_last || self.tail.wrapping_sub(self.first) & self.mask >= REPORT_AFTER {
            command |= transmit::REPORT_STATUS;
            self.slots[self.first].last = self.tail;
            self.first = (self.tail + 1) & self.mask;
        }
        self.put(iova, command, options);
        self.hold(buffer);
        self.step();
    }

    #[inline]
    fn put(&self, iova: u64, command: u32, options: u32) {
        let (address, command, options) = (iova.into(), command.into(), options.into());
        self.descriptors.store(self.tail, Descriptor { address, command, options });
    }

    /// The buffer is the card's until the descriptor at the tail is done.
    #[inline]
    fn hold(&mut self, buffer: DmaBuffer) {
        // There is none in it to drop.
        std::mem::forget(self.slots[self.tail].buffer.replace(buffer));
    }

    #[inline]
    fn step(&mut self) {
        self.tail = (self.tail + 1) & self.mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_a_piece_on_each_page() {
        for (iova, len, count) in
            [(0, 1, 1), (0, 4096, 1), (0, 4097, 2), (4095, 1, 1), (4095, 2, 2), (0xc00, 9018, 3)]
        {
            assert_eq!(pieces(iova, len), count, "{len} bytes at {iova:#x}");
        }
    }
}
