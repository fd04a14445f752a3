//! Inputs to start from: what an honest client and our server say to each other.

use std::sync::Arc;

use vfio_remap::device::{BufferRequest, Iova, IovaPlacement};
use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{Bus, Edu, Emulated, Model, Nvme, Shape};
use vfio_remap::transport::{IrqInfo, RegionInfo, VfioUser, region_index};
use vfio_remap::{Device, Result};

use crate::conversation::{drive, record};
use crate::messages::flag::CHOICE;
use crate::messages::{Message, append, decode};

/// Of a PCI device: configuration space.
const CONFIG: u32 = region_index::CONFIG;
/// Its command register, and memory decoding and bus mastering there.
const COMMAND: (u32, u64, u64) = (CONFIG, 4, 6);

/// A transfer in each direction, with an interrupt at the end; a factorial.
const EDU_WORK: [(u32, u64, u64); 8] = [
    COMMAND,
    (0, 0x80, 0),
    (0, 0x88, 0x4_0000),
    (0, 0x90, 64),
    (0, 0x98, 5),
    (0, 0x98, 7),
    (0, 0x08, 5),
    (0, 0x64, 1),
];
/// Admin queues of 16 entries, the controller enabled, one command.
const NVME_WORK: [(u32, u64, u64); 6] = [
    COMMAND,
    (0, 0x24, 0x000f_000f),
    (0, 0x28, 0),
    (0, 0x30, 0x1000),
    (0, 0x14, 0x0046_0001),
    (0, 0x1000, 1),
];

/// How many commands a seed has: the server takes each for itself.
const COMMANDS: usize = 6;

/// A device with less to ask for than a PCI device has: half a mapped region, a register, an interrupt.
struct Little;

impl Model for Little {
    fn shape(&self) -> Shape {
        let mapped = RegionInfo::trapped(0x2000).with_areas([0..0x1000]);
        let mut shape = Shape::new("little", vec![mapped, RegionInfo::trapped(4)]);
        shape.irqs = vec![IrqInfo::eventfds(2)];
        shape
    }

    fn read(&mut self, _: &Bus, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, _: &Bus, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {}
}

/// What a model is called, what is done with it, and whether the server's target must be told that it is
/// the one.
type Subject = (&'static str, Emulated, &'static [(u32, u64, u64)], u8);

fn subjects() -> [Subject; 3] {
    let namespace = Namespace::memory(1 << 20, 512).expect("a namespace");
    let nvme = Nvme::new(vec![namespace]);
    [
        ("little", Emulated::new(Little).expect("a device"), &[], 0),
        ("edu", Emulated::new(Edu::new()).expect("a device"), &EDU_WORK, 0),
        ("nvme", Emulated::new(nvme).expect("a device"), &NVME_WORK, CHOICE),
    ]
}

/// Replies for the client's target.
pub fn of_client() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (name, device, ..) in subjects() {
        let [_, replies] = record(&device, |client| drive(client, true));
        seeds.push((name.to_owned(), seed(decode(&replies), CHOICE)));
        // The target says VERSION where the input does not.
        seeds.push((format!("{name}-greeted"), seed(decode(&replies).skip(1), 0)));
    }
    seeds
}

/// Commands for the server's target.
pub fn of_server() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (name, device, work, choice) in subjects() {
        let [asked, _] = record(&device, |client| drive(client, true));
        let [worked, _] = record(&device, |client| program(client, work));
        for (kind, commands) in [("asked", asked), ("worked", worked)] {
            let commands: Vec<_> = decode(&commands).collect();
            for (index, part) in commands.chunks(COMMANDS).enumerate() {
                seeds.push((format!("{name}-{kind}-{index}"), seed(part.iter().copied(), choice)));
            }
        }
    }
    seeds
}

/// Programs a device, with 64 KiB for its transfers.
fn program(client: VfioUser, work: &[(u32, u64, u64)]) {
    let device = Device::new(Arc::new(client));
    let request = BufferRequest::new(0x1_0000).placement(IovaPlacement::At(Iova(0)));
    let _buffer = device.dma().and_then(|space| space.buffer_with(request)).expect("a buffer");
    for &(region, offset, value) in work {
        let transport = device.transport();
        transport.write_at(region, offset, &value.to_le_bytes()).expect("a write");
        transport.read_at(region, offset, &mut [0; 4]).expect("a read");
    }
}

/// Messages as an input, of which the first makes a choice.
fn seed<'a>(messages: impl Iterator<Item = Message<'a>>, choice: u8) -> Vec<u8> {
    let mut seed = Vec::new();
    for (index, message) in messages.enumerate() {
        let choice = if index == 0 { choice } else { 0 };
        append(&mut seed, Message { flags: message.flags | choice, ..message });
    }
    seed
}
