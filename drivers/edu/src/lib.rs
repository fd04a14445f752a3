//! A driver for QEMU's educational device ([docs/specs/edu][spec] of QEMU). Read it after the README.
//!
//! The device computes factorials, copies memory by DMA, and raises an interrupt when either is done. The
//! driver has what every driver has: registers, DMA memory, interrupts, and an order for set-up and release.
//!
//! ```
//! use std::sync::Arc;
//! use vfio_remap::Device;
//! use vfio_remap::device::Interrupt;
//! use vfio_remap::emulated::{self, Emulated};
//! use vfio_remap_edu::Edu;
//!
//! let device = Device::new(Arc::new(Emulated::new(emulated::Edu::new())?));
//! let edu = Edu::new(device, Interrupt::Msi)?;
//! assert_eq!(edu.factorial(10)?, 3_628_800);
//! edu.close()?;
//! # Ok::<(), vfio_remap::Error>(())
//! ```
//!
//! A real device is one that is bound to vfio-pci:
//!
//! ```no_run
//! # use vfio_remap::{Device, device::Interrupt};
//! # use vfio_remap_edu::Edu;
//! let edu = Edu::new(Device::open("0000:00:03.0")?, Interrupt::Msi)?;
//! # Ok::<(), vfio_remap::Error>(())
//! ```
//!
//! [spec]: https://www.qemu.org/docs/master/specs/edu.html

#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use vfio_remap::device::{
    BufferRequest, DmaBuffer, DmaSpace, Interrupt, IoRegisterBlock, IovaPlacement, Vectors,
};
use vfio_remap::{Device, Error, ErrorKind, Result, register_block, try_poll_until};

/// The address of the device's own buffer of 4096 bytes, for DMA transfers.
pub const DEVICE_BUFFER: u64 = 0x4_0000;

/// The vendor and the device ID of configuration space, and the constant part of the register ID.
const IDS: (u16, u16) = (0x1234, 0x11e8);
const IDENTIFICATION: u32 = 0x00ed;
const CONSTANT: u32 = 0xffff;

/// The time limit for each wait.
const TIMEOUT: Duration = Duration::from_secs(10);

// The registers: name, access mode, width, offset. An access that the data sheet does not allow (a write to ID,
// a read of RAISE) does not compile.
register_block! {
    Registers[0x100] {
        /// 0xRRrr00ed: the device's major and minor version.
        ID(ro u32) @ 0x00;
        /// Reads as the inverse of the written value: a check that the device responds.
        LIVENESS(u32) @ 0x04;
        /// Takes a number; holds its factorial after the computation.
        FACTORIAL(u32) @ 0x08;
        STATUS(u32 => Status) @ 0x20 {
            pub computing: bool,
            #[bits(6)]
            __: u8,
            /// Enables the interrupt at the end of a computation.
            pub interrupt: bool,
            #[bits(24)]
            __: u32,
        }
        /// The causes of the interrupt.
        CAUSES(ro u32) @ 0x24;
        /// Raises an interrupt with the written causes.
        RAISE(wo u32) @ 0x60;
        /// Clears the written causes.
        ACKNOWLEDGE(wo u32) @ 0x64;
        SOURCE(u64) @ 0x80;
        DESTINATION(u64) @ 0x88;
        COUNT(u64) @ 0x90;
        TRANSFER(u64 => Transfer) @ 0x98 {
            pub start: bool,
            /// The direction is from the device to memory.
            pub to_memory: bool,
            /// Enables the interrupt at the end of the transfer.
            pub interrupt: bool,
            #[bits(61)]
            __: u64,
        }
    }
}

/// Causes of interrupts that the device raises. Software raises the others.
const COMPUTED: u32 = 1;
const TRANSFERRED: u32 = 0x100;

/// The direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From memory to the device's buffer.
    ToDevice,
    /// From the device's buffer to memory.
    ToMemory,
}

/// The driver, with the parts of the device that it uses.
#[derive(Debug)]
pub struct Edu {
    device: Device,
    registers: IoRegisterBlock<Registers>,
    buffer: DmaBuffer,
    vectors: Vectors,
    timeout: Duration,
}

impl Edu {
    /// Initializes the device.
    ///
    /// # Errors
    /// `Unsupported` if it is another device: nothing but its memory decoding was changed then. The errors of the
    /// methods of [`Device`] that it calls.
    pub fn new(device: Device, interrupt: Interrupt) -> Result<Self> {
        // The device has 28 address bits, so its memory must have low addresses.
        let buffer = BufferRequest::new(8192).placement(IovaPlacement::below_bits(28));
        Self::with_buffer(device, interrupt, buffer)
    }

    /// As [`new`](Self::new), with a buffer of at least 8192 bytes that the caller specifies.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_buffer(
        device: Device,
        interrupt: Interrupt,
        buffer: BufferRequest,
    ) -> Result<Self> {
        let config = device.config()?;
        let (vendor, id) = (config.vendor_id()?, config.device_id()?);
        if (vendor, id) != IDS {
            return Err(another(&device, format!("it is {vendor:04x}:{id:04x}, not 1234:11e8")));
        }
        // Both are off in a device that VFIO opens. The registers need memory decoding. DMA and MSI need bus
        // mastering; without it they do nothing, and no error is reported.
        config.set_memory_decoding(true)?;
        // Mapped if the BAR can be mapped, otherwise reached by system calls.
        let registers: IoRegisterBlock<Registers> = device.bar(0)?.block(0)?;
        let id = registers.read(Registers::ID)?;
        if id & CONSTANT != IDENTIFICATION {
            return Err(another(&device, format!("it identifies itself as {id:#010x}")));
        }
        config.set_bus_mastering(true)?;
        // A transfer that timed out may still write to the buffer. With a mapping of its own the device no longer
        // reaches the memory after the buffer is dropped, and no other buffer gets it before.
        let buffer = device.dma()?.buffer_with(buffer.own_mapping())?;
        let vectors = device.vectors(interrupt, 1)?;
        Ok(Self { device, registers, buffer, vectors, timeout: TIMEOUT })
    }

    /// The memory that the driver and the device share.
    pub fn buffer(&self) -> &DmaBuffer {
        &self.buffer
    }

    /// The device's IOVA space, to map other memory.
    ///
    /// # Errors
    /// The transport's error.
    pub fn dma(&self) -> Result<DmaSpace> {
        self.device.dma()
    }

    /// The device's interrupt.
    pub fn vectors(&self) -> &Vectors {
        &self.vectors
    }

    /// The device's identification.
    ///
    /// # Errors
    /// Here and below: the transport's error, if the registers are trapped.
    pub fn id(&self) -> Result<u32> {
        self.registers.read(Registers::ID)
    }

    /// The inverse of `value`, computed by the device.
    ///
    /// # Errors
    /// As [`id`](Self::id).
    pub fn liveness(&self, value: u32) -> Result<u32> {
        self.registers.write(Registers::LIVENESS, value)?;
        self.registers.read(Registers::LIVENESS)
    }

    /// `n`! modulo 2^32, by polling the status.
    ///
    /// # Errors
    /// `TimedOut` after ten seconds.
    pub fn factorial_polled(&self, n: u32) -> Result<u32> {
        self.registers.write(Registers::STATUS, Status::new())?;
        self.registers.write(Registers::FACTORIAL, n)?;
        let status = || self.registers.read(Registers::STATUS);
        try_poll_until("a factorial", self.timeout, status, |status| !status.computing())?;
        self.registers.read(Registers::FACTORIAL)
    }

    /// `n`! modulo 2^32, by interrupt.
    ///
    /// # Errors
    /// `TimedOut` if the interrupt does not arrive within ten seconds, whatever else the device raises.
    pub fn factorial(&self, n: u32) -> Result<u32> {
        self.registers.write(Registers::STATUS, Status::new().with_interrupt(true))?;
        self.registers.write(Registers::FACTORIAL, n)?;
        self.serve(COMPUTED)?;
        self.registers.read(Registers::FACTORIAL)
    }

    /// Makes the device raise an interrupt, and waits for it.
    ///
    /// # Errors
    /// As [`factorial`](Self::factorial).
    pub fn ring(&self) -> Result<()> {
        const RUNG: u32 = 2;
        self.registers.write(Registers::RAISE, RUNG)?;
        self.serve(RUNG)
    }

    /// Copies `size` bytes at `from` in the buffer to the device, and back to `to`.
    ///
    /// # Errors
    /// As [`factorial`](Self::factorial).
    pub fn there_and_back(&self, from: u64, to: u64, size: u64) -> Result<()> {
        let base = self.buffer.iova().0;
        self.transfer(base + from, DEVICE_BUFFER, size, Direction::ToDevice)?;
        self.transfer(DEVICE_BUFFER, base + to, size, Direction::ToMemory)
    }

    /// Transfers `size` bytes and waits for the end. One address is an IOVA, the other lies in
    /// [`DEVICE_BUFFER`].
    ///
    /// # Errors
    /// As [`factorial`](Self::factorial). The device does not report a transfer that the IOMMU blocks.
    pub fn transfer(
        &self,
        source: u64,
        destination: u64,
        size: u64,
        direction: Direction,
    ) -> Result<()> {
        self.registers.write(Registers::SOURCE, source)?;
        self.registers.write(Registers::DESTINATION, destination)?;
        self.registers.write(Registers::COUNT, size)?;
        let to_memory = direction == Direction::ToMemory;
        let go = Transfer::new().with_start(true).with_interrupt(true).with_to_memory(to_memory);
        // Earlier writes to memory happen before a write to a register, so the device sees them.
        self.registers.write(Registers::TRANSFER, go)?;
        self.serve(TRANSFERRED)
    }

    /// Waits for the interrupt with this cause, acknowledges it, and unmasks the next one.
    fn serve(&self, cause: u32) -> Result<()> {
        let end = Instant::now() + self.timeout;
        loop {
            self.vectors.wait(0, end.saturating_duration_since(Instant::now()))?;
            // The device asserts its interrupt until every cause is acknowledged.
            let causes = self.registers.read(Registers::CAUSES)?;
            self.registers.write(Registers::ACKNOWLEDGE, causes)?;
            if self.vectors.kind() == Interrupt::Intx {
                // The kernel masks an INTx when it fires, because other devices may share it.
                self.vectors.set_masked(0, false)?;
            }
            if causes & cause != 0 {
                return Ok(());
            }
            // A wait of no time still takes an interrupt that is there.
            if Instant::now() >= end {
                return Err(Error::new(ErrorKind::TimedOut, "wait for", self.device.name())
                    .with_reason(format!(
                        "it raised interrupts for {:?}, the last one with the causes {causes:#x}, none with \
                         {cause:#x}",
                        self.timeout
                    )));
            }
        }
    }

    /// Releases everything, the device last.
    ///
    /// # Errors
    /// `InUse`, with what still holds the device.
    pub fn close(self) -> Result<()> {
        let Self { device, registers, buffer, vectors, timeout: _ } = self;
        drop((registers, buffer, vectors));
        Ok(device.close()?)
    }
}

fn another(device: &Device, reason: String) -> Error {
    Error::new(ErrorKind::Unsupported, "drive", device.name())
        .with_reason(reason)
        .with_advice("this driver is for the educational device of QEMU (-device edu)")
}
