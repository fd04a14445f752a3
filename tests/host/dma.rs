//! Memory for DMA, with a transport that answers by a script.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::ftruncate;
use vfio_remap::device::{BufferRequest, DmaArray, DmaBuffer, Iova, IovaPlacement};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{AddressSpaceId, DeviceInfo, DmaLimits, Transport};
use vfio_remap::{Device, Error, ErrorKind, Result};

use crate::support::alone::alone;
use crate::support::scripted::Scripted;
use crate::support::without_regions::without_regions;

/// A buffer with a mapping of its own.
fn own(size: usize) -> BufferRequest {
    BufferRequest::new(size).own_mapping()
}

#[test]
fn memory_that_is_unmapped_short_stays_the_devices() {
    let transport = Arc::new(Scripted::default());
    let space = Device::new(transport.clone()).dma().unwrap();
    let here = IovaPlacement::At(Iova(0x10_0000));
    let buffer = space.buffer_with(BufferRequest::new(4096).placement(here)).unwrap();
    let address = buffer.as_ptr() as usize;
    let short = Error::new(ErrorKind::Os, "unmap from DMA", "0x1000 bytes at IOVA 0x100000")
        .with_reason("the kernel unmapped 0x0 bytes");
    transport.unmaps.lock().unwrap().push(Some(short));
    drop(buffer);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps.contains(&format!("{address:x}-")), "the device may still write to it");
    assert_eq!(space.mapping_count(), 1);
    let again = space.buffer_with(BufferRequest::new(4096).placement(here));
    assert_eq!(again.unwrap_err().kind(), ErrorKind::AddressTaken);
    // Others come and go as ever.
    drop(space.buffer(4096).unwrap());
    assert_eq!(transport.mapped(), [(0x10_0000, 0x1000)]);
}

#[test]
fn memory_elsewhere_that_stays_mapped_keeps_its_addresses() {
    let mut limits = Scripted::default().dma_limits().unwrap();
    limits.translated = false;
    let transport = Arc::new(Scripted::with_limits(limits));
    let device = Device::new(transport.clone());
    let space = device.dma().unwrap();
    transport.unmaps.lock().unwrap().push(Some(Error::new(ErrorKind::Os, "unmap", "a page")));
    let elsewhere = IovaPlacement::At(Iova(0x10_0000));
    let refused = space.buffer_with(BufferRequest::new(4096).placement(elsewhere)).unwrap_err();
    assert!(refused.to_string().contains("the memory is at"), "{refused}");
    assert_eq!((transport.mapped().len(), space.mapping_count()), (1, 1));
    let buffer = space.buffer(4096).unwrap();
    assert_eq!(transport.mapped().len(), 2, "at addresses of its own");

    let held = device.close().unwrap_err();
    let words = "held by 2 DMA mappings at IOVA 0x100000000..=0x100001fff, its DMA space";
    assert!(held.to_string().contains(words), "{held}");
    drop(buffer);
    assert_eq!((transport.mapped().len(), space.mapping_count()), (1, 1));
}

/// Where nothing translates a device's addresses, memory is where it is.
#[test]
fn memory_that_wraps_past_the_last_address_is_refused() {
    let mut limits = Scripted::default().dma_limits().unwrap();
    limits.translated = false;
    let last_page = u64::MAX - 0xfff;
    let physical = Some(last_page);
    let transport = Arc::new(Scripted { physical, ..Scripted::with_limits(limits) });
    let space = Device::new(transport.clone()).dma().unwrap();
    for placement in [IovaPlacement::default(), IovaPlacement::At(Iova(last_page))] {
        let request = BufferRequest::new(8192).placement(placement);
        let error = space.buffer_with(request).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
        assert_eq!((transport.mapped(), space.mapping_count()), (vec![], 0));
    }
    let (first, second) = space.buffer(4096).unwrap().split_at(4095).unwrap();
    assert_eq!((first.iova(), second.iova()), (Iova(last_page), Iova(u64::MAX)));
}

#[test]
fn devices_of_one_address_space_take_from_one_stock() {
    // It takes two thousand descriptors.
    alone(|| {
        let space = Some(AddressSpaceId::unique());
        let transport = || Arc::new(Scripted { space, ..Scripted::default() });
        let [one, other] = [(); 2].map(|()| transport());
        let devices = [&one, &other].map(|transport| Device::new(transport.clone()));
        let [first, second] = [&devices[0], &devices[1]].map(|device| device.dma().unwrap());
        let held: Vec<_> = (0..2000).map(|_| first.buffer_with(own(4096)).unwrap()).collect();
        let taken = IovaPlacement::At(held[9].iova());
        let error = second.buffer_with(BufferRequest::new(4096).placement(taken)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddressTaken, "{error}");
        let theirs = second.buffer_with(own(4096)).unwrap();
        assert!(one.mapped().iter().all(|(iova, _)| *iova != theirs.iova().0), "{theirs:?}");
        assert_eq!((first.mapping_count(), second.mapping_count()), (2000, 1));
        let [first_device, second_device] = devices;
        let held_by = second_device.close().unwrap_err();
        let words =
            "1 of the DMA mappings at IOVA 0x100000000..=0x1007d0fff, which other devices share";
        assert!(held_by.to_string().contains(words), "{held_by}");
        drop((held, theirs, first, second, one, other));
        first_device.close().unwrap();
    });
}

#[test]
fn neighbours_who_have_mapped_much_are_mapped_around() {
    const PAGE: u64 = 4096;
    // A thousand pages and more from the first address on that is offered, 28 TiB, and all but a page.
    let all = (1u64 << 48) - 1;
    for (taken, most) in [
        ((1 << 32)..=(1 << 32) + 1500 * PAGE - 1, 12),
        ((1 << 32)..=(1 << 32) + (28 << 40) - 1, 40),
        (0..=all - PAGE, 128),
    ] {
        let neighbours = vec![taken.clone()];
        let transport = Arc::new(Scripted { neighbours, ..Scripted::default() });
        let space = Device::new(transport.clone()).dma().unwrap();
        let buffer = space.buffer_with(own(PAGE as usize)).unwrap();
        assert!(!taken.contains(&buffer.iova().0), "{buffer:?}");
        let refused = transport.refused.load(Ordering::Relaxed);
        assert!(refused <= most, "{refused} questions around {taken:x?}");
        // Nothing else is taken of the stock.
        drop(buffer);
        assert_eq!(format!("{space:?}"), "DmaSpace(0 mappings, 2 free ranges)");
    }
}

#[test]
fn what_is_mapped_elsewhere_keeps_to_limit_and_alignment() {
    let neighbours = vec![0..=0x1ff_ffff, 1 << 32..=(1 << 32) + 0xffff];
    let transport = Arc::new(Scripted { neighbours, ..Scripted::default() });
    let space = Device::new(transport.clone()).dma().unwrap();
    let placement = IovaPlacement::below_bits(28).aligned(1 << 16);
    let buffer = space.buffer_with(BufferRequest::new(4096).placement(placement)).unwrap();
    assert!((0x200_0000..=0xfff_ffff).contains(&buffer.iova().0), "{buffer:?}");
    assert_eq!(buffer.iova().0 % (1 << 16), 0);
    assert_ne!(transport.refused.load(Ordering::Relaxed), 0);
}

#[test]
fn untranslated_memory_is_where_it_may_be_or_refused() {
    let mut limits = Scripted::default().dma_limits().unwrap();
    limits.translated = false;
    let at = |physical, alignment, limit| {
        let limits = limits.clone();
        let physical = Some(physical);
        let transport = Arc::new(Scripted { physical, ..Scripted::with_limits(limits) });
        let placement = IovaPlacement::up_to(limit).aligned(alignment);
        let request = BufferRequest::new(4096).placement(placement);
        Device::new(transport).dma().unwrap().buffer_with(request).map_err(|error| error.kind())
    };
    assert_eq!(at(0x3000, 0x1000, 0xffff).unwrap().iova(), Iova(0x3000));
    assert_eq!(at(0x3000, 0x2000, 0xffff).unwrap_err(), ErrorKind::OutOfRange);
    assert_eq!(at(0x10_0000, 0x1000, 0xffff).unwrap_err(), ErrorKind::OutOfRange);
}

#[test]
fn memory_of_no_whole_pages_of_the_iommu_is_refused() {
    let small = Device::new(Arc::new(Scripted::default())).dma().unwrap();
    let limits = DmaLimits::new(vec![0..=(1 << 39) - 1], 16 << 10);
    let large = Device::new(Arc::new(Scripted::with_limits(limits))).dma().unwrap();
    // Of the right size at the wrong address, or the other way round.
    for size in [4 << 10, 16 << 10] {
        let buffers: Vec<_> = (0..16).map(|_| small.buffer(size).unwrap()).collect();
        for memory in buffers.iter().map(DmaBuffer::memory) {
            let whole = (memory.address() | size).is_multiple_of(16 << 10);
            let mapped = large.map(memory, IovaPlacement::default(), Access::ReadWrite);
            let kind = mapped.map(drop).map_err(|error| error.kind());
            assert_eq!(kind, if whole { Ok(()) } else { Err(ErrorKind::Unaligned) });
        }
    }
}

#[test]
fn a_space_that_neighbours_have_filled_says_so() {
    let neighbours = vec![0..=u64::MAX];
    let transport = Arc::new(Scripted { neighbours, ..Scripted::default() });
    let space = Device::new(transport.clone()).dma().unwrap();
    let error = space.buffer_with(own(4096)).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::AddressTaken, Some(libc::EEXIST)));
    let refused = transport.refused.load(Ordering::Relaxed);
    let words = format!("all {refused} addresses that were tried are mapped by others");
    assert!(refused <= 256 && error.to_string().contains(&words), "{error}");
    assert!(error.advice().contains("IovaPlacement::At"), "{error}");
    assert_eq!(format!("{space:?}"), "DmaSpace(0 mappings, 2 free ranges)");
}

#[test]
fn a_free_page_in_a_small_space_is_found() {
    let neighbours = vec![0..=0x3_5fff, 0x3_7000..=0xf_ffff];
    let limits = DmaLimits::new(vec![0..=0xf_ffff], 4096);
    let transport = Arc::new(Scripted { neighbours, ..Scripted::with_limits(limits) });
    let space = Device::new(transport).dma().unwrap();
    assert_eq!(space.buffer(4096).unwrap().iova(), Iova(0x3_6000));
}

#[test]
fn low_addresses_are_left_to_devices_of_32_bits() {
    let space = Device::new(Arc::new(Scripted::default())).dma().unwrap();
    let wide = space.buffer(4096).unwrap();
    assert_eq!(wide.iova(), Iova(1 << 32));
    let request = BufferRequest::new(4096).placement(IovaPlacement::below_bits(32));
    let narrow = space.buffer_with(request).unwrap();
    assert!(narrow.iova() < Iova(1 << 32), "{narrow:?}");
    // An IOMMU of 32 bits has no others.
    let limits = DmaLimits::new(vec![0..=u64::from(u32::MAX)], 4096);
    let space = Device::new(Arc::new(Scripted::with_limits(limits))).dma().unwrap();
    assert_eq!(space.buffer(4096).unwrap().iova(), Iova(0x1000));
}

/// An IOMMU, or a server, may have larger pages than this machine.
#[test]
fn buffers_are_aligned_to_the_pages_of_the_iommu() {
    for page in [16 << 10, 64 << 10, 4 << 20] {
        let limits = DmaLimits::new(vec![0..=(1 << 39) - 1], page);
        let transport = Arc::new(Scripted::with_limits(limits));
        let space = Device::new(transport.clone()).dma().unwrap();
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        let buffers: Vec<_> =
            (1..=8).map(|size| space.buffer_with(own(size * 5000)).unwrap()).collect();
        for (number, buffer) in (1..).zip(&buffers) {
            let (address, size) = (buffer.as_ptr() as usize, buffer.size());
            assert_eq!(size as u64, (number * 5000u64).next_multiple_of(page));
            assert_eq!((address as u64 % page, buffer.iova().0 % page), (0, 0));
            // Nothing is left of what was reserved to align it.
            let line = format!("{address:x}-{:x} rw-s", address + size);
            assert!(maps().contains(&line), "{line}: {}", maps());
            buffer.store(size - 4, 7u32);
            assert_eq!(buffer.load::<u32>(size - 4), 7);
        }
        let huge = space.buffer_with(own(1).huge_pages()).unwrap();
        assert_eq!((huge.as_ptr() as u64 % page, huge.iova().0 % page), (0, 0));
    }
    let limits = DmaLimits::new(vec![0..=u64::MAX], 1 << 63);
    let space = Device::new(Arc::new(Scripted::with_limits(limits))).dma().unwrap();
    assert_eq!(space.buffer(1).unwrap_err().kind(), ErrorKind::OutOfRange);
}

/// As many as two tests let their process have.
const DESCRIPTORS: u64 = 64;

#[test]
fn buffers_keep_no_descriptors_that_no_transport_wants() {
    alone(|| {
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).unwrap();
        let mut limits = Scripted::default().dma_limits().unwrap();
        limits.by_file = false;
        let transport = Arc::new(Scripted::with_limits(limits));
        let space = Device::new(transport.clone()).dma().unwrap();
        let buffers: Vec<_> = (0..2000).map(|_| space.buffer_with(own(4096)).unwrap()).collect();
        assert_eq!(space.mapping_count(), buffers.len());
        assert!(transport.files().iter().all(Option::is_none));
        assert!(buffers[0].memory().file().is_none());
    });
}

#[test]
fn files_that_a_transport_maps_are_there_and_not_kept() {
    alone(|| {
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).unwrap();
        let mut limits = Scripted::default().dma_limits().unwrap();
        (limits.by_file, limits.maps_files) = (false, true);
        let transport = Arc::new(Scripted::with_limits(limits));
        let space = Device::new(transport.clone()).dma().unwrap();
        let buffers: Vec<_> = (0..2000).map(|_| space.buffer_with(own(4096)).unwrap()).collect();
        assert_eq!(transport.files().len(), buffers.len());
        assert!(transport.files().iter().all(Option::is_some));
        assert!(buffers[0].memory().file().is_none());
        // Those of a shared mapping, too.
        let shared = space.buffer(4096).unwrap();
        assert!(transport.files().iter().all(Option::is_some));
        assert!(shared.memory().file().is_none() && shared.mapped_by().is_none());
    });
}

#[test]
fn the_limit_on_descriptors_is_named_with_what_raises_it() {
    alone(|| {
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).unwrap();
        let transport = Arc::new(Scripted::default());
        let space = Device::new(transport.clone()).dma().unwrap();
        let mut buffers = Vec::new();
        let error = loop {
            match space.buffer_with(own(4096)) {
                Ok(buffer) => buffers.push(buffer),
                Err(error) => break error,
            }
            assert!(buffers.len() < DESCRIPTORS as usize);
        };
        assert!(transport.files().iter().all(Option::is_some));
        // Whoever gets the file cannot cut it short under the mapping.
        let memory = buffers[0].memory();
        let (file, _) = memory.file().unwrap();
        assert_eq!(ftruncate(file, 0), Err(Errno::EPERM));
        assert_eq!(error.errno(), Some(libc::EMFILE), "{error}");
        let limit = format!(
            "the process has reached its limit of {DESCRIPTORS} open descriptors (RLIMIT_NOFILE)"
        );
        assert!(error.to_string().contains(&limit), "{error}");
        let advice = format!("prlimit --pid {} --nofile=", std::process::id());
        assert!(error.advice().contains(&advice), "{error}");
        buffers.pop();
        buffers.push(space.buffer_with(own(4096)).unwrap());
    });
}

#[test]
fn pages_of_no_power_of_two_are_a_transports_mistake() {
    for page_size in [0, 3000] {
        let limits = DmaLimits::new(vec![0..=0xffff], page_size);
        let device = Device::new(Arc::new(Scripted::with_limits(limits)));
        let error = device.dma().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
        assert!(!error.advice().is_empty(), "{error}");
    }
}

#[test]
fn placements_that_make_no_sense_do_not_reach_the_transport() {
    let transport = Arc::new(Scripted::default());
    let space = Device::new(transport.clone()).dma().unwrap();
    let page = space.buffer(4096).unwrap();
    let taken = transport.mapped();
    let anywhere = |alignment, limit| IovaPlacement::up_to(limit).aligned(alignment);
    for (placement, kind) in [
        (IovaPlacement::At(Iova(0xfee0_0000)), ErrorKind::OutOfRange),
        (IovaPlacement::At(Iova(0xfedf_f800)), ErrorKind::Unaligned),
        (IovaPlacement::At(Iova(1 << 48)), ErrorKind::OutOfRange),
        (IovaPlacement::At(Iova(u64::MAX - 0xfff)), ErrorKind::OutOfRange),
        (IovaPlacement::At(page.iova()), ErrorKind::AddressTaken),
        (anywhere(3, u64::MAX), ErrorKind::Unaligned),
        (anywhere(0, u64::MAX), ErrorKind::Unaligned),
        (anywhere(1, 0xffe), ErrorKind::OutOfRange),
        (anywhere(1 << 63, u64::MAX), ErrorKind::OutOfRange),
    ] {
        let error = space.map(page.memory(), placement, Access::ReadWrite).unwrap_err();
        assert_eq!(error.kind(), kind, "{placement:?}: {error}");
        assert!(!error.advice().is_empty(), "{error}");
        assert_eq!((transport.mapped(), space.mapping_count()), (taken.clone(), 1));
    }
    assert_ne!(page.iova(), Iova(0), "devices take that for none");
    for size in [0, usize::MAX, isize::MAX as usize] {
        let error = space.buffer(size).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
        assert!(!error.advice().is_empty(), "{error}");
    }
}

/// A part ends where the next begins, although both are of one mapping.
#[test]
fn a_part_of_a_buffer_reaches_no_other() {
    let space = Device::new(Arc::new(Scripted::default())).dma().unwrap();
    let whole = space.buffer(4096).unwrap();
    let (first, rest) = whole.split_at(1024).unwrap();
    let (second, third) = rest.split_at(2048).unwrap();
    for part in [&first, &second, &third] {
        let size = part.size();
        let panics = |access: &dyn Fn()| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(access)).is_err()
        };
        part.store(size - 8, u64::MAX);
        part.write(size - 1, &[7]);
        part.read(0, &mut vec![0; size]);
        assert!(panics(&|| _ = part.load::<u8>(size)));
        assert!(panics(&|| _ = part.load::<u64>(size - 4)));
        assert!(panics(&|| _ = part.load::<u8>(usize::MAX)));
        assert!(panics(&|| part.store(size, 0u32)));
        assert!(panics(&|| part.store_release(size, 0u32)));
        assert!(panics(&|| part.read(size, &mut [0])));
        assert!(panics(&|| part.read(1, &mut vec![0; size])));
        assert!(panics(&|| part.write(size - 1, &[0; 2])));
        assert!(panics(&|| part.write(usize::MAX, &[0; 2])));
    }
    assert_eq!((first.iova().0 + 1024, second.iova().0 + 2048), (second.iova().0, third.iova().0));
    assert_eq!(second.load::<u64>(0), 0, "nothing was written past the first");
}

fn until(done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "the other thread has stopped");
        std::thread::yield_now();
    }
}

/// A ring in memory, as virtio has it: no register tells of its entries. A processor that keeps stores in
/// order by itself, as x86 does, cannot show that the order is asked for; one that does not, does.
#[test]
fn what_is_published_in_memory_is_there_as_soon_as_the_flag_is() {
    const ROUNDS: u64 = 2000;
    let space = Device::new(Arc::new(Scripted::default())).dma().unwrap();
    let ring = DmaArray::<u64, 8>::new(space.buffer(4096).unwrap()).unwrap();
    let used = space.buffer(4096).unwrap();
    let last = ring.len() - 1;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                ring.store_entry(0, [round; 8]);
                ring.store_release(last, 7, round);
                until(|| used.load::<u64>(8) == round);
                assert_eq!(used.load::<u32>(0), round as u32);
            }
        });
        for round in 1..=ROUNDS {
            until(|| ring.load(last, 7) == round);
            assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(|word| ring.load(0, word)), [round; 8]);
            used.store(0, round as u32);
            used.store_release(8, round);
        }
    });
}

/// Everything is taken, and each answer takes its time.
#[derive(Debug, Default)]
struct Occupied {
    asked: AtomicU32,
}

impl Transport for Occupied {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("occupied", 0)
    }

    without_regions!();

    fn dma_limits(&self) -> Result<DmaLimits> {
        Ok(DmaLimits::new(vec![0..=u64::MAX], 4096))
    }

    fn dma_map(&self, _: u64, _: &DmaMemory, _: Access) -> Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(100));
        Err(Error::new(ErrorKind::AddressTaken, "map for DMA", "it"))
    }
}

#[test]
fn a_search_for_free_addresses_has_a_time_limit() {
    let transport = Arc::new(Occupied::default());
    let space = Device::new(transport.clone()).dma().unwrap();
    let error = space.buffer_with(own(4096)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddressTaken, "{error}");
    assert_eq!(space.mapping_count(), 0);
    // All would be 256, in 26 seconds.
    let asked = transport.asked.load(Ordering::Relaxed);
    assert!((2..=25).contains(&asked), "it was asked {asked} times");
}
