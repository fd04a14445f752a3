//! The NVMe driver under load, while its controller is pulled, unplugged or unbound.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vfio_remap::device::Event;
use vfio_remap::{Device, ErrorKind};
use vfio_remap_nvme::{Controller, Settings};

use crate::machine::Machine;
use crate::removal::pull;
use crate::{lab, leftovers};

const SETTINGS: Settings = Settings::DEFAULT.with_queues(2).with_entries(32);
const THREADS: usize = 2;
/// How many requests each thread has outstanding.
const DEPTH: usize = 16;
/// How many requests of each thread have ended before something happens to the controller.
const FIRST: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(60);

/// QEMU's name for the data of the controller in the hot slot.
const DISK: &str = "null-hot";

/// Puts an NVMe controller into the hot slot, which is empty.
fn plug_nvme_in(machine: &mut Machine) {
    lab::plug_into_hot_slot(
        machine,
        serde_json::json!({
            "driver": "nvme", "id": "hot", "bus": "root-port", "drive": DISK, "serial": "hot",
        }),
    );
}

fn open(name: &str, interrupts: bool) -> (Device, Arc<Controller>) {
    let device = lab::open(name);
    let settings = SETTINGS.with_interrupts(interrupts);
    let controller = Controller::new(device.clone(), settings).unwrap();
    (device, controller)
}

/// What threads that use a controller share.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    /// How many requests of each thread have succeeded.
    succeeded: [AtomicU64; THREADS],
    /// How many requests of all threads were submitted.
    submitted: AtomicU64,
}

impl Load {
    /// Reads until a request fails or the load is to stop, and then waits for what is outstanding. Each request
    /// ends once and returns its buffer. Returns how many have failed.
    fn read(&self, controller: &Arc<Controller>, thread: usize) -> u64 {
        let namespace = controller.namespace(1).unwrap();
        let mut queue = controller.queue().unwrap();
        let (mut next, mut outstanding, mut failed) = (0, BTreeSet::new(), 0);
        let goes_on = |failed| failed == 0 && !self.stop.load(Ordering::Relaxed);
        while goes_on(failed) || !outstanding.is_empty() {
            while goes_on(failed) && outstanding.len() < DEPTH {
                let buffer = controller.buffer(4096).unwrap();
                if queue.read(&namespace, next % 64, buffer, next).is_err() {
                    failed += 1;
                    break;
                }
                outstanding.insert(next);
                self.submitted.fetch_add(1, Ordering::Relaxed);
                next += 1;
            }
            let Some(done) = queue.wait() else { break };
            assert!(outstanding.remove(&done.tag), "{} has ended twice", done.tag);
            assert!(done.buffer.is_some(), "memory is not returned");
            if done.status.is_success() {
                self.succeeded[thread].fetch_add(1, Ordering::Relaxed);
            } else {
                failed += 1;
            }
        }
        assert!(outstanding.is_empty() && queue.wait().is_none(), "{outstanding:?}");
        failed
    }

    /// Waits until all requests are outstanding, and the controller knows of them. QEMU 11.1 corrupts its memory if a
    /// controller is pulled that has not looked at a doorbell yet: in one of seven pulls it ended of that.
    fn all_outstanding(&self) {
        let end = Instant::now() + PATIENCE;
        let submitted = || self.submitted.load(Ordering::Relaxed);
        loop {
            let before = submitted();
            std::thread::sleep(Duration::from_millis(20));
            if submitted() == before {
                return;
            }
            assert!(Instant::now() < end, "doorbells are rung all the time");
        }
    }
}

/// Has threads use a controller, and calls `act` while they do. Returns how many of their requests have failed.
fn under_load(controller: &Arc<Controller>, act: impl FnOnce(&Load)) -> u64 {
    let load = Load::default();
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&load.stop);
        let load = &load;
        let threads: Vec<_> =
            (0..THREADS).map(|thread| scope.spawn(move || load.read(controller, thread))).collect();
        let end = Instant::now() + PATIENCE;
        while load.succeeded.iter().any(|count| count.load(Ordering::Relaxed) < FIRST) {
            assert!(Instant::now() < end, "the threads do not get on");
            std::thread::yield_now();
        }
        act(load);
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    })
}

/// Tells threads to stop, also when a test has failed.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn nvme_that_is_pulled_under_load_ends_each_request_once() {
    let mut machine = Machine::open();
    lab::empty_hot_slot(|| pull(lab::address("hot")));
    machine.add_disk(DISK);
    plug_nvme_in(&mut machine);
    lab::in_rounds("pulled under load", 2, |round| {
        leftovers::none_of(|| {
            let (device, controller) = open("hot", round % 2 == 1);
            let failed = under_load(&controller, |load| {
                load.all_outstanding();
                pull(lab::address("hot"));
            });
            assert!(failed > 0 && device.gone(), "{failed}");
            let error = controller.reset().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
            drop(controller);
            device.close().unwrap();
        });
        lab::empty_hot_slot(|| {});
        plug_nvme_in(&mut machine);
    });
    // The driver works with the one that took its place.
    let (device, controller) = open("hot", false);
    assert_eq!(under_load(&controller, |load| load.stop.store(true, Ordering::Relaxed)), 0);
    drop(controller);
    device.close().unwrap();
    lab::empty_hot_slot(|| pull(lab::address("hot")));
    machine.remove_disk(DISK);
    lab::plug_hot_in(&mut machine);
}

/// A driver under load that stops and closes the device when it is told to let go, which completes `request`.
fn lets_go_under_load(name: &str, interrupts: bool, request: impl FnOnce(), done: impl FnOnce()) {
    leftovers::none_of(|| {
        let (device, controller) = open(name, interrupts);
        let events = device.events().unwrap();
        let failed = under_load(&controller, |load| {
            request();
            assert_eq!(events.wait(PATIENCE).unwrap(), Event::Release);
            load.stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(failed, 0, "the device works until it is closed");
        drop((events, controller));
        device.close().unwrap();
        done();
    });
}

#[test]
fn nvme_under_load_lets_go_when_it_is_unbound() {
    let sysfs = lab::sysfs("nvme");
    lab::in_rounds("unbound under load", 2, |round| {
        let address = lab::address("nvme").to_string();
        let path = format!("/sys/bus/pci/devices/{address}/driver/unbind");
        let unbinding = std::cell::Cell::new(None);
        lets_go_under_load(
            "nvme",
            round % 2 == 1,
            || {
                let unbind = || std::fs::write(path, address).unwrap();
                unbinding.set(Some(std::thread::spawn(unbind)));
            },
            || unbinding.take().unwrap().join().unwrap(),
        );
        assert_eq!(sysfs.driver(), None);
        sysfs.bind_vfio_pci().unwrap().keep();
    });
}

#[test]
fn nvme_under_load_lets_go_at_device_del_by_acpi_hotplug() {
    let mut machine = Machine::open();
    machine.unplug("hot");
    lab::until_gone("hot");
    machine.add_disk(DISK);
    lab::in_rounds("unplugged under load", 2, |round| {
        plug_nvme_in(&mut machine);
        lets_go_under_load(
            "hot",
            round % 2 == 1,
            || machine.unplug("hot"),
            || lab::until_gone("hot"),
        );
    });
    machine.remove_disk(DISK);
    lab::plug_hot_in(&mut machine);
}
