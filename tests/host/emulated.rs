//! Models in this process.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vfio_remap::device::{BufferRequest, Interrupt, Iova, IovaPlacement};
use vfio_remap::emulated::{Activity, Bus, Edu, Emulated, Model, PciConfig, Shape};
use vfio_remap::space::Access;
use vfio_remap::transport::{IrqInfo, RegionInfo, Transport, irq_index};
use vfio_remap::{Device, ErrorKind, Result};

use crate::support::{edu, shared, watch};

#[test]
fn edu_does_all_that_is_documented() {
    let edu = Emulated::new(Edu::new()).unwrap();
    edu::does_all_that_is_documented(&edu);
    let device = Device::new(Arc::new(edu));
    edu::is_reached_through_windows(&device);
    assert_eq!(device.config().unwrap().vendor_id().unwrap(), 0x1234);
    device.close().unwrap();
}

#[test]
fn accesses_of_another_width_read_ones_and_change_nothing() {
    let edu = Emulated::new(Edu::new()).unwrap();
    edu::write(&edu, 4, 7);
    for data in [&[0; 1][..], &[0; 2], &[0; 3], &[0; 8], &[0; 100]] {
        edu.write_at(0, 4, data).unwrap();
        let mut read = vec![0; data.len()];
        edu.read_at(0, 4, &mut read).unwrap();
        assert!(read.iter().all(|&byte| byte == 0xff), "{} bytes", data.len());
    }
    assert_eq!(edu::read(&edu, 4), !7);
}

#[test]
fn what_a_device_does_not_have_is_an_error() {
    let edu = Emulated::new(Edu::new()).unwrap();
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(edu.read_at(1, 0, &mut [0; 4])), ErrorKind::NotFound);
    assert_eq!(kind(edu.read_at(u32::MAX, 0, &mut [0; 4])), ErrorKind::NotFound);
    assert_eq!(kind(edu.read_at(0, (1 << 20) - 3, &mut [0; 4])), ErrorKind::OutOfRange);
    assert_eq!(kind(edu.write_at(0, u64::MAX, &[0; 4])), ErrorKind::OutOfRange);
    assert_eq!(kind(edu.backing(7).map(drop)), ErrorKind::NotMappable);
    assert_eq!(kind(edu.irq(5).map(drop)), ErrorKind::NotFound);
    let event = edu::event();
    let too_many = [Some(event.as_fd()); 2];
    assert_eq!(kind(edu.set_irqs(irq_index::MSI, 0, &too_many)), ErrorKind::OutOfRange);
    assert_eq!(kind(edu.set_irqs(irq_index::MSIX, 0, &too_many)), ErrorKind::OutOfRange);
    assert_eq!(kind(edu.trigger_irqs(irq_index::MSI, 1..2)), ErrorKind::OutOfRange);
}

#[test]
fn bus_mastering_must_be_on_for_transfers() {
    let edu = Emulated::new(Edu::new()).unwrap();
    let memory = shared::memory(0x1000, true);
    shared::put(&memory, 0, &[7; 8]);
    edu.dma_map(0, &memory, Access::ReadWrite).unwrap();
    let mut expected = [0; 8];
    for on in [false, true] {
        edu.write_at(7, 4, &(u16::from(on) << 2).to_le_bytes()).unwrap();
        for (offset, value) in [(0x80, 0), (0x88, 0x4_0000), (0x90, 8), (0x98, 1u64)] {
            edu.write_at(0, offset, &value.to_le_bytes()).unwrap();
        }
        watch::until("a transfer", || edu::read(&edu, 0x98) & 1 == 0);
        if on {
            expected = [7; 8];
        }
        let mut data = [0; 8];
        edu.read_at(0, 0x4_0000, &mut data).unwrap();
        assert_eq!(data, expected, "bus mastering: {on}");
    }
}

#[test]
fn a_reset_ends_decoding_and_bus_mastering_but_no_mapping() {
    let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    let space = device.dma().unwrap();
    let buffer = space.buffer(4096).unwrap();
    let config = device.config().unwrap();
    for _ in 0..2 {
        config.set_memory_decoding(true).unwrap();
        config.set_bus_mastering(true).unwrap();
        assert!(device.reset().unwrap().is_over());
        assert!(!config.memory_decoding().unwrap() && !config.bus_mastering().unwrap());
        assert_eq!(space.mapping_count(), 1);
    }
    drop(buffer);
}

#[test]
fn devices_over_one_model_share_its_io_addresses() {
    let edu = Emulated::new(Edu::new()).unwrap();
    let [one, other] = [(); 2].map(|()| Device::new(Arc::new(edu.clone())));
    shared::io_addresses_are_shared(&one, &other);
}

#[test]
fn mappings_beyond_the_limit_are_too_many() {
    let edu = Emulated::new(Edu::new()).unwrap();
    let memory = shared::memory(0x1000, false);
    let room = edu.dma_limits().unwrap().available_mappings.unwrap();
    for page in 0..u64::from(room) {
        edu.dma_map(page << 12, &memory, Access::ReadWrite).unwrap();
    }
    let space = Device::new(Arc::new(edu)).dma().unwrap();
    let at = IovaPlacement::At(Iova(1 << 40));
    let error = space.map(memory, at, Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooManyMappings, "{error}");
    assert_eq!(error.errno(), Some(libc::ENOSPC));
    assert!(!error.advice().is_empty(), "{error}");
}

#[test]
fn a_device_that_tells_of_no_events_says_so_and_what_to_do() {
    let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    let error = device.events().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(!error.advice().is_empty(), "{error}");
    // Nothing is half-done.
    device.close().unwrap();
}

#[test]
fn an_eventfd_unmasks_the_intx_of_a_transport_that_watches_none() {
    const PATIENCE: Duration = Duration::from_secs(60);
    let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    let mut vectors = device.vectors(Interrupt::Intx, 1).unwrap();
    vectors.enable_resample().unwrap();
    let registers = device.bar(0).unwrap();
    registers.write_at(0x60, &1u32.to_le_bytes()).unwrap();
    for _ in 0..100 {
        // It is asserted still, so it fires once each time it is unmasked.
        assert_eq!(vectors.wait(0, PATIENCE).unwrap(), 1);
        let unmask = vectors.resample_fd().unwrap();
        assert_eq!(nix::unistd::write(unmask, &1u64.to_ne_bytes()), Ok(8));
    }
    assert_eq!(vectors.wait(0, PATIENCE).unwrap(), 1);
    drop(vectors);
    // The thread is gone.
    device.close().unwrap();
}

/// A model whose mapped part leaves its region.
struct Liar;

impl Model for Liar {
    fn shape(&self) -> Shape {
        let mut region = RegionInfo::mappable(0x1000);
        region.areas = Some(vec![0..0x2000]);
        Shape::new("liar", vec![region])
    }

    fn read(&mut self, _: &Bus, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, _: &Bus, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {}
}

#[test]
fn mapped_parts_that_leave_their_region_are_refused() {
    assert_eq!(Emulated::new(Liar).unwrap_err().kind(), ErrorKind::OutOfRange);
}

/// What a model of [`Odd`] does.
#[derive(Clone, Copy, PartialEq)]
enum Oddity {
    PanicsInPoll,
    PanicsInRead,
    PanicsInReset,
    CallsItself,
    DropsItself,
}

/// A model that does what it must not, once it has the device that it is.
struct Odd {
    does: Oddity,
    /// The device, when there is one.
    itself: Arc<Mutex<Option<Emulated>>>,
    /// Nobody else has it any more.
    last: Arc<AtomicBool>,
    /// What came of calling it.
    answer: Arc<Mutex<Option<ErrorKind>>>,
}

impl Odd {
    /// A device whose model has it in its hands.
    fn device(does: Oddity) -> (Emulated, Arc<Mutex<Option<ErrorKind>>>) {
        let (device, answer, _) = Self::with_last(does);
        (device, answer)
    }

    fn with_last(does: Oddity) -> (Emulated, Arc<Mutex<Option<ErrorKind>>>, Arc<AtomicBool>) {
        let odd = Self::new(does);
        let (itself, answer, last) = (odd.itself.clone(), odd.answer.clone(), odd.last.clone());
        let device = Emulated::new(odd).unwrap();
        if [Oddity::CallsItself, Oddity::DropsItself].contains(&does) {
            *itself.lock().unwrap() = Some(device.clone());
        }
        (device, answer, last)
    }

    fn new(does: Oddity) -> Self {
        Self { does, itself: Arc::default(), last: Arc::default(), answer: Arc::default() }
    }
}

impl Model for Odd {
    fn shape(&self) -> Shape {
        let mut shape = Shape::pci("odd", 256);
        shape.regions[0] = RegionInfo::trapped(4);
        shape.regions[2] = RegionInfo::mappable(0x1000);
        shape.irqs[irq_index::MSIX as usize] = IrqInfo::eventfds(1);
        shape
    }

    fn read(&mut self, bus: &Bus, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        assert!(self.does != Oddity::PanicsInRead, "reading is {}", "too hard");
        bus.wake();
        Ok(())
    }

    fn write(&mut self, _: &Bus, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {
        assert!(self.does != Oddity::PanicsInReset, "no reset");
    }

    fn poll(&mut self, _: &Bus) -> Activity {
        assert!(self.does != Oddity::PanicsInPoll, "polling is too hard");
        let mut itself = self.itself.lock().unwrap();
        match (self.does, &*itself) {
            (Oddity::CallsItself, Some(device)) => {
                let error = device.read_at(0, 0, &mut [0; 4]).unwrap_err();
                *self.answer.lock().unwrap() = Some(error.kind());
                *itself = None;
            }
            // The test lets go of its own about now; whoever is last, nothing waits for ever.
            (Oddity::DropsItself, Some(_)) if self.last.load(Ordering::Relaxed) => *itself = None,
            _ => return Activity::Watching,
        }
        Activity::Asleep
    }
}

/// A PCI device that writes 7 to an IOVA and fires its vector, when it is asked to. Then the register has what
/// came of it.
struct Master {
    config: PciConfig,
    wrote: u32,
}

impl Model for Master {
    fn shape(&self) -> Shape {
        let mut shape = Shape::pci("master", 256);
        shape.regions[0] = RegionInfo::trapped(8);
        shape.irqs[irq_index::MSIX as usize] = IrqInfo::eventfds(1);
        shape
    }

    fn read(&mut self, _: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        match region {
            0 => data.copy_from_slice(&self.wrote.to_le_bytes()),
            _ => self.config.read(offset, data),
        }
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        if region != 0 {
            self.config.write(offset, data);
            return Ok(());
        }
        let iova = u64::from_le_bytes(data.try_into().unwrap());
        let done = bus.dma_write(iova, &[7]).and_then(|()| bus.dma_read(iova, &mut [0]));
        self.wrote = match done {
            Ok(()) => 1,
            Err(error) if error.kind() == ErrorKind::PermissionDenied => 2,
            Err(error) => panic!("{error}"),
        };
        bus.fire(irq_index::MSIX, 0);
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {
        self.config.reset();
    }
}

#[test]
fn without_bus_mastering_there_is_no_dma_and_no_message() {
    let config = PciConfig::new(256, 0x1234, 1, 0, 0).bar32(0, 16).msix(1, (0, 0), (0, 0));
    let emulated = Arc::new(Emulated::polled(Master { config, wrote: 0 }).unwrap());
    let device = Device::new(emulated.clone());
    let buffer = device.dma().unwrap().buffer(4096).unwrap();
    let event = edu::event();
    emulated.set_irqs(irq_index::MSIX, 0, &[Some(event.as_fd())]).unwrap();
    let attempt = || {
        buffer.write(0, &[0]);
        emulated.write_at(0, 0, &buffer.iova().0.to_le_bytes()).unwrap();
        let (mut wrote, mut byte) = ([0; 4], [0]);
        emulated.read_at(0, 0, &mut wrote).unwrap();
        buffer.read(0, &mut byte);
        (u32::from_le_bytes(wrote), byte[0], event.read().unwrap_or(0))
    };
    let config = device.config().unwrap();
    assert_eq!(attempt(), (2, 0, 0), "after power on");
    config.set_bus_mastering(true).unwrap();
    assert_eq!(attempt(), (1, 7, 1));
    config.set_bus_mastering(false).unwrap();
    assert_eq!(attempt(), (2, 0, 0));
    // By a write of a whole double word.
    emulated.write_at(7, 4, &4u32.to_le_bytes()).unwrap();
    assert_eq!(attempt(), (1, 7, 1));
    emulated.reset().unwrap();
    assert_eq!(attempt(), (2, 0, 0), "after a reset");
}

#[test]
fn a_model_that_panics_is_a_device_that_has_gone() {
    for does in [Oddity::PanicsInPoll, Oddity::PanicsInRead] {
        watch::in_time(move || {
            let (device, _) = Odd::device(does);
            let _ = device.read_at(0, 0, &mut [0; 4]);
            watch::until("it panics", || device.reset().is_err());
            let event = edu::event();
            let memory = shared::memory(0x1000, false);
            let calls: [(&str, Result<()>); 6] = [
                ("read", device.read_at(0, 0, &mut [0; 4])),
                ("write", device.write_at(2, 0, &[0; 4])),
                ("reset", device.reset()),
                ("connect", device.set_irqs(irq_index::MSIX, 0, &[Some(event.as_fd())])),
                ("map", device.dma_map(0, &memory, Access::ReadWrite)),
                ("poll", device.poll().map(drop)),
            ];
            for (call, result) in calls {
                let error = result.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Gone, "{call}: {error}");
                assert!(error.to_string().contains("too hard"), "{call}: {error}");
            }
            // What a driver lets go of, it can let go of.
            device.set_irqs(irq_index::MSIX, 0, &[]).unwrap();
        });
    }
    assert_eq!(Emulated::new(Odd::new(Oddity::PanicsInReset)).unwrap_err().kind(), ErrorKind::Gone);
}

#[test]
fn a_device_can_be_closed_after_its_model_has_panicked() {
    watch::in_time(|| {
        let (emulated, _) = Odd::device(Oddity::PanicsInRead);
        let device = Device::new(Arc::new(emulated.clone()));
        let vectors = device.vectors(Interrupt::MsiX, 1).unwrap();
        let buffer = device.dma().unwrap().buffer(4096).unwrap();
        emulated.read_at(0, 0, &mut [0; 4]).unwrap_err();
        drop((vectors, buffer));
        device.close().unwrap();
    });
}

#[test]
fn a_model_that_calls_its_own_device_is_told() {
    watch::in_time(|| {
        let (device, answer) = Odd::device(Oddity::CallsItself);
        watch::until("it was told", || *answer.lock().unwrap() == Some(ErrorKind::InUse));
        // It goes on.
        device.read_at(0, 0, &mut [0; 4]).unwrap();
    });
}

#[test]
fn a_model_may_drop_the_last_of_its_device() {
    watch::in_time(|| {
        let (device, answer, last) = Odd::with_last(Oddity::DropsItself);
        drop(device);
        last.store(true, Ordering::Relaxed);
        // The model goes with its thread.
        watch::until("the model is dropped", || Arc::strong_count(&answer) == 1);
    });
}

/// A model that has always something to do, which takes a millisecond.
struct Busy(Arc<AtomicU64>);

impl Model for Busy {
    fn shape(&self) -> Shape {
        Shape::new("busy", vec![RegionInfo::trapped(8)])
    }

    fn read(&mut self, _: &Bus, _: u32, _: u64, data: &mut [u8]) -> Result<()> {
        data.copy_from_slice(&self.0.load(Ordering::Relaxed).to_le_bytes());
        Ok(())
    }

    fn write(&mut self, _: &Bus, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {}

    fn poll(&mut self, _: &Bus) -> Activity {
        self.0.fetch_add(1, Ordering::Relaxed);
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(1) {}
        Activity::Busy
    }
}

#[test]
fn a_busy_model_lets_registers_have_their_turns() {
    const READS: u64 = 200;
    let polls = Arc::new(AtomicU64::new(0));
    let device = Device::new(Arc::new(Emulated::new(Busy(polls.clone())).unwrap()));
    let register = device.bar(0).unwrap().trapped_register::<u64>(0).unwrap();
    let mut last = 0;
    for _ in 0..READS {
        // Once the model has had a turn since the last.
        while polls.load(Ordering::Relaxed) == last {
            std::thread::yield_now();
        }
        last = register.read().unwrap();
    }
    // Two or three for each read; this thread may be kept from running now and then.
    let polls = polls.load(Ordering::Relaxed);
    assert!(polls < 10 * READS, "{polls} turns of the model's for {READS} reads");
}

/// A model of any shape.
struct Shaped(Shape);

impl Model for Shaped {
    fn shape(&self) -> Shape {
        self.0.clone()
    }

    fn read(&mut self, _: &Bus, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, _: &Bus, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {}
}

#[test]
fn a_shape_that_makes_no_device_is_an_error() {
    let mappable = RegionInfo::mappable;
    let region = |region| Shape::new("odd", vec![region]);
    let vectors = |count| {
        let mut shape = Shape::pci("odd", 256);
        shape.irqs[irq_index::MSIX as usize] = IrqInfo::eventfds(count);
        shape
    };
    let areas = |areas| {
        let mut region = mappable(0x2000);
        region.areas = Some(areas);
        region
    };
    let cases: [(&str, Shape, ErrorKind); 8] = [
        ("a NUL in its name", Shape::new("a\0b", Vec::new()), ErrorKind::InvalidInput),
        ("too many vectors", vectors(2049), ErrorKind::OutOfRange),
        ("far too many vectors", vectors(u32::MAX), ErrorKind::OutOfRange),
        ("larger than a file", region(mappable(u64::MAX)), ErrorKind::Os),
        ("larger than memory", region(mappable(1 << 62)), ErrorKind::OutOfRange),
        ("outside", region(areas(vec![0..0x2001])), ErrorKind::OutOfRange),
        ("backwards", region(areas(vec![Range { start: 0x1000, end: 0 }])), ErrorKind::OutOfRange),
        ("empty", region(areas(vec![0..0])), ErrorKind::OutOfRange),
    ];
    for (what, shape, kind) in cases {
        let error = Emulated::new(Shaped(shape.clone())).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
        let error = Emulated::polled(Shaped(shape)).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
    }
    let mut bare = Shape::new("bare", Vec::new());
    bare.pci = true;
    let fine = [
        Shape::new("", Vec::new()),
        Shape::new("long".repeat(1000), Vec::new()),
        vectors(2048),
        region(mappable(0)),
        region(mappable(1)),
        region(areas(Vec::new())),
        bare,
    ];
    for shape in fine {
        let device = Device::new(Arc::new(Emulated::new(Shaped(shape.clone())).unwrap()));
        // Without a region of that number, these are errors and no more.
        let _ = (device.bar(0).map(drop), device.config().map(|config| config.vendor_id()));
        let _ = device.interrupt(Interrupt::MsiX);
    }
}

#[test]
fn configuration_space_of_any_size_is_one_of_both() {
    for (size, len) in [(0, 256), (256, 256), (257, 4096), (4096, 4096), (usize::MAX, 4096)] {
        let config = PciConfig::new(size, 1, 2, u32::MAX, 4).bar32(0, 16).bar64(4, 1 << 40);
        let mut last = [0; 2];
        config.read(len - 1, &mut last);
        assert_eq!(last, [0, 0xff], "{size}: all ones are past its end");
    }
}

/// A client that has the file cannot make an access of the server's a SIGBUS.
#[test]
fn the_file_of_a_models_memory_keeps_its_size() {
    let device = Emulated::new(Edu::new()).unwrap();
    let file = File::from(device.backing(0).unwrap().fd().try_clone_to_owned().unwrap());
    for size in [0, 0x1_0000, 1 << 30] {
        let error = file.set_len(size).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{size:#x} bytes");
    }
}

#[test]
fn models_in_one_address_space_reach_the_same_memory() {
    let first = Emulated::new(Edu::new()).unwrap();
    let second = first.beside(Edu::new()).unwrap();
    let apart = Emulated::new(Edu::new()).unwrap();
    assert_eq!(first.address_space(), second.address_space());
    assert_ne!(first.address_space(), apart.address_space());

    // Each takes other addresses, and each reaches those of the other.
    let devices = [&first, &second].map(|model| Device::new(Arc::new(model.clone())));
    let [one, other] = devices.map(|device| {
        device.config().unwrap().set_bus_mastering(true).unwrap();
        let request = BufferRequest::new(4096).placement(IovaPlacement::below_bits(28));
        device.dma().unwrap().buffer_with(request).unwrap()
    });
    assert_eq!(one.address_space(), other.address_space());
    assert_ne!(one.iova(), other.iova());
    one.store(0, 0x1234_5678u32);
    for (address, command) in [(one.iova().0, 1), (other.iova().0, 3u64)] {
        let (from, to) = if command == 1 { (address, 0x4_0000) } else { (0x4_0000, address) };
        for (offset, value) in [(0x80, from), (0x88, to), (0x90, 4), (0x98, command)] {
            second.write_at(0, offset, &value.to_le_bytes()).unwrap();
        }
        watch::until("a transfer", || edu::read(&second, 0x98) & 1 == 0);
    }
    assert_eq!(other.load::<u32>(0), 0x1234_5678);

    // What one leaves mapped goes with it, and no more than that.
    let memory = shared::memory(0x1000, true);
    let kind = |result: Result<()>| result.map_err(|error| error.kind());
    first.dma_map(0x80_0000, &memory, Access::ReadWrite).unwrap();
    let taken = second.dma_map(0x80_0000, &memory, Access::ReadWrite);
    assert_eq!(kind(taken), Err(ErrorKind::AddressTaken));
    drop((one, first));
    second.dma_map(0x80_0000, &memory, Access::ReadWrite).unwrap();
    other.store(0, 1u32);
}
