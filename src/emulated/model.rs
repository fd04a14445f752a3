//! What a program must do to be a device.

use super::bus::Bus;
use crate::error::Result;
use crate::transport::{IrqInfo, RegionInfo};

/// A device as a program: what its registers do.
///
/// Its regions have parts that are mapped and parts that are trapped
/// ([`RegionInfo::areas`]). A mapped part is memory: the driver's loads and stores go there without
/// anybody's notice, and the model looks for what it wants to know ([`poll`](Self::poll),
/// [`Bus::memory`]). A trapped part is whatever [`read`](Self::read) and [`write`](Self::write) make of
/// it. One call is made at a time.
///
/// Whoever drives the device is not trusted: addresses, values and lengths may be anything.
///
/// A model that panics is a device that has gone: whoever called it gets `Gone`, and so does every later
/// call but those that unmap and disconnect. A model that calls its own device, through an
/// [`Emulated`](super::Emulated) that it holds, gets `InUse`; it must not wait for another thread that
/// does, which nobody can see, and which waits for the model.
///
/// ```
/// use vfio_remap::emulated::{Bus, Emulated, Model, Shape};
/// use vfio_remap::transport::RegionInfo;
/// use vfio_remap::{Device, Result};
///
/// /// A device of one register that counts how often it is read.
/// struct Counter(u32);
///
/// impl Model for Counter {
///     fn shape(&self) -> Shape {
///         Shape::new("counter", vec![RegionInfo::trapped(4)])
///     }
///
///     fn read(&mut self, _: &Bus, _: u32, _: u64, data: &mut [u8]) -> Result<()> {
///         self.0 += 1;
///         let value = self.0.to_le_bytes();
///         data.iter_mut().zip(value).for_each(|(byte, value)| *byte = value);
///         Ok(())
///     }
///
///     fn write(&mut self, _: &Bus, _: u32, _: u64, _: &[u8]) -> Result<()> {
///         Ok(())
///     }
///
///     fn reset(&mut self, _: &Bus) {
///         self.0 = 0;
///     }
/// }
///
/// let device = Device::new(std::sync::Arc::new(Emulated::new(Counter(0))?));
/// let register = device.bar(0)?.trapped::<u32>(0)?;
/// assert_eq!((register.read()?, register.read()?), (1, 2));
/// device.reset()?;
/// assert_eq!(register.read()?, 1);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
pub trait Model: Send {
    /// What the device looks like: asked once, when it is made.
    fn shape(&self) -> Shape;

    /// Reads a trapped part of a region: `data.len()` bytes at `offset`, which lie within the region
    /// but need be neither aligned nor of a register's width.
    ///
    /// # Errors
    /// Reach the driver. A real device has none to give: it reads all ones where nothing is.
    fn read(&mut self, bus: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()>;

    /// Writes a trapped part of a region, as [`read`](Self::read) reads.
    ///
    /// # Errors
    /// Reach the driver. A real device has none to give: it ignores what makes no sense.
    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()>;

    /// Puts registers, and the mapped parts, into the state of a device that was just made.
    fn reset(&mut self, bus: &Bus);

    /// A client of a [`Server`](super::Server) has left, and the memory that it had mapped for DMA is out
    /// of reach. Work that nobody else waits for ends here.
    fn client_left(&mut self, bus: &Bus) {
        let _ = bus;
    }

    /// Does what is to be done besides answering: looks at mapped parts, finishes what takes time.
    /// Called by a thread of the device's own, as often as its answers ask for. No access to a trapped
    /// part is answered meanwhile: what takes long is done in parts, a few milliseconds each.
    fn poll(&mut self, bus: &Bus) -> Activity {
        let _ = bus;
        Activity::Asleep
    }
}

/// When a model wants to be polled again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// At once: there was something to do, and there may be more.
    Busy,
    /// Soon, within a millisecond: it watches memory that a driver writes to unasked.
    Watching,
    /// When it calls [`Bus::wake`].
    Asleep,
}

/// What a device looks like to those who drive it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shape {
    /// How errors, logs and its thread name it: without a NUL.
    pub name: String,
    /// Whether its regions and interrupts are those of a PCI device.
    pub pci: bool,
    /// Its regions by index; those of size 0 are vacant.
    pub regions: Vec<RegionInfo>,
    /// Its interrupts by index; those of no vectors are vacant.
    pub irqs: Vec<IrqInfo>,
}

impl Shape {
    /// A device of these regions, without interrupts.
    pub fn new(name: impl Into<String>, regions: Vec<RegionInfo>) -> Self {
        Self { name: name.into(), pci: false, regions, irqs: Vec::new() }
    }

    /// A PCI device of nothing but `config` bytes of configuration space: nine regions and five
    /// interrupts, as Linux VFIO has them, the others to be filled in.
    pub fn pci(name: impl Into<String>, config: u64) -> Self {
        let mut regions = vec![RegionInfo::default(); 9];
        regions[7] = RegionInfo::trapped(config);
        Self { name: name.into(), pci: true, regions, irqs: vec![IrqInfo::default(); 5] }
    }
}
