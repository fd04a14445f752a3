//! A device without regions.

/// The methods of a [`Transport`](vfio_remap::transport::Transport) that has no regions.
macro_rules! without_regions {
    () => {
        fn region(&self, _: u32) -> vfio_remap::Result<vfio_remap::transport::RegionInfo> {
            Err(vfio_remap::Error::new(vfio_remap::ErrorKind::NotFound, "find", "a region"))
        }

        fn read_at(&self, region: u32, _: u64, _: &mut [u8]) -> vfio_remap::Result<()> {
            self.region(region).map(drop)
        }

        fn write_at(&self, region: u32, _: u64, _: &[u8]) -> vfio_remap::Result<()> {
            self.region(region).map(drop)
        }
    };
}

pub(crate) use without_regions;
