//! Configuration space of a PCI device.

use std::ops::Range;

use super::capabilities::Capability;
use super::layout::Reserved;
use super::revocation::DECODING;
use super::{BARS, Device};
use crate::error::{Error, ErrorKind, Result};

/// The VFIO region that holds configuration space.
pub(super) const REGION: u32 = 7;

pub(super) const COMMAND: u64 = 0x04;
const REVISION_AND_CLASS: u64 = 0x08;
const BAR0: u64 = 0x10;
pub(super) const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;
const MSIX_ENTRY: u64 = 16;

/// Bits of the command register (PCI 3.0 §6.2.2).
const IO_SPACE: u16 = 1 << 0;
pub(super) const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;

/// The device control register in the PCI Express capability, and its bits that enable the reporting
/// of non-fatal and of fatal errors (PCIe 5.0 §7.5.3.4).
const DEVICE_CONTROL: u64 = 8;
const REPORT_UNCORRECTABLE: u16 = 1 << 1 | 1 << 2;

/// Configuration space of a PCI device, through its transport. Offsets are in bytes; values have the machine's
/// byte order.
#[derive(Clone, Copy, Debug)]
pub struct Config<'d> {
    pub(super) device: &'d Device,
}

/// Where a device keeps its MSI-X table and pending bits (PCIe 5.0 §7.7.2).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Msix {
    /// The number of vectors, 1 to 2048. The table has 16 bytes for each.
    pub count: u32,
    /// The table: its BAR, and its bytes of that.
    pub table: (u32, Range<u64>),
    /// The pending bits: their BAR, and their bytes of that.
    pub pending: (u32, Range<u64>),
}

/// What the register of a BAR says of it (PCI 3.0 §6.2.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BarKind {
    /// It holds I/O ports.
    Io,
    /// It holds memory.
    #[non_exhaustive]
    Memory {
        /// Whether its address has 64 bits. It then takes the next register, too.
        is_64_bit: bool,
        /// Whether reads have no side effects.
        prefetchable: bool,
    },
}

impl Msix {
    /// The parts of BAR `index` that hold the table and the pending bits.
    pub(crate) fn within(&self, index: u32) -> Reserved {
        let of = |(bar, range): &(u32, Range<u64>)| (*bar == index).then(|| range.clone());
        Reserved { table: of(&self.table), pending: of(&self.pending) }
    }
}

impl<'d> Config<'d> {
    /// `Unsupported` if the device is not PCI.
    pub(super) fn of(device: &'d Device) -> Result<Self> {
        if device.info().pci {
            return Ok(Self { device });
        }
        Err(Error::new(ErrorKind::Unsupported, "open", "configuration space")
            .with_reason(format!("{} is not a PCI device", device.name())))
    }

    /// Reads `data.len()` bytes. One, two or four naturally aligned bytes are one access.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.device.transport().read_at(REGION, offset, data)
    }

    /// Reads a byte.
    ///
    /// # Errors
    /// `OutOfRange`; the transport's error.
    pub fn read_u8(&self, offset: u64) -> Result<u8> {
        Ok(u8::from_le_bytes(self.read_array(offset)?))
    }

    /// Reads 16 bits.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn read_u16(&self, offset: u64) -> Result<u16> {
        Ok(u16::from_le_bytes(self.read_array(offset)?))
    }

    /// Reads 32 bits.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn read_u32(&self, offset: u64) -> Result<u32> {
        Ok(u32::from_le_bytes(self.read_array(offset)?))
    }

    /// Writes a byte, as [`write`](Self::write) does.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn write_u8(&self, offset: u64, value: u8) -> Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Writes 16 bits, as [`write`](Self::write) does.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn write_u16(&self, offset: u64, value: u16) -> Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Writes 32 bits, as [`write`](Self::write) does.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn write_u32(&self, offset: u64, value: u32) -> Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// The vendor ID. A removed device reads 0xffff, unless the kernel virtualizes this register: then the ID
    /// remains.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn vendor_id(&self) -> Result<u16> {
        self.read_u16(0)
    }

    /// The device ID.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn device_id(&self) -> Result<u16> {
        self.read_u16(2)
    }

    /// The class code in the lower 24 bits: base class, sub-class, programming interface (PCI 3.0 §6.2.1). An
    /// NVMe controller has 0x010802.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn class_code(&self) -> Result<u32> {
        Ok(self.read_u32(REVISION_AND_CLASS)? >> 8)
    }

    /// Whether the device responds to accesses to its memory BARs.
    ///
    /// # Errors
    /// `Gone` if the register reads all ones, which means that the device does not respond; the transport's
    /// error.
    pub fn memory_decoding(&self) -> Result<bool> {
        Ok(self.present_u16(COMMAND)? & MEMORY_SPACE != 0)
    }

    /// Enables or disables the memory BARs. Before they are disabled, the windows of the device are revoked: loads
    /// answer all ones and stores are dropped. After they are enabled again by this method, these windows are
    /// restored. While they are disabled by other means, an access through a window of a vfio-pci device raises
    /// SIGBUS, and so does one through a sealed window. Behind a vfio-user server, BARs without an address get one before they are enabled.
    ///
    /// # Errors
    /// As [`memory_decoding`](Self::memory_decoding). That of a window that could not be revoked: decoding stays enabled
    /// then. That of a window or a peer-to-peer mapping that could not be restored: decoding is enabled then, and
    /// [`Device::restore`] tries again. A sealed window is no error.
    pub fn set_memory_decoding(&self, on: bool) -> Result<()> {
        self.set_decoding(MEMORY_SPACE, on)
    }

    /// Whether the device responds to accesses to its I/O port BARs.
    ///
    /// # Errors
    /// As [`memory_decoding`](Self::memory_decoding).
    pub fn io_decoding(&self) -> Result<bool> {
        Ok(self.present_u16(COMMAND)? & IO_SPACE != 0)
    }

    /// Enables or disables the I/O port BARs, as [`set_memory_decoding`](Self::set_memory_decoding) does for
    /// memory.
    ///
    /// # Errors
    /// As [`memory_decoding`](Self::memory_decoding).
    pub fn set_io_decoding(&self, on: bool) -> Result<()> {
        self.set_decoding(IO_SPACE, on)
    }

    /// Whether the device may start transactions: DMA and MSI.
    ///
    /// # Errors
    /// As [`memory_decoding`](Self::memory_decoding).
    pub fn bus_mastering(&self) -> Result<bool> {
        Ok(self.present_u16(COMMAND)? & BUS_MASTER != 0)
    }

    /// Enables or disables transactions that the device starts: DMA and MSI.
    ///
    /// # Errors
    /// As [`memory_decoding`](Self::memory_decoding).
    pub fn set_bus_mastering(&self, on: bool) -> Result<()> {
        self.set_command(BUS_MASTER, on)
    }

    /// Enables or disables the reporting of uncorrectable errors to the root port. If the kernel handles them
    /// (AER), [`Event::Error`](super::Event::Error) follows. A reset may disable it.
    ///
    /// # Errors
    /// `Unsupported` if the device is not PCI Express; as
    /// [`memory_decoding`](Self::memory_decoding).
    pub fn set_error_reporting(&self, on: bool) -> Result<()> {
        let Some(capability) = self.capability(EXPRESS)? else {
            let object = self.device.name();
            return Err(Error::new(ErrorKind::Unsupported, "enable error reporting on", object)
                .with_reason("the device is not PCI Express"));
        };
        self.set_bits(capability.offset + DEVICE_CONTROL, REPORT_UNCORRECTABLE, on)
    }

    /// The first capability with this ID (PCI 3.0 §6.7); `None` if there is none.
    /// [`capabilities`](Self::capabilities) lists all of them.
    ///
    /// # Errors
    /// `Malformed` if the list loops or points into the header; as
    /// [`memory_decoding`](Self::memory_decoding).
    pub fn capability(&self, id: u8) -> Result<Option<Capability>> {
        let wanted = |found: &Result<Capability>| found.as_ref().map_or(true, |it| it.id == id);
        self.capabilities().find(wanted).transpose()
    }

    /// The size in bytes: 256, or 4096 with extended configuration space.
    pub(super) fn size(&self) -> Result<u64> {
        Ok(self.device.transport().region(REGION)?.size)
    }

    /// The kind of BAR `index`, 0 to 5, as its register states it. `None` if the register is the upper half of the
    /// BAR before. Whether there is such a BAR is a matter of its size: [`Device::bar`]. The register of a BAR that
    /// does not exist reads as 32-bit memory.
    ///
    /// # Errors
    /// `NotFound` from 6 on; as [`memory_decoding`](Self::memory_decoding).
    pub fn bar_kind(&self, index: u32) -> Result<Option<BarKind>> {
        if index >= BARS {
            let object = format!("bar {index} of {}", self.device.name());
            return Err(Error::new(ErrorKind::NotFound, "find", object)
                .with_reason("BARs have the numbers 0 to 5"));
        }
        let mut at = 0;
        loop {
            let value = self.present_u32(BAR0 + 4 * u64::from(at))?;
            let kind = match value & 7 {
                bits if bits & 1 != 0 => BarKind::Io,
                bits => {
                    let prefetchable = value & 8 != 0;
                    BarKind::Memory { is_64_bit: bits == 4, prefetchable }
                }
            };
            let next =
                at + if matches!(kind, BarKind::Memory { is_64_bit: true, .. }) { 2 } else { 1 };
            if next > index {
                return Ok((at == index).then_some(kind));
            }
            at = next;
        }
    }

    /// Where the MSI-X table and the pending bits are, and how many vectors there are. `None` if the device has no
    /// MSI-X. Whether the places lie in the BARs is not checked.
    ///
    /// # Errors
    /// As [`capability`](Self::capability).
    pub fn msix(&self) -> Result<Option<Msix>> {
        let Some(Capability { offset: at, .. }) = self.capability(MSIX)? else { return Ok(None) };
        let vectors = u64::from(self.present_u16(at + 2)? & 0x7ff) + 1;
        let place = |offset: u64, size: u64| -> Result<(u32, Range<u64>)> {
            let value = self.present_u32(at + offset)?;
            let start = u64::from(value & !7);
            Ok((value & 7, start..start + size))
        };
        Ok(Some(Msix {
            count: vectors as u32,
            table: place(4, vectors * MSIX_ENTRY)?,
            pending: place(8, vectors.div_ceil(64) * 8)?,
        }))
    }

    fn set_command(&self, bit: u16, on: bool) -> Result<()> {
        self.set_bits(COMMAND, bit, on)
    }

    fn set_decoding(&self, bit: u16, on: bool) -> Result<()> {
        let _one = self.device.control_lock();
        if on {
            self.device.transport().assign_addresses()?;
        }
        let device = &self.device.inner;
        if bit != MEMORY_SPACE {
            return self.change_bits(COMMAND, bit, on);
        }
        if on {
            self.change_bits(COMMAND, bit, on)?;
            return device.end_outage(DECODING);
        }
        let was_off = device.is_away_for(DECODING);
        if !was_off {
            device.try_take_away(DECODING)?;
        }
        let result = self.change_bits(COMMAND, bit, on);
        if result.is_err() && !was_off {
            // What could not be restored is logged.
            let _ = device.end_outage(DECODING);
        }
        result
    }

    fn set_bits(&self, register: u64, bits: u16, on: bool) -> Result<()> {
        let _one = self.device.control_lock();
        self.change_bits(register, bits, on)
    }

    fn change_bits(&self, register: u64, bits: u16, on: bool) -> Result<()> {
        let value = self.present_u16(register)?;
        let value = if on { value | bits } else { value & !bits };
        self.put(register, &value.to_le_bytes())
    }

    /// Reads 16 bits that are not all 1 in any device. All ones mean that the device does not respond (PCIe 5.0
    /// §2.3.2): `Gone`.
    pub(super) fn present_u16(&self, offset: u64) -> Result<u16> {
        let value = self.read_u16(offset)?;
        if value == u16::MAX { Err(self.gone(offset)) } else { Ok(value) }
    }

    /// As [`present_u16`](Self::present_u16), for 32 bits.
    fn present_u32(&self, offset: u64) -> Result<u32> {
        let value = self.read_u32(offset)?;
        if value == u32::MAX { Err(self.gone(offset)) } else { Ok(value) }
    }

    #[cold]
    fn gone(&self, offset: u64) -> Error {
        let object = format!("configuration space of {}", self.device.name());
        Error::new(ErrorKind::Gone, "read", object)
            .with_reason(format!("it reads all ones at {offset:#x}: the device does not respond"))
            .with_advice("check that it is plugged in and that its slot and link are on; then close it and open it again")
    }

    /// Writes `data`, and changes nothing else.
    pub(super) fn put(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.device.transport().write_at(REGION, offset, data)
    }

    fn read_array<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn malformed(&self, reason: String) -> Error {
        let object = format!("configuration space of {}", self.device.name());
        Error::new(ErrorKind::Malformed, "read", object).with_reason(reason)
    }
}
