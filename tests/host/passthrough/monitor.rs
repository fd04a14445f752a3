//! A monitor whose hypervisor is a list of memory slots and of connected interrupts.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vfio_remap::passthrough::{Action, Apertures, GuestDevice, Message, SlotMemory, SpanId};
use vfio_remap::space::Strategy;
use vfio_remap::{Device, Error, ErrorKind, Transport};

pub const LOW: Range<u64> = 0xc000_0000..0xf000_0000;
pub const HIGH: Range<u64> = 1 << 32..1 << 36;
pub const PORTS: Range<u32> = 0x1000..0x1_0000;

pub fn apertures() -> Apertures {
    Apertures::new(&[LOW, HIGH], PORTS).unwrap()
}

pub struct Monitor {
    pub guest: GuestDevice<u32>,
    /// By their number: what the hypervisor maps.
    pub slots: BTreeMap<u32, SlotMemory>,
    pub connected: BTreeMap<u32, Message>,
    pub intx: bool,
    /// What was done, in order.
    pub done: Vec<Action>,
    /// The strategies that relocated windows.
    pub strategies: Vec<Strategy>,
    /// The next calls that the hypervisor refuses.
    pub refuses_add: bool,
    pub refuses_remove: bool,
    /// Windows that could not be moved.
    pub failed: Vec<(SpanId, ErrorKind)>,
    next: u32,
}

pub fn refused() -> Error {
    Error::new(ErrorKind::Refused, "change", "a memory slot")
}

impl Monitor {
    pub fn new(transport: Arc<dyn Transport>, apertures: &Apertures) -> Self {
        let guest = GuestDevice::new(Device::new(transport), apertures).unwrap();
        let mut monitor = Self {
            guest,
            slots: BTreeMap::new(),
            connected: BTreeMap::new(),
            intx: false,
            done: Vec::new(),
            strategies: Vec::new(),
            refuses_add: false,
            refuses_remove: false,
            failed: Vec::new(),
            next: 0,
        };
        let actions = monitor.guest.start();
        monitor.perform(actions);
        monitor
    }

    /// Performs actions, and those that follow from them.
    pub fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.done.push(action);
            match action {
                Action::RemoveSlot(span) => drop(self.remove_slot(span)),
                Action::Relocate(span) => match self.guest.relocate(span) {
                    Ok(report) => self.strategies.extend(report.map(|report| report.strategy)),
                    Err(error) => self.failed.push((span, error.kind())),
                },
                Action::AddSlot(span) => drop(self.add_slot(span)),
                Action::Connect { vector, message } => {
                    assert!(self.guest.eventfd(vector).is_some());
                    assert_eq!(self.connected.insert(vector, message), None);
                }
                Action::Reroute { vector, message } => {
                    assert!(self.connected.insert(vector, message).is_some_and(|it| it != message));
                }
                Action::Disconnect { vector } => {
                    assert!(self.connected.remove(&vector).is_some());
                }
                Action::ConnectIntx => assert!(!std::mem::replace(&mut self.intx, true)),
                Action::DisconnectIntx => assert!(std::mem::take(&mut self.intx)),
                Action::Reset => {
                    assert!(self.slots.is_empty() && self.connected.is_empty());
                    assert!(self.guest.reset().unwrap().is_over());
                }
                other => panic!("{other:?}"),
            }
        }
        let more = self.guest.refresh();
        if !more.is_empty() {
            self.perform(more);
        }
    }

    fn remove_slot(&mut self, span: SpanId) -> Result<(), Error> {
        let Self { guest, slots, refuses_remove, .. } = self;
        guest.remove_slot(span, |slot| {
            if *refuses_remove {
                return Err(refused());
            }
            slots.remove(slot).map(drop).ok_or_else(refused)
        })
    }

    fn add_slot(&mut self, span: SpanId) -> Result<(), Error> {
        let Self { guest, slots, next, refuses_add, .. } = self;
        guest.add_slot(span, |memory| {
            if *refuses_add {
                return Err(refused());
            }
            check(slots, memory);
            *next += 1;
            slots.insert(*next, *memory);
            Ok(*next)
        })
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let actions = self.guest.write_config(offset, data);
        self.perform(actions);
    }

    pub fn write_u32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    pub fn read_u32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.guest.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Sets the command register.
    pub fn command(&mut self, value: u16) {
        self.write(4, &value.to_le_bytes());
    }

    /// Moves a BAR as an operating system does: with decoding off.
    pub fn move_bar(&mut self, index: u64, address: u64, is_wide: bool) {
        self.command(0);
        self.set_bar(index, address, is_wide);
        self.command(7);
    }

    pub fn set_bar(&mut self, index: u64, address: u64, is_wide: bool) {
        self.write_u32(0x10 + 4 * index, address as u32);
        if is_wide {
            self.write_u32(0x14 + 4 * index, (address >> 32) as u32);
        }
    }

    pub fn write_memory(&mut self, address: u64, data: &[u8]) {
        let actions = self.guest.write_memory(address, data).expect("a BAR is there");
        self.perform(actions);
    }

    pub fn read_memory(&self, address: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        self.guest.read_memory(address, &mut bytes).then(|| u32::from_le_bytes(bytes))
    }

    /// Where the slots are: guest-physical address and size.
    pub fn mapped(&self) -> Vec<(u64, usize)> {
        let mut mapped: Vec<_> = self.slots.values().map(|it| (it.guest, it.size)).collect();
        mapped.sort_unstable();
        mapped
    }

    /// As [`load`], through the slots that there are.
    pub fn load(&self, address: u64) -> Option<u32> {
        load(&self.slots, address)
    }
}

/// What a processor of the guest loads from an address, through the slot that is there.
pub fn load(slots: &BTreeMap<u32, SlotMemory>, address: u64) -> Option<u32> {
    let covers =
        |slot: &&SlotMemory| (slot.guest..slot.guest + slot.size as u64).contains(&address);
    let slot = slots.values().find(covers)?;
    let mut bytes = [0; 4];
    let at = slot.host as u64 + (address - slot.guest);
    File::open("/proc/self/mem").unwrap().read_exact_at(&mut bytes, at).unwrap();
    Some(u32::from_le_bytes(bytes))
}

/// What a hypervisor demands of a slot, and what the apertures promise.
fn check(slots: &BTreeMap<u32, SlotMemory>, memory: &SlotMemory) {
    let SlotMemory { guest, host, size, .. } = *memory;
    let end = guest + size as u64;
    assert!(size > 0 && size % 4096 == 0 && guest % 4096 == 0 && host % 4096 == 0, "{memory:x?}");
    assert_eq!(guest % (1 << 30), host as u64 % (1 << 30), "{memory:x?} is not congruent");
    let inside = |range: &Range<u64>| range.start <= guest && end <= range.end;
    assert!([LOW, HIGH].iter().any(inside), "{memory:x?} is outside of the apertures");
    for other in slots.values() {
        let apart = other.guest + other.size as u64 <= guest || end <= other.guest;
        assert!(apart, "{memory:x?} overlaps {other:x?}");
    }
}
