//! The model of the FPGA card.

use vfio_remap::Result;
use vfio_remap::emulated::{Activity, Bus, Model, PciConfig, Shape};
use vfio_remap::transport::{irq_index, region_index};

const MEMORY: u32 = 2;
const SIZE: u64 = 64 << 20;
const CHECKSUM: usize = 2;
const BAD_RANGE: u32 = 2;

pub struct Card {
    /// Never ends a command.
    silent: bool,
    config: PciConfig,
    address: u64,
    length: u64,
    status: u32,
    result: u32,
    causes: [u32; 4],
}

impl Default for Card {
    fn default() -> Self {
        let config = PciConfig::new(256, 0x10ee, 0x7024, 0x05_8000, 0)
            .bar32(0, 0x1_0000)
            .bar64(2, SIZE)
            .msix(4, (0, 0x8000), (0, 0x9000));
        let (address, length, status, result) = (0, 0, 0, 0);
        Self { silent: false, config, address, length, status, result, causes: [0; 4] }
    }
}

impl Card {
    pub fn silent() -> Self {
        Self { silent: true, ..Self::default() }
    }
}

impl Model for Card {
    fn shape(&self) -> Shape {
        let mut shape = self.config.shape("fpga");
        shape.regions[MEMORY as usize].mappable = true;
        shape
    }

    fn read(&mut self, _: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if region == region_index::CONFIG {
            self.config.read(offset, data);
            return Ok(());
        }
        let value = match offset {
            0x04 => self.status,
            0x1c => self.result,
            0x20..0x30 => self.causes[(offset - 0x20) as usize / 4],
            _ => 0,
        };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, value)| *byte = value);
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        if region == region_index::CONFIG {
            self.config.write(offset, data);
            return Ok(());
        }
        let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        match offset {
            0x08 => self.address = value,
            0x10 => self.length = value,
            0x18 if value == 1 => {
                self.status = 1;
                bus.wake();
            }
            0x30..0x40 if value == 1 => self.causes[(offset - 0x30) as usize / 4] = 0,
            _ => {}
        }
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {
        *self = Self { silent: self.silent, ..Self::default() };
    }

    fn poll(&mut self, bus: &Bus) -> Activity {
        if self.status == 1 && !self.silent {
            let fits = self.address.checked_add(self.length).is_some_and(|end| end <= SIZE);
            self.status = if fits { 0 } else { BAD_RANGE };
            if fits {
                let mut bytes = vec![0; self.length as usize];
                bus.memory(MEMORY).unwrap().read(self.address, &mut bytes).unwrap();
                self.result = crc32fast::hash(&bytes);
            }
            self.causes[CHECKSUM] = 1;
            bus.fire(irq_index::MSIX, CHECKSUM as u32);
        }
        Activity::Asleep
    }
}
