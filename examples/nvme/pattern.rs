//! A pattern by which a block shows its number and whether it is intact.
//!
//! A block holds its number, the run's seed, and words that are computed from both. Its last four bytes are the
//! CRC-32 of the others.

use std::fmt;

/// A fault of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its checksum does not match.
    Damaged,
    /// It is intact, but was written to this block.
    Misplaced(u64),
    /// It is intact, but from a run with this seed.
    Outdated(u64),
    /// Its checksum is correct, but the contents are not.
    Other,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged => f.write_str("its checksum is wrong"),
            Self::Misplaced(block) => write!(f, "it holds the data of block {block}"),
            Self::Outdated(seed) => write!(f, "it holds the data of a run with seed {seed}"),
            Self::Other => f.write_str("its checksum is correct, but its contents are not"),
        }
    }
}

/// Fills a block of at least 512 bytes, a multiple of eight.
pub fn fill(bytes: &mut [u8], seed: u64, block: u64) {
    let mut state = seed ^ block.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let (words, _) = bytes.as_chunks_mut::<8>();
    for (index, word) in words.iter_mut().enumerate() {
        let value = match index {
            0 => block,
            1 => seed,
            _ => next(&mut state),
        };
        *word = value.to_le_bytes();
    }
    let end = bytes.len() - 4;
    let sum = crc32fast::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(&sum.to_le_bytes());
}

/// Checks a block. `expected` is a buffer for the comparison.
pub fn check(bytes: &[u8], seed: u64, block: u64, expected: &mut [u8]) -> Option<Fault> {
    fill(expected, seed, block);
    if bytes == expected {
        return None;
    }
    let (words, _) = bytes.as_chunks::<8>();
    let (content, sum) = bytes.split_at(bytes.len() - 4);
    Some(match (u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1])) {
        _ if crc32fast::hash(content).to_le_bytes() != sum => Fault::Damaged,
        (_, other) if other != seed => Fault::Outdated(other),
        (other, _) if other != block => Fault::Misplaced(other),
        _ => Fault::Other,
    })
}

/// xorshift64 (Marsaglia 2003).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misplaced_outdated_and_damaged_blocks_are_detected() {
        for size in [512, 4096] {
            let [mut block, mut room] = [vec![0; size], vec![0; size]];
            fill(&mut block, 7, 1000);
            let mut check = |bytes: &[u8], seed, block| super::check(bytes, seed, block, &mut room);
            assert_eq!(check(&block, 7, 1000), None);
            assert_eq!(check(&block, 7, 1001), Some(Fault::Misplaced(1000)));
            assert_eq!(check(&block, 8, 1000), Some(Fault::Outdated(7)));
            for at in [0, 9, 100, size - 1] {
                block[at] ^= 0x10;
                assert_eq!(check(&block, 7, 1000), Some(Fault::Damaged));
                block[at] ^= 0x10;
            }
            assert_eq!(check(&vec![0; size], 7, 1000), Some(Fault::Damaged));
        }
    }
}
