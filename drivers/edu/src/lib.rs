//! A driver for QEMU's educational device ([docs/specs/edu][spec] of QEMU): what to read after the README.
//!
//! The device computes factorials, copies memory by DMA, and interrupts when either is done. A driver for it
//! is what any driver is: registers, memory that the device reaches, interrupts, and an order in which
//! they are set up and let go.
//!
//! ```
//! use std::sync::Arc;
//! use vfio_remap::Device;
//! use vfio_remap::device::Interrupt;
//! use vfio_remap::emulated::{self, Emulated};
//! use vfio_remap_edu::Edu;
//!
//! // A real one: Device::open("0000:00:03.0".parse()?)
//! let device = Device::new(Arc::new(Emulated::new(emulated::Edu::new())?));
//! let edu = Edu::new(device, Interrupt::Msi)?;
//! assert_eq!(edu.factorial(10)?, 3_628_800);
//! edu.close()?;
//! # Ok::<(), vfio_remap::Error>(())
//! ```
//!
//! [spec]: https://www.qemu.org/docs/master/specs/edu.html

#![forbid(unsafe_code)]

use std::time::Duration;

use vfio_remap::device::{
    BufferRequest, DmaBuffer, DmaSpace, Interrupt, IoRegisterBlock, IovaPlacement, Vectors,
};
use vfio_remap::{Device, Error, ErrorKind, Result, register_block, try_poll_until};

/// Where the device keeps 4096 bytes of its own, as DMA transfers address them.
pub const DEVICE_BUFFER: u64 = 0x4_0000;

/// How long the device is waited for.
const TIMEOUT: Duration = Duration::from_secs(10);

// The registers: names, widths, what may be done with them, where they are. An access that the data sheet
// does not allow (a write to ID, a read of RAISE) does not compile.
register_block! {
    Registers[0x100] {
        /// 0xRRrr00ed: the device's major and minor version.
        ID(ro u32) @ 0x00;
        /// Reads as the inverse of what was written: is anybody there?
        LIVENESS(u32) @ 0x04;
        /// Takes a number; holds its factorial once that is computed.
        FACTORIAL(u32) @ 0x08;
        STATUS(u32 => Status) @ 0x20 {
            pub computing: bool,
            #[bits(6)]
            __: u8,
            /// An interrupt is wanted when a factorial is computed.
            pub interrupt: bool,
            #[bits(24)]
            __: u32,
        }
        /// Why the device interrupts.
        CAUSES(ro u32) @ 0x24;
        /// Interrupts with the causes that are written.
        RAISE(wo u32) @ 0x60;
        /// Takes causes back.
        ACKNOWLEDGE(wo u32) @ 0x64;
        SOURCE(u64) @ 0x80;
        DESTINATION(u64) @ 0x88;
        COUNT(u64) @ 0x90;
        TRANSFER(u64 => Transfer) @ 0x98 {
            pub start: bool,
            /// From the device to memory.
            pub to_memory: bool,
            /// An interrupt is wanted at the end.
            pub interrupt: bool,
            #[bits(61)]
            __: u64,
        }
    }
}

/// Causes of interrupts. The device has no names for others: software raises them.
const COMPUTED: u32 = 1;
const TRANSFERRED: u32 = 0x100;

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From memory to the device's buffer.
    ToDevice,
    /// From the device's buffer to memory.
    ToMemory,
}

/// The driver: it holds what of the device it uses.
pub struct Edu {
    device: Device,
    registers: IoRegisterBlock<Registers>,
    buffer: DmaBuffer,
    vectors: Vectors,
}

impl Edu {
    /// Brings the device up.
    ///
    /// # Errors
    /// What the device or the kernel refuses, by name: see each step of [`Device`].
    pub fn new(device: Device, interrupt: Interrupt) -> Result<Self> {
        // The device has 28 address bits: its memory must lie where those reach.
        let buffer = BufferRequest::new(8192).placement(IovaPlacement::below_bits(28));
        Self::with_buffer(device, interrupt, buffer)
    }

    /// The same, with a buffer of at least 8192 bytes that is asked for so.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_buffer(
        device: Device,
        interrupt: Interrupt,
        buffer: BufferRequest,
    ) -> Result<Self> {
        // VFIO gives a device with both off. Without the first there are no registers; without the second
        // there is neither DMA nor MSI, and nothing says so.
        let config = device.config()?;
        config.set_memory_decoding(true)?;
        config.set_bus_mastering(true)?;
        // Mapped where the BAR can be mapped, and else by system calls.
        let registers = device.bar(0)?.block(0)?;
        let buffer = device.dma()?.buffer_with(buffer)?;
        let vectors = device.vectors(interrupt, 1)?;
        Ok(Self { device, registers, buffer, vectors })
    }

    /// The memory that driver and device share.
    pub fn buffer(&self) -> &DmaBuffer {
        &self.buffer
    }

    /// Where other memory is mapped for the device.
    ///
    /// # Errors
    /// What the transport answers.
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
    /// Here and below: what the transport answers where the registers are trapped.
    pub fn id(&self) -> Result<u32> {
        self.registers.read(Registers::ID)
    }

    /// The inverse of `value`, from the device.
    ///
    /// # Errors
    /// As [`id`](Self::id).
    pub fn liveness(&self, value: u32) -> Result<u32> {
        self.registers.write(Registers::LIVENESS, value)?;
        self.registers.read(Registers::LIVENESS)
    }

    /// `n`! modulo 2^32, by reading the status until it is there.
    ///
    /// # Errors
    /// `TimedOut` where it is not in ten seconds.
    pub fn factorial_polled(&self, n: u32) -> Result<u32> {
        self.registers.write(Registers::STATUS, Status::new())?;
        self.registers.write(Registers::FACTORIAL, n)?;
        let status = || self.registers.read(Registers::STATUS);
        try_poll_until("a factorial", TIMEOUT, status, |status| !status.computing())?;
        self.registers.read(Registers::FACTORIAL)
    }

    /// `n`! modulo 2^32, by interrupt.
    ///
    /// # Errors
    /// `TimedOut` where none comes in ten seconds.
    pub fn factorial(&self, n: u32) -> Result<u32> {
        self.registers.write(Registers::STATUS, Status::new().with_interrupt(true))?;
        self.registers.write(Registers::FACTORIAL, n)?;
        self.serve(COMPUTED)?;
        self.registers.read(Registers::FACTORIAL)
    }

    /// Has the device interrupt, and waits for that.
    ///
    /// # Errors
    /// As [`factorial`](Self::factorial).
    pub fn ring(&self) -> Result<()> {
        const RUNG: u32 = 2;
        self.registers.write(Registers::RAISE, RUNG)?;
        self.serve(RUNG)
    }

    /// Copies `size` bytes of the buffer from `from` on to the device, and back to `to`.
    ///
    /// # Errors
    /// As [`factorial`](Self::factorial).
    pub fn there_and_back(&self, from: u64, to: u64, size: u64) -> Result<()> {
        let base = self.buffer.iova().0;
        self.transfer(base + from, DEVICE_BUFFER, size, Direction::ToDevice)?;
        self.transfer(DEVICE_BUFFER, base + to, size, Direction::ToMemory)
    }

    /// One transfer of `size` bytes, until the device says that it is done. One of the addresses is an IOVA,
    /// the other in [`DEVICE_BUFFER`].
    ///
    /// # Errors
    /// As [`factorial`](Self::factorial). The device does not report a transfer that the IOMMU refuses.
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
        // A write to a register comes after all writes to memory before it: the device finds them there.
        self.registers.write(Registers::TRANSFER, go)?;
        self.serve(TRANSFERRED)
    }

    /// Waits for the interrupt with this cause, acknowledges it, and lets the next one come.
    fn serve(&self, cause: u32) -> Result<()> {
        loop {
            if self.vectors.wait(0, TIMEOUT)? == 0 {
                return Err(Error::new(ErrorKind::TimedOut, "wait for", "edu's interrupt")
                    .because(format!("it did not arrive within {TIMEOUT:?}")));
            }
            // The device asserts its interrupt until every cause is acknowledged.
            let causes = self.registers.read(Registers::CAUSES)?;
            self.registers.write(Registers::ACKNOWLEDGE, causes)?;
            if self.vectors.kind() == Interrupt::Intx {
                // The kernel masks an INTx when it comes, since other devices may share the line.
                self.vectors.set_masked(0, false)?;
            }
            if causes & cause != 0 {
                return Ok(());
            }
        }
    }

    /// Lets go of everything, the device last.
    ///
    /// # Errors
    /// `InUse`, with the name of what still holds the device.
    pub fn close(self) -> Result<()> {
        let Self { device, registers, buffer, vectors } = self;
        drop((registers, buffer, vectors));
        Ok(device.close()?)
    }
}
