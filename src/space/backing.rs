//! What a mapping maps, and what is known of it: which calls the kernel has accepted, and whether it
//! can be trusted to fill again what `MREMAP_DONTUNMAP` has emptied.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use super::{Hazard, KernelVersion};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::mm::{self, Access};
use crate::sys::turn::Turn;
use crate::sys::{self, file};

/// What stands behind a file descriptor, as far as remapping is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackingKind {
    /// A BAR of a device whose driver is vfio-pci.
    VfioPci,
    /// A file on tmpfs, such as a memfd.
    SharedMemory,
    /// Anything else. Never trusted to fill a mapping again.
    Other,
}

/// A range of a file that mappings are made of: all of a region.
pub(crate) struct Backing {
    name: String,
    fd: Arc<OwnedFd>,
    start: u64,
    kind: BackingKind,
    kernel: KernelVersion,
    /// Device and inode number of the file, if it is the only one to have them.
    pub(super) identity: Option<(u64, u64)>,
    /// Bits of [`Access`]es with which an un-FIXED `mmap` has been accepted.
    accepted: AtomicU8,
    /// What the probe of `DONTUNMAP` was answered: [`UNKNOWN`], [`ACCEPTED`] or [`REFUSED`].
    dont_unmap: AtomicU8,
    /// Held while the kernel is asked, so that two verbs at once do not both ask.
    asking: Mutex<()>,
}

const UNKNOWN: u8 = 0;
const ACCEPTED: u8 = 1;
/// With EINVAL.
const REFUSED: u8 = 2;

impl Backing {
    /// `size` bytes of `fd` from `start` on, named `name` in errors.
    ///
    /// # Errors
    /// `Malformed` where the file is shorter than that.
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
                .because(format!("its file has no {size:#x} bytes at offset {start:#x}")));
        }
        if file::is_hugetlb(&*fd) {
            return Err(Error::new(ErrorKind::Unsupported, "map", name).because(
                "its file is of huge pages (hugetlbfs), which are mapped by other rules",
            ));
        }
        let file_size = file::regular_size(&*fd).map_err(|errno| Error::os(errno, "map", &name))?;
        if let Some(has) = file_size.filter(|len| end > Some(*len)) {
            return Err(Error::new(ErrorKind::Malformed, "map", name).because(format!(
                "it is said to be {size:#x} bytes from offset {start:#x}, and its file has {has:#x}"
            )));
        }
        let identity = file::own_identity(&*fd).map_err(|errno| Error::os(errno, "map", &name))?;
        Ok(Self {
            name,
            fd,
            start,
            kind,
            identity,
            kernel: KernelVersion::running(),
            accepted: AtomicU8::new(0),
            dont_unmap: AtomicU8::new(UNKNOWN),
            asking: Mutex::new(()),
        })
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

    /// The offset in the file of an offset in the region.
    pub(crate) fn file_offset(&self, offset: u64) -> u64 {
        self.start + offset
    }

    /// `mmap` where the kernel likes; an acceptance is remembered.
    pub(super) fn map(
        &self,
        turn: &Turn,
        offset: u64,
        len: usize,
        access: Access,
    ) -> std::result::Result<usize, Errno> {
        let address = mm::map(turn, self.fd(), self.file_offset(offset), len, access)?;
        self.accepted.fetch_or(bit(access), Ordering::Relaxed);
        Ok(address)
    }

    /// Makes sure that a `MAP_FIXED` mapping will be accepted, since a refusal would cost its
    /// destination: the same is mapped where the kernel likes, and unmapped.
    ///
    /// Known backings are asked once, and with one page, since a limit may allow no more; of others nobody
    /// knows what a second range would be answered.
    pub(super) fn vet(
        &self,
        offset: u64,
        len: usize,
        access: Access,
    ) -> std::result::Result<(), Errno> {
        let accepted = self.accepted.load(Ordering::Relaxed) & bit(access) != 0;
        if accepted && self.kind != BackingKind::Other {
            return Ok(());
        }
        let len = if self.kind == BackingKind::Other { len } else { sys::page_size() };
        let address = self.map(&Turn::take(), offset, len, access)?;
        // SAFETY: the mapping was made on the line above, and nobody knows of it.
        unsafe { mm::munmap(address, len) }
    }

    /// Whether the kernel accepts `DONTUNMAP` here, and whether that was remembered.
    ///
    /// Asked on a throwaway, untouched mapping of one page, without `MREMAP_FIXED`: harmless on
    /// every kernel. Only acceptance and EINVAL are remembered; other errors pass.
    pub(super) fn probe(
        &self,
        offset: u64,
        ask_again: bool,
    ) -> (std::result::Result<(), Errno>, bool) {
        if let (Some(answer), false) = (self.known(), ask_again) {
            return (answer, true);
        }
        let _one = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(answer), false) = (self.known(), ask_again) {
            return (answer, true);
        }
        let answer = self.ask(offset);
        match answer {
            Ok(()) => self.dont_unmap.store(ACCEPTED, Ordering::Relaxed),
            Err(Errno::EINVAL) => self.dont_unmap.store(REFUSED, Ordering::Relaxed),
            Err(_) => {}
        }
        (answer, false)
    }

    /// What an earlier probe was answered.
    fn known(&self) -> Option<std::result::Result<(), Errno>> {
        match self.dont_unmap.load(Ordering::Relaxed) {
            ACCEPTED => Some(Ok(())),
            REFUSED => Some(Err(Errno::EINVAL)),
            _ => None,
        }
    }

    fn ask(&self, offset: u64) -> std::result::Result<(), Errno> {
        let len = sys::page_size();
        let turn = Turn::take();
        let old = mm::map(&turn, self.fd(), self.file_offset(offset), len, Access::ReadOnly)?;
        // SAFETY: the page was mapped on the line above, and nobody knows of it; whether the old side
        // is filled again does not matter, since nobody will touch it.
        let new = unsafe { mm::dont_unmap(&turn, old, len) };
        for page in [Ok(old), new].into_iter().flatten() {
            // SAFETY: both pages are ours.
            if let Err(errno) = unsafe { mm::munmap(page, len) } {
                log::error!("leaked a page at {page:#x}: {errno}");
            }
        }
        new.map(drop)
    }

    /// Why an accepted `DONTUNMAP` of `[address, address + len)` must not be believed.
    pub(super) fn distrust_dont_unmap(
        &self,
        address: usize,
        offset: u64,
        len: usize,
    ) -> Option<Hazard> {
        match self.kind {
            BackingKind::SharedMemory => None,
            BackingKind::VfioPci => Hazard::source_may_spin(self.kernel)
                .or_else(|| Hazard::one_gib_entry(address, self.file_offset(offset), len)),
            BackingKind::Other => Some(Hazard::UnknownBacking),
        }
    }

    /// Why a plain move of `[address, address + len)` must not be made.
    pub(super) fn distrust_move(&self, address: usize, offset: u64, len: usize) -> Option<Hazard> {
        match self.kind {
            BackingKind::SharedMemory => None,
            BackingKind::VfioPci => Hazard::move_escapes_revocation(self.kernel)
                .or_else(|| Hazard::one_gib_entry(address, self.file_offset(offset), len)),
            // Nobody knows to what its offsets are congruent.
            BackingKind::Other => Hazard::move_escapes_revocation(self.kernel)
                .or_else(|| (len >= 1 << 30).then_some(Hazard::OneGibEntry)),
        }
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
