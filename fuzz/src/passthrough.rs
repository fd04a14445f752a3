//! A device in the hands of a guest: the input is what the device has, and what the guest does.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock};

use vfio_remap::passthrough::{Action, Apertures, GuestDevice, SlotMemory};
use vfio_remap::transport::{DeviceInfo, IrqInfo, RegionFile, RegionInfo};
use vfio_remap::{Device, Error, ErrorKind, Result, Transport};

const CONFIG: u32 = 7;
/// Configuration space, and a byte for each BAR and the ROM.
const DESCRIPTION: usize = 256 + 7;
const LOW: std::ops::Range<u64> = 0xc000_0000..0xc100_0000;
const HIGH: std::ops::Range<u64> = 1 << 32..(1 << 32) + (16 << 20);
const PORTS: std::ops::Range<u32> = 0x1000..0x2000;
/// The largest BAR that can be mapped.
const MEMORY: u64 = 4 << 20;

/// A device whose configuration space is the first part of an input.
#[derive(Debug)]
struct Card {
    config: Mutex<[u8; 256]>,
    regions: [RegionInfo; 7],
    /// The bytes of vendor-specific capabilities: they are the guest's.
    vendor: Vec<bool>,
    connected: Mutex<BTreeMap<(u32, u32), OwnedFd>>,
    resettable: bool,
}

fn region(kind: u8) -> RegionInfo {
    // From none, by bytes less than a page, to more than can be mapped, and than a register can describe.
    let size = match kind & 31 {
        0 => 0,
        31 => u64::MAX,
        30 => 0x1_2345,
        shift => 1 << (shift + 4),
    };
    match kind >> 5 {
        0 | 1 => RegionInfo::trapped(size),
        2 if size <= MEMORY => {
            RegionInfo::trapped(size).with_areas([0x1000..0x2000, 0x4000..0x1_0000])
        }
        3 => {
            let mut info = RegionInfo::mappable(size.min(MEMORY));
            info.readable = false;
            info
        }
        _ if size <= MEMORY => RegionInfo::mappable(size),
        _ => RegionInfo::trapped(size),
    }
}

/// The bytes of vendor-specific capabilities in the list, each up to the next capability above it.
fn vendor_bytes(config: &[u8]) -> Vec<bool> {
    let (mut at, mut all) = (usize::from(config[0x34] & !3), Vec::new());
    while at >= 0x40 && all.len() < 64 {
        all.push(at);
        at = usize::from(config[at + 1] & !3);
    }
    let mut bytes = vec![false; 256];
    for at in all.iter().filter(|at| config[**at] == 9) {
        let end = all.iter().filter(|other| *other > at).min().copied().unwrap_or(256);
        let end = end.min(at + usize::from(config[at + 2]));
        bytes[(at + 3).min(end)..end].fill(true);
    }
    bytes
}

impl Card {
    fn new(description: &[u8]) -> Self {
        let mut config = [0; 256];
        config.copy_from_slice(&description[..256]);
        let regions = std::array::from_fn(|index| region(description[256 + index]));
        let vendor = vendor_bytes(&config);
        let resettable = config[0x3f] & 1 == 0;
        Self {
            config: Mutex::new(config),
            regions,
            vendor,
            connected: Mutex::default(),
            resettable,
        }
    }
}

impl Transport for Card {
    fn info(&self) -> DeviceInfo {
        let mut info = DeviceInfo::new("card", 9);
        (info.pci, info.resettable) = (true, self.resettable);
        info
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        match self.regions.get(index as usize) {
            Some(info) if info.size > 0 => Ok(info.clone()),
            None if index == CONFIG => Ok(RegionInfo::trapped(256)),
            _ => Err(Error::new(ErrorKind::NotFound, "find", "a region")),
        }
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if region == CONFIG {
            let config = self.config.lock().unwrap();
            // A capability may claim more than there is.
            let inside = (offset as usize).checked_add(data.len()).map(|end| offset as usize..end);
            match inside.and_then(|inside| config.get(inside)) {
                Some(bytes) => data.copy_from_slice(bytes),
                None => return Err(Error::new(ErrorKind::OutOfRange, "read", "the card")),
            }
        } else {
            assert!(offset + data.len() as u64 <= self.regions[region as usize].size);
            data.fill(0x5a);
        }
        Ok(())
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        if region != CONFIG {
            assert!(region < 6 && offset + data.len() as u64 <= self.regions[region as usize].size);
            return Ok(());
        }
        let at = offset as usize;
        for (index, value) in (at..).zip(data) {
            let given = match index {
                4 | 5 => data.len() == 2,
                // Errors, which are cleared by ones.
                7 => value & 6 == 0,
                _ => self.vendor[index],
            };
            assert!(given, "{value:#x} is written at {index:#x}");
        }
        self.config.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn backing(&self, _: u32) -> Result<RegionFile> {
        static FILE: OnceLock<Arc<OwnedFd>> = OnceLock::new();
        RegionFile::memory(FILE.get_or_init(|| Arc::new(crate::memory(MEMORY))).clone(), 0)
    }

    fn reset(&self) -> Result<()> {
        if self.resettable {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Unsupported, "reset", "it"))
        }
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        Ok(match index {
            0 => IrqInfo::eventfds(1).with_automasking(),
            1 => IrqInfo::eventfds(4).with_noresize(),
            2 => IrqInfo::eventfds(20),
            _ => IrqInfo::default(),
        })
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let mut connected = self.connected.lock().unwrap();
        assert!(connected.keys().all(|(other, _)| *other == index), "two kinds at once");
        if fds.is_empty() {
            connected.clear();
        }
        for (vector, fd) in (start..).zip(fds) {
            connected.remove(&(index, vector));
            if let Some(fd) = fd {
                connected.insert((index, vector), fd.as_fd().try_clone_to_owned().unwrap());
            }
        }
        Ok(())
    }

    fn unmask_irq_by(&self, _: u32, _: u32, _: Option<BorrowedFd<'_>>) -> Result<()> {
        Ok(())
    }
}

/// A hypervisor that refuses what the input says.
#[derive(Default)]
struct Hypervisor {
    slots: BTreeMap<u32, SlotMemory>,
    next: u32,
    refuses_add: bool,
    refuses_remove: bool,
    connected: Vec<u32>,
    intx: bool,
}

impl Hypervisor {
    fn perform(&mut self, guest: &mut GuestDevice<u32>, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::RemoveSlot(span) => {
                    let _ = guest.remove_slot(span, |slot| self.remove(*slot));
                }
                // The input may describe a BAR that cannot be mapped.
                Action::Relocate(span) => drop(guest.relocate(span)),
                Action::AddSlot(span) => {
                    let _ = guest.add_slot(span, |memory| self.add(memory));
                }
                Action::Connect { vector, .. } => {
                    assert!(guest.eventfd(vector).is_some() && !self.connected.contains(&vector));
                    self.connected.push(vector);
                }
                Action::Reroute { vector, .. } => assert!(self.connected.contains(&vector)),
                Action::Disconnect { vector } => {
                    assert!(self.connected.contains(&vector));
                    self.connected.retain(|other| *other != vector);
                }
                Action::ConnectIntx => assert!(!std::mem::replace(&mut self.intx, true)),
                Action::DisconnectIntx => assert!(std::mem::take(&mut self.intx)),
                Action::Reset => {
                    assert!(self.connected.is_empty() && !self.intx);
                    // A command register of ones, which the input may describe, is that of a device that is gone.
                    drop(guest.reset());
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn remove(&mut self, slot: u32) -> std::result::Result<(), ()> {
        if self.refuses_remove {
            return Err(());
        }
        self.slots.remove(&slot).map(drop).ok_or(())
    }

    fn add(&mut self, memory: &SlotMemory) -> std::result::Result<u32, ()> {
        if self.refuses_add {
            return Err(());
        }
        let SlotMemory { guest, host, size, .. } = *memory;
        let end = guest + size as u64;
        assert!(size > 0 && (guest | host as u64 | size as u64) % 4096 == 0);
        assert_eq!(guest % (1 << 30), host as u64 % (1 << 30));
        assert!([LOW, HIGH].iter().any(|range| range.start <= guest && end <= range.end));
        let overlaps = |it: &SlotMemory| it.guest < end && guest < it.guest + it.size as u64;
        assert!(!self.slots.values().any(overlaps));
        self.next += 1;
        self.slots.insert(self.next, *memory);
        Ok(self.next)
    }
}

/// Runs one input.
pub fn drive(input: &[u8]) {
    let Some((description, steps)) = input.split_at_checked(DESCRIPTION) else { return };
    let apertures = Apertures::new(&[LOW, HIGH], PORTS).expect("apertures");
    let card = Arc::new(Card::new(description));
    let device = Device::new(card.clone());
    let Ok(mut guest) = GuestDevice::<u32>::new(device, &apertures) else { return };
    let mut hypervisor = Hypervisor::default();
    let actions = guest.start();
    hypervisor.perform(&mut guest, actions);
    let mut fixed = [0; 4];
    guest.read_config(0, &mut fixed);
    for step in steps.chunks_exact(8) {
        let &[kind, len, low, high, a, b, c, d] = step else { continue };
        let value = [a, b, c, d];
        let at = u16::from_le_bytes([low, high]);
        let data = value.repeat(2);
        let data = &data[..usize::from(len % 9)];
        let address = match len >> 6 {
            0 => u64::from(u32::from_le_bytes(value)),
            1 => LOW.start + u64::from(at) * 64,
            2 => HIGH.start + u64::from(at) * 64,
            _ => LOW.start + u64::from(at),
        };
        let actions = match kind % 16 {
            0..=5 => guest.write_config((at % 0x104).into(), data),
            6 => {
                guest.read_config(at.into(), &mut [0; 8][..data.len()]);
                Vec::new()
            }
            7 | 8 => guest.write_memory(address, data).unwrap_or_default(),
            9 => {
                guest.read_memory(address, &mut [0; 8][..data.len()]);
                Vec::new()
            }
            10 => {
                guest.write_port(at, data);
                guest.read_port(at, &mut [0; 8][..data.len()]);
                Vec::new()
            }
            11 => guest.refresh(),
            12 => guest.restart(),
            13 if len < 4 => guest.release(),
            14 => {
                (hypervisor.refuses_add, hypervisor.refuses_remove) = (len & 1 != 0, len & 2 != 0);
                Vec::new()
            }
            _ => continue,
        };
        hypervisor.perform(&mut guest, actions);
    }
    hypervisor.refuses_remove = false;
    let actions = guest.release();
    hypervisor.perform(&mut guest, actions);
    assert!(hypervisor.slots.is_empty() && hypervisor.connected.is_empty() && !hypervisor.intx);
    assert!(card.connected.lock().unwrap().is_empty(), "the kernel still signals");
    drop(card);
    guest.close().expect("nothing holds the device");
    let free = |(_, host): &(_, std::ops::Range<usize>)| host.len() > 0;
    assert!(apertures.memory().iter().all(free));
}

/// Devices with all kinds of capabilities, and guests that do what guests do.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut device = vec![0; DESCRIPTION];
    let mut set = |at: usize, bytes: &[u8]| device[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x00, &[0x36, 0x1b, 0x10, 0, 0, 0, 0x10, 0, 2, 2, 8, 1]);
    set(0x10, &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    set(0x34, &[0x40]);
    set(0x3d, &[1]);
    set(0x40, &[0x01, 0x50, 3, 0]);
    set(0x50, &[0x05, 0x70, 0x84, 1]);
    set(0x70, &[0x11, 0x80, 9, 0, 0, 0x20, 0, 0, 0, 0x30]);
    set(0x80, &[0x10, 0xc0, 2, 0, 0xff, 0xff, 0xff, 0xff]);
    set(0xc0, &[0x09, 0xd8, 0x14]);
    set(0xd8, &[0x13, 0, 6, 3]);
    // 64 KiB that can be mapped, 64 KiB in parts, ports.
    set(256, &[0x8c, 0, 0x4c, 1, 0, 0, 7]);
    let write = |at: u16, bytes: [u8; 4]| {
        let [low, high] = at.to_le_bytes();
        [&[0, 4, low, high][..], &bytes].concat()
    };
    let memory = |at: u16, bytes: [u8; 4]| {
        let [low, high] = at.to_le_bytes();
        [&[7, 0xc0 | 2, low, high][..], &bytes].concat()
    };
    let place = [
        write(0x10, [0, 0, 0, 0xc0]),
        write(0x14, [0; 4]),
        write(0x18, [0, 0, 1, 0xc0]),
        write(0x1c, [0, 0x10, 0, 0]),
        write(4, [7, 0, 0, 0]),
    ]
    .concat();
    let msix =
        [write(0x70, [0, 0, 9, 0x80]), memory(0x200c, [0; 4]), memory(0x2000, [0, 0, 0xe0, 0xfe])];
    let msi = [write(0x54, [0, 0, 0xe0, 0xfe]), write(0x50, [0, 0, 0x25, 0])];
    let reset = [write(0x88, [0, 0x80, 0, 0])];
    let sleep = [write(0x44, [3, 0, 0, 0]), write(0x44, [0; 4])];
    let lists = [
        ("msix", msix.concat()),
        ("msi", msi.concat()),
        ("reset", reset.concat()),
        ("sleep", sleep.concat()),
    ];
    let seed = |rest: &[u8]| [&device[..], &place, rest].concat();
    lists.iter().map(|(name, rest)| ((*name).to_owned(), seed(rest))).collect()
}
