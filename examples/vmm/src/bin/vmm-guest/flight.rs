//! Moves the registers of an NVMe controller while commands of this program are in its queues. Queues are in memory, so
//! the controller carries the commands out wherever its registers are (NVM Express Base 2.0 §3).

use anyhow::{Result, ensure};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::pci::{BUS_MASTER, MEMORY, Mover, PAGE, Pci, frame, load, physical, store};
use crate::wait;

/// Registers (§3.1.3), and what is in them.
const CAPABILITIES_HIGH: u64 = 0x04;
const CONFIGURATION: u64 = 0x14;
const STATUS: u64 = 0x1c;
const ADMIN_SIZES: u64 = 0x24;
const ADMIN_SUBMISSION: u64 = 0x28;
const ADMIN_COMPLETION: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;
/// Entries of 16 and of 64 bytes, enabled.
const ENABLE: u32 = 4 << 20 | 6 << 16 | 1;
const READY: u32 = 1;

/// Opcodes (§5, and NVM Command Set 1.0 §3).
const CREATE_SUBMISSION: u32 = 0x01;
const CREATE_COMPLETION: u32 = 0x05;
const WRITE: u32 = 0x01;
const READ: u32 = 0x02;

/// How many entries a queue has, and how many commands are sent at a time.
const ENTRIES: u32 = 64;
const COMMANDS: u32 = 48;
/// A command transfers a page, which has so many blocks of 512 bytes.
const BLOCKS: u32 = 8;

/// A pair of queues: each has a page, of which the submission queue's is the first.
struct Queues {
    id: u32,
    tail: u32,
    head: u32,
    phase: u32,
}

struct Controller {
    registers: MmapRegion,
    /// Two pages of each pair of queues, then one of each command.
    memory: MmapRegion,
    /// The bytes from one doorbell to the next.
    stride: u64,
}

impl Queues {
    fn new(id: u32) -> Self {
        Self { id, tail: 0, head: 0, phase: 1 }
    }

    fn page(&self) -> u64 {
        u64::from(2 * self.id)
    }

    /// What the controller has written last into entry `ahead` after the head: status, phase and identifier.
    fn completion(&self, controller: &Controller, ahead: u32) -> Result<Option<u32>> {
        let at = self.head + ahead;
        let phase = if at < ENTRIES { self.phase } else { 1 - self.phase };
        let offset = (self.page() + 1) * PAGE + u64::from(at % ENTRIES) * 16;
        let last = load(&controller.memory, offset + 12)?;
        Ok((last >> 16 & 1 == phase).then_some(last))
    }

    /// How many of `count` commands are not done.
    fn pending(&self, controller: &Controller, count: u32) -> Result<u32> {
        let mut done = 0;
        while done < count && self.completion(controller, done)?.is_some() {
            done += 1;
        }
        Ok(count - done)
    }

    /// Puts a command into the queue: the first dword, the namespace, the page of its data, and dwords 10 to 12.
    fn submit(
        &mut self,
        controller: &Controller,
        (opcode, namespace, page): (u32, u32, u64),
        rest: [u32; 3],
    ) -> Result<()> {
        let data = controller.frame(page)?;
        let mut command = [0; 16];
        (command[0], command[1]) = (opcode | self.tail << 16, namespace);
        (command[6], command[7]) = (data as u32, (data >> 32) as u32);
        command[10..13].copy_from_slice(&rest);
        let start = self.page() * PAGE + u64::from(self.tail) * 64;
        for (offset, word) in (start..).step_by(4).zip(command) {
            store(&controller.memory, offset, word)?;
        }
        self.tail = (self.tail + 1) % ENTRIES;
        Ok(())
    }

    fn ring_submission(&self, controller: &Controller) -> Result<()> {
        controller.ring(2 * self.id, self.tail)
    }

    /// Waits until so many commands are done.
    fn reap(&mut self, controller: &Controller, count: u32) -> Result<()> {
        wait(|| Ok(self.pending(controller, count)? == 0))?;
        for ahead in 0..count {
            let status = self.completion(controller, ahead)?.unwrap_or(u32::MAX) >> 17;
            ensure!(status == 0, "a command has failed with status {status:#x}");
        }
        if self.head + count >= ENTRIES {
            self.phase = 1 - self.phase;
        }
        self.head = (self.head + count) % ENTRIES;
        controller.ring(2 * self.id + 1, self.head)
    }
}

impl Controller {
    fn frame(&self, page: u64) -> Result<u64> {
        frame(self.memory.as_ptr() as u64 + page * PAGE)
    }

    fn ring(&self, doorbell: u32, value: u32) -> Result<()> {
        store(&self.registers, DOORBELLS + u64::from(doorbell) * self.stride, value)
    }

    fn enable(&self, on: bool) -> Result<()> {
        store(&self.registers, CONFIGURATION, if on { ENABLE } else { 0 })?;
        wait(|| Ok((load(&self.registers, STATUS)? & READY != 0) == on))
    }

    /// Enables the controller, and returns a pair of queues for input and output.
    fn start(&self) -> Result<Queues> {
        self.enable(false)?;
        store(&self.registers, ADMIN_SIZES, (ENTRIES - 1) << 16 | (ENTRIES - 1))?;
        for (page, register) in (0..).zip([ADMIN_SUBMISSION, ADMIN_COMPLETION]) {
            let frame = self.frame(page)?;
            store(&self.registers, register, frame as u32)?;
            store(&self.registers, register + 4, (frame >> 32) as u32)?;
        }
        self.enable(true)?;
        let (mut admin, queues) = (Queues::new(0), Queues::new(1));
        let size = (ENTRIES - 1) << 16 | queues.id;
        // Contiguous memory. Completions go to the queue of the same number, without interrupts.
        let page = queues.page();
        let creations =
            [(CREATE_COMPLETION, page + 1, 1), (CREATE_SUBMISSION, page, queues.id << 16 | 1)];
        for (opcode, page, flags) in creations {
            admin.submit(self, (opcode, 0, page), [size, flags, 0])?;
            admin.ring_submission(self)?;
            admin.reap(self, 1)?;
        }
        Ok(queues)
    }
}

/// Moves the registers `count` times, a multiple of 4, each time after commands were sent, and before they are looked
/// at. In turn they read, and write back the inverse; at the end the disk is as it was. No driver is bound.
pub fn fly(pci: &Pci, bar: u64, count: u32) -> Result<()> {
    pci.set_command(MEMORY | BUS_MASTER, true)?;
    let mut mover = Mover::new(pci, bar, 0)?;
    let memory = MmapRegion::new(((4 + u64::from(COMMANDS)) * PAGE) as usize)?;
    let slice = memory.as_volatile_slice();
    // Each page is there before its address is asked for.
    slice.write_slice(&vec![0; slice.len()], 0)?;
    let data = 4 * PAGE as usize;
    let (mut found, mut wanted) = (vec![0; slice.len() - data], None);

    let registers = physical(mover.at, 2 * PAGE as usize)?;
    let stride = 4 << (load(&registers, CAPABILITIES_HIGH)? & 0xf);
    let mut controller = Controller { registers, memory, stride };
    let mut queues = controller.start()?;
    let mut in_flight = 0;
    for n in 0..count {
        let opcode = if n % 2 == 0 { READ } else { WRITE };
        for command in 0..COMMANDS {
            let page = 4 + u64::from(command);
            queues.submit(&controller, (opcode, 1, page), [BLOCKS * command, 0, BLOCKS - 1])?;
        }
        queues.ring_submission(&controller)?;
        in_flight += queues.pending(&controller, COMMANDS)?;
        mover.go(if n + 1 == count { mover.home } else { mover.place(n) })?;
        controller.registers = physical(mover.at, 2 * PAGE as usize)?;
        queues.reap(&controller, COMMANDS)?;
        let slice = controller.memory.as_volatile_slice();
        if opcode == READ {
            slice.read_slice(&mut found, data)?;
            ensure!(wanted.is_none_or(|wanted| wanted == found), "move {n}: other data came back");
            found.iter_mut().for_each(|byte| *byte = !*byte);
            slice.write_slice(&found, data)?;
            wanted = Some(found.clone());
        } else {
            slice.write_slice(&vec![0; found.len()], data)?;
        }
    }
    controller.enable(false)?;
    pci.set_command(BUS_MASTER, false)?;
    mover.report();
    println!("{in_flight} of {} commands were in flight when a move began", count * COMMANDS);
    ensure!(in_flight > 0, "nothing was in flight");
    Ok(())
}
