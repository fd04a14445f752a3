//! Writing the descriptors of packets.

use vfio_remap::transport::AddressSpaceId;

use super::super::context::{Offloaded, offloaded};
use super::super::descriptors::{Descriptor, Descriptors, STATUS, transmit};
use super::super::model::Model;
use super::super::offload::Request;
use super::super::pool::{Frame, Inner};
use super::{SHORTEST, Slot};

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
    /// Which bits of the length of a packet are in the options: all, or none.
    length_mask: u32,
}

impl Kind {
    pub fn new(model: Model) -> Self {
        let (kind, length_mask) = match model {
            Model::I82576 => (transmit::ADVANCED_DATA, u32::MAX),
            Model::I82574 => (transmit::EXTENDED_DATA, 0),
        };
        let command = kind | transmit::EXTENDED | transmit::INSERT_CRC;
        Self { model, command, length_mask }
    }

    #[inline]
    fn options(self, len: u32) -> u32 {
        (len & self.length_mask) << transmit::PAYLOAD_SHIFT
    }
}

impl Frame {
    /// Whether one descriptor says all, and a card in this address space sends it.
    #[inline]
    pub fn is_simple(&self, space: AddressSpaceId, longest: usize) -> bool {
        let len = self.len();
        self.0.space == space
            && self.0.request.is_plain()
            && self.0.received.tag().is_none()
            && (SHORTEST..=longest).contains(&len)
            && self.0.iova.0 as usize % PAGE + len <= PAGE
    }

    /// How many descriptors its bytes need.
    pub fn pieces(&self) -> usize {
        pieces(self.0.iova.0, self.len())
    }
}

fn pieces(iova: u64, len: usize) -> usize {
    (iova as usize % PAGE + len).div_ceil(PAGE)
}

/// Writes descriptors from the tail on.
pub struct Writer<'q> {
    pub kind: Kind,
    pub descriptors: &'q Descriptors,
    pub slots: &'q mut [Slot],
    /// The context that the card has.
    pub context: &'q mut Option<[u64; 2]>,
    pub mask: usize,
    pub tail: usize,
}

impl Writer<'_> {
    /// Writes frames that are [simple](Frame::is_simple).
    #[inline]
    pub fn write(&mut self, mut frames: impl ExactSizeIterator<Item = Frame>) {
        let always = self.kind.command | transmit::END_OF_PACKET;
        while frames.len() > 0 {
            let first = self.tail;
            let mut last = (first, [0; 2]);
            for frame in frames.by_ref().take(REPORT_AFTER) {
                let Inner { iova, len, .. } = *frame.0;
                let (command, options) = (always | len, self.kind.options(len));
                let words = Descriptor { address: iova, command, options }.words();
                self.descriptors.store_entry(self.tail, words);
                last = (self.tail, words);
                self.hold(frame);
                self.step();
            }
            let (at, [_, word]) = last;
            self.report(first, at, word);
        }
    }

    /// Writes a packet that is more than a descriptor: a context before it, and pieces.
    pub fn write_packet(&mut self, frames: impl ExactSizeIterator<Item = Frame>) {
        let first = self.tail;
        let mut all = None;
        let mut last = (first, 0);
        let mut left = frames.len();
        for frame in frames {
            left -= 1;
            let Inner { iova, len, packet, .. } = *frame.0;
            let all = all.get_or_insert_with(|| self.begin(frame.request(), packet));
            let (mut iova, mut rest) = (iova, len);
            loop {
                let size = rest.min((PAGE - iova.0 as usize % PAGE) as u32);
                let mut command = self.kind.command | all.command | size;
                if left == 0 && size == rest {
                    command |= transmit::END_OF_PACKET;
                }
                let [address, word] =
                    Descriptor { address: iova, command, options: all.options }.words();
                self.descriptors.store_entry(self.tail, [address, word]);
                last = (self.tail, word);
                (iova, rest) = (iova + u64::from(size), rest - size);
                if rest == 0 {
                    break;
                }
                self.step();
            }
            self.hold(frame);
            self.step();
        }
        let (at, word) = last;
        self.report(first, at, word);
    }

    /// Writes the context of a packet, if the card has another. What its other descriptors have.
    fn begin(&mut self, request: Request, packet: u32) -> Offloaded {
        if request.flags & !Request::GOES_ON == 0 {
            let options = self.kind.options(packet);
            return Offloaded { context: None, command: 0, options };
        }
        let all = offloaded(self.kind.model, request, packet as usize);
        if let Some(words) = all.context.filter(|words| *self.context != Some(*words)) {
            self.descriptors.store_entry(self.tail, words);
            *self.context = all.context;
            self.step();
        }
        all
    }

    /// Has the card say when it has sent the descriptor at `last`, whose second word is `word`, and those before
    /// it from `first` on.
    #[inline]
    fn report(&mut self, first: usize, last: usize, word: u64) {
        self.descriptors.store(last, STATUS, word | u64::from(transmit::REPORT_STATUS));
        self.slots[first].last = last;
    }

    /// The frame is the card's until the descriptor at the tail is done.
    #[inline]
    fn hold(&mut self, frame: Frame) {
        // There is none in it to drop.
        std::mem::forget(self.slots[self.tail].frame.replace(frame));
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
