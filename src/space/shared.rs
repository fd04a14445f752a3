//! Memory of a file that another process may truncate at any time.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::DmaMemory;
use crate::sys::fork;
use crate::sys::mm::{self, Access};
use crate::sys::mmap_lock::MmapLock;

/// A mapping of a file of another process.
struct Shared {
    address: usize,
    len: usize,
    generation: u32,
}

impl DmaMemory {
    /// Maps `size` bytes of a file from `offset` on. The mapping is rounded to `page`, the page size of the file
    /// in bytes.
    ///
    /// If another process truncates the file, a load or a store here raises SIGBUS. So only the kernel may access
    /// this memory (`process_vm_readv(2)`); it returns EFAULT then.
    ///
    /// The file may be closed. A child of `fork(2)` does not inherit the mapping.
    pub(crate) fn of_peer(
        fd: BorrowedFd<'_>,
        offset: u64,
        size: u64,
        page: u64,
        access: Access,
    ) -> Result<Self, Errno> {
        let start = offset - offset % page;
        let end = offset.checked_add(size).and_then(|end| end.checked_next_multiple_of(page));
        let len = usize::try_from(end.ok_or(Errno::EOVERFLOW)? - start);
        let len = len.map_err(|_| Errno::EOVERFLOW)?;
        let generation = fork::generation();
        let address = mm::map(&MmapLock::take(), fd, start, len, access)?;
        let shared = Shared { address, len, generation };
        // SAFETY: the range was mapped above, and nobody else knows it.
        unsafe { mm::keep_from_children(address, len)? };
        // Both are less than `len`, which fits.
        let (address, size) = (address + (offset - start) as usize, size as usize);
        // SAFETY: `shared` keeps it mapped, and nobody else knows the address. Nothing makes a reference to
        // what is there.
        Ok(unsafe { Self::new(address, size, None, Arc::new(shared)) }.not_inherited())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        // SAFETY: the range was mapped for this value alone, and it has no user left.
        if let Err(errno) = unsafe { mm::munmap(self.address, self.len) } {
            log::error!("leaked a mapping of {:#x} bytes of a client's file: {errno}", self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::sys::{file, maps, page_size};
    use crate::transport::vfio_user::protocol::dma;

    #[test]
    fn a_part_of_a_file_is_reached_until_it_is_truncated() {
        let page = page_size() as u64;
        let file = File::from(file::memory_file("vfio-remap-test", 4 * page).unwrap());
        file.write_all_at(b"before the end", 2 * page - 7).unwrap();
        let memory =
            DmaMemory::of_peer(file.as_fd(), page + 8, page, page, Access::ReadWrite).unwrap();
        assert_eq!(memory.size() as u64, page);
        let mut data = [0; 14];
        dma::read(&memory, page - 15, &mut data).unwrap();
        assert_eq!(&data, b"before the end");
        dma::write(&memory, page - 2, b"!!").unwrap();
        file.read_exact_at(&mut data[..2], 2 * page + 6).unwrap();
        assert_eq!(&data[..2], b"!!");
        assert_eq!(dma::read(&memory, page - 1, &mut data[..2]), Err(Errno::EFAULT));

        file.set_len(2 * page).unwrap();
        assert_eq!(dma::write(&memory, page - 2, b"!!"), Err(Errno::EFAULT));
        dma::read(&memory, 0, &mut data).unwrap();

        let range = memory.address()..memory.address() + 1;
        let is_mapped = || {
            let this = file::identity(&file).unwrap();
            maps::overlapping(&range).iter().any(|mapped| (mapped.device, mapped.inode) == this)
        };
        assert!(is_mapped());
        drop(memory);
        assert!(!is_mapped());
    }

    /// A child may have mapped anything else at the address.
    #[test]
    fn a_child_does_not_reach_it() {
        let page = page_size();
        let file = file::memory_file("vfio-remap-test", page as u64).unwrap();
        let (size, access) = (page as u64, Access::ReadWrite);
        let memory = DmaMemory::of_peer(file.as_fd(), 0, size, size, access).unwrap();
        // SAFETY: the child makes system calls.
        let holds = unsafe {
            fork::holds_in_child(|| {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
                let access = libc::PROT_READ | libc::PROT_WRITE;
                let at = memory.address();
                let mapped = libc::mmap(at as *mut _, page, access, flags, -1, 0);
                mapped as usize == at
                    && dma::read(&memory, 0, &mut [0; 2]) == Err(Errno::EFAULT)
                    && dma::write(&memory, 0, b"!!") == Err(Errno::EFAULT)
            })
        };
        assert!(holds);
    }

    #[test]
    fn ranges_that_cannot_be_are_refused() {
        let file = file::memory_file("vfio-remap-test", 1 << 20).unwrap();
        for (offset, size) in [(u64::MAX, 1), (u64::MAX - 10, 9), (0, u64::MAX), (1 << 63, 1)] {
            let refused = DmaMemory::of_peer(file.as_fd(), offset, size, 4096, Access::ReadOnly);
            assert!(refused.is_err(), "{offset:#x}, {size:#x}");
        }
    }
}
