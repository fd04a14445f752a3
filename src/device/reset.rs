//! Resets: of one device, and of a bus or slot.

use std::sync::Arc;

use super::revocation::RESET;
use super::{Device, Outage};
use crate::error::Result;
use crate::transport::AffectedDevice;

impl Device {
    /// Resets this device only (function level reset, PCIe 5.0 §6.6.2, or by its power state).
    ///
    /// Its windows are revoked first and restored afterwards: meanwhile loads answer all ones, stores are
    /// dropped, and no store from before reaches the device after the reset. Peer-to-peer mappings of its windows
    /// are unmapped and mapped again at the same IOVA. The answer names what could not be.
    ///
    /// Assume that memory decoding, bus mastering and the device's interrupts are off afterwards. vfio-pci
    /// restores the command register; a device model or a vfio-user server clears it. Enable both again
    /// ([`Config::set_memory_decoding`](super::Config::set_memory_decoding),
    /// [`Config::set_bus_mastering`](super::Config::set_bus_mastering)) and initialize the device as after
    /// [`open`](Self::open). DMA mappings stay.
    ///
    /// # Errors
    /// `Unsupported` if the device has no reset of its own ([`hot_reset`](Self::hot_reset) may work); the
    /// kernel's error.
    pub fn reset(&self) -> Result<Outage> {
        // The transport may restore configuration space.
        let _one = self.control_lock();
        let mut outage = self.inner.take_away(RESET);
        let result = self.inner.transport.reset();
        // A reset ends in D0 (PCIe 5.0 §5.3.1.1).
        self.bring_back_awake(RESET, &mut outage);
        result.map(|()| outage)
    }

    /// The devices that [`hot_reset`](Self::hot_reset) resets, including this one.
    ///
    /// # Errors
    /// `Unsupported` if there is no bridge above the device, or the transport has no hot reset.
    pub fn affected_by_hot_reset(&self) -> Result<Vec<AffectedDevice>> {
        self.inner.transport.affected_by_hot_reset()
    }

    /// Resets the bus or slot of the device, and every device on it. Use it for a device that has no reset of
    /// its own. What [`reset`](Self::reset) says of windows and of the state afterwards is true of this device
    /// and of `others`.
    ///
    /// `others` are the other affected devices that this process has open; the caller's drivers for them must
    /// expect the reset. An affected device that is not open must be bound to vfio-pci, and this process must
    /// have its IOMMU group open.
    ///
    /// # Errors
    /// `NotOwned` with the devices that prevent the reset, and why; nothing is reset then. `Unsupported` if
    /// there is no such reset; `InUse` if a device was being accessed; the kernel's error.
    pub fn hot_reset(&self, others: &[&Device]) -> Result<Outage> {
        let mut devices: Vec<_> = [self].into_iter().chain(others.iter().copied()).collect();
        // Locked in the same order by all, and each of them once.
        devices.sort_by_key(|device| Arc::as_ptr(&device.inner));
        devices.dedup_by_key(|device| Arc::as_ptr(&device.inner));
        let _each: Vec<_> = devices.iter().map(|device| device.control_lock()).collect();
        let mut outages = Vec::with_capacity(devices.len());
        for device in &devices {
            outages.push((device, device.inner.take_away(RESET)));
        }
        let others: Vec<_> = others.iter().map(|device| device.transport()).collect();
        let result = self.inner.transport.hot_reset(&others);
        let mut all = Outage::default();
        for (device, mut outage) in outages {
            device.bring_back_awake(RESET, &mut outage);
            all.append(outage);
        }
        result.map(|()| all)
    }
}
