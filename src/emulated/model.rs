//! The trait for device models.

use std::ops::Range;

use super::bus::Bus;
use crate::error::Result;
use crate::transport::{IrqInfo, RegionInfo, region_index};

/// A device model: the behaviour of a device's registers.
///
/// Its regions have mapped parts and trapped parts ([`RegionInfo::areas`]). A mapped part is memory: the model
/// gets no notice of the driver's loads and stores, and looks for changes itself ([`poll`](Self::poll),
/// [`Bus::memory`]). Accesses to a trapped part call [`read`](Self::read) and [`write`](Self::write). There is
/// one call at a time.
///
/// Drivers are not trusted: addresses, values and lengths may be anything.
///
/// A PCI device ([`Shape::pci`]) has a command register: the model stores what a driver writes to it and resets
/// it to 0, as [`PciConfig`](super::PciConfig) does. Without bus mastering there, the [`Bus`] refuses DMA and
/// drops MSI. Memory decoding has no effect on mapped parts; a model may ignore it.
///
/// If a model panics, the device is gone: that call fails with `Gone`, and so does every later call except
/// those that unmap and disconnect. A model that calls its own device, through an [`Emulated`](super::Emulated)
/// that it holds, gets `InUse`. A model must not wait for another thread that calls the device: that thread
/// waits for the model, and the deadlock cannot be detected.
///
/// ```
/// use vfio_remap::emulated::{Bus, Emulated, Model, Shape};
/// use vfio_remap::transport::RegionInfo;
/// use vfio_remap::{Device, Result};
///
/// /// A device with one register that counts its reads.
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
/// let register = device.bar(0)?.trapped_register::<u32>(0)?;
/// assert_eq!((register.read()?, register.read()?), (1, 2));
/// assert!(device.reset()?.is_over());
/// assert_eq!(register.read()?, 1);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
pub trait Model: Send {
    /// The regions and interrupts of the device. Called once, when the device is made.
    fn shape(&self) -> Shape;

    /// Reads a trapped part of a region: `data.len()` bytes at `offset`. They lie in the region, but may be
    /// unaligned and of any length.
    ///
    /// # Errors
    /// An error is returned to the driver. A real device has no errors: it reads all ones if there is no
    /// register.
    fn read(&mut self, bus: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()>;

    /// Writes a trapped part of a region: `data` at `offset`, as for [`read`](Self::read).
    ///
    /// # Errors
    /// An error is returned to the driver. A real device has no errors: it ignores invalid writes.
    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()>;

    /// Puts the registers and the mapped parts into their initial state.
    fn reset(&mut self, bus: &Bus);

    /// A client of a [`Server`](super::Server) has left, and its DMA memory can no longer be reached. Ends the
    /// work that only this client waits for.
    fn client_left(&mut self, bus: &Bus) {
        let _ = bus;
    }

    /// Does background work: looks at mapped parts, completes long operations. The device's thread calls it as
    /// often as the returned [`Activity`] says. Trapped accesses wait meanwhile, so do long work in parts of a
    /// few milliseconds.
    fn poll(&mut self, bus: &Bus) -> Activity {
        let _ = bus;
        Activity::Asleep
    }
}

/// When a model has to be polled again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activity {
    /// At once: there was work, and there may be more.
    Busy,
    /// Within a millisecond: it watches memory that a driver writes.
    Watching,
    /// After a call of [`Bus::wake`].
    Asleep,
}

/// The regions and interrupts of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shape {
    /// The name in errors and logs, and of its thread. It has no NUL.
    pub name: String,
    /// Whether regions and interrupts have the indexes of a PCI device.
    pub pci: bool,
    /// The regions by index. A size of 0 means that there is no such region.
    pub regions: Vec<RegionInfo>,
    /// The interrupts by index. A count of 0 means that there is no such interrupt.
    pub irqs: Vec<IrqInfo>,
}

impl Shape {
    /// A device with these regions, without interrupts.
    pub fn new(name: impl Into<String>, regions: Vec<RegionInfo>) -> Self {
        Self { name: name.into(), pci: false, regions, irqs: Vec::new() }
    }

    /// The same device, with a region of which these byte ranges can be mapped. See
    /// [`RegionInfo::with_areas`].
    ///
    /// # Panics
    /// If `region` is past the last, as for slices.
    #[must_use]
    #[track_caller]
    pub fn with_areas(mut self, region: u32, areas: impl Into<Vec<Range<u64>>>) -> Self {
        let region = &mut self.regions[region as usize];
        *region = std::mem::take(region).with_areas(areas);
        self
    }

    /// A PCI device with `config` bytes of configuration space. It has the nine regions and five interrupts of
    /// Linux VFIO ([`region_index`], [`irq_index`](crate::transport::irq_index)); the others are empty and can
    /// be filled in. [`PciConfig::shape`](super::PciConfig::shape) fills in what a configuration space states.
    pub fn pci(name: impl Into<String>, config: u64) -> Self {
        let mut regions = vec![RegionInfo::default(); 9];
        regions[region_index::CONFIG as usize] = RegionInfo::trapped(config);
        Self { name: name.into(), pci: true, regions, irqs: vec![IrqInfo::default(); 5] }
    }
}
