//! The device that a guest sees.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::aperture::{Apertures, Space};
use super::bars::{self, Bar};
use super::config::{VirtualConfig, pieces};
use super::interrupts::{Interrupts, Message};
use super::msix::{MsixTable, Reached};
use super::span::{SlotMemory, SpanId};
use super::warnings::{Cause, Warnings};
use crate::Device;
use crate::device::{DmaSpace, Interrupt, Outage, StillInUse};
use crate::error::Result;
use crate::space::Report;

/// What the monitor has to do.
///
/// Perform a list of them in its order, and all of it before the next call of the device that returns one: what is
/// returned later assumes that it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Remove the memory slot of a span: [`GuestDevice::remove_slot`].
    RemoveSlot(SpanId),
    /// Move the window of a span to its place in an aperture, or out of it: [`GuestDevice::relocate`].
    Relocate(SpanId),
    /// Add a memory slot for a span: [`GuestDevice::add_slot`].
    AddSlot(SpanId),
    /// Deliver what [`GuestDevice::eventfd`] of this vector signals as this message. In KVM, set a route of an
    /// interrupt number (`KVM_SET_GSI_ROUTING`), and connect the eventfd to the number (`KVM_IRQFD`).
    Connect {
        /// The vector.
        vector: u32,
        /// The message.
        message: Message,
    },
    /// The vector is connected; its message has changed.
    Reroute {
        /// The vector.
        vector: u32,
        /// The new message.
        message: Message,
    },
    /// Deliver the vector no longer, and leave the counter of its eventfd alone. If the guest has masked the vector,
    /// what is signalled meanwhile must be delivered when it is connected again, as `KVM_IRQFD` does.
    Disconnect {
        /// The vector.
        vector: u32,
    },
    /// Deliver the INTx: its eventfds are [`GuestDevice::intx_eventfds`] (`KVM_IRQFD_FLAG_RESAMPLE`).
    ConnectIntx,
    /// Deliver the INTx no longer.
    DisconnectIntx,
    /// Reset the device: [`GuestDevice::reset`]. Earlier actions of the list have removed its slots and interrupts.
    Reset,
}

/// A device that is passed through to a guest: see the [module](super).
///
/// `S` is what the monitor needs to remove a memory slot. For KVM it is the slot's number.
#[derive(Debug)]
pub struct GuestDevice<S = u32> {
    config: VirtualConfig,
    bars: Vec<Bar<S>>,
    msix: Option<MsixTable>,
    interrupts: Interrupts,
    peers: Vec<DmaSpace>,
    /// Whether the device itself may start transactions; `None` if that is not known, because a write has failed.
    bus_mastering: Option<bool>,
    /// [`Apertures::vacated`] when BARs were placed.
    vacated: u64,
    apertures: Apertures,
    warnings: Warnings,
    device: Device,
}

impl<S> GuestDevice<S> {
    /// The device as the guest finds it after power on: no BAR has an address, and decoding is off.
    ///
    /// Enables memory decoding of the device itself, which stays on: what the guest disables is its own copy, so that
    /// no access of this process or of a guest's processor faults. The device is not reset here. If opening it has not
    /// done that ([`DeviceInfo::reset_at_open`](crate::transport::DeviceInfo::reset_at_open)), reset it before.
    ///
    /// # Errors
    /// `Unsupported` if it is not a PCI device, or a bridge; `Malformed` if its capabilities or regions are; the
    /// transport's error.
    pub fn new(device: Device, apertures: &Apertures) -> Result<Self> {
        let bars = bars::find(&device)?;
        let registers: Vec<_> = bars.iter().map(|bar| bar.register).collect();
        let config = VirtualConfig::new(&device, &registers)?;
        let msix = device.config()?.msix()?.map(MsixTable::new);
        let mut this = Self {
            config,
            bars,
            msix,
            interrupts: Interrupts::new(device.name()),
            warnings: Warnings::new(device.name()),
            peers: Vec::new(),
            bus_mastering: None,
            vacated: 0,
            apertures: apertures.clone(),
            device,
        };
        this.enable_decoding()?;
        this.bus_mastering = Some(false);
        Ok(this)
    }

    fn enable_decoding(&self) -> Result<()> {
        let config = self.device.config()?;
        config.set_bus_mastering(false)?;
        if self.bars.iter().any(|bar| bar.register.is_io()) {
            config.set_io_decoding(true)?;
        }
        config.set_memory_decoding(true)
    }

    /// Lets these devices reach the spans that have slots by DMA, at their guest-physical addresses (peer-to-peer), and
    /// others no longer. The mappings follow a BAR that moves.
    ///
    /// The mappings keep the other devices open: before one of them is closed, call this without its space. An address
    /// space that several devices share is passed once. iommufd maps BARs since Linux 6.19; on older kernels a warning is
    /// logged, and the other devices are opened by their groups.
    pub fn set_peers(&mut self, spaces: Vec<DmaSpace>) {
        self.peers = spaces;
        for bar in &mut self.bars {
            bar.set_peers(&self.peers, &mut self.warnings);
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What to do before the guest runs: an INTx is enabled from the start.
    #[must_use = "perform the actions: until then the device is not where the guest expects it"]
    pub fn start(&mut self) -> Vec<Action> {
        self.update()
    }

    /// Reads configuration space. Any offset and length are valid. Bytes past the end read as ones, and so do all of
    /// them after [`release`](Self::release).
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(&self.device, offset, data);
    }

    /// Writes configuration space. Any offset and length are valid. Returns what to do, mostly nothing.
    #[must_use = "perform the actions: until then the device is not where the guest expects it"]
    pub fn write_config(&mut self, offset: u64, data: &[u8]) -> Vec<Action> {
        if self.config.write(&self.device, offset, data) { self.restart() } else { self.update() }
    }

    /// Reads memory at a guest-physical address for the guest, if one of the BARs is there. Otherwise returns false.
    /// All parts of a BAR can be read, also those that are mapped. What the device does not answer reads as ones.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        self.read_at(Space::Memory, address, data)
    }

    /// Writes memory, as [`read_memory`](Self::read_memory) reads it. `None` if none of the BARs is there.
    #[must_use = "perform the actions: until then the device is not where the guest expects it"]
    pub fn write_memory(&mut self, address: u64, data: &[u8]) -> Option<Vec<Action>> {
        self.write_at(Space::Memory, address, data)
    }

    /// Reads I/O ports, as [`read_memory`](Self::read_memory) reads memory.
    pub fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        self.read_at(Space::Ports, port.into(), data)
    }

    /// Writes I/O ports. Returns false if none of the BARs is there.
    pub fn write_port(&mut self, port: u16, data: &[u8]) -> bool {
        // MSI-X is in memory, so there is nothing to do.
        self.write_at(Space::Ports, port.into(), data).is_some()
    }

    /// What to do after a BAR of this or of another device has moved away: a BAR whose place was occupied gets it.
    ///
    /// Call it for all devices of the guest after the actions of [`write_config`](Self::write_config),
    /// [`restart`](Self::restart) and [`release`](Self::release), until all return nothing. Do so also if there were
    /// no actions: a BAR without slots moves without any. If no BAR has moved, this compares two numbers.
    #[must_use = "perform the actions: until then the device is not where the guest expects it"]
    pub fn refresh(&mut self) -> Vec<Action> {
        if self.vacated == self.apertures.vacated() { Vec::new() } else { self.update() }
    }

    /// The guest's machine was reset, or the guest has reset the device: what to do. The device is then as after
    /// [`new`](Self::new). The interrupt line, which firmware writes for the guest, stays.
    #[must_use = "perform the actions: until then the device is not where the guest expects it"]
    pub fn restart(&mut self) -> Vec<Action> {
        self.config.reset();
        self.msix.iter_mut().for_each(MsixTable::reset);
        let mut actions = Vec::new();
        self.place(&mut actions);
        self.interrupts.enable(&self.device, None, &mut actions);
        self.set_bus_mastering();
        if self.config.is_gone || !self.device.info().resettable {
            let wanted = self.enabled_interrupt();
            self.interrupts.enable(&self.device, wanted, &mut actions);
            return actions;
        }
        actions.push(Action::Reset);
        if self.config.has_intx() {
            // The kernel signals it after the reset.
            self.interrupts.announce_intx(&mut actions);
        }
        actions
    }

    /// Takes the device away from the guest, because the machine ends or the kernel requests the device
    /// ([`Event`](crate::device::Event)): what to do. Then everything reads as ones.
    #[must_use = "perform the actions: until then the device is not where the guest expects it"]
    pub fn release(&mut self) -> Vec<Action> {
        self.config.is_gone = true;
        self.update()
    }

    /// Closes the device, after the actions of [`release`](Self::release) were performed, and other devices of the guest
    /// have no longer its address space as a peer ([`set_peers`](Self::set_peers)).
    ///
    /// # Errors
    /// As [`Device::close`]: `InUse` if a slot was not removed, or another device has it as a peer. The window of such
    /// a slot then stays mapped for ever.
    pub fn close(self) -> std::result::Result<(), StillInUse> {
        let device = self.device.clone();
        drop(self);
        device.close()
    }

    /// The eventfd of a vector of MSI or MSI-X, which stays the same; `None` if the vector was never connected.
    pub fn eventfd(&self, vector: u32) -> Option<BorrowedFd<'_>> {
        self.interrupts.eventfd(vector)
    }

    /// The eventfd of the INTx, and the one that unmasks it; `None` if it was never connected.
    pub fn intx_eventfds(&self) -> Option<(BorrowedFd<'_>, BorrowedFd<'_>)> {
        self.interrupts.intx()
    }

    /// Performs [`Action::RemoveSlot`]: `remove` calls the hypervisor.
    ///
    /// # Errors
    /// What `remove` returns. The span keeps its slot and its place.
    pub fn remove_slot<E>(
        &mut self,
        span: SpanId,
        remove: impl FnOnce(&S) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let bar = self.bars.iter_mut().find(|bar| bar.has(span));
        bar.map_or(Ok(()), |bar| bar.remove_slot(span, remove))
    }

    /// Performs [`Action::Relocate`]. Returns how the window was relocated; `None` if it was mapped for the first time,
    /// unmapped, or was there already.
    ///
    /// # Errors
    /// `InUse` if the span has a slot; as [`Span::relocate`](super::Span::relocate) and
    /// [`Span::map`](super::Span::map). The span is then unmapped: accesses are trapped, which is slow, but correct.
    pub fn relocate(&mut self, span: SpanId) -> Result<Option<Report>> {
        let Self { bars, device, apertures, config, .. } = self;
        match bars.iter_mut().find(|bar| bar.has(span)) {
            Some(bar) => bar.relocate(span, device, apertures, config.is_gone),
            None => Ok(None),
        }
    }

    /// Performs [`Action::AddSlot`]: `add` calls the hypervisor, and returns what removes the slot. It is not called if
    /// the span is not at its place, because [`relocate`](Self::relocate) has failed.
    ///
    /// # Errors
    /// What `add` returns. Accesses are then trapped.
    pub fn add_slot<E>(
        &mut self,
        span: SpanId,
        add: impl FnOnce(&SlotMemory) -> std::result::Result<S, E>,
    ) -> std::result::Result<(), E> {
        let Self { bars, peers, warnings, .. } = self;
        match bars.iter_mut().find(|bar| bar.has(span)) {
            Some(bar) => bar.add_slot(span, peers, warnings, add),
            None => Ok(()),
        }
    }

    /// Performs [`Action::Reset`]: resets the device, and enables its memory decoding again. The answer names the
    /// windows that do not reach the device any more, and the peer-to-peer mappings that are lost.
    ///
    /// # Errors
    /// As [`Device::reset`].
    pub fn reset(&mut self) -> Result<Outage> {
        let done = self.device.reset().and_then(|outage| self.enable_decoding().map(|()| outage));
        // A reset changes it, and so does what follows; either may have failed on the way.
        self.bus_mastering = None;
        self.set_bus_mastering();
        self.interrupts.set_up_intx(&self.device);
        done
    }

    /// Compares what the guest has programmed with what is there.
    fn update(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        self.place(&mut actions);
        self.set_bus_mastering();
        let wanted = self.enabled_interrupt();
        self.interrupts.enable(&self.device, wanted, &mut actions);
        self.update_vectors(0..u32::MAX, &mut actions);
        actions
    }

    fn set_bus_mastering(&mut self) {
        let wanted = self.config.bus_mastering();
        if self.bus_mastering == Some(wanted) {
            return;
        }
        let set = self.device.config().and_then(|config| config.set_bus_mastering(wanted));
        self.bus_mastering = set.is_ok().then_some(wanted);
        if let Err(error) = set {
            self.warnings.warn(Cause::BusMastering, &error);
        }
    }

    /// Gives the BARs their places.
    fn place(&mut self, actions: &mut Vec<Action>) {
        let Self { bars, config, apertures, .. } = self;
        self.vacated = apertures.vacated();
        let wanted: Vec<_> = bars.iter().map(|bar| config.address_of(&bar.register)).collect();
        // All that leave first: one may go where another was.
        for (bar, wanted) in bars.iter_mut().zip(&wanted) {
            bar.leave_unless(*wanted);
        }
        for (bar, wanted) in bars.iter_mut().zip(wanted) {
            bar.enter(apertures, wanted);
            bar.plan(config.is_gone, actions);
        }
    }

    /// The kind of interrupt that the guest has enabled, and the number of its vectors.
    fn enabled_interrupt(&self) -> Option<(Interrupt, u32)> {
        let msix = self.config.msix_vectors().zip(self.msix.as_ref());
        if let Some((count, table)) = msix {
            return Some((Interrupt::MsiX, count.min(table.count())));
        }
        match self.config.msi_vectors() {
            Some(count) => Some((Interrupt::Msi, count)),
            None => self.config.has_intx().then_some((Interrupt::Intx, 1)),
        }
    }

    fn update_vectors(&mut self, range: Range<u32>, actions: &mut Vec<Action>) {
        let Self { config, msix, interrupts, device, .. } = self;
        let msix = msix.as_ref();
        let message = |vector| match msix {
            Some(table) if config.msix_vectors().is_some() => {
                (!config.is_msix_masked()).then(|| table.message(vector)).flatten()
            }
            _ => config.msi_message(vector),
        };
        interrupts.update(device, range, message, actions);
    }

    /// The BAR at an address, and the offset in it.
    fn find(&self, space: Space, address: u64) -> Option<(&Bar<S>, u64)> {
        self.bars.iter().find_map(|bar| Some((bar, bar.claim.as_ref()?.offset_of(space, address)?)))
    }

    fn reached(&self, bar: u32, offset: u64) -> Reached {
        self.msix.as_ref().map_or(Reached::Device, |table| table.reached(bar, offset))
    }

    fn read_at(&self, space: Space, address: u64, data: &mut [u8]) -> bool {
        let Some((bar, start)) = self.find(space, address) else { return false };
        data.fill(0xff);
        for (offset, len) in pieces(start, bar.inside(start, data.len()), 8) {
            let data = &mut data[(offset - start) as usize..][..len];
            match self.reached(bar.register.region, offset) {
                Reached::Table(at) => self.msix.iter().for_each(|table| table.read(at, data)),
                Reached::Pending(at) => {
                    for (vector, byte) in (8 * at as u32..).step_by(8).zip(data) {
                        let bit = |it| u8::from(self.interrupts.is_pending(vector + it)) << it;
                        *byte = (0..8).map(bit).sum();
                    }
                }
                Reached::Device => {
                    let region = self.device.region(bar.register.region);
                    if let Err(error) = region.and_then(|region| region.read_at(offset, data)) {
                        log::debug!("{error}");
                        data.fill(0xff);
                    }
                }
            }
        }
        true
    }

    fn write_at(&mut self, space: Space, address: u64, data: &[u8]) -> Option<Vec<Action>> {
        let (bar, start) = self.find(space, address)?;
        let (index, is_rom, len) = (bar.register.region, bar.register.is_rom(), data.len());
        let mut actions = Vec::new();
        for (offset, len) in pieces(start, if is_rom { 0 } else { bar.inside(start, len) }, 8) {
            let data = &data[(offset - start) as usize..][..len];
            match self.reached(index, offset) {
                Reached::Table(at) => {
                    let written = self.msix.as_mut().map(|table| table.write(at, data));
                    self.update_vectors(written.unwrap_or_default(), &mut actions);
                }
                Reached::Pending(_) => {}
                Reached::Device => {
                    let region = self.device.region(index);
                    if let Err(error) = region.and_then(|region| region.write_at(offset, data)) {
                        log::debug!("{error}");
                    }
                }
            }
        }
        Some(actions)
    }
}
