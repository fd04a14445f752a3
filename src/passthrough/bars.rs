//! The BARs that a guest sees.

use std::ops::Range;

use super::aperture::{Apertures, Claim, Space};
use super::device::Action;
use super::span::{Slot, SlotMemory, Span, SpanId};
use super::warnings::{Cause, Warnings};
use crate::Device;
use crate::device::{BarKind, DmaSpace};
use crate::error::{Error, ErrorKind, Result};
use crate::space::Report;
use crate::transport::region_index::ROM;

/// The offsets of the first BAR and of the expansion ROM in configuration space (PCI 3.0 §6.1).
const BAR0: usize = 0x10;
const ROM_REGISTER: usize = 0x30;

/// More spans than any BAR has. Those beyond are trapped.
const MAX_SPANS: usize = 64;

/// The register of a BAR, or of the expansion ROM.
#[derive(Clone, Copy, Debug)]
pub(super) struct BarRegister {
    /// The index of its region.
    pub(super) region: u32,
    /// Its offset in configuration space.
    pub(super) register: usize,
    pub(super) kind: BarKind,
    /// The bits that say of which kind it is.
    pub(super) flags: u32,
    /// The bits that can be written: those of the address, and that which enables a ROM.
    pub(super) writable: u64,
    /// How many bytes the guest finds when it sizes the BAR: a power of two.
    pub(super) size: u64,
}

/// A BAR and where it is.
#[derive(Debug)]
pub(super) struct Bar<S> {
    pub(super) register: BarRegister,
    /// How many bytes the region has. The rest of the BAR reads as ones.
    pub(super) region_size: u64,
    spans: Vec<Placed<S>>,
    /// Where it responds.
    pub(super) claim: Option<Claim>,
    /// Where it responded before: spans of it are still there.
    leaving: Vec<Claim>,
}

/// A mappable span.
#[derive(Debug)]
struct Placed<S> {
    /// Its bytes in the BAR.
    range: Range<u64>,
    state: State<S>,
    /// The address at which it could not be mapped: it stays trapped there.
    failed: Option<u64>,
}

#[derive(Debug)]
enum State<S> {
    /// The guest's accesses are trapped.
    Unmapped,
    Mapped(Span),
    Slotted(Slot<S>),
}

impl BarRegister {
    /// `None` if no such register could say how large it is.
    fn new(region: u32, kind: BarKind, region_size: u64) -> Option<Self> {
        let (smallest, largest, flags) = match kind {
            BarKind::Io => (4, 1 << 16, 1),
            BarKind::Memory { is_64_bit, prefetchable } => {
                let flags = if is_64_bit { 4 } else { 0 } | if prefetchable { 8 } else { 0 };
                (16, if is_64_bit { 1 << 62 } else { 1 << 31 }, flags)
            }
        };
        let is_rom = region == ROM;
        let smallest = if is_rom { 1 << 11 } else { smallest };
        let size = region_size.checked_next_power_of_two()?.max(smallest);
        let register = if is_rom { ROM_REGISTER } else { BAR0 + 4 * region as usize };
        let writable = !(size - 1) | u64::from(is_rom);
        let this = Self { region, register, kind, flags, writable, size };
        let bits = if this.bytes() == 8 { u64::MAX } else { u32::MAX.into() };
        (size <= largest).then_some(Self { writable: writable & bits, ..this })
    }

    /// How many bytes the register has.
    pub(super) fn bytes(&self) -> usize {
        if matches!(self.kind, BarKind::Memory { is_64_bit: true, .. }) { 8 } else { 4 }
    }

    pub(super) fn is_io(&self) -> bool {
        self.kind == BarKind::Io
    }

    pub(super) fn is_rom(&self) -> bool {
        self.region == ROM
    }

    pub(super) fn space(&self) -> Space {
        if self.is_io() { Space::Ports } else { Space::Memory }
    }
}

impl<S> State<S> {
    /// The guest-physical address at which it is mapped.
    fn guest(&self) -> Option<u64> {
        match self {
            Self::Unmapped => None,
            Self::Mapped(span) => span.guest(),
            Self::Slotted(slot) => slot.guest(),
        }
    }
}

impl<S> Bar<S> {
    pub(super) fn has(&self, span: SpanId) -> bool {
        self.register.region == u32::from(span.bar)
    }

    /// How many of `len` bytes at `offset` the region has.
    pub(super) fn inside(&self, offset: u64, len: usize) -> usize {
        let left = self.region_size.saturating_sub(offset);
        len.min(usize::try_from(left).unwrap_or(usize::MAX))
    }

    /// Ends the claim to another address than `wanted`. The address stays occupied while spans are there.
    pub(super) fn leave_unless(&mut self, wanted: Option<u64>) {
        if let Some(claim) = self.claim.take_if(|claim| Some(claim.start()) != wanted) {
            self.leaving.push(claim);
        }
        self.leave();
    }

    /// Gives up addresses at which no span is left.
    fn leave(&mut self) {
        let spans = &self.spans;
        self.leaving.retain(|claim| {
            let is_there = |at: u64| claim.offset_of(Space::Memory, at).is_some();
            spans.iter().filter_map(|span| span.state.guest()).any(is_there)
        });
    }

    /// Claims the address `wanted`, unless it is outside of the apertures or occupied.
    pub(super) fn enter(&mut self, apertures: &Apertures, wanted: Option<u64>) {
        let Some(wanted) = wanted.filter(|_| self.claim.is_none()) else { return };
        let own = self.leaving.iter().position(|claim| claim.start() == wanted);
        let claim = own.map(|own| self.leaving.swap_remove(own));
        self.claim =
            claim.or_else(|| apertures.claim(self.register.space(), wanted, self.register.size));
    }

    /// Adds what brings each span to its place.
    pub(super) fn plan(&mut self, is_gone: bool, actions: &mut Vec<Action>) {
        let start = self.claim.as_ref().map(Claim::start);
        for (index, span) in (0..).zip(&mut self.spans) {
            let id = SpanId { bar: self.register.region as u8, index };
            let target = start.map(|start| start + span.range.start);
            span.failed = span.failed.filter(|failed| Some(*failed) == target);
            let is_mapped = !matches!(span.state, State::Unmapped);
            let is_there = span.state.guest() == target && !(is_gone && is_mapped);
            if is_there || span.failed.is_some() && !is_mapped {
                continue;
            }
            if matches!(span.state, State::Slotted(_)) {
                actions.push(Action::RemoveSlot(id));
            }
            actions.push(Action::Relocate(id));
            if target.is_some() {
                actions.push(Action::AddSlot(id));
            }
        }
    }

    /// The address that a span belongs to, and the span.
    fn span(&mut self, id: SpanId) -> Option<(Option<u64>, &mut Placed<S>)> {
        let span = self.spans.get_mut(usize::from(id.index))?;
        Some((self.claim.as_ref().map(|claim| claim.start() + span.range.start), span))
    }

    pub(super) fn remove_slot<E>(
        &mut self,
        id: SpanId,
        remove: impl FnOnce(&S) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let Some((_, Placed { state, .. })) = self.span(id) else { return Ok(()) };
        match std::mem::replace(state, State::Unmapped) {
            State::Slotted(slot) => match slot.remove(remove) {
                Ok(span) => *state = State::Mapped(span),
                Err((error, slot)) => {
                    *state = State::Slotted(slot);
                    return Err(error);
                }
            },
            other => *state = other,
        }
        Ok(())
    }

    pub(super) fn relocate(
        &mut self,
        id: SpanId,
        device: &Device,
        apertures: &Apertures,
        is_gone: bool,
    ) -> Result<Option<Report>> {
        let region = device.region(self.register.region)?;
        let Some((target, span)) = self.span(id) else { return Ok(None) };
        let unmap = |mapped: Span| match mapped.unmap(apertures) {
            Err(Some(mapped)) => State::Mapped(mapped),
            Ok(()) | Err(None) => State::Unmapped,
        };
        let (state, done) = match (std::mem::replace(&mut span.state, State::Unmapped), target) {
            (State::Slotted(slot), _) => {
                let error = Error::new(ErrorKind::InUse, "relocate", id.to_string())
                    .with_reason("a memory slot uses it")
                    .with_advice("remove the slot first: GuestDevice::remove_slot");
                (State::Slotted(slot), Err(error))
            }
            (State::Mapped(mapped), _) if is_gone => (unmap(mapped), Ok(None)),
            (State::Mapped(mut mapped), _) if mapped.guest() != target => {
                match mapped.relocate(apertures, target) {
                    Ok(report) => (State::Mapped(mapped), Ok(Some(report))),
                    Err(error) => (unmap(mapped), Err(error)),
                }
            }
            (State::Unmapped, Some(guest)) => {
                match Span::map(&region, span.range.clone(), apertures, guest) {
                    Ok(mapped) => (State::Mapped(mapped), Ok(None)),
                    Err(error) => (State::Unmapped, Err(error)),
                }
            }
            (other, _) => (other, Ok(None)),
        };
        span.state = state;
        span.failed = target.filter(|_| done.is_err());
        self.leave();
        done
    }

    /// Maps the spans that have slots for the DMA of these devices, and no longer for others.
    pub(super) fn set_peers(&mut self, peers: &[DmaSpace], warnings: &mut Warnings) {
        for span in &mut self.spans {
            if let State::Slotted(slot) = &mut span.state {
                slot.set_peers(peers, |error| warnings.warn(Cause::Peers, &error));
            }
        }
    }

    pub(super) fn add_slot<E>(
        &mut self,
        id: SpanId,
        peers: &[DmaSpace],
        warnings: &mut Warnings,
        add: impl FnOnce(&SlotMemory) -> std::result::Result<S, E>,
    ) -> std::result::Result<(), E> {
        let Some((target, Placed { state, .. })) = self.span(id) else { return Ok(()) };
        match std::mem::replace(state, State::Unmapped) {
            State::Mapped(mapped) if target.is_some() && mapped.guest() == target => {
                match mapped.into_slot(add) {
                    Ok(mut slot) => {
                        slot.set_peers(peers, |error| warnings.warn(Cause::Peers, &error));
                        *state = State::Slotted(slot);
                    }
                    Err((error, mapped)) => {
                        *state = State::Mapped(mapped);
                        return error.map_or(Ok(()), Err);
                    }
                }
            }
            other => *state = other,
        }
        Ok(())
    }
}

/// The BARs of a device, and its expansion ROM. One that no register can describe is left out, with a warning.
pub(super) fn find<S>(device: &Device) -> Result<Vec<Bar<S>>> {
    let config = device.config()?;
    let mut bars = Vec::new();
    for region in device.regions().filter(|region| region.index() <= ROM) {
        let index = region.index();
        let kind = if index == ROM {
            Some(BarKind::Memory { is_64_bit: false, prefetchable: false })
        } else {
            config.bar_kind(index)?
        };
        let is_wide = matches!(kind, Some(BarKind::Memory { is_64_bit: true, .. }));
        let register = kind.and_then(|kind| BarRegister::new(index, kind, region.size()));
        let Some(register) = register.filter(|_| !(is_wide && index == 5)) else {
            log::warn!("the guest does not see {region:?}: no register can describe it");
            continue;
        };
        let page = device.page_size();
        // A smaller BAR shares its page with others.
        let is_mappable = register.size >= page && region.info().readable && index < ROM;
        let whole = |part: Range<u64>| part.start..part.end - part.end % page;
        let parts = region.layout().mappable().map(whole).filter(|part| !part.is_empty());
        let place = |range| Placed { range, state: State::Unmapped, failed: None };
        let spans = parts.take(if is_mappable { MAX_SPANS } else { 0 }).map(place).collect();
        let region_size = region.size();
        bars.push(Bar { register, region_size, spans, claim: None, leaving: Vec::new() });
    }
    Ok(bars)
}
