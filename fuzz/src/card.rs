//! A network card that is not to be trusted: registers that read what it likes, and writes to whatever memory it
//! was told of.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_remap::Result;
use vfio_remap::emulated::{Activity, Bus, Model, PciConfig, Shape};
use vfio_remap::transport::region_index::CONFIG;

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
#[derive(Clone, Default)]
pub struct Hand(Arc<Mutex<Card>>);

/// The registers, and how the card misbehaves.
#[derive(Default)]
pub struct Card {
    registers: Vec<u32>,
    /// Registers that always read the same.
    frozen: Vec<(u32, u32)>,
    /// All registers read all ones.
    is_gone: bool,
    /// Registers are not what the driver has made of them.
    is_touched: bool,
    /// What it writes to memory the next time it is polled: addresses, and eight bytes each.
    pub writes: Vec<(u64, u64)>,
    /// Frames that it claims to have received: the address of a descriptor, its second word, and the bytes.
    pub frames: Vec<(u64, u64, Vec<u8>)>,
}

impl Hand {
    /// The card's model; `device` is its PCI device ID.
    pub fn model(&self, device: u16) -> impl Model + use<> {
        let config = PciConfig::new(4096, 0x8086, device, 0x02_0000, 1).bar32(0, BAR_SIZE);
        Served { config, hand: self.clone() }
    }

    /// The card.
    pub fn card(&self) -> MutexGuard<'_, Card> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Card {
    /// Sets a register, until the driver writes it.
    pub fn touch(&mut self, offset: u32, value: u32) {
        self.is_touched = true;
        self.set(offset, value);
    }

    fn set(&mut self, offset: u32, value: u32) {
        if let Some(register) = self.registers.get_mut(offset as usize / 4) {
            *register = value;
        }
    }

    /// Has a register read this value whatever is written.
    pub fn freeze(&mut self, offset: u32, value: u32) {
        self.is_touched = true;
        self.frozen.push((offset & !3, value));
    }

    /// Is pulled, or plugged in.
    pub fn toggle(&mut self) {
        self.is_touched = true;
        self.is_gone = !self.is_gone;
    }

    /// Is a well-behaved card from now on; whether its registers were touched.
    pub fn heal(&mut self) -> bool {
        self.frozen.clear();
        self.is_gone = false;
        self.writes.clear();
        self.frames.clear();
        std::mem::take(&mut self.is_touched)
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

struct Served {
    config: PciConfig,
    hand: Hand,
}

impl Model for Served {
    fn shape(&self) -> Shape {
        self.config.shape("card")
    }

    fn read(&mut self, _: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let mut card = self.hand.card();
        if region == CONFIG && !card.is_gone {
            self.config.read(offset, data);
            return Ok(());
        }
        for (part, at) in data.chunks_mut(4).zip((offset as u32..).step_by(4)) {
            part.copy_from_slice(&card.read(at).to_le_bytes()[..part.len()]);
        }
        Ok(())
    }

    fn write(&mut self, _: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let mut card = self.hand.card();
        if region == CONFIG {
            if !card.is_gone {
                self.config.write(offset, data);
            }
            return Ok(());
        }
        let (words, _) = data.as_chunks::<4>();
        for (word, at) in words.iter().zip((offset as u32..).step_by(4)) {
            card.write(at, u32::from_le_bytes(*word));
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
