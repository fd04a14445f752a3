//! What this kernel really refuses, and what that may not cost.
//!
//! An io_uring ring is a mapping that refuses to move even by MREMAP_FIXED, up to Linux 6.16 after the
//! destination was unmapped.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use vfio_remap::transport::{DeviceInfo, RegionFile, RegionInfo};
use vfio_remap::{
    Device, Error, ErrorKind, Placement, Reservation, Result, Strategy, Transport, Window,
};

use crate::common::probe;
use crate::support::alone::alone;

/// A ring of io_uring as a region: its kind is `Other`.
#[derive(Debug)]
struct Ring(Arc<OwnedFd>);

impl Ring {
    /// `None` where the kernel has no io_uring, or forbids it.
    fn new() -> Option<Self> {
        // `struct io_uring_params` (linux/io_uring.h) has 120 bytes; zeros ask for the defaults.
        let mut parameters = [0u8; 120];
        // SAFETY: the kernel reads and writes the structure.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, parameters.as_mut_ptr()) };
        // SAFETY: a new descriptor, ours.
        (fd >= 0).then(|| Self(Arc::new(unsafe { OwnedFd::from_raw_fd(fd as i32) })))
    }
}

impl Transport for Ring {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("io_uring", 1)
    }

    fn region(&self, _: u32) -> Result<RegionInfo> {
        Ok(RegionInfo::mappable(256))
    }

    fn read_at(&self, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "read", "a ring"))
    }

    fn write_at(&self, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "write", "a ring"))
    }

    fn backing(&self, _: u32) -> Result<RegionFile> {
        // SAFETY: nobody submits to the ring, and the test only reads it.
        Ok(unsafe { RegionFile::device(self.0.clone(), 0) })
    }
}

fn ring() -> Option<Window> {
    let device = Device::new(Arc::new(Ring::new()?));
    Some(device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap())
}

#[test]
fn a_refused_move_costs_neither_window_nor_reservation() {
    alone(|| {
        let Some(mut window) = ring() else {
            println!("no io_uring here");
            return;
        };
        let at = window.addresses();
        let mut place = Reservation::at(0x20_0000_0000, at.len()).unwrap();
        for strategy in [Strategy::Move, Strategy::DontUnmap] {
            let range = place.range();
            let failed = window.relocate(Placement::In(place).only(strategy)).unwrap_err();
            assert!(matches!(failed.kind(), ErrorKind::Refused | ErrorKind::Hazard), "{failed}");
            place = failed.into_reservation().unwrap();
            assert_eq!((place.range(), window.addresses()), (range.clone(), at.clone()));
            assert_eq!(probe::load(range.start), None);
            let taken = Reservation::at(range.start, range.len()).unwrap_err();
            assert_eq!(taken.kind(), ErrorKind::AddressTaken, "the reservation stands");
        }
        assert!(probe::load(at.start).is_some(), "the window stands");
    });
}
