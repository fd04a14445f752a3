//! The NVMe driver of `drivers/nvme` on QEMU's controller, and beside the kernel's driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vfio_remap::transport::Vfio;
use vfio_remap::{Device, ErrorKind};

use crate::{lab, leftovers};
use vfio_remap_nvme::{Controller, IoQueue, Namespace, Settings};

const SETTINGS: Settings = Settings::DEFAULT.with_queues(2).with_entries(64);

/// The ways to the device that this kernel has: its group, and a file of its own.
fn ways() -> Vec<fn() -> Vfio> {
    let by_group = || Vfio::options().by_group().open(lab::address("disk")).unwrap();
    let by_cdev = || Vfio::options().by_cdev().open(lab::address("disk")).unwrap();
    if lab::kernel() == "patched" { vec![by_group, by_cdev] } else { vec![by_group] }
}

fn open(way: fn() -> Vfio, settings: Settings) -> Arc<Controller> {
    Controller::new(Device::new(Arc::new(way())), settings).unwrap()
}

/// Writes all of `data` from the first block on, several requests at a time, and flushes.
fn write(queue: &mut IoQueue, to: &Namespace, data: &[u8]) {
    let chunk = queue.controller().identity().max_transfer;
    for (part, at) in data.chunks(chunk).zip((0..).step_by(chunk >> to.block_shift())) {
        if queue.outstanding() == 8 {
            assert!(queue.wait().unwrap().status.is_success());
        }
        let buffer = queue.controller().buffer(part.len()).unwrap();
        buffer.write(0, part);
        queue.write(to, at, buffer, at).unwrap();
        queue.ring();
    }
    while let Some(done) = queue.wait() {
        assert!(done.status.is_success(), "{}", done.status);
    }
    queue.flush(to, 0).unwrap();
    assert!(queue.wait().unwrap().status.is_success());
}

/// Reads as many bytes from the first block on.
fn read(queue: &mut IoQueue, of: &Namespace, size: usize) -> Vec<u8> {
    let chunk = queue.controller().identity().max_transfer;
    let mut data = vec![0; size];
    for (part, at) in data.chunks_mut(chunk).zip((0..).step_by(chunk >> of.block_shift())) {
        let buffer = queue.controller().buffer(part.len()).unwrap();
        queue.read(of, at, buffer, at).unwrap();
        let done = queue.wait().unwrap();
        assert!(done.status.is_success(), "{}", done.status);
        done.buffer.unwrap().read(0, part);
    }
    data
}

fn pattern(size: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    std::iter::repeat_with(next).take(size).collect()
}

#[test]
fn nvme_reads_what_it_wrote_in_every_way() {
    for (number, way) in ways().into_iter().enumerate() {
        for interrupts in [false, true] {
            leftovers::none_of(|| {
                let controller = open(way, SETTINGS.with_interrupts(interrupts));
                assert_eq!(controller.namespaces().unwrap(), [1, 2]);
                let mut queue = controller.queue().unwrap();
                for (id, block_size) in [(1, 512), (2, 4096)] {
                    let namespace = controller.namespace(id).unwrap();
                    assert_eq!((namespace.block_size(), namespace.size()), (block_size, 64 << 20));
                    // More than a list of pages holds, and no whole number of chunks.
                    let data = pattern((3 << 20) + 3 * 4096, id + 2 * number as u32);
                    write(&mut queue, &namespace, &data);
                    assert!(read(&mut queue, &namespace, data.len()) == data, "namespace {id}");
                    zeroes(&mut queue, &namespace, data);
                }
                drop(queue);
                controller.close().unwrap();
            });
        }
    }
}

/// Parts of what was written are made to read zeros, as far as the controller offers that.
fn zeroes(queue: &mut IoQueue, namespace: &Namespace, mut data: Vec<u8>) {
    let identity = queue.controller().identity().clone();
    assert!(identity.has_write_zeroes && identity.has_deallocate, "QEMU has both");
    queue.write_zeroes(namespace, 5, 3, 0).unwrap();
    assert!(queue.wait().unwrap().status.is_success());
    data[5 * namespace.block_size()..8 * namespace.block_size()].fill(0);
    assert!(read(queue, namespace, data.len()) == data);
    let scrap = queue.controller().buffer(16).unwrap();
    queue.deallocate(namespace, 16, 8, scrap, 0).unwrap();
    assert!(queue.wait().unwrap().status.is_success());
    let (start, end) = (16 * namespace.block_size(), 24 * namespace.block_size());
    let found = read(queue, namespace, data.len());
    assert!(found[..start] == data[..start] && found[end..] == data[end..], "neighbours stay");
    if namespace.deallocated_reads_zeros() {
        assert!(found[start..end].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn nvme_says_how_it_is_and_a_namespace_that_is_missing_is_named() {
    let controller = open(ways()[0], SETTINGS);
    assert_eq!(controller.identity().serial, "lab-disk");
    let health = controller.health().unwrap();
    assert!((273..373).contains(&health.temperature), "{health:?}");
    assert_eq!(controller.errors().unwrap(), []);
    assert_eq!(controller.events().unwrap(), []);
    controller.set_write_cache(false).unwrap();
    assert!(!controller.write_cache().unwrap());
    let error = controller.namespace(3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("there are [1, 2]"), "{error}");
    controller.close().unwrap();
    let error = Controller::new(lab::open("edu"), SETTINGS).map(drop).unwrap_err();
    assert!(error.to_string().contains("not an NVMe controller"), "{error}");
}

#[test]
fn nvme_resets_under_load_lose_nothing_that_was_flushed() {
    const RESETS: u32 = 10;
    let controller = open(ways()[0], SETTINGS);
    let namespace = controller.namespace(2).unwrap();
    let data = pattern(1 << 20, 7);
    let mut queue = controller.queue().unwrap();
    write(&mut queue, &namespace, &data);
    drop(queue);
    let stop = AtomicBool::new(false);
    let (blocks, size) = (data.len() / 4096, 4096);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let mut queue = controller.queue().unwrap();
            let (stop, data) = (&stop, &data);
            scope.spawn(move || {
                let mut block = thread;
                let mut ended = 0;
                let mut buffers: Vec<_> =
                    (0..8).map(|_| queue.controller().buffer(size).unwrap()).collect();
                loop {
                    while let Some(buffer) = buffers.pop() {
                        block = (block + 7) % blocks;
                        queue.read(&namespace, block as u64, buffer, block as u64).unwrap();
                    }
                    let done = queue.wait().unwrap();
                    let buffer = done.buffer.unwrap();
                    if done.status.is_success() {
                        let mut found = vec![0; size];
                        buffer.read(0, &mut found);
                        let at = done.tag as usize * size;
                        assert!(found == data[at..at + size], "block {}", done.tag);
                    } else {
                        assert!(done.status.is_undecided(), "{}", done.status);
                        ended += 1;
                    }
                    buffers.push(buffer);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                while let Some(done) = queue.wait() {
                    drop(done);
                }
                assert!(ended > 0, "nothing was with the controller when it was reset");
            });
        }
        let _stop = StopOnDrop(&stop);
        for _ in 0..RESETS {
            std::thread::sleep(Duration::from_millis(200));
            controller.reset().unwrap();
        }
        std::thread::sleep(Duration::from_millis(200));
    });
    assert_eq!(controller.generation(), RESETS);
    let mut queue = controller.queue().unwrap();
    assert!(read(&mut queue, &namespace, data.len()) == data);
    drop(queue);
    controller.close().unwrap();
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn nvme_image_is_mounted_by_the_kernels_driver() {
    const SIZE: u64 = 32 << 20;
    if lab::kernel() == "patched" {
        // Its configuration has neither NVMe nor a file system on disks.
        lab::skipped("this kernel has no driver for NVMe");
        return;
    }
    let image = Path::new("/tmp/image");
    fs::File::create(image).unwrap().set_len(SIZE).unwrap();
    run("mke2fs", &["-F", "-b", "4096", "/tmp/image"]);
    let empty = fs::read(image).unwrap();
    with_driver(|controller| {
        let mut queue = controller.queue().unwrap();
        write(&mut queue, &controller.namespace(1).unwrap(), &empty);
    });
    let files: Vec<_> = (0..20).map(|n| pattern(1000 + n as usize * 25_000, n + 1)).collect();
    with_kernel(1, |mounted| {
        for (number, file) in files.iter().enumerate() {
            fs::write(mounted.join(number.to_string()), file).unwrap();
        }
    });
    // What the kernel has written goes to the other namespace, in blocks of another size.
    with_driver(|controller| {
        let mut queue = controller.queue().unwrap();
        let full = read(&mut queue, &controller.namespace(1).unwrap(), SIZE as usize);
        assert!(full != empty);
        write(&mut queue, &controller.namespace(2).unwrap(), &full);
    });
    with_kernel(2, |mounted| {
        for (number, file) in files.iter().enumerate() {
            let found = fs::read(mounted.join(number.to_string())).unwrap();
            assert!(found == *file, "file {number}");
        }
    });
    fs::remove_file(image).unwrap();
}

/// See "A driver that is interrupted unbinds the next one" in docs/kernel-notes.md.
#[test]
fn nvme_may_be_bound_while_the_kernels_driver_starts_it() {
    if lab::kernel() == "patched" {
        lab::skipped("this kernel has no driver for NVMe");
        return;
    }
    load_modules();
    let disk = lab::sysfs("disk");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        // What would unbind it is a thread of the kernel's, which comes late on a busy machine.
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        lab::in_rounds("bound while it starts", 20, |round| {
            bind("nvme");
            // Each time at another moment of its start.
            std::thread::sleep(Duration::from_micros(500) * (round % 20) as u32);
            disk.bind_vfio_pci().unwrap().keep();
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(disk.driver().as_deref(), Some("vfio-pci"), "round {round}");
            drop(Device::open(disk.address()).unwrap());
        });
    });
}

fn with_driver(f: impl FnOnce(&Arc<Controller>)) {
    let controller = open(ways()[0], SETTINGS);
    f(&controller);
    controller.close().unwrap();
}

/// Gives the device to the kernel's driver, mounts a namespace, and takes the device back.
fn with_kernel(namespace: u32, f: impl FnOnce(&Path)) {
    load_modules();
    let _back = BoundTo::new("nvme");
    let disk = disk(namespace);
    let mounted = Path::new("/tmp/mounted");
    fs::create_dir_all(mounted).unwrap();
    let [disk, at] = [disk.as_path(), mounted].map(|path| path.to_str().unwrap());
    run("mount", &["-t", "ext4", disk, at]);
    f(mounted);
    run("umount", &[at]);
}

/// Binds the device to a driver; dropped, to vfio-pci again.
struct BoundTo;

impl BoundTo {
    fn new(driver: &str) -> Self {
        bind(driver);
        Self
    }
}

impl Drop for BoundTo {
    fn drop(&mut self) {
        bind("vfio-pci");
    }
}

fn bind(driver: &str) {
    let address = lab::address("disk").to_string();
    let device = Path::new("/sys/bus/pci/devices").join(&address);
    fs::write(device.join("driver/unbind"), &address).unwrap();
    fs::write(device.join("driver_override"), driver).unwrap();
    fs::write("/sys/bus/pci/drivers_probe", &address).unwrap();
    assert_eq!(lab::sysfs("disk").driver().as_deref(), Some(driver));
}

/// The kernel's file for a namespace, once it has found it: no other controller is its own. Which of them
/// is nvme0n1 is a matter of chance from Linux 6.12 on, where they are scanned at once.
fn disk(namespace: u32) -> PathBuf {
    let start = Instant::now();
    loop {
        for disk in fs::read_dir("/sys/class/block").unwrap().map(|entry| entry.unwrap().path()) {
            let file = Path::new("/dev").join(disk.file_name().unwrap());
            let id = fs::read_to_string(disk.join("nsid"));
            // What leads to a namespace that several controllers may share has no file. While a disk is being
            // added, its file is there and cannot be opened yet (ENXIO).
            let is_wanted = id.is_ok_and(|id| id.trim() == namespace.to_string());
            if is_wanted && fs::File::open(&file).is_ok() {
                return file;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(10), "the kernel finds no namespace");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Loads the kernel's driver and file system, which the lab brings along.
fn load_modules() {
    if Path::new("/sys/bus/pci/drivers/nvme").exists() {
        return;
    }
    let mut modules: Vec<_> =
        fs::read_dir("/lab/on-demand").unwrap().map(|entry| entry.unwrap().path()).collect();
    modules.sort();
    for module in modules {
        run("insmod", &[module.to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}
