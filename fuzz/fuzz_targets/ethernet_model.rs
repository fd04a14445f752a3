//! The model of the 82576 under a driver that writes anything into its registers, rings and buffers, on a network
//! that sends anything.

#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use vfio_remap::device::{BufferRequest, DmaBuffer, Iova, IovaPlacement};
use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap::space::Access;
use vfio_remap::transport::{MemoryDevice, Transport, region_index::CONFIG};
use vfio_remap::{Device, Placement, Window};
use vfio_remap_fuzz::input::Input;
use vfio_remap_fuzz::start;

/// Memory that the card may write, and memory that it may only read.
const MEMORY: u64 = 0x10_0000;
const SIZE: usize = 0x1_0000;
const CONSTANT: u64 = 0x20_0000;
const CONSTANT_SIZE: usize = 0x1000;

/// Registers, and what enables the card: CTRL with the link up, RCTL and TCTL.
const ENABLED: [(u64, u32); 3] = [(0x0, 0x41), (0x100, 0x0400_803e), (0x400, 0x0003_f0fa)];
/// Where the registers of queues begin, how far they lie apart, and the bit that enables one.
const RINGS: [u64; 2] = [0xc000, 0xe000];
const STRIDE: u64 = 0x40;
const CONTROL: u64 = 0x28;
const ENABLE: u32 = 1 << 25;
const LONGEST: usize = 9728;
/// Turns of the card in a run: each may take some hundred microseconds.
const TURNS: u32 = 12;

struct Rig {
    model: Emulated,
    network: Port,
    memory: DmaBuffer,
    constant: Window,
}

static RIG: LazyLock<Rig> = LazyLock::new(|| {
    let (port, network) = Port::pair();
    let model = Emulated::polled(Igb::new([2, 0, 0, 0, 0, 1]).with_wire(port)).expect("a model");
    let device = Device::new(Arc::new(model.clone()));
    let request = BufferRequest::new(SIZE).placement(IovaPlacement::At(Iova(MEMORY)));
    let memory = device.dma().expect("a space").buffer_with(request).expect("a buffer");
    let other = Device::new(Arc::new(MemoryDevice::new(CONSTANT_SIZE as u64).expect("memory")));
    let window = other.bar(0).expect("a BAR").map(.., Placement::Anywhere);
    let constant = window.expect("a window");
    model.dma_map(CONSTANT, &constant.dma_memory(), Access::ReadOnly).expect("a mapping");
    Rig { model, network, memory, constant }
});

impl Rig {
    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        let _ = self.model.write_at(region, offset, data);
    }

    fn set(&self, offset: u64, value: u32) {
        self.write(0, offset, &value.to_le_bytes());
    }

    /// A ring of up to 256 descriptors in memory, of which the card has some.
    fn set_up_ring(&self, direction: usize, queue: u8, input: &mut Input<'_>) {
        let registers = RINGS[direction] + STRIDE * u64::from(queue & 15);
        let (base, shape) = (input.u8(), input.u8());
        let count = 8 << (shape & 3);
        self.set(registers, MEMORY as u32 + u32::from(base & 0x3f) * 0x400);
        self.set(registers + 0x04, 0);
        self.set(registers + 0x08, 16 * count);
        self.set(registers + 0x0c, u32::from(input.u8()) << 24 | u32::from(input.u8()));
        self.set(registers + 0x10, 0);
        self.set(registers + CONTROL, ENABLE);
        self.set(registers + 0x18, u32::from(shape >> 2) % count);
    }

    fn begin(&self) {
        self.model.reset().expect("a reset");
        while self.network.receive().is_some() {}
        self.write(CONFIG, 4, &[6, 0]);
        for (offset, value) in ENABLED {
            self.set(offset, value);
        }
    }

    fn step(&self, input: &mut Input<'_>, turns: &mut u32) {
        let step = input.u8();
        let more = step >> 4;
        match step & 15 {
            0 => self.set_up_ring(usize::from(more & 1), input.u8(), input),
            1 => {
                let at = usize::from(input.u16()) & (SIZE - 8);
                self.memory.store(at, input.u64());
            }
            // A descriptor with an address that is mapped, or nearly.
            2 => {
                let at = usize::from(input.u16()) & (SIZE - 16);
                let base = [MEMORY, MEMORY + SIZE as u64, CONSTANT, 0u64.wrapping_sub(0x100)];
                let address = base[usize::from(more & 3)].wrapping_add(input.u16().into());
                self.memory.store(at, address);
                self.memory.store(at + 8, input.u64());
            }
            3 => {
                let queue = RINGS[usize::from(more & 1)] + STRIDE * u64::from(input.u8() & 15);
                self.set(queue + u64::from(input.u8() & 0x3c), input.u32());
            }
            // Registers as they lie in the first pages, and anywhere.
            4 => self.set(u64::from(input.u16()) & 0x5ffc, input.u32()),
            5 => self.write(
                u32::from(more & 3),
                input.u32().into(),
                input.bytes(usize::from(more) + 1),
            ),
            6 => self.write(CONFIG, u64::from(input.u8()) & !3, input.bytes(4)),
            7 => {
                let len = usize::from(input.u16()) % (LONGEST + 2);
                let noise = input.bytes(usize::from(more) * 8);
                let mut frame = vec![0x5a; len.max(noise.len())];
                frame[..noise.len()].copy_from_slice(noise);
                self.network.send(&frame);
            }
            8..12 if *turns > 0 => {
                *turns -= 1;
                self.model.poll().expect("it does not panic");
            }
            12 => {
                let mut data = [0; 8];
                let _ = self.model.read_at(u32::from(more & 3), input.u16().into(), &mut data[..4]);
            }
            13 if more == 0 => self.model.reset().expect("a reset"),
            14 => {
                while let Some(frame) = self.network.receive() {
                    assert!(frame.len() <= LONGEST, "a frame of {} bytes", frame.len());
                }
            }
            _ => {}
        }
    }
}

fuzz_target!(init: start(Vec::new), |bytes: &[u8]| {
    let rig = &*RIG;
    let (mut input, mut turns) = (Input::new(bytes), TURNS);
    rig.begin();
    while !input.is_over() {
        rig.step(&mut input, &mut turns);
    }
    rig.model.poll().expect("it does not panic");
    while let Some(frame) = rig.network.receive() {
        assert!(frame.len() <= LONGEST, "a frame of {} bytes", frame.len());
    }
    let mut constant = [0; CONSTANT_SIZE];
    rig.constant.read_bytes(0, &mut constant).expect("it lies in the window");
    assert!(constant.iter().all(|byte| *byte == 0), "memory was written that is mapped for reading");
});
