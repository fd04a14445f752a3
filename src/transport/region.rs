//! The description of a region, and how VFIO encodes it.

use std::ops::Range;

use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info, vfio_region_info_cap_sparse_mmap,
    vfio_region_sparse_mmap_area,
};

use super::info_reply::InfoReply;
use crate::error::Result;

/// The region indexes of a PCI device (`linux/vfio.h`). BARs have 0 to 5.
pub mod region_index {
    /// The expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
}

/// The size of a region, and what accesses it allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionInfo {
    /// The size in bytes; 0 if the region is not implemented.
    pub size: u64,
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written.
    pub writable: bool,
    /// Whether all or parts of it can be mapped.
    pub mappable: bool,
    /// The byte ranges that can be mapped, if not all of the region can. `None` means no restriction.
    pub areas: Option<Vec<Range<u64>>>,
    /// Whether pages that hold the MSI-X table may be mapped too.
    pub msix_mappable: bool,
}

impl RegionInfo {
    /// A region of `size` bytes that can be read, written and mapped as a whole.
    pub fn mappable(size: u64) -> Self {
        Self { mappable: true, ..Self::trapped(size) }
    }

    /// A region of `size` bytes that can be read and written, but not mapped.
    pub fn trapped(size: u64) -> Self {
        Self { size, readable: true, writable: true, ..Self::default() }
    }

    /// The same region, of which only these byte ranges can be mapped.
    ///
    /// ```
    /// use vfio_remap::transport::RegionInfo;
    ///
    /// // Registers in the first page, which are trapped, and doorbells in the second.
    /// let bar = RegionInfo::trapped(0x2000).with_areas([0x1000..0x2000]);
    /// assert!(bar.mappable);
    /// ```
    #[must_use]
    pub fn with_areas(self, areas: impl Into<Vec<Range<u64>>>) -> Self {
        Self { mappable: true, areas: Some(areas.into()), ..self }
    }

    /// Decodes the reply to `VFIO_DEVICE_GET_REGION_INFO`, a `struct vfio_region_info` with its
    /// capability chain (`linux/vfio.h`; vfio-user sends the same). Returns the description, and the
    /// offset of the region in the device's file.
    ///
    /// Empty areas are left out. Other values are not checked here, but when they are used.
    ///
    /// # Errors
    /// `Malformed` if the reply is too short, or its capability chain loops, points outside the reply, or
    /// claims more areas than the reply holds.
    // Public for the fuzz targets and the property tests, which are other crates.
    #[doc(hidden)]
    pub fn from_vfio(reply: &[u8]) -> Result<(Self, u64)> {
        let reply = InfoReply::new(reply, "region information");
        let flags = reply.u32(std::mem::offset_of!(vfio_region_info, flags))?;
        let first = reply.u32(std::mem::offset_of!(vfio_region_info, cap_offset))?;
        let offset = reply.u64(std::mem::offset_of!(vfio_region_info, offset))?;
        let mut info = Self {
            size: reply.u64(std::mem::offset_of!(vfio_region_info, size))?,
            readable: flags & VFIO_REGION_INFO_FLAG_READ != 0,
            writable: flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
            mappable: flags & VFIO_REGION_INFO_FLAG_MMAP != 0,
            ..Self::default()
        };
        if flags & VFIO_REGION_INFO_FLAG_CAPS != 0 {
            info.read_chain(&reply, first)?;
        }
        Ok((info, offset))
    }

    fn read_chain(&mut self, reply: &InfoReply<'_>, first: u32) -> Result<()> {
        for (id, at) in reply.capabilities(first, size_of::<vfio_region_info>())? {
            match id {
                VFIO_REGION_INFO_CAP_SPARSE_MMAP => self.areas = Some(read_areas(reply, at)?),
                VFIO_REGION_INFO_CAP_MSIX_MAPPABLE => self.msix_mappable = true,
                _ => {}
            }
        }
        Ok(())
    }
}

fn read_areas(reply: &InfoReply<'_>, at: usize) -> Result<Vec<Range<u64>>> {
    const HEADER: usize = size_of::<vfio_region_info_cap_sparse_mmap>();
    const AREA: usize = size_of::<vfio_region_sparse_mmap_area>();
    let count =
        reply.u32(at + std::mem::offset_of!(vfio_region_info_cap_sparse_mmap, nr_areas))? as usize;
    let mut areas = Vec::new();
    for (index, area) in reply.array(at + HEADER, AREA, count)?.enumerate() {
        let start = reply.u64(area)?;
        let size = reply.u64(area + 8)?;
        let end = start
            .checked_add(size)
            .ok_or_else(|| reply.malformed(format!("sparse area {index} wraps around")))?;
        if size != 0 {
            areas.push(start..end);
        }
    }
    Ok(areas)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `vfio_region_info` with these flags, followed by the bytes of its capabilities.
    fn reply(flags: u32, cap_offset: u32, caps: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [32 + caps.len() as u32, flags, 0, cap_offset] {
            bytes.extend(word.to_ne_bytes());
        }
        for word in [0x10000u64, 7 << 40] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(caps);
        bytes
    }

    fn cap(id: u16, next: u32, body: &[u64]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(id.to_ne_bytes());
        bytes.extend(1u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        body.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
        bytes
    }

    #[test]
    fn flags_size_offset_and_both_capabilities_are_read() {
        let mut caps = cap(3, 40, &[]);
        caps.extend(cap(1, 0, &[3, 0, 0x1000, 0x2000, 0, 0x4000, 0x8000]));
        let (info, offset) = RegionInfo::from_vfio(&reply(0xf, 32, &caps)).unwrap();
        assert_eq!((info.size, offset), (0x10000, 7 << 40));
        assert!(info.readable && info.writable && info.mappable && info.msix_mappable);
        assert_eq!(info.areas, Some(vec![0..0x1000, 0x4000..0xc000]), "the empty area is left out");
        let (info, _) = RegionInfo::from_vfio(&reply(0x3, 0, &[])).unwrap();
        assert!(!info.mappable && info.areas.is_none() && !info.msix_mappable);
    }

    #[test]
    fn malformed_chains_are_refused() {
        let reason = |bytes: &[u8]| RegionInfo::from_vfio(bytes).unwrap_err().to_string();
        assert!(reason(&reply(0xf, 32, &cap(3, 32, &[]))).contains("loops"));
        assert!(reason(&reply(0xf, 8, &cap(3, 0, &[]))).contains("within the structure"));
        assert!(reason(&reply(0xf, 4000, &cap(3, 0, &[]))).contains("end before"));
        assert!(reason(&reply(0xf, u32::MAX, &[])).contains("end before"));
        assert!(reason(&reply(0xf, 32, &cap(1, 0, &[2, 0, 0x1000]))).contains("would fit"));
        assert!(reason(&reply(0xf, 32, &cap(1, 0, &[u64::MAX, 0, 1]))).contains("would fit"));
        assert!(reason(&reply(0xf, 32, &cap(1, 0, &[1, u64::MAX, 2]))).contains("wraps"));
        assert!(reason(&reply(0xf, 32, &[1, 0])).contains("end before"));
        assert!(reason(&[]).contains("end before"));
    }
}
