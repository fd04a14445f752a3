//! The model of virtio's entropy device: five capabilities of one ID, and one queue.

use vfio_remap::Result;
use vfio_remap::emulated::{Bus, Model, Shape};
use vfio_remap::transport::{RegionInfo, region_index};

const BAR: u32 = 4;
const COMMON: u64 = 0x1000;
const NOTIFY: u64 = 0x3000;
const MULTIPLIER: u64 = 4;
/// Which place of the notification registers is the queue's.
const NOTIFY_OFF: u16 = 3;
const FEATURES_OK: u8 = 8;

#[derive(Default)]
pub struct Entropy {
    /// The kind of capability that it does not have.
    missing: u8,
    /// Does not accept the driver's features.
    refuses: bool,
    /// Of configuration space.
    command: u16,
    status: u8,
    feature_select: u32,
    enabled: bool,
    size: u16,
    /// The addresses of descriptors, available ring and used ring, by halves.
    addresses: [u32; 6],
    seen: u16,
}

impl Entropy {
    pub fn without(missing: u8) -> Self {
        Self { missing, ..Self::default() }
    }

    pub fn refusing() -> Self {
        Self { refuses: true, ..Self::default() }
    }

    /// What it takes for random.
    pub fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at * 167 + len) as u8).collect()
    }

    fn config(&self) -> [u8; 256] {
        let mut config = [0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x44, 0x10]);
        config[4..6].copy_from_slice(&self.command.to_le_bytes());
        config[6] = 0x10;
        let mut link = 0x34;
        // Not in the order of their kinds, and with another capability among them.
        for (at, kind, offset) in [
            (0x40, 5u8, 0u64),
            (0x60, 3, 0x4000),
            (0x80, 2, NOTIFY),
            (0xa0, 1, COMMON),
            (0xc0, 4, 0),
        ] {
            if kind == self.missing {
                continue;
            }
            config[link] = at as u8;
            config[at..at + 5].copy_from_slice(&[9, 0, 20, kind, BAR as u8]);
            config[at + 8..at + 12].copy_from_slice(&(offset as u32).to_le_bytes());
            config[at + 12..at + 16].copy_from_slice(&0x1000u32.to_le_bytes());
            config[at + 16..at + 20].copy_from_slice(&(MULTIPLIER as u32).to_le_bytes());
            link = at + 1;
        }
        config[link] = 0xe0;
        config[0xe0] = 0x05;
        config
    }

    fn load(&self, offset: u64) -> u32 {
        match offset {
            0x04 => u32::from(self.feature_select == 1),
            0x12 => 1,
            0x14 => self.status.into(),
            0x18 => self.size.into(),
            0x1c => self.enabled.into(),
            0x1e => NOTIFY_OFF.into(),
            0x20..0x38 => self.addresses[(offset - 0x20) as usize / 4],
            _ => 0,
        }
    }

    fn store(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.feature_select = value,
            0x14 if value == 0 => {
                let Self { missing, refuses, command, .. } = *self;
                *self = Self { missing, refuses, command, ..Self::default() }
            }
            0x14 => self.status = value as u8 & if self.refuses { !FEATURES_OK } else { !0 },
            0x18 => self.size = value as u16,
            0x1c => self.enabled = value == 1,
            0x20..0x38 => self.addresses[(offset - 0x20) as usize / 4] = value,
            _ => {}
        }
    }

    fn address(&self, of: usize) -> u64 {
        u64::from(self.addresses[2 * of + 1]) << 32 | u64::from(self.addresses[2 * of])
    }

    /// Fills the buffers that are available.
    fn serve(&mut self, bus: &Bus) -> Result<()> {
        fn read<const N: usize>(bus: &Bus, at: u64) -> Result<[u8; N]> {
            let mut bytes = [0; N];
            bus.dma_read(at, &mut bytes)?;
            Ok(bytes)
        }
        let (table, available, used) = (self.address(0), self.address(1), self.address(2));
        let index = u16::from_le_bytes(read(bus, available + 2)?);
        while self.enabled && self.status & 4 != 0 && self.seen != index {
            let slot = u64::from(self.seen % self.size);
            let head = u16::from_le_bytes(read(bus, available + 4 + 2 * slot)?);
            let descriptor: [u8; 16] = read(bus, table + 16 * u64::from(head))?;
            let address = u64::from_le_bytes(descriptor[..8].try_into().unwrap());
            let length = u32::from_le_bytes(descriptor[8..12].try_into().unwrap());
            assert_eq!(descriptor[12..14], [2, 0], "it may be written");
            bus.dma_write(address, &Self::bytes(length as usize))?;
            let element = u64::from(length) << 32 | u64::from(head);
            bus.dma_write(used + 4 + 8 * slot, &element.to_le_bytes())?;
            self.seen = self.seen.wrapping_add(1);
            bus.dma_write(used + 2, &self.seen.to_le_bytes())?;
        }
        Ok(())
    }
}

impl Model for Entropy {
    fn shape(&self) -> Shape {
        let mut shape = Shape::pci("virtio-rng", 256);
        shape.regions[BAR as usize] = RegionInfo::trapped(0x5000);
        shape
    }

    fn read(&mut self, _: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if region == region_index::CONFIG {
            data.copy_from_slice(&self.config()[offset as usize..offset as usize + data.len()]);
            return Ok(());
        }
        let value = offset.checked_sub(COMMON).map_or(0, |offset| self.load(offset));
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, value)| *byte = value);
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let value = data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
        match (region, offset.checked_sub(COMMON)) {
            (region_index::CONFIG, _) if offset == 4 => self.command = value as u16,
            (BAR, Some(common)) if common < 0x38 => self.store(common, value),
            (BAR, _) if offset == NOTIFY + MULTIPLIER * u64::from(NOTIFY_OFF) => self.serve(bus)?,
            _ => {}
        }
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {
        self.store(0x14, 0);
        self.command = 0;
    }
}
