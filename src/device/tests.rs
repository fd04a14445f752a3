//! What is undone when a set-up fails or its owner is dropped, but not in a child of `fork(2)`.

#![expect(unsafe_code, reason = "tests fork")]

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};

use super::*;
use crate::space::{Access, DmaMemory};
use crate::sys::fork;
use crate::transport::{DmaLimits, IrqInfo, irq_index};

/// A transport that records its calls.
#[derive(Debug, Default)]
struct Recorder {
    calls: Mutex<Vec<String>>,
    /// The call that fails once.
    fails: Mutex<Option<&'static str>>,
    noresize: bool,
    /// Whether it has addresses for more than single buffers.
    roomy: bool,
}

impl Recorder {
    fn record(&self, call: String) -> Result<()> {
        let fails = self.fails.lock().unwrap().take_if(|failing| *failing == call);
        self.calls.lock().unwrap().push(call);
        match fails {
            Some(call) => Err(Error::new(ErrorKind::Refused, "do", call)),
            None => Ok(()),
        }
    }

    fn fail(&self, call: &'static str) {
        *self.fails.lock().unwrap() = Some(call);
    }

    /// The calls since the last time.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Transport for Recorder {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("recorder", 0)
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        Err(Error::new(ErrorKind::NotFound, "find", format!("region {index}")))
    }

    fn read_at(&self, region: u32, _: u64, _: &mut [u8]) -> Result<()> {
        self.region(region).map(drop)
    }

    fn write_at(&self, region: u32, _: u64, _: &[u8]) -> Result<()> {
        self.region(region).map(drop)
    }

    fn irq(&self, _: u32) -> Result<IrqInfo> {
        Ok(IrqInfo { noresize: self.noresize, ..IrqInfo::eventfds(8) })
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let name = ["INTx", "MSI", "MSI-X", "errors", "requests"][index as usize];
        match fds.len() as u32 {
            0 => self.record(format!("disconnect {name}")),
            count => self.record(format!("connect {name} {start}..{}", start + count)),
        }
    }

    fn enter_low_power(&self, _: Option<BorrowedFd<'_>>) -> Result<()> {
        self.record("sleep".to_owned())
    }

    fn exit_low_power(&self) -> Result<()> {
        self.record("wake".to_owned())
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        let last = if self.roomy { 0xf_ffff } else { 0xffff };
        Ok(DmaLimits::new(vec![0x1000..=last], sys::page_size() as u64))
    }

    fn dma_map(&self, iova: u64, _: &DmaMemory, _: Access) -> Result<()> {
        self.record(format!("map {iova:#x}"))
    }

    fn dma_unmap(&self, iova: u64, _: u64) -> Result<()> {
        self.record(format!("unmap {iova:#x}"))
    }
}

fn device(noresize: bool) -> (Arc<Recorder>, Device) {
    let recorder = Arc::new(Recorder { noresize, ..Recorder::default() });
    (recorder.clone(), Device::new(recorder))
}

fn closes(recorder: Arc<Recorder>, device: Device) {
    drop(recorder);
    device.close().unwrap();
}

#[test]
fn vectors_are_disconnected_when_they_are_dropped() {
    assert_eq!(irq_index::MSIX, 2);
    let (recorder, device) = device(false);
    for _ in 0..2 {
        drop(device.vectors(Interrupt::MsiX, 3).unwrap());
        assert_eq!(recorder.calls(), ["connect MSI-X 0..3", "disconnect MSI-X"]);
    }
    closes(recorder, device);
}

#[test]
fn a_wait_that_is_over_says_so_and_what_to_check() {
    const TIME: Duration = Duration::from_millis(1);
    let (recorder, device) = device(false);
    let text = |error: Error| {
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        error.to_string()
    };
    let msi = "cannot wait for vector 0 of MSI of recorder: timed out after 1ms; \
               check that the device may send it: Config::set_bus_mastering";
    let vectors = device.vectors(Interrupt::Msi, 1).unwrap();
    assert_eq!(text(vectors.wait(0, TIME).unwrap_err()), msi);
    assert_eq!(text(vectors.vector(0).unwrap().wait(TIME).unwrap_err()), msi);
    drop(vectors);
    let vectors = device.vectors(Interrupt::Intx, 1).unwrap();
    let error = vectors.wait(0, TIME).unwrap_err();
    assert!(error.advice().contains("Vectors::set_masked"), "{error}");
    let events = device.events().unwrap();
    let wanted = "cannot wait for events of recorder: timed out after 1ms";
    assert_eq!(text(events.wait(TIME).unwrap_err()), wanted);
    let low_power = device.low_power_until_woken().unwrap();
    let wanted = "cannot wait for the wake-up of recorder: timed out after 1ms";
    assert_eq!(text(low_power.woken(TIME).unwrap_err()), wanted);
    drop(low_power);
    let low_power = device.low_power().unwrap();
    assert_eq!(low_power.woken(TIME).unwrap_err().kind(), ErrorKind::Unsupported);
    drop((vectors, events, low_power));
    closes(recorder, device);
}

#[test]
fn vectors_that_fail_leave_nothing_connected() {
    let (recorder, device) = device(false);
    recorder.fail("connect MSI 0..2");
    device.vectors(Interrupt::Msi, 2).unwrap_err();
    assert_eq!(recorder.calls(), ["connect MSI 0..2", "disconnect MSI"]);
    // Other vectors can be set up.
    drop(device.vectors(Interrupt::MsiX, 1).unwrap());
    closes(recorder, device);
}

#[test]
fn growth_that_fails_leaves_the_vectors_as_they_were() {
    let (recorder, device) = device(true);
    let mut vectors = device.vectors(Interrupt::Msi, 2).unwrap();
    recorder.calls();
    recorder.fail("connect MSI 0..4");
    vectors.grow(4).unwrap_err();
    let restored = ["disconnect MSI", "connect MSI 0..4", "connect MSI 0..2"];
    assert_eq!((recorder.calls(), vectors.count()), (restored.map(str::to_owned).into(), 2));
    // Each vector is signalled, for an interrupt that came meanwhile.
    assert_eq!([0, 1].map(|vector| vectors.take(vector).unwrap()), [Some(1); 2]);
    drop(vectors);
    closes(recorder, device);
}

#[test]
fn events_that_fail_leave_nothing_connected() {
    let (recorder, device) = device(false);
    recorder.fail("connect requests 0..1");
    device.events().unwrap_err();
    assert_eq!(
        recorder.calls(),
        ["connect errors 0..1", "connect requests 0..1", "disconnect errors"]
    );
    drop(device.events().unwrap());
    assert_eq!(recorder.calls()[2..], ["disconnect errors", "disconnect requests"]);
    closes(recorder, device);
}

#[test]
fn a_sleep_that_fails_leaves_nothing() {
    let (recorder, device) = device(false);
    recorder.fail("sleep");
    device.low_power().unwrap_err();
    assert_eq!(recorder.calls(), ["sleep"]);
    drop(device.low_power().unwrap());
    assert_eq!(recorder.calls(), ["sleep", "wake"]);
    closes(recorder, device);
}

#[test]
fn a_mapping_that_fails_gives_its_addresses_back() {
    let (recorder, device) = device(false);
    let space = device.dma().unwrap();
    recorder.fail("map 0x1000");
    space.buffer(1).unwrap_err();
    assert_eq!(space.mapping_count(), 0);
    drop(space.buffer(1).unwrap());
    assert_eq!(recorder.calls(), ["map 0x1000", "map 0x1000", "unmap 0x1000"]);
    drop(space);
    closes(recorder, device);
}

/// Everything belongs to the parent; both processes share the files.
#[test]
fn a_child_undoes_nothing_of_its_parents() {
    let (recorder, device) = device(false);
    let mut vectors = Some(device.vectors(Interrupt::Msi, 1).unwrap());
    let mut events = Some(device.events().unwrap());
    let mut low_power = Some(device.low_power().unwrap());
    let mut buffer = Some(device.dma().unwrap().buffer(1).unwrap());
    recorder.calls();
    let mut drops: [(&str, &mut dyn FnMut()); 4] = [
        ("vectors", &mut || drop(vectors.take())),
        ("events", &mut || drop(events.take())),
        ("low power", &mut || drop(low_power.take())),
        ("a mapping", &mut || drop(buffer.take())),
    ];
    for (what, drops) in &mut drops {
        let no_calls = || {
            drops();
            recorder.calls().is_empty()
        };
        // SAFETY: no other thread uses this device, so none holds its locks.
        assert!(unsafe { fork::holds_in_child(no_calls) }, "{what}");
    }
    for (_, drops) in &mut drops {
        drops();
    }
    assert_eq!(
        recorder.calls(),
        ["disconnect MSI", "disconnect errors", "disconnect requests", "wake", "unmap 0x1000"]
    );
    closes(recorder, device);
}

/// A thread of the parent may hold any of them when it forks.
#[test]
fn a_child_takes_no_lock_of_its_parents_arenas() {
    let recorder = Arc::new(Recorder { roomy: true, ..Recorder::default() });
    let device = Device::new(recorder.clone());
    let space = device.dma().unwrap();
    let first = space.buffer(1).unwrap();
    let mut second = Some(space.buffer(1).unwrap());
    assert_eq!(recorder.calls(), ["map 0x1000"]);
    let in_child = || {
        drop(second.take());
        let own = space.buffer(1).unwrap();
        own.iova() == Iova(0x1_1000) && recorder.calls() == ["map 0x11000"]
    };
    // SAFETY: no other thread uses this device. Its locks are held here, and the child does not take them.
    let holds = space.arenas().while_locked(|| unsafe { fork::holds_in_child(in_child) });
    assert!(holds);
    drop((first, second, space));
    assert_eq!(recorder.calls(), ["unmap 0x1000"]);
    closes(recorder, device);
}

#[test]
fn a_buffer_without_address_space_names_the_limit() {
    const LIMIT: u64 = 4 << 30;
    let (_told, device) = device(false);
    let space = device.dma().unwrap();
    let named = || {
        setrlimit(Resource::RLIMIT_AS, LIMIT, LIMIT).unwrap();
        let error = space.buffer(LIMIT as usize).unwrap_err();
        println!("{error}");
        error.kind() == ErrorKind::AddressSpace
            && error.to_string().contains("may have 4294967296 (RLIMIT_AS)")
            && error.advice().contains("--as=")
    };
    // SAFETY: no other thread uses this device, so none holds its locks.
    assert!(unsafe { fork::holds_in_child(named) });
}
