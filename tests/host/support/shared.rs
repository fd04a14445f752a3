//! Memory for DMA, as a driver would own it: of a file that can be sent to a server, or of none.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_remap::device::IovaPlacement;
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::{Device, ErrorKind};

/// Mapped until it is dropped.
struct Mapped(usize, usize);

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the range was mapped for this value alone.
        unsafe { libc::munmap(self.0 as *mut _, self.1) };
    }
}

/// `size` bytes; with a file, they begin at its second page.
pub fn memory(size: usize, with_file: bool) -> DmaMemory {
    const OFFSET: u64 = 4096;
    let file = with_file.then(|| {
        let fd = memfd_create("vfio-remap-test-dma", MFdFlags::MFD_CLOEXEC).unwrap();
        File::from(fd.try_clone().unwrap()).set_len(OFFSET + size as u64).unwrap();
        Arc::new(fd)
    });
    let (flags, fd) = match &file {
        Some(fd) => (libc::MAP_SHARED, fd.as_raw_fd()),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
    };
    let offset = if file.is_some() { OFFSET as i64 } else { 0 };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the kernel chooses a range that nobody uses.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, fd, offset) };
    assert_ne!(at, libc::MAP_FAILED);
    let file: Option<(Arc<OwnedFd>, u64)> = file.map(|fd| (fd, OFFSET));
    // SAFETY: mapped while `Mapped` lives; the tests reach it by `put` and `get` alone.
    unsafe { DmaMemory::new(at as usize, size, file, Arc::new(Mapped(at as usize, size))) }
}

pub fn put(memory: &DmaMemory, offset: usize, bytes: &[u8]) {
    assert!(offset + bytes.len() <= memory.size());
    for (index, byte) in bytes.iter().enumerate() {
        // SAFETY: in bounds, and mapped while `memory` lives.
        unsafe { ((memory.address() + offset + index) as *mut u8).write_volatile(*byte) };
    }
}

pub fn get(memory: &DmaMemory, offset: usize, len: usize) -> Vec<u8> {
    assert!(offset + len <= memory.size());
    // SAFETY: in bounds, and mapped while `memory` lives.
    let byte = |index| unsafe { ((memory.address() + index) as *const u8).read_volatile() };
    (offset..offset + len).map(byte).collect()
}

/// What one of two devices over the same I/O addresses has mapped, the other maps around, or is told of.
pub fn io_addresses_are_shared(one: &Device, other: &Device) {
    let (one, other) = (one.dma().unwrap(), other.dma().unwrap());
    let first = one.buffer(4096).unwrap();
    let second = other.buffer(4096).expect("there is room elsewhere");
    assert_ne!(first.iova(), second.iova());
    let error =
        other.map(second.memory(), IovaPlacement::At(first.iova()), Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddressTaken, "{error}");
    // Of one process, they take addresses from one stock: nobody is asked.
    let errno = (one.address_space() != other.address_space()).then_some(libc::EEXIST);
    assert_eq!(error.errno(), errno, "{error}");
    assert!(!error.advice().is_empty(), "{error}");
    assert_eq!(other.mapping_count(), 1, "the address that was taken is given back");
}
