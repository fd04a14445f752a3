//! Windows: mapped ranges of a region, and what can be done with them.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

use super::register::{ReadOnly, ReadWrite, Register, RegisterArray, Width, permits};
use super::{Device, Holder, Inner as DeviceInner};
use crate::error::{Error, ErrorKind, Result, gives_back};
use crate::space::{
    Access, Backing, Control, DmaMemory, Failed, Mapping, Placement, Relocation, Report, Request,
    Reservation,
};
use crate::sys;

/// A mapped range of a region. Loads and stores reach the device.
///
/// Clones are the same window. It is unmapped when the last clone and the last register made from it
/// are dropped, and keeps its device open until then.
///
/// # Raw pointers
/// [`as_ptr`](Self::as_ptr) is for other users of the window: a hypervisor's memory slot, a C library. The
/// pointer is valid while the window, a clone or a register of it lives, and until [`relocate`](Self::relocate)
/// succeeds; after that an access to the old range raises SIGSEGV. Accesses must be single, aligned and
/// volatile. Never make a reference or a slice of it. Never pass it to `read(2)` or `write(2)`, which copy by
/// any width. Never unmap, cover or protect a part of it: Linux 6.12 to 7.3 may map it by 1 GiB page-table
/// entries, which they cannot split. Remove a memory slot that uses it before you relocate or drop the window.
///
/// # Children
/// A child of `fork(2)` does not inherit the mapping (`MADV_DONTFORK`), and anything may be mapped at its
/// addresses. `fork` is `unsafe`, and this is a part of its contract: the child does not access the window or
/// its registers. It may drop them, call `exec`, or exit.
#[must_use = "dropping its last user unmaps it"]
#[derive(Clone)]
pub struct Window {
    pub(super) inner: Arc<Inner>,
}

/// The state that a window shares with its clones and registers.
pub(super) struct Inner {
    pub(super) mapping: Mapping,
    region: u32,
    /// The offset of the window in its first page, in bytes.
    skip: usize,
    size: usize,
    /// The window's key among the holders of the device, or [`NO_SLOT`].
    slot: usize,
    /// The names of the register blocks that hold the window.
    blocks: Mutex<Slab<&'static str>>,
    device: Arc<DeviceInner>,
}

/// The key of a window that is no holder any more.
const NO_SLOT: usize = usize::MAX;

impl Drop for Inner {
    #[inline(always)]
    fn drop(&mut self) {
        // In a child of fork, the lock may be held for ever by a thread that only the parent has.
        if !self.mapping.is_inherited() {
            self.device.holders().try_remove(self.slot);
        }
    }
}

impl Window {
    /// Maps `range` of a region, rounded to pages. `Region` has checked that all of it can be mapped.
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
                .with_reason("it exceeds the address space")
                .with_advice("map parts of it as windows of their own")
        };
        let len = pages.and_then(|len| usize::try_from(len).ok()).ok_or_else(too_large)?;
        let mapping = Mapping::new(backing.clone(), offset, len, access, placement)?;
        let size = (range.end - range.start) as usize;
        Ok(Self::of(mapping, None, device, region, skip as usize, size))
    }

    /// A new window: a duplicate if there is a source.
    #[inline(always)]
    fn of(
        mapping: Mapping,
        source: Option<&Control>,
        device: &Arc<DeviceInner>,
        region: u32,
        skip: usize,
        size: usize,
    ) -> Self {
        let start = mapping.offset() + skip as u64;
        let holder = Holder::Window {
            region,
            range: start..start + size as u64,
            address: mapping.range().start,
            control: mapping.control().clone(),
        };
        let device = device.clone();
        let slot = {
            let mut holders = device.holders();
            let slot = holders.insert(holder);
            device.revoke_new(mapping.control(), source);
            slot
        };
        let blocks = Mutex::default();
        Self { inner: Arc::new(Inner { mapping, region, skip, size, slot, blocks, device }) }
    }

    /// The bytes of the region that the window covers.
    pub fn region_range(&self) -> Range<u64> {
        self.inner.region_range()
    }

    /// The region's index.
    pub fn region_index(&self) -> u32 {
        self.inner.region
    }

    /// The size in bytes.
    pub fn size(&self) -> usize {
        self.inner.size
    }

    /// The addresses of its pages, from the page of its first byte to the end of the page of its last.
    pub fn addresses(&self) -> Range<usize> {
        self.inner.mapping.range()
    }

    /// Whether the window can be written.
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
    /// `OutOfRange` if it leaves the window, `Unaligned` if it is not naturally aligned in the region,
    /// `ReadOnly` for a read-only window.
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
    pub fn register_array<T: Width>(
        &self,
        offset: usize,
        stride: usize,
        count: usize,
    ) -> Result<RegisterArray<T, ReadWrite>> {
        RegisterArray::new(self, offset, stride, count)
    }

    /// As [`register_array`](Self::register_array), for reading.
    ///
    /// # Errors
    /// As [`register_array`](Self::register_array).
    pub fn read_only_register_array<T: Width>(
        &self,
        offset: usize,
        stride: usize,
        count: usize,
    ) -> Result<RegisterArray<T, ReadOnly>> {
        RegisterArray::new(self, offset, stride, count)
    }

    /// Makes a second window over the same bytes. This window and its registers keep working.
    ///
    /// If this window, or all windows of the device, are revoked by another thread meanwhile, the new window may be
    /// revoked, too.
    ///
    /// # Errors
    /// `Refused` with the kernel's error for each strategy, `Hazard`, `UnsuitablePlacement`, `AddressTaken`,
    /// `TooManyMappings`, `AddressSpace`, `LockedMemory`; `Revoked` if this window is; `Gone` if the device was removed, or
    /// in a child of `fork(2)`. This window is unchanged, and the failure returns a reservation that was passed, except with
    /// `ReservationLost`: a failing call may have unmapped it, and what is mapped there now may belong to other
    /// code.
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
        let (duplicate, report) = mapping.duplicate(access, request)?;
        let source = Some(&**mapping.control());
        Ok((Self::of(duplicate, source, device, *region, *skip, *size), report))
    }

    /// Relocates the window to another address. Returns its old addresses as a [`Reservation`]. Another `mmap`
    /// cannot take either range at any instant, except with [`Strategy::Move`], which is used only on request.
    ///
    /// [`Strategy::Move`]: crate::space::Strategy::Move
    ///
    /// # Errors
    /// `InUse` while a clone or a register of it lives, because their addresses cannot change. A running driver
    /// calls [`duplicate`](Self::duplicate), switches to the new window, and drops the old one. Otherwise as
    /// `duplicate`. The window is unchanged. Only the reservation can be lost, as for `duplicate`.
    pub fn relocate(
        &mut self,
        request: impl Into<Request>,
    ) -> std::result::Result<Relocation, Failed> {
        let Request { placement, order, pinned } = request.into();
        let users = Arc::strong_count(&self.inner) - 1;
        let Some(inner) = Arc::get_mut(&mut self.inner) else {
            let error = in_use("relocate", &self.inner, users);
            return Err(Failed::new(error, reservation_of(placement)));
        };
        let relocation = inner.mapping.relocate(Request { placement, order, pinned })?;
        if let Some(Holder::Window { address, .. }) = inner.device.holders().get_mut(inner.slot) {
            *address = inner.mapping.range().start;
        }
        Ok(relocation)
    }

    /// Unmaps the window and returns its addresses as a reservation. Another `mmap` cannot take them at any
    /// instant.
    ///
    /// # Errors
    /// The window, with `InUse` while a clone or a register of it lives, or with the kernel's error. With
    /// `ReservationLost` there is no window: the failed call may have unmapped it, and what is mapped there now
    /// may belong to somebody else and is left alone.
    pub fn into_reservation(self) -> std::result::Result<Reservation, StillMapped> {
        let users = Arc::strong_count(&self.inner) - 1;
        let mut inner = match Arc::try_unwrap(self.inner) {
            Ok(inner) => inner,
            Err(inner) => {
                let error = in_use("unmap", &inner, users);
                return Err(StillMapped { error, window: Some(Window { inner }) });
            }
        };
        // Who changes all windows of the device must not find this one unmapped. In a child of fork, nobody does,
        // and it is not unmapped.
        let mut holders = (!inner.mapping.is_inherited()).then(|| inner.device.holders());
        let result = inner.mapping.vacate();
        if let Some(holders) = &mut holders
            && inner.mapping.is_unmapped()
        {
            holders.try_remove(std::mem::replace(&mut inner.slot, NO_SLOT));
        }
        drop(holders);
        result.map_err(|error| {
            let gone = inner.mapping.is_unmapped();
            StillMapped { error, window: (!gone).then(|| Window { inner: Arc::new(inner) }) }
        })
    }

    /// The window as memory for the DMA of another device: peer-to-peer.
    ///
    /// Type 1 containers map it by page frame, and iommufd by a [dma-buf](Self::dma_buf) that is made for the mapping
    /// (Linux 6.19; on older kernels open the other device by its group). It does not matter how this device was
    /// opened. The DMA mapping reaches this device even after the window is [revoked](Self::revoke) or dropped.
    ///
    /// A reset by this crate ([`Device::reset`](super::Device::reset)), low power and switching off memory decoding
    /// remove the mapping, and map it again when they end, or when the window is [restored](Self::restore) if it is
    /// still revoked then. If the device is reset or put to sleep by other means, for example by a function-level
    /// reset that is written to configuration space, a mapping of a type 1 container stays, and one of iommufd reaches
    /// nothing from then on: drop it and map the window again.
    pub fn dma_memory(&self) -> DmaMemory {
        let addresses = self.addresses();
        // SAFETY: the range is mapped while the window's shared state lives, and the memory holds that; no
        // reference to device memory is ever made.
        let memory =
            unsafe { DmaMemory::new(addresses.start, addresses.len(), None, self.inner.clone()) };
        if self.inner.mapping.is_shared_memory() { memory } else { memory.of_device(export) }
    }

    /// A dma-buf of the window's pages, from the page of its first byte on: for iommufd, or for another subsystem of the
    /// kernel that takes dma-bufs of vfio-pci. Each call makes a new one. [`dma_memory`](Self::dma_memory) makes its
    /// own.
    ///
    /// It is independent of the window, which may be relocated, revoked or dropped. It does not keep the device open.
    /// The kernel revokes it while the device is reset, has its memory decoding off or sleeps, and when it is closed.
    /// What iommufd has mapped of it reaches nothing from then on, even after the device is back.
    ///
    /// # Errors
    /// `Unsupported` before Linux 6.19, without CONFIG_VFIO_PCI_DMABUF, by some drivers other than vfio-pci, and for a
    /// device that is not one of Linux VFIO. `OutOfRange` for a BAR that is smaller than a page.
    pub fn dma_buf(&self) -> Result<OwnedFd> {
        self.inner.dma_buf(self.access())
    }

    /// The address of a register of `size` bytes at `offset`, after a check that it is naturally aligned and in
    /// the window.
    pub(super) fn place(&self, offset: usize, size: usize, wanted: Access) -> Result<NonNull<u8>> {
        self.place_aligned(offset, size, size, wanted)
    }

    /// The address of `size` bytes at `offset`, after a check that they are aligned and in the window.
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
                .with_reason("the window can only be read")
                .with_advice("use read_only_register, or a window that can be written"));
        }
        if offset.checked_add(size).is_none_or(|end| end > *all) {
            return Err(Error::new(ErrorKind::OutOfRange, "find", object())
                .with_reason("it leaves the window")
                .with_advice(format!(
                    "count offsets from the first byte of the window, which has {all:#x} bytes, or map a larger range"
                )));
        }
        let address = mapping.range().start + skip + offset;
        if !address.is_multiple_of(alignment) {
            let reason =
                format!("a register of {alignment} bytes lies at a multiple of {alignment}");
            let error = Error::new(ErrorKind::Unaligned, "find", object()).with_reason(reason);
            return Err(if alignment == size {
                error.with_advice("use a narrower register, or more than one")
            } else {
                error.with_advice(format!("place the block at a multiple of {alignment}"))
            });
        }
        NonNull::new(ptr::with_exposed_provenance_mut(address)).ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, "find", object())
                .with_reason("it lies at address 0")
                .with_advice("relocate the window")
        })
    }
}

/// Makes a dma-buf of the memory that a window owns.
fn export(owner: &(dyn Any + Send + Sync), access: Access) -> Result<OwnedFd> {
    match owner.downcast_ref::<Inner>() {
        Some(window) => window.dma_buf(access),
        None => Err(Error::new(ErrorKind::Unsupported, "make a dma-buf of", "memory of no window")),
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
        holders.push(format!("{others} registers, clones or DMA mappings of the window"));
    }
    Error::new(ErrorKind::InUse, operation, object)
        .with_reason(format!("it is held by {}", holders.join(", ")))
        .with_advice(
            "drop them; or duplicate the window, switch to the duplicate, and drop this one",
        )
}

impl Inner {
    pub(super) fn blocks(&self) -> MutexGuard<'_, Slab<&'static str>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn region_range(&self) -> Range<u64> {
        let start = self.mapping.offset() + self.skip as u64;
        start..start + self.size as u64
    }

    /// A dma-buf of its pages. This takes no lock of the device.
    fn dma_buf(&self, access: Access) -> Result<OwnedFd> {
        if !permits(self.mapping.access(), access) {
            let object = self.device.range_name(self.region, &self.region_range());
            return Err(Error::new(ErrorKind::ReadOnly, "map for DMA", object)
                .with_reason("the window can only be read")
                .with_advice("map it with Access::ReadOnly, or use a window that can be written"));
        }
        let offset = self.mapping.offset();
        let range = offset..offset + self.mapping.range().len() as u64;
        self.device.transport.dma_buf(self.region, range, access)
    }

    /// A value of all ones that was loaded, if the window is not revoked.
    #[cold]
    pub(super) fn check<T>(&self, value: T) -> Result<T> {
        if !self.mapping.control().is_revoked() {
            return Ok(value);
        }
        let object = self.device.range_name(self.region, &self.region_range());
        Err(Error::new(ErrorKind::Revoked, "read", object)
            .with_reason("the window is revoked, and the value is not the device's")
            .with_advice(
                "ask why: Window::revoked; if the device is back, restore it: Window::restore",
            ))
    }

    pub(super) fn device(&self) -> Device {
        Device { inner: self.device.clone() }
    }

    pub(super) fn device_inner(&self) -> &Arc<DeviceInner> {
        &self.device
    }
}

/// A window that could not be unmapped, and why.
///
/// `?` converts it into its [`Error`] and drops the window.
#[derive(Debug)]
pub struct StillMapped {
    error: Error,
    window: Option<Window>,
}

impl StillMapped {
    /// The window, unchanged; `None` if it was lost
    /// ([`ErrorKind::ReservationLost`](crate::ErrorKind::ReservationLost)).
    pub fn into_window(self) -> Option<Window> {
        self.window
    }
}

gives_back!(
    StillMapped { window: Option<Window> },
    "The error, and what [`into_window`](Self::into_window) returns."
);

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
    fn a_child_drops_and_keeps_windows_without_the_devices_lock() {
        let device = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
        let mut window = Some(device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap());
        let holders = device.inner.holders();
        // SAFETY: the child takes no lock: the test fails if it does.
        let dropped = unsafe { fork::holds_in_child(|| window.take().map(drop).is_some()) };
        drop(holders);
        assert!(dropped);
        let lock = device.inner.holders();
        let inherited = |error: &Error| error.kind() == ErrorKind::Gone;
        let refuses = || {
            let changes = [device.revoke(), device.restore(), device.bar(0).unwrap().revoke()];
            let verbs = window.iter().flat_map(|window| [window.revoke(), window.restore()]);
            changes.iter().all(|changes| changes.errors.iter().any(inherited))
                && verbs.filter_map(Result::err).filter(inherited).count() == 2
        };
        // SAFETY: as above.
        let refused = unsafe { fork::holds_in_child(refuses) };
        drop(lock);
        assert!(refused);
        assert!(window.is_some_and(|window| window.register::<u32>(0).is_ok()));
    }
}
