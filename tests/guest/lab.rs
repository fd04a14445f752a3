//! The lab's devices, and children of the test program.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use vfio_remap::transport::{PciDevice, Sysfs, region_index};
use vfio_remap::{Device, PciAddress, Placement, Region, Window};

use crate::machine::Machine;

/// What edu's first register reads (QEMU, docs/specs/edu).
pub const EDU_ID: u32 = 0x0100_00ed;

/// A device with a BAR that the tests of remapping use.
pub struct Subject {
    pub name: &'static str,
    pub bar: u32,
    /// A register that keeps what is written to it: offset, and a value that it takes.
    pub scratch: (u64, u32),
    /// What the scratch register reads after `value` was written.
    pub answer: fn(u32) -> u32,
    /// A part of the BAR that holds the scratch register and is not all of it.
    pub part: std::ops::Range<u64>,
}

/// NVMe keeps AQA while it is not enabled; e1000e keeps VET; edu answers with the inverse.
pub const SUBJECTS: [Subject; 5] = [
    Subject { name: "nvme", bar: 0, scratch: (0x24, 0x1f_001f), answer: |v| v, part: 0..0x1000 },
    Subject { name: "e1000e", bar: 0, scratch: (0x38, 0x8100), answer: |v| v, part: 0..0x4000 },
    Subject { name: "edu", bar: 0, scratch: (4, 0x1234_5678), answer: |v| !v, part: 0..0x1000 },
    Subject {
        name: "ivshmem64m",
        bar: 2,
        scratch: (0x80_0004, 0xabcd_1234),
        answer: |v| v,
        part: 0x40_0000..0xc0_0000,
    },
    Subject {
        name: "ivshmem4g",
        bar: 2,
        scratch: (0x4000_0008, 0x5555_aaaa),
        answer: |v| v,
        part: 0x4000_0000..0xc000_0000,
    },
];

impl Subject {
    /// All of the BAR, its MSI-X table included, so that it is one span.
    pub fn bar<'d>(&self, device: &'d Device) -> Region<'d> {
        let bar = device.bar(self.bar).unwrap();
        if bar.layout().mappable().next() == Some(0..bar.size()) {
            return bar;
        }
        bar.with_msix_table().unwrap()
    }

    /// Windows over all of the BAR and over a part.
    pub fn ranges(&self, bar: &Region<'_>) -> [std::ops::Range<u64>; 2] {
        [0..bar.size(), self.part.clone()]
    }

    /// The scratch register, as seen by `window`.
    pub fn scratch(&self, window: &Window) -> vfio_remap::Register<u32> {
        window.register((self.scratch.0 - window.region_range().start) as usize).unwrap()
    }
}

pub fn kernel() -> String {
    std::env::var("LAB_KERNEL").expect("run by `cargo lab test`")
}

pub fn address(name: &str) -> PciAddress {
    let devices = std::env::var("LAB_DEVICES").expect("run by `cargo lab test`");
    devices
        .split_ascii_whitespace()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
        .unwrap_or_else(|| panic!("the lab has no device {name}: {devices}"))
}

pub fn sysfs(name: &str) -> PciDevice {
    Sysfs::default().device(address(name)).unwrap()
}

/// Tells why a test is not run on this kernel, although it counts as passed. libtest keeps what a passing
/// test prints to itself, and lets by what is written to the file.
pub fn skipped(why: &str) {
    std::io::stderr().write_all(format!("skipped: {why}\n").as_bytes()).unwrap();
}

/// How many rounds: more in a soak.
pub fn rounds(usual: usize) -> usize {
    let factor = std::env::var("VFIO_REMAP_ROUNDS").ok().and_then(|text| text.parse().ok());
    usual * factor.unwrap_or(1)
}

/// Does something in each of so many rounds, or more in a soak, and prints how long they took.
pub fn in_rounds(what: &str, usual: usize, act: impl FnMut(usize)) {
    let (rounds, begun) = (rounds(usual), Instant::now());
    (0..rounds).for_each(act);
    println!("{what}: {rounds} times in {:.1} s", begun.elapsed().as_secs_f32());
}

/// Opens a device of the lab and lets it answer.
pub fn open(name: &str) -> Device {
    let device = Device::open(address(name)).unwrap();
    device.config().unwrap().set_memory_decoding(true).unwrap();
    device
}

/// Switches memory decoding of a device as another holder of its file does: the crate does not know of it, and revokes
/// no window.
pub fn set_decoding_as_another_holder(device: &Device, enabled: bool) {
    /// The command register and its bit for memory decoding (PCI 3.0 §6.2.2).
    const COMMAND: u64 = 4;
    const MEMORY: u16 = 2;
    let (transport, mut bytes) = (device.transport(), [0; 2]);
    transport.read_at(region_index::CONFIG, COMMAND, &mut bytes).unwrap();
    let others = u16::from_le_bytes(bytes) & !MEMORY;
    let value = others | if enabled { MEMORY } else { 0 };
    transport.write_at(region_index::CONFIG, COMMAND, &value.to_le_bytes()).unwrap();
}

/// A number in `/proc` or `/sys`, set to a value while this lives.
pub struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    pub fn set(path: &'static str, value: u32) -> Self {
        let before = std::fs::read_to_string(path).unwrap();
        std::fs::write(path, value.to_string()).unwrap();
        Self { path, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        std::fs::write(self.path, self.before.trim()).unwrap();
    }
}

/// What an announcement to the lab begins with.
const EXPECTS: &str = "lab: expects:";

/// A line of the kernel's log that a test provokes, announced to the lab while this lives.
pub struct Expected {
    text: String,
    /// What was logged since.
    log: File,
}

impl Expected {
    pub fn announce(text: &str) -> Self {
        std::fs::write("/dev/kmsg", format!("{EXPECTS} {text}\n")).unwrap();
        let mut options = File::options();
        let mut log = options.read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").unwrap();
        log.seek(SeekFrom::End(0)).unwrap();
        Self { text: text.to_owned(), log }
    }

    /// Whether the text is in one of the records that are left. Each read is one of them; one that was overwritten is
    /// an error, and passed. The announcement itself may be among them: the end of the log is before a record that the
    /// kernel has not closed yet.
    fn is_logged(&mut self) -> bool {
        let mut record = [0; 8192];
        loop {
            match self.log.read(&mut record) {
                Ok(len) => {
                    let record = String::from_utf8_lossy(&record[..len]);
                    if record.contains(&self.text) && !record.contains(EXPECTS) {
                        return true;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(_) => {}
            }
        }
    }
}

impl Drop for Expected {
    /// What was provoked is logged by a thread of the kernel's, later.
    fn drop(&mut self) {
        let end = Instant::now() + Duration::from_secs(60);
        while !std::thread::panicking() && !self.is_logged() {
            assert!(Instant::now() < end, "the kernel has not logged {:?}", self.text);
            std::thread::sleep(Duration::from_millis(2));
        }
        std::fs::write("/dev/kmsg", format!("{EXPECTS}\n")).unwrap();
    }
}

/// Waits until a device that was unplugged is gone.
pub fn until_gone(name: &str) {
    until(name, false);
}

/// Empties the slot of `hot` by `pull`, and waits until something can be plugged in again.
pub fn empty_hot_slot(pull: impl FnOnce()) {
    pull();
    until_gone("hot");
    // The slot stays without power for a second (PCIe 5.0 §6.7.1.8).
    std::thread::sleep(Duration::from_millis(1200));
}

/// Plugs `hot` in again, as the lab's machine has it, and binds it.
pub fn plug_hot_in(machine: &mut Machine) {
    plug_into_hot_slot(
        machine,
        serde_json::json!({
            "driver": "e1000e", "id": "hot", "bus": "root-port", "netdev": "net-hot", "romfile": "",
        }),
    );
}

/// Plugs another device into the slot of `hot`, and binds it. It has that name.
pub fn plug_into_hot_slot(machine: &mut Machine, device: serde_json::Value) {
    machine.plug(device);
    until("hot", true);
    // It is in sysfs before the kernel has finished with it.
    let end = Instant::now() + Duration::from_secs(20);
    let binding = loop {
        match sysfs("hot").bind_vfio_pci() {
            Ok(binding) => break binding,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    binding.keep();
}

fn until(name: &str, there: bool) {
    let path = format!("/sys/bus/pci/devices/{}", address(name));
    let start = Instant::now();
    let mut turns = 1;
    while std::path::Path::new(&path).exists() != there {
        assert!(start.elapsed() < Duration::from_secs(60), "{path} is there: {}", !there);
        if there && start.elapsed() > turns * Duration::from_secs(2) {
            switch_slots_on();
            turns += 1;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Has pciehp look at its slots again: it misses a card that is plugged in while it is still about to switch the slot
/// off, which takes long on a busy machine.
fn switch_slots_on() {
    for slot in std::fs::read_dir("/sys/bus/pci/slots").into_iter().flatten().flatten() {
        // It is refused for a slot that is on, or empty.
        let _ = std::fs::write(slot.path().join("power"), "1");
    }
}

/// Maps all of a BAR that can be mapped as one window.
pub fn map_all(device: &Device, bar: u32) -> Window {
    device.bar(bar).unwrap().map(.., Placement::Anywhere).unwrap()
}

/// Runs an ignored test of this program, by its path, in a process of its own. One that ends well has run
/// the test: a path that names none is nothing to run, and ends well, too.
pub fn child(test: &str, environment: &[(&str, String)], user: Option<u32>) -> ExitStatus {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
    command.envs(environment.iter().cloned());
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() || said.contains("1 passed"), "{test} was not run: {said}");
    if !output.status.success() {
        println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    }
    output.status
}
