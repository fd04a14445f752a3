//! Regions of a device as a program goes through them.

use std::sync::Arc;

use vfio_remap::transport::{DeviceInfo, RegionInfo};
use vfio_remap::{Device, Error, ErrorKind, Result, Transport};

use crate::support::alone::alone;
use crate::support::logged;

/// A device with regions 1, 6 and 7. Its region 2 makes no sense, and it has no others.
#[derive(Debug)]
struct Sparse;

impl Transport for Sparse {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("sparse", 9)
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        match index {
            1 | 6 | 7 => Ok(RegionInfo::trapped(256)),
            2 => Err(Error::new(ErrorKind::Malformed, "read", "region 2").with_reason("it is odd")),
            _ => Err(Error::new(ErrorKind::NotFound, "find", "a region")),
        }
    }

    fn read_at(&self, region: u32, _: u64, _: &mut [u8]) -> Result<()> {
        self.region(region).map(drop)
    }

    fn write_at(&self, region: u32, _: u64, _: &[u8]) -> Result<()> {
        self.region(region).map(drop)
    }
}

#[test]
fn each_region_is_listed_and_one_that_makes_no_sense_is_logged() {
    alone(|| {
        logged::watch();
        let device = Device::new(Arc::new(Sparse));
        let indexes: Vec<_> = device.regions().map(|region| region.index()).collect();
        assert_eq!(indexes, [1, 6, 7]);
        assert_eq!(logged::take(), ["cannot read region 2: it is odd"]);
        assert_eq!(device.bar(2).unwrap_err().kind(), ErrorKind::Malformed);
    });
}

#[test]
fn only_the_first_six_regions_are_bars() {
    let device = Device::new(Arc::new(Sparse));
    assert_eq!(device.bars().map(|bar| bar.index()).collect::<Vec<_>>(), [1]);
    assert_eq!((device.bar(1).unwrap().index(), device.region(7).unwrap().index()), (1, 7));
    let error = device.bar(7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        error.to_string(),
        "cannot find bar 7 of sparse: BARs have the numbers 0 to 5; reach other regions by \
         Device::region"
    );
}
