//! An NVMe controller that says what it is told to say: the admin queue alone, as far as drivers need it
//! to come up. Commands in I/O queues are never answered.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vfio_remap::Result;
use vfio_remap::emulated::{Activity, Bus, Model, PciConfig, Shape};
use vfio_remap::transport::{IrqInfo, RegionInfo, irq_index, region_index};

/// Doorbells up to here.
pub const BAR: u64 = 0x2000;

/// What it says.
#[derive(Clone, Copy)]
pub struct Script {
    /// Whether its registers are mapped, as those of hardware are, rather than trapped.
    pub mapped: bool,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// CAP.
    pub capabilities: u64,
    /// VS, and CRTO.
    pub version: u32,
    pub ready_timeouts: u32,
    /// Whether it becomes ready when it is enabled, and whether it stays so when it is disabled.
    pub becomes_ready: bool,
    /// How often it is asked in vain before that.
    pub slowness: u32,
    /// What it has seen: it was disabled before it was ready.
    pub cut_short: bool,
    pub stays_ready: bool,
    pub fatal: bool,
    /// How many reads of its registers answer all ones after it was disabled.
    pub blind: u32,
    /// Its registers must not be read for so long after it was disabled; and whether they were.
    pub deaf: Duration,
    pub disturbed: bool,
    /// What it changes in its answers to Identify.
    pub controller: fn(&mut [u8]),
    pub namespace: fn(&mut [u8]),
    /// Namespaces that Identify knows.
    pub there: &'static [u32],
    /// What it changes in its list of namespaces.
    pub list: fn(&mut [u8]),
    /// A data structure of Identify (CNS) that it refuses, with this status.
    pub refused: Option<(u32, u32)>,
    /// Its answer to Set Features, number of queues.
    pub queues: u32,
    /// An admin command that it does not answer, and where the last of those wants its data.
    pub silent: Option<u8>,
    pub unanswered: u64,
    /// What it adds to identifiers of commands.
    pub id: u16,
    /// An event that it tells once.
    pub event: Option<u32>,
}

/// 64 entries, 20 seconds to become ready, the NVM command set, pages of 4 KiB; four queues.
pub const HONEST: Script = Script {
    mapped: false,
    class: 0x01_0802,
    capabilities: 63 | 1 << 16 | 40 << 24 | 1 << 37,
    version: 0x0001_0400,
    ready_timeouts: 0,
    becomes_ready: true,
    slowness: 0,
    cut_short: false,
    stays_ready: false,
    fatal: false,
    blind: 0,
    deaf: Duration::ZERO,
    disturbed: false,
    there: &[1],
    list: |_| {},
    refused: None,
    controller: |_| {},
    namespace: |_| {},
    queues: 3 << 16 | 3,
    silent: None,
    unanswered: 0,
    id: 0,
    event: None,
};

pub struct ScriptedController {
    script: Arc<Mutex<Script>>,
    config: PciConfig,
    registers: [u32; 16],
    /// How many reads are to answer all ones; and when it was disabled.
    blind: u32,
    disabled: Option<Instant>,
    /// How often its status was read since it was enabled or disabled.
    asked: u32,
    head: u32,
    tail: u32,
    phase: u32,
    /// Requests for events.
    waiting: Vec<u32>,
    /// Log pages that were read.
    logs: Arc<Mutex<Vec<u8>>>,
}

impl ScriptedController {
    pub fn new(script: &Arc<Mutex<Script>>, logs: &Arc<Mutex<Vec<u8>>>) -> Self {
        let class = script.lock().unwrap().class;
        Self {
            script: script.clone(),
            config: PciConfig::new(256, 0x1b36, 0x10, class, (class >> 16) as u8).bar64(0, BAR),
            registers: [0; 16],
            blind: 0,
            disabled: None,
            asked: 0,
            head: 0,
            tail: 0,
            phase: 1,
            waiting: Vec::new(),
            logs: logs.clone(),
        }
    }

    fn script(&self) -> Script {
        *self.script.lock().unwrap()
    }

    fn base(&self, register: usize) -> u64 {
        u64::from(self.registers[register]) | u64::from(self.registers[register + 1]) << 32
    }

    fn is_enabled(&self) -> bool {
        self.registers[5] & 1 != 0
    }

    /// CSTS.
    fn status(&mut self) -> u32 {
        let script = self.script();
        self.asked += 1;
        let ready = if self.is_enabled() { self.is_ready() } else { script.stays_ready };
        // A shutdown is over at once.
        let shut_down = if self.registers[5] >> 14 & 3 != 0 { 2 << 2 } else { 0 };
        u32::from(ready) | u32::from(script.fatal) << 1 | shut_down
    }

    fn is_ready(&self) -> bool {
        let script = self.script();
        script.becomes_ready && self.asked > script.slowness
    }

    /// A register was written.
    fn store(&mut self, bus: &Bus, register: usize, value: u32) -> Result<()> {
        let (was_enabled, was_ready) = (self.is_enabled(), self.is_ready());
        let Some(register) = self.registers.get_mut(register) else { return Ok(()) };
        *register = value;
        if was_enabled != self.is_enabled() {
            self.asked = 0;
            self.script.lock().unwrap().cut_short |= was_enabled && !was_ready;
            if was_enabled {
                (self.blind, self.disabled) = (self.script().blind, Some(Instant::now()));
            }
        }
        if !self.is_enabled() {
            (self.head, self.tail, self.phase) = (0, 0, 1);
            self.waiting.clear();
            bus.memory(0).unwrap().write(0x1000, &[0; 64])?;
        }
        Ok(())
    }

    /// Takes what was written to mapped registers, CC last, and puts CSTS there.
    fn watch(&mut self, bus: &Bus) -> Result<()> {
        let memory = bus.memory(0).unwrap();
        for register in [9, 10, 11, 12, 13, 5] {
            let value = memory.register::<u32>(4 * register)?.read();
            if value != self.registers[register] {
                self.store(bus, register, value)?;
            }
        }
        memory.register(0x1c)?.write(self.status());
        Ok(())
    }

    fn complete(&mut self, bus: &Bus, id: u32, result: u32, status: u32) -> Result<()> {
        let at = self.base(12) + 16 * u64::from(self.tail);
        let id = (id + u32::from(self.script().id)) & 0xffff;
        bus.dma_write(at, [result, 0, self.head].map(u32::to_le_bytes).as_flattened())?;
        bus.dma_write(at + 12, &(id | self.phase << 16 | status << 17).to_le_bytes())?;
        self.tail += 1;
        if self.tail > self.registers[9] >> 16 {
            (self.tail, self.phase) = (0, self.phase ^ 1);
        }
        Ok(())
    }

    fn answer(&mut self, bus: &Bus, words: [u32; 16]) -> Result<()> {
        let script = self.script();
        let (opcode, id) = (words[0] as u8, words[0] >> 16);
        let data_at = u64::from(words[6]) | u64::from(words[7]) << 32;
        if script.silent == Some(opcode) {
            self.script.lock().unwrap().unanswered = data_at;
            return Ok(());
        }
        if let Some((_, status)) =
            script.refused.filter(|(cns, _)| (6, *cns) == (opcode, words[10]))
        {
            return self.complete(bus, id, 0, status);
        }
        let mut data = vec![0; 4096];
        let mut result = 0;
        match (opcode, words[10] & 0xff) {
            (0x06, 0x00) if script.there.contains(&words[1]) => {
                data[..8].copy_from_slice(&1000u64.to_le_bytes());
                data[128 + 2] = 9;
                (script.namespace)(&mut data);
            }
            (0x06, 0x01) => {
                data[512..514].copy_from_slice(&[0x66, 0x44]);
                data[516] = 1;
                (script.controller)(&mut data);
            }
            (0x06, 0x02) => {
                let ids = script.there.iter().filter(|id| **id > words[1]);
                for (at, id) in ids.take(1024).enumerate() {
                    data[4 * at..][..4].copy_from_slice(&id.to_le_bytes());
                }
                (script.list)(&mut data);
            }
            (0x06, _) => {}
            (0x02, page) => self.logs.lock().unwrap().push(page as u8),
            (0x09, 0x07) => result = script.queues,
            (0x0c, _) => {
                self.waiting.push(id);
                return Ok(());
            }
            _ => {}
        }
        if [0x02, 0x06].contains(&opcode) {
            bus.dma_write(data_at, &data)?;
        }
        self.complete(bus, id, result, 0)
    }
}

impl Model for ScriptedController {
    fn shape(&self) -> Shape {
        let mut shape = Shape::pci("scripted", 256);
        let start = if self.script().mapped { 0 } else { 0x1000 };
        shape.regions[0] = RegionInfo::trapped(BAR).with_areas([start..BAR]);
        shape.irqs[irq_index::MSIX as usize] = IrqInfo::eventfds(0);
        shape
    }

    fn read(&mut self, _: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if region == region_index::CONFIG {
            self.config.read(offset, data);
            return Ok(());
        }
        let mut script = self.script.lock().unwrap();
        script.disturbed |= self.disabled.is_some_and(|at| at.elapsed() < script.deaf);
        drop(script);
        if self.blind > 0 {
            self.blind -= 1;
            data.fill(0xff);
            return Ok(());
        }
        let value = match offset {
            0x00 => self.script().capabilities as u32,
            0x04 => (self.script().capabilities >> 32) as u32,
            0x08 => self.script().version,
            0x68 => self.script().ready_timeouts,
            0x1c => self.status(),
            _ => self.registers.get(offset as usize / 4).copied().unwrap_or(0),
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        if region == region_index::CONFIG {
            self.config.write(offset, data);
            return Ok(());
        }
        let register = offset as usize / 4;
        if let Ok(bytes) = data.try_into() {
            self.store(bus, register, u32::from_le_bytes(bytes))?;
            bus.wake();
        }
        Ok(())
    }

    fn reset(&mut self, bus: &Bus) {
        self.registers = [0; 16];
        self.config.reset();
        if self.script().mapped {
            let Script { capabilities, version, .. } = self.script();
            let memory = bus.memory(0).unwrap();
            memory.write(0, &[0; 64]).unwrap();
            memory.write(0, &capabilities.to_le_bytes()).unwrap();
            memory.write(8, &version.to_le_bytes()).unwrap();
        }
    }

    fn poll(&mut self, bus: &Bus) -> Activity {
        if self.script().mapped {
            self.watch(bus).unwrap();
        }
        if !self.is_enabled() {
            return if self.script().mapped { Activity::Watching } else { Activity::Asleep };
        }
        let mut step = || -> Result<()> {
            while bus.memory(0).unwrap().register::<u32>(0x1000)?.read() != self.head {
                let mut command = [0; 64];
                bus.dma_read(self.base(10) + 64 * u64::from(self.head), &mut command)?;
                self.head = (self.head + 1) % ((self.registers[9] & 0xfff) + 1);
                let (words, _) = command.as_chunks::<4>();
                self.answer(bus, std::array::from_fn(|word| u32::from_le_bytes(words[word])))?;
            }
            // One that is told while no request waits is told later.
            if let Some(id) = self.waiting.pop() {
                let event = self.script.lock().unwrap().event.take();
                match event {
                    Some(event) => self.complete(bus, id, event, 0)?,
                    None => self.waiting.push(id),
                }
            }
            Ok(())
        };
        step().unwrap();
        Activity::Watching
    }
}
