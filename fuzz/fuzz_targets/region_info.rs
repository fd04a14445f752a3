//! What a kernel or a peer answers about a region.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_remap::transport::RegionInfo;

fuzz_target!(|bytes: &[u8]| {
    if let Ok((info, _)) = RegionInfo::from_vfio(bytes) {
        for area in info.areas.iter().flatten() {
            assert!(area.start < area.end);
        }
    }
});
