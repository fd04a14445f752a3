//! The memory of a virtual machine, all of it, for DMA.
//!
//! `unsafe` is here because memory is named by its address: that of a guest is what `vm-memory` has mapped
//! for it, is only ever reached through raw pointers, and stays mapped while its regions are held.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::any::Any;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use super::dma::{DmaMapping, DmaSpace, IovaPlacement};
use super::iova::Iova;
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};

/// A guest's memory that a device reaches at its guest-physical addresses. Dropping it takes all of it
/// away from the device again.
#[derive(Debug)]
pub struct GuestMapping {
    regions: Vec<DmaMapping>,
}

impl GuestMapping {
    /// Its regions, in the order in which the back end gives them.
    pub fn regions(&self) -> &[DmaMapping] {
        &self.regions
    }
}

impl DmaSpace {
    /// Lets the device reach all of a guest's memory, at the guest's physical addresses: what the guest's
    /// driver programs is then right as it is. All regions are mapped, or none. They stay mapped in this
    /// process as long as the device reaches them, whatever becomes of `memory`.
    ///
    /// # Errors
    /// As [`map`](Self::map), for the first region that it answers: one that lies where the IOMMU maps
    /// nothing, such as the addresses of its interrupts (0xfee0_0000 on x86), or that is not of whole pages.
    /// `Unsupported` for a region that was made of a raw pointer (`MmapRegion::build_raw`): nothing keeps it
    /// mapped, and only [`map_guest_backend`](Self::map_guest_backend) takes a promise that somebody does.
    pub fn map_guest<B>(&self, memory: &GuestMemoryMmap<B>, access: Access) -> Result<GuestMapping>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let regions = memory.iter().map(|region| {
            let mapping = region.get_mmap();
            if !mapping.owned() {
                let object = format!("guest memory at {:#x}", region.start_addr().0);
                return Err(Error::new(ErrorKind::Unsupported, "map for DMA", object)
                    .because("its region is of a raw pointer, and does not keep it mapped")
                    .remedy("vouch for it: DmaSpace::map_guest_backend"));
            }
            // Private pages are not the file's.
            let shared = mapping.flags() & libc::MAP_SHARED != 0;
            let by_file = shared && self.limits().by_file;
            let file = region.file_offset().filter(|_| by_file).map(shared_file).transpose()?;
            let address = mapping.as_ptr() as usize;
            // SAFETY: `mapping` owns the range, which vm-memory has mapped for it alone, and keeps it
            // mapped. vm-memory's safe methods make no reference to its contents: they load and store by
            // atomic or volatile accesses, and copy more than a word by `ptr::copy_nonoverlapping`, of bytes,
            // for which any value is valid, and of which each is taken once. Against a device that writes
            // meanwhile that is what it is against the guest's processors, for which vm-memory is made.
            let memory = unsafe { DmaMemory::new(address, mapping.size(), file, mapping) };
            Ok((region.start_addr().0, memory))
        });
        self.map_regions(regions, access)
    }

    /// The same for any back end.
    ///
    /// # Errors
    /// As [`map_guest`](Self::map_guest); `Unsupported` where a region is not mapped in this process.
    ///
    /// # Safety
    /// As long as `memory` lives, each region is mapped in one piece from its host address on. Nothing ever
    /// makes a reference to its contents, and what reads or writes them does so by atomic or volatile
    /// accesses: a device changes them at any time. Where a region names a file, it is that file's pages.
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
                .because(format!("it has no address in this process: {error}"))
            })?;
            let by_file = self.limits().by_file;
            let file = region.file_offset().filter(|_| by_file).map(shared_file).transpose()?;
            let owner: Arc<dyn Any + Send + Sync> = memory.clone();
            let size = usize::try_from(region.len()).unwrap_or(usize::MAX);
            // SAFETY: the caller vouches for it.
            Ok((start, unsafe { DmaMemory::new(address as usize, size, file, owner) }))
        });
        self.map_regions(regions, access)
    }

    /// Maps each region at its address; an error drops those that were mapped before it.
    fn map_regions(
        &self,
        regions: impl Iterator<Item = Result<(u64, DmaMemory)>>,
        access: Access,
    ) -> Result<GuestMapping> {
        let map = |region: Result<(u64, DmaMemory)>| {
            let (start, memory) = region?;
            self.map(memory, IovaPlacement::At(Iova(start)), access)
        };
        Ok(GuestMapping { regions: regions.map(map).collect::<Result<_>>()? })
    }
}

/// The file of a region, by a descriptor of our own.
fn shared_file(file: &FileOffset) -> Result<(Arc<OwnedFd>, u64)> {
    let own = file.file().try_clone().map(File::into);
    let own: OwnedFd =
        own.map_err(|error| Error::io(&error, "duplicate", "a guest's memory file"))?;
    Ok((Arc::new(own), file.start()))
}
