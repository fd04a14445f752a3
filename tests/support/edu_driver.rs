//! A driver for QEMU's edu device (QEMU, docs/specs/edu), as much of it as tests and examples need.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::time::Duration;

use vfio_remap::device::{BufferRequest, DmaBuffer, DmaSpace, Interrupt, IovaPlacement, Vectors};
use vfio_remap::{Device, Error, ErrorKind, IoRegister, Result};

/// Where the device keeps 4096 bytes of its own.
pub const BUFFER: u64 = 0x4_0000;
const PATIENCE: Duration = Duration::from_secs(10);

/// Status: a factorial is being computed; an interrupt is wanted when it is done.
const COMPUTING: u32 = 1;
const INTERRUPT_WHEN_COMPUTED: u32 = 0x80;

/// DMA command: go; from the device to memory; an interrupt is wanted at the end.
const START: u32 = 1;
pub const TO_MEMORY: u32 = 2;
const INTERRUPT_AT_END: u32 = 4;

/// What the interrupt status says.
const COMPUTED: u32 = 1;
const TRANSFERRED: u32 = 0x100;

/// A driver that holds the device's registers, a buffer that they share, and its interrupt.
pub struct Edu {
    device: Device,
    pub buffer: DmaBuffer,
    pub vectors: Vectors,
}

impl Edu {
    pub fn new(device: Device, interrupt: Interrupt) -> Result<Self> {
        // The device has 28 address bits.
        let buffer = BufferRequest::new(8192).placement(IovaPlacement::below_bits(28));
        Self::with_buffer(device, interrupt, buffer)
    }

    /// With a buffer of 8192 bytes that is asked for so.
    pub fn with_buffer(
        device: Device,
        interrupt: Interrupt,
        buffer: BufferRequest,
    ) -> Result<Self> {
        if let Ok(config) = device.config() {
            config.set_memory_decoding(true)?;
            config.set_bus_mastering(true)?;
        }
        let buffer = device.dma()?.buffer_with(buffer)?;
        let vectors = device.vectors(interrupt, 1)?;
        Ok(Self { device, buffer, vectors })
    }

    /// The memory that the device reaches.
    pub fn dma(&self) -> Result<DmaSpace> {
        self.device.dma()
    }

    fn register(&self, offset: u64) -> Result<IoRegister<u32>> {
        self.device.bar(0)?.trapped(offset)
    }

    pub fn id(&self) -> Result<u32> {
        self.register(0)?.read()
    }

    /// The inverse of what was written.
    pub fn liveness(&self, value: u32) -> Result<u32> {
        let register = self.register(4)?;
        register.write(value)?;
        register.read()
    }

    /// `n`! modulo 2^32, by asking again and again.
    pub fn factorial_polled(&self, n: u32) -> Result<u32> {
        self.register(0x20)?.write(0)?;
        self.register(8)?.write(n)?;
        let status = self.register(0x20)?;
        while status.read()? & COMPUTING != 0 {
            std::hint::spin_loop();
        }
        self.register(8)?.read()
    }

    /// `n`! modulo 2^32, by interrupt.
    pub fn factorial(&self, n: u32) -> Result<u32> {
        self.register(0x20)?.write(INTERRUPT_WHEN_COMPUTED)?;
        self.register(8)?.write(n)?;
        self.serve(COMPUTED)?;
        self.register(8)?.read()
    }

    /// Fires the interrupt, and waits for it.
    pub fn ring(&self) -> Result<()> {
        self.register(0x60)?.write(2)?;
        self.serve(2)
    }

    /// Copies `size` bytes of the buffer from `from` on to the device and back to `to`.
    pub fn there_and_back(&self, from: u64, to: u64, size: u64) -> Result<()> {
        let base = self.buffer.iova().0;
        self.transfer(base + from, BUFFER, size, 0)?;
        self.transfer(BUFFER, base + to, size, TO_MEMORY)
    }

    /// One transfer, until the device says that it is done.
    pub fn transfer(&self, source: u64, destination: u64, size: u64, direction: u32) -> Result<()> {
        for (offset, value) in [(0x80, source), (0x88, destination), (0x90, size)] {
            self.register(offset)?.write(value as u32)?;
            self.register(offset + 4)?.write((value >> 32) as u32)?;
        }
        self.register(0x98)?.write(START | direction | INTERRUPT_AT_END)?;
        self.serve(TRANSFERRED)
    }

    /// Waits for the interrupt with this cause, acknowledges it, and lets the next one come.
    fn serve(&self, cause: u32) -> Result<()> {
        loop {
            if self.vectors.wait(0, PATIENCE)? == 0 {
                return Err(Error::new(ErrorKind::Os, "wait for", "edu's interrupt")
                    .because("it has not come in ten seconds"));
            }
            let causes = self.register(0x24)?.read()?;
            self.register(0x64)?.write(causes)?;
            if self.vectors.kind() == Interrupt::Intx {
                self.vectors.set_masked(0, false)?;
            }
            if causes & cause != 0 {
                return Ok(());
            }
        }
    }

    /// Lets go of everything.
    pub fn close(self) -> Result<()> {
        let Self { device, buffer, vectors } = self;
        drop((buffer, vectors));
        Ok(device.close()?)
    }
}
