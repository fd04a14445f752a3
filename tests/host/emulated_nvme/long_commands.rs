//! Commands that take many turns of the model, on memory files.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{Activity, Emulated, Nvme, Server};
use vfio_remap::transport::{Transport, VfioUser};

use super::{DATA, Driver, ENTRIES, IOVA, nvme, working};
use crate::support::{edu, shared};

/// A namespace in blocks of 512 bytes on a memory file, which is sparse.
fn sparse(size: u64) -> (Namespace, File) {
    let file = File::from(memfd_create("vfio-remap-test-sparse", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    (Namespace::file(file.try_clone().unwrap(), 512).unwrap(), file)
}

/// Four turns of a Deallocate.
const FULL: u64 = 64 << 20;

/// As [`sparse`], but all of it is allocated.
fn full() -> (Namespace, File) {
    let (namespace, file) = sparse(FULL);
    fallocate(&file, FallocateFlags::empty(), 0, FULL as i64).unwrap();
    assert_eq!(allocated(&file), FULL);
    (namespace, file)
}

/// Bytes that the file has memory for.
fn allocated(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

/// Puts the range for a Deallocate of all blocks where the data are.
fn range_of_all(driver: &Driver, size: u64) {
    let range = [0, (size / 512) as u32, 0, 0];
    shared::put(&driver.memory, DATA, range.map(u32::to_le_bytes).as_flattened());
}

/// A driver, and a controller that works when it is polled.
fn by_hand(transport: impl Transport + 'static, device: &Emulated) -> Driver {
    working(device, || Driver::new(Arc::new(transport)))
}

/// A controller on a file of which all is allocated, in the middle of a Deallocate of all of it.
fn deallocating() -> (Emulated, Driver, File) {
    let (namespace, file) = full();
    let device = Emulated::polled(Nvme::new(vec![namespace])).unwrap();
    let mut driver = by_hand(device.clone(), &device);
    range_of_all(&driver, FULL);
    driver.submit(1, 0x09, 1, [IOVA + DATA as u64, 0], [0, 4, 0]);
    assert_eq!(device.poll().unwrap(), Activity::Busy);
    let left = allocated(&file);
    assert!(0 < left && left < FULL, "{left:#x} bytes are left");
    (device, driver, file)
}

#[test]
fn zeroes_over_a_sparse_file_allocate_nothing() {
    const SIZE: u64 = 512 << 20;
    let (namespace, file) = sparse(SIZE);
    let mut driver = Driver::new(Arc::new(Emulated::new(Nvme::new(vec![namespace])).unwrap()));
    driver.put(1, 512);
    driver.io(0x01, 1, 77, 0).unwrap();
    for (first, round) in (0..SIZE / 512).step_by(1 << 16).zip(0..) {
        // Every other one with forced unit access.
        driver.io(0x08, 1, first, 0xffff | (round & 1) << 30).unwrap();
    }
    assert!(driver.holds(1, 77, 0, 512));
    range_of_all(&driver, SIZE);
    driver.io(0x09, 1, 4 << 32, 0).unwrap();
    let found = allocated(&file);
    assert!(found < 1 << 20, "{found:#x} bytes are allocated");
}

#[test]
fn a_long_command_leaves_turns_to_registers_and_others() {
    let (device, mut driver, file) = deallocating();
    let mut left = allocated(&file);
    let mut turns = 1;
    loop {
        // A register, and a command of the admin queue.
        assert_eq!(edu::read(&*driver.device, 0x1c), 1);
        driver.submit(0, 0x0a, 0, [0; 2], [6, 0, 0]);
        let busy = device.poll().unwrap();
        assert_eq!(driver.complete(0), Ok(1));
        let now = allocated(&file);
        assert!(left - now <= 16 << 20, "{:#x} bytes in one turn", left - now);
        left = now;
        turns += 1;
        if busy != Activity::Busy || left == 0 {
            break;
        }
    }
    assert!((4..8).contains(&turns), "{turns} turns");
    device.poll().unwrap();
    driver.next_id -= turns - 1;
    driver.complete(1).unwrap();
}

#[test]
fn a_long_command_ends_with_the_client_that_waits_for_it() {
    let (namespace, file) = full();
    let device = Emulated::polled(Nvme::new(vec![namespace])).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let time = Duration::from_secs(30);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| Server::serve_stream(&device, theirs, time));
        let mut driver = by_hand(VfioUser::from_stream(ours, time).unwrap(), &device);
        range_of_all(&driver, FULL);
        driver.submit(1, 0x09, 1, [IOVA + DATA as u64, 0], [0, 4, 0]);
        assert_eq!(device.poll().unwrap(), Activity::Busy);
        drop(driver);
        served.join().unwrap().unwrap();
    });
    let left = allocated(&file);
    assert!(0 < left && left < FULL);
    for _ in 0..100 {
        device.poll().unwrap();
    }
    assert_eq!(allocated(&file), left);
}

#[test]
fn a_long_command_ends_with_a_reset_or_its_queue() {
    type End = fn(&mut Driver, &Emulated);
    let ends: [End; 3] = [
        |driver, _| edu::write(&*driver.device, 0x14, 0),
        |driver, _| driver.device.reset().unwrap(),
        |driver, device| {
            // Its submission queue is deleted.
            driver.submit(0, 0x00, 0, [0; 2], [1, 0, 0]);
            device.poll().unwrap();
            driver.complete(0).unwrap();
        },
    ];
    for end in ends {
        let (device, mut driver, file) = deallocating();
        end(&mut driver, &device);
        let left = allocated(&file);
        assert!(left > 0);
        for _ in 0..100 {
            device.poll().unwrap();
        }
        assert_eq!(allocated(&file), left);
    }
}

#[test]
fn a_long_command_can_be_aborted() {
    let (device, mut driver, file) = deallocating();
    let long = u32::from(driver.next_id);
    for aborted in [true, false] {
        driver.submit(0, 0x08, 0, [0; 2], [long << 16 | 1, 0, 0]);
        device.poll().unwrap();
        assert_eq!(driver.complete(0), Ok(u32::from(!aborted)));
    }
    let left = allocated(&file);
    driver.next_id = long as u16;
    assert_eq!(driver.complete(1), Err(0x07));
    device.poll().unwrap();
    assert!(left > 0 && allocated(&file) == left);
}

#[test]
fn a_deallocate_past_the_end_changes_nothing() {
    let mut driver = Driver::new(Arc::new(nvme().0));
    driver.put(1, 512);
    driver.io(0x01, 1, 7, 0).unwrap();
    // The second of two ranges leaves the namespace.
    let ranges = [0, 8, 0, 0, 0, 2, 2047, 0];
    shared::put(&driver.memory, DATA, ranges.map(u32::to_le_bytes).as_flattened());
    let data = [IOVA + DATA as u64, 0];
    assert_eq!(driver.command(1, 0x09, 1, data, [1, 4, 0]), Err(0x80));
    assert!(driver.holds(1, 7, 1, 512));
}

#[test]
fn more_long_commands_than_a_queue_holds_all_end() {
    let device = Emulated::polled(Nvme::new(vec![sparse(FULL).0])).unwrap();
    let mut driver = by_hand(device.clone(), &device);
    for _ in 0..10 {
        let first = driver.next_id + 1;
        for _ in 1..ENTRIES {
            driver.submit(1, 0x08, 1, [0; 2], [0, 0, 0xffff]);
        }
        while device.poll().unwrap() == Activity::Busy {}
        for id in first..first + ENTRIES - 1 {
            driver.next_id = id;
            driver.complete(1).unwrap();
        }
    }
}

#[test]
fn completions_without_room_wait_and_nothing_is_busy() {
    let device = Emulated::polled(Nvme::new(vec![sparse(FULL).0])).unwrap();
    let mut driver = by_hand(device.clone(), &device);
    let first = driver.next_id + 1;
    // Of eleven completions there is room for seven.
    for commands in [4, 7] {
        for _ in 0..commands {
            driver.submit(1, 0x08, 1, [0; 2], [0, 0, 0]);
        }
        device.poll().unwrap();
        device.poll().unwrap();
    }
    assert_eq!(device.poll().unwrap(), Activity::Watching);
    let tail = driver.queues[1].tail;
    for id in first..first + 11 {
        driver.next_id = id;
        // What the controller has read when it completes the first four.
        driver.queues[1].tail = if id < first + 4 { 4 } else { tail };
        driver.complete(1).unwrap();
        device.poll().unwrap();
    }
}
