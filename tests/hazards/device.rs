//! The lab's devices: opened by the crate, mapped by hand.

use vfio_remap::transport::RegionFile;
use vfio_remap::{Device, PciAddress};

use crate::raw;

/// A BAR of a device of the lab.
pub struct Bar {
    device: Device,
    file: RegionFile,
    pub size: usize,
}

/// Where a BAR keeps what is written to it.
pub struct Scratch {
    pub offset: usize,
    pub value: u32,
    /// What is read after `value` was written.
    pub answer: fn(u32) -> u32,
}

/// A device, its BAR, and a register there.
pub struct Subject {
    pub name: &'static str,
    pub bar: u32,
    pub scratch: Scratch,
}

/// NVMe keeps AQA while it is not enabled; e1000e keeps VET; edu answers with the inverse.
pub const SUBJECTS: [Subject; 4] = [
    Subject {
        name: "nvme",
        bar: 0,
        scratch: Scratch { offset: 0x24, value: 0x1f_001f, answer: |v| v },
    },
    Subject {
        name: "e1000e",
        bar: 0,
        scratch: Scratch { offset: 0x38, value: 0x8100, answer: |v| v },
    },
    Subject {
        name: "edu",
        bar: 0,
        scratch: Scratch { offset: 4, value: 0x1234_5678, answer: |v| !v },
    },
    Subject {
        name: "ivshmem64m",
        bar: 2,
        scratch: Scratch { offset: 0x80_0004, value: 0xabcd_1234, answer: |v| v },
    },
];

pub fn address(name: &str) -> PciAddress {
    let devices = std::env::var("LAB_DEVICES").expect("run by `cargo lab`");
    devices
        .split_ascii_whitespace()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
        .unwrap_or_else(|| panic!("the lab has no device {name}: {devices}"))
}

impl Bar {
    /// Opens a device and lets it answer.
    pub fn open(name: &str, bar: u32) -> Self {
        let device = Device::open(address(name)).unwrap();
        device.config().unwrap().set_memory_decoding(true).unwrap();
        let file = device.transport().backing(bar).unwrap();
        let size = device.transport().region(bar).unwrap().size as usize;
        Self { device, file, size }
    }

    /// Maps a part where the kernel likes.
    pub fn map(&self, offset: usize, len: usize) -> usize {
        let at = self.file.start() + offset as u64;
        // SAFETY: no MAP_FIXED.
        unsafe { raw::map_file(0, len, raw::MAP_SHARED, self.file.fd(), at) }.unwrap()
    }

    /// Maps all of it at a multiple of 1 GiB, where it can have entries of 1 GiB.
    pub fn map_congruent(&self) -> usize {
        let place = raw::reserve(self.size, raw::GIB);
        // SAFETY: the range was reserved on the line above.
        unsafe { self.map_fixed(place, 0, self.size) }.unwrap();
        place
    }

    /// Maps a part over what is there.
    ///
    /// # Safety
    /// The range is the caller's.
    pub unsafe fn map_fixed(
        &self,
        address: usize,
        offset: usize,
        len: usize,
    ) -> std::io::Result<usize> {
        let at = self.file.start() + offset as u64;
        let flags = raw::MAP_SHARED | raw::MAP_FIXED;
        // SAFETY: the caller vouches for the range.
        unsafe { raw::map_file(address, len, flags, self.file.fd(), at) }
    }

    /// Switches memory decoding: without it vfio-pci lets no access through.
    pub fn set_decoding(&self, on: bool) {
        self.device.config().unwrap().set_memory_decoding(on).unwrap();
    }
}
