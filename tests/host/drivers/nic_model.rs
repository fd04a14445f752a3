//! The model of the NIC: what one of its rings sends is received by the ring of the same number.

use vfio_remap::emulated::{Activity, Bus, Memory, Model, Shape};
use vfio_remap::transport::RegionInfo;
use vfio_remap::{Register, Result};

const SIZE: u64 = 0x2_0000;
const RESET: u32 = 1 << 26;
const ENABLED: u32 = 1 << 25;
const BYTES: u64 = 16;

#[derive(Default)]
pub struct Loopback {
    ctrl: Option<Register<u32>>,
    /// To send and to receive.
    rings: Vec<[Ring; 2]>,
}

struct Ring {
    base: Register<u64>,
    length: Register<u32>,
    head: Register<u32>,
    tail: Register<u32>,
    control: Register<u32>,
}

impl Ring {
    fn new(memory: &Memory, at: usize) -> Result<Self> {
        Ok(Self {
            base: memory.register(at)?,
            length: memory.register(at + 0x08)?,
            head: memory.register(at + 0x10)?,
            tail: memory.register(at + 0x18)?,
            control: memory.register(at + 0x28)?,
        })
    }

    /// The address of the descriptor at the head, if there is one for the device.
    fn pending(&self) -> Option<u64> {
        let (head, count) = (u64::from(self.head.read()), u64::from(self.length.read()) / BYTES);
        let ready = self.control.read() & ENABLED != 0 && self.head.read() != self.tail.read();
        (ready && head < count).then(|| self.base.read() + BYTES * head)
    }

    /// Reports the descriptor at the head as done.
    fn report(&self, bus: &Bus, at: u64, mut descriptor: [u8; 16]) -> Result<()> {
        descriptor[12] |= 1;
        bus.dma_write(at, &descriptor)?;
        let count = self.length.read() / BYTES as u32;
        self.head.write((self.head.read() + 1) % count);
        Ok(())
    }
}

impl Loopback {
    /// Moves a frame, if there is one to send and a place for it.
    fn transfer(bus: &Bus, [sending, receiving]: &[Ring; 2]) -> Result<bool> {
        let (Some(from), Some(to)) = (sending.pending(), receiving.pending()) else {
            return Ok(false);
        };
        let (mut sent, mut received) = ([0; 16], [0; 16]);
        bus.dma_read(from, &mut sent)?;
        bus.dma_read(to, &mut received)?;
        let address =
            |descriptor: &[u8; 16]| u64::from_le_bytes(descriptor[..8].try_into().unwrap());
        let mut frame = vec![0; usize::from(u16::from_le_bytes([sent[8], sent[9]]))];
        bus.dma_read(address(&sent), &mut frame)?;
        bus.dma_write(address(&received), &frame)?;
        received[8..10].copy_from_slice(&sent[8..10]);
        receiving.report(bus, to, received)?;
        sending.report(bus, from, sent)?;
        Ok(true)
    }
}

impl Model for Loopback {
    fn shape(&self) -> Shape {
        Shape::new("nic", vec![RegionInfo::mappable(SIZE)])
    }

    fn read(&mut self, _: &Bus, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, _: &Bus, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self, bus: &Bus) {
        let memory = bus.memory(0).unwrap();
        memory.write(0, &[0; SIZE as usize]).unwrap();
        self.ctrl = Some(memory.register(0).unwrap());
        let ring = |at| Ring::new(memory, at).unwrap();
        self.rings = (0..4).map(|n| [ring(0xe000 + 0x40 * n), ring(0xc000 + 0x40 * n)]).collect();
    }

    fn poll(&mut self, bus: &Bus) -> Activity {
        if self.ctrl.as_ref().is_some_and(|ctrl| ctrl.read() & RESET != 0) {
            self.reset(bus);
        }
        let moved = self.rings.iter().map(|rings| Self::transfer(bus, rings).unwrap_or(false));
        if moved.fold(false, |any, moved| any | moved) {
            Activity::Busy
        } else {
            Activity::Watching
        }
    }
}
