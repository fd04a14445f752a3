//! The EEPROM: its words, and the registers that read it (82576 datasheet §6, §8.4).

/// The number of words is two to the power of this.
const WORDS_SHIFT: u32 = 8;
const WORDS: usize = 1 << WORDS_SHIFT;
/// The word that corrects the sum of the first 64 words.
const CHECKSUM: usize = 0x3f;
const SUM: u16 = 0xbaba;

const REQUEST: u32 = 1 << 6;
const GRANT: u32 = 1 << 7;
const PRESENT: u32 = 1 << 8;
const AUTO_READ_DONE: u32 = 1 << 9;
/// The size field, which is 0 for 64 words.
const SIZE: u32 = (WORDS_SHIFT - 6) << 11;

const START: u32 = 1;
const DONE: u32 = 1 << 1;

/// Words that are not erased: version, part number, subsystem, device, and the settings of a copper port
/// without management.
const CONTENT: [(usize, u16); 16] = [
    (0x03, 0x0d34),
    (0x05, 0x2010),
    (0x08, 0x1040),
    (0x0a, 0x002b),
    (0x0b, 0x0000),
    (0x0c, 0x8086),
    (0x0d, 0x10c9),
    (0x0e, 0x8086),
    (0x0f, 0x70c3),
    (0x10, 0x0004),
    (0x12, 0x5c00),
    (0x13, 0x0000),
    (0x14, 0x2880),
    (0x20, 0x0004),
    (0x24, 0x2080),
    (0x25, 0x0000),
];

#[derive(Debug)]
pub(super) struct Eeprom {
    words: [u16; WORDS],
    control: u32,
    read: u32,
}

impl Eeprom {
    /// Of a card with this address.
    pub(super) fn new(mac: [u8; 6]) -> Self {
        let mut words = [0xffff; WORDS];
        for (word, bytes) in words.iter_mut().zip(mac.as_chunks::<2>().0) {
            *word = u16::from_le_bytes(*bytes);
        }
        CONTENT.iter().for_each(|&(index, value)| words[index] = value);
        let sum = words[..CHECKSUM].iter().fold(0u16, |sum, word| sum.wrapping_add(*word));
        words[CHECKSUM] = SUM.wrapping_sub(sum);
        Self { words, control: 0, read: 0 }
    }

    pub(super) fn reset(&mut self) {
        (self.control, self.read) = (0, 0);
    }

    /// EECD. Direct access is granted at once, but the pins are not connected.
    pub(super) fn control(&self) -> u32 {
        let grant = if self.control & REQUEST != 0 { GRANT } else { 0 };
        self.control | grant | PRESENT | AUTO_READ_DONE | SIZE
    }

    pub(super) fn set_control(&mut self, value: u32) {
        self.control = value & REQUEST;
    }

    /// EERD.
    pub(super) fn word(&self) -> u32 {
        self.read
    }

    /// Writes EERD, which reads a word at once: all ones past the end.
    pub(super) fn start(&mut self, value: u32) {
        let address = value & 0xfffc;
        self.read = address;
        if value & START != 0 {
            let word = self.words.get((address >> 2) as usize).copied().unwrap_or(0xffff);
            self.read |= u32::from(word) << 16 | DONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_valid_for_any_address() {
        for mac in [[0; 6], [0xff; 6], [2, 0x12, 0x34, 0x56, 0x78, 0x9a]] {
            let mut eeprom = Eeprom::new(mac);
            let mut word = |index: u32| {
                eeprom.start(index << 2 | 1);
                assert_eq!(eeprom.word() & 2, 2);
                (eeprom.word() >> 16) as u16
            };
            assert_eq!((0..0x40).map(&mut word).fold(0, u16::wrapping_add), 0xbaba);
            assert_eq!([0, 1, 2].map(&mut word).map(u16::to_le_bytes).as_flattened(), mac);
            assert_eq!([0xff, 0x100, 0x3fff].map(word), [0xffff; 3]);
        }
    }
}
