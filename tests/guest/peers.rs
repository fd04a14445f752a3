//! Peer-to-peer: a device reaches the BAR of another one, by its address through a type 1 container, and by a dma-buf
//! through iommufd.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::request_code_none;
use vfio_bindings::bindings::vfio::VFIO_TYPE;
use vfio_remap::device::{DmaMapping, Interrupt, Iova, IovaPlacement, Outage};
use vfio_remap::space::Access;
use vfio_remap::transport::{MappedBy, Vfio, VfioOptions};
use vfio_remap::{Device, ErrorKind, Placement, Window};

use crate::{lab, leftovers};
use vfio_remap_edu::{DEVICE_BUFFER, Direction, Edu};

/// VET, a register of e1000e that keeps the lower half of what is written to it (Intel 82574 datasheet, §10.2.1.7).
const VET: usize = 0x38;
/// Configuration space and its command register.
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;

/// The ways to open a device on this kernel, and how each maps a BAR for another device.
fn ways() -> Vec<(VfioOptions<'static>, MappedBy)> {
    let mut ways = vec![(Vfio::options().by_group(), MappedBy::Address)];
    if lab::kernel() == "patched" {
        ways.push((Vfio::options().by_cdev(), MappedBy::DmaBuf));
    }
    ways
}

fn open(name: &str, way: VfioOptions<'_>) -> Device {
    let device = Device::new(Arc::new(way.open(lab::address(name)).unwrap()));
    device.config().unwrap().set_memory_decoding(true).unwrap();
    device
}

/// edu, which reaches a window of another device.
struct Reacher {
    edu: Edu,
    mapping: DmaMapping,
}

impl Reacher {
    /// edu reaches `window` at 4 GiB.
    fn new(way: VfioOptions<'_>, window: &Window) -> Self {
        let edu = Edu::new(open("edu", way), Interrupt::Msi).unwrap();
        let mapping = map(&edu, window);
        Self { edu, mapping }
    }

    /// Copies within the window, through edu's buffer.
    fn copy(&self, from: u64, to: u64, size: u64) {
        let base = self.mapping.iova().0;
        self.edu.transfer(base + from, DEVICE_BUFFER, size, Direction::ToDevice).unwrap();
        self.edu.transfer(DEVICE_BUFFER, base + to, size, Direction::ToMemory).unwrap();
    }

    /// What edu reads at `offset` of the window.
    fn read(&self, offset: usize) -> u32 {
        self.edu.buffer().store(0, 0x5a5a_5a5au32);
        let (from, to) = (self.mapping.iova().0 + offset as u64, self.edu.buffer().iova().0);
        self.edu.transfer(from, DEVICE_BUFFER, 4, Direction::ToDevice).unwrap();
        self.edu.transfer(DEVICE_BUFFER, to, 4, Direction::ToMemory).unwrap();
        self.edu.buffer().load(0)
    }

    fn close(self) {
        drop(self.mapping);
        self.edu.close().unwrap();
    }
}

fn map(edu: &Edu, window: &Window) -> DmaMapping {
    let placement = IovaPlacement::At(Iova(1 << 32));
    edu.dma().unwrap().map(window.dma_memory(), placement, Access::ReadWrite).unwrap()
}

#[test]
fn a_device_writes_to_a_bar_of_another_and_reads_it() {
    const PART: usize = 0x20_0000;
    for (way, by) in ways() {
        leftovers::none_of(|| {
            let target = open("ivshmem64m", way);
            let bar = target.bar(2).unwrap();
            // Not its first byte, so that the offset counts.
            let mut window =
                bar.map(0x10_0000..0x10_0000 + PART as u64, Placement::Anywhere).unwrap();
            let (copy, _) = window.duplicate(Placement::Anywhere).unwrap();
            window.relocate(Placement::Anywhere).unwrap();
            let pattern: Vec<u32> = (0..1024u32).map(|n| n.wrapping_mul(0x9e37_79b9)).collect();
            let mut value = 0;
            for window in [&window, &copy] {
                let reacher = Reacher::new(way, window);
                assert_eq!(reacher.mapping.mapped_by(), Some(by));
                window.write_words(0x3000, &pattern).unwrap();
                let last = PART - 4096;
                window.write_words(last, &[0u32; 1024]).unwrap();
                reacher.copy(0x3000, last as u64, 4096);
                let word = |at: usize| window.register::<u32>(at).unwrap().read();
                assert!((0..1024).all(|n| word(last + 4 * n) == pattern[n]));
                // A single register, both ways.
                value += 0x1234_5678;
                window.register(8).unwrap().write(value);
                assert_eq!(reacher.read(8), value);
                reacher.close();
            }
            drop((window, copy));
            target.close().unwrap();
        });
    }
}

#[test]
fn iommufd_reaches_a_bar_of_a_device_opened_by_its_group() {
    if lab::kernel() != "patched" {
        return lab::skipped("this kernel has no iommufd");
    }
    let [(group, _), (own_file, _)] = ways()[..] else { panic!("two ways") };
    for (target_way, way, by) in
        [(group, own_file, MappedBy::DmaBuf), (own_file, group, MappedBy::Address)]
    {
        leftovers::none_of(|| {
            let target = open("ivshmem64m", target_way);
            let window = target.bar(2).unwrap().map(0..0x1000, Placement::Anywhere).unwrap();
            let reacher = Reacher::new(way, &window);
            assert_eq!(reacher.mapping.mapped_by(), Some(by));
            window.register(4).unwrap().write(0xfeed_0001u32);
            assert_eq!(reacher.read(4), 0xfeed_0001);
            reacher.close();
            drop(window);
            target.close().unwrap();
        });
    }
}

/// What takes a device away and brings it back, and says what became of the mapping.
type Away = (&'static str, fn(&Device) -> Option<Outage>);

const AWAY: [Away; 3] = [
    ("a reset", |device| Some(device.reset().unwrap())),
    ("memory decoding that is off", |device| {
        let config = device.config().unwrap();
        config.set_memory_decoding(false).unwrap();
        config.set_memory_decoding(true).unwrap();
        None
    }),
    ("low power", |device| {
        // Linux 5.10 has none.
        match device.low_power() {
            Err(_) if lab::kernel() == "5.10" => {}
            low_power => drop(low_power.unwrap()),
        }
        None
    }),
];

#[test]
fn a_bar_is_reached_again_after_its_device_was_away() {
    for (way, _) in ways() {
        leftovers::none_of(|| {
            let target = open("e1000e", way);
            let window = lab::map_all(&target, 0);
            let reacher = Reacher::new(way, &window);
            let vet = window.register::<u32>(VET).unwrap();
            let mut value = 0x1111;
            let mut reaches = |after: &str| {
                value += 1;
                vet.write(value);
                assert_eq!(reacher.read(VET) & 0xffff, value, "after {after}");
            };
            reaches("nothing");
            // Twice each: what is mapped anew is mapped anew again.
            for (name, away) in AWAY.iter().chain(&AWAY) {
                if let Some(outage) = away(&target) {
                    assert!(outage.is_over() && outage.remapped == 1, "{name}: {outage}");
                }
                target.config().unwrap().set_memory_decoding(true).unwrap();
                reaches(name);
            }
            // A revoked window is mapped when it is restored.
            window.revoke().unwrap();
            let outage = target.reset().unwrap();
            assert_eq!((outage.remapped, outage.lost.len()), (0, 1), "{outage}");
            window.restore().unwrap();
            reaches("a reset, and restored");
            reacher.close();
            drop((vet, window));
            target.close().unwrap();
        });
    }
}

#[test]
fn a_bar_is_reached_again_after_a_hot_reset() {
    for (way, _) in ways() {
        leftovers::none_of(|| {
            let [target, other] = ["twin0", "twin1"].map(|name| open(name, way));
            let window = lab::map_all(&target, 0);
            let reacher = Reacher::new(way, &window);
            let vet = window.register::<u32>(VET).unwrap();
            for value in 0x2000u32..0x2003 {
                vet.write(value);
                assert_eq!(reacher.read(VET) & 0xffff, value);
                let outage = other.hot_reset(&[&target]).unwrap();
                assert!(outage.is_over() && outage.remapped == 1, "{outage}");
                target.config().unwrap().set_memory_decoding(true).unwrap();
            }
            reacher.close();
            drop((vet, window));
            target.close().unwrap();
            other.close().unwrap();
        });
    }
}

/// The windows and the mappings of a device that others have put to sleep are theirs to look after. What iommufd has
/// mapped is empty from then on, and can be replaced.
#[test]
fn what_the_kernel_revoked_is_empty_until_it_is_mapped_anew() {
    const FAULT: &str = "DMAR: [DMA";
    if lab::kernel() != "patched" {
        return lab::skipped("this kernel has no iommufd");
    }
    let way = Vfio::options().by_cdev();
    leftovers::none_of(|| {
        let target = open("e1000e", way);
        let window = lab::map_all(&target, 0);
        let Reacher { edu, mapping } = Reacher::new(way, &window);
        window.register(VET).unwrap().write(0x4321u32);
        // Behind the back of this crate.
        let command = |value: u16| {
            target.transport().write_at(CONFIG, COMMAND, &value.to_le_bytes()).unwrap();
        };
        command(0);
        let refused = edu.dma().unwrap().map(
            window.dma_memory(),
            IovaPlacement::default(),
            Access::ReadWrite,
        );
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Os, "{refused}");
        assert!(refused.advice().contains("set_memory_decoding"), "{refused}");
        command(2);
        let reacher = Reacher { edu, mapping };
        let expected = lab::Expected::announce(FAULT);
        assert_ne!(reacher.read(VET) & 0xffff, 0x4321);
        drop(expected);
        let Reacher { edu, mapping } = reacher;
        drop(mapping);
        let mapping = map(&edu, &window);
        let reacher = Reacher { edu, mapping };
        assert_eq!(reacher.read(VET) & 0xffff, 0x4321);
        reacher.close();
        drop(window);
        target.close().unwrap();
    });
}

#[test]
fn a_window_is_kept_while_it_is_mapped_and_unmapped_after() {
    for (way, _) in ways() {
        leftovers::none_of(|| {
            let target = open("ivshmem64m", way);
            let bar = |device: &Device| {
                device.bar(2).unwrap().map(0..0x1000, Placement::Anywhere).unwrap()
            };
            let window = bar(&target);
            window.register(0).unwrap().write(0x600d_600du32);
            let reacher = Reacher::new(way, &window);
            drop(window);
            assert_eq!(reacher.read(0), 0x600d_600d, "the mapping has the window");
            let target = target.close().unwrap_err().into_device();
            let Reacher { edu, mapping } = reacher;
            let iova = mapping.iova();
            drop(mapping);
            target.close().unwrap();
            // Its address is free, and what is mapped there now is reached and not the BAR.
            edu.buffer().store(4096, 0x0b0f_0b0fu32);
            let (memory, at) = (edu.buffer().memory(), IovaPlacement::At(iova));
            let mapping = edu.dma().unwrap().map(memory, at, Access::ReadOnly).unwrap();
            let reacher = Reacher { edu, mapping };
            assert_eq!(reacher.read(4096), 0x0b0f_0b0f);
            reacher.close();
        });
    }
}

/// Whether an iommufd that has no device maps a page of a dma-buf (`IOMMU_IOAS_MAP_FILE`, `linux/iommufd.h`).
fn iommufd_maps(dma_buf: &OwnedFd) -> Result<(), Errno> {
    let iommufd = File::options().read(true).write(true).open("/dev/iommu").unwrap();
    let call = |number, argument: &mut [u32]| {
        argument[0] = size_of_val(argument) as u32;
        let argument = argument.as_mut_ptr();
        // SAFETY: the structure is as long as its size says, and no device reaches what is mapped.
        Errno::result(unsafe { libc::ioctl(iommufd.as_raw_fd(), number, argument) }).map(drop)
    };
    // Its size, flags, and the address space that the kernel has made.
    let mut alloc = [0; 3];
    call(request_code_none!(VFIO_TYPE, 0x81), &mut alloc).unwrap();
    // Its size, flags (at that address, writable, readable), the address space and the file; then, of 64 bits each,
    // the start in the file, the length and the address.
    let file = dma_buf.as_raw_fd().cast_unsigned();
    let mut map = [0, 7, alloc[2], file, 0, 0, 4096, 0, 0x10_0000, 0];
    call(request_code_none!(VFIO_TYPE, 0x8f), &mut map)
}

#[test]
fn what_cannot_be_a_dma_buf_is_refused_with_advice() {
    let kernel = lab::kernel();
    leftovers::none_of(|| {
        let target = lab::open("ivshmem64m");
        let export = |device: &Device, region, range| {
            let error = device.transport().dma_buf(region, range, Access::ReadWrite).unwrap_err();
            assert!(!error.advice().is_empty() || error.kind() == ErrorKind::NotFound, "{error}");
            error.kind()
        };
        for range in [0x3ff_f000..0x400_1000, 0x400_0000..0x400_1000, 0x1000..0x1000] {
            assert_eq!(export(&target, 2, range), ErrorKind::OutOfRange);
        }
        assert_eq!(export(&target, 2, 0x800..0x1800), ErrorKind::Unaligned);
        assert_eq!(export(&target, 5, 0..0x1000), ErrorKind::NotFound);
        assert_eq!(export(&target, CONFIG, 0..0x1000), ErrorKind::NotMappable);
        let ports = lab::open("testdev");
        assert_eq!(export(&ports, 1, 0..0x1000), ErrorKind::NotMappable);
        ports.close().unwrap();

        let window = target.bar(2).unwrap().map(0..0x1000, Placement::Anywhere).unwrap();
        if kernel == "patched" {
            // It does not hold the device, and a device opened again does not revive it.
            let dma_buf = window.dma_buf().unwrap();
            assert_eq!(iommufd_maps(&dma_buf), Ok(()));
            drop(window);
            target.close().unwrap();
            let again = open("ivshmem64m", Vfio::options());
            let window = again.bar(2).unwrap().map(0..0x1000, Placement::Anywhere).unwrap();
            assert_eq!(iommufd_maps(&dma_buf), Err(Errno::ENODEV));
            assert_eq!(iommufd_maps(&window.dma_buf().unwrap()), Ok(()));
            drop((dma_buf, window));
            again.close().unwrap();
        } else if kernel == "newest" {
            // vfio-pci makes dma-bufs without iommufd, too.
            drop(window.dma_buf().unwrap());
            drop(window);
            target.close().unwrap();
        } else {
            let error = window.dma_buf().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.advice().contains("by_group()"), "{error}");
            drop(window);
            target.close().unwrap();
        }
    });
}

#[test]
fn a_read_only_window_is_written_by_no_device() {
    for (way, by) in ways() {
        leftovers::none_of(|| {
            let target = open("ivshmem64m", way);
            let bar = target.bar(2).unwrap();
            let window = bar.map(0..0x1000, Placement::Anywhere).unwrap();
            window.register(0).unwrap().write(0x0ead_0ead_u32);
            let (copy, _) = window.duplicate_read_only(Placement::Anywhere).unwrap();
            let edu = Edu::new(open("edu", way), Interrupt::Msi).unwrap();
            let space = edu.dma().unwrap();
            let map = |access| space.map(copy.dma_memory(), IovaPlacement::default(), access);
            let error = map(Access::ReadWrite).unwrap_err();
            if by == MappedBy::DmaBuf {
                assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
            }
            let mapping = map(Access::ReadOnly).unwrap();
            let reacher = Reacher { edu, mapping };
            assert_eq!(reacher.read(0), 0x0ead_0ead);
            drop(space);
            reacher.close();
            drop((window, copy));
            target.close().unwrap();
        });
    }
}
