//! What a driver holds: [`Device`], its [`Region`]s, [`Window`]s over them, and [`Register`]s in those.

mod beside;
mod buffer_failed;
mod capabilities;
mod close_error;
mod config;
mod config_write;
mod dma;
mod dma_addresses;
mod dma_arena;
mod dma_array;
mod dma_buffer;
mod dma_descriptors;
#[cfg(feature = "vm-memory")]
mod dma_guest;
mod dma_memory;
mod dma_parts;
mod dma_placement;
mod dma_ring;
mod events;
mod gone;
mod iova;
mod layout;
mod outage;
mod poll;
mod power;
mod region;
mod register;
mod register_access;
mod register_block;
mod register_copy;
pub(crate) mod register_layout;
mod register_macro;
mod resample;
mod reset;
mod revocation;
mod signals;
#[cfg(test)]
mod tests;
mod vectors;
mod window;

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use slab::Slab;

use crate::error::{Error, ErrorKind, Result, gives_back};
use crate::space::{Backing, Control, Group};
use crate::sys;
use crate::transport::{DeviceInfo, PciAddress, RegionInfo, Transport, Vfio};

pub use buffer_failed::BufferFailed;
pub use capabilities::{Capabilities, Capability, ExtendedCapabilities, ExtendedCapability};
pub use close_error::CloseError;
pub use config::{BarKind, Config, Msix};
pub use dma::{DmaMapping, DmaSpace};
pub use dma_array::{DmaArray, DmaEntry};
pub use dma_buffer::{BufferRequest, DmaBuffer};
pub use dma_descriptors::Descriptors;
#[cfg(feature = "vm-memory")]
pub use dma_guest::GuestMapping;
pub use dma_placement::IovaPlacement;
pub use dma_ring::DmaRing;
pub use events::{Event, Events};
pub use iova::Iova;
pub use layout::{Layout, Span, Trap};
pub use outage::Outage;
pub use poll::{poll_until, try_poll_until, try_poll_until_async};
pub use power::LowPower;
pub use region::Region;
pub use register::{
    IoRegister, Mode, ReadOnly, ReadWrite, Readable, Register, RegisterArray, Width, Writable,
    WriteOnly,
};
pub use register_block::{IoRegisterBlock, RegisterBlock};
pub use register_layout::{BlockArrayAt, BlockAt, BlockLayout, RegisterArrayAt, RegisterAt};
pub use revocation::{FaultCause, NotSealed, Revoked, SealedWindow, WindowChanges};
pub use vectors::{Growth, Interrupt, Vector, Vectors};
pub use window::{StillMapped, Window};

/// An open device.
///
/// Clones are the same device. They, its windows and its registers keep it open; [`close`](Self::close) names
/// those that do.
#[must_use = "dropping its last user closes it"]
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

/// What a device shares with its windows. Fields are dropped in order: the backings of regions before the
/// transport, so that mappings end before files are closed.
struct Inner {
    regions: Box<[OnceLock<KnownRegion>]>,
    msix: OnceLock<Option<Msix>>,
    /// Where configuration space has what takes the device away.
    controls: OnceLock<config_write::Controls>,
    dma: OnceLock<DmaSpace>,
    dma_lock: Mutex<()>,
    /// Held while a control register is read, changed and written, here or by the transport.
    control: Mutex<()>,
    /// What holds the device. Each holder keeps its key in this slab.
    holders: Mutex<Slab<Holder>>,
    /// Its windows, for the guard.
    group: Arc<Group>,
    absence: outage::Absence,
    /// The process that opened it: see [`sys::fork::generation`].
    generation: u32,
    info: DeviceInfo,
    transport: Arc<dyn Transport>,
}

/// How many holders an error names.
const NAMED: usize = 8;

/// How many regions are BARs: the first ones.
const BARS: u32 = 6;

/// The advice for a region that a device does not have.
const OTHER_REGIONS: &str = "see which it has: Device::regions";

/// What is known about a region, once the transport was asked.
struct KnownRegion {
    info: RegionInfo,
    /// Without the MSI-X table.
    usual: Mappable,
    /// With the MSI-X table, once a program asked for it.
    with_table: OnceLock<Mappable>,
}

/// The mappable parts of a region, and the file behind them.
struct Mappable {
    layout: Layout,
    /// It ends with the last mappable part; `None` if there is none.
    backing: Option<Arc<Backing>>,
}

/// What holds a device.
#[derive(Clone)]
enum Holder {
    /// A window over a range of a region.
    Window { region: u32, range: Range<u64>, address: usize, control: Arc<Control> },
    /// A block of trapped registers.
    Block { name: &'static str, region: u32, range: Range<u64> },
    /// Vectors that are set up.
    Vectors { kind: Interrupt, count: usize },
    /// Watched events.
    Events,
    /// The device is in a low power state.
    LowPower,
}

/// The place of a trapped register.
#[derive(Clone)]
struct Trapped {
    device: Arc<Inner>,
    region: u32,
    offset: u64,
}

impl Device {
    /// Opens the PCI device at `address` through Linux VFIO: a [`PciAddress`], or text such as
    /// `"0000:00:03.0"`.
    ///
    /// Memory decoding and bus mastering may be off. Call [`Config::set_memory_decoding`] before you access a
    /// window: without it an access raises SIGBUS. Call [`Config::set_bus_mastering`] before you give the
    /// device work: without it the device does no DMA and sends no MSI, and reports no error.
    ///
    /// # Errors
    /// As [`Vfio::open`].
    pub fn open<A>(address: A) -> Result<Self>
    where
        A: TryInto<PciAddress>,
        Error: From<A::Error>,
    {
        Ok(Self::new(Arc::new(Vfio::open(address)?)))
    }

    /// A device that `transport` offers.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        let info = transport.info();
        // A region index is a u32 in VFIO, and a few in every device.
        let count = info.region_count.min(1024) as usize;
        Self {
            inner: Arc::new(Inner {
                regions: std::iter::repeat_with(OnceLock::new).take(count).collect(),
                msix: OnceLock::new(),
                controls: OnceLock::new(),
                dma: OnceLock::new(),
                dma_lock: Mutex::new(()),
                control: Mutex::new(()),
                holders: Mutex::default(),
                group: Arc::default(),
                absence: outage::Absence::default(),
                generation: sys::fork::generation(),
                info,
                transport,
            }),
        }
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.inner.info
    }

    /// The name of the device in errors and logs.
    pub fn name(&self) -> &str {
        &self.inner.info.name
    }

    /// The transport that reaches the device.
    pub fn transport(&self) -> &dyn Transport {
        &*self.inner.transport
    }

    /// The transport that reaches the device, by its type; `None` if it has another one.
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use vfio_remap::Device;
    /// use vfio_remap::transport::Vfio;
    ///
    /// let first = Device::open("0000:04:00.0")?;
    /// if let Some(vfio) = first.transport_as::<Vfio>() {
    ///     // A second device that shares the address space of the first.
    ///     let options = Vfio::options().beside(vfio);
    ///     let second = Device::new(Arc::new(options.open("0000:05:00.0")?));
    /// }
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    pub fn transport_as<T: Transport>(&self) -> Option<&T> {
        let transport: &dyn Any = &*self.inner.transport;
        transport.downcast_ref()
    }

    /// The BAR `index`, 0 to 5: the region of that number. Other regions are reached by
    /// [`region`](Self::region).
    ///
    /// # Errors
    /// As [`region`](Self::region); `NotFound` from 6 on.
    pub fn bar(&self, index: u32) -> Result<Region<'_>> {
        if index < BARS {
            return self.region(index);
        }
        Err(Error::new(ErrorKind::NotFound, "find", format!("bar {index} of {}", self.name()))
            .with_reason("BARs have the numbers 0 to 5")
            .with_advice("reach other regions by Device::region"))
    }

    /// The region `index`, by VFIO's numbers. A PCI device has its BARs (0 to 5), the expansion ROM (6),
    /// configuration space (7, also [`config`](Self::config)) and device-specific regions.
    ///
    /// # Errors
    /// `NotFound` if the device has no such region; `Malformed` if the transport describes an impossible
    /// region; `Gone` if configuration space reads all ones.
    pub fn region(&self, index: u32) -> Result<Region<'_>> {
        let Some(cell) = self.inner.regions.get(index as usize) else {
            return Err(Error::new(ErrorKind::NotFound, "find", self.inner.region_name(index))
                .with_reason(format!("the device has {} regions", self.inner.regions.len()))
                .with_advice(OTHER_REGIONS));
        };
        let region = match cell.get() {
            Some(region) => region,
            None => {
                let region = self.read_region(index).map_err(|error| match error.kind() {
                    ErrorKind::NotFound if error.advice().is_empty() => {
                        error.with_advice(OTHER_REGIONS)
                    }
                    _ => error,
                })?;
                cell.get_or_init(|| region)
            }
        };
        Ok(Region::new(self, index, region))
    }

    /// The BARs that the device has, in order.
    ///
    /// A BAR that cannot be read is left out. The error is logged unless it is `NotFound`;
    /// [`bar`](Self::bar) returns it.
    pub fn bars(&self) -> impl Iterator<Item = Region<'_>> + '_ {
        self.regions_up_to(BARS)
    }

    /// All regions that the device has, in order: see [`region`](Self::region).
    ///
    /// A region that cannot be read is left out. The error is logged unless it is `NotFound`;
    /// [`region`](Self::region) returns it.
    pub fn regions(&self) -> impl Iterator<Item = Region<'_>> + '_ {
        self.regions_up_to(u32::MAX)
    }

    fn regions_up_to(&self, end: u32) -> impl Iterator<Item = Region<'_>> + '_ {
        let end = end.min(self.inner.regions.len() as u32);
        (0..end).filter_map(|index| match self.region(index) {
            Ok(region) => Some(region),
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    log::warn!("{error}");
                }
                None
            }
        })
    }

    /// Configuration space.
    ///
    /// # Errors
    /// `Unsupported` if the device is not PCI.
    pub fn config(&self) -> Result<Config<'_>> {
        Config::of(self)
    }

    /// The memory that the device reaches by DMA. DMA needs [`Config::set_bus_mastering`]: without it the
    /// device reads and writes nothing, and reports no error.
    ///
    /// # Address bits
    /// Unless a placement says otherwise, memory gets an address above 4 GiB. A device that has fewer than 64
    /// address bits drops the upper ones and reaches something else, or nothing, and no error is reported: pass
    /// [`IovaPlacement::below_bits`] with the number of its bits.
    ///
    /// # Errors
    /// `Unsupported` if the device does no DMA, or its transport offers none to this process.
    pub fn dma(&self) -> Result<DmaSpace> {
        if let Some(space) = self.inner.dma.get() {
            return Ok(space.clone());
        }
        // Two threads at once must get the same space.
        let _one = self.inner.dma_lock.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(space) = self.inner.dma.get() {
            return Ok(space.clone());
        }
        let space = DmaSpace::new(self.inner.transport.clone())?;
        Ok(self.inner.dma.get_or_init(|| space).clone())
    }

    /// Closes the device. It can then be bound to another driver.
    ///
    /// # Errors
    /// The device, with `InUse` and what holds it: windows, vectors, DMA mappings, clones. A
    /// [`RegionFile`](crate::transport::RegionFile) of the transport keeps the device's file open, too, and is
    /// not detected here.
    pub fn close(self) -> std::result::Result<(), StillInUse> {
        let inner = match Arc::try_unwrap(self.inner) {
            Ok(inner) => inner,
            Err(inner) => {
                let error = inner.in_use(Arc::strong_count(&inner) - 1);
                return Err(StillInUse { error, device: Self { inner } });
            }
        };
        match inner.held_elsewhere() {
            None => Ok(()),
            Some(error) => Err(StillInUse { error, device: Self { inner: Arc::new(inner) } }),
        }
    }

    fn control_lock(&self) -> MutexGuard<'_, ()> {
        self.inner.control_lock()
    }

    pub(crate) fn page_size(&self) -> u64 {
        sys::page_size() as u64
    }

    fn read_region(&self, index: u32) -> Result<KnownRegion> {
        let transport = self.transport();
        let info = transport.region(index)?;
        let is_bar = self.info().pci && index < BARS;
        let layout = if is_bar && self.config()?.bar_kind(index)? == Some(BarKind::Io) {
            Layout::io_ports(&info)
        } else {
            let reserved = match self.msix()? {
                Some(msix) if is_bar => msix.within(index),
                _ => Default::default(),
            };
            Layout::new(&info, &reserved, self.page_size())?
        };
        let usual = self.mappable(index, layout)?;
        Ok(KnownRegion { info, usual, with_table: OnceLock::new() })
    }

    fn mappable(&self, index: u32, layout: Layout) -> Result<Mappable> {
        let backing = match layout.mappable().last() {
            Some(last) => {
                let file = self.transport().backing(index)?;
                let name = self.inner.region_name(index);
                // The file may end where the last mappable part ends.
                let backing = Backing::new(name, file.fd, file.start, last.end, file.kind)?;
                Some(Arc::new(backing.in_group(self.inner.group.clone())))
            }
            None => None,
        };
        Ok(Mappable { layout, backing })
    }

    fn msix(&self) -> Result<Option<&Msix>> {
        if !self.info().pci {
            return Ok(None);
        }
        let msix = match self.inner.msix.get() {
            Some(msix) => msix,
            None => {
                let msix = self.config()?.msix()?;
                self.inner.msix.get_or_init(|| msix)
            }
        };
        Ok(msix.as_ref())
    }
}

impl Inner {
    /// Whether a region is the configuration space, which only [`Config::write`] writes.
    fn is_config(&self, region: u32) -> bool {
        region == config::REGION && self.info.pci
    }

    fn control_lock(&self) -> MutexGuard<'_, ()> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is a child of `fork(2)`, and the device is its parent's.
    fn is_inherited(&self) -> bool {
        self.generation != sys::fork::generation()
    }

    #[inline(always)]
    fn holders(&self) -> MutexGuard<'_, Slab<Holder>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// "bar 0 of 0000:00:03.0"
    fn region_name(&self, index: u32) -> String {
        self.info.region_name(index)
    }

    /// "bar 0 of 0000:00:03.0, 0x0..0x4000"
    fn range_name(&self, index: u32, range: &Range<u64>) -> String {
        format!("{}, {:#x}..{:#x}", self.region_name(index), range.start, range.end)
    }

    /// Why the device stays open although no object of this crate holds it.
    fn held_elsewhere(&self) -> Option<Error> {
        let in_use = || Error::new(ErrorKind::InUse, "close", &self.info.name);
        let space = self.dma.get();
        if let Some(space) = space.filter(|space| space.is_shared()) {
            let mapped = space.describe(NAMED).map_or_else(String::new, |held| held + ", ");
            return Some(
                in_use()
                    .with_reason(format!("it is held by {mapped}its DMA space"))
                    .with_advice("drop them first"),
            );
        }
        let ours = 1 + usize::from(space.is_some());
        (Arc::strong_count(&self.transport) > ours)
            .then(|| in_use().with_reason("something else holds its transport"))
    }

    fn describe(&self, holder: &Holder) -> String {
        match holder {
            Holder::Window { region, range, address, control } => {
                let kind = if control.is_sealed() { "sealed " } else { "" };
                let range = self.range_name(*region, range);
                format!("a {kind}window over {range} at {address:#x}")
            }
            Holder::Block { name, region, range } => {
                format!("the register block {name}, {}", self.range_name(*region, range))
            }
            Holder::Vectors { kind, count } => format!("{count} vectors of {kind}"),
            Holder::Events => "events".to_owned(),
            Holder::LowPower => "a low power state".to_owned(),
        }
    }

    fn in_use(&self, count: usize) -> Error {
        let holders = self.holders();
        let mut held: Vec<String> =
            holders.iter().take(NAMED).map(|(_, holder)| self.describe(holder)).collect();
        if holders.len() > NAMED {
            held.push(format!("{} more", holders.len() - NAMED));
        }
        if count > holders.len() {
            let others = count - holders.len();
            held.push(format!("{others} trapped registers, clones or DMA mappings of the device"));
        }
        if held.is_empty() {
            held.push("something that was dropped just now".to_owned());
        }
        let is_sealed = |holder: &Holder| matches!(holder, Holder::Window { control, .. } if control.is_sealed());
        let advice = if holders.iter().any(|(_, holder)| is_sealed(holder)) {
            "a sealed window stays until the process ends; drop the others first"
        } else {
            "drop them first"
        };
        Error::new(ErrorKind::InUse, "close", &self.info.name)
            .with_reason(format!("it is held by {}", held.join(", ")))
            .with_advice(advice)
    }
}

/// A device that could not be closed, and why.
#[derive(Debug)]
pub struct StillInUse {
    error: Error,
    device: Device,
}

impl StillInUse {
    /// The device, unchanged.
    pub fn into_device(self) -> Device {
        self.device
    }
}

gives_back!(StillInUse { device: Device }, "The error, and the device, unchanged.");

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}

impl fmt::Debug for Trapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} of {}", self.offset, self.device.region_name(self.region))
    }
}
