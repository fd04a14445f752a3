//! Windows: mapped ranges of a region, and the verbs on them.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

use super::register::{ReadOnly, ReadWrite, Register, Registers, Width, permits};
use super::{Inner as DeviceInner, Note};
use crate::error::{Error, ErrorKind, Result, gives_back};
use crate::space::{
    Access, Backing, DmaMemory, Failed, Mapping, Placement, Relocation, Report, Request,
    Reservation,
};
use crate::sys;

/// A range of a region, mapped: loads and stores reach the device.
///
/// Clones are the same window. It is unmapped when the last clone and the last register made from it
/// are dropped, and keeps its device open until then.
///
/// # Raw pointers
/// [`as_ptr`](Self::as_ptr) is for handing the window to something else: a hypervisor's memory slot, a
/// C library. What it points to is mapped as long as the window, a clone or a register of it lives,
/// and until [`relocate`](Self::relocate) succeeds: from then on the old range reaches nothing, and an
/// access there raises SIGSEGV. Accesses must be single, aligned and volatile; never make a reference
/// or a slice of it, and never pass it to `read(2)` or `write(2)`, which would copy to or from the
/// device by any width. Never unmap, cover or protect a part of it: Linux 6.12 to 7.3 may hold it by 1 GiB
/// page-table entries, which they cannot split. A memory slot that was made from it is to be removed before the window is
/// relocated or dropped.
///
/// # Children
/// A child of `fork(2)` has a hole where the window is (`MADV_DONTFORK`), and anything may come to lie
/// there. Part of the contract of calling `fork`, which is `unsafe`: the child does not touch the window
/// or its registers; it may drop them, call `exec`, or exit.
#[derive(Clone)]
pub struct Window {
    pub(super) inner: Arc<Inner>,
}

/// What clones of a window and its registers share.
pub(super) struct Inner {
    pub(super) mapping: Mapping,
    region: u32,
    /// Where the window begins within its first page, in bytes.
    skip: usize,
    size: usize,
    /// Where the device has noted the window.
    slot: usize,
    /// The names of the register blocks that hold the window.
    blocks: Mutex<Slab<&'static str>>,
    device: Arc<DeviceInner>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // In a child the notes may be locked for good, by a thread that only the parent has.
        if !self.mapping.is_inherited() {
            self.device.notes().try_remove(self.slot);
        }
    }
}

impl Window {
    /// Maps `range` of a region, page-rounded. The bar has checked that all of it can be mapped.
    pub(super) fn map(
        device: &Arc<DeviceInner>,
        region: u32,
        backing: &Arc<Backing>,
        range: Range<u64>,
        access: Access,
        placement: Placement,
    ) -> std::result::Result<Self, Failed> {
        let page = sys::page_size() as u64;
        let skip = range.start % page;
        let offset = range.start - skip;
        let pages = range.end.checked_next_multiple_of(page).map(|end| end - offset);
        let too_large = || {
            let object = device.range_name(region, &range);
            Error::new(ErrorKind::OutOfRange, "map", object)
                .because("there is no such address space")
                .remedy("map parts of it, as windows of their own")
        };
        let len = pages.and_then(|len| usize::try_from(len).ok()).ok_or_else(too_large)?;
        let mapping = Mapping::new(backing.clone(), offset, len, access, placement)?;
        let size = (range.end - range.start) as usize;
        Ok(Self::of(mapping, device, region, skip as usize, size))
    }

    #[inline(always)]
    fn of(
        mapping: Mapping,
        device: &Arc<DeviceInner>,
        region: u32,
        skip: usize,
        size: usize,
    ) -> Self {
        let blocks = Mutex::default();
        let mut inner =
            Inner { mapping, region, skip, size, slot: 0, blocks, device: device.clone() };
        inner.slot = device.notes().insert(inner.note());
        Self { inner: Arc::new(inner) }
    }

    /// The bytes of the region that it shows.
    pub fn region_range(&self) -> Range<u64> {
        self.inner.region_range()
    }

    /// The region's index.
    pub fn region(&self) -> u32 {
        self.inner.region
    }

    /// The size in bytes.
    pub fn size(&self) -> usize {
        self.inner.size
    }

    /// The addresses that its pages take: from the page that holds its first byte to the end of the
    /// page that holds its last.
    pub fn addresses(&self) -> Range<usize> {
        self.inner.mapping.range()
    }

    /// Whether it can be written.
    pub fn access(&self) -> Access {
        self.inner.mapping.access()
    }

    /// Points to the window's first byte: see [raw pointers](Self#raw-pointers).
    pub fn as_ptr(&self) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.inner.mapping.range().start + self.inner.skip)
    }

    /// The register of `T` at `offset` bytes into the window.
    ///
    /// # Errors
    /// `OutOfRange` where it leaves the window, `Unaligned` where it is not naturally aligned in the
    /// region, `ReadOnly` for a read-only window.
    pub fn register<T: Width>(&self, offset: usize) -> Result<Register<T>> {
        Register::new(self, offset)
    }

    /// The register of `T` at `offset` bytes into the window, for reading.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    pub fn read_only_register<T: Width>(&self, offset: usize) -> Result<Register<T, ReadOnly>> {
        Register::new(self, offset)
    }

    /// `count` registers of `T` from `offset` on, `stride` bytes apart.
    ///
    /// # Errors
    /// As [`register`](Self::register); `Unaligned` for a stride that makes them overlap.
    pub fn registers<T: Width>(
        &self,
        offset: usize,
        stride: usize,
        count: usize,
    ) -> Result<Registers<T, ReadWrite>> {
        Registers::new(self, offset, stride, count)
    }

    /// As [`registers`](Self::registers), for reading.
    ///
    /// # Errors
    /// As [`registers`](Self::registers).
    pub fn read_only_registers<T: Width>(
        &self,
        offset: usize,
        stride: usize,
        count: usize,
    ) -> Result<Registers<T, ReadOnly>> {
        Registers::new(self, offset, stride, count)
    }

    /// Makes a second window over the same bytes. Both live; registers of this one go on working.
    ///
    /// # Errors
    /// `Refused` with what each strategy was answered, `Hazard`, `UnsuitablePlacement`,
    /// `AddressTaken`, `TooManyMappings`, `AddressSpace`, `LockedMemory`. This window is as it was, and a
    /// reservation comes back with the failure.
    pub fn duplicate(
        &self,
        request: impl Into<Request>,
    ) -> std::result::Result<(Window, Report), Failed> {
        self.duplicate_as(self.access(), request.into())
    }

    /// Makes a second window that can only be read.
    ///
    /// # Errors
    /// As [`duplicate`](Self::duplicate).
    pub fn duplicate_read_only(
        &self,
        request: impl Into<Request>,
    ) -> std::result::Result<(Window, Report), Failed> {
        self.duplicate_as(Access::ReadOnly, request.into())
    }

    fn duplicate_as(
        &self,
        access: Access,
        request: Request,
    ) -> std::result::Result<(Window, Report), Failed> {
        let Inner { mapping, region, skip, size, device, .. } = &*self.inner;
        let (mapping, report) = mapping.duplicate(access, request)?;
        Ok((Self::of(mapping, device, *region, *skip, *size), report))
    }

    /// Takes the window to another address. Its old addresses come back as a [`Reservation`]; at no
    /// instant is either range a hole that another `mmap` could take (but for [`Strategy::Move`],
    /// which is never taken unasked).
    ///
    /// [`Strategy::Move`]: crate::space::Strategy::Move
    ///
    /// # Errors
    /// `InUse` while a clone or a register of it lives: their addresses cannot change under them. A
    /// driver that runs hands over by [`duplicate`](Self::duplicate), switching, and dropping the old
    /// window. Otherwise as `duplicate`. The window is as it was.
    pub fn relocate(
        &mut self,
        request: impl Into<Request>,
    ) -> std::result::Result<Relocation, Failed> {
        let Request { placement, strategies, pinned } = request.into();
        let users = Arc::strong_count(&self.inner) - 1;
        let Some(inner) = Arc::get_mut(&mut self.inner) else {
            let error = in_use("relocate", &self.inner, users);
            return Err(Failed::new(error, reservation_of(placement)));
        };
        let relocation = inner.mapping.relocate(Request { placement, strategies, pinned })?;
        if let Some(note) = inner.device.notes().get_mut(inner.slot) {
            *note = inner.note();
        }
        Ok(relocation)
    }

    /// Unmaps the window and gives its addresses back, reserved: they are no hole for an instant.
    ///
    /// # Errors
    /// The window, with `InUse` while a clone or a register of it lives, or with what the kernel
    /// answered. No window only with `ReservationLost`: a failing call may have unmapped it, and what is
    /// mapped there now is another's, or cannot be told from another's and is left alone.
    pub fn into_reservation(self) -> std::result::Result<Reservation, StillMapped> {
        let users = Arc::strong_count(&self.inner) - 1;
        let mut inner = match Arc::try_unwrap(self.inner) {
            Ok(inner) => inner,
            Err(inner) => {
                let error = in_use("unmap", &inner, users);
                return Err(StillMapped { error, window: Some(Window { inner }) });
            }
        };
        inner.mapping.vacate().map_err(|error| {
            let gone = inner.mapping.is_unmapped();
            StillMapped { error, window: (!gone).then(|| Window { inner: Arc::new(inner) }) }
        })
    }

    /// The window as memory that another device may reach: peer-to-peer.
    ///
    /// Type 1 containers map it by page frame: the mapping goes on reaching this device whatever
    /// becomes of the window, so unmap it before this device is reset. iommufd refuses it.
    pub fn dma_memory(&self) -> DmaMemory {
        let addresses = self.addresses();
        // SAFETY: mapped while the window's shared part lives, which it is given; no reference to
        // device memory is ever made.
        let memory =
            unsafe { DmaMemory::new(addresses.start, addresses.len(), None, self.inner.clone()) };
        if self.inner.mapping.is_shared_memory() { memory } else { memory.of_device() }
    }

    /// Where a register of `size` bytes at `offset` lies, naturally aligned and within the window.
    pub(super) fn place(&self, offset: usize, size: usize, wanted: Access) -> Result<NonNull<u8>> {
        self.place_aligned(offset, size, size, wanted)
    }

    /// Where `size` bytes at `offset` lie, aligned and within the window.
    pub(super) fn place_aligned(
        &self,
        offset: usize,
        size: usize,
        alignment: usize,
        wanted: Access,
    ) -> Result<NonNull<u8>> {
        let Inner { mapping, skip, size: all, .. } = &*self.inner;
        let object = || format!("{size} bytes at {offset:#x} of {self:?}");
        if !permits(mapping.access(), wanted) {
            return Err(Error::new(ErrorKind::ReadOnly, "write", object())
                .because("the window can only be read")
                .remedy("use read_only_register, or a window that can be written"));
        }
        if offset.checked_add(size).is_none_or(|end| end > *all) {
            return Err(Error::new(ErrorKind::OutOfRange, "find", object())
                .because("it leaves the window")
                .remedy(format!(
                    "offsets count from the window's first byte, of {all:#x}; map a larger range"
                )));
        }
        let address = mapping.range().start + skip + offset;
        if !address.is_multiple_of(alignment) {
            let reason =
                format!("a register of {alignment} bytes lies at a multiple of {alignment}");
            let error = Error::new(ErrorKind::Unaligned, "find", object()).because(reason);
            return Err(if alignment == size {
                error.remedy("use a narrower register, or several")
            } else {
                error.remedy(format!("place the block at a multiple of {alignment}"))
            });
        }
        NonNull::new(ptr::with_exposed_provenance_mut(address)).ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, "find", object())
                .because("it lies at address 0")
                .remedy("relocate the window")
        })
    }
}

fn reservation_of(placement: Placement) -> Option<Reservation> {
    match placement {
        Placement::In(reservation) => Some(reservation),
        Placement::Anywhere | Placement::At(_) => None,
    }
}

fn in_use(operation: &'static str, inner: &Inner, users: usize) -> Error {
    let object = inner.device.range_name(inner.region, &inner.region_range());
    let mut holders: Vec<String> =
        inner.blocks().iter().map(|(_, name)| format!("the register block {name}")).collect();
    let others = users.saturating_sub(holders.len());
    if others > 0 || holders.is_empty() {
        holders.push(format!("{others} registers or clones of the window"));
    }
    Error::new(ErrorKind::InUse, operation, object)
        .because(format!("it is held by {}", holders.join(", ")))
        .remedy("drop them; or duplicate the window, switch over, and drop this one")
}

impl Inner {
    pub(super) fn blocks(&self) -> MutexGuard<'_, Slab<&'static str>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn region_range(&self) -> Range<u64> {
        let start = self.mapping.offset() + self.skip as u64;
        start..start + self.size as u64
    }

    fn note(&self) -> Note {
        let (region, range) = (self.region, self.region_range());
        Note::Window { region, range, address: self.mapping.range().start }
    }
}

/// A window that could not be unmapped, and why.
///
/// Converts into its [`Error`] with `?`; the window is then dropped.
#[derive(Debug)]
pub struct StillMapped {
    error: Error,
    window: Option<Window>,
}

impl StillMapped {
    /// Why it is mapped.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The window, as it was; `None` where it was lost
    /// ([`ErrorKind::ReservationLost`](crate::ErrorKind::ReservationLost)).
    pub fn into_window(self) -> Option<Window> {
        self.window
    }
}

gives_back!(StillMapped);

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { region, device, .. } = &*self.inner;
        let name = device.range_name(*region, &self.region_range());
        write!(f, "Window({name} at {:p}, {:?})", self.as_ptr(), self.access())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::sys::fork;
    use crate::transport::MemoryDevice;

    #[test]
    fn a_child_drops_a_window_without_its_devices_lock() {
        let device = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
        let mut window = Some(device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap());
        let notes = device.inner.notes();
        // SAFETY: the child takes no lock, which is what the test shows.
        let dropped = unsafe { fork::holds_in_child(|| window.take().map(drop).is_some()) };
        drop(notes);
        assert!(dropped);
        assert!(window.is_some_and(|window| window.register::<u32>(0).is_ok()));
    }
}
