//! Registers with side effects (82576 datasheet §8).

use super::interrupt::{LINK_CHANGE, PHY_ACCESS};
use super::registers::{
    ADDRESS_VALID, CTRL, CTRL_ALIAS, CTRL_MASTER_DISABLE, CTRL_PHY_RESET, CTRL_RESET,
    CTRL_SET_LINK_UP, EECD, EERD, EITR, IVAR, MDIC, RAH, RAL, RCTL, RCTL_ENABLE, RCTL_LOOPBACK,
    STATUS, STATUS_FULL_DUPLEX, STATUS_LINK_UP, STATUS_MASTER, STATUS_PHY_RESET, STATUS_SPEED_100,
    STATUS_SPEED_1000, SWSM, TCTL,
};
use super::ring::{self, PAGE, QUEUES, RECEIVE, Ring, TRANSMIT};
use super::{BAR, Igb, phy, statistics};
use crate::emulated::{Bus, Memory};
use crate::error::Result;

/// The interrupt registers have two addresses each.
const ICR: [u32; 2] = [0x00c0, 0x1500];
const ICS: [u32; 2] = [0x00c8, 0x1504];
const IMS: [u32; 2] = [0x00d0, 0x1508];
const IMC: [u32; 2] = [0x00d8, 0x150c];
const IAM: [u32; 2] = [0x00e0, 0x1510];
const GPIE: u32 = 0x1514;
const EICS: u32 = 0x1520;
const EIMS: u32 = 0x1524;
const EIMC: u32 = 0x1528;
const EIAC: u32 = 0x152c;
const EIAM: u32 = 0x1530;
const EICR: u32 = 0x1580;
/// A bit of EITR that always reads 0.
const EITR_KEEP: u32 = 1 << 31;
/// SWSM: the semaphore between programs, and the one between them and firmware, of which there is none.
const SEMAPHORE: u32 = 1;
const FIRMWARE_SEMAPHORE: u32 = 1 << 1;

/// RXDCTL and SRRCTL after a reset.
const RECEIVE_CONTROL: u32 = 1 << 16;
const SPLIT: u32 = 0x400;

impl Igb {
    /// Reads a register that is trapped.
    pub(super) fn load(&mut self, bus: &Bus, offset: u32) -> u32 {
        if let Some(mapped) = ring::mapped(offset) {
            return mapped_register(bus, mapped, |register| register.read()).unwrap_or(0);
        }
        match offset {
            CTRL_ALIAS => self.registers.get(CTRL),
            STATUS => self.status(bus),
            EECD => self.eeprom.control(),
            EERD => self.eeprom.word(),
            MDIC => self.phy.mdic(),
            _ if ICR.contains(&offset) => self.interrupts.read_causes(),
            _ if ICS.contains(&offset) => self.interrupts.causes,
            _ if IMS.contains(&offset) => self.interrupts.mask,
            _ if IAM.contains(&offset) => self.interrupts.auto_mask,
            GPIE => self.interrupts.general,
            EICS => 0,
            EIMS => self.interrupts.extended_mask,
            EIAC => self.interrupts.auto_clear,
            EIAM => self.interrupts.extended_auto_mask,
            EICR => self.interrupts.read_extended(),
            EITR..IVAR => self.registers.get(offset) & !EITR_KEEP,
            statistics::START..statistics::END => self.count_read(offset),
            SWSM => {
                let value = self.registers.get(SWSM);
                self.registers.set(SWSM, value | SEMAPHORE);
                value
            }
            _ => self.registers.get(offset),
        }
    }

    fn count_read(&mut self, offset: u32) -> u32 {
        if offset == statistics::INTERRUPTS {
            return std::mem::take(&mut self.interrupts.count);
        }
        self.statistics.read(offset)
    }

    /// Writes a register that is trapped.
    pub(super) fn store(&mut self, bus: &Bus, offset: u32, value: u32) {
        if let Some(mapped) = ring::mapped(offset) {
            mapped_register(bus, mapped, |register| register.write(value));
            return bus.wake();
        }
        match offset {
            CTRL | CTRL_ALIAS => self.set_control(bus, value),
            EECD => self.eeprom.set_control(value),
            EERD => self.eeprom.start(value),
            MDIC => self.access_phy(bus, value),
            _ if ICR.contains(&offset) => self.interrupts.clear_causes(value),
            _ if ICS.contains(&offset) => self.interrupts.causes |= value & !(1 << 31),
            _ if IMS.contains(&offset) => self.interrupts.set_mask(value),
            _ if IMC.contains(&offset) => self.interrupts.mask &= !value,
            _ if IAM.contains(&offset) => self.interrupts.auto_mask = value,
            GPIE => self.interrupts.general = value,
            EICS => self.interrupts.set_extended(value),
            EIMS => self.interrupts.set_extended_mask(value),
            EIMC => self.interrupts.extended_mask &= !value,
            EIAC => self.interrupts.auto_clear = value,
            EIAM => self.interrupts.extended_auto_mask = value,
            EICR => self.interrupts.clear_extended(value),
            SWSM => self.registers.set(SWSM, value & (SEMAPHORE | FIRMWARE_SEMAPHORE)),
            RCTL => {
                if value & RCTL_ENABLE != 0 && !self.registers.has(RCTL, RCTL_ENABLE) {
                    self.lose_frames();
                }
                self.registers.write(RCTL, value);
                bus.wake();
            }
            TCTL => {
                self.registers.write(TCTL, value);
                bus.wake();
            }
            _ => self.registers.write(offset, value),
        }
        // The device's thread sends what EITR delays.
        if self.interrupts.deliver(bus, &self.registers) {
            bus.wake();
        }
    }

    fn status(&mut self, bus: &Bus) -> u32 {
        self.look_at_link(bus);
        let speed = if self.phy.is_gigabit() { STATUS_SPEED_1000 } else { STATUS_SPEED_100 };
        let link = if self.link { STATUS_LINK_UP } else { 0 };
        let master = if self.is_master_disabled() { 0 } else { STATUS_MASTER };
        STATUS_FULL_DUPLEX | speed | link | master | self.registers.get(STATUS) & STATUS_PHY_RESET
    }

    /// Whether the driver has disabled transactions of the device (CTRL.GIO Master Disable).
    pub(super) fn is_master_disabled(&self) -> bool {
        self.registers.has(CTRL, CTRL_MASTER_DISABLE)
    }

    /// Whether frames are looped back, in the MAC or in the PHY.
    pub(super) fn is_looped(&self) -> bool {
        self.registers.has(RCTL, RCTL_LOOPBACK) || self.phy.is_looped()
    }

    fn set_control(&mut self, bus: &Bus, value: u32) {
        if value & CTRL_RESET != 0 {
            return self.reset_registers(bus);
        }
        self.registers.set(CTRL, value & !CTRL_PHY_RESET);
        if value & CTRL_PHY_RESET != 0 {
            self.phy.reset();
            let status = self.registers.get(STATUS);
            self.registers.set(STATUS, status | STATUS_PHY_RESET);
            self.interrupt_link();
        }
        self.look_at_link(bus);
    }

    fn access_phy(&mut self, bus: &Bus, value: u32) {
        let carrier = self.has_carrier();
        self.phy.set_carrier(carrier);
        let interrupted = self.phy.access(value);
        if value & phy::INTERRUPT != 0 {
            self.interrupts.causes |= PHY_ACCESS;
        }
        if interrupted {
            self.interrupt_link();
        }
        self.look_at_link(bus);
    }

    /// Takes the link down. It may come back at once.
    fn interrupt_link(&mut self) {
        if std::mem::take(&mut self.link) {
            self.interrupts.causes |= LINK_CHANGE;
        }
    }

    fn has_carrier(&mut self) -> bool {
        self.wire.is_up() && !self.trouble.is_down()
    }

    /// Updates the state of the link, with an interrupt if it has changed.
    pub(super) fn look_at_link(&mut self, bus: &Bus) {
        let carrier = self.has_carrier();
        self.phy.set_carrier(carrier);
        let link = self.phy.is_up() && self.registers.has(CTRL, CTRL_SET_LINK_UP);
        if self.link != link {
            self.link = link;
            self.interrupts.causes |= LINK_CHANGE;
            self.interrupts.deliver(bus, &self.registers);
            bus.wake();
        }
    }

    /// The reset by CTRL.RST: of all but configuration space, the PHY and the MSI-X table.
    pub(super) fn reset_registers(&mut self, bus: &Bus) {
        self.registers.reset();
        self.registers
            .set(RAL, u32::from_le_bytes([self.mac[0], self.mac[1], self.mac[2], self.mac[3]]));
        let high = u16::from_le_bytes([self.mac[4], self.mac[5]]);
        self.registers.set(RAH, u32::from(high) | ADDRESS_VALID);
        self.interrupts.reset(bus);
        self.statistics.reset();
        self.eeprom.reset();
        self.link = false;
        self.held = None;
        self.looped.clear();
        let Some(memory) = bus.memory(BAR) else { return };
        if let Err(error) = self.reset_rings(memory) {
            log::error!("igb: {error}");
        }
    }

    fn reset_rings(&mut self, memory: &Memory) -> Result<()> {
        for page in [RECEIVE, TRANSMIT] {
            memory.write(page.into(), &[0; PAGE as usize])?;
        }
        if self.receivers.is_empty() {
            let rings = (0..QUEUES).map(|queue| Ring::new(memory, RECEIVE, queue));
            self.receivers = rings.collect::<Result<_>>()?;
            for (queue, transmitter) in self.transmitters.iter_mut().enumerate() {
                transmitter.ring = Some(Ring::new(memory, TRANSMIT, queue)?);
            }
        }
        for (queue, ring) in self.receivers.iter().enumerate() {
            ring.reset(RECEIVE_CONTROL, SPLIT, queue == 0);
        }
        for (queue, transmitter) in self.transmitters.iter_mut().enumerate() {
            transmitter.reset();
            if let Some(ring) = &transmitter.ring {
                ring.reset(0, 0, queue == 0);
            }
        }
        Ok(())
    }
}

/// Accesses a register of a mapped page.
fn mapped_register<R>(
    bus: &Bus,
    offset: u32,
    access: impl FnOnce(crate::device::Register<u32>) -> R,
) -> Option<R> {
    let register = bus.memory(BAR)?.register(offset as usize).ok()?;
    Some(access(register))
}
