//! A network card that is not to be trusted: registers that read what it likes, and writes to whatever memory it
//! was told of.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_remap::Result;
use vfio_remap::emulated::{Activity, Bus, Emulated, Model, PciConfig, Shape};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{
    AddressSpaceId, DeviceInfo, DmaLimits, IrqInfo, RegionInfo, Transport,
};

const BAR_SIZE: u32 = 0x2_0000;
const CTRL: u32 = 0x0;
const CTRL_RESET: u32 = 1 << 26;
const MDIC: u32 = 0x20;
const MDIC_READY: u32 = 1 << 28;
const SWSM: u32 = 0x5b50;
/// Registers that are not zero after a reset: STATUS with a link, EECD and EEMNGCTL, which say that the EEPROM was
/// read and the card configured, and its address.
const INITIAL: [(u32, u32); 5] = [
    (0x8, 0x83),
    (0x10, 1 << 9),
    (0x1010, 0xf << 18),
    (0x5400, 0x0000_0002),
    (0x5404, 0x8000_0100),
];

/// What the target makes of the card. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Hand(Arc<Mutex<Card>>);

/// The registers, and how the card misbehaves.
#[derive(Debug, Default)]
pub struct Card {
    registers: Vec<u32>,
    /// As the driver has set them up, without queues.
    well: Vec<u32>,
    /// Registers that always read the same.
    frozen: Vec<(u32, u32)>,
    /// All registers read all ones.
    is_gone: bool,
    /// What it writes to memory the next time it is polled: addresses, and eight bytes each.
    pub writes: Vec<(u64, u64)>,
    /// Frames that it claims to have received: the address of a descriptor, its second word, and the bytes.
    pub frames: Vec<(u64, u64, Vec<u8>)>,
}

impl Hand {
    /// The card.
    pub fn card(&self) -> MutexGuard<'_, Card> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Card {
    /// Sets a register, until the driver writes it.
    pub fn set(&mut self, offset: u32, value: u32) {
        if let Some(register) = self.registers.get_mut(offset as usize / 4) {
            *register = value;
        }
    }

    /// Has a register read this value whatever is written.
    pub fn freeze(&mut self, offset: u32, value: u32) {
        self.frozen.push((offset & !3, value));
    }

    /// Is pulled, or plugged in.
    pub fn toggle(&mut self) {
        self.is_gone = !self.is_gone;
    }

    /// The driver has set it up, and has no queues.
    pub fn is_well(&mut self) {
        self.well.clone_from(&self.registers);
    }

    /// Its registers are once more as they were then.
    pub fn restore(&mut self) {
        self.registers.clone_from(&self.well);
    }

    /// Is a well-behaved card from now on.
    pub fn heal(&mut self) {
        self.frozen.clear();
        self.is_gone = false;
        self.writes.clear();
        self.frames.clear();
    }

    /// The address of entry `index` of the ring whose registers begin at `offset`, as the card was told.
    pub fn descriptor(&self, offset: u32, index: u32) -> u64 {
        let [low, high] = [0, 4].map(|at| u64::from(self.load(offset + at)));
        (high << 32 | low).wrapping_add(16 * u64::from(index))
    }

    fn load(&self, offset: u32) -> u32 {
        self.registers.get(offset as usize / 4).copied().unwrap_or(0)
    }

    fn reset(&mut self) {
        self.registers.clear();
        self.registers.resize(BAR_SIZE as usize / 4, 0);
        for (offset, value) in INITIAL {
            self.set(offset, value);
        }
    }

    fn read(&mut self, offset: u32) -> u32 {
        if self.is_gone {
            return u32::MAX;
        }
        if let Some((_, value)) = self.frozen.iter().find(|(frozen, _)| *frozen == offset) {
            return *value;
        }
        let value = self.load(offset);
        if offset == SWSM {
            self.set(SWSM, value | 1);
        }
        value
    }

    fn write(&mut self, offset: u32, value: u32) {
        match offset {
            _ if self.is_gone => {}
            CTRL if value & CTRL_RESET != 0 => self.reset(),
            MDIC => self.set(MDIC, value | MDIC_READY),
            _ => self.set(offset, value),
        }
    }
}

/// The card as a transport. A driver writes some hundred registers when it sets a card up: they are reached without
/// the way to a model, which takes three times as long.
#[derive(Debug)]
pub struct Direct {
    hand: Hand,
    /// For all the rest.
    model: Emulated,
}

impl Direct {
    /// The card; `device` is its PCI device ID.
    ///
    /// # Errors
    /// As [`Emulated::polled`].
    pub fn new(hand: &Hand, device: u16) -> Result<Self> {
        let config = PciConfig::new(4096, 0x8086, device, 0x02_0000, 1).bar32(0, BAR_SIZE);
        let model = Emulated::polled(Served { config, hand: hand.clone() })?;
        Ok(Self { hand: hand.clone(), model })
    }

    /// The model, to be polled.
    pub fn model(&self) -> &Emulated {
        &self.model
    }
}

impl Transport for Direct {
    fn info(&self) -> DeviceInfo {
        self.model.info()
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        self.model.region(index)
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if region != 0 {
            return self.model.read_at(region, offset, data);
        }
        let mut card = self.hand.card();
        for (part, at) in data.chunks_mut(4).zip((offset as u32..).step_by(4)) {
            part.copy_from_slice(&card.read(at).to_le_bytes()[..part.len()]);
        }
        Ok(())
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        if region != 0 {
            return self.model.write_at(region, offset, data);
        }
        let mut card = self.hand.card();
        let (words, _) = data.as_chunks::<4>();
        for (word, at) in words.iter().zip((offset as u32..).step_by(4)) {
            card.write(at, u32::from_le_bytes(*word));
        }
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        self.model.reset()
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.model.irq(index)
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        self.model.dma_limits()
    }

    fn address_space(&self) -> Option<AddressSpaceId> {
        self.model.address_space()
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        self.model.dma_map(iova, memory, access)
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        self.model.dma_unmap(iova, size)
    }
}

/// Configuration space, and access to memory.
struct Served {
    config: PciConfig,
    hand: Hand,
}

impl Model for Served {
    fn shape(&self) -> Shape {
        self.config.shape("card")
    }

    fn read(&mut self, _: &Bus, _: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        data.fill(0xff);
        if !self.hand.card().is_gone {
            self.config.read(offset, data);
        }
        Ok(())
    }

    fn write(&mut self, _: &Bus, _: u32, offset: u64, data: &[u8]) -> Result<()> {
        if !self.hand.card().is_gone {
            self.config.write(offset, data);
        }
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {
        self.config.reset();
        self.hand.card().reset();
    }

    /// Writes to memory. What it does not reach stays as it is.
    fn poll(&mut self, bus: &Bus) -> Activity {
        let mut card = self.hand.card();
        for (address, value) in card.writes.drain(..) {
            let _ = bus.dma_write(address, &value.to_le_bytes());
        }
        for (descriptor, status, bytes) in card.frames.drain(..) {
            let mut address = [0; 8];
            if bus.dma_read(descriptor, &mut address).is_ok() {
                let _ = bus.dma_write(u64::from_le_bytes(address), &bytes);
                let _ = bus.dma_write(descriptor.wrapping_add(8), &status.to_le_bytes());
            }
        }
        Activity::Asleep
    }
}
