//! The driver, on the NVMe model.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::device::DmaBuffer;
use vfio_remap::emulated::nvme::{Fault, Faults, Namespace as Storage, Power};
use vfio_remap::emulated::{Activity, Emulated, Nvme};
use vfio_remap::transport::Transport;
use vfio_remap::{Device, ErrorKind};
use vfio_remap_nvme::{Completion, Controller, IoQueue, Namespace, Settings, Status};

/// Nothing here is about commands that are late.
pub const SETTINGS: Settings = Settings::DEFAULT
    .with_queues(4)
    .with_entries(64)
    .with_timeout(Duration::from_secs(30))
    .with_grace(Duration::from_secs(30))
    .with_admin_timeout(Duration::from_secs(30));

/// Two namespaces: 1 MiB in blocks of 512, 4 MiB in blocks of 4096 bytes.
pub fn model() -> (Emulated, Power) {
    let storage = [(1 << 20, 512), (4 << 20, 4096)];
    let storage = storage.map(|(size, block)| Storage::memory(size, block).unwrap());
    let nvme = Nvme::new(storage.into());
    let power = nvme.power();
    (Emulated::new(nvme).unwrap(), power)
}

pub fn controller(model: &Emulated, settings: Settings) -> Arc<Controller> {
    Controller::new(Device::new(Arc::new(model.clone())), settings).unwrap()
}

/// Waits for the one request that is outstanding.
fn done(queue: &mut IoQueue) -> Completion {
    let done = queue.wait().unwrap();
    assert_eq!(queue.outstanding(), 0);
    done
}

pub fn write(queue: &mut IoQueue, to: &Namespace, block: u64, buffer: DmaBuffer) -> DmaBuffer {
    queue.write(to, block, buffer, 7).unwrap();
    let Completion { tag, status, buffer, .. } = done(queue);
    assert_eq!((tag, status), (7, Status::SUCCESS));
    buffer.unwrap()
}

pub fn read(queue: &mut IoQueue, of: &Namespace, block: u64, buffer: DmaBuffer) -> DmaBuffer {
    queue.read(of, block, buffer, 8).unwrap();
    let Completion { tag, status, buffer, .. } = done(queue);
    assert_eq!((tag, status), (8, Status::SUCCESS));
    buffer.unwrap()
}

pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251 + seed) as u8).collect()
}

/// Runs `f` while another thread polls the model.
pub fn working<T>(model: &Emulated, f: impl FnOnce() -> T) -> T {
    let alive = Arc::new(());
    let watch = Arc::downgrade(&alive);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while watch.strong_count() > 0 {
                model.poll().unwrap();
                std::thread::yield_now();
            }
        });
        // Gone whatever becomes of `f`.
        let _alive = alive;
        f()
    })
}

#[test]
fn what_is_written_is_read_at_every_length_and_alignment() {
    let (model, _) = model();
    let controller = controller(&model, SETTINGS);
    assert_eq!(controller.namespaces().unwrap(), [1, 2]);
    let mut queue = controller.queue().unwrap();
    for id in [1, 2] {
        let namespace = controller.namespace(id).unwrap();
        let most = controller.identity().max_transfer;
        assert_eq!((namespace.block_size(), most), ([512, 4096][id as usize - 1], 128 << 10));
        let sizes = [1, 2, 3, 8, 9, 17].map(|blocks| blocks * namespace.block_size());
        for (round, size) in sizes.into_iter().chain([most]).enumerate() {
            for skip in [0, 4, 512, 2048, 4092] {
                let part = |size: usize| {
                    let buffer = controller.buffer(skip + size + 8).unwrap();
                    let buffer = if skip == 0 { buffer } else { buffer.split_at(skip).unwrap().1 };
                    buffer.split_at(size).unwrap().0
                };
                let data = pattern(size, round + skip);
                let buffer = part(size);
                buffer.write(0, &data);
                drop(write(&mut queue, &namespace, round as u64, buffer));
                let mut found = vec![0; size];
                read(&mut queue, &namespace, round as u64, part(size)).read(0, &mut found);
                assert!(found == data, "{size} bytes, {skip} into a page, namespace {id}");
            }
        }
    }
    drop(queue);
    controller.close().unwrap();
}

#[test]
fn four_threads_fill_their_queues_by_polling_and_by_interrupts() {
    for interrupts in [false, true] {
        let (model, _) = model();
        let controller = controller(&model, SETTINGS.with_interrupts(interrupts));
        let namespace = controller.namespace(2).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let mut queue = controller.queue().unwrap();
                let controller = &controller;
                scope.spawn(move || {
                    // Two rounds of more commands than the queue has entries.
                    for block in 0..200u64 {
                        while queue.room() == 0 {
                            assert!(queue.wait().unwrap().status.is_success());
                        }
                        let buffer = controller.buffer(4096).unwrap();
                        buffer.store(0, thread << 32 | block);
                        queue.write(&namespace, thread * 200 + block, buffer, block).unwrap();
                    }
                    while let Some(done) = queue.wait() {
                        assert!(done.status.is_success());
                    }
                    for block in 0..200u64 {
                        let buffer = controller.buffer(4096).unwrap();
                        let buffer = read(&mut queue, &namespace, thread * 200 + block, buffer);
                        assert_eq!(buffer.load::<u64>(0), thread << 32 | block);
                    }
                });
            }
        });
        let error = std::iter::repeat_with(|| controller.queue())
            .take(5)
            .collect::<Result<Vec<_>, _>>()
            .map(drop)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "four were asked for: {error}");
        controller.close().unwrap();
    }
}

#[test]
fn a_loss_of_power_ends_commands_and_keeps_what_was_flushed() {
    let (model, power) = model();
    let controller = controller(&model, SETTINGS);
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    let buffer = controller.buffer(512).unwrap().split_at(512).unwrap().0;
    buffer.write(0, &[0x5a; 512]);
    let buffer = write(&mut queue, &namespace, 9, buffer);
    queue.flush(&namespace, 1).unwrap();
    assert!(done(&mut queue).status.is_success());
    drop(buffer);
    // A controller that is just looking for work may carry out one more round.
    let mut aborted = 0;
    for round in 0..2 {
        for tag in 0..8 {
            let buffer = controller.buffer(512).unwrap().split_at(512).unwrap().0;
            queue.read(&namespace, 9, buffer, tag).unwrap();
        }
        if round == 0 {
            power.cycle();
        }
        let mut back = Vec::new();
        while let Some(Completion { tag, status, buffer, .. }) = queue.wait() {
            if !status.is_success() {
                assert_eq!(status, Status::ABORTED_BY_HOST);
                aborted += 1;
            }
            assert_eq!(buffer.unwrap().size(), 512);
            back.push(tag);
        }
        back.sort_unstable();
        assert_eq!(back, [0, 1, 2, 3, 4, 5, 6, 7]);
        if aborted > 0 {
            break;
        }
    }
    assert!(aborted > 0, "none was lost");
    assert_eq!(queue.generation(), 1);
    let buffer = controller.buffer(512).unwrap().split_at(512).unwrap().0;
    let found = read(&mut queue, &namespace, 9, buffer);
    assert_eq!(found.load::<u8>(511), 0x5a);
    drop((queue, found));
    controller.close().unwrap();
}

#[test]
fn a_completion_of_no_command_resets_an_idle_controller() {
    for flush in [false, true] {
        // The first command after the ten that bring controller and queue up.
        let faults = Faults::new([(10, Fault::SpuriousCompletion)]);
        let storage = Storage::memory(1 << 20, 512).unwrap();
        let model = Emulated::new(Nvme::new(vec![storage]).with_faults(&faults)).unwrap();
        let controller = controller(&model, SETTINGS);
        let namespace = controller.namespace(1).unwrap();
        let mut queue = controller.queue().unwrap();
        queue.write(&namespace, 0, controller.buffer(4096).unwrap(), 7).unwrap();
        queue.ring();
        let done_before = loop {
            // Unlike `wait`, that looks at nothing but the completions.
            match queue.pop() {
                Some(done) => break done,
                None => std::thread::yield_now(),
            }
        };
        assert!(done_before.status.is_success());
        let buffer = done_before.buffer.unwrap();
        assert_eq!((faults.remaining(), queue.room(), queue.generation()), (0, 0, 0));
        // Whatever is asked of the queue next, what is acknowledged after that is of a new generation.
        if flush {
            queue.flush(&namespace, 1).unwrap();
            assert!(done(&mut queue).status.is_success());
        } else {
            assert!(queue.wait().is_none());
        }
        assert_eq!((queue.generation(), controller.generation()), (1, 1));
        drop(write(&mut queue, &namespace, 0, buffer));
        drop(queue);
        controller.close().unwrap();
    }
}

#[test]
fn a_completion_that_comes_twice_ends_no_other_command() {
    // The first command after the ten that bring controller and queue up.
    let faults = Faults::new([(10, Fault::DuplicateCompletion)]);
    let storage = Storage::memory(1 << 20, 512).unwrap();
    // Works when it is told to.
    let model = Emulated::polled(Nvme::new(vec![storage]).with_faults(&faults)).unwrap();
    let (controller, namespace, mut queue) = working(&model, || {
        let controller = controller(&model, SETTINGS);
        let (namespace, queue) = (controller.namespace(1).unwrap(), controller.queue().unwrap());
        (controller, namespace, queue)
    });
    let buffer = controller.buffer(4096).unwrap();
    buffer.write(0, &[0x5a; 4096]);
    queue.write(&namespace, 0, buffer, 1).unwrap();
    queue.ring();
    while model.poll().unwrap() == Activity::Busy {}
    assert_eq!((faults.remaining(), queue.pop().unwrap().tag), (0, 1));
    // The controller does not know of this one, which may have got the identifier again.
    queue.read(&namespace, 0, controller.buffer(4096).unwrap(), 2).unwrap();
    assert!(queue.pop().is_none(), "the completion that is there twice is of the write");
    assert_eq!(queue.outstanding(), 1);
    working(&model, || {
        let Completion { tag, status, buffer, .. } = queue.wait().unwrap();
        assert!(tag == 2 && (status.is_success() || status == Status::ABORTED_BY_HOST));
        let buffer = buffer.unwrap();
        assert!(!status.is_success() || buffer.load::<u8>(4095) == 0x5a, "it was read");
        assert!(queue.wait().is_none());
        assert_eq!(queue.generation(), 1, "the controller was reset");
        drop(read(&mut queue, &namespace, 0, buffer));
        drop(queue);
        controller.close().unwrap();
    });
}

#[test]
fn pop_alone_makes_room_for_completions() {
    let (model, _) = model();
    let controller = controller(&model, SETTINGS.with_entries(4));
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    let start = Instant::now();
    // One, and then as many as there is room for: the completion queue has three places.
    for commands in [1, 3, 1, 3] {
        for tag in 0..commands {
            queue.flush(&namespace, tag).unwrap();
        }
        queue.ring();
        let mut popped = 0;
        while popped < commands {
            match queue.pop() {
                Some(done) => {
                    assert!(done.status.is_success());
                    popped += 1;
                }
                None => std::thread::yield_now(),
            }
            assert!(start.elapsed() < Duration::from_secs(20), "{popped} of {commands}");
        }
    }
    assert_eq!(queue.generation(), 0);
    drop(queue);
    controller.close().unwrap();
}

#[test]
fn pop_alone_sees_what_a_reset_has_ended() {
    let (model, power) = model();
    let controller = controller(&model, SETTINGS);
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    // Nothing is rung: the controller does not know of it.
    queue.flush(&namespace, 5).unwrap();
    power.cycle();
    controller.reset().unwrap();
    let start = Instant::now();
    let done = loop {
        match queue.pop() {
            Some(done) => break done,
            None => assert!(start.elapsed() < Duration::from_secs(20), "it has not ended"),
        }
    };
    assert_eq!((done.tag, done.status), (5, Status::ABORTED_BY_HOST));
    drop(queue);
    controller.close().unwrap();
}

#[test]
fn identifiers_outlast_the_longest_queue() {
    // A command that stays with the controller, while the others use up all identifiers.
    let faults = Faults::new([(10, Fault::LostCompletion)]);
    let storage = Storage::memory(1 << 20, 512).unwrap();
    let model = Emulated::new(Nvme::new(vec![storage]).with_faults(&faults)).unwrap();
    let timeout = Duration::from_secs(3600);
    let controller = controller(&model, SETTINGS.with_entries(512).with_timeout(timeout));
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    queue.flush(&namespace, u64::MAX).unwrap();
    let mut next = 0;
    while next < 70_000 {
        while queue.room() > 0 {
            queue.flush(&namespace, next).unwrap();
            next += 1;
        }
        while queue.outstanding() > 1 {
            let done = queue.wait().unwrap();
            assert!(done.status.is_success() && done.tag < next);
        }
    }
    assert_eq!((queue.generation(), queue.outstanding()), (0, 1));
    drop(queue);
    controller.close().unwrap();
}

#[test]
fn a_device_that_was_closed_is_quiet_and_usable_by_the_next() {
    let (model, _) = model();
    for _ in 0..2 {
        let controller = controller(&model, SETTINGS);
        let queue = controller.queue().unwrap();
        let failed = controller.close().unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::InUse, "{failed}");
        let controller = failed.into_driver().unwrap();
        assert_eq!(controller.namespaces().unwrap(), [1, 2], "it still works");
        drop(queue);
        controller.close().unwrap();
        let mut command = [0; 2];
        model.read_at(7, 4, &mut command).unwrap();
        let mut configuration = [0; 4];
        model.read_at(0, 0x14, &mut configuration).unwrap();
        assert_eq!((command[0] & 4, configuration[0] & 1), (0, 0), "bus mastering, CC.EN");
    }
}

#[test]
fn requests_that_make_no_sense_give_the_buffer_back() {
    let (model, _) = model();
    let controller = controller(&model, SETTINGS.with_entries(4));
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    let whole = |size: usize| controller.buffer(size).unwrap();
    let part = |skip, size| whole(8192).split_at(skip).unwrap().1.split_at(size).unwrap().0;
    for (buffer, block, kind, words) in [
        (whole(4096), 2041, ErrorKind::OutOfRange, "it has 2048 blocks"),
        (whole(4096), u64::MAX, ErrorKind::OutOfRange, "it has 2048 blocks"),
        (part(8, 100), 0, ErrorKind::Unaligned, "a block has 512 bytes"),
        (part(2, 512), 0, ErrorKind::Unaligned, "not a multiple of four"),
        (whole(132 << 10), 0, ErrorKind::OutOfRange, "at most 131072 bytes"),
    ] {
        let (iova, size) = (buffer.iova(), buffer.size());
        let refused = queue.write(&namespace, block, buffer, 1).unwrap_err();
        assert_eq!(refused.error.kind(), kind, "{}", refused.error);
        assert!(refused.error.to_string().contains(words), "{}", refused.error);
        let buffer = refused.buffer.unwrap();
        assert_eq!((buffer.iova(), buffer.size()), (iova, size));
    }
    for count in [0, 2049, u64::MAX] {
        let error = queue.write_zeroes(&namespace, 0, count, 1).unwrap_err().error;
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
    }
    // Four entries, of which one stays empty.
    for block in 0..3 {
        queue.read(&namespace, block, whole(4096), block).unwrap();
    }
    let refused = queue.read(&namespace, 0, whole(4096), 9).unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::InUse, "{}", refused.error);
    drop(refused);
    assert_eq!(queue.flush(&namespace, 9).unwrap_err().error.kind(), ErrorKind::InUse);
    while let Some(done) = queue.wait() {
        assert!(done.status.is_success());
    }
    // What the controller refuses says why: the driver's view of a namespace may be old.
    let storage = Storage::memory(2 << 20, 512).unwrap();
    let other = Emulated::new(Nvme::new(vec![storage])).unwrap();
    let other = Controller::new(Device::new(Arc::new(other)), SETTINGS).unwrap();
    let larger = other.namespace(1).unwrap();
    assert_eq!((larger.id(), larger.block_count()), (1, 4096));
    queue.read(&larger, 3000, whole(4096), 1).unwrap();
    let error = done(&mut queue).status.check("read", || "block 3000".to_owned()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    assert!(error.to_string().contains("block out of range (status 0x080)"), "{error}");
    drop(queue);
    controller.close().unwrap();
}

#[test]
fn blocks_zeroed_or_deallocated_read_zeros_and_others_stay() {
    let (model, _) = model();
    let controller = controller(&model, SETTINGS);
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    let data = pattern(4096, 1);
    for deallocate in [false, true] {
        let buffer = controller.buffer(4096).unwrap();
        buffer.write(0, &data);
        let buffer = write(&mut queue, &namespace, 8, buffer);
        if deallocate {
            queue.deallocate(&namespace, 10, 3, controller.buffer(16).unwrap(), 1).unwrap();
        } else {
            queue.write_zeroes(&namespace, 10, 3, 1).unwrap();
        }
        assert!(done(&mut queue).status.is_success());
        let mut found = vec![0; 4096];
        read(&mut queue, &namespace, 8, buffer).read(0, &mut found);
        let mut expected = data.clone();
        expected[1024..2560].fill(0);
        assert!(found == expected);
    }
    drop(queue);
    controller.close().unwrap();
}

#[test]
fn a_reset_keeps_the_write_cache_setting_and_the_queues() {
    let (model, power) = model();
    let controller = controller(&model, SETTINGS);
    let namespace = controller.namespace(1).unwrap();
    assert!(controller.write_cache().unwrap());
    controller.set_write_cache(false).unwrap();
    let mut queue = controller.queue().unwrap();
    controller.reset().unwrap();
    assert!(!controller.write_cache().unwrap(), "it is switched off again");
    let buffer = controller.buffer(512).unwrap();
    buffer.store(0, 0x55u8);
    // The queue is made anew at the latest when it is waited for.
    let mut buffer = Some(buffer);
    for attempt in 0.. {
        queue.write(&namespace, 3, buffer.take().unwrap(), 0).unwrap();
        let done = done(&mut queue);
        buffer = done.buffer;
        if done.status.is_success() {
            break;
        }
        assert!(done.status.is_undecided() && attempt == 0);
    }
    assert_eq!(queue.generation(), 1);
    // Not flushed, and yet it lasts.
    power.cycle();
    controller.reset().unwrap();
    let mut buffer = buffer;
    let found = loop {
        queue.read(&namespace, 3, buffer.take().unwrap(), 0).unwrap();
        let done = done(&mut queue);
        if done.status.is_success() {
            break done.buffer.unwrap();
        }
        buffer = done.buffer;
    };
    assert_eq!(found.load::<u8>(0), 0x55);
    drop((queue, found));
    controller.close().unwrap();
}

#[test]
fn a_controller_says_what_it_is_and_how_it_fares() {
    let (model, _) = model();
    let controller = controller(&model, SETTINGS);
    let identity = controller.identity();
    assert_eq!((identity.vendor, identity.serial.as_str()), (0x1b36, "1"));
    assert_eq!(identity.model, "vfio-remap emulated NVMe");
    assert!(identity.has_write_cache && identity.has_write_zeroes && identity.has_deallocate);
    assert_eq!(controller.version().unwrap(), "1.4");
    let health = controller.health().unwrap();
    assert_eq!((health.warnings, health.temperature, health.spare), (0, 300, 100));
    assert_eq!(controller.errors().unwrap(), []);
    let namespace = controller.namespace(2).unwrap();
    assert_eq!((namespace.block_count(), namespace.size()), (1024, 4 << 20));
    let error = controller.namespace(3).unwrap_err();
    assert!(error.to_string().contains("there are [1, 2]"), "{error}");
    // Each queue has a window over its own doorbells.
    let queues = [controller.queue().unwrap(), controller.queue().unwrap()];
    assert_eq!(
        queues.each_ref().map(|queue| queue.doorbell_range().unwrap()),
        [0x1008..0x1010, 0x1010..0x1018]
    );
    assert_eq!(format!("{controller:?}"), "Controller(emulated:nvme)");
    assert_eq!(format!("{:?}", queues[1]), "IoQueue(2 of emulated:nvme, 0 outstanding)");
    assert_eq!((controller.doorbell_stride(), controller.queues_per_doorbell_page()), (4, 512));
    drop(queues);
    controller.close().unwrap();
}
