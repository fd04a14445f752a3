//! What commands do, and what the blocks hold afterwards.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vfio_remap::ErrorKind;
use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{Emulated, Nvme, Server};
use vfio_remap::space::Access;
use vfio_remap::transport::{Transport, VfioUser};

use super::{Arguments, DATA, Driver, ENTRIES, IOVA, LIST, SIZE, nvme};
use crate::support::{edu, server, shared, watch};

const INVALID_FIELD: u16 = 0x02;

fn identify(driver: &mut Driver, cns: u32, namespace: u32) -> Result<Vec<u8>, u16> {
    driver.admin(0x06, namespace, IOVA + DATA as u64, [cns, 0, 0])?;
    Ok(shared::get(&driver.memory, DATA, 4096))
}

fn works(device: Arc<dyn Transport>) {
    let event = edu::event();
    device.set_irqs(2, 1, &[Some(event.as_fd())]).unwrap();
    let mut driver = Driver::new(device);
    let controller = identify(&mut driver, 1, 0).unwrap();
    assert_eq!((controller[512], controller[513], controller[516]), (0x66, 0x44, 2));
    for (id, blocks, shift) in [(1, 2048u64, 9), (2, 1024, 12)] {
        let namespace = identify(&mut driver, 0, id).unwrap();
        assert_eq!((&namespace[..8], namespace[130]), (&blocks.to_le_bytes()[..], shift));
    }
    assert_eq!(identify(&mut driver, 2, 0).unwrap()[..12], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.admin(0x09, 0, 0, [7, 3 << 16 | 3, 0]), Ok(15 << 16 | 15));
    assert_eq!(driver.admin(0x0a, 0, 0, [6, 0, 0]), Ok(1));
    let log = [2 | 127 << 16, 0, 0];
    driver.admin(0x02, u32::MAX, IOVA + DATA as u64, log).unwrap();
    assert_eq!(shared::get(&driver.memory, DATA + 1, 3), [44, 1, 100]);

    // More than the queues have entries, so that they wrap around.
    for round in 0..3 * u64::from(ENTRIES) {
        for (namespace, len) in [(1, 512), (2, 4096)] {
            driver.put(round as u8 + 1, len);
            driver.io(0x01, namespace, 7 * round, 0).unwrap();
            assert!(driver.holds(namespace, 7 * round, round as u8 + 1, len));
        }
    }
    assert!(edu::fired(&event) > 0);
    driver.io(0x00, 1, 0, 0).unwrap();
    driver.io(0x08, 1, 6, 2).unwrap();
    assert!(driver.holds(1, 7, 0, 512), "zeros were written");
    assert!(driver.holds(1, 14, 3, 512));
    lists(&mut driver);
}

/// 128 KiB that begin within a page, by a list of which the last entry on a page leads on.
fn lists(driver: &mut Driver) {
    let data: Vec<u8> = (0..0x2_0000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let skip = 0x204;
    shared::put(&driver.memory, DATA + skip, &data);
    let first = IOVA + DATA as u64;
    let mut pages = (1..33).map(|page| (first + page * 0x1000).to_le_bytes());
    let start = LIST + 0x1000 - 32;
    for at in 0..3 {
        shared::put(&driver.memory, start + 8 * at, &pages.next().unwrap());
    }
    let next = (IOVA + LIST as u64 + 0x1000).to_le_bytes();
    shared::put(&driver.memory, start + 24, &next);
    for (at, page) in pages.enumerate() {
        shared::put(&driver.memory, LIST + 0x1000 + 8 * at, &page);
    }
    let prps = [first + skip as u64, IOVA + start as u64];
    let all = [100, 0, 31];
    driver.command(1, 0x01, 2, prps, all).unwrap();
    shared::put(&driver.memory, DATA + skip, &vec![0; data.len()]);
    driver.command(1, 0x02, 2, prps, all).unwrap();
    assert!(shared::get(&driver.memory, DATA + skip, data.len()) == data);
    assert_eq!(driver.command(1, 0x02, 2, prps, [100, 0, 32]), Err(INVALID_FIELD), "too much");
    let unaligned = [first + 2, 0];
    assert_eq!(driver.command(1, 0x02, 2, unaligned, [0, 0, 0]), Err(0x13));
    assert_eq!(driver.command(1, 0x02, 2, [first, first + 8], [0, 0, 1]), Err(0x13));
    assert_eq!(driver.command(1, 0x02, 2, [first, first + 4], [0, 0, 2]), Err(0x13));
    assert_eq!(driver.command(1, 0x02, 2, [0x1000, 0], [0, 0, 0]), Err(0x04), "not mapped");
}

#[test]
fn a_driver_reads_and_writes_every_namespace() {
    works(Arc::new(nvme().0));
}

#[test]
fn a_driver_in_another_place_does_so_over_a_socket() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = nvme().0;
    let time = Duration::from_secs(5);
    let served = std::thread::spawn(move || Server::serve_stream(&device, theirs, time));
    works(Arc::new(VfioUser::from_stream(ours, time).unwrap()));
    served.join().unwrap().unwrap();
}

#[test]
fn no_two_controllers_have_the_same_name() {
    let name = |mut driver| identify(&mut driver, 1, 0).unwrap()[768..1024].to_vec();
    let [first, second] = [(); 2].map(|()| Driver::new(Arc::new(nvme().0)));
    let (first, second) = (name(first), name(second));
    assert!(first.starts_with(b"nqn.2024-01.io.github.vfio-remap:emulated:"));
    assert_ne!(first, second);
}

#[test]
fn what_makes_no_sense_is_answered_by_the_specifications_status() {
    let mut driver = Driver::new(Arc::new(nvme().0));
    let data = IOVA + DATA as u64;
    let page = IOVA + 0x4000;
    let admin: &[(u8, u32, u64, Arguments, u16)] = &[
        (0x7f, 0, 0, [0; 3], 0x01),
        (0x06, 3, data, [0, 0, 0], 0x0b),
        (0x06, 0, data, [0, 0, 0], 0x0b),
        (0x06, 0, data, [0x77, 0, 0], 0x02),
        (0x05, 0, page, [7 << 16, 3, 0], 0x101),
        (0x05, 0, page, [7 << 16 | 17, 3, 0], 0x101),
        (0x05, 0, page, [7 << 16 | 1, 3, 0], 0x101),
        (0x05, 0, page, [2, 3, 0], 0x102),
        (0x05, 0, page, [1024 << 16 | 2, 3, 0], 0x102),
        (0x05, 0, page, [7 << 16 | 2, 2, 0], 0x02),
        (0x05, 0, page + 8, [7 << 16 | 2, 3, 0], 0x13),
        (0x05, 0, page, [7 << 16 | 2, 17 << 16 | 3, 0], 0x108),
        (0x01, 0, page, [7 << 16 | 2, 9 << 16 | 1, 0], 0x100),
        (0x01, 0, page, [7 << 16 | 1, 1 << 16 | 1, 0], 0x101),
        (0x04, 0, 0, [1, 0, 0], 0x10c),
        (0x04, 0, 0, [2, 0, 0], 0x101),
        (0x04, 0, 0, [0, 0, 0], 0x101),
        (0x00, 0, 0, [0, 0, 0], 0x101),
        (0x02, 0, data, [0x77, 0, 0], 0x109),
        (0x0a, 0, 0, [0x77, 0, 0], 0x02),
        (0x09, 0, 0, [0x77, 0, 0], 0x02),
        (0x09, 0, 0, [7, 0xffff, 0], 0x02),
        (0x09, 0, 0, [1 << 31 | 6, 0, 0], 0x10d),
    ];
    for &(opcode, namespace, prp, arguments, status) in admin {
        let answer = driver.admin(opcode, namespace, prp, arguments);
        assert_eq!(answer, Err(status), "{opcode:#x} {arguments:x?}");
    }
    assert_eq!(driver.command(0, 0x4006, 0, [data, 0], [1, 0, 0]), Err(0x02), "an SGL");
    assert_eq!(driver.admin(0x08, 0, 0, [0; 3]), Ok(1), "there is none to abort");
    for (opcode, namespace, block, control, status) in [
        (0x7f, 1, 0, 0, 0x01),
        (0x02, 0, 0, 0, 0x0b),
        (0x02, 3, 0, 0, 0x0b),
        (0x02, 1, 2048, 0, 0x80),
        (0x01, 1, 2047, 1, 0x80),
        (0x01, 1, u64::MAX, 0, 0x80),
        (0x08, 2, 1023, 0xffff, 0x80),
        (0x02, 1, 0, 256, 0x02),
    ] {
        let answer = driver.io(opcode, namespace, block, control);
        assert_eq!(answer, Err(status), "{opcode:#x} {block:#x} {control:#x}");
    }
    for _ in 0..4 {
        driver.submit(0, 0x0c, 0, [0; 2], [0; 3]);
    }
    driver.submit(0, 0x0c, 0, [0; 2], [0; 3]);
    assert_eq!(driver.complete(0), Err(0x105), "four wait for events");
    driver.admin(0x00, 0, 0, [1, 0, 0]).unwrap();
    driver.admin(0x04, 0, 0, [1, 0, 0]).unwrap();
}

#[test]
fn a_loss_of_power_loses_what_was_neither_flushed_nor_forced() {
    let (device, power) = nvme();
    let mut driver = Driver::new(Arc::new(device));
    driver.put(1, 512);
    driver.io(0x01, 1, 1, 0).unwrap();
    driver.io(0x00, 1, 0, 0).unwrap();
    driver.put(2, 512);
    driver.io(0x01, 1, 1, 0).unwrap();
    driver.io(0x01, 1, 2, 0).unwrap();
    driver.io(0x01, 1, 3, 1 << 30).unwrap();
    assert!(driver.holds(1, 1, 2, 512) && driver.holds(1, 2, 2, 512));
    power.cycle();
    watch::until("it is off", || edu::read(&*driver.device, 0x1c) == 0);
    driver.start();
    assert!(driver.holds(1, 1, 1, 512), "what was flushed is back");
    assert!(driver.holds(1, 2, 0, 512), "what was not is lost");
    assert!(driver.holds(1, 3, 2, 512), "what was forced is there");
    // Without the cache, and after a shutdown, all is there.
    driver.admin(0x09, 0, 0, [6, 0, 0]).unwrap();
    driver.put(4, 512);
    driver.io(0x01, 1, 4, 0).unwrap();
    power.cycle();
    watch::until("it is off", || edu::read(&*driver.device, 0x1c) == 0);
    driver.start();
    assert!(driver.holds(1, 4, 4, 512));
    driver.put(5, 512);
    driver.io(0x01, 1, 5, 0).unwrap();
    edu::write(&*driver.device, 0x14, 0x0046_4001);
    watch::until("it is shut down", || edu::read(&*driver.device, 0x1c) >> 2 & 3 == 2);
    power.cycle();
    watch::until("it is off", || edu::read(&*driver.device, 0x1c) == 0);
    driver.start();
    assert!(driver.holds(1, 5, 5, 512));
}

#[test]
fn blocks_of_a_file_are_there_for_the_next_controller() {
    let path = server::path();
    std::fs::write(&path, vec![0; 1 << 16]).unwrap();
    for round in 0..2 {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let nvme = Nvme::new(vec![Namespace::file(file, 512).unwrap()]);
        let mut driver = Driver::new(Arc::new(Emulated::new(nvme).unwrap()));
        assert!(driver.holds(1, 9, round, 512));
        driver.put(1, 512);
        driver.io(0x01, 1, 9, 0).unwrap();
        driver.io(0x00, u32::MAX, 0, 0).unwrap();
    }
    std::fs::remove_file(path).unwrap();
    for (size, block) in [(0, 512), (513, 512), (1024, 1024), (4096 * 3 / 2, 4096)] {
        assert_eq!(Namespace::memory(size, block).unwrap_err().kind(), ErrorKind::Unaligned);
    }
}

#[test]
fn a_read_only_namespace_says_so_and_is_not_changed() {
    let path = std::env::temp_dir().join(format!("vfio-remap-read-only-{}", std::process::id()));
    std::fs::write(&path, [7; 0x2000]).unwrap();
    // Open for reading only, as the program that serves it may have it.
    let file = std::fs::File::open(&path).unwrap();
    let protected = Namespace::file(file, 512).unwrap().read_only();
    let namespaces = vec![protected, Namespace::memory(0x2000, 512).unwrap()];
    let mut driver = Driver::new(Arc::new(Emulated::new(Nvme::new(namespaces)).unwrap()));
    let [one, two] = [1, 2].map(|id| identify(&mut driver, 0, id).unwrap()[99]);
    assert_eq!((one, two), (1, 0), "namespace attributes");
    shared::put(&driver.memory, DATA, &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    driver.command(1, 0x09, 2, [IOVA + DATA as u64, 0], [0, 4, 0]).unwrap();
    // Writing, writing zeros, deallocating; then what changes nothing.
    let protected = Err(0x20);
    assert_eq!(driver.io(0x01, 1, 0, 0), protected);
    assert_eq!(driver.io(0x08, 1, 0, 0), protected);
    let range = [IOVA + DATA as u64, 0];
    assert_eq!(driver.command(1, 0x09, 1, range, [0, 4, 0]), protected);
    driver.io(0x00, 1, 0, 0).unwrap();
    driver.io(0x02, 1, 3, 0).unwrap();
    assert_eq!(shared::get(&driver.memory, DATA, 512), [7; 512]);
    assert_eq!(std::fs::read(&path).unwrap(), [7; 0x2000]);
    std::fs::remove_file(path).unwrap();
}

#[test]
fn unreachable_queues_are_a_fatal_status_until_a_reset() {
    let mut driver = Driver::new(Arc::new(nvme().0));
    driver.device.dma_unmap(IOVA, SIZE as u64).unwrap();
    driver.submit(0, 0x06, 0, [0; 2], [1, 0, 0]);
    watch::until("a fatal status", || edu::read(&*driver.device, 0x1c) & 2 != 0);
    let memory = driver.memory.clone();
    driver.device.dma_map(IOVA, &memory, Access::ReadWrite).unwrap();
    driver.start();
    driver.io(0x00, 1, 0, 0).unwrap();
}
