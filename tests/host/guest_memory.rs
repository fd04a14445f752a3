//! Guest memory mapped for DMA as a whole, as `vm-memory` has it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::fstat;
use vfio_remap::emulated::{Edu, Emulated};
use vfio_remap::space::Access;
use vfio_remap::transport::{DmaLimits, Transport};
use vfio_remap::{Device, ErrorKind};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::common::guest_memory;
use crate::support::alone::alone;
use crate::support::scripted::Scripted;

#[test]
fn a_device_reaches_all_of_a_guests_memory_or_none_of_it() {
    let edu = Emulated::new(Edu::new()).unwrap();
    guest_memory::is_reached_whole_or_not_at_all(Device::new(Arc::new(edu)));
}

#[test]
fn a_region_brings_its_file_along_where_its_pages_are_the_files() {
    let transport = Arc::new(Scripted::default());
    let space = Device::new(transport.clone()).dma().unwrap();
    let file = Arc::new(File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap()));
    file.set_len(0x4000).unwrap();
    let inode = fstat(file.as_fd()).unwrap().st_ino;
    let region = |flags, at| {
        let file = FileOffset::from_arc(file.clone(), 0x1000);
        let mapping = MmapRegion::<()>::build(Some(file), 0x2000, 3, flags).unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(at)).unwrap()
    };
    let memory = GuestMemoryMmap::from_regions(vec![
        GuestRegionMmap::from_range(GuestAddress(0), 0x1000, None).unwrap(),
        region(libc::MAP_SHARED, 0x10_0000),
        region(libc::MAP_PRIVATE, 0x20_0000),
    ])
    .unwrap();
    let mapping = space.map_guest(&memory, Access::ReadWrite).unwrap();
    assert_eq!(transport.files(), [None, Some((inode, 0x1000)), None]);
    drop(mapping);
    assert_eq!(transport.mapped(), []);

    let memory = Arc::new(memory);
    // SAFETY: vm-memory's own regions are mapped while they live, and nothing here reads or writes them; the
    // private region's file is not written to, and the transport does nothing with it.
    let mapping = unsafe { space.map_guest_backend(memory.clone(), Access::ReadOnly) }.unwrap();
    assert_eq!(transport.mapped(), [(0, 0x1000), (0x10_0000, 0x2000), (0x20_0000, 0x2000)]);
    assert_eq!(Arc::strong_count(&memory), 4, "each region holds the memory");
    drop(mapping);
    assert_eq!((transport.mapped(), Arc::strong_count(&memory)), (vec![], 1));
}

/// The pages of a private region that were written are not the file's.
#[test]
fn a_back_end_that_may_be_private_is_mapped_by_no_file() {
    let mut limits = Scripted::default().dma_limits().unwrap();
    (limits.by_file, limits.maps_files) = (false, true);
    let transport = Arc::new(Scripted::with_limits(limits));
    let space = Device::new(transport.clone()).dma().unwrap();
    let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(0x1000).unwrap();
    let file = Some(FileOffset::new(file, 0));
    let private = MmapRegion::<()>::build(file, 0x1000, 3, libc::MAP_PRIVATE).unwrap();
    let private = GuestRegionMmap::new(private, GuestAddress(0)).unwrap();
    let memory = Arc::new(GuestMemoryMmap::from_regions(vec![private]).unwrap());
    // SAFETY: vm-memory's region is mapped while it lives, and nothing here reads or writes it; its file is not
    // written to, and the transport does nothing with it.
    let mapping = unsafe { space.map_guest_backend(memory, Access::ReadWrite) }.unwrap();
    assert_eq!(transport.files(), [None]);
    drop(mapping);
}

/// iommufd does not check what a file may be used for.
#[test]
fn a_region_that_is_only_read_is_not_written_by_its_file() {
    let mut limits = Scripted::default().dma_limits().unwrap();
    (limits.by_file, limits.maps_files) = (false, true);
    let transport = Arc::new(Scripted::with_limits(limits));
    let space = Device::new(transport.clone()).dma().unwrap();
    let file = Arc::new(File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap()));
    file.set_len(0x1000).unwrap();
    let region = |protection, at| {
        let file = FileOffset::from_arc(file.clone(), 0);
        let mapping = MmapRegion::<()>::build(Some(file), 0x1000, protection, libc::MAP_SHARED);
        GuestRegionMmap::new(mapping.unwrap(), GuestAddress(at)).unwrap()
    };
    let (read, write) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE);
    let memory =
        GuestMemoryMmap::from_regions(vec![region(read, 0), region(write, 0x1000)]).unwrap();
    for (access, brought) in [(Access::ReadWrite, [false, true]), (Access::ReadOnly, [true; 2])] {
        let mapping = space.map_guest(&memory, access).unwrap();
        assert_eq!(transport.files().iter().map(Option::is_some).collect::<Vec<_>>(), brought);
        drop(mapping);
    }
}

/// As many descriptors as two tests let their process have.
const DESCRIPTORS: u64 = 64;

/// A guest's memory of more regions than that, of one file, and its limits for iommufd.
fn many_regions() -> (GuestMemoryMmap, DmaLimits) {
    let mut limits = Scripted::default().dma_limits().unwrap();
    (limits.by_file, limits.maps_files) = (false, true);
    let file = Arc::new(File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap()));
    file.set_len(0x1000).unwrap();
    let regions = (0..2 * DESCRIPTORS).map(|number| {
        let file = FileOffset::from_arc(file.clone(), 0);
        let mapping = MmapRegion::build(Some(file), 0x1000, 3, libc::MAP_SHARED).unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(number << 12)).unwrap()
    });
    (GuestMemoryMmap::from_regions(regions.collect()).unwrap(), limits)
}

#[test]
fn regions_that_were_mapped_by_their_file_keep_no_descriptor() {
    alone(|| {
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).unwrap();
        let (memory, limits) = many_regions();
        let transport = Arc::new(Scripted::with_limits(limits));
        let space = Device::new(transport.clone()).dma().unwrap();
        let mapping = space.map_guest(&memory, Access::ReadWrite).unwrap();
        assert!(transport.files().iter().all(Option::is_some));
        assert!(mapping.regions().iter().all(|region| region.memory().file().is_none()));
    });
}

#[test]
fn regions_are_mapped_without_a_file_where_no_descriptor_is_left() {
    alone(|| {
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).unwrap();
        let (memory, mut limits) = many_regions();
        let maps_files = Device::new(Arc::new(Scripted::with_limits(limits.clone())));
        limits.by_file = true;
        let needs_files = Device::new(Arc::new(Scripted::with_limits(limits)));
        let [maps_files, needs_files] = [maps_files, needs_files].map(|it| it.dma().unwrap());
        let mut all = Vec::new();
        while let Ok(file) = File::open("/dev/null") {
            all.push(file);
        }
        let mapping = maps_files.map_guest(&memory, Access::ReadWrite).unwrap();
        assert_eq!(mapping.regions().len() as u64, 2 * DESCRIPTORS);
        let error = needs_files.map_guest(&memory, Access::ReadWrite).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EMFILE), "{error}");
        drop(all);
    });
}

#[test]
fn memory_that_is_added_to_a_running_guest_is_mapped_too() {
    let transport = Arc::new(Scripted::default());
    let space = Device::new(transport.clone()).dma().unwrap();
    let first = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let mapping = space.map_guest(&first, Access::ReadWrite).unwrap();
    let added = GuestRegionMmap::from_range(GuestAddress(0x10_0000), 0x2000, None).unwrap();
    let all = first.insert_region(Arc::new(added)).unwrap();
    // Not all again: the old regions have their addresses.
    let error = space.map_guest(&all, Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddressTaken, "{error}");
    let (rest, new) = all.remove_region(GuestAddress(0x10_0000), 0x2000).unwrap();
    let new = GuestMemoryMmap::from_arc_regions(vec![new]).unwrap();
    let added = space.map_guest(&new, Access::ReadWrite).unwrap();
    assert_eq!(transport.mapped(), [(0, 0x1000), (0x10_0000, 0x2000)]);
    drop((added, new, rest));
    assert_eq!(transport.mapped(), [(0, 0x1000)]);
    drop(mapping);
}

#[test]
fn a_region_that_owns_nothing_is_mapped_by_unsafe_alone() {
    let transport = Arc::new(Scripted::default());
    let space = Device::new(transport.clone()).dma().unwrap();
    let owner = MmapRegion::<()>::new(0x1000).unwrap();
    // SAFETY: the range is the owner's, and stays mapped to the end of the test.
    let region = unsafe { MmapRegion::<()>::build_raw(owner.as_ptr(), 0x1000, 3, owner.flags()) };
    let memory = GuestMemoryMmap::from_regions(vec![
        GuestRegionMmap::from_range(GuestAddress(0), 0x1000, None).unwrap(),
        GuestRegionMmap::new(region.unwrap(), GuestAddress(0x10_0000)).unwrap(),
    ])
    .unwrap();
    let error = space.map_guest(&memory, Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.object().contains("0x100000"), "{error}");
    assert!(error.advice().contains("map_guest_backend"), "{error}");
    assert_eq!((transport.mapped(), space.mapping_count()), (vec![], 0));

    // SAFETY: the owner lives longer than the mapping, and nothing here reads or writes the memory.
    let mapping = unsafe { space.map_guest_backend(Arc::new(memory), Access::ReadWrite) }.unwrap();
    assert_eq!(transport.mapped(), [(0, 0x1000), (0x10_0000, 0x1000)]);
    drop((mapping, owner));
}

#[test]
fn regions_that_the_iommu_does_not_map_leave_nothing_mapped() {
    let transport = Arc::new(Scripted::default());
    let space = Device::new(transport.clone()).dma().unwrap();
    for (ranges, kind) in [
        ([(0, 0x1000), (0xfee0_0000, 0x1000)], ErrorKind::OutOfRange),
        ([(0, 0x1000), (0x2000, 0x800)], ErrorKind::Unaligned),
    ] {
        let ranges = ranges.map(|(start, size)| (GuestAddress(start), size));
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let error = space.map_guest(&memory, Access::ReadWrite).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(!error.advice().is_empty(), "{error}");
        assert_eq!((transport.mapped(), space.mapping_count()), (vec![], 0));
    }
}
