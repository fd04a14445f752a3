//! An Intel 82576 network card, and wires to connect it to.

mod control;
mod eeprom;
mod fault;
mod filter;
mod interrupt;
mod offload;
mod packet;
mod packets;
mod pcap;
mod phy;
mod receive;
mod registers;
mod ring;
mod rss;
mod statistics;
mod transmit;
mod wire;

use std::collections::VecDeque;
use std::fmt;

use self::eeprom::Eeprom;
use self::fault::Trouble;
pub use self::fault::{Fault, Faults};
use self::interrupt::{Interrupts, VECTORS};
pub use self::packets::Packets;
pub use self::pcap::Capture;
use self::phy::Phy;
use self::receive::Arrival;
use self::registers::{RCTL, RCTL_ENABLE, Registers, TCTL, TCTL_ENABLE};
use self::ring::{PAGE, QUEUES, RECEIVE, Ring, TRANSMIT};
use self::statistics::Statistics;
use self::transmit::Transmitter;
use self::wire::Unplugged;
pub use self::wire::{Port, Respond, Wire};
use super::bus::Bus;
use super::model::{Activity, Model, Shape};
use super::pci::PciConfig;
use crate::error::Result;
use crate::transport::region_index::CONFIG;

const BAR: u32 = 0;
const BAR_SIZE: u64 = 0x2_0000;
/// Indirect access to registers, by an address and a data register.
const IO: u32 = 2;
const IO_SIZE: u32 = 32;
const TABLE: u32 = 3;
const TABLE_SIZE: u64 = 0x4000;
const PENDING: u32 = 0x2000;
const CONFIG_SIZE: usize = 4096;

const VENDOR: u16 = 0x8086;
const DEVICE: u16 = 0x10c9;
const ETHERNET: u32 = 0x02_0000;

/// How many bytes each direction handles in a turn, and how many bytes a descriptor or a frame counts beyond its
/// own. Registers can be accessed between turns.
const TURN: usize = 128 << 10;
const OVERHEAD: usize = 256;

/// One port of an Intel 82576 (igb): a gigabit network card with 16 receive and 16 transmit queues.
///
/// Registers and descriptors are as in the datasheet: legacy and advanced descriptors, checksum insertion, TCP
/// and UDP segmentation, VLAN insertion, stripping and filtering, filters by address and hash, RSS, checksum
/// status, frames of up to 9,728 bytes, statistics, ten MSI-X vectors with moderation, MSI, INTA#, a PHY with
/// MDIC, an EEPROM with EERD. Not implemented: header split, virtual functions and pools, flow control,
/// wake-up, time stamps, five-tuple filters, SCTP checksums, IPsec.
///
/// # Mapped and trapped registers
/// Two pages of BAR 0 are mapped: 0xc000 with the registers of all receive queues, and 0xe000 with those of all
/// transmit queues. The card polls them, so that a driver updates a tail with one store. All other registers
/// are trapped, also the aliases of the first four queues at 0x2800 and 0x3800.
///
/// The queue-enable bits of the mapped pages read back at once, before the card has seen them. Any access to a
/// trapped register, such as a read of STATUS, waits until the card has finished its turn; after that, the card
/// does not use a queue that was disabled before. So a driver disables a queue, reads STATUS, and then reuses
/// the memory. An access to the trapped aliases has the same effect.
///
/// If a frame finds no descriptors, it waits, and later frames wait behind it; with SRRCTL.DROP_EN it is
/// dropped. MPC counts frames that are dropped and frames for which the wire had no room. RQDPC is always 0,
/// because it is in a mapped page and could not be cleared by a read.
///
/// ```
/// use vfio_remap::emulated::Emulated;
/// use vfio_remap::emulated::igb::{Igb, Port};
/// use vfio_remap::Device;
///
/// let (port, network) = Port::pair();
/// let card = Emulated::new(Igb::new([2, 0, 0, 0, 0, 1]).with_wire(port))?;
/// let device = Device::new(std::sync::Arc::new(card));
/// let status = device.bar(0)?.trapped_register::<u32>(0x8)?;
/// assert_eq!(status.read()? & 2, 0, "no link before the driver asks for it");
/// device.bar(0)?.trapped_register::<u32>(0x0)?.write(0x41)?;
/// assert_eq!(status.read()? & 2, 2);
/// # drop(network);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
pub struct Igb {
    mac: [u8; 6],
    config: PciConfig,
    msix: Box<[u8]>,
    /// The register that the I/O BAR reaches.
    io_address: u32,
    registers: Registers,
    interrupts: Interrupts,
    statistics: Statistics,
    eeprom: Eeprom,
    phy: Phy,
    wire: Box<dyn Wire>,
    /// The wire has the card's thread.
    is_watched: bool,
    link: bool,
    receivers: Vec<Ring>,
    transmitters: [Transmitter; QUEUES],
    /// The transmit queue whose turn is first.
    next_queue: usize,
    /// The received frame, and its descriptor if it waits for buffers.
    frame: Vec<u8>,
    held: Option<Arrival>,
    /// The frame that is sent.
    sent: Vec<u8>,
    /// Frames that are looped back.
    looped: VecDeque<Vec<u8>>,
    trouble: Trouble,
}

impl Igb {
    /// A card with this MAC address in its EEPROM. It is not connected to anything.
    pub fn new(mac: [u8; 6]) -> Self {
        let config = PciConfig::new(CONFIG_SIZE, VENDOR, DEVICE, ETHERNET, 1)
            .subsystem(VENDOR, 0)
            .bar32(BAR as usize, BAR_SIZE as u32)
            .bar_io(IO as usize, IO_SIZE)
            .bar32(TABLE as usize, TABLE_SIZE as u32)
            .intx()
            .power_management()
            .msi()
            .msix(VECTORS as u16, (TABLE as u8, 0), (TABLE as u8, PENDING))
            .express();
        Self {
            mac,
            config,
            msix: vec![0; TABLE_SIZE as usize].into(),
            io_address: 0,
            registers: Registers::new(BAR_SIZE),
            interrupts: Interrupts::default(),
            statistics: Statistics::new(),
            eeprom: Eeprom::new(mac),
            phy: Phy::new(),
            wire: Box::new(Unplugged),
            is_watched: false,
            link: false,
            receivers: Vec::new(),
            transmitters: Default::default(),
            next_queue: 0,
            frame: Vec::new(),
            held: None,
            sent: Vec::new(),
            looped: VecDeque::new(),
            trouble: Trouble::default(),
        }
    }

    /// Connects the card to a wire.
    #[must_use]
    pub fn with_wire(mut self, wire: impl Wire + 'static) -> Self {
        self.wire = Box::new(wire);
        self.is_watched = false;
        self
    }

    /// Writes configuration space. May reset the function, as a change from D3hot to D0 does, too.
    fn configure(&mut self, bus: &Bus, offset: u64, data: &[u8]) {
        let was_awake = self.config.is_awake();
        self.config.write(offset, data);
        if self.config.take_reset() {
            self.reset(bus);
        } else if self.config.is_awake() && !was_awake {
            self.reset_registers(bus);
        }
        bus.wake();
    }

    /// Sets the thread that the wire unparks.
    fn be_watched(&mut self, bus: &Bus) {
        if !self.is_watched
            && let Some(worker) = bus.worker()
        {
            self.wire.watch(worker.clone());
            self.is_watched = true;
        }
    }

    fn count_missed(&mut self) {
        let missed = self.wire.missed();
        if missed > 0 && self.link && self.registers.has(RCTL, RCTL_ENABLE) {
            self.statistics.count_many(statistics::MISSED, missed);
            self.interrupts.causes |= interrupt::MISSED;
        }
    }
}

/// The rest of a turn, in bytes.
struct Budget(usize);

impl Budget {
    /// Counts a descriptor or a frame of `len` bytes.
    fn spend(&mut self, len: usize) {
        self.0 = self.0.saturating_sub(len + OVERHEAD);
    }

    fn is_spent(&self) -> bool {
        self.0 == 0
    }
}

impl Model for Igb {
    fn shape(&self) -> Shape {
        let pages = [RECEIVE, TRANSMIT].map(u64::from);
        let areas = pages.map(|page| page..page + u64::from(PAGE));
        self.config.shape("igb").with_areas(BAR, areas)
    }

    fn read(&mut self, bus: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if self.is_removed(bus) {
            data.fill(0xff);
            return Ok(());
        }
        data.fill(0);
        if region == CONFIG {
            self.config.read(offset, data);
            return Ok(());
        }
        if !self.config.is_awake() {
            data.fill(0xff);
            return Ok(());
        }
        match region {
            TABLE => {
                let table = self.msix.get(offset as usize..).unwrap_or(&[]);
                data.iter_mut().zip(table).for_each(|(byte, value)| *byte = *value);
            }
            BAR | IO if offset.is_multiple_of(4) => {
                for (part, at) in data.chunks_mut(4).zip((offset as u32..).step_by(4)) {
                    let value = match (region, at) {
                        (BAR, at) => self.load(bus, at),
                        (_, 0) => self.io_address,
                        (_, 4) => self.load(bus, self.io_address),
                        _ => 0,
                    };
                    part.copy_from_slice(&value.to_le_bytes()[..part.len()]);
                }
                // A read may change masks.
                self.interrupts.deliver(bus, &self.registers);
            }
            _ => {}
        }
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        if self.is_removed(bus) {
            return Ok(());
        }
        if region == CONFIG {
            self.configure(bus, offset, data);
            return Ok(());
        }
        if !self.config.is_awake() {
            return Ok(());
        }
        match region {
            TABLE if offset < u64::from(PENDING) => {
                let table = self.msix.get_mut(offset as usize..).unwrap_or(&mut []);
                table.iter_mut().zip(data).for_each(|(byte, value)| *byte = *value);
            }
            BAR | IO if offset.is_multiple_of(4) => {
                let (words, _) = data.as_chunks::<4>();
                for (word, at) in words.iter().zip((offset as u32..).step_by(4)) {
                    let value = u32::from_le_bytes(*word);
                    match (region, at) {
                        (BAR, at) => self.store(bus, at, value),
                        (_, 0) => self.io_address = value & (BAR_SIZE as u32 - 4),
                        (_, 4) => self.store(bus, self.io_address, value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A function level reset.
    fn reset(&mut self, bus: &Bus) {
        self.config.reset();
        self.msix.fill(0);
        self.io_address = 0;
        self.phy.reset();
        self.reset_registers(bus);
    }

    fn poll(&mut self, bus: &Bus) -> Activity {
        if self.is_removed(bus) {
            return Activity::Watching;
        }
        self.be_watched(bus);
        self.look_at_link(bus);
        self.count_missed();
        let may_access = self.config.bus_mastering() && !self.is_master_disabled();
        let mut busy = false;
        if may_access {
            busy |= self.transmit(bus, &mut Budget(TURN));
            busy |= self.receive(bus, &mut Budget(TURN));
        }
        let waits = self.interrupts.deliver(bus, &self.registers);
        let enabled =
            self.registers.has(RCTL, RCTL_ENABLE) || self.registers.has(TCTL, TCTL_ENABLE);
        match (busy, enabled || waits) {
            (true, _) => Activity::Busy,
            (false, true) => Activity::Watching,
            (false, false) => Activity::Asleep,
        }
    }
}

impl fmt::Debug for Igb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Igb")
            .field("mac", &self.mac)
            .field("link", &self.link)
            .field("interrupts", &self.interrupts)
            .finish_non_exhaustive()
    }
}
