//! An NVMe controller (NVM Express Base 1.4).

mod admin;
mod coalescing;
mod command;
mod fault;
mod identify;
mod io;
mod long;
mod queue;
mod storage;

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use self::coalescing::Coalescing;
use self::command::Status;
use self::fault::{Completion, Delivery};
pub use self::fault::{Fault, Faults};
use self::long::{Long, Zeros};
use self::queue::{CompletionQueue, SubmissionQueue};
pub use self::storage::Namespace;
use super::bus::Bus;
use super::model::{Activity, Model, Shape};
use super::pci::PciConfig;
use crate::device::Register;
use crate::error::Result;
use crate::transport::{irq_index, region_index};

const BAR: u32 = 0;
const BAR_SIZE: u64 = 0x4000;
const DOORBELLS: u64 = 0x1000;
const MSIX_TABLE: u64 = 0x2000;
const MSIX_PENDING: u64 = 0x3000;

const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x0010;
/// 1.4.0
const VERSION: u32 = 0x0001_0400;
/// I/O submission queues, and I/O completion queues, each with a vector. The admin queues have one more.
const QUEUES: u16 = 16;
const VECTORS: u16 = QUEUES + 1;
/// Most entries of a queue.
const MAX_ENTRIES: u16 = 1024;
/// In pages of 4 KiB.
const MAX_TRANSFER_PAGES: usize = 32;
const MAX_EVENTS: usize = 4;
/// Most commands for each poll, so that accesses to registers do not wait long.
const COMMANDS_PER_POLL: usize = 32;
/// Most commands that are taken and not completed. At this limit, no more are taken from I/O queues.
const MAX_PENDING: usize = 256;

/// Queues contiguous, ten seconds to become ready, the NVM command set, pages of 4 to 64 KiB
/// (NVMe 1.4 §3.1.1).
const CAPABILITIES: u64 = (MAX_ENTRIES as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37 | 4 << 52;

const READY: u32 = 1;
const FATAL: u32 = 2;
const SHUT_DOWN: u32 = 2 << 2;

/// A controller with up to 16 pairs of I/O queues and any number of [`Namespace`]s. The registers in page 0 are
/// trapped, the doorbells in page 1 are mapped and polled.
///
/// Admin commands: Identify, creation and deletion of queues, Get and Set Features, Get Log Page, Abort,
/// Asynchronous Event Request. I/O commands: Read, Write, Flush, Write Zeroes, Dataset Management (Deallocate).
/// Data by PRP lists, interrupts by MSI-X, which can be coalesced. Other commands complete with the status codes of
/// the specification.
///
/// Write Zeroes and Deallocate punch holes into a namespace's file if its file system supports that. They are
/// done in parts, so that other commands and accesses to registers proceed meanwhile. A reset ends them half
/// way, and so does the end of the client that waits for them.
#[derive(Debug)]
pub struct Nvme {
    namespaces: Vec<Namespace>,
    /// What no other controller has in its name: an operating system takes two of one name for one.
    identity: u64,
    config: PciConfig,
    msix: Box<[u8]>,
    /// CC, CSTS, AQA, ASQ, ACQ, and the interrupt mask.
    configuration: u32,
    status: u32,
    admin_sizes: u32,
    admin_submissions: u64,
    admin_completions: u64,
    mask: u32,
    submissions: BTreeMap<u16, SubmissionQueue>,
    completions: BTreeMap<u16, CompletionQueue>,
    features: BTreeMap<u8, u32>,
    coalescing: Coalescing,
    /// The identifiers of Asynchronous Event Requests.
    events: Vec<u16>,
    /// Alternately of a submission and a completion queue.
    doorbells: Vec<Register<u32>>,
    power_lost: Arc<AtomicBool>,
    faults: Option<Faults>,
    removed: bool,
    late: Vec<Completion>,
    /// Commands that are done in parts.
    long: VecDeque<Long>,
    /// The next queue to serve.
    next: u16,
}

/// The power supply of a controller: see [`Nvme::power`].
#[derive(Clone, Debug)]
pub struct Power(Arc<AtomicBool>);

impl Power {
    /// Turns the power off and on. Cached data is lost, and the controller is as after power on before its next
    /// action.
    pub fn cycle(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Nvme {
    /// A controller with these namespaces, numbered from 1.
    pub fn new(namespaces: Vec<Namespace>) -> Self {
        let config = PciConfig::new(256, VENDOR, DEVICE, 0x01_0802, 1).bar64(0, BAR_SIZE).msix(
            VECTORS,
            (0, MSIX_TABLE as u32),
            (0, MSIX_PENDING as u32),
        );
        Self {
            namespaces,
            identity: RandomState::new().hash_one(DEVICE),
            config,
            msix: vec![0; 16 * usize::from(VECTORS)].into(),
            configuration: 0,
            status: 0,
            admin_sizes: 0,
            admin_submissions: 0,
            admin_completions: 0,
            mask: 0,
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            features: BTreeMap::new(),
            coalescing: Coalescing::default(),
            events: Vec::new(),
            doorbells: Vec::new(),
            power_lost: Arc::default(),
            faults: None,
            removed: false,
            late: Vec::new(),
            long: VecDeque::new(),
            next: 0,
        }
    }

    /// The controller's power supply.
    pub fn power(&self) -> Power {
        Power(self.power_lost.clone())
    }

    fn page(&self) -> usize {
        4096 << (self.configuration >> 7 & 0xf)
    }

    fn load(&self, offset: u64) -> u32 {
        match offset {
            0x00 => CAPABILITIES as u32,
            0x04 => (CAPABILITIES >> 32) as u32,
            0x08 => VERSION,
            0x0c | 0x10 => self.mask,
            0x14 => self.configuration,
            0x1c => self.status,
            0x24 => self.admin_sizes,
            0x28 => self.admin_submissions as u32,
            0x2c => (self.admin_submissions >> 32) as u32,
            0x30 => self.admin_completions as u32,
            0x34 => (self.admin_completions >> 32) as u32,
            _ => 0,
        }
    }

    fn store(&mut self, bus: &Bus, offset: u64, value: u32) {
        let low = |old: u64| (old & !0xffff_ffff) | u64::from(value & !0xfff);
        let high = |old: u64| (old & 0xffff_ffff) | u64::from(value) << 32;
        match offset {
            0x0c => self.mask |= value,
            0x10 => self.mask &= !value,
            0x14 => self.configure(bus, value),
            0x24 => self.admin_sizes = value & 0x0fff_0fff,
            0x28 => self.admin_submissions = low(self.admin_submissions),
            0x2c => self.admin_submissions = high(self.admin_submissions),
            0x30 => self.admin_completions = low(self.admin_completions),
            0x34 => self.admin_completions = high(self.admin_completions),
            _ => {}
        }
    }

    /// Handles a write of CC: enable, disable or shutdown (NVMe 1.4 §3.1.5).
    fn configure(&mut self, bus: &Bus, value: u32) {
        let was = std::mem::replace(&mut self.configuration, value & 0x00ff_fff1);
        let (enabled, enable) = (was & 1 != 0, value & 1 != 0);
        if enable && !enabled {
            self.enable(bus);
        } else if enabled && !enable {
            self.disable(bus);
        }
        if value >> 14 & 3 == 0 {
            self.status &= !SHUT_DOWN;
        } else if was >> 14 & 3 == 0 {
            self.flush_all();
            self.status |= SHUT_DOWN;
        }
    }

    fn enable(&mut self, bus: &Bus) {
        let [submissions, completions] =
            [self.admin_sizes, self.admin_sizes >> 16].map(|size| (size & 0xfff) as u16 + 1);
        let command_set = self.configuration >> 4 & 7;
        let page = self.configuration >> 7 & 0xf;
        let sizes = [submissions, completions];
        if command_set != 0 || page > 4 || sizes.iter().any(|size| *size < 2) {
            self.status |= FATAL;
            return;
        }
        // Doorbell values from before the reset are not valid any more.
        self.doorbells.iter().for_each(|doorbell| doorbell.write(0));
        let base = self.admin_submissions;
        let queue = SubmissionQueue { base, size: submissions, head: 0, completions: 0 };
        self.submissions.insert(0, queue);
        let queue = CompletionQueue::new(self.admin_completions, completions, Some(0));
        self.completions.insert(0, queue);
        self.status |= READY;
        bus.wake();
    }

    /// A controller reset; the registers of the admin queues stay (NVMe 1.4 §7.3.2).
    fn disable(&mut self, bus: &Bus) {
        self.submissions.clear();
        self.completions.clear();
        self.features.clear();
        self.coalescing = Coalescing::default();
        self.events.clear();
        self.late.clear();
        self.long.clear();
        self.mask = 0;
        self.status = 0;
        if let Some(memory) = bus.memory(BAR)
            && let Err(error) = memory.write(DOORBELLS, &[0; 0x1000])
        {
            log::error!("nvme: {error}");
        }
    }

    fn flush_all(&mut self) {
        for namespace in &mut self.namespaces {
            if let Err(error) = namespace.flush() {
                log::error!("nvme: written data may not be durable: {error}");
            }
        }
    }

    fn check_power(&mut self, bus: &Bus) {
        if self.power_lost.swap(false, Ordering::Acquire) {
            self.lose_power(bus);
        }
    }

    fn doorbell(&self, index: u16) -> u32 {
        self.doorbells.get(usize::from(index)).map_or(0, Register::read)
    }

    /// Takes at most `most` commands from a queue. Returns how many.
    fn serve(&mut self, bus: &Bus, id: u16, most: usize) -> Result<usize> {
        for taken in 0..most {
            let Some(queue) = self.submissions.get_mut(&id) else { return Ok(taken) };
            let (size, head, to) = (queue.size, queue.head, queue.completions);
            let tail = self.doorbell(2 * id);
            let pending = self.long.len() + self.late.len();
            if tail == u32::from(head)
                || tail >= u32::from(size)
                || self.is_full(to)
                || (id > 0 && pending >= MAX_PENDING)
            {
                return Ok(taken);
            }
            let Some(queue) = self.submissions.get_mut(&id) else { return Ok(taken) };
            let command = queue.pop(bus)?;
            let delivery = self.inject(bus);
            if delivery == Delivery::Stopped {
                return Ok(taken + 1);
            }
            let outcome = match id {
                0 => self
                    .admin(bus, &command)
                    .map(|done| done.map_or(Progress::Waits, Progress::Done)),
                _ => self.io(bus, &command),
            };
            let status = outcome.as_ref().err().copied().unwrap_or(Status::SUCCESS);
            let completion = Completion { to, result: 0, queue: id, id: command.id(), status };
            match outcome {
                Ok(Progress::Waits) => {}
                Ok(Progress::Long(zeros)) => {
                    self.long.push_back(Long { zeros, completion, delivery });
                }
                Ok(Progress::Done(result)) => {
                    self.finish(bus, delivery, Completion { result, ..completion })?;
                }
                Err(_) => self.finish(bus, delivery, completion)?,
            }
        }
        Ok(most)
    }

    /// Posts the completion of a command as `delivery` says, once its queue has room.
    fn finish(&mut self, bus: &Bus, delivery: Delivery, completion: Completion) -> Result<()> {
        match delivery {
            Delivery::Lost | Delivery::Stopped => return Ok(()),
            Delivery::Late => {
                self.late.push(completion);
                return Ok(());
            }
            Delivery::AfterSpurious | Delivery::Twice if !self.is_full(completion.to) => {
                let id = if delivery == Delivery::Twice { completion.id } else { !completion.id };
                self.complete(bus, Completion { id, ..completion })?;
            }
            Delivery::AfterSpurious | Delivery::Twice | Delivery::Posted => {}
        }
        // It comes before late ones.
        if self.is_full(completion.to) {
            self.late.push(completion);
        } else {
            self.complete(bus, completion)?;
        }
        self.post_late(bus).map(drop)
    }

    /// Whether a completion queue has no room or does not exist.
    fn is_full(&self, id: u16) -> bool {
        let queue = self.completions.get(&id);
        queue.is_none_or(|queue| queue.is_full(self.doorbell(2 * id + 1)))
    }

    fn complete(&mut self, bus: &Bus, completion: Completion) -> Result<()> {
        let Completion { to, result, queue: from, id, status } = completion;
        let head = self.submissions.get(&from).map_or(0, |queue| queue.head);
        let Some(queue) = self.completions.get_mut(&to) else { return Ok(()) };
        queue.push(bus, result, (from, head), id, status)?;
        // Errors are not delayed, and neither are completions of the admin queue.
        let urgent = to == 0 || status != Status::SUCCESS;
        if let Some(vector) = queue.vector
            && self.coalescing.count(vector, urgent)
        {
            bus.fire(irq_index::MSIX, vector.into());
        }
        Ok(())
    }

    fn cannot_reach(&mut self, error: &crate::Error) {
        log::debug!("nvme: cannot access a queue: {error}");
        self.status |= FATAL;
    }

    fn namespace(&mut self, id: u32) -> std::result::Result<&mut Namespace, Status> {
        let index = id.checked_sub(1).and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| self.namespaces.get_mut(index)).ok_or(Status::INVALID_NAMESPACE)
    }
}

/// The progress of a taken command.
enum Progress {
    /// It is done, with this result.
    Done(u32),
    /// It waits for an event.
    Waits,
    /// It takes long, and is done in parts.
    Long(Zeros),
}

impl Model for Nvme {
    fn shape(&self) -> Shape {
        self.config.shape("nvme").with_areas(BAR, [DOORBELLS..MSIX_TABLE])
    }

    fn read(&mut self, bus: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.check_power(bus);
        if self.is_removed(bus) {
            data.fill(0xff);
            return Ok(());
        }
        if region == region_index::CONFIG {
            self.config.read(offset, data);
            return Ok(());
        }
        data.fill(0);
        let table = offset.checked_sub(MSIX_TABLE).and_then(|at| self.msix.get(at as usize..));
        if let Some(table) = table {
            data.iter_mut().zip(table).for_each(|(byte, value)| *byte = *value);
        } else if offset.is_multiple_of(4) {
            for (part, at) in data.chunks_mut(4).zip((offset..).step_by(4)) {
                part.copy_from_slice(&self.load(at).to_le_bytes()[..part.len()]);
            }
        }
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.check_power(bus);
        if self.is_removed(bus) {
            return Ok(());
        }
        if region == region_index::CONFIG {
            self.config.write(offset, data);
            return Ok(());
        }
        let table = offset.checked_sub(MSIX_TABLE).and_then(|at| self.msix.get_mut(at as usize..));
        if let Some(table) = table {
            table.iter_mut().zip(data).for_each(|(byte, value)| *byte = *value);
        } else if offset.is_multiple_of(4) && offset < DOORBELLS {
            let (words, _) = data.as_chunks::<4>();
            for (word, at) in words.iter().zip((offset..).step_by(4)) {
                self.store(bus, at, u32::from_le_bytes(*word));
            }
        }
        Ok(())
    }

    /// A function level reset: written data stays, cached or not.
    fn reset(&mut self, bus: &Bus) {
        self.disable(bus);
        self.config.reset();
        self.msix.fill(0);
        self.configuration = 0;
        (self.admin_sizes, self.admin_submissions, self.admin_completions) = (0, 0, 0);
        let Some(memory) = bus.memory(BAR) else { return };
        let doorbells = (0..2 * (QUEUES + 1))
            .map(|index| memory.register(DOORBELLS as usize + 4 * usize::from(index)));
        match doorbells.collect() {
            Ok(doorbells) => self.doorbells = doorbells,
            Err(error) => log::error!("nvme: {error}"),
        }
    }

    fn poll(&mut self, bus: &Bus) -> Activity {
        self.check_power(bus);
        if self.status & (READY | FATAL) != READY {
            return Activity::Asleep;
        }
        if !self.config.bus_mastering() {
            return Activity::Watching;
        }
        let mut left = COMMANDS_PER_POLL;
        for _ in 0..=QUEUES {
            // A fault may have stopped the controller.
            if self.status & (READY | FATAL) != READY {
                return Activity::Asleep;
            }
            let id = self.next;
            self.next = if id == QUEUES { 0 } else { id + 1 };
            match self.serve(bus, id, left) {
                Ok(served) => left -= served,
                Err(error) => self.cannot_reach(&error),
            }
        }
        let mut busy = left < COMMANDS_PER_POLL;
        match self.continue_long(bus) {
            Ok(continued) => busy |= continued,
            Err(error) => self.cannot_reach(&error),
        }
        if !busy && !self.late.is_empty() {
            match self.post_late(bus) {
                Ok(posted) => busy = posted,
                Err(error) => self.cannot_reach(&error),
            }
        }
        for vector in self.coalescing.due() {
            bus.fire(irq_index::MSIX, vector.into());
        }
        if busy { Activity::Busy } else { Activity::Watching }
    }

    fn client_left(&mut self, bus: &Bus) {
        self.drop_unreachable(bus);
    }
}
