//! The limits of DMA: locked memory, the number of mappings, huge pages; and a guest's memory.

use std::os::unix::fs::chown;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vfio_remap::device::{BufferRequest, DmaBuffer, Interrupt, IovaPlacement};
use vfio_remap::space::Access;
use vfio_remap::transport::{MemoryDevice, Transport, Vfio};
use vfio_remap::{Device, ErrorKind, Placement};

use crate::{guest_memory, lab, leftovers};
use vfio_remap_edu::{Direction, Edu};

const NOBODY: u32 = 65534;

#[test]
fn guest_memory_is_mapped_whole_or_not_at_all() {
    leftovers::none_of(|| guest_memory::is_reached_whole_or_not_at_all(lab::open("edu")));
}

#[test]
fn the_limit_on_locked_dma_memory_is_named() {
    // By its group, and by its own file where there is one, the device is given to nobody.
    let group = lab::sysfs("edu").iommu_group().unwrap();
    let mut files = vec![(format!("/dev/vfio/{group}"), "dma::by_group_nobody_locks_too_much")];
    if lab::kernel() == "patched" {
        let own =
            std::fs::read_dir(format!("/sys/bus/pci/devices/{}/vfio-dev", lab::address("edu")))
                .unwrap();
        let own = own.flatten().next().unwrap().file_name();
        let file = format!("/dev/vfio/devices/{}", own.display());
        files.push((file, "dma::by_cdev_nobody_locks_too_much"));
        chown("/dev/iommu", Some(NOBODY), None).unwrap();
    }
    for (file, test) in files {
        chown(&file, Some(NOBODY), None).unwrap();
        let status = lab::child(test, &[], Some(NOBODY));
        chown(&file, Some(0), None).unwrap();
        assert!(status.success(), "{test}: {status}");
    }
}

#[test]
#[ignore = "a child of the test above: it runs as nobody"]
fn by_group_nobody_locks_too_much() {
    locks_too_much(|| Vfio::options().by_group().open(lab::address("edu")).unwrap());
}

#[test]
#[ignore = "a child of the test above: it runs as nobody"]
fn by_cdev_nobody_locks_too_much() {
    locks_too_much(|| Vfio::options().by_cdev().open(lab::address("edu")).unwrap());
}

fn locks_too_much(open: impl Fn() -> Vfio) {
    const LIMIT: usize = 64 << 10;
    setrlimit(Resource::RLIMIT_MEMLOCK, LIMIT as u64, LIMIT as u64).unwrap();
    leftovers::none_of(|| {
        let device = Device::new(Arc::new(open()));
        let space = device.dma().unwrap();
        let refused = |size: usize, need: usize| {
            let error = leftovers::none_of(|| space.buffer(size).map(|_| ()).unwrap_err());
            assert_eq!(error.kind(), ErrorKind::LockedMemory, "{error}");
            for words in [
                format!("{need} bytes of memory locked, and may have {LIMIT}"),
                format!("prlimit --pid {} --memlock={need}", std::process::id()),
            ] {
                assert!(error.to_string().contains(&words), "{error}");
            }
        };
        refused(LIMIT + 4096, LIMIT + 4096);
        // What has been mapped counts, and what was unmapped does not.
        for _ in 0..3 {
            let half = space.buffer(LIMIT / 2).unwrap();
            refused(LIMIT / 2 + 4096, LIMIT + 4096);
            let rest = space.buffer(LIMIT / 2).unwrap();
            refused(4096, LIMIT + 4096);
            drop((half, rest));
        }
        // A limit that has changed is asked for again.
        setrlimit(Resource::RLIMIT_MEMLOCK, 4096, LIMIT as u64).unwrap();
        let error = space.buffer(8192).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockedMemory, "{error}");
        setrlimit(Resource::RLIMIT_MEMLOCK, LIMIT as u64, LIMIT as u64).unwrap();
        drop(space.buffer(8192).unwrap());
    });
}

/// What a process of `nobody_locks_all_there_is` may lock, in bytes.
const LOCKABLE: usize = 4 << 20;

/// Small buffers have all that may be locked, in few mappings.
#[test]
fn what_may_be_locked_is_shared_out_to_the_last_page() {
    let group = lab::sysfs("edu").iommu_group().unwrap();
    let file = format!("/dev/vfio/{group}");
    chown(&file, Some(NOBODY), None).unwrap();
    // The child inherits it. It may not raise it itself: on Linux 5.10 it would have 64 KiB.
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    setrlimit(Resource::RLIMIT_MEMLOCK, LOCKABLE as u64, LOCKABLE as u64).unwrap();
    let status = lab::child("dma::nobody_locks_all_there_is", &[], Some(NOBODY));
    setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard).unwrap();
    chown(&file, Some(0), None).unwrap();
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "a child of the test above: it runs as nobody"]
fn nobody_locks_all_there_is() {
    leftovers::none_of(|| {
        let device =
            Device::new(Arc::new(Vfio::options().by_group().open(lab::address("edu")).unwrap()));
        let space = device.dma().unwrap();
        assert_eq!(space.limits().lockable_bytes, Some(LOCKABLE as u64));
        for _ in 0..2 {
            let buffers: Vec<_> =
                (0..LOCKABLE / 4096).map(|_| space.buffer(4096).unwrap()).collect();
            assert!(space.mapping_count() < 64, "{space:?}");
            let error = space.buffer(4096).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::LockedMemory, "{error}");
            drop(buffers);
            assert_eq!(space.mapping_count(), 0);
            drop(space.buffer(LOCKABLE).unwrap());
        }
    });
}

#[test]
fn there_may_be_more_buffers_than_descriptors() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    leftovers::none_of(|| {
        let device = lab::open("edu");
        setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
        let space = device.dma().unwrap();
        let own = BufferRequest::new(4096).own_mapping();
        let buffers: Vec<_> = (0..1100).map(|_| space.buffer_with(own)).collect();
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        let buffers: Vec<_> = buffers.into_iter().map(Result::unwrap).collect();
        assert!(buffers[0].memory().file().is_none());
        // The IOMMU has 39 bits or more, and no other device wants those above 32.
        assert!(buffers.iter().all(|buffer| buffer.iova().0 >> 32 == 1));
    });
}

#[test]
fn the_limit_on_dma_mappings_is_named_and_reached_again() {
    const LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    const MOST: u32 = 100;
    leftovers::none_of(|| {
        let _limit = lab::Setting::set(LIMIT, MOST);
        let device =
            Device::new(Arc::new(Vfio::options().by_group().open(lab::address("edu")).unwrap()));
        let space = device.dma().unwrap();
        assert_eq!(space.limits().available_mappings, Some(MOST));
        let buffer = space.buffer(4096).unwrap();
        let map = || space.map(buffer.memory(), IovaPlacement::default(), Access::ReadOnly);
        let mut mappings: Vec<_> = (1..MOST).map(|_| map().unwrap()).collect();
        for _ in 0..2 {
            let error = map().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TooManyMappings, "{error}");
            assert!(error.to_string().contains(&format!("has {MOST} mappings")), "{error}");
            assert!(error.advice().contains("dma_entry_limit"), "{error}");
            mappings.pop();
            mappings.push(map().unwrap());
        }
        assert_eq!(space.mapping_count(), MOST as usize);
    });
}

#[test]
fn mapped_memory_of_others_is_kept_until_it_is_unmapped() {
    let maps = |address: usize| {
        std::fs::read_to_string("/proc/self/maps").unwrap().contains(&format!("{address:x}-"))
    };
    for unmapped in [true, false] {
        leftovers::none_of(|| {
            let vfio = Vfio::open(lab::address("edu")).unwrap();
            let model = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
            let window = model.bar(0).unwrap().map(0..4096, Placement::Anywhere).unwrap();
            let memory = window.dma_memory();
            let address = memory.address();
            vfio.dma_map(0x1000, &memory, Access::ReadWrite).unwrap();
            drop((window, memory, model));
            assert!(maps(address), "the device may still write to it");
            if unmapped {
                vfio.dma_unmap(0x1000, 4096).unwrap();
                assert!(!maps(address));
            }
            drop(vfio);
            assert!(!maps(address));
        });
    }
}

/// What a transport's user has not unmapped it unmaps when it is dropped, but not in a child of `fork(2)`.
#[test]
fn a_child_that_drops_a_transport_unmaps_nothing_of_its_parents() {
    leftovers::none_of(|| {
        let model = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
        let window = model.bar(0).unwrap().map(0..4096, Placement::Anywhere).unwrap();
        let mut vfio = Some(Vfio::open(lab::address("edu")).unwrap());
        let map = |vfio: &Option<Vfio>| {
            vfio.as_ref().unwrap().dma_map(0x1000, &window.dma_memory(), Access::ReadWrite)
        };
        map(&vfio).unwrap();
        // SAFETY: tests run one at a time, so that no other thread holds a lock; the child drops and ends.
        match unsafe { libc::fork() } {
            0 => {
                drop(vfio.take());
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(0) };
            }
            child => {
                let mut status = -1;
                // SAFETY: waits for our own child.
                assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
                assert_eq!(status, 0);
            }
        }
        let error = map(&vfio).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddressTaken, "{error}");
        vfio.as_ref().unwrap().dma_unmap(0x1000, 4096).unwrap();
        drop(vfio);
    });
}

#[test]
fn huge_pages_are_used_or_the_buffer_says_why_not() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    const HUGE: usize = 2 << 20;
    let device = lab::open("edu");
    let space = device.dma().unwrap();
    // edu has 28 address bits.
    let request =
        BufferRequest::new(HUGE + 1).placement(IovaPlacement::below_bits(28)).huge_pages();
    let made = |pages: u32| -> DmaBuffer {
        let _pool = lab::Setting::set(POOL, pages);
        space.buffer_with(request).unwrap()
    };
    let ordinary = made(0);
    assert!(!ordinary.has_huge_pages());
    assert_eq!(ordinary.size(), HUGE + 4096);
    let refused = ordinary.huge_pages_refused().unwrap();
    assert_eq!(refused.errno(), Some(libc::ENOMEM), "{refused}");
    assert!(refused.to_string().contains("sysctl vm.nr_hugepages=2"), "{refused}");
    drop(ordinary);

    let huge = made(2);
    assert!(huge.has_huge_pages() && huge.huge_pages_refused().is_none());
    assert_eq!((huge.size(), huge.iova().0 % HUGE as u64), (2 * HUGE, 0));
    huge.write(HUGE - 2048, &[0x77; 4096]);
    let base = huge.iova().0;
    let edu = Edu::new(device, Interrupt::Msi).unwrap();
    edu.transfer(base + HUGE as u64 - 2048, 0x4_0000, 4096, Direction::ToDevice).unwrap();
    edu.transfer(0x4_0000, base, 4096, Direction::ToMemory).unwrap();
    let mut bytes = vec![0; 4096];
    huge.read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0x77));
    drop((huge, space));
    edu.close().unwrap();
}

#[test]
fn huge_buffers_share_mappings_and_leave_pages_to_others() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    const HUGE: u64 = 2 << 20;
    let device = lab::open("edu");
    let space = device.dma().unwrap();
    let _pool = lab::Setting::set(POOL, 16);
    let request = BufferRequest::new(1).huge_pages();
    let buffers: Vec<_> = (0..16).map(|_| space.buffer_with(request).unwrap()).collect();
    assert!(buffers.iter().all(DmaBuffer::has_huge_pages), "all are to be had");
    assert!(
        buffers.iter().all(|buffer| (buffer.iova().0 | buffer.size() as u64).is_multiple_of(HUGE))
    );
    assert!(space.mapping_count() < 16, "{space:?}");
    let ordinary = space.buffer_with(request).unwrap();
    assert!(!ordinary.has_huge_pages());
    drop((buffers, ordinary));
    assert_eq!(space.mapping_count(), 0);
}
