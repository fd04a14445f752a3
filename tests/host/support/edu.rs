//! A driver for the edu device, and what must hold of it whichever way it is reached.

use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use vfio_remap::space::Access;
use vfio_remap::transport::{Transport, irq_index};
use vfio_remap::{Device, Placement};

use super::shared;
use super::watch::until;

/// Far more than an interrupt takes.
const TIME: Duration = Duration::from_secs(60);

pub fn read(device: &dyn Transport, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    device.read_at(0, offset, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

pub fn write(device: &dyn Transport, offset: u64, value: u32) {
    device.write_at(0, offset, &value.to_le_bytes()).unwrap();
}

/// Waits for an interrupt; how often it has fired.
pub fn fired(event: &EventFd) -> u64 {
    let ready = poll(
        &mut [PollFd::new(event.as_fd(), PollFlags::POLLIN)],
        PollTimeout::try_from(TIME).unwrap(),
    );
    assert_eq!(ready, Ok(1), "no interrupt");
    event.read().unwrap()
}

pub fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

/// Everything that the device does, driven as its documentation says.
pub fn does_all_that_is_documented(device: &dyn Transport) {
    device.reset().unwrap();
    assert_eq!(read(device, 0), 0x0100_00ed);
    write(device, 4, 0x1234_5678);
    assert_eq!(read(device, 4), !0x1234_5678);
    write(device, 8, 10);
    until("a factorial", || read(device, 0x20) & 1 == 0);
    assert_eq!(read(device, 8), 3_628_800);
    interrupts(device);
    for with_file in [true, false] {
        transfers(device, with_file);
    }
    device.reset().unwrap();
    assert_eq!(read(device, 8), 0, "after a reset nothing is left");
}

fn interrupts(device: &dyn Transport) {
    let (intx, msi) = (event(), event());
    device.set_irqs(irq_index::INTX, 0, &[Some(intx.as_fd())]).unwrap();
    write(device, 0x60, 5);
    assert_eq!(fired(&intx), 1);
    assert_eq!(read(device, 0x24), 5);
    write(device, 0x64, 1);
    device.mask_irqs(irq_index::INTX, 0..1, false).unwrap();
    assert_eq!(fired(&intx), 1, "it is still asserted");
    write(device, 0x64, 4);
    device.mask_irqs(irq_index::INTX, 0..1, false).unwrap();
    assert!(intx.read().is_err(), "it is not asserted any more");
    device.set_irqs(irq_index::INTX, 0, &[]).unwrap();

    device.set_irqs(irq_index::MSI, 0, &[Some(msi.as_fd())]).unwrap();
    device.write_at(7, 4, &6u16.to_le_bytes()).unwrap();
    write(device, 0x20, 0x80);
    write(device, 8, 5);
    assert_eq!(fired(&msi), 1);
    assert_eq!((read(device, 8), read(device, 0x24)), (120, 1));
    write(device, 0x64, 1);
    device.trigger_irqs(irq_index::MSI, 0..1).unwrap();
    assert_eq!(fired(&msi), 1);
    device.set_irqs(irq_index::MSI, 0, &[None]).unwrap();
    device.trigger_irqs(irq_index::MSI, 0..1).unwrap();
    assert!(msi.read().is_err(), "it is not connected any more");
    assert!(intx.read().is_err());
}

/// To the buffer and back to another place, across the border of two mappings.
fn transfers(device: &dyn Transport, with_file: bool) {
    let memory = [shared::memory(0x2000, with_file), shared::memory(0x2000, with_file)];
    device.dma_map(0x10_0000, &memory[0], Access::ReadOnly).unwrap();
    device.dma_map(0x10_2000, &memory[1], Access::ReadWrite).unwrap();
    let error = device.dma_map(0x10_1000, &memory[1], Access::ReadWrite).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EEXIST), "{error}");
    let data: Vec<u8> = (0..1000u32).map(|n| (n * 7) as u8).collect();
    shared::put(&memory[0], 0x2000 - 600, &data[..600]);
    shared::put(&memory[1], 0, &data[600..]);
    transfer(device, 0x10_2000 - 600, 0x4_0000 + 16, 1000, 1);
    let mut bytes = vec![0; 1000];
    device.read_at(0, 0x4_0000 + 16, &mut bytes).unwrap();
    assert_eq!(bytes, data, "the buffer holds what was transferred");
    transfer(device, 0x4_0000 + 16, 0x10_2800, 1000, 3);
    assert_eq!(shared::get(&memory[1], 0x800, 1000), data);
    // Not mapped for writing, not mapped at all, outside the buffer: nothing happens.
    transfer(device, 0x4_0000, 0x10_0000, 100, 3);
    assert_eq!(shared::get(&memory[0], 0, 100), [0; 100]);
    transfer(device, 0x20_0000, 0x4_0000 + 16, 1000, 1);
    transfer(device, 0x10_0000, 0x4_0000 + 4000, 1000, 1);
    device.read_at(0, 0x4_0000 + 16, &mut bytes).unwrap();
    assert_eq!(bytes, data, "the buffer is as it was");
    let error = device.dma_unmap(0x10_0000, 0x1000).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOENT), "{error}");
    device.dma_unmap(0x10_0000, 0x2000).unwrap();
    device.dma_unmap(0x10_2000, 0x2000).unwrap();
}

fn transfer(device: &dyn Transport, source: u64, destination: u64, count: u64, command: u64) {
    for (offset, value) in [(0x80, source), (0x88, destination), (0x90, count), (0x98, command)] {
        device.write_at(0, offset, &value.to_le_bytes()).unwrap();
    }
    until("a transfer", || read(device, 0x98) & 1 == 0);
}

/// Windows over its mapped parts reach it, also after they were duplicated and relocated.
pub fn is_reached_through_windows(device: &Device) {
    let bar = device.bar(0).unwrap();
    let mapped: Vec<_> = bar.layout().mappable().collect();
    assert_eq!(mapped, [0x1_0000..0x2_0000, 0x4_0000..0x5_0000]);
    let mut window = bar.map(mapped[0].clone(), Placement::Anywhere).unwrap();
    let (copy, _) = window.duplicate(Placement::Anywhere).unwrap();
    window.relocate(Placement::Anywhere).unwrap();
    for (window, value) in [(&window, 0x5555_0001), (&copy, 7)] {
        assert_eq!(window.register::<u32>(0).unwrap().read(), 0x0100_00ed);
        window.register::<u32>(4).unwrap().write(value);
        let answer = window.register::<u32>(8).unwrap();
        until("an answer", || answer.read() == !value);
    }
    let buffer = bar.map(mapped[1].clone(), Placement::Anywhere).unwrap();
    buffer.register::<u64>(8).unwrap().write(0x0123_4567_89ab_cdef);
    let trapped = bar.trapped_register::<u64>(0x4_0008).unwrap();
    assert_eq!(trapped.read().unwrap(), 0x0123_4567_89ab_cdef);
    trapped.write(1).unwrap();
    assert_eq!(buffer.register::<u64>(8).unwrap().read(), 1);
}
