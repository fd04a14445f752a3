//! A guest that writes nonsense everywhere: the monitor goes on, and nothing is reached that the guest was not given.

use std::sync::Arc;

use vfio_remap::transport::{IrqInfo, RegionInfo, irq_index};

use super::card::{Card, ROM};
use super::models;
use super::monitor::{LOW, Monitor, apertures};

/// A generator of Marsaglia's (xorshift64): the same numbers every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Nonsense, but often such as makes a difference: an address in an aperture.
    fn value(&mut self) -> u32 {
        let value = (self.next() >> 16) as u32;
        match self.next() % 4 {
            0 => LOW.start as u32 | value & 0x0fff_ffff,
            1 => value & 0xff,
            2 => u32::MAX,
            _ => value,
        }
    }
}

/// Writes each dword of configuration space, `rounds` times, with accesses to memory in between.
fn attack(
    monitor: &mut Monitor,
    (size, rounds, seed): (u64, u64, u64),
    sane: &[(u64, &[u8])],
    check: impl Fn(&Monitor),
) {
    let mut random = Random(seed);
    let (mut most, mut reached) = (0, 0u64);
    for _ in 0..rounds {
        let at = random.next() % (size / 4) * 4;
        // Where most is at stake more often.
        let at = if random.next().is_multiple_of(2) { at % 0x100 } else { at };
        let bytes = random.value().to_le_bytes();
        match random.next() % 4 {
            0 => monitor.write(at + random.next() % 4, &bytes[..1]),
            1 => monitor.write(at + random.next() % 2 * 2, &bytes[..2]),
            _ => monitor.write(at, &bytes),
        }
        // A driver that wants the device to work, from time to time.
        if random.next().is_multiple_of(4) {
            for (at, bytes) in sane {
                monitor.write(*at, bytes);
            }
        }
        // The monitor checks each slot that is added.
        most = most.max(monitor.slots.len());
        if let Some((guest, size)) = monitor.mapped().first().copied() {
            let at = guest.wrapping_add(random.next() % (4 * size as u64));
            let data = random.next().to_le_bytes();
            if let Some(actions) = monitor.guest.write_memory(at, &data) {
                monitor.perform(actions);
                reached += 1;
            }
            monitor.guest.read_memory(at, &mut [0; 8]);
        }
        check(monitor);
    }
    assert_eq!(monitor.failed, []);
    assert!(most > 0 && reached > rounds / 8, "{reached} accesses to {most} slots at most");
    let actions = monitor.guest.release();
    monitor.perform(actions);
    assert!(monitor.slots.is_empty() && monitor.connected.is_empty() && !monitor.intx);
}

#[test]
fn random_configuration_writes_reach_what_the_guest_was_given() {
    let express: [u8; 0x3c] =
        std::array::from_fn(|at| [0x10, 0, 2].get(at).copied().unwrap_or(0x7f));
    let card = Card::new(4096)
        .with(0x3d, &[1])
        .with_bar(
            0,
            0xc,
            RegionInfo::mappable(0x10_0000).with_areas([0..0x1000, 0x8000..0x10_0000]),
        )
        .with_bar(2, 0, RegionInfo::mappable(0x4000))
        .with_bar(3, 1, RegionInfo::trapped(32))
        .with_bar(4, 0, RegionInfo::mappable(0x100))
        .with_region(ROM, RegionInfo::trapped(0x8000))
        .with_capabilities(&[
            (0x40, &[0x01, 0, 3, 0, 0, 0, 0, 0]),
            (0x50, &[0x05, 0, 0x84, 0x01]),
            (0x70, &[0x11, 0, 9, 0, 2, 0, 0, 0, 2, 0x10, 0, 0]),
            (0x80, &[0x03, 0, 0, 0]),
            (0x90, &express),
            (0xd0, &[0x09, 0, 0x10]),
            (0xf0, &[0x14, 0, 0, 0]),
        ])
        .with_irqs(irq_index::INTX, IrqInfo::eventfds(1).with_automasking())
        .with_irqs(irq_index::MSI, IrqInfo::eventfds(4).with_noresize())
        .with_irqs(irq_index::MSIX, IrqInfo::eventfds(10));
    let card = Arc::new(card);
    let mut monitor = Monitor::new(card.clone(), &apertures());
    let fixed = [0x00, 0x08, 0x2c, 0x40, 0x98 - 4].map(|at| (at, monitor.read_u32(at)));
    // D0, an address, memory decoding.
    let sane: [(u64, &[u8]); 3] = [(0x44, &[0]), (0x10, &[0, 0, 0, 0xc0, 0, 0, 0, 0]), (4, &[6])];
    attack(&mut monitor, (4096, 100_000, 0x9e37_79b9_7f4a_7c15), &sane, |monitor| {
        for (at, bytes) in card.take_written() {
            let end = at + bytes.len() as u64;
            // Command: bus mastering alone. Status: errors. The vendor's capability.
            let is_command = at == 4 && bytes.len() == 2 && bytes[0] & !4 <= 3 && bytes[1] == 0;
            let is_status = at == 7 && bytes.len() == 1 && bytes[0] & 6 == 0;
            assert!(
                is_command || is_status || (0xd3 <= at && end <= 0xe0),
                "{bytes:x?} at {at:#x}"
            );
        }
        for (region, offset, len, _) in card.take_accesses() {
            let table = region == 2 && (offset < 0xa0 || (0x1000..0x1008).contains(&offset));
            assert!(
                !table && offset + len as u64 <= 0x10_0000,
                "{len} bytes of {region} at {offset:#x}"
            );
        }
        for (at, value) in fixed {
            assert_eq!(monitor.read_u32(at), value, "{at:#x}");
        }
    });
    assert!(card.resets() > 0);
    drop(card);
    monitor.guest.close().unwrap();
}

#[test]
fn random_configuration_writes_do_not_disturb_models() {
    for (seed, (transport, size)) in
        [(models::edu(), 256), (models::nvme(), 256), (models::igb(), 4096)].into_iter().enumerate()
    {
        let mut monitor = Monitor::new(transport, &apertures());
        let identification = monitor.read_u32(0);
        let sane: [(u64, &[u8]); 3] = [(0x10, &[0, 0, 0, 0xc0]), (0x14, &[0; 4]), (4, &[6])];
        attack(&mut monitor, (size, 20_000, seed as u64 + 1), &sane, |monitor| {
            assert_eq!(monitor.read_u32(0), identification);
        });
        monitor.guest.close().unwrap();
    }
}
