//! A driver for a NIC with rings as Intel's 82576 has them (its data sheet, §7 and §8): four in each
//! direction, 0x40 bytes of registers for each.

use std::time::Duration;

use vfio_remap::device::{Descriptors, DmaBuffer, DmaSpace};
use vfio_remap::{Device, Placement, RegisterBlock, Result, Window, poll_until, register_block};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

pub const RINGS: usize = 4;
pub const ENTRIES: usize = 16;
const FRAME: usize = 2048;

register_block! {
    pub Adapter[0x2_0000] {
        CTRL(u32 => Control) @ 0x0000 {
            #[bits(26)]
            __: u32,
            pub reset: bool,
            #[bits(5)]
            __: u32,
        }
        RX(block Ring)[RINGS, stride = 0x40] @ 0xc000;
        TX(block Ring)[RINGS, stride = 0x40] @ 0xe000;
    }

    pub Ring[0x40] {
        BASE(u64) @ 0x00;
        LENGTH(u32) @ 0x08;
        HEAD(ro u32) @ 0x10;
        TAIL(u32) @ 0x18;
        CONTROL(u32 => RingControl) @ 0x28 {
            #[bits(25)]
            __: u32,
            pub enabled: bool,
            #[bits(6)]
            __: u32,
        }
    }
}

const DONE: u8 = 1;
/// The end of a frame, and its status is to be reported.
const WHOLE_AND_REPORTED: u8 = 1 | 8;

/// A descriptor in either direction: where they differ, `extra` is the checksum or the command.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Descriptor {
    pub address: U64,
    pub length: U16,
    pub extra: [u8; 2],
    pub status: u8,
    pub errors: u8,
    pub special: U16,
}

pub struct Nic {
    rx: Vec<Half>,
    tx: Vec<Half>,
}

/// A ring, and a buffer for each of its entries.
struct Half {
    registers: RegisterBlock<Ring>,
    descriptors: Descriptors<Descriptor>,
    buffers: Vec<DmaBuffer>,
    next: usize,
}

impl Nic {
    pub fn new(device: &Device, timeout: Duration) -> Result<Self> {
        Self::in_window(device, &device.bar(0)?.map(.., Placement::Anywhere)?, timeout)
    }

    pub fn in_window(device: &Device, window: &Window, timeout: Duration) -> Result<Self> {
        let adapter = window.block::<Adapter>(0)?;
        adapter.update(Adapter::CTRL, |control| control.with_reset(true));
        poll_until("the reset", timeout, || adapter.read(Adapter::CTRL), |now| !now.reset())?;
        let space = device.dma()?;
        let half = |at| Half::new(adapter.block(at), &space);
        let nic = Self {
            rx: (0..RINGS).map(|ring| half(Adapter::RX.at(ring))).collect::<Result<_>>()?,
            tx: (0..RINGS).map(|ring| half(Adapter::TX.at(ring))).collect::<Result<_>>()?,
        };
        for half in &nic.rx {
            (0..ENTRIES).for_each(|entry| half.descriptors.store(entry, half.empty(entry)));
            half.registers.write(Ring::TAIL, ENTRIES as u32 - 1);
        }
        Ok(nic)
    }

    /// Sends a frame of 2048 bytes at most.
    pub fn send(&mut self, ring: usize, frame: &[u8]) -> Result<()> {
        let half = &mut self.tx[ring];
        let entry = half.next;
        half.buffers[entry].write(0, frame);
        let length = (frame.len() as u16).into();
        let extra = [0, WHOLE_AND_REPORTED];
        half.descriptors.store(entry, Descriptor { length, extra, ..half.empty(entry) });
        half.next = (entry + 1) % ENTRIES;
        half.registers.write(Ring::TAIL, half.next as u32);
        Ok(())
    }

    /// Receives a frame.
    pub fn receive(&mut self, ring: usize, timeout: Duration) -> Result<Vec<u8>> {
        let half = &mut self.rx[ring];
        let entry = half.next;
        let filled = |descriptor: &Descriptor| descriptor.status & DONE != 0;
        let descriptor = poll_until("a frame", timeout, || half.descriptors.load(entry), filled)?;
        let mut frame = vec![0; usize::from(descriptor.length.get()).min(FRAME)];
        half.buffers[entry].read(0, &mut frame);
        half.descriptors.store(entry, half.empty(entry));
        half.registers.write(Ring::TAIL, entry as u32);
        half.next = (entry + 1) % ENTRIES;
        Ok(frame)
    }
}

impl Half {
    fn new(registers: RegisterBlock<Ring>, space: &DmaSpace) -> Result<Self> {
        let descriptors: Descriptors<Descriptor> = space.descriptors(ENTRIES)?;
        let buffers = space.buffer(ENTRIES * FRAME)?.chunks(FRAME).collect();
        registers.write(Ring::BASE, descriptors.iova(0).into());
        registers.write(Ring::LENGTH, (ENTRIES * size_of::<Descriptor>()) as u32);
        registers.update(Ring::CONTROL, |control| control.with_enabled(true));
        Ok(Self { registers, descriptors, buffers, next: 0 })
    }

    fn empty(&self, entry: usize) -> Descriptor {
        Descriptor { address: self.buffers[entry].iova().0.into(), ..Descriptor::new_zeroed() }
    }
}
