//! The PCI bus: a host bridge and the passed-through devices, found by configuration mechanism 1 (PCI 3.0
//! §3.2.2.3.2).

use std::sync::Arc;

use anyhow::{Result, ensure};
use vfio_remap::passthrough::Action;

use crate::device::Passed;
use crate::machine::Machine;

/// The ports: an address, and the four bytes of configuration space that it selects.
const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const DATA_LAST: u16 = 0xcff;
/// The bit of an address that selects configuration space.
const ENABLE: u32 = 1 << 31;

/// How many slots the bus has. The host bridge is in slot 0.
const SLOTS: usize = 32;
/// The identifiers, the command register and the class of the host bridge.
const HOST_BRIDGE: [u32; 3] = [0x0d57_8086, 0, 0x0600_0000];
/// Pins 16 to 23 of the IOAPIC are those of PCI.
const FIRST_PIN: u8 = 16;

/// The bus.
pub struct Pci {
    machine: Arc<Machine>,
    address: u32,
    /// The devices in slots 1 and up; `None` for one that is gone.
    devices: Vec<Option<Passed>>,
}

/// The pin of the IOAPIC for the interrupt of the device in a slot.
pub fn interrupt_line(slot: u8) -> u8 {
    FIRST_PIN + slot % 8
}

impl Pci {
    /// A bus with these devices in slots 1 and up.
    pub fn new(machine: Arc<Machine>, devices: Vec<Passed>) -> Result<Self> {
        ensure!(devices.len() < SLOTS, "a PCI bus has room for {} devices", SLOTS - 1);
        let mut pci =
            Self { machine, address: 0, devices: devices.into_iter().map(Some).collect() };
        for device in pci.devices.iter_mut().flatten() {
            let actions = device.guest.start();
            device.perform(&pci.machine, actions);
        }
        Ok(pci)
    }

    /// Releases a device. The guest sees that it is gone, and others may get its addresses.
    pub fn release(&mut self, index: usize) -> Result<()> {
        let device = self.devices.get_mut(index).and_then(Option::take);
        let released = device.map_or(Ok(()), |device| device.release(&self.machine));
        self.refresh();
        released
    }

    /// Releases all devices. Returns what failed.
    pub fn release_all(mut self) -> Vec<String> {
        let all = 0..self.devices.len();
        all.filter_map(|index| Some(format!("{:#}", self.release(index).err()?))).collect()
    }

    pub fn read_port(&mut self, port: u16, data: &mut [u8]) {
        match (port, target(self.address, port)) {
            (ADDRESS, _) if data.len() == 4 => data.copy_from_slice(&self.address.to_le_bytes()),
            (DATA..=DATA_LAST, Some((0, offset))) => read_host_bridge(offset, data),
            (DATA..=DATA_LAST, Some((slot, offset))) => {
                if let Some(Some(device)) = self.devices.get(slot - 1) {
                    device.guest.read_config(offset, data);
                }
            }
            _ => {
                let mut devices = self.devices.iter_mut().flatten();
                let _ = devices.any(|device| device.guest.read_port(port, data));
            }
        }
    }

    pub fn write_port(&mut self, port: u16, data: &[u8]) {
        match (port, target(self.address, port)) {
            (ADDRESS, _) if data.len() == 4 => {
                self.address = data.iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
            }
            (DATA..=DATA_LAST, Some((slot @ 1.., offset))) => {
                if let Some(Some(device)) = self.devices.get_mut(slot - 1) {
                    let actions = device.guest.write_config(offset, data);
                    self.perform(slot - 1, actions);
                }
            }
            _ => {
                let mut devices = self.devices.iter_mut().flatten();
                let _ = devices.any(|device| device.guest.write_port(port, data));
            }
        }
    }

    /// Reads memory. Nothing there reads all ones.
    pub fn read_memory(&mut self, address: u64, data: &mut [u8]) {
        let mut devices = self.devices.iter_mut().flatten();
        if !devices.any(|device| device.guest.read_memory(address, data)) {
            data.fill(0xff);
        }
    }

    pub fn write_memory(&mut self, address: u64, data: &[u8]) {
        for index in 0..self.devices.len() {
            let Some(device) = &mut self.devices[index] else { continue };
            if let Some(actions) = device.guest.write_memory(address, data) {
                return self.perform(index, actions);
            }
        }
    }

    /// Performs a device's actions, and then those of all devices, if addresses have become free.
    fn perform(&mut self, index: usize, actions: Vec<Action>) {
        if let Some(Some(device)) = self.devices.get_mut(index) {
            device.perform(&self.machine, actions);
        }
        // Also if there were none: a BAR without slots leaves none.
        self.refresh();
    }

    /// Gives devices the addresses that they have waited for, until none is left that can have them.
    fn refresh(&mut self) {
        let mut moved = true;
        while std::mem::take(&mut moved) {
            for device in self.devices.iter_mut().flatten() {
                let actions = device.guest.refresh();
                moved |= !actions.is_empty();
                device.perform(&self.machine, actions);
            }
        }
    }
}

/// The slot that an address selects, and the offset that it and a data port select. `None` if nothing can be there.
fn target(address: u32, port: u16) -> Option<(usize, u64)> {
    let (bus, slot, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
    let exists = address & ENABLE != 0 && bus == 0 && function == 0;
    exists.then(|| (slot as usize, u64::from(address & 0xfc) + u64::from(port % 4)))
}

fn read_host_bridge(offset: u64, data: &mut [u8]) {
    let bytes = HOST_BRIDGE.map(u32::to_le_bytes).concat();
    for (byte, offset) in data.iter_mut().zip(offset as usize..) {
        *byte = bytes.get(offset).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_selects_a_slot_and_an_offset() {
        assert_eq!(target(0x8000_0000, DATA), Some((0, 0)));
        assert_eq!(target(0x8000_0810, DATA + 2), Some((1, 0x12)));
        assert_eq!(target(0x8000_f8fc, DATA + 3), Some((31, 0xff)));
        // Another bus, another function, and an address that is not enabled.
        for address in [0x8001_0800, 0x8000_0900, 0x0000_0800] {
            assert_eq!(target(address, DATA), None, "{address:#x}");
        }
    }

    #[test]
    fn the_host_bridge_has_identifiers_and_a_class() {
        let read = |offset| {
            let mut data = [0xff; 4];
            read_host_bridge(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!((read(0), read(8) >> 16, read(0x3c)), (0x0d57_8086, 0x0600, 0));
    }
}
