//! What a driver holds: [`Device`], its [`Bar`]s, [`Window`]s over them, and [`Register`]s in those.

mod bar;
mod buffer_failed;
mod capabilities;
mod config;
mod dma;
mod dma_addresses;
mod dma_array;
mod dma_buffer;
mod dma_descriptors;
#[cfg(feature = "vm-memory")]
mod dma_guest;
mod dma_parts;
mod events;
mod iova;
mod layout;
mod poll;
mod power;
mod register;
mod register_access;
mod register_block;
mod register_copy;
pub(crate) mod register_layout;
mod register_macro;
mod signals;
#[cfg(test)]
mod tests;
mod vectors;
mod window;

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use slab::Slab;

use crate::error::{Error, ErrorKind, Result, gives_back};
use crate::space::Backing;
use crate::sys;
use crate::transport::{AffectedDevice, DeviceInfo, PciAddress, RegionInfo, Transport, Vfio};

pub use bar::Bar;
pub use buffer_failed::BufferFailed;
pub use capabilities::{Capabilities, Capability, ExtendedCapabilities, ExtendedCapability};
pub use config::Config;
pub use dma::{DmaMapping, DmaSpace, IovaPlacement};
pub use dma_array::DmaArray;
pub use dma_buffer::{BufferRequest, DmaBuffer};
pub use dma_descriptors::Descriptors;
#[cfg(feature = "vm-memory")]
pub use dma_guest::GuestMapping;
pub use events::{Event, Events};
pub use iova::Iova;
pub use layout::{Layout, Span, Trap};
pub use poll::{poll_until, poll_until_async, try_poll_until};
pub use power::LowPower;
pub use register::{
    IoRegister, Mode, ReadOnly, ReadWrite, Readable, Register, Registers, Width, Writable,
    WriteOnly,
};
pub use register_block::{IoRegisterBlock, RegisterBlock};
pub use register_layout::{BlockArrayAt, BlockAt, BlockLayout, RegisterArrayAt, RegisterAt};
pub use vectors::{Growth, Interrupt, Vector, Vectors};
pub use window::{StillMapped, Window};

/// A device, opened.
///
/// Clones are the same device. They, its windows and its registers keep it open; [`close`](Self::close) tells
/// which do.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

/// What a device shares with its windows. Files are closed after mappings: the regions' backings go
/// before the transport.
struct Inner {
    regions: Box<[OnceLock<Region>]>,
    msix: OnceLock<Option<config::Msix>>,
    dma: OnceLock<DmaSpace>,
    dma_lock: Mutex<()>,
    /// Held while a control register is read, changed and written.
    control: Mutex<()>,
    /// What holds the device: each knows its place here.
    notes: Mutex<Slab<Note>>,
    info: DeviceInfo,
    transport: Arc<dyn Transport>,
}

/// How many holders an error names.
const NAMED: usize = 8;

/// What to do about a region that a device does not have.
const OTHER_REGIONS: &str = "see which it has: Device::bars";

/// What is known of a region once it was asked for.
struct Region {
    info: RegionInfo,
    /// Without the MSI-X table.
    usual: View,
    /// With it, once it was asked for.
    with_table: OnceLock<View>,
}

/// What of a region can be mapped, and what that is mapped of.
struct View {
    layout: Layout,
    /// As long as the layout's mappable parts reach; `None` where it has none.
    backing: Option<Arc<Backing>>,
}

/// What holds a device.
#[derive(Clone, Debug)]
enum Note {
    /// A window over a range of a region.
    Window { region: u32, range: Range<u64>, address: usize },
    /// A block of trapped registers.
    Block { name: &'static str, region: u32, range: Range<u64> },
    /// Vectors that are set up.
    Vectors { kind: Interrupt, count: usize },
    /// Events that are watched.
    Events,
    /// The device sleeps.
    LowPower,
}

/// Where a trapped register is.
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
    /// It may not answer yet, and may start nothing by itself: before its windows are touched,
    /// [`Config::set_memory_decoding`] is called, or an access is a SIGBUS; before it is given work,
    /// [`Config::set_bus_mastering`], or its DMA and its MSI silently do nothing.
    ///
    /// # Errors
    /// As [`Vfio::open`]; `Malformed` for text that is no address.
    pub fn open<A>(address: A) -> Result<Self>
    where
        A: TryInto<PciAddress>,
        Error: From<A::Error>,
    {
        Ok(Self::new(Arc::new(Vfio::open(address.try_into()?)?)))
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
                dma: OnceLock::new(),
                dma_lock: Mutex::new(()),
                control: Mutex::new(()),
                notes: Mutex::default(),
                info,
                transport,
            }),
        }
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.inner.info
    }

    /// How errors and logs name it.
    pub fn name(&self) -> &str {
        &self.inner.info.name
    }

    /// The way to it.
    pub fn transport(&self) -> &dyn Transport {
        &*self.inner.transport
    }

    /// The region `index`, which for a PCI device and an index of 0 to 5 is a BAR.
    ///
    /// # Errors
    /// `NotFound` where the device has none there; `Malformed` where what its transport says of it
    /// makes no sense; `Gone` where its configuration space reads all ones.
    pub fn bar(&self, index: u32) -> Result<Bar<'_>> {
        let Some(cell) = self.inner.regions.get(index as usize) else {
            return Err(Error::new(ErrorKind::NotFound, "find", self.inner.region_name(index))
                .because(format!("the device has {} regions", self.inner.regions.len()))
                .remedy(OTHER_REGIONS));
        };
        let region = match cell.get() {
            Some(region) => region,
            None => {
                let region = self.read_region(index).map_err(|error| match error.kind() {
                    ErrorKind::NotFound if error.advice().is_empty() => error.remedy(OTHER_REGIONS),
                    _ => error,
                })?;
                cell.get_or_init(|| region)
            }
        };
        Ok(Bar::new(self, index, region))
    }

    /// All regions that the device has, in order: of a PCI device its BARs (0 to 5), and then, as far as
    /// there are any, the expansion ROM (6), configuration space (7), and those of its driver's own.
    ///
    /// One that answers with an error is left out; where that is another than `NotFound`, it is logged, and
    /// [`bar`](Self::bar) tells it.
    pub fn bars(&self) -> impl Iterator<Item = Bar<'_>> + '_ {
        (0..self.inner.regions.len() as u32).filter_map(|index| match self.bar(index) {
            Ok(bar) => Some(bar),
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
    /// `Unsupported` where the device is not PCI.
    pub fn config(&self) -> Result<Config<'_>> {
        Config::of(self)
    }

    /// The memory that the device reaches, once [`Config::set_bus_mastering`] has let it: before, what it
    /// is told to read or write there silently does not happen.
    ///
    /// # Errors
    /// `Unsupported` where the device does no DMA, or its transport none for this process.
    pub fn dma(&self) -> Result<DmaSpace> {
        if let Some(space) = self.inner.dma.get() {
            return Ok(space.clone());
        }
        // Two that come at once must not each have a space of their own.
        let _one = self.inner.dma_lock.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(space) = self.inner.dma.get() {
            return Ok(space.clone());
        }
        let space = DmaSpace::new(self.inner.transport.clone())?;
        Ok(self.inner.dma.get_or_init(|| space).clone())
    }

    /// Resets the device, and it alone (PCIe 5.0 §6.6.2, or by its power state). Windows stay, and reach it
    /// again once memory decoding is on.
    ///
    /// Take memory decoding, bus mastering and the device's interrupts as off afterwards. Under vfio-pci the
    /// kernel restores the command register; a model, or a device behind a vfio-user server, has it cleared.
    /// Switch both on again ([`Config::set_memory_decoding`], [`Config::set_bus_mastering`]), and bring the
    /// device up as at first. What is mapped for DMA stays mapped.
    ///
    /// # Errors
    /// `Unsupported` where it cannot be reset, for which [`hot_reset`](Self::hot_reset) may be a way; what
    /// the kernel answers.
    pub fn reset(&self) -> Result<()> {
        self.inner.transport.reset()
    }

    /// The devices that [`hot_reset`](Self::hot_reset) would reset, this one among them.
    ///
    /// # Errors
    /// `Unsupported` where there is no such reset: no bridge above the device, or a transport without.
    pub fn affected_by_hot_reset(&self) -> Result<Vec<AffectedDevice>> {
        self.inner.transport.affected_by_hot_reset()
    }

    /// Resets the bus or slot that the device sits on, and with it every device there: the way to reset a
    /// device that has no reset of its own. Windows stay; what [`reset`](Self::reset) says of afterwards
    /// holds for each device.
    ///
    /// `others` are the affected devices besides this one that this process has open: their drivers find
    /// them reset. Affected devices that are not open must at least be bound to vfio-pci, and their IOMMU
    /// groups be open here.
    ///
    /// # Errors
    /// `NotOwned`, naming the devices that stand in the way and why; nothing is reset then. `Unsupported`
    /// where there is no such reset; `InUse` where a device was being accessed; what the kernel answers.
    pub fn hot_reset(&self, others: &[&Device]) -> Result<()> {
        let others: Vec<_> = others.iter().map(|device| device.transport()).collect();
        self.inner.transport.hot_reset(&others)
    }

    /// Closes the device, so that it can be bound to another driver.
    ///
    /// # Errors
    /// The device, with `InUse`, naming what holds it: windows, vectors, memory mapped for DMA, clones. A
    /// [`RegionFile`](crate::transport::RegionFile) that was asked of the transport holds the
    /// device's file, too, and is not seen here.
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
        self.inner.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn page_size(&self) -> u64 {
        sys::page_size() as u64
    }

    fn read_region(&self, index: u32) -> Result<Region> {
        let transport = self.transport();
        let info = transport.region(index)?;
        let is_bar = self.info().pci && index < 6;
        let layout = if is_bar && self.config()?.is_io_port(index)? {
            Layout::io_ports(&info)
        } else {
            let reserved = match self.msix()? {
                Some(msix) if is_bar => msix.within(index),
                _ => Default::default(),
            };
            Layout::new(&info, &reserved, self.page_size())?
        };
        let usual = self.view(index, layout)?;
        Ok(Region { info, usual, with_table: OnceLock::new() })
    }

    fn view(&self, index: u32, layout: Layout) -> Result<View> {
        let backing = match layout.mappable().last() {
            Some(last) => {
                let file = self.transport().backing(index)?;
                let name = self.inner.region_name(index);
                // A file need not go further than what is mapped of it.
                Some(Arc::new(Backing::new(name, file.fd, file.start, last.end, file.kind)?))
            }
            None => None,
        };
        Ok(View { layout, backing })
    }

    fn msix(&self) -> Result<Option<&config::Msix>> {
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
    fn notes(&self) -> MutexGuard<'_, Slab<Note>> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// "bar 0 of 0000:00:03.0"
    fn region_name(&self, index: u32) -> String {
        self.info.region_name(index)
    }

    /// "bar 0 of 0000:00:03.0, 0x0..0x4000"
    fn range_name(&self, index: u32, range: &Range<u64>) -> String {
        format!("{}, {:#x}..{:#x}", self.region_name(index), range.start, range.end)
    }

    /// Why the device stays open although nothing of this crate's refers to its windows.
    fn held_elsewhere(&self) -> Option<Error> {
        let in_use = || Error::new(ErrorKind::InUse, "close", &self.info.name);
        let space = self.dma.get();
        if let Some(space) = space.filter(|space| space.is_shared()) {
            let mapped = space.describe(NAMED).map_or_else(String::new, |held| held + ", ");
            return Some(
                in_use()
                    .because(format!("it is held by {mapped}its DMA space"))
                    .remedy("drop them first"),
            );
        }
        let ours = 1 + usize::from(space.is_some());
        (Arc::strong_count(&self.transport) > ours)
            .then(|| in_use().because("its transport is held elsewhere, too"))
    }

    fn describe(&self, note: &Note) -> String {
        match note {
            Note::Window { region, range, address } => {
                format!("a window over {} at {address:#x}", self.range_name(*region, range))
            }
            Note::Block { name, region, range } => {
                format!("the register block {name}, {}", self.range_name(*region, range))
            }
            Note::Vectors { kind, count } => format!("{count} vectors of {kind:?}"),
            Note::Events => "its events".to_owned(),
            Note::LowPower => "its low power state".to_owned(),
        }
    }

    fn in_use(&self, holders: usize) -> Error {
        let notes = self.notes();
        let mut held: Vec<String> =
            notes.iter().take(NAMED).map(|(_, note)| self.describe(note)).collect();
        if notes.len() > NAMED {
            held.push(format!("{} more", notes.len() - NAMED));
        }
        if holders > notes.len() {
            let others = holders - notes.len();
            held.push(format!("{others} trapped registers or clones of the device"));
        }
        if held.is_empty() {
            held.push("something that has just gone".to_owned());
        }
        Error::new(ErrorKind::InUse, "close", &self.info.name)
            .because(format!("it is held by {}", held.join(", ")))
            .remedy("drop them first")
    }
}

/// A device that could not be closed, and why.
#[derive(Debug)]
pub struct StillInUse {
    error: Error,
    device: Device,
}

impl StillInUse {
    /// What holds the device.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The device, as it was.
    pub fn into_device(self) -> Device {
        self.device
    }
}

gives_back!(StillInUse);

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
