//! What a device's driver is told of the device as a whole: an error, and that it is wanted back.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use vfio_remap::device::Event;

use crate::machine::Machine;
use crate::{lab, leftovers};

const PATIENCE: Duration = Duration::from_secs(5);

/// From the request to the end of what was asked for.
const AT_MOST: Duration = Duration::from_secs(2);

/// Whether a device's first register reads what it must: edu's identification, and e1000e's bit for
/// full duplex (Intel 82574 datasheet, §10.2.2.1).
fn works(name: &str, window: &vfio_remap::Window) -> bool {
    let value = window.register::<u32>(0).unwrap().read();
    if name == "edu" { value == lab::EDU_ID } else { value & 1 == 1 }
}

/// A driver that is at work when `request` is made, and lets go when it is told to; until `done`, from
/// the request on.
fn lets_go_when_asked(name: &str, request: impl FnOnce(), done: impl FnOnce()) -> Duration {
    leftovers::none_of(|| {
        let device = lab::open(name);
        let window = lab::map_all(&device, 0);
        let events = device.events().unwrap();
        assert_eq!(events.take().unwrap(), None);
        assert!(works(name, &window));
        let start = Instant::now();
        request();
        assert_eq!(events.wait(PATIENCE).unwrap(), Event::Release);
        // Until it lets go, the device works, and what holds it has a name.
        assert!(works(name, &window));
        let still = device.close().unwrap_err();
        let named = format!("a window over bar 0 of {}", lab::address(name));
        assert!(still.to_string().contains(&named), "{still}");
        drop((window, events));
        still.into_device().close().unwrap();
        done();
        start.elapsed()
    })
}

/// Unbinds a device of the lab's, in a thread: that takes until its driver lets go.
fn unbind(name: &str) -> std::thread::JoinHandle<()> {
    let address = lab::address(name).to_string();
    let path = format!("/sys/bus/pci/devices/{address}/driver/unbind");
    std::thread::spawn(move || std::fs::write(path, address).unwrap())
}

#[test]
fn an_unbind_completes_when_the_driver_lets_go() {
    let sysfs = lab::sysfs("edu");
    for _ in 0..20 {
        let unbinding = std::cell::Cell::new(None);
        let took = lets_go_when_asked(
            "edu",
            || unbinding.set(Some(unbind("edu"))),
            || unbinding.take().unwrap().join().unwrap(),
        );
        assert!(took < AT_MOST, "{took:?}");
        assert_eq!(sysfs.driver(), None);
        sysfs.bind_vfio_pci().unwrap().keep();
    }
}

#[test]
fn device_del_completes_when_the_driver_lets_go_by_acpi_hotplug() {
    let mut machine = Machine::open();
    for _ in 0..20 {
        let took = lets_go_when_asked("hot", || machine.unplug("hot"), || lab::until_gone("hot"));
        assert!(took < AT_MOST, "{took:?}");
        lab::plug_hot_in(&mut machine);
    }
}

/// A driver in a process of its own, which does not let go.
struct Stubborn {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Stubborn {
    fn start(device: &str, asks: bool) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "events::ignores_what_it_is_asked", "--ignored", "--nocapture"])
            .env("DRIVES", device)
            .env("ASKS", asks.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = process.stdin.take().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        Self { process, orders, answers }
    }

    /// Has it use the device once.
    fn work(&mut self) {
        writeln!(self.orders, "work").unwrap();
        let mut line = String::new();
        while line != "worked\n" {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "it has ended");
        }
    }

    /// Has it exit, everything still in its hands.
    fn exit(mut self) {
        drop(self.orders);
        assert!(self.process.wait().unwrap().success());
    }
}

#[test]
#[ignore = "a child of the tests below"]
fn ignores_what_it_is_asked() {
    let name = std::env::var("DRIVES").unwrap();
    let device = lab::open(&name);
    let window = lab::map_all(&device, 0);
    let _events = (std::env::var("ASKS").unwrap() == "true").then(|| device.events().unwrap());
    for order in std::io::stdin().lines() {
        assert_eq!(order.unwrap(), "work");
        assert!(works(&name, &window));
        println!("\nworked");
    }
    std::process::exit(0);
}

/// The driver goes on while `request` has been made, and what was asked for is `done` when it exits.
fn keeps_working_until_it_exits(
    name: &str,
    asks: bool,
    request: impl FnOnce(),
    done: impl FnOnce(),
) {
    let mut driver = Stubborn::start(name, asks);
    driver.work();
    request();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        driver.work();
        std::thread::sleep(Duration::from_millis(20));
    }
    driver.exit();
    let start = Instant::now();
    done();
    assert!(start.elapsed() < AT_MOST, "{:?}", start.elapsed());
}

#[test]
fn a_driver_that_ignores_an_unbind_keeps_working_until_it_exits() {
    let sysfs = lab::sysfs("edu");
    for asks in [true, false] {
        let unbinding = std::cell::Cell::new(None);
        keeps_working_until_it_exits(
            "edu",
            asks,
            || unbinding.set(Some(unbind("edu"))),
            || {
                unbinding.take().unwrap().join().unwrap();
            },
        );
        assert_eq!(sysfs.driver(), None);
        sysfs.bind_vfio_pci().unwrap().keep();
    }
}

#[test]
fn an_ignored_device_del_completes_at_exit_by_acpi_hotplug() {
    let mut machine = Machine::open();
    let request = || machine.unplug("hot");
    keeps_working_until_it_exits("hot", true, request, || lab::until_gone("hot"));
    lab::plug_hot_in(&mut machine);
}

#[test]
fn an_error_that_the_device_reports_is_an_event() {
    let mut machine = Machine::open();
    let device = lab::open("errant");
    // How many queues it has, in the structure at the head of this BAR (virtio 1.2, §4.1.4.3).
    let queues = lab::map_all(&device, 4).register::<u16>(0x12).unwrap();
    let events = device.events().unwrap();
    assert!(events.error_fd().is_some());
    device.config().unwrap().set_error_reporting(true).unwrap();
    // A completer abort: uncorrectable, and not fatal (PCIe 5.0, table 6-5).
    let answer = machine.say("pcie_aer_inject_error errant COMP_ABORT");
    assert!(answer.starts_with("OK"), "{answer}");
    assert_eq!(events.wait(PATIENCE).unwrap(), Event::Error);
    assert_eq!(events.take().unwrap(), None);
    assert_eq!(queues.read(), 1);
    drop((queues, events));
    device.close().unwrap();
}
