//! The whole memory of a virtual machine, for DMA.
//!
//! `unsafe` is here because memory is passed by address. The memory of a guest was mapped by `vm-memory`, is
//! only accessed through raw pointers, and stays mapped while its regions are held.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use super::dma::{DmaMapping, DmaSpace};
use super::dma_placement::IovaPlacement;
use super::iova::Iova;
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};

/// A guest's memory, mapped for a device at its guest-physical addresses. Dropping this unmaps all of it.
#[derive(Debug)]
#[must_use = "dropping it unmaps the memory for the device"]
pub struct GuestMapping {
    regions: Vec<DmaMapping>,
}

impl GuestMapping {
    /// The regions, in the order of the back end.
    pub fn regions(&self) -> &[DmaMapping] {
        &self.regions
    }
}

impl DmaSpace {
    /// Maps all of a guest's memory for the device, at the guest-physical addresses. The addresses that the
    /// guest's driver gives to the device are then correct. All regions are mapped, or none. They stay mapped
    /// in this process while the device reaches them, even if `memory` is dropped.
    ///
    /// A shared region with a file is mapped by the file if the transport can
    /// ([`DmaMapping::mapped_by`]): iommufd since Linux 6.13, and a vfio-user server. For the latter a descriptor of
    /// the file stays open as long as the mapping.
    ///
    /// Memory that is added to a running guest is mapped by a second call, with the new regions alone
    /// (`GuestMemoryMmap::from_arc_regions`). Devices that share an address space share the mapping: map the
    /// memory once, and keep the mapping until all of them are closed.
    ///
    /// # Errors
    /// As [`map`](Self::map), for the first region that fails: one outside the ranges of the IOMMU, which
    /// exclude the addresses of interrupts (0xfee0_0000 on x86), or one that does not consist of whole pages.
    /// `Unsupported` for a region from a raw pointer (`MmapRegion::build_raw`): nothing keeps it mapped.
    /// [`map_guest_backend`](Self::map_guest_backend) accepts it, because its caller promises that it stays
    /// mapped.
    pub fn map_guest<B>(&self, memory: &GuestMemoryMmap<B>, access: Access) -> Result<GuestMapping>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let regions = memory.iter().map(|region| {
            let mapping = region.get_mmap();
            if !mapping.owned() {
                let object = format!("guest memory at {:#x}", region.start_addr().0);
                return Err(Error::new(ErrorKind::Unsupported, "map for DMA", object)
                    .with_reason(
                        "its region was made from a raw pointer, and does not keep it mapped",
                    )
                    .with_advice("promise that it stays mapped: DmaSpace::map_guest_backend"));
            }
            // Private pages do not belong to the file. What this process may only read no device writes.
            let shared = mapping.flags() & libc::MAP_SHARED != 0;
            let writable = access == Access::ReadOnly || mapping.prot() & libc::PROT_WRITE != 0;
            let limits = self.limits();
            let by_file = shared && (limits.by_file || writable && limits.maps_files);
            let file = self.shared_file(region.file_offset().filter(|_| by_file))?;
            let address = mapping.as_ptr() as usize;
            // SAFETY: `mapping` owns the range, which vm-memory mapped for it alone, and keeps it mapped.
            // vm-memory's safe methods make no reference to its contents. They load and store by atomic or
            // volatile accesses, and copy more than a word by `ptr::copy_nonoverlapping` of bytes, for which
            // any value is valid, and each of which is read once. The guest's processors write this memory at
            // any time, and vm-memory is made for that; a device does the same.
            let memory = unsafe { DmaMemory::new(address, mapping.size(), file, mapping) };
            Ok((region.start_addr().0, memory))
        });
        self.map_regions(regions, access)
    }

    /// [`map_guest`](Self::map_guest) for any back end. The kernel maps all regions by their addresses: a region does
    /// not tell whether it is shared, and the pages of a private one are not the file's. A vfio-user server gets the
    /// files.
    ///
    /// # Errors
    /// As [`map_guest`](Self::map_guest); `Unsupported` if a region is not mapped in this process.
    ///
    /// # Safety
    /// While `memory` lives, each region is mapped as one range that starts at its host address. Nothing makes
    /// a reference to its contents, and all reads and writes are atomic or volatile accesses: a device changes
    /// the contents at any time. If a region names a file, its pages are those of the file, and another process
    /// may write them at any later time, even after all of it was unmapped and dropped: a vfio-user server may
    /// keep the file mapped for ever. So they never become Rust's again, as for [`DmaMemory::new`].
    pub unsafe fn map_guest_backend<M>(
        &self,
        memory: Arc<M>,
        access: Access,
    ) -> Result<GuestMapping>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        let regions = memory.iter().map(|region| {
            let start = region.start_addr().0;
            let address = region.get_host_address(MemoryRegionAddress(0)).map_err(|error| {
                Error::new(
                    ErrorKind::Unsupported,
                    "map for DMA",
                    format!("guest memory at {start:#x}"),
                )
                .with_reason(format!("it has no address in this process: {error}"))
            })?;
            // Not `maps_files`: a back end does not say which of its regions are private.
            let by_file = self.limits().by_file;
            let file = self.shared_file(region.file_offset().filter(|_| by_file))?;
            let owner: Arc<dyn Any + Send + Sync> = memory.clone();
            let size = usize::try_from(region.len()).unwrap_or(usize::MAX);
            // SAFETY: the caller guarantees it.
            Ok((start, unsafe { DmaMemory::new(address as usize, size, file, owner) }))
        });
        self.map_regions(regions, access)
    }

    /// Maps each region at its address. After an error, the regions that were already mapped are unmapped.
    fn map_regions(
        &self,
        regions: impl Iterator<Item = Result<(u64, DmaMemory)>>,
        access: Access,
    ) -> Result<GuestMapping> {
        let map = |region: Result<(u64, DmaMemory)>| {
            let (start, memory) = region?;
            let mut mapping = self.map(memory, IovaPlacement::At(Iova(start)), access)?;
            if !self.limits().by_file {
                mapping.forget_file();
            }
            Ok(mapping)
        };
        Ok(GuestMapping { regions: regions.map(map).collect::<Result<_>>()? })
    }

    /// The file of a region, as a descriptor of its own. `None` if there is no room for one, and the transport can map
    /// the memory without it.
    fn shared_file(&self, file: Option<&FileOffset>) -> Result<Option<(Arc<OwnedFd>, u64)>> {
        let Some(file) = file else { return Ok(None) };
        match file.file().try_clone() {
            Ok(own) => Ok(Some((Arc::new(OwnedFd::from(own)), file.start()))),
            Err(_) if !self.limits().by_file => Ok(None),
            Err(error) => Err(Error::io(&error, "duplicate", "a guest's memory file")),
        }
    }
}
