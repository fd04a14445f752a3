//! The NVMe model, by a driver of the smallest sort.
#![cfg(feature = "emulated")]

#[path = "support/edu.rs"]
mod edu;
#[path = "support/server.rs"]
mod server;
#[path = "support/shared.rs"]
mod shared;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_remap::emulated::{Activity, Emulated, Fault, Faults, Namespace, Nvme, Power, Server};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{Transport, VfioUser};
use vfio_remap::{Device, ErrorKind, Placement, Window};

const ENTRIES: u16 = 8;
/// Where things lie in the driver's memory, which the device sees from `IOVA` on.
const IOVA: u64 = 0x10_0000;
const LIST: usize = 0x8000;
const DATA: usize = 0x1_0000;
const SIZE: usize = 0x8_0000;

const INVALID_FIELD: u16 = 0x02;

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
        edu::until("it is disabled", || edu::read(device, 0x1c) & 1 == 0);
        for queue in 0..4 {
            shared::put(&self.memory, queue * 0x1000, &[0; 0x1000]);
        }
        self.queues = Default::default();
        edu::write(device, 0x24, u32::from(ENTRIES - 1) * 0x1_0001);
        device.write_at(0, 0x28, &IOVA.to_le_bytes()).unwrap();
        device.write_at(0, 0x30, &(IOVA + 0x1000).to_le_bytes()).unwrap();
        edu::write(device, 0x14, 0x0046_0001);
        edu::until("it is ready", || edu::read(device, 0x1c) == 1);
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
        edu::until("a completion", || (word(3) >> 16 & 1 == 1) != state.wrapped);
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

fn identify(driver: &mut Driver, cns: u32, namespace: u32) -> Result<Vec<u8>, u16> {
    driver.admin(0x06, namespace, IOVA + DATA as u64, [cns, 0, 0])?;
    Ok(shared::get(&driver.memory, DATA, 4096))
}

fn works(device: Arc<dyn Transport>) {
    let event = edu::event();
    device.set_irqs(2, 1, &[Some(event.as_fd())]).unwrap();
    let mut driver = Driver::new(device);
    let controller = identify(&mut driver, 1, 0).unwrap();
    assert_eq!((controller[512], controller[513], controller[516]), (0x66, 0x44, 2));
    for (id, blocks, shift) in [(1, 2048u64, 9), (2, 1024, 12)] {
        let namespace = identify(&mut driver, 0, id).unwrap();
        assert_eq!((&namespace[..8], namespace[130]), (&blocks.to_le_bytes()[..], shift));
    }
    assert_eq!(identify(&mut driver, 2, 0).unwrap()[..12], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.admin(0x09, 0, 0, [7, 3 << 16 | 3, 0]), Ok(15 << 16 | 15));
    assert_eq!(driver.admin(0x0a, 0, 0, [6, 0, 0]), Ok(1));
    let log = [2 | 127 << 16, 0, 0];
    driver.admin(0x02, u32::MAX, IOVA + DATA as u64, log).unwrap();
    assert_eq!(shared::get(&driver.memory, DATA + 1, 3), [44, 1, 100]);

    // More than the queues have entries, so that they wrap around.
    for round in 0..3 * u64::from(ENTRIES) {
        for (namespace, len) in [(1, 512), (2, 4096)] {
            driver.put(round as u8 + 1, len);
            driver.io(0x01, namespace, 7 * round, 0).unwrap();
            assert!(driver.holds(namespace, 7 * round, round as u8 + 1, len));
        }
    }
    assert!(edu::fired(&event) > 0);
    driver.io(0x00, 1, 0, 0).unwrap();
    driver.io(0x08, 1, 6, 2).unwrap();
    assert!(driver.holds(1, 7, 0, 512), "zeros were written");
    assert!(driver.holds(1, 14, 3, 512));
    lists(&mut driver);
}

/// 128 KiB that begin within a page, by a list of which the last entry on a page leads on.
fn lists(driver: &mut Driver) {
    let data: Vec<u8> = (0..0x2_0000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let skip = 0x204;
    shared::put(&driver.memory, DATA + skip, &data);
    let first = IOVA + DATA as u64;
    let mut pages = (1..33).map(|page| (first + page * 0x1000).to_le_bytes());
    let start = LIST + 0x1000 - 32;
    for at in 0..3 {
        shared::put(&driver.memory, start + 8 * at, &pages.next().unwrap());
    }
    let next = (IOVA + LIST as u64 + 0x1000).to_le_bytes();
    shared::put(&driver.memory, start + 24, &next);
    for (at, page) in pages.enumerate() {
        shared::put(&driver.memory, LIST + 0x1000 + 8 * at, &page);
    }
    let prps = [first + skip as u64, IOVA + start as u64];
    let all = [100, 0, 31];
    driver.command(1, 0x01, 2, prps, all).unwrap();
    shared::put(&driver.memory, DATA + skip, &vec![0; data.len()]);
    driver.command(1, 0x02, 2, prps, all).unwrap();
    assert!(shared::get(&driver.memory, DATA + skip, data.len()) == data);
    assert_eq!(driver.command(1, 0x02, 2, prps, [100, 0, 32]), Err(INVALID_FIELD), "too much");
    let unaligned = [first + 2, 0];
    assert_eq!(driver.command(1, 0x02, 2, unaligned, [0, 0, 0]), Err(0x13));
    assert_eq!(driver.command(1, 0x02, 2, [first, first + 8], [0, 0, 1]), Err(0x13));
    assert_eq!(driver.command(1, 0x02, 2, [first, first + 4], [0, 0, 2]), Err(0x13));
    assert_eq!(driver.command(1, 0x02, 2, [0x1000, 0], [0, 0, 0]), Err(0x04), "not mapped");
}

#[test]
fn a_driver_reads_and_writes_every_namespace() {
    works(Arc::new(nvme().0));
}

#[test]
fn a_driver_in_another_place_does_so_over_a_socket() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = nvme().0;
    let time = Duration::from_secs(5);
    let served = std::thread::spawn(move || Server::serve_stream(&device, theirs, time));
    works(Arc::new(VfioUser::from_stream(ours, time).unwrap()));
    served.join().unwrap().unwrap();
}

#[test]
fn what_makes_no_sense_is_answered_by_the_specifications_status() {
    let mut driver = Driver::new(Arc::new(nvme().0));
    let data = IOVA + DATA as u64;
    let page = IOVA + 0x4000;
    let admin: &[(u8, u32, u64, Arguments, u16)] = &[
        (0x7f, 0, 0, [0; 3], 0x01),
        (0x06, 3, data, [0, 0, 0], 0x0b),
        (0x06, 0, data, [0, 0, 0], 0x0b),
        (0x06, 0, data, [0x77, 0, 0], 0x02),
        (0x05, 0, page, [7 << 16, 3, 0], 0x101),
        (0x05, 0, page, [7 << 16 | 17, 3, 0], 0x101),
        (0x05, 0, page, [7 << 16 | 1, 3, 0], 0x101),
        (0x05, 0, page, [2, 3, 0], 0x102),
        (0x05, 0, page, [1024 << 16 | 2, 3, 0], 0x102),
        (0x05, 0, page, [7 << 16 | 2, 2, 0], 0x02),
        (0x05, 0, page + 8, [7 << 16 | 2, 3, 0], 0x13),
        (0x05, 0, page, [7 << 16 | 2, 17 << 16 | 3, 0], 0x108),
        (0x01, 0, page, [7 << 16 | 2, 9 << 16 | 1, 0], 0x100),
        (0x01, 0, page, [7 << 16 | 1, 1 << 16 | 1, 0], 0x101),
        (0x04, 0, 0, [1, 0, 0], 0x10c),
        (0x04, 0, 0, [2, 0, 0], 0x101),
        (0x04, 0, 0, [0, 0, 0], 0x101),
        (0x00, 0, 0, [0, 0, 0], 0x101),
        (0x02, 0, data, [0x77, 0, 0], 0x109),
        (0x0a, 0, 0, [0x77, 0, 0], 0x02),
        (0x09, 0, 0, [0x77, 0, 0], 0x02),
        (0x09, 0, 0, [7, 0xffff, 0], 0x02),
        (0x09, 0, 0, [1 << 31 | 6, 0, 0], 0x10d),
    ];
    for &(opcode, namespace, prp, arguments, status) in admin {
        let answer = driver.admin(opcode, namespace, prp, arguments);
        assert_eq!(answer, Err(status), "{opcode:#x} {arguments:x?}");
    }
    assert_eq!(driver.command(0, 0x4006, 0, [data, 0], [1, 0, 0]), Err(0x02), "an SGL");
    assert_eq!(driver.admin(0x08, 0, 0, [0; 3]), Ok(1), "there is none to abort");
    for (opcode, namespace, block, control, status) in [
        (0x7f, 1, 0, 0, 0x01),
        (0x02, 0, 0, 0, 0x0b),
        (0x02, 3, 0, 0, 0x0b),
        (0x02, 1, 2048, 0, 0x80),
        (0x01, 1, 2047, 1, 0x80),
        (0x01, 1, u64::MAX, 0, 0x80),
        (0x08, 2, 1023, 0xffff, 0x80),
        (0x02, 1, 0, 256, 0x02),
    ] {
        let answer = driver.io(opcode, namespace, block, control);
        assert_eq!(answer, Err(status), "{opcode:#x} {block:#x} {control:#x}");
    }
    for _ in 0..4 {
        driver.submit(0, 0x0c, 0, [0; 2], [0; 3]);
    }
    driver.submit(0, 0x0c, 0, [0; 2], [0; 3]);
    assert_eq!(driver.complete(0), Err(0x105), "four wait for events");
    driver.admin(0x00, 0, 0, [1, 0, 0]).unwrap();
    driver.admin(0x04, 0, 0, [1, 0, 0]).unwrap();
}

#[test]
fn a_loss_of_power_loses_what_was_neither_flushed_nor_forced() {
    let (device, power) = nvme();
    let mut driver = Driver::new(Arc::new(device));
    driver.put(1, 512);
    driver.io(0x01, 1, 1, 0).unwrap();
    driver.io(0x00, 1, 0, 0).unwrap();
    driver.put(2, 512);
    driver.io(0x01, 1, 1, 0).unwrap();
    driver.io(0x01, 1, 2, 0).unwrap();
    driver.io(0x01, 1, 3, 1 << 30).unwrap();
    assert!(driver.holds(1, 1, 2, 512) && driver.holds(1, 2, 2, 512));
    power.cycle();
    edu::until("it is off", || edu::read(&*driver.device, 0x1c) == 0);
    driver.start();
    assert!(driver.holds(1, 1, 1, 512), "what was flushed is back");
    assert!(driver.holds(1, 2, 0, 512), "what was not is lost");
    assert!(driver.holds(1, 3, 2, 512), "what was forced is there");
    // Without the cache, and after a shutdown, all is there.
    driver.admin(0x09, 0, 0, [6, 0, 0]).unwrap();
    driver.put(4, 512);
    driver.io(0x01, 1, 4, 0).unwrap();
    power.cycle();
    edu::until("it is off", || edu::read(&*driver.device, 0x1c) == 0);
    driver.start();
    assert!(driver.holds(1, 4, 4, 512));
    driver.put(5, 512);
    driver.io(0x01, 1, 5, 0).unwrap();
    edu::write(&*driver.device, 0x14, 0x0046_4001);
    edu::until("it is shut down", || edu::read(&*driver.device, 0x1c) >> 2 & 3 == 2);
    power.cycle();
    edu::until("it is off", || edu::read(&*driver.device, 0x1c) == 0);
    driver.start();
    assert!(driver.holds(1, 5, 5, 512));
}

#[test]
fn blocks_of_a_file_are_there_for_the_next_controller() {
    let path = server::path();
    std::fs::write(&path, vec![0; 1 << 16]).unwrap();
    for round in 0..2 {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let nvme = Nvme::new(vec![Namespace::file(file, 512).unwrap()]);
        let mut driver = Driver::new(Arc::new(Emulated::new(nvme).unwrap()));
        assert!(driver.holds(1, 9, round, 512));
        driver.put(1, 512);
        driver.io(0x01, 1, 9, 0).unwrap();
        driver.io(0x00, u32::MAX, 0, 0).unwrap();
    }
    std::fs::remove_file(path).unwrap();
    for (size, block) in [(0, 512), (513, 512), (1024, 1024), (4096 * 3 / 2, 4096)] {
        assert_eq!(Namespace::memory(size, block).unwrap_err().kind(), ErrorKind::Unaligned);
    }
}

#[test]
fn queues_that_cannot_be_reached_are_a_fatal_status_until_the_controller_is_reset() {
    let mut driver = Driver::new(Arc::new(nvme().0));
    driver.device.dma_unmap(IOVA, SIZE as u64).unwrap();
    driver.submit(0, 0x06, 0, [0; 2], [1, 0, 0]);
    edu::until("a fatal status", || edu::read(&*driver.device, 0x1c) & 2 != 0);
    let memory = driver.memory.clone();
    driver.device.dma_map(IOVA, &memory, Access::ReadWrite).unwrap();
    driver.start();
    driver.io(0x00, 1, 0, 0).unwrap();
}

/// A driver, whose next command is struck by a fault.
fn faulty(fault: Fault) -> (Driver, Faults) {
    // Two make the queues, one writes what is not flushed.
    let faults = Faults::new([(3, fault)]);
    let namespace = Namespace::memory(1 << 20, 512).unwrap();
    let nvme = Nvme::new(vec![namespace]).with_faults(&faults);
    let mut driver = Driver::new(Arc::new(Emulated::new(nvme).unwrap()));
    driver.put(1, 512);
    driver.io(0x01, 1, 1, 0).unwrap();
    assert_eq!((faults.struck().len(), faults.left()), (0, 1));
    (driver, faults)
}

/// Submits the command that is struck: a write of `2` to block 2.
fn struck(driver: &mut Driver, faults: &Faults) {
    driver.put(2, 512);
    driver.submit(1, 0x01, 1, [IOVA + DATA as u64, 0], [2, 0, 0]);
    edu::until("the fault", || faults.struck().len() == 1 && faults.left() == 0);
}

fn posted(driver: &Driver, queue: usize, index: usize) -> u16 {
    let id = shared::get(&driver.memory, queue * 0x2000 + 0x1000 + 16 * index + 12, 2);
    u16::from_le_bytes(id.try_into().unwrap())
}

#[test]
fn a_fatal_fault_stops_the_controller_until_it_is_reset() {
    let (mut driver, faults) = faulty(Fault::FatalStatus);
    struck(&mut driver, &faults);
    edu::until("a fatal status", || edu::read(&*driver.device, 0x1c) & 2 != 0);
    driver.start();
    assert!(driver.holds(1, 1, 1, 512) && driver.holds(1, 2, 0, 512), "it was not carried out");
}

#[test]
fn a_lost_completion_is_of_a_command_that_was_carried_out() {
    let (mut driver, faults) = faulty(Fault::LostCompletion);
    struck(&mut driver, &faults);
    assert!(driver.holds(1, 2, 2, 512), "the completion of the read is the next");
    assert_eq!(faults.struck(), [(3, Fault::LostCompletion)]);
}

#[test]
fn a_late_completion_comes_after_a_later_one_or_when_nothing_else_is_to_do() {
    let (mut driver, faults) = faulty(Fault::LateCompletion);
    struck(&mut driver, &faults);
    driver.complete(1).unwrap();

    let faults = Faults::new([(2, Fault::LateCompletion)]);
    let namespace = Namespace::memory(1 << 20, 512).unwrap();
    let device = Emulated::new(Nvme::new(vec![namespace]).with_faults(&faults)).unwrap();
    let mut driver = Driver::new(Arc::new(device));
    // Both are there before the controller looks.
    let config = driver.device.clone();
    config.write_at(7, 4, &2u16.to_le_bytes()).unwrap();
    for _ in 0..2 {
        driver.submit(1, 0x00, 1, [0; 2], [0; 3]);
    }
    config.write_at(7, 4, &6u16.to_le_bytes()).unwrap();
    edu::until("both completions", || posted(&driver, 1, 0) != 0 && posted(&driver, 1, 1) != 0);
    assert_eq!(
        (posted(&driver, 1, 0), posted(&driver, 1, 1)),
        (driver.next_id, driver.next_id - 1)
    );
}

#[test]
fn a_reset_by_somebody_else_keeps_what_was_written_and_a_loss_of_power_does_not() {
    for (fault, kept) in [(Fault::Reset, 1), (Fault::PowerLoss, 0)] {
        let (mut driver, faults) = faulty(fault);
        struck(&mut driver, &faults);
        assert_eq!(edu::read(&*driver.device, 0x1c), 0);
        assert_eq!(edu::read(&*driver.device, 0x14), 0);
        driver.start();
        assert!(driver.holds(1, 1, kept, 512) && driver.holds(1, 2, 0, 512), "{fault:?}");
    }
}

#[test]
fn a_controller_that_is_pulled_reads_all_ones_until_it_is_plugged_in() {
    let (mut driver, faults) = faulty(Fault::Removal);
    struck(&mut driver, &faults);
    let device = driver.device.clone();
    let vendor = || {
        let mut id = [0; 2];
        device.read_at(7, 0, &mut id).unwrap();
        u16::from_le_bytes(id)
    };
    assert_eq!((vendor(), edu::read(&*device, 0x1c)), (0xffff, u32::MAX));
    device.reset().unwrap();
    edu::write(&*device, 0x14, 0x0046_0001);
    assert_eq!((vendor(), edu::read(&*device, 0x14)), (0xffff, u32::MAX));
    faults.plug_in();
    assert_eq!((vendor(), edu::read(&*device, 0x1c)), (0x1b36, 0));
    driver.start();
    assert!(driver.holds(1, 1, 0, 512), "it was not flushed");
}

/// A namespace in blocks of 512 bytes on a memory file, which is sparse.
fn sparse(size: u64) -> (Namespace, File) {
    let file = File::from(memfd_create("vfio-remap-test-sparse", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    (Namespace::file(file.try_clone().unwrap(), 512).unwrap(), file)
}

/// Four turns of a Deallocate.
const FULL: u64 = 64 << 20;

/// As [`sparse`], but all of it is allocated.
fn full() -> (Namespace, File) {
    let (namespace, file) = sparse(FULL);
    fallocate(&file, FallocateFlags::empty(), 0, FULL as i64).unwrap();
    assert_eq!(allocated(&file), FULL);
    (namespace, file)
}

/// Bytes that the file has memory for.
fn allocated(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

/// Puts the range for a Deallocate of all blocks where the data are.
fn range_of_all(driver: &Driver, size: u64) {
    let range = [0, (size / 512) as u32, 0, 0];
    shared::put(&driver.memory, DATA, range.map(u32::to_le_bytes).as_flattened());
}

/// A driver, and a controller that works when it is polled.
fn by_hand(transport: impl Transport + 'static, device: &Emulated) -> Driver {
    working(device, || Driver::new(Arc::new(transport)))
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

/// A controller on a file of which all is allocated, in the middle of a Deallocate of all of it.
fn deallocating() -> (Emulated, Driver, File) {
    let (namespace, file) = full();
    let device = Emulated::polled(Nvme::new(vec![namespace])).unwrap();
    let mut driver = by_hand(device.clone(), &device);
    range_of_all(&driver, FULL);
    driver.submit(1, 0x09, 1, [IOVA + DATA as u64, 0], [0, 4, 0]);
    assert_eq!(device.poll().unwrap(), Activity::Busy);
    let left = allocated(&file);
    assert!(0 < left && left < FULL, "{left:#x} bytes are left");
    (device, driver, file)
}

#[test]
fn zeroes_over_a_sparse_file_allocate_nothing() {
    const SIZE: u64 = 512 << 20;
    let (namespace, file) = sparse(SIZE);
    let mut driver = Driver::new(Arc::new(Emulated::new(Nvme::new(vec![namespace])).unwrap()));
    driver.put(1, 512);
    driver.io(0x01, 1, 77, 0).unwrap();
    for (first, round) in (0..SIZE / 512).step_by(1 << 16).zip(0..) {
        // Every other one with forced unit access.
        driver.io(0x08, 1, first, 0xffff | (round & 1) << 30).unwrap();
    }
    assert!(driver.holds(1, 77, 0, 512));
    range_of_all(&driver, SIZE);
    driver.io(0x09, 1, 4 << 32, 0).unwrap();
    let found = allocated(&file);
    assert!(found < 1 << 20, "{found:#x} bytes are allocated");
}

#[test]
fn a_long_command_leaves_turns_to_registers_and_others() {
    let (device, mut driver, file) = deallocating();
    let mut left = allocated(&file);
    let mut turns = 1;
    loop {
        // A register, and a command of the admin queue.
        assert_eq!(edu::read(&*driver.device, 0x1c), 1);
        driver.submit(0, 0x0a, 0, [0; 2], [6, 0, 0]);
        let busy = device.poll().unwrap();
        assert_eq!(driver.complete(0), Ok(1));
        let now = allocated(&file);
        assert!(left - now <= 16 << 20, "{:#x} bytes in one turn", left - now);
        left = now;
        turns += 1;
        if busy != Activity::Busy || left == 0 {
            break;
        }
    }
    assert!((4..8).contains(&turns), "{turns} turns");
    device.poll().unwrap();
    driver.next_id -= turns - 1;
    driver.complete(1).unwrap();
}

#[test]
fn a_long_command_ends_with_the_client_that_waits_for_it() {
    let (namespace, file) = full();
    let device = Emulated::polled(Nvme::new(vec![namespace])).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let time = Duration::from_secs(30);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| Server::serve_stream(&device, theirs, time));
        let mut driver = by_hand(VfioUser::from_stream(ours, time).unwrap(), &device);
        range_of_all(&driver, FULL);
        driver.submit(1, 0x09, 1, [IOVA + DATA as u64, 0], [0, 4, 0]);
        assert_eq!(device.poll().unwrap(), Activity::Busy);
        drop(driver);
        served.join().unwrap().unwrap();
    });
    let left = allocated(&file);
    assert!(0 < left && left < FULL);
    for _ in 0..100 {
        device.poll().unwrap();
    }
    assert_eq!(allocated(&file), left);
}

#[test]
fn a_long_command_ends_with_a_reset_or_its_queue() {
    type End = fn(&mut Driver, &Emulated);
    let ends: [End; 3] = [
        |driver, _| edu::write(&*driver.device, 0x14, 0),
        |driver, _| driver.device.reset().unwrap(),
        |driver, device| {
            // Its submission queue is deleted.
            driver.submit(0, 0x00, 0, [0; 2], [1, 0, 0]);
            device.poll().unwrap();
            driver.complete(0).unwrap();
        },
    ];
    for end in ends {
        let (device, mut driver, file) = deallocating();
        end(&mut driver, &device);
        let left = allocated(&file);
        assert!(left > 0);
        for _ in 0..100 {
            device.poll().unwrap();
        }
        assert_eq!(allocated(&file), left);
    }
}

#[test]
fn a_long_command_can_be_aborted() {
    let (device, mut driver, file) = deallocating();
    let long = u32::from(driver.next_id);
    for aborted in [true, false] {
        driver.submit(0, 0x08, 0, [0; 2], [long << 16 | 1, 0, 0]);
        device.poll().unwrap();
        assert_eq!(driver.complete(0), Ok(u32::from(!aborted)));
    }
    let left = allocated(&file);
    driver.next_id = long as u16;
    assert_eq!(driver.complete(1), Err(0x07));
    device.poll().unwrap();
    assert!(left > 0 && allocated(&file) == left);
}

#[test]
fn a_deallocate_past_the_end_changes_nothing() {
    let mut driver = Driver::new(Arc::new(nvme().0));
    driver.put(1, 512);
    driver.io(0x01, 1, 7, 0).unwrap();
    // The second of two ranges leaves the namespace.
    let ranges = [0, 8, 0, 0, 0, 2, 2047, 0];
    shared::put(&driver.memory, DATA, ranges.map(u32::to_le_bytes).as_flattened());
    let data = [IOVA + DATA as u64, 0];
    assert_eq!(driver.command(1, 0x09, 1, data, [1, 4, 0]), Err(0x80));
    assert!(driver.holds(1, 7, 1, 512));
}

#[test]
fn more_long_commands_than_a_queue_holds_all_end() {
    let device = Emulated::polled(Nvme::new(vec![sparse(FULL).0])).unwrap();
    let mut driver = by_hand(device.clone(), &device);
    for _ in 0..10 {
        let first = driver.next_id + 1;
        for _ in 1..ENTRIES {
            driver.submit(1, 0x08, 1, [0; 2], [0, 0, 0xffff]);
        }
        while device.poll().unwrap() == Activity::Busy {}
        for id in first..first + ENTRIES - 1 {
            driver.next_id = id;
            driver.complete(1).unwrap();
        }
    }
}

#[test]
fn completions_without_room_wait_and_nothing_is_busy() {
    let device = Emulated::polled(Nvme::new(vec![sparse(FULL).0])).unwrap();
    let mut driver = by_hand(device.clone(), &device);
    let first = driver.next_id + 1;
    // Of eleven completions there is room for seven.
    for commands in [4, 7] {
        for _ in 0..commands {
            driver.submit(1, 0x08, 1, [0; 2], [0, 0, 0]);
        }
        device.poll().unwrap();
        device.poll().unwrap();
    }
    assert_eq!(device.poll().unwrap(), Activity::Watching);
    let tail = driver.queues[1].tail;
    for id in first..first + 11 {
        driver.next_id = id;
        // What the controller has read when it completes the first four.
        driver.queues[1].tail = if id < first + 4 { 4 } else { tail };
        driver.complete(1).unwrap();
        device.poll().unwrap();
    }
}
