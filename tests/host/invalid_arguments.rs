//! Errors of calls that make no sense say why, and what to do.

use std::fmt::Debug;
use std::ops::Bound;
use std::sync::Arc;

use vfio_remap::transport::{DeviceInfo, MemoryDevice, RegionFile, RegionInfo};
use vfio_remap::{Device, Error, ErrorKind, Placement, Reservation, Result, Transport};

const SIZE: u64 = 0x4000;

/// A region of memory, and none at index 1.
#[derive(Debug)]
struct Regions(MemoryDevice);

impl Transport for Regions {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("regions", 2)
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        match index {
            0 => self.0.region(0),
            _ => Err(Error::new(ErrorKind::NotFound, "find", "region 1")
                .with_reason("the device has no such region")),
        }
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.0.read_at(region, offset, data)
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.0.write_at(region, offset, data)
    }

    fn backing(&self, _: u32) -> Result<RegionFile> {
        self.0.backing(0)
    }
}

/// It is of that kind, and has a reason and advice.
#[track_caller]
fn advises<T: Debug, E: Into<Error>>(result: std::result::Result<T, E>, kind: ErrorKind) {
    let error: Error = match result {
        Ok(value) => panic!("{value:?}"),
        Err(error) => error.into(),
    };
    assert_eq!(error.kind(), kind, "{error}");
    assert!(!error.advice().is_empty(), "{error}");
    let bare = Error::new(kind, error.operation().to_owned(), error.object());
    let without_reason = bare.with_advice(error.advice().to_owned());
    assert_ne!(error.to_string(), without_reason.to_string(), "there is no reason");
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason_and_advice() {
    use ErrorKind::{NotFound, NotMappable, OutOfRange, ReadOnly, Unaligned};
    let device = Device::new(Arc::new(Regions(MemoryDevice::new(SIZE).unwrap())));
    for index in [1, 2, u32::MAX] {
        advises(device.bar(index), NotFound);
        advises(device.region(index), NotFound);
    }

    let bar = device.bar(0).unwrap();
    advises(bar.map(0..SIZE + 1, Placement::Anywhere), OutOfRange);
    advises(bar.map(0x1000..0x1000, Placement::Anywhere), OutOfRange);
    advises(bar.map(0..=u64::MAX, Placement::Anywhere), OutOfRange);
    advises(
        bar.map((Bound::Excluded(u64::MAX), Bound::Unbounded), Placement::Anywhere),
        OutOfRange,
    );
    advises(bar.with_msix_table(), NotMappable);
    advises(bar.trapped_register::<u32>(SIZE - 3), OutOfRange);
    advises(bar.trapped_register::<u32>(u64::MAX - 1), OutOfRange);
    advises(bar.trapped_register::<u32>(2), Unaligned);
    let vast = Device::new(Arc::new(MemoryDevice::new(1 << 53).unwrap()));
    advises(vast.bar(0).unwrap().map(.., Placement::Anywhere), OutOfRange);
    advises(bar.map(.., Placement::At(1)), Unaligned);
    advises(bar.map(.., Placement::At(usize::MAX & !0xfff)), OutOfRange);

    let window = bar.map(0x1000..0x2000, Placement::Anywhere).unwrap();
    advises(window.register::<u32>(0x1000 - 3), OutOfRange);
    advises(window.register::<u64>(usize::MAX), OutOfRange);
    advises(window.register::<u32>(6), Unaligned);
    advises(window.register_array::<u32>(0, 4, 0), OutOfRange);
    advises(window.register_array::<u32>(0, 2, 2), Unaligned);
    advises(window.register_array::<u32>(0, 6, 2), Unaligned);
    advises(window.register_array::<u32>(0, 8, 0x201), OutOfRange);
    advises(window.register_array::<u32>(0, 8, usize::MAX), OutOfRange);
    let (copy, _) = window.duplicate_read_only(Placement::Anywhere).unwrap();
    advises(copy.register::<u32>(0), ReadOnly);
    advises(copy.clone().into_reservation(), ErrorKind::InUse);
}

#[test]
fn reservations_that_make_no_sense_say_why_and_what_to_do() {
    use ErrorKind::{OutOfRange, Unaligned};
    for size in [0, usize::MAX, 1 << 62] {
        advises(Reservation::new(size), OutOfRange);
    }
    advises(Reservation::aligned(1, 3 << 20), Unaligned);
    advises(Reservation::aligned(1 << 51, 1 << 62), OutOfRange);
    advises(Reservation::congruent(1, 1 << 20, 1), Unaligned);
    advises(Reservation::at(1, 1), Unaligned);
    // Root may map it.
    advises(Reservation::at(0, 1), OutOfRange);
    assert!(Reservation::congruent(1, 1 << 51, 0).is_err(), "a null pointer would reach it");
    advises(Reservation::at(usize::MAX & !0xfff, 0x2000), OutOfRange);
    for (at, kind) in [(1, Unaligned), (0, OutOfRange), (0x1000, OutOfRange)] {
        advises(Reservation::new(0x1000).unwrap().split_at(at), kind);
    }
}
