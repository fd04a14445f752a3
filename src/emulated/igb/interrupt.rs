//! Interrupts: causes, masks, vectors and moderation (82576 datasheet §7.3).

use std::time::{Duration, Instant};

use super::registers::{EITR, IVAR, IVAR_MISC, Registers};
use crate::emulated::Bus;
use crate::transport::irq_index;

/// The vectors in the MSI-X table, and the causes in registers.
pub(super) const VECTORS: u32 = 10;
const CAUSES: usize = 25;

/// Bits of ICR: transmit descriptor written back, link change, frame missed, receive descriptor written back,
/// MDIC done.
pub(super) const SENT: u32 = 1;
pub(super) const LINK_CHANGE: u32 = 1 << 2;
pub(super) const MISSED: u32 = 1 << 6;
pub(super) const RECEIVED: u32 = 1 << 7;
pub(super) const PHY_ACCESS: u32 = 1 << 9;
const ASSERTED: u32 = 1 << 31;
/// The causes that IMS can enable.
const MASKABLE: u32 = 0x77d4_fbfd;

const GPIE_CLEAR_ON_READ: u32 = 1;
const GPIE_VECTORS: u32 = 1 << 4;
const GPIE_AUTO_MASK: u32 = 1 << 30;
const VALID: u32 = 0x80;
/// The bits of EICR with a vector for each, and with one vector for all.
const EXTENDED: u32 = 0x01ff_ffff;
const EXTENDED_SINGLE: u32 = 0xc000_ffff;

#[derive(Debug, Default)]
pub(super) struct Interrupts {
    pub(super) causes: u32,
    pub(super) mask: u32,
    pub(super) auto_mask: u32,
    pub(super) extended: u32,
    pub(super) extended_mask: u32,
    pub(super) auto_clear: u32,
    pub(super) extended_auto_mask: u32,
    pub(super) general: u32,
    /// Extended causes whose interrupt was sent, and causes that were passed on to an extended one.
    delivered: u32,
    passed_on: u32,
    /// With one vector: the interrupt is asserted.
    asserted: bool,
    /// The time before which each vector does not fire again.
    quiet_until: [Option<Instant>; CAUSES],
    /// How many interrupts are not sent, because of faults.
    pub(super) lost: u32,
    /// How many have been sent.
    pub(super) count: u32,
}

impl Interrupts {
    pub(super) fn reset(&mut self, bus: &Bus) {
        *self = Self::default();
        bus.set_level(irq_index::INTX, false);
    }

    fn has_vectors(&self) -> bool {
        self.general & GPIE_VECTORS != 0
    }

    fn extended_bits(&self) -> u32 {
        if self.has_vectors() { EXTENDED } else { EXTENDED_SINGLE }
    }

    /// A queue has written descriptors back.
    pub(super) fn raise_queue(&mut self, registers: &Registers, queue: usize, transmit: bool) {
        let register = registers.get(IVAR + 4 * (queue as u32 & 7));
        let shift = if queue >= 8 { 16 } else { 0 } + if transmit { 8 } else { 0 };
        let entry = register >> shift;
        if entry & VALID != 0 {
            self.extended |= 1 << (entry & 0x1f) & self.extended_bits();
        }
        self.causes |= if transmit { SENT } else { RECEIVED };
    }

    /// Reads ICR. The causes are cleared in the cases of §7.3.2.1.2 of the datasheet.
    pub(super) fn read_causes(&mut self) -> u32 {
        let asserted = self.causes & self.mask != 0;
        let value = self.causes | if asserted { ASSERTED } else { 0 };
        let always = self.general & GPIE_CLEAR_ON_READ != 0;
        if always || self.mask == 0 || asserted {
            self.causes = 0;
        }
        if always || asserted {
            self.mask &= !self.auto_mask;
        }
        value
    }

    pub(super) fn clear_causes(&mut self, causes: u32) {
        let asserted = self.causes & self.mask != 0;
        if self.general & GPIE_CLEAR_ON_READ != 0 || asserted {
            self.mask &= !self.auto_mask;
        }
        self.causes &= !causes;
    }

    pub(super) fn set_mask(&mut self, causes: u32) {
        self.mask |= causes & MASKABLE;
    }

    /// Reads and clears EICR.
    pub(super) fn read_extended(&mut self) -> u32 {
        let value = self.extended;
        self.clear_extended(!0);
        value
    }

    pub(super) fn clear_extended(&mut self, causes: u32) {
        self.extended &= !causes;
        if self.general & GPIE_AUTO_MASK == 0 || !self.has_vectors() {
            self.extended_mask &= !self.extended_auto_mask;
        }
    }

    pub(super) fn set_extended(&mut self, causes: u32) {
        self.extended |= causes & self.extended_bits();
    }

    pub(super) fn set_extended_mask(&mut self, causes: u32) {
        self.extended_mask |= causes & self.extended_bits();
    }

    /// Sends interrupts that are due. Returns whether EITR delays one.
    pub(super) fn deliver(&mut self, bus: &Bus, registers: &Registers) -> bool {
        if self.has_vectors() { self.vectors(bus, registers) } else { self.single(bus, registers) }
    }

    /// With one vector for each extended cause. The other causes share an extended cause.
    fn vectors(&mut self, bus: &Bus, registers: &Registers) -> bool {
        let others = self.causes & self.mask;
        let entry = registers.get(IVAR_MISC) >> 8;
        if others & !self.passed_on != 0 && entry & VALID != 0 {
            self.extended |= 1 << (entry & 0x1f) & EXTENDED;
        }
        self.passed_on = others;
        self.delivered &= self.extended & self.extended_mask;
        let due = self.extended & self.extended_mask & !self.delivered;
        let mut waits = false;
        for vector in (0..CAUSES as u32).filter(|vector| due & 1 << vector != 0) {
            let bit = 1 << vector;
            if !self.may_fire(registers, vector) {
                waits = true;
                continue;
            }
            if vector < VECTORS {
                self.send(|| bus.fire(irq_index::MSIX, vector));
            }
            self.extended &= !(self.auto_clear & bit);
            if self.general & GPIE_AUTO_MASK != 0 {
                self.extended_mask &= !(self.extended_auto_mask & bit);
            }
            self.delivered |= bit & self.extended & self.extended_mask;
        }
        waits
    }

    /// With one vector for all causes: the first of MSI-X or MSI, or INTA#.
    fn single(&mut self, bus: &Bus, registers: &Registers) -> bool {
        let wanted = self.causes & self.mask != 0 || self.extended & self.extended_mask != 0;
        if wanted == self.asserted {
            return false;
        }
        if !wanted {
            self.asserted = false;
            bus.set_level(irq_index::INTX, false);
            return false;
        }
        if !self.may_fire(registers, 0) {
            return true;
        }
        self.asserted = true;
        self.send(|| {
            if bus.is_connected(irq_index::MSIX) {
                bus.fire(irq_index::MSIX, 0);
            } else if bus.is_connected(irq_index::MSI) {
                bus.fire(irq_index::MSI, 0);
            } else {
                bus.set_level(irq_index::INTX, true);
            }
        });
        false
    }

    fn send(&mut self, fire: impl FnOnce()) {
        if self.lost > 0 {
            self.lost -= 1;
        } else {
            self.count = self.count.saturating_add(1);
            fire();
        }
    }

    /// Whether the vector may fire now. If so, its interval starts again (EITR, in microseconds).
    fn may_fire(&mut self, registers: &Registers, vector: u32) -> bool {
        let micros = registers.get(EITR + 4 * vector) >> 2 & 0x1fff;
        let Some(until) = self.quiet_until.get_mut(vector as usize) else { return true };
        if micros == 0 {
            *until = None;
            return true;
        }
        let now = Instant::now();
        if until.is_some_and(|until| now < until) {
            return false;
        }
        *until = now.checked_add(Duration::from_micros(micros.into()));
        true
    }
}
