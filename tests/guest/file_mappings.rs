//! Memory that has a file is mapped by it through iommufd (Linux 6.13).

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::request_code_none;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use vfio_bindings::bindings::vfio::VFIO_TYPE;
use vfio_remap::device::{BufferRequest, GuestMapping, Interrupt};
use vfio_remap::space::Access;
use vfio_remap::transport::{MappedBy, Vfio};
use vfio_remap::{Device, Placement, poll_until};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::{lab, leftovers};
use vfio_remap_edu::{DEVICE_BUFFER, Direction, Edu};

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const HUGE: usize = 2 << 20;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn memory_file(flags: MFdFlags, size: usize) -> File {
    let file = File::from(memfd_create("guest-vfio-remap", MFdFlags::MFD_CLOEXEC | flags).unwrap());
    file.set_len(size as u64).unwrap();
    file
}

fn region(
    at: u64,
    file: Option<FileOffset>,
    size: usize,
    protection: i32,
    flags: i32,
) -> GuestRegionMmap {
    let mapping = MmapRegion::build(file, size, protection, flags).unwrap();
    GuestRegionMmap::new(mapping, GuestAddress(at)).unwrap()
}

fn ways_of(mapping: &GuestMapping) -> Vec<MappedBy> {
    mapping.regions().iter().map(|region| region.mapped_by().unwrap()).collect()
}

#[test]
fn memory_with_a_file_is_mapped_by_it() {
    let has_iommufd = lab::kernel() == "patched";
    let mut ways = vec![(Vfio::options().by_group(), MappedBy::Address)];
    if has_iommufd {
        ways.push((Vfio::options().by_cdev(), MappedBy::File));
    }
    let _pool = lab::Setting::set(POOL, 4);
    for (way, by_file) in ways {
        leftovers::none_of(|| {
            let device = Device::new(Arc::new(way.open(lab::address("edu")).unwrap()));
            let space = device.dma().unwrap();
            // Buffers: of a shared mapping, of one of their own, of huge pages.
            for request in [
                BufferRequest::new(4096),
                BufferRequest::new(4096).own_mapping(),
                BufferRequest::new(HUGE).huge_pages(),
            ] {
                let buffer = space.buffer_with(request).unwrap();
                assert_eq!(buffer.mapped_by(), Some(by_file));
                assert!(buffer.memory().file().is_none(), "no descriptor is kept");
            }
            // A guest's memory: without a file; shared and private of one, from its second page on; of huge pages;
            // of a file that may only be read.
            let file = Arc::new(memory_file(MFdFlags::empty(), 3 * 4096));
            let part = || Some(FileOffset::from_arc(file.clone(), 4096));
            let huge = FileOffset::new(memory_file(MFdFlags::MFD_HUGETLB, HUGE), 0);
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let read_only = FileOffset::new(File::open(path).unwrap(), 0);
            let (shared, private) = (libc::MAP_SHARED, libc::MAP_PRIVATE);
            let memory = GuestMemoryMmap::from_regions(vec![
                region(0, None, 0x2000, RW, private | libc::MAP_ANONYMOUS),
                region(0x10_0000, part(), 0x2000, RW, shared),
                region(0x20_0000, part(), 0x2000, RW, private),
                region(0x40_0000, Some(huge), HUGE, RW, shared),
                region(0x80_0000, Some(read_only), 0x1000, libc::PROT_READ, shared),
            ])
            .unwrap();
            // The last one may not be written by the device either.
            space.map_guest(&memory, Access::ReadWrite).unwrap_err();
            let mapping = space.map_guest(&memory, Access::ReadOnly).unwrap();
            let a = MappedBy::Address;
            assert_eq!(ways_of(&mapping), [a, by_file, a, by_file, by_file]);
            drop(mapping);

            let (memory, _) = memory.remove_region(GuestAddress(0x80_0000), 0x1000).unwrap();
            let mapping = space.map_guest(&memory, Access::ReadWrite).unwrap();
            assert_eq!(ways_of(&mapping), [a, by_file, a, by_file]);
            // All are the pages that the processor has.
            let edu = Edu::new(device, Interrupt::Msi).unwrap();
            let regions = [0x1000, 0x10_1000, 0x20_1000, 0x40_1000u64];
            for (at, value) in regions.into_iter().zip(0x1111u32..) {
                memory.write_obj(value, GuestAddress(at)).unwrap();
                edu.transfer(at, DEVICE_BUFFER, 4, Direction::ToDevice).unwrap();
                edu.transfer(DEVICE_BUFFER, at + 8, 4, Direction::ToMemory).unwrap();
                let copy: u32 = memory.read_obj(GuestAddress(at + 8)).unwrap();
                assert_eq!(copy, value, "at {at:#x}");
            }
            drop((mapping, space));
            edu.close().unwrap();
            drop(memory);
        });
    }
}

#[test]
fn memory_added_to_a_running_guest_is_reached() {
    for way in [Vfio::options().by_group(), Vfio::options()] {
        leftovers::none_of(|| {
            let device = Device::new(Arc::new(way.open(lab::address("edu")).unwrap()));
            let space = device.dma().unwrap();
            let first = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
            let mapping = space.map_guest(&first, Access::ReadWrite).unwrap();
            let edu = Edu::new(device, Interrupt::Msi).unwrap();
            first.write_obj(0x600d_0001u32, GuestAddress(0)).unwrap();
            // Without a file, and with one; they come and go while the rest stays.
            for file in [None, Some(FileOffset::new(memory_file(MFdFlags::empty(), 0x2000), 0))] {
                let mut flags = libc::MAP_SHARED;
                if file.is_none() {
                    flags |= libc::MAP_ANONYMOUS;
                }
                let added = Arc::new(region(0x10_0000, file, 0x2000, RW, flags));
                let all = first.insert_region(added.clone()).unwrap();
                let added = GuestMemoryMmap::from_arc_regions(vec![added]).unwrap();
                let hotplugged = space.map_guest(&added, Access::ReadWrite).unwrap();
                edu.transfer(0, DEVICE_BUFFER, 4, Direction::ToDevice).unwrap();
                edu.transfer(DEVICE_BUFFER, 0x10_1000, 4, Direction::ToMemory).unwrap();
                let copy: u32 = all.read_obj(GuestAddress(0x10_1000)).unwrap();
                assert_eq!(copy, 0x600d_0001);
                drop(hotplugged);
            }
            drop((mapping, space));
            edu.close().unwrap();
        });
    }
}

/// Where an heir waits for the files of [`maps_and_goes`].
const HEIR: &[u8] = b"vfio-remap-heir";
/// Set if it also maps memory that has no file.
const ANONYMOUS: &str = "LAB_ANONYMOUS";

fn heir() -> SocketAddr {
    SocketAddr::from_abstract_name(HEIR).unwrap()
}

#[test]
fn what_is_mapped_by_its_file_outlives_the_process() {
    if lab::kernel() != "patched" {
        return lab::skipped("this kernel has no iommufd");
    }
    for anonymous in [false, true] {
        leftovers::none_of(|| {
            let listener = UnixListener::bind_addr(&heir()).unwrap();
            let environment = [(ANONYMOUS, anonymous.to_string())];
            assert!(lab::child("file_mappings::maps_and_goes", &environment, None).success());
            let [device, iommufd, file] = received(&listener.accept().unwrap().0);
            // It is gone. The device still reaches the file's pages.
            // SAFETY: the file is that of the device, which an IOMMU confines.
            let vfio = unsafe { Vfio::from_fd(device, Some(lab::address("edu"))) }.unwrap();
            let device = Device::new(Arc::new(vfio));
            let file = File::from(file);
            file.write_all_at(b"left by the process before", 0).unwrap();
            transfer(&device, LEFT, DEVICE_BUFFER, Direction::ToDevice);
            transfer(&device, DEVICE_BUFFER, LEFT + 4096, Direction::ToMemory);
            let mut copy = [0; 26];
            file.read_exact_at(&mut copy, 4096).unwrap();
            assert_eq!(&copy, b"left by the process before");
            // The kernel lets this process take the mappings over if all have files.
            assert_eq!(take_over(&iommufd), if anonymous { Err(Errno::EINVAL) } else { Ok(()) });
            device.close().unwrap();
        });
    }
}

/// Where the memory is that is left.
const LEFT: u64 = 0x10_0000;

#[test]
#[ignore = "a child of the test above"]
fn maps_and_goes() {
    let device =
        Device::new(Arc::new(Vfio::options().by_cdev().open(lab::address("edu")).unwrap()));
    device.config().unwrap().set_memory_decoding(true).unwrap();
    device.config().unwrap().set_bus_mastering(true).unwrap();
    let file = Arc::new(memory_file(MFdFlags::empty(), 0x2000));
    let part = Some(FileOffset::from_arc(file.clone(), 0));
    let mut regions = vec![region(LEFT, part, 0x2000, RW, libc::MAP_SHARED)];
    if std::env::var(ANONYMOUS).is_ok_and(|it| it == "true") {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        regions.push(region(2 * LEFT, None, 0x1000, RW, flags));
    }
    let memory = GuestMemoryMmap::from_regions(regions).unwrap();
    let mapping = device.dma().unwrap().map_guest(&memory, Access::ReadWrite).unwrap();
    assert_eq!(ways_of(&mapping)[0], MappedBy::File);
    let iommufd = fs::read_dir("/proc/self/fd").unwrap().flatten().find(|entry| {
        fs::read_link(entry.path()).is_ok_and(|target| target.ends_with("dev/iommu"))
    });
    let iommufd: i32 = iommufd.unwrap().file_name().to_str().unwrap().parse().unwrap();
    let socket = UnixStream::connect_addr(&heir()).unwrap();
    let vfio = device.transport_as::<Vfio>().unwrap().as_fd().as_raw_fd();
    let files = [vfio, iommufd, file.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&files)];
    let byte = [IoSlice::new(b"x")];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None).unwrap();
    // Unmapped by nobody.
    std::mem::forget((mapping, device));
}

fn received(socket: &UnixStream) -> [OwnedFd; 3] {
    let mut byte = [0];
    let mut byte = [IoSliceMut::new(&mut byte)];
    let mut room = nix::cmsg_space!([i32; 3]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message =
        recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut byte, Some(&mut room), flags).unwrap();
    let files = message.cmsgs().unwrap().find_map(|message| match message {
        ControlMessageOwned::ScmRights(files) => Some(files),
        _ => None,
    });
    let files: [i32; 3] = files.unwrap().try_into().unwrap();
    // SAFETY: the kernel has just made them for this process.
    files.map(|file| unsafe { OwnedFd::from_raw_fd(file) })
}

/// `IOMMU_IOAS_CHANGE_PROCESS` (Linux 6.13).
fn take_over(iommufd: &OwnedFd) -> Result<(), Errno> {
    // Its size, and a reserved word.
    let argument = [8u32, 0];
    let number = request_code_none!(VFIO_TYPE, 0x92);
    // SAFETY: the structure is as long as its size says.
    Errno::result(unsafe { libc::ioctl(iommufd.as_raw_fd(), number, argument.as_ptr()) }).map(drop)
}

/// A transfer of a page by edu, driven by its bare registers: this process has no DMA space of it.
fn transfer(device: &Device, source: u64, destination: u64, direction: Direction) {
    let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    let write = |at: usize, value: u64| window.register::<u64>(at).unwrap().write(value);
    write(0x80, source);
    write(0x88, destination);
    write(0x90, 4096);
    let start = 1 | u64::from(direction == Direction::ToMemory) << 1;
    write(0x98, start);
    let command = window.register::<u64>(0x98).unwrap();
    let running = || command.read() & 1;
    poll_until("the transfer", Duration::from_secs(30), running, |running| *running == 0).unwrap();
}
