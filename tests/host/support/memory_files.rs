//! Files that a client's memory may be: on a disk, and of huge pages.

use std::fs::File;
use std::num::NonZeroUsize;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vfio_remap::space::DmaMemory;

pub const HUGE: u64 = 2 << 20;

/// A file of zeros without a name, in the directory where the tests are built. `None`, and a word, if that is not
/// on a disk.
pub fn on_disk(size: u64) -> Option<File> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let directory = env!("CARGO_TARGET_TMPDIR");
    let output = Command::new("stat").args(["-f", "-c", "%T", directory]).output().unwrap();
    let name = String::from_utf8(output.stdout).unwrap();
    if !["ext2/ext3", "xfs", "btrfs", "f2fs"].contains(&name.trim()) {
        println!("skipped: {directory} is on {}", name.trim());
        return None;
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = format!("{directory}/vfio-remap-{}-{number}", std::process::id());
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(size).unwrap();
    Some(file)
}

/// So many huge pages. `None`, and a word, if the kernel has none to give.
pub fn of_huge_pages(count: u64) -> Option<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = match memfd_create("vfio-remap-test-huge", flags) {
        Ok(fd) => File::from(fd),
        Err(errno) => {
            println!("skipped: the kernel has no huge pages of 2 MiB: {errno}");
            return None;
        }
    };
    file.set_len(count * HUGE).unwrap();
    match Mapped::new(&file, count * HUGE) {
        Ok(_) => Some(file),
        Err(errno) => {
            println!("skipped: the kernel has no {count} huge pages of 2 MiB to give: {errno}");
            None
        }
    }
}

/// All of a file, mapped until it is dropped.
pub struct Mapped(NonNull<c_void>, usize);

// SAFETY: it is a range of addresses, which any thread may unmap.
unsafe impl Send for Mapped {}
// SAFETY: nothing is done by a shared reference.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub fn new(file: &File, size: u64) -> Result<Self, Errno> {
        let len = NonZeroUsize::new(size as usize).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses a range that nobody uses.
        let at = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Self(at, len.get()))
    }

    /// As memory for DMA.
    pub fn dma(self, file: File) -> DmaMemory {
        let (address, size) = (self.0.as_ptr() as usize, self.1);
        let file = Some((Arc::new(file.into()), 0));
        // SAFETY: mapped while `self` lives; the tests reach it by volatile accesses alone.
        unsafe { DmaMemory::new(address, size, file, Arc::new(self)) }
    }

    pub fn put(&self, at: u64, data: &[u8]) {
        assert!(at as usize + data.len() <= self.1);
        for (index, byte) in data.iter().enumerate() {
            // SAFETY: within what is mapped.
            unsafe { self.0.cast::<u8>().add(at as usize + index).write_volatile(*byte) };
        }
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        assert!(at as usize + len <= self.1);
        // SAFETY: within what is mapped.
        let byte = |index| unsafe { self.0.cast::<u8>().add(at as usize + index).read_volatile() };
        (0..len).map(byte).collect()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the range was mapped for this value alone.
        unsafe { munmap(self.0, self.1).unwrap() };
    }
}
