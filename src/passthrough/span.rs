//! Mapped spans of BARs, and the memory slots of a hypervisor over them.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::Range;

use super::aperture::Apertures;
use crate::device::{DmaMapping, DmaSpace, Iova, IovaPlacement};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, Placement, Report};
use crate::{Region, Window};

/// A part of a BAR that is mapped as one window, and shown to the guest by one memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpanId {
    /// The BAR, 0 to 5.
    pub bar: u8,
    /// The number of the span in its BAR.
    pub index: u8,
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "span {} of bar {}", self.index, self.bar)
    }
}

/// What a hypervisor maps: these bytes of this process, at this address of the guest. All are multiples of the page
/// size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlotMemory {
    /// The guest-physical address.
    pub guest: u64,
    /// The address in this process.
    pub host: usize,
    /// The size in bytes.
    pub size: usize,
    /// Whether the guest can only read it.
    pub read_only: bool,
}

/// A mapped span of a BAR that no hypervisor uses.
///
/// It can be relocated. A [`Slot`] cannot:
///
/// ```compile_fail,E0599
/// # use vfio_remap::passthrough::{Apertures, Slot, Span};
/// fn relocate(slot: &mut Slot<u32>, apertures: &Apertures) {
///     let _ = slot.relocate(apertures, Some(0xc000_0000));
/// }
/// ```
#[derive(Debug)]
pub struct Span {
    window: Window,
    /// Its guest-physical address, if it is in an aperture.
    guest: Option<u64>,
}

/// A span that a hypervisor uses, and what is needed to remove the memory slot.
///
/// It owns the span, so that the span can be neither relocated nor unmapped until [`remove`](Self::remove) returns it.
/// If it is dropped instead, the span stays mapped for ever, because the hypervisor may still use it.
#[derive(Debug)]
#[must_use = "dropping it leaks the span"]
pub struct Slot<S> {
    /// A drop of the slot leaks it.
    span: ManuallyDrop<Span>,
    key: S,
    peers: Vec<DmaMapping>,
}

impl Span {
    /// Maps `range` of a BAR at its place in an aperture.
    ///
    /// # Errors
    /// As [`Region::map`]; `AddressTaken` if another span has the place; `OutOfRange` if no aperture contains it, or the
    /// range ends before it begins.
    pub fn map(
        bar: &Region<'_>,
        range: Range<u64>,
        apertures: &Apertures,
        guest: u64,
    ) -> Result<Self> {
        let Some(size) = range.end.checked_sub(range.start) else {
            let object = format!("{:#x}..{:#x} of {bar:?}", range.start, range.end);
            return Err(Error::new(ErrorKind::OutOfRange, "map", object)
                .with_reason("the range ends before it begins"));
        };
        let place = apertures.take(guest..guest.saturating_add(size))?;
        match bar.map(range, Placement::In(place)) {
            Ok(window) => Ok(Self { window, guest: Some(guest) }),
            Err(failed) => {
                let (error, place) = failed.into_parts();
                place.into_iter().for_each(|place| apertures.give(place));
                Err(error)
            }
        }
    }

    /// The guest-physical address; `None` if it is outside of the apertures.
    pub fn guest(&self) -> Option<u64> {
        self.guest
    }

    /// Relocates the window to its place in an aperture for this guest-physical address, or, for `None`, out of the
    /// apertures.
    ///
    /// # Errors
    /// As [`Window::relocate`], and [`map`](Self::map). The span has not moved.
    pub fn relocate(&mut self, apertures: &Apertures, guest: Option<u64>) -> Result<Report> {
        let placement = match guest {
            Some(at) => {
                let end = at.saturating_add(self.window.addresses().len() as u64);
                Placement::In(apertures.take(at..end)?)
            }
            None => Placement::Anywhere,
        };
        match self.window.relocate(placement) {
            Ok(moved) => {
                self.guest = guest;
                moved.old.into_iter().for_each(|old| apertures.give(old));
                Ok(moved.report)
            }
            Err(failed) => {
                let (error, place) = failed.into_parts();
                place.into_iter().for_each(|place| apertures.give(place));
                Err(error)
            }
        }
    }

    /// Unmaps the window, and gives its place back.
    ///
    /// # Errors
    /// The span, if something else uses its window; `None` if it was lost.
    pub fn unmap(self, apertures: &Apertures) -> std::result::Result<(), Option<Self>> {
        match self.window.into_reservation() {
            Ok(place) => {
                apertures.give(place);
                Ok(())
            }
            Err(still) => {
                log::warn!("{still}");
                Err(still.into_window().map(|window| Self { window, guest: self.guest }))
            }
        }
    }

    /// Has the hypervisor add a memory slot for the span.
    ///
    /// # Errors
    /// The span, with the error of `add`, or with `None` if it is outside of the apertures.
    pub fn into_slot<S, E>(
        self,
        add: impl FnOnce(&SlotMemory) -> std::result::Result<S, E>,
    ) -> std::result::Result<Slot<S>, (Option<E>, Self)> {
        let Some(guest) = self.guest else { return Err((None, self)) };
        let addresses = self.window.addresses();
        let read_only = self.window.access() == Access::ReadOnly;
        let memory = SlotMemory { guest, host: addresses.start, size: addresses.len(), read_only };
        match add(&memory) {
            Ok(key) => Ok(Slot { span: ManuallyDrop::new(self), key, peers: Vec::new() }),
            Err(error) => Err((Some(error), self)),
        }
    }
}

impl<S> Slot<S> {
    /// The guest-physical address.
    pub fn guest(&self) -> Option<u64> {
        self.span.guest()
    }

    /// Maps the span for the DMA of another device, at its guest-physical address, until the slot is removed.
    ///
    /// # Errors
    /// As [`DmaSpace::map`]; those of [`Window::dma_buf`] if the other device was opened by its own file (iommufd).
    pub fn map_for(&mut self, peer: &DmaSpace) -> Result<()> {
        let Span { window, guest: Some(guest) } = &*self.span else { return Ok(()) };
        let placement = IovaPlacement::At(Iova(*guest));
        self.peers.push(peer.map(window.dma_memory(), placement, window.access())?);
        Ok(())
    }

    /// Maps the span for the DMA of these devices, as [`map_for`](Self::map_for), and no longer for others. `failed` is
    /// told of each that cannot be mapped.
    pub(super) fn set_peers(&mut self, peers: &[DmaSpace], mut failed: impl FnMut(Error)) {
        // First: a new one may be in the address space of an old one, at the same address.
        self.peers.retain(|mapping| peers.iter().any(|peer| mapping.is_of(peer)));
        for peer in peers {
            if self.peers.iter().any(|mapping| mapping.is_of(peer)) {
                continue;
            }
            if let Err(error) = self.map_for(peer) {
                failed(error);
            }
        }
    }

    /// Has the hypervisor remove the slot, and returns the span. Other devices do not reach it any more.
    ///
    /// # Errors
    /// The slot, unchanged, with the error of `remove`.
    pub fn remove<E>(
        self,
        remove: impl FnOnce(&S) -> std::result::Result<(), E>,
    ) -> std::result::Result<Span, (E, Self)> {
        match remove(&self.key) {
            Ok(()) => Ok(ManuallyDrop::into_inner(self.span)),
            Err(error) => Err((error, self)),
        }
    }
}
