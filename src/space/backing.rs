//! The file behind a mapping, and what is known about it: which calls the kernel has accepted, and whether
//! faults fill the page tables again after `MREMAP_DONTUNMAP`.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use super::revocation::Group;
use super::{Hazard, KernelVersion};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::maps::Origin;
use crate::sys::mm::{self, Access};
use crate::sys::mmap_lock::MmapLock;
use crate::sys::{self, file};

/// What kind of file is mapped, as far as remapping is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackingKind {
    /// A BAR of a device whose driver is vfio-pci.
    VfioPci,
    /// A file on tmpfs, such as a memfd.
    SharedMemory,
    /// Any other file. The crate does not rely on faults to fill its mappings again.
    Other,
}

/// The range of a file that is a region. Mappings map parts of it.
pub(crate) struct Backing {
    name: String,
    fd: Arc<OwnedFd>,
    start: u64,
    kind: BackingKind,
    kernel: KernelVersion,
    /// By what its mappings are recognized, if no other file has the same inode.
    pub(super) origin: Option<Origin>,
    /// A bit for each [`Access`] with which an `mmap` without `MAP_FIXED` has succeeded.
    accepted: AtomicU8,
    /// The result of each [`Remap`]'s probe: [`UNKNOWN`], [`ACCEPTED`], or the errno of a lasting refusal.
    remaps: [AtomicU8; 2],
    /// Held during a probe, so that concurrent verbs probe once.
    probing: Mutex<()>,
    /// Its windows are revoked together.
    group: Arc<Group>,
}

/// A use of `mremap` that a kernel accepts for some files only.
#[derive(Clone, Copy)]
pub(super) enum Remap {
    /// With `MREMAP_DONTUNMAP`.
    DontUnmap,
    /// With an old length of 0.
    OldLenZero,
}

const UNKNOWN: u8 = 0;
/// No errno of a lasting refusal.
const ACCEPTED: u8 = 1;

impl Backing {
    /// `size` bytes of `fd` from `start` on. Errors call them `name`.
    ///
    /// # Errors
    /// `Malformed` if the file is shorter than that.
    pub(crate) fn new(
        name: impl Into<String>,
        fd: Arc<OwnedFd>,
        start: u64,
        size: u64,
        kind: BackingKind,
    ) -> Result<Self> {
        let name = name.into();
        let page = sys::page_size() as u64;
        let end = start.checked_add(size).filter(|end| *end <= i64::MAX as u64 - page);
        if end.is_none() || !start.is_multiple_of(page) {
            return Err(Error::new(ErrorKind::Malformed, "map", name)
                .with_reason(format!("its file has no {size:#x} bytes at offset {start:#x}")));
        }
        if file::is_hugetlb(&*fd) {
            return Err(Error::new(ErrorKind::Unsupported, "map", name)
                .with_reason("its file is on hugetlbfs, which is not supported"));
        }
        let file_size = file::regular_size(&*fd).map_err(|errno| Error::os(errno, "map", &name))?;
        if let Some(has) = file_size.filter(|has| end > Some(*has)) {
            return Err(Error::new(ErrorKind::Malformed, "map", name).with_reason(format!(
                "it claims {size:#x} bytes from offset {start:#x}, but its file has {has:#x} bytes"
            )));
        }
        let origin = file::own_identity(&*fd).map_err(|errno| Error::os(errno, "map", &name))?;
        Ok(Self {
            name,
            fd,
            start,
            kind,
            origin: origin.map(|file| origin_of(kind, file)),
            kernel: KernelVersion::running(),
            accepted: AtomicU8::new(0),
            remaps: [const { AtomicU8::new(UNKNOWN) }; 2],
            probing: Mutex::new(()),
            group: Arc::default(),
        })
    }

    /// As a member of a group of backings, whose windows are revoked together.
    pub(crate) fn in_group(mut self, group: Arc<Group>) -> Self {
        self.group = group;
        self
    }

    pub(super) fn group(&self) -> &Arc<Group> {
        &self.group
    }

    #[cfg(test)]
    pub(crate) fn on_kernel(mut self, kernel: KernelVersion) -> Self {
        self.kernel = kernel;
        self
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn kind(&self) -> BackingKind {
        self.kind
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// By what its mappings are recognized, even if other files have the same inode.
    pub(super) fn shared_origin(&self) -> std::result::Result<Origin, Errno> {
        Ok(origin_of(self.kind, file::identity(self.fd())?))
    }

    /// The offset in the file of an offset in the region.
    pub(crate) fn file_offset(&self, offset: u64) -> u64 {
        self.start + offset
    }

    /// `mmap` at an address that the kernel chooses. Success is remembered.
    pub(super) fn map(
        &self,
        lock: &MmapLock,
        offset: u64,
        size: usize,
        access: Access,
    ) -> std::result::Result<usize, Errno> {
        let address = mm::map(lock, self.fd(), self.file_offset(offset), size, access)?;
        if !self.has_accepted(access) {
            self.accepted.fetch_or(bit(access), Ordering::Relaxed);
        }
        Ok(address)
    }

    fn has_accepted(&self, access: Access) -> bool {
        self.accepted.load(Ordering::Relaxed) & bit(access) != 0
    }

    /// Makes sure that the kernel will accept a `MAP_FIXED` mapping, because a failing one unmaps its
    /// destination: makes the same mapping at an address that the kernel chooses, and unmaps it.
    ///
    /// For a known backing this happens once for each access, with one page, since a limit may allow no
    /// more. Another backing may accept one range and refuse the next, so it happens each time with the
    /// whole range.
    pub(super) fn ensure_accepted(
        &self,
        offset: u64,
        size: usize,
        access: Access,
    ) -> std::result::Result<(), Errno> {
        if self.has_accepted(access) && self.kind != BackingKind::Other {
            return Ok(());
        }
        let size = if self.kind == BackingKind::Other { size } else { sys::page_size() };
        let address = self.map(&MmapLock::take(), offset, size, access)?;
        // SAFETY: the mapping was made on the line above, and nothing else has its address.
        unsafe { mm::munmap(address, size) }
    }

    /// Whether the kernel accepts `remap` for this file, and whether that result was remembered.
    ///
    /// The probe uses an untouched mapping of one page, made for it, without `MREMAP_FIXED`, and is
    /// harmless on every kernel. Only success, EINVAL and EFAULT are remembered, which depend on the kernel
    /// and the file alone; other errors are temporary.
    pub(super) fn probe(
        &self,
        remap: Remap,
        offset: u64,
        probe_again: bool,
    ) -> (std::result::Result<(), Errno>, bool) {
        if let (Some(result), false) = (self.remembered(remap), probe_again) {
            return (result, true);
        }
        let _one = self.probing.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(result), false) = (self.remembered(remap), probe_again) {
            return (result, true);
        }
        let result = self.try_remap(remap, offset);
        let lasting = match result {
            Ok(()) => ACCEPTED,
            Err(errno @ (Errno::EINVAL | Errno::EFAULT)) => errno as u8,
            Err(_) => return (result, false),
        };
        self.remaps[remap as usize].store(lasting, Ordering::Relaxed);
        (result, false)
    }

    /// The remembered result of an earlier probe.
    fn remembered(&self, remap: Remap) -> Option<std::result::Result<(), Errno>> {
        match self.remaps[remap as usize].load(Ordering::Relaxed) {
            UNKNOWN => None,
            ACCEPTED => Some(Ok(())),
            errno => Some(Err(Errno::from_raw(errno.into()))),
        }
    }

    fn try_remap(&self, remap: Remap, offset: u64) -> std::result::Result<(), Errno> {
        let size = sys::page_size();
        let lock = MmapLock::take();
        let old = mm::map(&lock, self.fd(), self.file_offset(offset), size, Access::ReadOnly)?;
        let new = match remap {
            // SAFETY: the page was mapped above, and nothing else has its address. Whether faults fill the
            // old side again does not matter, since nothing accesses it.
            Remap::DontUnmap => unsafe { mm::dont_unmap(&lock, old, size) },
            Remap::OldLenZero => mm::old_len_zero(&lock, old, size),
        };
        for page in [Ok(old), new].into_iter().flatten() {
            // SAFETY: both pages were mapped above, and nothing else has their addresses.
            if let Err(errno) = unsafe { mm::munmap(page, size) } {
                log::error!("leaked a page at {page:#x}: {errno}");
            }
        }
        new.map(drop)
    }

    /// The hazard that forbids an old length of 0 although the kernel accepts it. It moves no page tables,
    /// so only the new side may be one that faults do not fill.
    pub(super) fn hazard_of_old_len_zero(&self) -> Option<Hazard> {
        (self.kind == BackingKind::Other).then_some(Hazard::UnknownBacking)
    }

    /// The hazard that forbids `DONTUNMAP` of `[address, address + size)` although the kernel accepts it.
    pub(super) fn hazard_of_dont_unmap(
        &self,
        address: usize,
        offset: u64,
        size: usize,
    ) -> Option<Hazard> {
        match self.kind {
            BackingKind::SharedMemory => None,
            BackingKind::VfioPci => Hazard::source_may_spin(self.kernel).or_else(|| {
                Hazard::one_gib_entry(address, self.file_offset(offset), size)
                    .filter(|_| !self.moves_gib_entries(offset))
            }),
            BackingKind::Other => Some(Hazard::UnknownBacking),
        }
    }

    /// Whether the kernel is known to move 1 GiB entries of a BAR correctly.
    ///
    /// No released kernel accepts an old length of 0 for a BAR. The patches that make it accept that
    /// (`lab/kernel/rfc`) require those that move such entries (`lab/kernel/fixes`). This asks only for a
    /// second mapping, which moves nothing, so it is harmless on a kernel without either.
    fn moves_gib_entries(&self, offset: u64) -> bool {
        self.kind == BackingKind::VfioPci && self.probe(Remap::OldLenZero, offset, false).0.is_ok()
    }

    /// The hazard that forbids moving `[address, address + size)`.
    pub(super) fn hazard_of_move(
        &self,
        address: usize,
        offset: u64,
        size: usize,
    ) -> Option<Hazard> {
        match self.kind {
            BackingKind::SharedMemory => None,
            BackingKind::VfioPci => Hazard::move_escapes_revocation(self.kernel)
                .or_else(|| Hazard::one_gib_entry(address, self.file_offset(offset), size)),
            // Its offsets in physical memory are not known.
            BackingKind::Other => Hazard::move_escapes_revocation(self.kernel)
                .or_else(|| (size >= 1 << 30).then_some(Hazard::OneGibEntry)),
        }
    }
}

/// Only a device's driver maps another file than the one that was asked for.
fn origin_of(kind: BackingKind, file: (u64, u64)) -> Origin {
    match kind {
        BackingKind::SharedMemory => file.into(),
        BackingKind::VfioPci | BackingKind::Other => Origin::or_dma_buf(file),
    }
}

fn bit(access: Access) -> u8 {
    match access {
        Access::ReadOnly => 1,
        Access::ReadWrite => 2,
    }
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Backing({}, {:?})", self.name, self.kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::fixture::{PAGE, backing};

    #[test]
    fn only_a_device_file_may_be_shown_as_a_dma_buf() {
        for (kind, origin) in [
            (BackingKind::SharedMemory, Origin::from as fn(_) -> _),
            (BackingKind::VfioPci, Origin::or_dma_buf),
            (BackingKind::Other, Origin::or_dma_buf),
        ] {
            let backing = backing(PAGE, kind);
            let file = file::identity(backing.fd()).unwrap();
            assert_eq!(backing.origin, Some(origin(file)), "{kind:?}");
            assert_eq!(backing.shared_origin(), Ok(origin(file)), "{kind:?}");
        }
    }
}
