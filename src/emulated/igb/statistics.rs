//! Statistics, which are cleared by reads and saturate (82576 datasheet §8.18).

pub(super) const START: u32 = 0x4000;
pub(super) const END: u32 = 0x4140;

pub(super) const CRC_ERRORS: u32 = 0x4000;
pub(super) const MISSED: u32 = 0x4010;
pub(super) const NO_BUFFERS: u32 = 0x40a0;
pub(super) const OVERSIZED: u32 = 0x40ac;
pub(super) const SEGMENTED: u32 = 0x40f8;
pub(super) const SEGMENTED_FAILED: u32 = 0x40fc;
pub(super) const INTERRUPTS: u32 = 0x4100;

const RECEIVED_BY_SIZE: u32 = 0x405c;
const RECEIVED_GOOD: u32 = 0x4074;
const RECEIVED_BROADCAST: u32 = 0x4078;
const RECEIVED_MULTICAST: u32 = 0x407c;
const RECEIVED_GOOD_OCTETS: u32 = 0x4088;
const RECEIVED_OCTETS: u32 = 0x40c0;
const RECEIVED: u32 = 0x40d0;
const TO_HOST: u32 = 0x4104;
const TO_HOST_OCTETS: u32 = 0x4128;

const SENT_GOOD: u32 = 0x4080;
const SENT_GOOD_OCTETS: u32 = 0x4090;
const SENT_OCTETS: u32 = 0x40c8;
const SENT: u32 = 0x40d4;
const SENT_BY_SIZE: u32 = 0x40d8;
const SENT_MULTICAST: u32 = 0x40f0;
const SENT_BROADCAST: u32 = 0x40f4;
const FROM_HOST: u32 = 0x4118;
const FROM_HOST_OCTETS: u32 = 0x4130;

/// The low halves of 64-bit counters. A read of the high half clears both.
const WIDE: [u32; 6] = [
    RECEIVED_GOOD_OCTETS,
    SENT_GOOD_OCTETS,
    RECEIVED_OCTETS,
    SENT_OCTETS,
    TO_HOST_OCTETS,
    FROM_HOST_OCTETS,
];

/// The bytes of the check sequence, which count.
const CRC: u64 = 4;

pub(super) struct Statistics([u32; ((END - START) / 4) as usize]);

impl Statistics {
    pub(super) fn new() -> Self {
        Self([0; ((END - START) / 4) as usize])
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new();
    }

    fn counter(&mut self, offset: u32) -> Option<&mut u32> {
        self.0.get_mut((offset.checked_sub(START)? / 4) as usize)
    }

    /// Reads and clears a counter.
    pub(super) fn read(&mut self, offset: u32) -> u32 {
        if WIDE.contains(&offset) {
            return self.counter(offset).copied().unwrap_or(0);
        }
        if let Some(low) = offset.checked_sub(4).filter(|low| WIDE.contains(low))
            && let Some(low) = self.counter(low)
        {
            *low = 0;
        }
        self.counter(offset).map_or(0, std::mem::take)
    }

    pub(super) fn count(&mut self, offset: u32) {
        self.count_many(offset, 1);
    }

    pub(super) fn count_many(&mut self, offset: u32, count: u32) {
        if let Some(counter) = self.counter(offset) {
            *counter = counter.saturating_add(count);
        }
    }

    fn add(&mut self, offset: u32, octets: u64) {
        let high = u64::from(self.counter(offset + 4).map_or(0, |high| *high));
        let low = u64::from(self.counter(offset).map_or(0, |low| *low));
        let sum = (high << 32 | low).saturating_add(octets);
        for (at, value) in [(offset, sum as u32), (offset + 4, (sum >> 32) as u32)] {
            if let Some(half) = self.counter(at) {
                *half = value;
            }
        }
    }

    /// Counts a frame in one of six counters by size, the first of which is at `offset`.
    fn count_size(&mut self, offset: u32, octets: u64) {
        let class = [64, 127, 255, 511, 1023].iter().filter(|limit| octets > **limit).count();
        self.count(offset + 4 * class as u32);
    }

    /// Counts a frame that arrived, before it is filtered.
    pub(super) fn arrived(&mut self, frame: &[u8]) {
        self.count(RECEIVED);
        self.add(RECEIVED_OCTETS, frame.len() as u64 + CRC);
    }

    /// Counts a frame of `len` bytes that was written to memory.
    pub(super) fn received(&mut self, frame: &[u8], len: usize) {
        let octets = len as u64 + CRC;
        self.count_size(RECEIVED_BY_SIZE, octets);
        self.count(RECEIVED_GOOD);
        self.count(TO_HOST);
        self.add(RECEIVED_GOOD_OCTETS, octets);
        self.add(TO_HOST_OCTETS, octets);
        self.count_kind(frame, RECEIVED_BROADCAST, RECEIVED_MULTICAST);
    }

    /// Counts a frame that was sent.
    pub(super) fn sent(&mut self, frame: &[u8]) {
        let octets = frame.len() as u64 + CRC;
        self.count_size(SENT_BY_SIZE, octets);
        [SENT, SENT_GOOD, FROM_HOST].into_iter().for_each(|counter| self.count(counter));
        for counter in [SENT_OCTETS, SENT_GOOD_OCTETS, FROM_HOST_OCTETS] {
            self.add(counter, octets);
        }
        self.count_kind(frame, SENT_BROADCAST, SENT_MULTICAST);
    }

    fn count_kind(&mut self, frame: &[u8], broadcast: u32, multicast: u32) {
        match frame.first_chunk::<6>() {
            Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => self.count(broadcast),
            Some([first, ..]) if first & 1 != 0 => self.count(multicast),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_clear_when_they_are_read_and_wide_ones_by_their_high_half() {
        let mut statistics = Statistics::new();
        statistics.received(&[0xff; 60], 60);
        assert_eq!(statistics.read(RECEIVED_BROADCAST), 1);
        assert_eq!(statistics.read(RECEIVED_BROADCAST), 0);
        assert_eq!([(); 2].map(|()| statistics.read(RECEIVED_GOOD_OCTETS)), [64, 64]);
        assert_eq!(statistics.read(RECEIVED_GOOD_OCTETS + 4), 0);
        assert_eq!(statistics.read(RECEIVED_GOOD_OCTETS), 0);
        statistics.add(SENT_OCTETS, u64::MAX - 1);
        statistics.add(SENT_OCTETS, 7);
        assert_eq!([SENT_OCTETS, SENT_OCTETS + 4].map(|at| statistics.read(at)), [u32::MAX; 2]);
    }

    #[test]
    fn a_frame_is_counted_by_its_size_with_its_check_sequence() {
        let mut statistics = Statistics::new();
        for len in [60, 61, 123, 124, 252, 508, 1019, 1020, 9018] {
            statistics.sent(&vec![2; len]);
        }
        let counts = [0, 1, 2, 3, 4, 5].map(|class| statistics.read(SENT_BY_SIZE + 4 * class));
        assert_eq!(counts, [1, 2, 1, 1, 2, 2]);
    }
}
