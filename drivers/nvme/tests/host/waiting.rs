//! How the driver waits for completions, and tells the controller that it has taken them.

use std::sync::Arc;
use std::time::Duration;

use vfio_remap::emulated::nvme::Namespace as Storage;
use vfio_remap::emulated::{Activity, Emulated, Nvme};
use vfio_remap::{Device, ErrorKind, Placement};

use super::commands::{SETTINGS, controller, model, working};

#[test]
fn completions_are_acknowledged_after_as_many_as_were_set() {
    for (settings, after) in [
        (SETTINGS.with_acknowledge_after(1), 1),
        (SETTINGS.with_acknowledge_after(5), 5),
        (SETTINGS, 32),
        // The queue holds 63.
        (SETTINGS.with_acknowledge_after(u16::MAX), 63),
        (SETTINGS.with_acknowledge_after(0), 1),
    ] {
        let storage = Storage::memory(1 << 20, 512).unwrap();
        let model = Emulated::polled(Nvme::new(vec![storage])).unwrap();
        let (controller, namespace, mut queue) = working(&model, || {
            let controller = controller(&model, settings);
            let (namespace, queue) =
                (controller.namespace(1).unwrap(), controller.queue().unwrap());
            (controller, namespace, queue)
        });
        let device = Device::new(Arc::new(model.clone()));
        let doorbells = device.bar(0).unwrap().map(0x1000..0x2000, Placement::Anywhere).unwrap();
        let head = doorbells.register::<u32>(8 * usize::from(queue.id()) + 4).unwrap();
        for taken in 1..=2 * after {
            queue.flush(&namespace, 0).unwrap();
            queue.ring();
            while model.poll().unwrap() == Activity::Busy {}
            assert!(queue.pop().is_some());
            queue.ring();
            assert_eq!(head.read(), taken / after * after % 64, "{taken} taken, after {after}");
        }
        working(&model, || {
            drop(queue);
            controller.close().unwrap();
        });
    }
}

#[test]
fn a_queue_that_sleeps_has_acknowledged_everything() {
    let (model, _) = model();
    let settings = SETTINGS.with_interrupts(true).with_spin(Duration::ZERO);
    let controller = controller(&model, settings.with_acknowledge_after(u16::MAX));
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    let device = Device::new(Arc::new(model.clone()));
    let doorbells = device.bar(0).unwrap().map(0x1000..0x2000, Placement::Anywhere).unwrap();
    let head = doorbells.register::<u32>(8 * usize::from(queue.id()) + 4).unwrap();
    // As many as it takes until it sleeps while one is not acknowledged.
    for taken in 0u32.. {
        let (sleeps, before) = (queue.sleeps(), head.read());
        queue.flush(&namespace, 0).unwrap();
        assert!(queue.wait().unwrap().status.is_success());
        if queue.sleeps() > sleeps && before != taken % 64 {
            assert_eq!(head.read(), taken % 64);
            break;
        }
        assert!(taken < 100_000, "it never sleeps");
    }
    drop(queue);
    controller.close().unwrap();
}

#[test]
fn one_wait_takes_as_many_completions_as_were_asked() {
    for (interrupts, spin) in [(false, 0), (true, 0), (true, 1_000_000)] {
        let (model, _) = model();
        let spin = Duration::from_micros(spin);
        let controller = controller(&model, SETTINGS.with_interrupts(interrupts).with_spin(spin));
        let namespace = controller.namespace(1).unwrap();
        let mut queue = controller.queue().unwrap();
        assert_eq!(queue.wait_for(1, |_| panic!("there is none")), 0);
        let mut tags = Vec::new();
        for tag in 0..20 {
            queue.flush(&namespace, tag).unwrap();
        }
        let taken = queue.wait_for(7, |done| tags.push(done.tag));
        assert!((7..=20).contains(&taken) && taken == tags.len(), "{taken}");
        assert_eq!(queue.outstanding(), 20 - taken);
        // There are fewer.
        assert_eq!(queue.wait_for(20, |done| tags.push(done.tag)), 20 - taken);
        tags.sort_unstable();
        assert_eq!(tags, (0..20).collect::<Vec<_>>());
        drop(queue);
        controller.close().unwrap();
    }
}

#[test]
fn a_reset_keeps_interrupt_coalescing() {
    let (model, power) = model();
    let controller = controller(&model, SETTINGS.with_interrupts(true));
    assert_eq!(controller.interrupt_coalescing().unwrap(), (1, Duration::ZERO));
    for (completions, time) in [(0, 100), (257, 100), (1, 25_501)] {
        let time = Duration::from_micros(time);
        let error = controller.set_interrupt_coalescing(completions, time).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    }
    controller.set_interrupt_coalescing(256, Duration::from_micros(25_500)).unwrap();
    controller.set_interrupt_coalescing(8, Duration::from_micros(201)).unwrap();
    power.cycle();
    controller.reset().unwrap();
    assert_eq!(controller.interrupt_coalescing().unwrap(), (8, Duration::from_micros(300)));
    // Fewer than eight end nevertheless.
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    for tag in 0..20 {
        queue.flush(&namespace, tag).unwrap();
    }
    assert_eq!(queue.wait_for(20, |done| assert!(done.status.is_success())), 20);
    drop(queue);
    controller.close().unwrap();
}
