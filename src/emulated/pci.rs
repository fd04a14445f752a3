//! Configuration space for models of PCI devices.

use super::model::Shape;
use crate::transport::{IrqInfo, RegionInfo, irq_index};

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

const BUS_MASTER: u16 = 1 << 2;
/// I/O, memory, bus master, parity, SERR#, and interrupt disable (PCI 3.0 §6.2.2).
const COMMAND_WRITABLE: u16 = 0x0547;
const HAS_CAPABILITIES: u16 = 1 << 4;
const POWER: u8 = 0x01;
const MSI: u8 = 0x05;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;

/// Most vectors of MSI-X (PCIe 5.0 §7.7.2.2).
const MAX_VECTORS: u16 = 2048;
/// The largest I/O BAR, in bytes (PCI 3.0 §6.2.5.1).
const MAX_IO: u32 = 256;

/// PMCSR: its offset, the bits of the power state, and the bits that can be written (PCIe 5.0 §7.5.2.2).
const POWER_CONTROL: usize = 4;
const POWER_STATE: u8 = 3;
const POWER_WRITABLE: u16 = 0x0103;
/// Version 3, states D0 and D3hot.
const POWER_VERSION: u16 = 3;

/// The capability of PCI Express (PCIe 5.0 §7.5.3): its size, and version 2 of an endpoint.
const EXPRESS_SIZE: usize = 0x3c;
const ENDPOINT: u16 = 2;
/// Payloads of up to 512 bytes, error reporting by role, function level reset.
const DEVICE_CAPABILITIES: u32 = 2 | 1 << 15 | 1 << 28;
const DEVICE_CONTROL: usize = 0x08;
const FUNCTION_RESET: u8 = 0x80;
/// Four lanes at 2.5 GT/s: what the link can do, and its state.
const LINK: u32 = 1 | 4 << 4;

/// Configuration space: its bytes, and which bits can be written. A BAR returns its size after all ones were
/// written, as PCI specifies.
///
/// [`shape`](Self::shape) makes the [`Shape`] of the device from it, so that both have the same BARs and
/// interrupts.
#[derive(Clone, Debug)]
pub struct PciConfig {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    initial: Vec<u8>,
    /// The offset of the next capability.
    next: usize,
    /// The offset of the pointer to the next capability.
    link: usize,
    /// The sizes of BARs; 0 if there is none.
    bars: [u64; 6],
    /// The number of vectors of INTx, MSI and MSI-X.
    vectors: [u32; 3],
}

impl PciConfig {
    /// `size` bytes (256, or 4096 for any larger number) of a device with this vendor ID, device ID, class (24
    /// bits) and revision, without BARs.
    pub fn new(size: usize, vendor: u16, device: u16, class: u32, revision: u8) -> Self {
        let size = if size > 256 { 4096 } else { 256 };
        let mut config = Self {
            bytes: vec![0; size],
            writable: vec![0; size],
            initial: Vec::new(),
            next: FIRST_CAPABILITY,
            link: CAPABILITIES,
            bars: [0; 6],
            vectors: [0; 3],
        };
        config.set(0, &vendor.to_le_bytes());
        config.set(2, &device.to_le_bytes());
        config.set(8, &(class << 8 | u32::from(revision)).to_le_bytes());
        config.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        config.allow(INTERRUPT, &[0xff]);
        config.sealed()
    }

    /// Sets the subsystem IDs.
    #[must_use]
    pub fn subsystem(mut self, vendor: u16, device: u16) -> Self {
        self.set(SUBSYSTEM, &(u32::from(device) << 16 | u32::from(vendor)).to_le_bytes());
        self.sealed()
    }

    /// Adds a 32-bit memory BAR of `size` bytes.
    ///
    /// # Panics
    /// If `size` is not a power of two of at least 16, if `index` is above 5, or if another BAR has it.
    #[must_use]
    #[track_caller]
    pub fn bar32(mut self, index: usize, size: u32) -> Self {
        self.add_bar(index, 1, size.into());
        self.allow(BARS + 4 * index, &(!(size - 1)).to_le_bytes());
        self.sealed()
    }

    /// Adds a 64-bit memory BAR of `size` bytes. It takes the next index, too.
    ///
    /// # Panics
    /// If `size` is not a power of two of at least 16, if `index` is above 4, or if another BAR has it or the
    /// next one.
    #[must_use]
    #[track_caller]
    pub fn bar64(mut self, index: usize, size: u64) -> Self {
        self.add_bar(index, 2, size);
        self.set(BARS + 4 * index, &4u32.to_le_bytes());
        self.allow(BARS + 4 * index, &(!(size - 1)).to_le_bytes());
        self.sealed()
    }

    /// Adds an I/O BAR of `size` bytes.
    ///
    /// # Panics
    /// If `size` is not a power of two from 16 to 256, if `index` is above 5, or if another BAR has it.
    #[must_use]
    #[track_caller]
    pub fn bar_io(mut self, index: usize, size: u32) -> Self {
        assert!(size <= MAX_IO, "an I/O BAR of {size:#x} bytes: it has at most {MAX_IO:#x}");
        self.add_bar(index, 1, size.into());
        self.set(BARS + 4 * index, &1u32.to_le_bytes());
        self.allow(BARS + 4 * index, &(!(size - 1)).to_le_bytes());
        self.sealed()
    }

    /// Checks a BAR that takes `count` indexes from `index` on, and stores its size.
    #[track_caller]
    fn add_bar(&mut self, index: usize, count: usize, size: u64) {
        assert!(
            size.is_power_of_two() && size >= 16,
            "a BAR of {size:#x} bytes: its size must be a power of two, at least 16"
        );
        assert!(
            index < self.bars.len() && index + count <= self.bars.len(),
            "there is no BAR {index}"
        );
        let is_taken = |index: usize| {
            let is_upper_half = index > 0
                && self.bars[index - 1] != 0
                && self.bytes[BARS + 4 * (index - 1)] & 4 != 0;
            self.bars[index] != 0 || is_upper_half
        };
        assert!(
            !(index..index + count).any(is_taken),
            "BAR {index} or its upper half exists already"
        );
        self.bars[index] = size;
    }

    /// The shape of a device with this configuration space: its BARs, all trapped, and its interrupts, with the
    /// features that Linux VFIO reports for them. Make a BAR mappable by [`Shape::with_areas`], or by
    /// [`RegionInfo::mappable`] in [`Shape::regions`].
    ///
    /// ```
    /// use vfio_remap::emulated::PciConfig;
    ///
    /// let config = PciConfig::new(256, 0x1234, 0x5678, 0x00_ff00, 0)
    ///     .bar32(0, 0x4000)
    ///     .msix(3, (0, 0x2000), (0, 0x3000));
    /// let shape = config.shape("example").with_areas(0, [0..0x2000]);
    /// assert_eq!((shape.regions[0].size, shape.irqs[2].count), (0x4000, 3));
    /// ```
    pub fn shape(&self, name: impl Into<String>) -> Shape {
        let mut shape = Shape::pci(name, self.bytes.len() as u64);
        for (region, size) in shape.regions.iter_mut().zip(self.bars) {
            if size != 0 {
                *region = RegionInfo::trapped(size);
            }
        }
        let [intx, msi, msix] = self.vectors;
        for (index, count, features) in [
            (irq_index::INTX, intx, IrqInfo::with_automasking as fn(IrqInfo) -> IrqInfo),
            (irq_index::MSI, msi, IrqInfo::with_noresize),
            (irq_index::MSIX, msix, |vectors| vectors),
        ] {
            if count != 0 {
                shape.irqs[index as usize] = features(IrqInfo::eventfds(count));
            }
        }
        shape
    }

    /// Adds power management with the states D0 and D3hot (PCIe 5.0 §7.5.2).
    #[must_use]
    pub fn power_management(mut self) -> Self {
        let at = self.capability(POWER, 8);
        self.set(at + 2, &POWER_VERSION.to_le_bytes());
        self.allow(at + POWER_CONTROL, &POWER_WRITABLE.to_le_bytes());
        self.sealed()
    }

    /// Adds the capability of a PCI Express endpoint: function level reset, four lanes (PCIe 5.0 §7.5.3).
    #[must_use]
    pub fn express(mut self) -> Self {
        let at = self.capability(EXPRESS, EXPRESS_SIZE);
        self.set(at + 2, &ENDPOINT.to_le_bytes());
        self.set(at + 4, &DEVICE_CAPABILITIES.to_le_bytes());
        self.allow(at + DEVICE_CONTROL, &0xffffu16.to_le_bytes());
        self.set(at + 0x0c, &LINK.to_le_bytes());
        self.allow(at + 0x10, &0x00c3u16.to_le_bytes());
        self.set(at + 0x12, &(LINK as u16).to_le_bytes());
        // All ranges of completion timeouts, and the one that is selected.
        self.set(at + 0x24, &0x1fu32.to_le_bytes());
        self.allow(at + 0x28, &0x1fu16.to_le_bytes());
        self.sealed()
    }

    /// Adds INTA#.
    #[must_use]
    pub fn intx(mut self) -> Self {
        self.set(INTERRUPT + 1, &[1]);
        self.vectors[0] = 1;
        self.sealed()
    }

    /// Adds MSI with one vector and a 64-bit address (PCI 3.0 §6.8.1). A function has one MSI capability: a
    /// second call changes nothing.
    #[must_use]
    pub fn msi(mut self) -> Self {
        let at = self.capability(MSI, 14);
        self.vectors[1] = 1;
        self.set(at + 2, &0x80u16.to_le_bytes());
        self.allow(at + 2, &1u16.to_le_bytes());
        self.allow(at + 4, &0xffff_ffff_ffff_fffcu64.to_le_bytes());
        self.allow(at + 12, &[0xff, 0xff]);
        self.sealed()
    }

    /// Adds MSI-X with `count` vectors, and the table and the pending bits at these offsets of BARs (PCIe 5.0
    /// §7.7.2). A function has one MSI-X capability: the last call counts.
    ///
    /// # Panics
    /// If `count` is 0 or above 2048, if a BAR is above 5, or if an offset is not a multiple of eight.
    #[must_use]
    #[track_caller]
    pub fn msix(mut self, count: u16, table: (u8, u32), pending: (u8, u32)) -> Self {
        assert!((1..=MAX_VECTORS).contains(&count), "MSI-X with {count} vectors");
        for (bar, offset) in [table, pending] {
            assert!(bar < 6, "there is no BAR {bar}");
            assert!(offset.is_multiple_of(8), "{offset:#x} is not a multiple of eight");
        }
        let at = self.capability(MSIX, 12);
        self.vectors[2] = count.into();
        self.set(at + 2, &(count - 1).to_le_bytes());
        self.allow(at + 2, &0xc000u16.to_le_bytes());
        for (place, (bar, offset)) in [(at + 4, table), (at + 8, pending)] {
            self.set(place, &(offset | u32::from(bar)).to_le_bytes());
        }
        self.sealed()
    }

    /// The offset of the capability `id`. It is appended with `size` bytes if it does not exist. There is at
    /// most one of each, so they fit into the first 256 bytes.
    fn capability(&mut self, id: u8, size: usize) -> usize {
        if let Some(at) = self.find(id) {
            return at;
        }
        let at = self.next;
        self.set(self.link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(STATUS, &HAS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        self.next = (at + size).next_multiple_of(4);
        at
    }

    fn find(&self, id: u8) -> Option<usize> {
        let next = |at: &usize| Some(usize::from(self.bytes[at + 1]));
        std::iter::successors(Some(usize::from(self.bytes[CAPABILITIES])), next)
            .take_while(|&at| at != 0)
            .find(|&at| self.bytes[at] == id)
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn sealed(mut self) -> Self {
        self.initial.clone_from(&self.bytes);
        self
    }

    /// Reads `data.len()` bytes at `offset`; all ones past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(index));
            *byte = at.and_then(|at| self.bytes.get(at)).copied().unwrap_or(0xff);
        }
    }

    /// Writes the writable bits of `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, mask), value) in bytes.zip(data) {
            *byte = (*byte & !mask) | (value & mask);
        }
    }

    /// Whether the device may start transactions, DMA and MSI: in D0, if the driver has enabled bus mastering.
    pub fn bus_mastering(&self) -> bool {
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        command & BUS_MASTER != 0 && self.is_awake()
    }

    /// Whether the device is in D0; always, without power management. In D3hot its BARs do not respond.
    pub fn is_awake(&self) -> bool {
        self.find(POWER).is_none_or(|at| self.bytes[at + POWER_CONTROL] & POWER_STATE == 0)
    }

    /// Whether a function level reset was requested since the last call. The model must do it.
    pub fn take_reset(&mut self) -> bool {
        let Some(at) = self.find(EXPRESS) else { return false };
        let control = &mut self.bytes[at + DEVICE_CONTROL + 1];
        let asked = *control & FUNCTION_RESET != 0;
        *control &= !FUNCTION_RESET;
        asked
    }

    /// Restores the initial values, as a reset does.
    pub fn reset(&mut self) {
        self.bytes.clone_from(&self.initial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> PciConfig {
        PciConfig::new(256, 0x1234, 0x11e8, 0x01_0802, 3)
            .bar32(0, 1 << 20)
            .bar64(2, 1 << 33)
            .msi()
            .msix(5, (2, 0x2000), (2, 0x3000))
    }

    fn read_u32(config: &PciConfig, at: u64) -> u32 {
        let mut bytes = [0; 4];
        config.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_bar_written_with_ones_answers_its_size() {
        let mut config = config();
        config.write(0x10, &[0xff; 24]);
        let bars = [0x10, 0x14, 0x18, 0x1c].map(|at| read_u32(&config, at));
        assert_eq!(bars, [0xfff0_0000, 0, 4, 0xffff_fffe]);
        config.reset();
        assert_eq!(read_u32(&config, 0x10), 0);
    }

    #[test]
    fn a_shape_has_what_its_configuration_space_states() {
        let shape = config().intx().shape("it");
        let sizes: Vec<_> = shape.regions.iter().map(|region| region.size).collect();
        assert_eq!(sizes, [1 << 20, 0, 1 << 33, 0, 0, 0, 0, 256, 0]);
        let counts: Vec<_> = shape.irqs.iter().map(|irq| irq.count).collect();
        assert_eq!(counts, [1, 1, 5, 0, 0]);
        assert!(shape.irqs[0].automasked && shape.irqs[1].noresize && !shape.irqs[2].noresize);
        let shape = config().shape("it").with_areas(2, [0..4096]);
        assert_eq!(shape.regions[2], RegionInfo::trapped(1 << 33).with_areas([0..4096]));
        assert_eq!(shape.irqs[0].count, 0);
    }

    #[test]
    fn what_no_device_can_have_is_refused() {
        let empty = || PciConfig::new(256, 1, 2, 3, 4);
        let refused = |make: &dyn Fn() -> PciConfig| {
            let make = std::panic::AssertUnwindSafe(make);
            std::panic::catch_unwind(|| drop(make())).is_err()
        };
        for size in [0, 8, 3000] {
            assert!(refused(&|| empty().bar32(0, size)), "{size}");
            assert!(refused(&|| empty().bar64(0, size.into())), "{size}");
        }
        for index in [6, 9, usize::MAX] {
            assert!(refused(&|| empty().bar32(index, 16)), "{index}");
            assert!(refused(&|| empty().bar64(index - 1, 16)), "{index}");
        }
        assert!(refused(&|| config().bar32(0, 16)), "it exists");
        assert!(refused(&|| config().bar32(3, 16)), "the upper half of another");
        assert!(refused(&|| config().bar64(1, 16)), "its upper half exists");
        drop(empty().bar32(5, 16).bar64(3, 16));
        assert!(refused(&|| empty().bar32(5, 1 << 31).msix(0, (5, 0), (5, 8))));
        assert!(refused(&|| empty().msix(2049, (5, 0), (5, 8))));
        assert!(refused(&|| empty().msix(1, (6, 0), (5, 8))));
        assert!(refused(&|| empty().msix(1, (5, 0), (5, 12))));
    }

    #[test]
    fn capabilities_are_linked() {
        let config = config();
        assert_eq!(read_u32(&config, 0x34), 0x40);
        assert_eq!(read_u32(&config, 0x40), 0x0080_5005);
        assert_eq!(read_u32(&config, 0x50), 0x0004_0011);
        assert_eq!(read_u32(&config, 0x54), 0x2002);
        assert_eq!(read_u32(&config, 4) >> 16, 0x10);
    }

    #[test]
    fn a_capability_made_again_is_the_same_one() {
        let mut config = config();
        for vectors in 1..20 {
            config = config.msi().msix(vectors, (1, 0x4000), (1, 0x5000));
        }
        assert_eq!(read_u32(&config, 0x40), 0x0080_5005);
        // The last one, with 19 vectors and its table at 0x4000 of BAR 1.
        assert_eq!([0x50, 0x54, 0x58].map(|at| read_u32(&config, at)), [0x12_0011, 0x4001, 0x5001]);
        assert_eq!(read_u32(&config, 0x5c), 0, "there is no third");
        let size = |wanted| PciConfig::new(wanted, 0, 0, 0, 0).bytes.len();
        assert_eq!([0, 256, 4096, usize::MAX].map(size), [256, 256, 4096, 4096]);
    }

    #[test]
    fn an_io_bar_says_that_it_is_one() {
        let mut config = config().bar_io(4, 32);
        config.write(0x20, &[0xff; 4]);
        assert_eq!(read_u32(&config, 0x20), 0xffff_ffe1);
    }

    #[test]
    fn a_device_in_d3hot_starts_nothing() {
        let mut config = config().power_management();
        config.write(4, &[4, 0]);
        assert!(config.is_awake() && config.bus_mastering());
        assert_eq!(read_u32(&config, 0x5c), 0x0003_0001);
        config.write(0x60, &[0xff; 4]);
        assert_eq!(read_u32(&config, 0x60), 0x0103);
        assert!(!config.is_awake() && !config.bus_mastering());
        config.write(0x60, &[0]);
        assert!(config.bus_mastering());
    }

    #[test]
    fn a_function_level_reset_is_requested_once() {
        let mut config = config().express();
        assert_eq!(read_u32(&config, 0x5c), 0x0002_0010);
        assert_eq!(read_u32(&config, 0x6c), 0x0041_0000, "the link");
        assert!(!config.take_reset());
        config.write(0x64, &[0x10, 0xa8]);
        assert!(config.take_reset() && !config.take_reset());
        assert_eq!(read_u32(&config, 0x64), 0x2810, "the rest stays");
    }

    #[test]
    fn what_cannot_be_written_stays_and_nothing_lies_past_the_end() {
        let mut config = config();
        config.write(0, &[0; 4]);
        config.write(u64::MAX, &[0; 4]);
        config.write(254, &[0; 4]);
        assert_eq!(read_u32(&config, 0), 0x11e8_1234);
        assert_eq!(read_u32(&config, 254), 0xffff_0000);
        assert!(!config.bus_mastering());
        config.write(4, &[4, 0]);
        assert!(config.bus_mastering());
    }
}
