//! The NVMe model, by a driver of the smallest sort.

mod coalescing;
mod commands;
mod faults;
mod long_commands;

use std::sync::Arc;

use vfio_remap::emulated::nvme::{Namespace, Power};
use vfio_remap::emulated::{Emulated, Nvme};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::Transport;
use vfio_remap::{Device, Placement, Window};

use crate::support::{edu, shared, watch};

const ENTRIES: u16 = 8;
/// Where things lie in the driver's memory, which the device sees from `IOVA` on.
const IOVA: u64 = 0x10_0000;
const LIST: usize = 0x8000;
const DATA: usize = 0x1_0000;
const SIZE: usize = 0x8_0000;

#[derive(Default)]
struct Queue {
    tail: u16,
    head: u16,
    wrapped: bool,
}

struct Driver {
    device: Arc<dyn Transport>,
    memory: DmaMemory,
    doorbells: Window,
    queues: [Queue; 2],
    next_id: u16,
}

/// Double words 10 to 12 of a command.
type Arguments = [u32; 3];

impl Driver {
    fn new(device: Arc<dyn Transport>) -> Self {
        let memory = shared::memory(SIZE, true);
        device.dma_map(IOVA, &memory, Access::ReadWrite).unwrap();
        device.write_at(7, 4, &6u16.to_le_bytes()).unwrap();
        let bar = Device::new(device.clone());
        let doorbells = bar.bar(0).unwrap().map(0x1000..0x2000, Placement::Anywhere).unwrap();
        let queues = Default::default();
        let mut driver = Self { device, memory, doorbells, queues, next_id: 0 };
        driver.start();
        driver
    }

    /// Enables the controller, and makes queues of number 1.
    fn start(&mut self) {
        let device = &*self.device;
        device.write_at(7, 4, &6u16.to_le_bytes()).unwrap();
        edu::write(device, 0x14, 0);
        watch::until("it is disabled", || edu::read(device, 0x1c) & 1 == 0);
        for queue in 0..4 {
            shared::put(&self.memory, queue * 0x1000, &[0; 0x1000]);
        }
        self.queues = Default::default();
        edu::write(device, 0x24, u32::from(ENTRIES - 1) * 0x1_0001);
        device.write_at(0, 0x28, &IOVA.to_le_bytes()).unwrap();
        device.write_at(0, 0x30, &(IOVA + 0x1000).to_le_bytes()).unwrap();
        edu::write(device, 0x14, 0x0046_0001);
        watch::until("it is ready", || edu::read(device, 0x1c) == 1);
        let last = u32::from(ENTRIES - 1) << 16;
        self.admin(0x05, 0, IOVA + 0x3000, [last | 1, 1 << 16 | 3, 0]).unwrap();
        self.admin(0x01, 0, IOVA + 0x2000, [last | 1, 1 << 16 | 1, 0]).unwrap();
    }

    fn admin(&mut self, opcode: u8, ns: u32, prp: u64, arguments: Arguments) -> Result<u32, u16> {
        self.command(0, u32::from(opcode), ns, [prp, 0], arguments)
    }

    /// Of one page at most.
    fn io(&mut self, opcode: u8, ns: u32, block: u64, control: u32) -> Result<u32, u16> {
        let arguments = [block as u32, (block >> 32) as u32, control];
        self.command(1, u32::from(opcode), ns, [IOVA + DATA as u64, 0], arguments)
    }

    fn command(
        &mut self,
        queue: usize,
        opcode: u32,
        namespace: u32,
        prps: [u64; 2],
        arguments: Arguments,
    ) -> Result<u32, u16> {
        self.submit(queue, opcode, namespace, prps, arguments);
        self.complete(queue)
    }

    fn submit(
        &mut self,
        queue: usize,
        opcode: u32,
        namespace: u32,
        prps: [u64; 2],
        arguments: Arguments,
    ) {
        self.next_id = self.next_id.wrapping_add(1);
        let mut words = [0u32; 16];
        words[0] = opcode | u32::from(self.next_id) << 16;
        words[1] = namespace;
        for (index, prp) in prps.into_iter().enumerate() {
            words[6 + 2 * index] = prp as u32;
            words[7 + 2 * index] = (prp >> 32) as u32;
        }
        words[10..13].copy_from_slice(&arguments);
        let state = &mut self.queues[queue];
        let at = queue * 0x2000 + 64 * usize::from(state.tail);
        shared::put(&self.memory, at, words.map(u32::to_le_bytes).as_flattened());
        state.tail = (state.tail + 1) % ENTRIES;
        self.doorbells.register::<u32>(8 * queue).unwrap().write(state.tail.into());
    }

    fn complete(&mut self, queue: usize) -> Result<u32, u16> {
        let state = &mut self.queues[queue];
        let at = queue * 0x2000 + 0x1000 + 16 * usize::from(state.head);
        let word = |index: usize| {
            let bytes = shared::get(&self.memory, at + 4 * index, 4);
            u32::from_le_bytes(bytes.try_into().unwrap())
        };
        watch::until("a completion", || (word(3) >> 16 & 1 == 1) != state.wrapped);
        assert_eq!(word(2), u32::from(state.tail) | (queue as u32) << 16, "head and queue");
        assert_eq!(word(3) as u16, self.next_id);
        let status = (word(3) >> 17) as u16;
        let result = word(0);
        state.head = (state.head + 1) % ENTRIES;
        state.wrapped ^= state.head == 0;
        self.doorbells.register::<u32>(8 * queue + 4).unwrap().write(state.head.into());
        if status == 0 { Ok(result) } else { Err(status & 0x7ff) }
    }

    fn put(&self, byte: u8, len: usize) {
        shared::put(&self.memory, DATA, &vec![byte; len]);
    }

    /// Whether a block, which is read now, is full of a byte.
    fn holds(&mut self, namespace: u32, block: u64, byte: u8, len: usize) -> bool {
        self.put(!byte, len);
        self.io(0x02, namespace, block, 0).unwrap();
        shared::get(&self.memory, DATA, len) == vec![byte; len]
    }
}

fn nvme() -> (Emulated, Power) {
    let namespaces = [(1 << 20, 512), (4 << 20, 4096)];
    let namespaces = namespaces.map(|(size, block)| Namespace::memory(size, block).unwrap());
    let nvme = Nvme::new(namespaces.into());
    let power = nvme.power();
    (Emulated::new(nvme).unwrap(), power)
}

/// Runs `f` while another thread polls the device.
fn working<T>(device: &Emulated, f: impl FnOnce() -> T) -> T {
    let alive = Arc::new(());
    let watch = Arc::downgrade(&alive);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while watch.strong_count() > 0 {
                device.poll().unwrap();
                std::thread::yield_now();
            }
        });
        // Gone whatever becomes of `f`.
        let _alive = alive;
        f()
    })
}
