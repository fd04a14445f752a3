//! The guest's view of configuration space.

use std::ops::Range;

use super::bars::BarRegister;
use super::capabilities::{self, Offer};
use super::interrupts::Message;
use crate::Device;
use crate::device::{Config, Interrupt};
use crate::error::{Error, ErrorKind, Result};

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const HEADER_TYPE: u64 = 0x0e;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

/// Bits of the command register (PCI 3.0 §6.2.2).
const IO_SPACE: u16 = 1 << 0;
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;
/// With parity errors and SERR#, which are the guest's own copies.
const COMMAND_WRITABLE: u16 = IO_SPACE | MEMORY_SPACE | BUS_MASTER | 1 << 6 | 1 << 8 | INTX_DISABLE;

/// What a guest sees of configuration space: the bytes that it reads, and for each bit where a read takes it from, and
/// where a write goes. By default a bit reads as zero, and cannot be written.
#[derive(Debug)]
pub(super) struct VirtualConfig {
    pub(super) bytes: Vec<u8>,
    /// Bits that the guest can write here.
    pub(super) writable: Vec<u8>,
    /// Bits that are read from the device.
    pub(super) live: Vec<u8>,
    /// Bits that are written to the device. The others in the same byte are read-only in the device.
    pub(super) through: Vec<u8>,
    /// The bytes after a reset.
    initial: Vec<u8>,
    pub(super) power: Option<usize>,
    pub(super) msi: Option<usize>,
    pub(super) msix: Option<usize>,
    pub(super) express: Option<usize>,
    pub(super) advanced: Option<usize>,
    /// The device was taken away: everything reads as ones.
    pub(super) is_gone: bool,
}

impl VirtualConfig {
    pub(super) fn new(device: &Device, bars: &[BarRegister]) -> Result<Self> {
        let config = device.config()?;
        if config.read_u8(HEADER_TYPE)? & 0x7f != 0 {
            return Err(Error::new(ErrorKind::Unsupported, "pass through", device.name())
                .with_reason("it is a bridge: its configuration header is not of type 0"));
        }
        let size = if device.region(7)?.size() < 0x1000 { 0x100 } else { 0x1000 };
        let empty = || vec![0; size];
        let mut this = Self {
            bytes: empty(),
            writable: empty(),
            live: empty(),
            through: empty(),
            initial: Vec::new(),
            power: None,
            msi: None,
            msix: None,
            express: None,
            advanced: None,
            is_gone: false,
        };
        // Identification, status, revision, class; subsystem; latencies. One function: others are passed through as
        // devices of their own.
        for part in [0..0x04, 0x06..0x0c, 0x2c..0x30, 0x3e..0x40] {
            this.copy(&config, part)?;
        }
        this.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Errors, which are cleared by writing ones, and whether an INTx is asserted.
        this.bytes[STATUS] &= 0xf0;
        this.bytes[STATUS + 1] &= 0x06;
        (this.live[STATUS], this.live[STATUS + 1]) = (0x08, 0xf9);
        this.through[STATUS + 1] = 0xf9;
        // The size of cache lines, and the latency timer.
        this.allow(0x0c, &[0xff; 2]);
        this.allow(INTERRUPT_LINE, &[0xff]);
        let count = |kind| device.interrupt(kind).map_or(0, |info| info.count);
        if count(Interrupt::Intx) > 0 {
            this.copy(&config, INTERRUPT_PIN..INTERRUPT_PIN + 1)?;
        }
        let offer = Offer {
            resettable: device.info().resettable,
            msi: count(Interrupt::Msi),
            msix: count(Interrupt::MsiX),
        };
        capabilities::add(&mut this, &config, &offer)?;
        if size > 0x100 {
            capabilities::add_extended(&mut this, &config)?;
        }
        for bar in bars {
            this.set(bar.register, &bar.flags.to_le_bytes());
            this.allow(bar.register, &bar.writable.to_le_bytes()[..bar.bytes()]);
        }
        this.initial = this.bytes.clone();
        Ok(this)
    }

    /// Sets bytes to what the device has now.
    pub(super) fn copy(&mut self, config: &Config<'_>, range: Range<usize>) -> Result<()> {
        for (at, len) in pieces(range.start as u64, range.len(), 4) {
            let part = at as usize..at as usize + len;
            config.read(at, &mut self.bytes[part])?;
        }
        Ok(())
    }

    pub(super) fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    pub(super) fn read(&self, device: &Device, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if self.is_gone {
            return;
        }
        for (at, len) in pieces(offset, self.inside(offset, data.len()), 4) {
            let (from, to) = (at as usize, (at - offset) as usize);
            let (data, live) = (&mut data[to..to + len], &self.live[from..from + len]);
            if live.iter().any(|mask| *mask != 0)
                && let Err(error) = device.config().and_then(|config| config.read(at, data))
            {
                log::debug!("{error}");
                data.fill(0xff);
            }
            for ((byte, own), live) in data.iter_mut().zip(&self.bytes[from..]).zip(live) {
                *byte = (*byte & live) | (own & !live);
            }
        }
    }

    /// Returns whether the guest has requested a reset.
    pub(super) fn write(&mut self, device: &Device, offset: u64, data: &[u8]) -> bool {
        if self.is_gone {
            return false;
        }
        let was_asleep = self.is_asleep();
        let power = self.power.map_or(0, |at| self.bytes[at + 4]);
        for (at, len) in pieces(offset, self.inside(offset, data.len()), 4) {
            let (to, from) = (at as usize, (at - offset) as usize);
            let data = &data[from..from + len];
            self.write_through(device, to, data);
            for (index, value) in (to..).zip(data) {
                let mask = self.writable[index];
                self.bytes[index] = (self.bytes[index] & !mask) | (value & mask);
            }
        }
        // D1 and D2 do not exist: a write of their numbers changes nothing (PCIe 5.0 §7.5.2.2).
        if let Some(at) = self.power
            && matches!(self.bytes[at + 4] & 3, 1 | 2)
        {
            self.bytes[at + 4] = power;
        }
        let mut reset = was_asleep && !self.is_asleep() && power & 0x08 == 0;
        let bits = [(self.express.map(|at| at + 9), 0x80), (self.advanced.map(|at| at + 4), 1)];
        for (at, bit) in bits {
            let Some(at) = at else { continue };
            reset |= self.bytes[at] & bit != 0;
            self.bytes[at] &= !bit;
        }
        reset
    }

    /// Writes what belongs to the device. A register that is the device's as a whole is written by one access. In
    /// others, only the bytes with such bits are.
    fn write_through(&self, device: &Device, at: usize, data: &[u8]) {
        let masks = &self.through[at..at + data.len()];
        let write = |at: usize, data: &[u8]| {
            if let Err(error) = device.config().and_then(|config| config.write(at as u64, data)) {
                log::debug!("{error}");
            }
        };
        if masks.iter().all(|mask| *mask == 0xff) {
            return write(at, data);
        }
        for (index, (value, mask)) in data.iter().zip(masks).enumerate() {
            if *mask != 0 {
                write(at + index, &[value & mask]);
            }
        }
    }

    /// How many of `len` bytes at `offset` are in configuration space.
    fn inside(&self, offset: u64, len: usize) -> usize {
        let left = (self.bytes.len() as u64).saturating_sub(offset);
        len.min(left as usize)
    }

    /// The state after a reset. The interrupt line is what firmware has noted for the operating system: it stays.
    pub(super) fn reset(&mut self) {
        let line = self.bytes[INTERRUPT_LINE];
        self.bytes.clone_from(&self.initial);
        self.bytes[INTERRUPT_LINE] = line;
    }

    fn command(&self, bit: u16) -> bool {
        !self.is_gone && self.u16(COMMAND) & bit != 0
    }

    /// Whether the device is in D3hot: then it answers nothing but configuration accesses.
    fn is_asleep(&self) -> bool {
        self.power.is_some_and(|at| self.bytes[at + 4] & 3 == 3)
    }

    pub(super) fn bus_mastering(&self) -> bool {
        self.command(BUS_MASTER) && !self.is_asleep()
    }

    pub(super) fn has_intx(&self) -> bool {
        !self.is_gone && self.bytes[INTERRUPT_PIN] != 0 && !self.command(INTX_DISABLE)
    }

    /// The number of vectors of MSI-X, if the guest has enabled it.
    pub(super) fn msix_vectors(&self) -> Option<u32> {
        let control = self.u16(self.msix.filter(|_| !self.is_gone)? + 2);
        (control & 0x8000 != 0).then_some(u32::from(control & 0x7ff) + 1)
    }

    /// Whether the guest has masked all vectors of MSI-X at once.
    pub(super) fn is_msix_masked(&self) -> bool {
        self.msix.is_some_and(|at| self.u16(at + 2) & 0x4000 != 0)
    }

    /// The number of vectors of MSI, if the guest has enabled it.
    pub(super) fn msi_vectors(&self) -> Option<u32> {
        let control = self.u16(self.msi.filter(|_| !self.is_gone)? + 2);
        (control & 1 != 0).then_some(1 << (control >> 4 & 7).min(control >> 1 & 7))
    }

    /// What a vector of MSI sends; `None` if it is masked or not enabled. The lowest bits of the data are the number of
    /// the vector (PCI 3.0 §6.8.1.6).
    pub(super) fn msi_message(&self, vector: u32) -> Option<Message> {
        let (at, count) = (self.msi?, self.msi_vectors()?);
        let control = self.u16(at + 2);
        let (high, data) =
            if control & 0x80 == 0 { (0, at + 8) } else { (self.u32(at + 8), at + 12) };
        let is_masked = control & 0x100 != 0 && self.u32(data + 4) >> vector & 1 != 0;
        let address = u64::from(high) << 32 | u64::from(self.u32(at + 4));
        let message =
            Message { address, data: (u32::from(self.u16(data)) & !(count - 1)) | vector };
        (vector < count && !is_masked).then_some(message)
    }

    /// The address at which a BAR responds, if it does.
    pub(super) fn address_of(&self, bar: &BarRegister) -> Option<u64> {
        let decodes = self.command(if bar.is_io() { IO_SPACE } else { MEMORY_SPACE });
        let enabled = !bar.is_rom() || self.bytes[bar.register] & 1 != 0;
        let mut bytes = [0; 8];
        bytes[..bar.bytes()].copy_from_slice(&self.bytes[bar.register..][..bar.bytes()]);
        let address = u64::from_le_bytes(bytes) & bar.writable & !1;
        (decodes && enabled && !self.is_asleep() && address != 0).then_some(address)
    }
}

/// Splits an access into parts that are naturally aligned: offset and length. None has more than `most` bytes, a power
/// of two.
pub(super) fn pieces(offset: u64, len: usize, most: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = offset.saturating_add(len as u64);
    let mut at = offset;
    std::iter::from_fn(move || {
        let left = end.checked_sub(at).filter(|left| *left > 0)?;
        let aligned = 1 << at.trailing_zeros().min(most.ilog2());
        let len = aligned.min(1 << left.ilog2());
        let piece = (at, len as usize);
        at += len;
        Some(piece)
    })
}
