//! Where memory is mapped for a device.

use super::iova::Iova;
use crate::space::DmaMemory;

/// The IOVA at which memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IovaPlacement {
    /// Any free address, from the smallest free range that is large enough. Addresses above 4 GiB come first,
    /// if `limit` allows them: 32-bit addresses are left to devices that share the space and have no others.
    /// Never 0, which devices take for no address. Made by [`default`](Self::default),
    /// [`below_bits`](Self::below_bits), [`up_to`](Self::up_to) and [`aligned`](Self::aligned).
    #[non_exhaustive]
    Anywhere {
        /// The alignment, a power of two; at least the IOMMU's page size.
        alignment: u64,
        /// The highest address: 0xffff_ffff for a device with 32 address bits.
        limit: u64,
    },
    /// This address.
    At(Iova),
    /// The address that the memory has in this process.
    SameAsAddress,
}

impl IovaPlacement {
    /// Any address that a device with `bits` address bits reaches.
    pub fn below_bits(bits: u32) -> Self {
        Self::up_to(1u64.checked_shl(bits).map_or(u64::MAX, |end| end - 1))
    }

    /// Any address, such that no byte is above `limit`.
    pub fn up_to(limit: u64) -> Self {
        Self::Anywhere { alignment: 1, limit }
    }

    /// The same placement at a multiple of `alignment`, a power of two. An address that is given stays.
    ///
    /// ```
    /// use vfio_remap::device::IovaPlacement;
    ///
    /// // 64 KiB of a device with 32 address bits, which needs them aligned.
    /// let placement = IovaPlacement::below_bits(32).aligned(1 << 16);
    /// # let _ = placement;
    /// ```
    #[must_use]
    pub fn aligned(self, alignment: u64) -> Self {
        match self {
            Self::Anywhere { limit, .. } => Self::Anywhere { alignment, limit },
            at @ (Self::At(_) | Self::SameAsAddress) => at,
        }
    }

    /// Whether memory that the device finds at `at`, and nowhere else, satisfies this placement.
    pub(super) fn admits(self, at: Iova, memory: &DmaMemory) -> bool {
        // The memory must not go past the last address.
        let last = (memory.size() as u64).checked_sub(1).and_then(|extent| at.checked_add(extent));
        let Some(last) = last else { return false };
        match self {
            Self::Anywhere { alignment, limit } => {
                at.0.is_multiple_of(alignment) && last.0 <= limit
            }
            Self::At(wanted) => at == wanted,
            Self::SameAsAddress => at.0 == memory.address() as u64,
        }
    }
}

impl Default for IovaPlacement {
    /// Any address, for a device with 64 address bits: above 4 GiB first.
    fn default() -> Self {
        Self::Anywhere { alignment: 1, limit: u64::MAX }
    }
}
