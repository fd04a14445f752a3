//! A device as a guest has it, on the kernel's VFIO, with a hypervisor that is a list of memory slots.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vfio_remap::device::Interrupt;
use vfio_remap::passthrough::{Action, Apertures, GuestDevice, SlotMemory};
use vfio_remap::space::Strategy;
use vfio_remap::{Device, poll_until};

use crate::{lab, leftovers};
use vfio_remap_edu::{DEVICE_BUFFER, Direction, Edu};

const LOW: u64 = 0xc000_0000;
const HIGH: u64 = 1 << 32;

/// VET, which a reset of igb sets to the Ethertype of VLANs (Intel 82576 datasheet, §8.2.7).
const VET: u64 = 0x38;
const VET_AFTER_RESET: u32 = 0x8100;
/// Interrupts of igb (§8.8): general purpose enable, set, auto-clear, mask set.
const GPIE: u64 = 0x1514;
const EICS: u64 = 0x1520;
const EIMS: u64 = 0x1524;
const EIAC: u64 = 0x152c;

struct Monitor {
    guest: GuestDevice<u32>,
    slots: BTreeMap<u32, SlotMemory>,
    next: u32,
    strategies: Vec<Strategy>,
    resets: u32,
}

impl Monitor {
    fn new(device: Device) -> Self {
        let apertures = Apertures::new(&[LOW..0xf000_0000, HIGH..HIGH << 4], 0x1000..0x1_0000);
        let guest = GuestDevice::new(device, &apertures.unwrap()).unwrap();
        let (slots, strategies) = (BTreeMap::new(), Vec::new());
        let mut monitor = Self { guest, slots, next: 0, strategies, resets: 0 };
        let actions = monitor.guest.start();
        monitor.perform(actions);
        monitor
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let Self { guest, slots, next, .. } = self;
        for action in actions {
            match action {
                Action::RemoveSlot(span) => {
                    guest.remove_slot(span, |slot| slots.remove(slot).map(drop).ok_or(())).unwrap();
                }
                Action::Relocate(span) => {
                    let report = guest.relocate(span).unwrap();
                    self.strategies.extend(report.map(|report| report.strategy));
                }
                Action::AddSlot(span) => guest
                    .add_slot(span, |memory| {
                        *next += 1;
                        slots.insert(*next, *memory);
                        Ok::<u32, ()>(*next)
                    })
                    .unwrap(),
                Action::Reset => {
                    assert!(slots.is_empty());
                    self.resets += 1;
                    assert!(guest.reset().unwrap().is_over());
                }
                // The test reads the eventfds itself.
                _ => {}
            }
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let actions = self.guest.write_config(offset, bytes);
        self.perform(actions);
    }

    fn read_u32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.guest.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The offset of a capability, as a guest finds it.
    fn capability(&self, id: u8) -> u64 {
        let mut at = self.read_u32(0x34) & 0xff;
        while self.read_u32(at.into()) as u8 != id {
            at = self.read_u32(at.into()) >> 8 & 0xff;
            assert_ne!(at, 0, "there is no capability {id:#x}");
        }
        at.into()
    }

    fn move_bar(&mut self, bar: u64, address: u64, is_wide: bool) {
        self.write(4, &[0, 0]);
        let len = if is_wide { 8 } else { 4 };
        self.write(0x10 + 4 * bar, &address.to_le_bytes()[..len]);
        self.write(4, &[6, 0]);
    }

    /// An access that the hypervisor traps.
    fn store(&mut self, address: u64, value: u32) {
        let actions = self.guest.write_memory(address, &value.to_le_bytes());
        self.perform(actions.expect("a BAR is there"));
    }

    fn trapped(&self, address: u64) -> u32 {
        let mut bytes = [0; 4];
        assert!(self.guest.read_memory(address, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    /// What a processor of the guest loads through a slot.
    fn load(&self, address: u64) -> u32 {
        let has = |it: &&SlotMemory| (it.guest..it.guest + it.size as u64).contains(&address);
        let slot = self.slots.values().find(has).expect("a slot is there");
        let host = slot.host + (address - slot.guest) as usize;
        // SAFETY: the slot exists, so its span is mapped; the access is single and aligned.
        unsafe { std::ptr::with_exposed_provenance::<u32>(host).read_volatile() }
    }

    fn end(mut self) {
        let actions = self.guest.release();
        self.perform(actions);
        assert!(self.slots.is_empty());
        self.guest.close().unwrap();
    }
}

/// Whether an eventfd was signalled within a while. Takes the signal.
fn fires(eventfd: Option<BorrowedFd<'_>>) -> bool {
    let eventfd = eventfd.expect("it was connected");
    let mut polled = [PollFd::new(eventfd, PollFlags::POLLIN)];
    let ready = poll(&mut polled, PollTimeout::from(30_000u16)).unwrap();
    ready == 1 && nix::unistd::read(eventfd, &mut [0; 8]).is_ok()
}

#[test]
fn windows_follow_the_bars_that_a_guest_moves() {
    leftovers::none_of(|| {
        for name in ["nvme", "igb", "edu", "ivshmem64m"] {
            let mut monitor = Monitor::new(lab::open(name));
            let bar = if name == "ivshmem64m" { 2 } else { 0 };
            let is_wide = monitor.read_u32(0x10 + 4 * bar) & 4 != 0;
            let trapped =
                lab::SUBJECTS.iter().find(|it| it.name == name).map_or(0, |it| it.scratch.0);
            for turn in 0..20u64 {
                let step = (turn + 1) * (64 << 20);
                let address =
                    if turn % 2 == 1 && is_wide { HIGH + step } else { LOW + step % (512 << 20) };
                monitor.move_bar(bar, address, is_wide);
                let there = monitor.slots.values().filter(|it| it.guest >= address).count();
                assert!(there > 0 && there == monitor.slots.len(), "{name}: {:x?}", monitor.slots);
                assert_eq!(monitor.load(address), monitor.trapped(address), "{name}");
                assert_eq!(monitor.load(address + trapped), monitor.trapped(address + trapped));
            }
            let usual =
                if lab::kernel() == "patched" { Strategy::DontUnmap } else { Strategy::MapAgain };
            assert!(monitor.strategies.len() >= 38);
            assert!(monitor.strategies.iter().all(|it| *it == usual), "{:?}", monitor.strategies);
            monitor.end();
        }
    });
}

/// By its address through a type 1 container, by a dma-buf through iommufd.
#[test]
fn another_device_follows_the_bar_that_a_guest_moves() {
    leftovers::none_of(|| {
        let edu = Edu::new(lab::open("edu"), Interrupt::Msi).unwrap();
        let mut monitor = Monitor::new(lab::open("ivshmem64m"));
        monitor.guest.set_peers(vec![edu.dma().unwrap()]);
        for turn in 0..8u32 {
            let base = if turn % 2 == 0 { LOW } else { HIGH };
            let address = base + u64::from(turn + 1) * (64 << 20);
            monitor.move_bar(2, address, true);
            let value = 0x1234_0000 + turn;
            monitor.store(address + 0x1000, value);
            edu.transfer(address + 0x1000, DEVICE_BUFFER, 4, Direction::ToDevice).unwrap();
            edu.transfer(DEVICE_BUFFER, address + 0x2000, 4, Direction::ToMemory).unwrap();
            assert_eq!(monitor.load(address + 0x2000), value, "turn {turn}");
            monitor.store(address + 0x2000, 0);
        }
        monitor.guest.set_peers(Vec::new());
        edu.close().unwrap();
        monitor.end();
    });
}

#[test]
fn a_reset_by_the_guest_resets_the_device() {
    leftovers::none_of(|| {
        let mut monitor = Monitor::new(lab::open("igb"));
        monitor.move_bar(0, LOW, false);
        monitor.store(LOW + VET, 0x1234);
        assert_eq!(monitor.load(LOW + VET) & 0xffff, 0x1234);
        let express = monitor.capability(0x10);
        assert_ne!(monitor.read_u32(express + 4) & 1 << 28, 0, "it offers the reset");
        monitor.write(express + 9, &[0x80]);
        assert_eq!((monitor.resets, monitor.read_u32(0x10), monitor.read_u32(4) & 7), (1, 0, 0));
        monitor.move_bar(0, LOW + (1 << 20), false);
        assert_eq!(monitor.load(LOW + (1 << 20) + VET) & 0xffff, VET_AFTER_RESET);
        monitor.end();
    });
}

#[test]
fn vectors_that_a_guest_unmasks_fire_and_masked_ones_are_pending() {
    const TABLE: u64 = LOW + (1 << 20);
    leftovers::none_of(|| {
        let mut monitor = Monitor::new(lab::open("igb"));
        let msix = monitor.capability(0x11);
        let bar = u64::from(monitor.read_u32(msix + 4) & 7);
        let pending = TABLE + u64::from(monitor.read_u32(msix + 8) & !7);
        monitor.move_bar(0, LOW, false);
        monitor.move_bar(bar, TABLE, false);
        monitor.write(msix + 3, &[0x80]);
        // Messages of their own, auto-clear.
        for (register, value) in [(GPIE, 0xc000_0011), (EIAC, 7), (EIMS, 7)] {
            monitor.store(LOW + register, value);
        }
        let fire = |monitor: &mut Monitor, vector: u32| {
            monitor.store(LOW + EIMS, 7);
            monitor.store(LOW + EICS, 1 << vector);
        };
        for vector in 0..3u32 {
            let entry = TABLE + 16 * u64::from(vector);
            monitor.store(entry, 0xfee0_0000);
            monitor.store(entry + 8, vector);
            monitor.store(entry + 12, 0);
            for earlier in 0..=vector {
                fire(&mut monitor, earlier);
                assert!(fires(monitor.guest.eventfd(earlier)), "{earlier} of {vector}");
            }
        }
        monitor.store(TABLE + 16 + 12, 1);
        // Where vectors are added by setting all up again, each was signalled once more.
        while monitor.trapped(pending) & 2 != 0 {
            assert!(fires(monitor.guest.eventfd(1)));
        }
        fire(&mut monitor, 1);
        let bits = || monitor.trapped(pending);
        poll_until("the pending bit", Duration::from_secs(30), bits, |bits| bits & 2 != 0).unwrap();
        monitor.store(TABLE + 16 + 12, 0);
        assert!(fires(monitor.guest.eventfd(1)), "it comes when it is unmasked");
        monitor.end();
    });
}
