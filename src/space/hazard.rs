//! Known faults of kernels in remapping, each with a name.
//!
//! Versions are those of the unmodified kernels on which a hazard was observed, or found in the source.
//! Distributions backport changes, so each hazard says from which version on the crate trusts the kernel.

use std::fmt;

use super::kernel::KernelVersion;

/// A known fault of a kernel that makes a strategy unsafe although the kernel accepts the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hazard {
    /// Moving page tables that hold a 1 GiB (PUD) entry of a device mapping corrupts them.
    ///
    /// The kernel's `move_page_tables` does not handle such entries in a `VM_PFNMAP` mapping. It logs
    /// `bad pud` and clears the entry without flushing the TLB. The old address then still reaches the
    /// device, even after other memory is mapped there. Observed on 6.12 to 7.3; 6.12 is the first kernel
    /// on which vfio-pci was seen to insert such entries. The crate assumes the fault on every kernel,
    /// because the insertion may be backported and no fix is released. For `DontUnmap` of a BAR there is one
    /// exception: a kernel that accepts an old length of 0 for it (`lab/kernel/rfc`) has the fix.
    OneGibEntry,
    /// After `MREMAP_DONTUNMAP` of a touched BAR the source spins in the page-fault handler.
    ///
    /// Up to 6.9 vfio-pci keeps a list of its mappings (`vma_list`) and maps all of a mapping on its
    /// first fault. A fault in a mapping that is already on the list inserts nothing and is retried
    /// forever (observed on 5.10 and 6.1, with a patch that lets `DONTUNMAP` through). 6.10 rewrote the
    /// handler; 6.12 is the oldest kernel on which faults were seen to fill the source again.
    SourceMaySpin,
    /// The driver does not revoke a touched BAR after it was moved.
    ///
    /// Up to 6.9 (see [`SourceMaySpin`](Self::SourceMaySpin)) the moved mapping is not on vfio-pci's
    /// `vma_list`. When memory decoding is switched off, or the device is reset, the driver does not zap
    /// it, and it still reaches the bus. On 5.10 and 6.1 the move also raises a WARNING in `untrack_pfn`,
    /// which stops a machine that runs with `panic_on_warn`.
    MoveEscapesRevocation,
    /// It is not known whether faults fill the source again for this backing. An `AF_PACKET` ring, for
    /// example, can be moved, but then an access to the old side raises SIGBUS.
    UnknownBacking,
}

const GIB: u64 = 1 << 30;

impl Hazard {
    /// [`OneGibEntry`](Self::OneGibEntry) if the range may hold such an entry: address and offset are
    /// congruent modulo 1 GiB, and the range holds a whole aligned GiB.
    pub(crate) fn one_gib_entry(address: usize, offset: u64, size: usize) -> Option<Self> {
        let start = address as u64;
        let end = start.saturating_add(size as u64);
        let congruent = start % GIB == offset % GIB;
        let first = start.checked_next_multiple_of(GIB)?;
        (congruent && first.checked_add(GIB)? <= end).then_some(Self::OneGibEntry)
    }

    /// [`SourceMaySpin`](Self::SourceMaySpin) if the kernel is old enough.
    pub(crate) fn source_may_spin(kernel: KernelVersion) -> Option<Self> {
        (kernel < KernelVersion::new(6, 12)).then_some(Self::SourceMaySpin)
    }

    /// [`MoveEscapesRevocation`](Self::MoveEscapesRevocation) if the kernel is old enough.
    pub(crate) fn move_escapes_revocation(kernel: KernelVersion) -> Option<Self> {
        (kernel < KernelVersion::new(6, 10)).then_some(Self::MoveEscapesRevocation)
    }
}

impl fmt::Display for Hazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OneGibEntry => {
                "moving a 1 GiB page-table entry of a device corrupts page tables on every released kernel"
            }
            Self::SourceMaySpin => {
                "before Linux 6.12 an access to the old side of a touched BAR may loop in the fault handler"
            }
            Self::MoveEscapesRevocation => {
                "before Linux 6.10 a moved BAR is not revoked when its device is reset, and the move may log a warning"
            }
            Self::UnknownBacking => {
                "it is not known whether faults fill the old side again for this kind of file"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gib_entry_needs_congruence_and_a_whole_gib() {
        let gib = GIB as usize;
        let some = Some(Hazard::OneGibEntry);
        assert_eq!(Hazard::one_gib_entry(4 * gib, 0, gib), some);
        assert_eq!(Hazard::one_gib_entry(4 * gib, 7 << 40, 4 * gib), some);
        assert_eq!(Hazard::one_gib_entry(4 * gib - 4096, GIB - 4096, gib + 4096), some);
        assert_eq!(Hazard::one_gib_entry(4 * gib, 0, gib - 4096), None, "not a whole one");
        assert_eq!(Hazard::one_gib_entry(4 * gib + 4096, 4096, gib), None, "no aligned one inside");
        assert_eq!(Hazard::one_gib_entry(4 * gib + (2 << 20), 0, 4 * gib), None, "incongruent");
        assert_eq!(Hazard::one_gib_entry(usize::MAX - 4095, 0, 4096), None, "the last page");
    }

    #[test]
    fn versions_limit_the_vma_list_hazards() {
        for (major, minor, spins, escapes) in [
            (5, 10, true, true),
            (6, 1, true, true),
            (6, 10, true, false),
            (6, 12, false, false),
            (7, 3, false, false),
        ] {
            let kernel = KernelVersion::new(major, minor);
            assert_eq!(Hazard::source_may_spin(kernel).is_some(), spins, "{kernel}");
            assert_eq!(Hazard::move_escapes_revocation(kernel).is_some(), escapes, "{kernel}");
        }
    }
}
