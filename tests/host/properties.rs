//! Whatever a transport says of a region, nothing panics, and what is laid out makes sense.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use vfio_remap::transport::{DeviceInfo, MemoryDevice, RegionFile, RegionInfo};
use vfio_remap::{Device, Error, ErrorKind, Placement, Result, Transport};

const CONFIG: u32 = 7;
const PAGE: u64 = 4096;

/// A PCI device whose configuration space and region are what a test made up.
#[derive(Debug)]
struct Hostile {
    config: Vec<u8>,
    info: RegionInfo,
    memory: MemoryDevice,
}

impl Transport for Hostile {
    fn info(&self) -> DeviceInfo {
        let mut info = DeviceInfo::new("hostile", 9);
        info.pci = true;
        info
    }

    fn region(&self, _: u32) -> Result<RegionInfo> {
        Ok(self.info.clone())
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        assert_eq!(region, CONFIG);
        let from = usize::try_from(offset).ok().and_then(|offset| self.config.get(offset..));
        match from.and_then(|bytes| bytes.get(..data.len())) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => return Err(Error::new(ErrorKind::OutOfRange, "read", "configuration space")),
        }
        Ok(())
    }

    fn write_at(&self, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn backing(&self, _: u32) -> Result<RegionFile> {
        self.memory.backing(0)
    }
}

/// A `vfio_region_info` whose words are often small, so that chains are followed and not only refused.
fn answer() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![0u32..8, 24u32..96, any::<u32>()];
    (vec(word, 0..48), 0usize..4).prop_map(|(words, cut)| {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.truncate(bytes.len().saturating_sub(cut));
        bytes
    })
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0u64..64).prop_map(|page| page * PAGE),
        0u64..0x40000,
        any::<u64>(),
        u64::MAX - 0x3000..=u64::MAX
    ]
}

fn config() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![Just(0x11u8), 0x40u8..0x60, any::<u8>()];
    vec(byte, 0..=256).prop_map(|mut bytes| {
        // Capabilities are there, and the list begins where it usually does.
        if bytes.len() > 0x34 {
            bytes[6] |= 0x10;
            bytes[0x10] &= !1;
            bytes[0x34] = 0x40;
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn answers_about_regions_are_read_or_refused(bytes in answer()) {
        if let Ok((info, _)) = RegionInfo::from_vfio(&bytes) {
            for area in info.areas.iter().flatten() {
                prop_assert!(area.start < area.end);
            }
        }
    }

    #[test]
    fn layouts_cover_the_region_and_map_only_what_was_allowed(
        config in config(),
        size in prop_oneof![1u64..=0x40000, any::<u64>(), u64::MAX - 0x3000..=u64::MAX],
        areas in proptest::option::of(vec((offset(), offset()), 0..6)),
    ) {
        let areas = areas.map(|areas| {
            areas.iter().map(|&(start, len)| start..start.saturating_add(len)).collect::<Vec<_>>()
        });
        let mut info = RegionInfo::mappable(size);
        info.areas = areas.clone();
        let memory = MemoryDevice::new(0x40000).unwrap();
        let device = Device::new(Arc::new(Hostile { config, info, memory }));
        let Ok(bar) = device.bar(0) else { return Ok(()) };
        let mut reached = 0;
        for span in bar.layout().spans() {
            prop_assert_eq!(span.range.start, reached);
            prop_assert!(span.range.end > reached);
            reached = span.range.end;
        }
        prop_assert_eq!(reached, size);
        for part in bar.layout().mappable() {
            prop_assert!(part.start % PAGE == 0);
            prop_assert!(part.end % PAGE == 0 || part.end == size);
            if let Some(areas) = &areas {
                let inside = |at: u64| areas.iter().any(|area| area.contains(&at));
                prop_assert!(inside(part.start) && inside(part.end - 1));
            }
            let window = bar.map(part.clone(), Placement::Anywhere);
            prop_assert!(window.is_ok_and(|window| window.region_range() == part));
        }
    }
}
