//! Several devices in one address space, and the ways to get there.

use std::sync::Arc;

use vfio_remap::device::{BufferRequest, Interrupt, Iova, IovaPlacement};
use vfio_remap::space::Access;
use vfio_remap::transport::{MemoryDevice, Transport, Vfio, VfioOptions};
use vfio_remap::{Device, ErrorKind, Placement};

use crate::{lab, leftovers};
use vfio_remap_edu::{Direction, Edu};

fn ways() -> Vec<VfioOptions<'static>> {
    let mut ways = vec![Vfio::options().by_group()];
    if lab::kernel() == "patched" {
        ways.push(Vfio::options().by_cdev());
    }
    ways
}

#[test]
fn devices_of_several_groups_share_an_address_space() {
    for way in ways() {
        leftovers::none_of(|| {
            let igb = way.open(lab::address("igb")).unwrap();
            let edu = Vfio::options().beside(&igb).open(lab::address("edu")).unwrap();
            let nvme = way.beside(&edu).open(lab::address("nvme")).unwrap();
            let [igb, edu, nvme] = [igb, edu, nvme].map(|vfio| Device::new(Arc::new(vfio)));
            // What one has mapped is taken for the others, and edu reaches it.
            let at = |iova| BufferRequest::new(8192).placement(IovaPlacement::At(Iova(iova)));
            let theirs = igb.dma().unwrap().buffer_with(at(0x10_0000)).unwrap();
            for other in [&edu, &nvme] {
                let error = other.dma().unwrap().buffer_with(at(0x10_0000)).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::AddressTaken, "{error}");
            }
            theirs.write(0, b"written by the processor");
            let edu = Edu::new(edu, Interrupt::Msi).unwrap();
            assert_ne!(edu.buffer().iova(), theirs.iova());
            edu.transfer(theirs.iova().0, 0x4_0000, 4096, Direction::ToDevice).unwrap();
            edu.transfer(0x4_0000, theirs.iova().0 + 4096, 4096, Direction::ToMemory).unwrap();
            let mut copy = [0; 24];
            theirs.read(4096, &mut copy);
            assert_eq!(&copy, b"written by the processor");
            // One leaves; for the others nothing changes. It comes back, and finds what they have mapped.
            nvme.close().unwrap();
            edu.there_and_back(0, 4096, 4096).unwrap();
            edu.close().unwrap();
            drop(theirs);
            igb.close().unwrap();
        });
    }
}

#[test]
fn thousands_of_pages_of_a_neighbour_are_no_obstacle() {
    for way in ways() {
        leftovers::none_of(|| {
            let igb = way.open(lab::address("igb")).unwrap();
            let edu = Arc::new(Vfio::options().beside(&igb).open(lab::address("edu")).unwrap());
            assert!(igb.address_space().is_some());
            assert_eq!(igb.address_space(), edu.address_space());
            let (igb, edu_device) = (Device::new(Arc::new(igb)), Device::new(edu.clone()));
            // Of 32 bits, so that both would be given the same.
            let request =
                BufferRequest::new(4096).placement(IovaPlacement::below_bits(28)).own_mapping();
            let space = igb.dma().unwrap();
            let theirs: Vec<_> = (0..1500).map(|_| space.buffer_with(request).unwrap()).collect();
            let ours = edu_device.dma().unwrap().buffer_with(request).unwrap();
            assert!(theirs.iter().all(|theirs| theirs.iova() != ours.iova()));
            // What was mapped past the stock of addresses is mapped around.
            let first = 1u64 << 32;
            let pages = (0..1100).map(|page| first + page * 4096);
            for iova in pages.clone() {
                edu.dma_map(iova, &ours.memory(), Access::ReadOnly).unwrap();
            }
            let around = space.buffer(4096).unwrap();
            assert!(around.iova().0 >= first + 1100 * 4096, "{around:?}");
            for iova in pages {
                edu.dma_unmap(iova, 4096).unwrap();
            }
            // It reaches what the other has mapped.
            let last = theirs.last().unwrap();
            last.store(0, 0x1234_5678u32);
            drop((ours, edu));
            let edu = Edu::new(edu_device, Interrupt::Msi).unwrap();
            edu.transfer(last.iova().0, 0x4_0000, 4096, Direction::ToDevice).unwrap();
            edu.transfer(0x4_0000, theirs[0].iova().0, 4096, Direction::ToMemory).unwrap();
            assert_eq!(theirs[0].load::<u32>(0), 0x1234_5678);
            edu.close().unwrap();
            drop((theirs, around, space));
            igb.close().unwrap();
        });
    }
}

/// The address space goes on, and with it the other device would go on reaching what nobody keeps any more.
#[test]
fn what_a_device_leaves_mapped_is_unmapped_as_it_leaves() {
    for way in ways() {
        leftovers::none_of(|| {
            let igb = way.open(lab::address("igb")).unwrap();
            let edu = Vfio::options().beside(&igb).open(lab::address("edu")).unwrap();
            let model = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
            let window = model.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
            let memory = window.dma_memory();
            edu.dma_map(0x1000, &memory, Access::ReadWrite).unwrap();
            let error = igb.dma_map(0x1000, &memory, Access::ReadWrite).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AddressTaken, "{error}");
            drop(edu);
            igb.dma_map(0x1000, &memory, Access::ReadWrite).unwrap();
            igb.dma_unmap(0x1000, 4096).unwrap();
        });
    }
}

#[test]
fn a_device_with_its_own_address_space_joins_no_other() {
    let (edu, igb) = (lab::address("edu"), lab::address("igb"));
    leftovers::none_of(|| {
        let alone = Vfio::options().by_group().open(edu).unwrap();
        let other = Vfio::options().by_group().open(igb).unwrap();
        let error = Vfio::options().beside(&other).open(edu).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("an address space of its own"), "{error}");
        drop(alone);
        drop(Vfio::options().beside(&other).open(edu).unwrap());
        let error = Vfio::options().by_cdev().beside(&other).open(edu).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("opened by its group"), "{error}");
    });
    if lab::kernel() == "patched" {
        leftovers::none_of(|| {
            let other = Vfio::options().by_cdev().open(igb).unwrap();
            let error = Vfio::options().by_group().beside(&other).open(edu).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains("opened by iommufd"), "{error}");
        });
    }
}

#[test]
fn a_device_file_is_used_if_there_is_one_else_its_group() {
    let edu = lab::address("edu");
    let held = |what: &str| {
        let files = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        files
            .filter_map(|file| std::fs::read_link(file.path()).ok())
            .any(|file| file.starts_with(what))
    };
    let by_cdev = lab::kernel() == "patched";
    leftovers::none_of(|| {
        let device = Vfio::open(edu).unwrap();
        assert_eq!((held("/dev/iommu"), held("/dev/vfio/vfio")), (by_cdev, !by_cdev));
        // What is open by its group is opened by that once more.
        drop(device);
        let first = Vfio::options().by_group().open(edu).unwrap();
        let second = Vfio::open(edu).unwrap();
        assert!(held("/dev/vfio/vfio") && !held("/dev/iommu"));
        drop((first, second));
    });
    if !by_cdev {
        return;
    }
    // Without iommufd it is the group again, and who insists is told what is missing.
    std::fs::rename("/dev/iommu", "/dev/iommu.away").unwrap();
    let (either, forced) = leftovers::none_of(|| {
        (Vfio::open(edu).map(drop), Vfio::options().by_cdev().open(edu).map(drop))
    });
    std::fs::rename("/dev/iommu.away", "/dev/iommu").unwrap();
    either.unwrap();
    let error = forced.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    for words in ["/dev/iommu", "modprobe iommufd", "by its group"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    // A device that somebody has open by a file of its own.
    leftovers::none_of(|| {
        let _first = Vfio::options().by_cdev().open(edu).unwrap();
        let error = Vfio::options().by_cdev().open(edu).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("fuser"), "{error}");
        let error = Vfio::options().by_group().open(edu).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    });
}
