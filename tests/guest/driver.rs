//! DMA and interrupts with real devices.

use std::sync::Arc;
use std::time::Duration;

use vfio_remap::device::{BufferRequest, Growth, Interrupt, Iova, IovaPlacement};
use vfio_remap::space::Access;
use vfio_remap::transport::Vfio;
use vfio_remap::{Device, Error, ErrorKind};

use crate::{interrupts_in_turn, lab, leftovers};
use vfio_remap_edu::{DEVICE_BUFFER, Direction, Edu};

#[test]
fn edu_computes_and_copies_by_intx_and_by_msi() {
    for interrupt in [Interrupt::Intx, Interrupt::Msi] {
        leftovers::none_of(|| {
            let edu = Edu::new(Device::open(lab::address("edu")).unwrap(), interrupt).unwrap();
            assert_eq!(edu.id().unwrap(), lab::EDU_ID);
            assert_eq!(edu.liveness(0x1234).unwrap(), !0x1234);
            assert_eq!(edu.factorial_polled(10).unwrap(), 3_628_800);
            assert_eq!(edu.factorial(12).unwrap(), 479_001_600);
            for _ in 0..100 {
                edu.ring().unwrap();
            }
            let pattern: Vec<u8> = (0..4096u32).map(|n| (n * 7 + 3) as u8).collect();
            edu.buffer().write(0, &pattern);
            edu.there_and_back(0, 4096, 4096).unwrap();
            let mut back = vec![0; 4096];
            edu.buffer().read(4096, &mut back);
            assert_eq!(back, pattern, "{interrupt:?}");
            edu.close().unwrap();
        });
    }
}

#[test]
fn edu_interrupts_by_intx_before_and_after_msi() {
    leftovers::none_of(|| {
        let device = lab::open("edu");
        interrupts_in_turn::intx_works_before_and_after_msi(&device);
        device.close().unwrap();
    });
}

/// igb's software interrupts (Intel 82576 datasheet, §8.8): each vector fires when its bit of EICS is set.
struct Igb {
    device: Device,
    window: vfio_remap::Window,
}

impl Igb {
    fn new() -> Self {
        let device = lab::open("igb");
        device.config().unwrap().set_bus_mastering(true).unwrap();
        let window = lab::map_all(&device, 0);
        let igb = Self { device, window };
        igb.write(0x1514, 0xc000_0011);
        igb.write(0x152c, 0x1ff);
        igb.write(0x1524, 0x1ff);
        igb
    }

    fn write(&self, offset: usize, value: u32) {
        self.window.register::<u32>(offset).unwrap().write(value);
    }

    fn fire(&self, vector: u32) {
        self.write(0x1520, 1 << vector);
        self.write(0x1524, 0x1ff);
    }

    fn close(self) {
        drop(self.window);
        self.device.close().unwrap();
    }
}

#[test]
fn no_msix_interrupt_is_lost_while_vectors_are_added() {
    const PATIENCE: Duration = Duration::from_secs(10);
    let igb = Igb::new();
    let mut vectors = igb.device.vectors(Interrupt::MsiX, 3).unwrap();
    for round in 0..10_000u32 {
        if round == 5_000 {
            let growth = vectors.grow(5).unwrap();
            let expected = match lab::kernel().as_str() {
                "5.10" | "6.1" => Growth::Reenabled,
                _ => Growth::InPlace,
            };
            assert_eq!(growth, expected);
            if growth == Growth::Reenabled {
                // Each was signalled once, so that nobody misses what fired meanwhile.
                for vector in 0..5 {
                    assert_eq!(vectors.take(vector).unwrap(), Some(1));
                }
            }
        }
        let vector = (round as usize) % vectors.count();
        igb.fire(vector as u32);
        assert_eq!(vectors.wait(vector, PATIENCE).unwrap(), 1, "round {round}, vector {vector}");
    }
    // A hole neither fires nor disturbs the others.
    vectors.set_enabled(1, false).unwrap();
    igb.fire(2);
    assert_eq!(vectors.wait(2, PATIENCE).unwrap(), 1);
    assert_eq!(vectors.take(1).unwrap_err().kind(), ErrorKind::OutOfRange);
    vectors.set_enabled(1, true).unwrap();
    igb.fire(1);
    assert_eq!(vectors.wait(1, PATIENCE).unwrap(), 1);
    vectors.trigger(3).unwrap();
    assert_eq!(vectors.wait(3, PATIENCE).unwrap(), 1);
    drop(vectors);
    igb.close();
}

/// edu's registers for its interrupt: raise, status, acknowledge (QEMU, docs/specs/edu).
const RAISE: u64 = 0x60;
const STATUS: u64 = 0x24;
const ACKNOWLEDGE: u64 = 0x64;

#[test]
fn an_intx_is_unmasked_by_an_eventfd_as_a_hypervisor_does_it() {
    let device = lab::open("edu");
    let bar = device.bar(0).unwrap();
    let register = |offset| bar.trapped_register::<u32>(offset).unwrap();
    let mut vectors = device.vectors(Interrupt::Intx, 1).unwrap();
    assert!(vectors.resample_fd().is_none());
    vectors.enable_resample().unwrap();
    vectors.enable_resample().unwrap();
    let wait = |time| vectors.wait(0, time).unwrap();
    let unmask = || {
        nix::unistd::write(vectors.resample_fd().unwrap(), &1u64.to_ne_bytes()).unwrap();
    };
    for round in 0..100 {
        register(RAISE).write(1).unwrap();
        assert_eq!(wait(Duration::from_secs(10)), 1, "round {round}");
        // What is still asserted fires again, and nothing does while it is masked.
        register(RAISE).write(2).unwrap();
        assert_eq!(vectors.take(0).unwrap(), None);
        unmask();
        assert_eq!(wait(Duration::from_secs(10)), 1, "round {round}");
        assert_eq!(register(STATUS).read().unwrap(), 3);
        register(ACKNOWLEDGE).write(3).unwrap();
        unmask();
        assert_eq!(vectors.take(0).unwrap(), None);
    }
    drop(vectors);
    let mut vectors = device.vectors(Interrupt::Msi, 1).unwrap();
    let error = vectors.enable_resample().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(!error.advice().is_empty(), "{error}");
    drop(vectors);
    device.close().unwrap();
}

#[test]
fn without_bus_mastering_only_an_intx_comes() {
    let device = lab::open("edu");
    let config = device.config().unwrap();
    assert!(!config.bus_mastering().unwrap(), "VFIO opens a device with it off");
    let bar = device.bar(0).unwrap();
    let register = |offset| bar.trapped_register::<u32>(offset).unwrap();
    let request = BufferRequest::new(4096).placement(IovaPlacement::below_bits(28));
    let buffer = device.dma().unwrap().buffer_with(request).unwrap();
    for (kind, mastering) in
        [(Interrupt::Msi, false), (Interrupt::Intx, false), (Interrupt::Msi, true)]
    {
        config.set_bus_mastering(mastering).unwrap();
        let vectors = device.vectors(kind, 1).unwrap();
        buffer.write(0, &[0x5a; 4]);
        for (offset, value) in
            [(0x80, DEVICE_BUFFER as u32), (0x88, buffer.iova().0 as u32), (0x90, 4)]
        {
            register(offset).write(value).unwrap();
            register(offset + 4).write(0).unwrap();
        }
        // Go, to memory, with an interrupt at the end.
        register(0x98).write(1 | 2 | 4).unwrap();
        while register(0x98).read().unwrap() & 1 != 0 {}
        match vectors.wait(0, Duration::from_millis(500)) {
            Ok(count) => {
                assert_eq!((count, mastering || kind == Interrupt::Intx), (1, true), "{kind}")
            }
            Err(error) => {
                assert_eq!((error.kind(), mastering), (ErrorKind::TimedOut, false), "{error}");
                assert!(error.advice().contains("set_bus_mastering"), "{error}");
                assert_eq!(kind, Interrupt::Msi);
            }
        }
        let mut found = [0; 4];
        buffer.read(0, &mut found);
        assert_eq!(found == [0x5a; 4], !mastering, "{kind:?}");
        register(ACKNOWLEDGE).write(u32::MAX).unwrap();
    }
    drop(buffer);
    device.close().unwrap();
}

#[test]
fn interrupts_that_a_device_does_not_have_are_refused_by_count() {
    let device = lab::open("edu");
    let refused = |kind, count| device.vectors(kind, count).unwrap_err();
    for (kind, count, words) in [
        (Interrupt::MsiX, 1, "has no MSI-X"),
        (Interrupt::Msi, 1000, "the device has"),
        (Interrupt::Intx, 0, "the device has 1"),
    ] {
        let error = refused(kind, count);
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        assert!(error.to_string().contains(words), "{error}");
        assert!(!error.advice().is_empty(), "{error}");
    }
    let mut msi = device.vectors(Interrupt::Msi, 1).unwrap();
    for vector in [1, usize::MAX] {
        assert!(msi.fd(vector).is_none());
        for refused in [
            msi.take(vector).map(drop),
            msi.wait(vector, Duration::from_secs(1)).map(drop),
            msi.trigger(vector),
            msi.set_masked(vector, true),
            msi.set_enabled(vector, false),
        ] {
            let error = refused.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
            assert!(error.to_string().contains("there are 1"), "{error}");
            assert!(!error.advice().is_empty(), "{error}");
        }
    }
    for count in [0, 1, 1000] {
        assert_eq!(msi.grow(count).unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    msi.trigger(0).unwrap();
    assert_eq!(msi.wait(0, Duration::from_secs(1)).unwrap(), 1, "it is what it was");
    for kind in [Interrupt::Intx, Interrupt::Msi] {
        let error = device.vectors(kind, 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    }
    let error = device.close().unwrap_err();
    assert!(error.to_string().contains("1 vectors of MSI"), "{error}");
}

#[test]
fn iovas_follow_the_iommu_and_bad_ones_are_refused() {
    let device = lab::open("edu");
    let space = device.dma().unwrap();
    let limits = space.limits().clone();
    assert!(limits.ranges.iter().all(|range| !range.contains(&0xfee0_0000)), "{limits:?}");
    let buffer = |placement| space.buffer_with(BufferRequest::new(4096).placement(placement));
    let refused = |placement, kind: ErrorKind, words: &str| {
        let error: Error = leftovers::none_of(|| buffer(placement).map(|_| ()).unwrap_err());
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    refused(IovaPlacement::At(Iova(0xfee0_0000)), ErrorKind::OutOfRange, "the IOMMU maps");
    refused(IovaPlacement::At(Iova(u64::MAX - 0xfff)), ErrorKind::OutOfRange, "the IOMMU maps");
    refused(IovaPlacement::At(Iova(1)), ErrorKind::Unaligned, "pages of");
    refused(IovaPlacement::below_bits(8), ErrorKind::OutOfRange, "no free range");
    let here = buffer(IovaPlacement::At(Iova(0x10_0000))).unwrap();
    refused(IovaPlacement::At(Iova(0x10_0000)), ErrorKind::AddressTaken, "mapped already");
    assert_eq!(here.iova(), Iova(0x10_0000));
    let identity = buffer(IovaPlacement::SameAsAddress).unwrap();
    assert_eq!(identity.iova().0, identity.as_ptr() as u64);
    let error = space.buffer(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    let (first, second) = here.split_at(1024).unwrap();
    assert_eq!((second.iova(), second.size()), (Iova(0x10_0400), 3072));
    drop((first, second));
    assert_eq!(buffer(IovaPlacement::At(Iova(0x10_0000))).unwrap().iova(), Iova(0x10_0000));
}

#[test]
fn sixty_thousand_mappings_live_at_once() {
    let device = lab::open("edu");
    let space = device.dma().unwrap();
    let buffer = space.buffer(4096).unwrap();
    // The same page again and again: what is counted is mappings.
    let memory = buffer.memory();
    let mappings: Vec<_> = (0..60_000)
        .map(|_| space.map(memory.clone(), IovaPlacement::default(), Access::ReadOnly).unwrap())
        .collect();
    assert_eq!(space.mapping_count(), 60_001);
    drop(mappings);
    assert_eq!(space.mapping_count(), 1);
}

#[test]
fn the_iommu_stops_dma_outside_of_mappings() {
    const SIZE: usize = 8192;
    const HOLE: u64 = 0x10_0000;
    let edu = Edu::new(Device::open(lab::address("edu")).unwrap(), Interrupt::Msi).unwrap();
    // Neighbours that end where the hole begins and begin where it ends, as the device sees them.
    let space = edu.dma().unwrap();
    let at = |iova| BufferRequest::new(SIZE).placement(IovaPlacement::At(Iova(iova)));
    let below = space.buffer_with(at(HOLE - SIZE as u64)).unwrap();
    let above = space.buffer_with(at(HOLE + 4096)).unwrap();
    let marked = [(edu.buffer(), 0x5a), (&below, 0xb1), (&above, 0xa7)];
    for (buffer, mark) in marked {
        buffer.write(0, &[mark; SIZE]);
    }
    // What the device holds is found nowhere in memory.
    edu.buffer().write(0, &[0xed; 4096]);
    edu.transfer(edu.buffer().iova().0, DEVICE_BUFFER, 4096, Direction::ToDevice).unwrap();
    edu.buffer().write(0, &[0x5a; 4096]);
    // From the device to all of the hole, and from there to the device. A thread of the kernel's reports each fault,
    // later: each is waited for.
    {
        let _expected = lab::Expected::announce("DMAR: [DMA Write");
        edu.transfer(DEVICE_BUFFER, HOLE, 4096, Direction::ToMemory).unwrap();
    }
    {
        let _expected = lab::Expected::announce("DMAR: [DMA Read");
        edu.transfer(HOLE, DEVICE_BUFFER, 4096, Direction::ToDevice).unwrap();
    }
    for (buffer, mark) in marked {
        let mut bytes = vec![0; SIZE];
        buffer.read(0, &mut bytes);
        let changed = bytes.iter().position(|byte| *byte != mark);
        assert_eq!(changed, None, "memory at {} was changed", buffer.iova());
    }
    drop((below, above, space));
    edu.close().unwrap();
}

/// Opens a device by its group, although the kernel may offer a file of its own.
fn by_group(name: &str) -> Device {
    let device =
        Device::new(Arc::new(Vfio::options().by_group().open(lab::address(name)).unwrap()));
    device.config().unwrap().set_memory_decoding(true).unwrap();
    device
}

#[test]
fn a_device_works_by_its_own_file_and_by_its_group() {
    let edu = lab::address("edu");
    let by_group = Edu::new(by_group("edu"), Interrupt::Msi).unwrap();
    assert_eq!(by_group.factorial(5).unwrap(), 120);
    by_group.close().unwrap();
    if lab::kernel() != "patched" {
        let error = leftovers::none_of(|| Vfio::options().by_cdev().open(edu).unwrap_err());
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("CONFIG_VFIO_DEVICE_CDEV"), "{error}");
        return;
    }
    leftovers::none_of(|| {
        let device = Device::new(Arc::new(Vfio::options().by_cdev().open(edu).unwrap()));
        let by_cdev = Edu::new(device, Interrupt::Msi).unwrap();
        by_cdev.there_and_back(0, 4096, 4096).unwrap();
        by_cdev.close().unwrap();
        // Two devices in one address space: what one has mapped is taken for the other.
        let first = Vfio::options().by_cdev().open(edu).unwrap();
        let second = Arc::new(Vfio::options().beside(&first).open(lab::address("igb")).unwrap());
        let (first, second) = (Device::new(Arc::new(first)), Device::new(second));
        let at = BufferRequest::new(4096).placement(IovaPlacement::At(Iova(0x10_0000)));
        let buffer = first.dma().unwrap().buffer_with(at).unwrap();
        let error = second.dma().unwrap().buffer_with(at).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddressTaken);
        drop(buffer);
        drop(second.dma().unwrap().buffer_with(at).unwrap());
    });
}

/// Four are dropped in every order; events go with the window, and a second mapping of the buffer's memory
/// goes with the vectors.
#[test]
fn dropping_in_every_order_leaves_nothing() {
    let mut orders = Vec::new();
    permute(&mut vec![0, 1, 2, 3], 0, &mut orders);
    for order in orders {
        leftovers::none_of(|| {
            let device = lab::open("edu");
            let space = device.dma().unwrap();
            let free = format!("{space:?}");
            let window = lab::map_all(&device, 0);
            let buffer = space.buffer(4096).unwrap();
            let memory = buffer.memory();
            let mapping = space.map(memory, IovaPlacement::default(), Access::ReadOnly).unwrap();
            let vectors = device.vectors(Interrupt::Msi, 1).unwrap();
            let events = device.events().unwrap();
            let mut parts: [Option<Box<dyn std::any::Any>>; 4] = [
                Some(Box::new(device)),
                Some(Box::new((window, events))),
                Some(Box::new((mapping, vectors))),
                Some(Box::new(buffer)),
            ];
            for part in order {
                parts[part] = None;
            }
            assert_eq!(
                format!("{space:?}"),
                free,
                "no mapping, and all addresses free in one piece"
            );
        });
    }
}

fn permute(items: &mut Vec<usize>, at: usize, orders: &mut Vec<Vec<usize>>) {
    if at == items.len() {
        orders.push(items.clone());
    }
    for other in at..items.len() {
        items.swap(at, other);
        permute(items, at + 1, orders);
        items.swap(at, other);
    }
}
