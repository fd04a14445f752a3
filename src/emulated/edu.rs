//! The educational device of QEMU (`docs/specs/edu.rst`), with mapped parts in addition.

use super::bus::Bus;
use super::memory::Memory;
use super::model::{Activity, Model, Shape};
use super::pci::PciConfig;
use crate::device::Register;
use crate::error::Result;
use crate::transport::{irq_index, region_index};

const BAR: u32 = 0;
const BAR_SIZE: u64 = 1 << 20;

const ID: u32 = 0x0100_00ed;
const COMPUTING: u32 = 0x01;
const FACTORIAL_INTERRUPTS: u32 = 0x80;
const FACTORIAL_DONE: u32 = 0x001;
const DMA_DONE: u32 = 0x100;

const DMA_RUN: u64 = 1;
const DMA_TO_MEMORY: u64 = 2;
const DMA_INTERRUPTS: u64 = 4;
/// The device has 28 address bits.
const DMA_MASK: u64 = (1 << 28) - 1;

/// The mapped parts are as large as any machine's pages.
const PART: u64 = 64 << 10;
const MAILBOX: u64 = 0x1_0000;
const BUFFER: u64 = 0x4_0000;
const BUFFER_SIZE: u64 = 4096;

/// The device `1234:11e8`: identification, liveness, factorials, interrupts, and a DMA engine with a
/// buffer, as QEMU documents it in `docs/specs/edu.rst`.
///
/// In addition to QEMU's device, two parts of the BAR are mapped, so that a driver can map something. Each has
/// 64 KiB, the largest page size of any machine:
///
/// | offset | |
/// |---|---|
/// | 0x10000 | identification, as at 0 |
/// | 0x10004 | liveness request: the driver writes any value |
/// | 0x10008 | liveness reply: the inverse of the request, after some milliseconds |
/// | 0x40000 | the DMA engine's buffer, 4096 bytes |
///
/// DMA and MSI need bus mastering, as with real devices. Memory decoding is not needed.
#[derive(Debug)]
pub struct Edu {
    config: PciConfig,
    liveness: u32,
    factorial: u32,
    status: u32,
    interrupts: u32,
    dma: Dma,
    mailbox: Option<Mailbox>,
}

#[derive(Debug, Default)]
struct Dma {
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
}

/// The registers of the mapped part that the model watches.
#[derive(Debug)]
struct Mailbox {
    request: Register<u32>,
    reply: Register<u32>,
}

impl Default for Edu {
    fn default() -> Self {
        Self::new()
    }
}

impl Edu {
    /// The device after power on.
    pub fn new() -> Self {
        Self {
            config: PciConfig::new(256, 0x1234, 0x11e8, 0x00_ff00, 0x10)
                .subsystem(0x1af4, 0x1100)
                .bar32(0, BAR_SIZE as u32)
                .intx()
                .msi(),
            liveness: 0,
            factorial: 0,
            status: 0,
            interrupts: 0,
            dma: Dma::default(),
            mailbox: None,
        }
    }

    fn load(&self, offset: u64, size: usize) -> Option<u64> {
        let wide = offset >= 0x80;
        Some(match (offset, size) {
            (0x00, 4) => ID.into(),
            (0x04, 4) => self.liveness.into(),
            (0x08, 4) => self.factorial.into(),
            (0x20, 4) => self.status.into(),
            (0x24, 4) => self.interrupts.into(),
            (_, 4 | 8) if wide => *self.dma.register(offset)?,
            _ => return None,
        })
    }

    fn store(&mut self, bus: &Bus, offset: u64, size: usize, value: u64) {
        let word = value as u32;
        match (offset, size) {
            (0x04, 4) => self.liveness = !word,
            (0x08, 4) if self.status & COMPUTING == 0 => {
                self.factorial = word;
                self.status |= COMPUTING;
                bus.wake();
            }
            (0x20, 4) => {
                self.status = (self.status & !FACTORIAL_INTERRUPTS) | (word & FACTORIAL_INTERRUPTS);
            }
            (0x60, 4) => self.raise(bus, word),
            (0x64, 4) => self.acknowledge(bus, word),
            (0x98, 4 | 8) if self.dma.command & DMA_RUN == 0 && value & DMA_RUN != 0 => {
                self.dma.command = value;
                bus.wake();
            }
            (0x80..0x98, 4 | 8) if self.dma.command & DMA_RUN == 0 => {
                if let Some(register) = self.dma.register_mut(offset) {
                    *register = value;
                }
            }
            _ => {}
        }
    }

    fn raise(&mut self, bus: &Bus, causes: u32) {
        self.interrupts |= causes;
        if self.interrupts == 0 {
            return;
        }
        if !bus.is_connected(irq_index::MSI) {
            bus.set_level(irq_index::INTX, true);
        } else {
            bus.fire(irq_index::MSI, 0);
        }
    }

    fn acknowledge(&mut self, bus: &Bus, causes: u32) {
        self.interrupts &= !causes;
        if self.interrupts == 0 {
            bus.set_level(irq_index::INTX, false);
        }
    }

    /// Finishes a computation.
    fn compute(&mut self, bus: &Bus) {
        self.factorial = factorial(self.factorial);
        self.status &= !COMPUTING;
        if self.status & FACTORIAL_INTERRUPTS != 0 {
            self.raise(bus, FACTORIAL_DONE);
        }
    }

    /// Does a DMA transfer. If it leaves the buffer or the mapped memory, nothing is transferred.
    fn transfer(&mut self, bus: &Bus) {
        if let Err(error) = self.try_transfer(bus) {
            log::debug!("edu: {error}");
        }
        self.dma.command &= !DMA_RUN;
        if self.dma.command & DMA_INTERRUPTS != 0 {
            self.raise(bus, DMA_DONE);
        }
    }

    fn try_transfer(&self, bus: &Bus) -> Result<()> {
        let Dma { source, destination, count, command } = self.dma;
        let to_memory = command & DMA_TO_MEMORY != 0;
        let (buffer, memory) =
            if to_memory { (source, destination) } else { (destination, source) };
        let inside = buffer
            .checked_sub(BUFFER)
            .and_then(|start| start.checked_add(count))
            .is_some_and(|end| end <= BUFFER_SIZE);
        let Some(shared) = bus.memory(BAR).filter(|_| inside) else {
            log::debug!("edu: no transfer of {count} bytes at {buffer:#x} of the BAR");
            return Ok(());
        };
        let memory = memory & DMA_MASK;
        let mut data = vec![0; count as usize];
        if to_memory {
            shared.read(buffer, &mut data)?;
            bus.dma_write(memory, &data)
        } else {
            bus.dma_read(memory, &mut data)?;
            shared.write(buffer, &data)
        }
    }
}

impl Dma {
    fn register(&self, offset: u64) -> Option<&u64> {
        Some(match offset {
            0x80 => &self.source,
            0x88 => &self.destination,
            0x90 => &self.count,
            0x98 => &self.command,
            _ => return None,
        })
    }

    fn register_mut(&mut self, offset: u64) -> Option<&mut u64> {
        Some(match offset {
            0x80 => &mut self.source,
            0x88 => &mut self.destination,
            0x90 => &mut self.count,
            _ => return None,
        })
    }
}

impl Mailbox {
    fn new(memory: &Memory) -> Result<Self> {
        let register = |offset: u64| memory.register::<u32>((MAILBOX + offset) as usize);
        register(0)?.write(ID);
        Ok(Self { request: register(4)?, reply: register(8)? })
    }

    /// Writes the reply. Returns whether there was a new request.
    fn serve(&self) -> bool {
        let inverse = !self.request.read();
        let late = self.reply.read() != inverse;
        if late {
            self.reply.write(inverse);
        }
        late
    }
}

/// n! modulo 2^32, which is 0 from 34 upwards.
fn factorial(n: u32) -> u32 {
    if n < 34 { (1..=n).fold(1, u32::wrapping_mul) } else { 0 }
}

impl Model for Edu {
    fn shape(&self) -> Shape {
        let parts = [MAILBOX..MAILBOX + PART, BUFFER..BUFFER + PART];
        self.config.shape("edu").with_areas(BAR, parts)
    }

    fn read(&mut self, _: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if region == region_index::CONFIG {
            self.config.read(offset, data);
            return Ok(());
        }
        data.fill(0xff);
        if let Some(value) = self.load(offset, data.len()) {
            data.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, value)| *byte = value);
        }
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        if region == region_index::CONFIG {
            self.config.write(offset, data);
            return Ok(());
        }
        let mut value = [0; 8];
        if let Some(bytes) = value.get_mut(..data.len()) {
            bytes.copy_from_slice(data);
            self.store(bus, offset, data.len(), u64::from_le_bytes(value));
        }
        Ok(())
    }

    fn reset(&mut self, bus: &Bus) {
        *self = Self::new();
        bus.set_level(irq_index::INTX, false);
        let Some(memory) = bus.memory(BAR) else { return };
        let cleared = [MAILBOX, BUFFER].map(|part| memory.write(part, &[0; PART as usize]));
        match cleared.into_iter().collect::<Result<()>>().and_then(|()| Mailbox::new(memory)) {
            Ok(mailbox) => self.mailbox = Some(mailbox),
            Err(error) => log::error!("edu: {error}"),
        }
    }

    fn poll(&mut self, bus: &Bus) -> Activity {
        let computing = self.status & COMPUTING != 0;
        if computing {
            self.compute(bus);
        }
        let transferring = self.dma.command & DMA_RUN != 0;
        if transferring {
            self.transfer(bus);
        }
        let served = self.mailbox.as_ref().is_some_and(Mailbox::serve);
        if computing || transferring || served { Activity::Busy } else { Activity::Watching }
    }
}
