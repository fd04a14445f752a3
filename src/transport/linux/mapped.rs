//! What a device file has mapped for DMA.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::locked::Locked;
use crate::space::DmaMemory;

/// By IOVA. Windows of other devices are not pinned by being mapped: kept here, they keep their device
/// open.
pub(super) type Mapped = HashMap<u64, (DmaMemory, Locked), BuildHasherDefault<IovaHasher>>;

/// Hashes one address, chosen by this process and not by anybody who would want them to collide: a lookup
/// is to cost little beside the system call that goes with it.
#[derive(Default)]
pub(super) struct IovaHasher(u64);

impl Hasher for IovaHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u64(&mut self, iova: u64) {
        // Fibonacci hashing (Knuth, The Art of Computer Programming 3, §6.4), both halves mixed: the
        // lowest bits of an address are all the same.
        let product = u128::from(iova) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product as u64) ^ (product >> 64) as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0.rotate_left(8) ^ u64::from(*byte));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn pages_in_a_row_are_spread() {
        let hash = |iova| {
            let mut hasher = IovaHasher::default();
            hasher.write_u64(iova);
            hasher.finish()
        };
        for step in [1 << 12, 1 << 21, 1 << 30] {
            let buckets: HashSet<_> = (0..4096).map(|page| hash(page * step) % 4096).collect();
            assert!(buckets.len() > 2000, "{step:#x}: {}", buckets.len());
        }
    }
}
