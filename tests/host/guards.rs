//! Checks that nothing else would miss: bounds of arrays of registers, seals, and children of `fork`.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vfio_remap::device::{BufferRequest, Interrupt};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{DeviceInfo, DmaLimits, IrqInfo, MemoryDevice, Transport, irq_index};
use vfio_remap::{Device, Placement, Result};

use crate::support::alone::alone;
use crate::support::scripted::Scripted;
use crate::support::without_regions::without_regions;

#[test]
fn registers_past_the_last_are_not_reached() {
    let device = Device::new(Arc::new(MemoryDevice::new(0x1000).unwrap()));
    let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    let doorbells = window.register_array::<u32>(0x100, 8, 4).unwrap();
    let past = window.register::<u32>(0x120).unwrap();
    past.write(7);
    for index in 0..4 {
        doorbells.write(index, index as u32 + 1);
        assert_eq!(doorbells.read(index), index as u32 + 1);
        assert_eq!(doorbells.get(index).unwrap().read(), index as u32 + 1);
    }
    assert!(doorbells.get(4).is_none());
    for index in [4, 5, usize::MAX] {
        let panics = |access: &dyn Fn()| {
            let panic = catch_unwind(AssertUnwindSafe(access)).unwrap_err();
            let words = panic.downcast_ref::<String>().unwrap();
            assert_eq!(*words, format!("register {index} of 4"));
        };
        panics(&|| assert_eq!(doorbells.read(index), 0));
        panics(&|| doorbells.write(index, 9));
    }
    assert_eq!(past.read(), 7);
}

#[test]
fn memory_for_dma_keeps_its_size() {
    let space = Device::new(Arc::new(Scripted::default())).dma().unwrap();
    let buffer = space.buffer_with(BufferRequest::new(0x2000).own_mapping()).unwrap();
    let memory = buffer.memory();
    let (file, _) = memory.file().unwrap();
    let file = File::from(file.try_clone_to_owned().unwrap());
    for size in [0, 0x1000, 0x3000] {
        let error = file.set_len(size).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{size:#x} bytes");
    }
    buffer.store::<u64>(0x1ff8, 1);
}

/// Offers everything, and counts what is taken back.
#[derive(Debug, Default)]
struct Counting(AtomicUsize);

impl Counting {
    fn take_back(&self) -> Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Transport for Counting {
    fn info(&self) -> DeviceInfo {
        let mut info = DeviceInfo::new("counting", 0);
        info.pci = true;
        info
    }

    without_regions!();

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        Ok(IrqInfo::eventfds(if index == irq_index::MSIX { 4 } else { 1 }))
    }

    fn set_irqs(&self, _: u32, _: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        if fds.is_empty() { self.take_back() } else { Ok(()) }
    }

    fn enter_low_power(&self, _: Option<BorrowedFd<'_>>) -> Result<()> {
        Ok(())
    }

    fn exit_low_power(&self) -> Result<()> {
        self.take_back()
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        Ok(DmaLimits::new(vec![0x1000..=0xffff], 4096))
    }

    fn dma_map(&self, _: u64, _: &DmaMemory, _: Access) -> Result<()> {
        Ok(())
    }

    fn dma_unmap(&self, _: u64, _: u64) -> Result<()> {
        self.take_back()
    }
}

/// Drops `made` in a child, and then here: how often the transport is told to take something back.
fn taken_back<T>(transport: &Counting, made: T) -> (usize, usize) {
    let mut made = Some(made);
    let before = transport.0.load(Ordering::Relaxed);
    // SAFETY: the child drops one value, whose locks no other thread has, and ends.
    let status = unsafe {
        match libc::fork() {
            0 => {
                libc::alarm(120);
                drop(made.take());
                libc::_exit((transport.0.load(Ordering::Relaxed) - before) as i32);
            }
            child => {
                let mut status = -1;
                assert_eq!(libc::waitpid(child, &mut status, 0), child);
                status
            }
        }
    };
    assert!(libc::WIFEXITED(status), "{status:#x}");
    drop(made);
    let in_parent = transport.0.load(Ordering::Relaxed) - before;
    (libc::WEXITSTATUS(status) as usize, in_parent)
}

#[test]
fn a_child_takes_nothing_back_from_a_device() {
    alone(|| {
        let transport = Arc::new(Counting::default());
        let device = Device::new(transport.clone());
        let vectors = device.vectors(Interrupt::MsiX, 2).unwrap();
        assert_eq!(taken_back(&transport, vectors), (0, 1));
        assert_eq!(taken_back(&transport, device.events().unwrap()), (0, 2));
        assert_eq!(taken_back(&transport, device.low_power().unwrap()), (0, 1));
        assert_eq!(taken_back(&transport, device.dma().unwrap().buffer(4096).unwrap()), (0, 1));
    });
}
