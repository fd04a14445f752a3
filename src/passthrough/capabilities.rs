//! Which capabilities of a device the guest sees, and what it may do with them.
//!
//! The guest is given what drives this function. It is not given what acts on the slot, the link, the bridge above or
//! the host's interrupts, and nothing that outlives the guest. What is not in a table is hidden: its bytes read as zero
//! and cannot be written. Offsets are the device's own, because some drivers know them by heart.
//!
//! | capability | for the guest | why |
//! |---|---|---|
//! | power management (01) | D0 and D3hot; no PME, no D1, D2 | The state is virtual: in D3hot the BARs do not respond. The device stays in D0, because in D3hot its mapped BARs would raise SIGBUS. Leaving D3hot resets it, unless it says that it keeps its state. PME wakes the host. |
//! | MSI (05) | emulated | VFIO programs it for the host's interrupt controller. |
//! | vendor-specific (09) | as it is, can be written | It belongs to the function as its BARs do; virtio needs it. |
//! | PCI Express (10) | read-only, but for device control and the completion timeout, which are the guest's own copies | Payload sizes and link control must agree with the bridge above. Function level reset is there whenever the host can reset the device. |
//! | MSI-X (11) | emulated | As MSI. Linux ignores writes to its control register. |
//! | SATA (12) | read-only | It describes registers of a BAR. |
//! | advanced features (13) | function level reset | |
//! | PCI-X (07) | hidden | Its command register sets limits on the bus. |
//! | vital product data (03) | hidden | Reading requires writes, and other writes change the device's EEPROM, for good. |
//! | enhanced allocation (14) | hidden | It states addresses of the host. |
//! | extended: serial number (0003), vendor-specific (000b) | read-only | Drivers identify devices by them. |
//! | extended: AER, SR-IOV, ATS, PRI, PASID, ACS, ARI, LTR, resizable BARs and the rest | hidden | They act on the host's IOMMU, on other functions, on the link, or on the size of BARs. |
//!
//! Registers: PCIe 5.0 §7.5, §7.7, §7.9; PCI 3.0 §6.7.

use super::config::VirtualConfig;
use crate::device::Config;
use crate::error::Result;

const POWER: u8 = 0x01;
const MSI: u8 = 0x05;
const VENDOR: u8 = 0x09;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;
const SATA: u8 = 0x12;
const ADVANCED: u8 = 0x13;

const EXTENDED: u64 = 0x100;
const SERIAL_NUMBER: u16 = 0x0003;
const EXTENDED_VENDOR: u16 = 0x000b;

const LIST: usize = 0x34;
/// Function level reset in the device capabilities of PCI Express, and in those of advanced features.
const EXPRESS_RESET: u32 = 1 << 28;
const ADVANCED_RESET: u8 = 1 << 1;

/// What the host offers for a device.
pub(super) struct Offer {
    pub(super) resettable: bool,
    pub(super) msi: u32,
    pub(super) msix: u32,
}

/// Adds the capabilities that the guest sees.
pub(super) fn add(to: &mut VirtualConfig, config: &Config<'_>, offer: &Offer) -> Result<()> {
    let all = config.capabilities().collect::<Result<Vec<_>>>()?;
    let mut link = LIST;
    for one in &all {
        let at = one.offset as usize;
        // A capability that claims more bytes than it has shows none of the next one.
        let above = all.iter().map(|other| other.offset as usize).filter(|other| *other > at);
        let room = above.min().unwrap_or(EXTENDED as usize) - at;
        let size = match one.id {
            POWER | SATA => 8,
            MSI => msi_size(config.read_u16(one.offset + 2)?),
            VENDOR => usize::from(config.read_u8(one.offset + 2)?),
            EXPRESS if config.read_u8(one.offset + 2)? & 0xf == 1 => 0x14,
            EXPRESS => 0x3c,
            MSIX => 12,
            ADVANCED => 6,
            _ => continue,
        };
        let is_whole = size <= room || one.id == VENDOR;
        // A function has one of each.
        let is_hidden = match one.id {
            MSI => offer.msi == 0 || to.msi.is_some(),
            MSIX => offer.msix == 0 || to.msix.is_some(),
            EXPRESS => to.express.is_some(),
            POWER => to.power.is_some(),
            ADVANCED => to.advanced.is_some(),
            _ => false,
        };
        if !is_whole || is_hidden {
            continue;
        }
        let size = size.min(room).max(3);
        to.copy(config, at..at + size)?;
        match one.id {
            // The control register was read once more: a device that has changed it meanwhile has no MSI.
            MSI if msi_size(to.u16(at + 2)) != size => {
                log::warn!(
                    "the guest gets no MSI: its control register reads differently each time"
                );
                to.bytes[at..at + size].fill(0);
                continue;
            }
            POWER => power(to, at, offer),
            MSI => msi(to, at, offer.msi),
            VENDOR => {
                to.live[at + 3..at + size].fill(0xff);
                to.through[at + 3..at + size].fill(0xff);
            }
            EXPRESS => express(to, at, size, offer),
            MSIX => msix(to, at, offer.msix),
            ADVANCED => advanced(to, at, offer),
            _ => {}
        }
        to.bytes[link] = at as u8;
        link = at + 1;
        to.bytes[link] = 0;
    }
    to.bytes[0x06] &= !0x10;
    to.bytes[0x06] |= if link == LIST { 0 } else { 0x10 };
    Ok(())
}

/// Adds the extended capabilities that the guest sees.
pub(super) fn add_extended(to: &mut VirtualConfig, config: &Config<'_>) -> Result<()> {
    let all = config.extended_capabilities().collect::<Result<Vec<_>>>()?;
    let mut link = None;
    for one in &all {
        let at = one.offset as usize;
        let above = all.iter().map(|other| other.offset as usize).filter(|other| *other > at);
        let room = above.min().unwrap_or(to.bytes.len()) - at;
        let size = match one.id {
            SERIAL_NUMBER => 12,
            EXTENDED_VENDOR if room >= 8 => (config.read_u32(one.offset + 4)? >> 20) as usize,
            _ => continue,
        };
        let size = size.min(room).max(4);
        to.copy(config, at..at + size)?;
        to.live[at + 4..at + size].fill(0xff);
        let header = u32::from(one.id) | u32::from(one.version) << 16;
        to.set(at, &header.to_le_bytes());
        // The first header is at 0x100. Without a capability there, it has the ID 0 and is a link alone.
        let before = link.unwrap_or(EXTENDED as usize);
        if before != at {
            let next = ((at as u16) << 4).to_le_bytes();
            to.bytes[before + 2] |= next[0];
            to.bytes[before + 3] = next[1];
        }
        link = Some(at);
    }
    Ok(())
}

fn power(to: &mut VirtualConfig, at: usize, offer: &Offer) {
    to.power = Some(at);
    // Keeps the version and "device specific initialization".
    to.bytes[at + 2] &= 0x27;
    to.bytes[at + 3] = 0;
    // D0, and whether the state is kept in D3hot: it is, if the device cannot be reset.
    to.bytes[at + 4] &= 0x08;
    to.bytes[at + 4] |= if offer.resettable { 0 } else { 0x08 };
    to.writable[at + 4] = 0x03;
    to.bytes[at + 5..at + 8].fill(0);
}

/// The size of the capability MSI: it depends on the width of the address, and on masking per vector.
fn msi_size(control: u16) -> usize {
    let wide = if control & 0x80 != 0 { 4 } else { 0 };
    let masks = if control & 0x100 != 0 { 10 } else { 0 };
    10 + wide + masks
}

fn msi(to: &mut VirtualConfig, at: usize, count: u32) {
    to.msi = Some(at);
    let control = to.u16(at + 2);
    // As many vectors as the host has, in powers of two.
    let vectors = u32::from(control >> 1 & 7).min(count.min(32).ilog2());
    to.bytes[at + 4..at + msi_size(control)].fill(0);
    to.set(at + 2, &((control & 0x180) | (vectors as u16) << 1).to_le_bytes());
    to.allow(at + 2, &0x71u16.to_le_bytes());
    to.allow(at + 4, &0xffff_fffcu32.to_le_bytes());
    let data = at + if control & 0x80 == 0 { 8 } else { 12 };
    to.allow(at + 8, &[0xff; 4][..data - at - 8]);
    to.allow(data, &[0xff; 2]);
    if control & 0x100 != 0 {
        let masks = (1u64 << (1u32 << vectors)) - 1;
        to.allow(data + 4, &(masks as u32).to_le_bytes());
    }
}

fn express(to: &mut VirtualConfig, at: usize, size: usize, offer: &Offer) {
    to.express = Some(at);
    // No slot.
    to.bytes[at + 3] &= !1;
    let capabilities = to.u32(at + 4) & !EXPRESS_RESET;
    let reset = if offer.resettable { EXPRESS_RESET } else { 0 };
    to.set(at + 4, &(capabilities | reset).to_le_bytes());
    let control = to.u16(at + 8) & 0x7fff;
    to.set(at + 8, &control.to_le_bytes());
    to.allow(at + 8, &(0x7fff | if offer.resettable { 0x8000 } else { 0u16 }).to_le_bytes());
    // Errors are the host's. Whether transactions are pending is what a driver waits for before a reset.
    to.set(at + 0x0a, &[0, 0]);
    to.live[at + 0x0a] = 0x20;
    if size > 0x28 {
        let timeouts = to.u32(at + 0x24) & 0x1f;
        to.set(at + 0x24, &timeouts.to_le_bytes());
        let control = to.u16(at + 0x28) & 0x1f;
        to.set(at + 0x28, &control.to_le_bytes());
        to.allow(at + 0x28, &[0x1f, 0]);
        to.set(at + 0x2a, &[0, 0]);
    }
}

fn msix(to: &mut VirtualConfig, at: usize, count: u32) {
    to.msix = Some(at);
    let last = (to.u16(at + 2) & 0x7ff).min(count.clamp(1, 2048) as u16 - 1);
    to.set(at + 2, &last.to_le_bytes());
    to.allow(at + 2, &0xc000u16.to_le_bytes());
}

fn advanced(to: &mut VirtualConfig, at: usize, offer: &Offer) {
    to.advanced = Some(at);
    to.bytes[at + 3] &= 1;
    to.bytes[at + 3] |= if offer.resettable { ADVANCED_RESET } else { 0 };
    to.set(at + 4, &[0, 0]);
    to.allow(at + 4, &[u8::from(offer.resettable)]);
    to.live[at + 5] = 1;
}
