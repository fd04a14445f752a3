//! A driver for an FPGA card that is loaded through a BAR of 64 MiB, computes checksums of it, and says by an
//! interrupt of its user logic that one is done.

use std::time::{Duration, Instant};

use vfio_remap::device::{Interrupt, Vectors};
use vfio_remap::{
    Device, Error, ErrorKind, IoRegisterBlock, Placement, Result, Window, register_block,
};

const CONTROL: u32 = 0;
const MEMORY: u32 = 2;
const VECTORS: usize = 4;
/// The vector of the checksum logic.
const CHECKSUM: usize = 2;

register_block! {
    Card[0x40] {
        ID(ro u32) @ 0x00;
        STATUS(ro u32 => Status) @ 0x04 {
            pub busy: bool,
            pub bad_range: bool,
            #[bits(30)]
            __: u32,
        }
        ADDRESS(u64) @ 0x08;
        LENGTH(u64) @ 0x10;
        COMMAND(wo u32) @ 0x18;
        RESULT(ro u32) @ 0x1c;
        CAUSES(ro u32)[VECTORS] @ 0x20;
        ACKNOWLEDGE(wo u32)[VECTORS] @ 0x30;
    }
}

pub struct Fpga {
    card: IoRegisterBlock<Card>,
    memory: Window,
    vectors: Vectors,
}

impl Fpga {
    pub fn new(device: &Device) -> Result<Self> {
        device.config()?.set_memory_decoding(true)?;
        device.config()?.set_bus_mastering(true)?;
        let card = device.bar(CONTROL)?.block::<Card>(0)?;
        let memory = device.bar(MEMORY)?.map(.., Placement::Anywhere)?;
        let vectors = device.vectors(Interrupt::MsiX, VECTORS)?;
        Ok(Self { card, memory, vectors })
    }

    /// Copies bytes into the card's memory.
    pub fn load(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.memory.write_bytes(offset, bytes)
    }

    /// Copies bytes out of the card's memory.
    pub fn save(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.memory.read_bytes(offset, bytes)
    }

    /// The CRC-32 of a part of the card's memory, computed there.
    pub fn checksum(&self, offset: usize, len: usize, timeout: Duration) -> Result<u32> {
        let deadline = Instant::now() + timeout;
        self.card.write(Card::ADDRESS, offset as u64)?;
        self.card.write(Card::LENGTH, len as u64)?;
        self.card.write(Card::COMMAND, 1)?;
        while self.card.read(Card::CAUSES.at(CHECKSUM))? == 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            self.vectors.wait(CHECKSUM, left)?;
        }
        self.card.write(Card::ACKNOWLEDGE.at(CHECKSUM), 1)?;
        if self.card.read(Card::STATUS)?.bad_range() {
            let object = format!("{len:#x} bytes at {offset:#x}");
            return Err(Error::new(ErrorKind::OutOfRange, "compute the checksum of", object));
        }
        self.card.read(Card::RESULT)
    }
}
