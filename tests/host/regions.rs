//! Regions of a device as a program goes through them.

use std::sync::{Arc, Mutex};

use vfio_remap::transport::{DeviceInfo, RegionInfo};
use vfio_remap::{Device, Error, ErrorKind, Result, Transport};

use crate::support::alone::alone;

/// What has been logged.
struct Log(Mutex<Vec<String>>);

static LOG: Log = Log(Mutex::new(Vec::new()));

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// A device with regions 1, 6 and 7; what it says of region 2 makes no sense, and there are no others.
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
fn bars_gives_each_region_and_logs_one_that_makes_no_sense() {
    alone(|| {
        log::set_logger(&LOG).unwrap();
        log::set_max_level(log::LevelFilter::Warn);
        let device = Device::new(Arc::new(Sparse));
        let indexes: Vec<_> = device.bars().map(|bar| bar.index()).collect();
        assert_eq!(indexes, [1, 6, 7]);
        assert_eq!(*LOG.0.lock().unwrap(), ["cannot read region 2: it is odd"]);
        assert_eq!(device.bar(2).unwrap_err().kind(), ErrorKind::Malformed);
    });
}
