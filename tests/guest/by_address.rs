//! Duplicates that are made from an address alone, without a file: by `MREMAP_DONTUNMAP`, and by an old length of 0.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use vfio_remap::space::{Hazard, Outcome, Source};
use vfio_remap::transport::{DeviceInfo, MemoryDevice, RegionFile, RegionInfo, Transport};
use vfio_remap::{Device, Error, ErrorKind, Placement, Reservation, Strategy, Window};

use crate::lab::{self, SUBJECTS};
use crate::remap::{assert_map_again, assert_same_device, for_each_window, touch};
use crate::{close, leftovers, probe, scale};

/// The strategies that need no file, and what becomes of the source.
const BY_ADDRESS: [(Strategy, Source); 2] =
    [(Strategy::DontUnmap, Source::Cold), (Strategy::OldLenZero, Source::Warm)];

/// Whether this kernel duplicates BARs by address.
fn is_patched() -> bool {
    lab::kernel() == "patched"
}

#[test]
fn duplicates_by_address_are_live_and_die_and_return_together() {
    if !is_patched() {
        return lab::skipped("no released kernel duplicates a BAR by its address");
    }
    for (strategy, source) in BY_ADDRESS {
        for_each_window(|subject, device, window| {
            let (duplicate, report) = window.duplicate(Placement::Anywhere.only(strategy)).unwrap();
            assert_eq!((report.strategy, report.source), (strategy, source), "{report}");
            assert!(report.attempts.is_empty(), "{report}");
            assert_same_device(subject, &window, &duplicate);

            let scratch = (subject.scratch.0 - window.region_range().start) as usize;
            let sides = [&window, &duplicate];
            let before = subject.scratch(&window).read();
            lab::set_decoding_as_another_holder(device, false);
            for side in sides {
                let loaded = probe::load(side.addresses().start + scratch);
                assert_eq!(loaded, None, "{} by {strategy}", subject.name);
            }
            lab::set_decoding_as_another_holder(device, true);
            for side in sides {
                let read = subject.scratch(side).read();
                assert_eq!(read, before, "{} by {strategy}", subject.name);
            }
        });
    }
}

#[test]
fn a_gib_congruent_window_is_duplicated_to_any_congruence() {
    const GIB: usize = 1 << 30;
    if !is_patched() {
        return lab::skipped("no released kernel duplicates a BAR by its address");
    }
    let device = lab::open("ivshmem4g");
    for (strategy, _) in BY_ADDRESS {
        for shift in [0, 2 << 20] {
            let window = lab::map_all(&device, 2);
            let size = window.size();
            let word = |window: &Window, gib| window.register::<u32>(gib * GIB + 0x1234).unwrap();
            for gib in 0..size / GIB {
                word(&window, gib).write(gib as u32 + 1);
            }
            let place = Reservation::congruent(size, GIB, shift).unwrap();
            let there = place.range();
            let (duplicate, report) =
                window.duplicate(Placement::In(place).only(strategy)).unwrap();
            assert_eq!((report.strategy, duplicate.addresses()), (strategy, there));
            for gib in 0..size / GIB {
                assert_eq!(word(&duplicate, gib).read(), gib as u32 + 1, "{report}");
                assert_eq!(word(&window, gib).read(), gib as u32 + 1, "{report}");
            }
        }
    }
    close(device);
}

/// The faults of reading a word in each page.
fn faults_of_reading(window: &Window) -> i64 {
    let words = window.register_array::<u32>(0, 4096, window.size() / 4096).unwrap();
    let before = scale::faults();
    let mut sum = 0u32;
    for page in 0..words.count() {
        sum = sum.wrapping_add(words.read(page));
    }
    std::hint::black_box(sum);
    scale::faults() - before
}

/// Fewer than any backing costs that is read for the first time: a few may be due to the test program itself.
const WARM: i64 = 8;

fn assert_source_is(window: Window, strategy: Strategy, source: Source) {
    faults_of_reading(&window);
    let (duplicate, report) = window.duplicate(Placement::Anywhere.only(strategy)).unwrap();
    assert_eq!(report.source, source, "{report}");
    let faults = faults_of_reading(&window);
    assert_eq!(faults < WARM, source == Source::Warm, "{faults} faults; {report}");
    drop(duplicate);
}

#[test]
fn an_old_length_of_0_leaves_the_source_warm() {
    let memory = || {
        let device = Device::new(Arc::new(MemoryDevice::new(4 << 20).unwrap()));
        device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap()
    };
    assert_source_is(memory(), Strategy::OldLenZero, Source::Warm);
    if lab::kernel() != "5.10" {
        assert_source_is(memory(), Strategy::DontUnmap, Source::Cold);
    }
    if is_patched() {
        let device = lab::open("ivshmem64m");
        for (strategy, source) in BY_ADDRESS {
            assert_source_is(lab::map_all(&device, 2), strategy, source);
        }
        close(device);
    }
}

#[test]
fn shared_memory_is_duplicated_by_an_old_length_of_0() {
    let device = Device::new(Arc::new(MemoryDevice::new(4 << 20).unwrap()));
    let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    window.register::<u32>(0).unwrap().write(7);
    for placement in
        [Placement::Anywhere, Placement::In(Reservation::congruent(4 << 20, 1 << 30, 0).unwrap())]
    {
        let (duplicate, report) = window.duplicate(placement.only(Strategy::OldLenZero)).unwrap();
        assert_eq!((report.strategy, report.source), (Strategy::OldLenZero, Source::Warm));
        assert_eq!(duplicate.register::<u32>(0).unwrap().read(), 7);
    }
}

#[test]
fn a_refused_old_length_of_0_leaves_all_as_it_was() {
    if is_patched() {
        return lab::skipped("this kernel accepts an old length of 0 for a BAR");
    }
    for_each_window(|subject, _, window| {
        let (at, value) = (window.addresses(), subject.scratch.1);
        subject.scratch(&window).write(value);
        let place = Reservation::congruent(at.len(), 1 << 30, window.region_range().start).unwrap();
        let there = place.range();
        let before = leftovers::holdings();
        let anywhere = window.duplicate(Placement::Anywhere.only(Strategy::OldLenZero));
        let placed = window.duplicate(Placement::In(place).only(Strategy::OldLenZero));
        let [anywhere, placed] = [anywhere, placed].map(|result| result.unwrap_err());
        assert_eq!(before, leftovers::holdings(), "{}", subject.name);
        for failed in [&anywhere, &placed] {
            let refusal = (failed.kind(), failed.error().errno());
            assert_eq!(refusal, (ErrorKind::Refused, Some(libc::EFAULT)), "{failed}");
            assert!(failed.error().advice().contains("MapAgain"), "{failed}");
        }
        let place = placed.into_reservation().unwrap();
        assert_eq!((place.range(), window.addresses()), (there.clone(), at));
        assert_eq!(subject.scratch(&window).read(), (subject.answer)(value));
        let (duplicate, report) = window.duplicate(Placement::In(place)).unwrap();
        assert_map_again(&report);
        assert_eq!(duplicate.addresses(), there);
        assert_same_device(subject, &window, &duplicate);
    });
}

#[test]
fn the_cheapest_way_suits_the_verb_and_the_kernel() {
    for subject in &SUBJECTS {
        let device = lab::open(subject.name);
        let mut window = subject.bar(&device).map(.., Placement::Anywhere).unwrap();
        touch(subject, &window);
        let (duplicate, duplicated) = window.duplicate(Placement::Anywhere.cheapest()).unwrap();
        let relocated = window.relocate(Placement::Anywhere.cheapest()).unwrap().report;
        // Large windows have huge page-table entries, of which few have to be faulted in again.
        let expected = match (is_patched(), window.size() >= 2 << 20) {
            (false, _) => [Strategy::MapAgain; 2],
            (true, false) => [Strategy::OldLenZero, Strategy::DontUnmap],
            (true, true) => [Strategy::OldLenZero, Strategy::MapAgain],
        };
        assert_eq!([duplicated.strategy, relocated.strategy], expected, "{}", subject.name);
        assert_same_device(subject, &window, &duplicate);
        drop((window, duplicate));
        close(device);
    }
}

/// A file that is a device's memory: the one region of a device without a driver.
#[derive(Debug)]
struct FileDevice {
    file: Arc<OwnedFd>,
    start: u64,
    size: u64,
}

impl FileDevice {
    fn window(file: impl Into<OwnedFd>, start: u64, size: u64) -> Window {
        let device = Device::new(Arc::new(Self { file: Arc::new(file.into()), start, size }));
        device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap()
    }
}

impl Transport for FileDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("a file", 1)
    }

    fn region(&self, _: u32) -> Result<RegionInfo, Error> {
        Ok(RegionInfo::mappable(self.size))
    }

    fn read_at(&self, _: u32, _: u64, _: &mut [u8]) -> Result<(), Error> {
        unreachable!("all of it is mapped")
    }

    fn write_at(&self, _: u32, _: u64, _: &[u8]) -> Result<(), Error> {
        unreachable!("all of it is mapped")
    }

    fn backing(&self, _: u32) -> Result<RegionFile, Error> {
        // SAFETY: the file is memory of its own, or registers of edu, which does no DMA that is not asked for.
        Ok(unsafe { RegionFile::device(self.file.clone(), self.start) })
    }
}

fn open(path: impl AsRef<Path>, flags: i32) -> Option<File> {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).ok()
}

/// A dma-buf of two pages of memory (`linux/udmabuf.h`: `struct udmabuf_create` is a descriptor, flags, offset and
/// size; `UDMABUF_CREATE` is `_IOW('u', 0x42, …)`).
fn udmabuf() -> Option<OwnedFd> {
    #[repr(C)]
    struct Create {
        memfd: u32,
        flags: u32,
        offset: u64,
        size: u64,
    }
    nix::ioctl_write_ptr!(create, b'u', 0x42, Create);
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    let device = open("/dev/udmabuf", 0)?;
    let memory = File::from(memfd_create("udmabuf", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    memory.set_len(2 * 4096).unwrap();
    fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    let asked = Create { memfd: memory.as_raw_fd() as u32, flags: 0, offset: 0, size: 2 * 4096 };
    // SAFETY: the argument is what the ioctl takes, and lives as long as the call.
    let fd = unsafe { create(device.as_raw_fd(), &raw const asked) }.unwrap();
    // SAFETY: the kernel has just made this descriptor, and nothing else has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Without VFIO nobody has switched it on.
fn enable_memory_decoding(device: &str) {
    const COMMAND: u64 = 4;
    const MEMORY: u8 = 2;
    let config = open(format!("{device}/config"), 0).unwrap();
    let mut command = [0; 2];
    config.read_exact_at(&mut command, COMMAND).unwrap();
    command[0] |= MEMORY;
    config.write_all_at(&command, COMMAND).unwrap();
}

/// By its address a window is duplicated only if its driver has opted in; all others are duplicated by their file.
#[test]
fn files_whose_driver_has_not_opted_in_are_mapped_again() {
    let edu = format!("/sys/bus/pci/devices/{}", lab::address("edu"));
    enable_memory_decoding(&edu);
    let resources = std::fs::read_to_string(format!("{edu}/resource")).unwrap();
    let address = resources.split_ascii_whitespace().next().unwrap().trim_start_matches("0x");
    let address = u64::from_str_radix(address, 16).unwrap();
    let (bar, memory) = (1 << 20, 2 * 4096);
    let resource = open(format!("{edu}/resource0"), 0).expect("sysfs has the BAR");
    let files = [
        ("resource0", Some(FileDevice::window(resource, 0, bar))),
        (
            "/dev/mem",
            open("/dev/mem", libc::O_DSYNC).map(|it| FileDevice::window(it, address, bar)),
        ),
        ("udmabuf", udmabuf().map(|it| FileDevice::window(it, 0, memory))),
    ];
    for (name, window) in files {
        let Some(window) = window else {
            println!("{name} is not there");
            continue;
        };
        let is_memory = name == "udmabuf";
        let (written, wanted) = (0x1234_5678, if is_memory { 0x1234_5678 } else { !0x1234_5678 });
        window.register::<u32>(4).unwrap().write(written);
        // Before Linux 6.12 a udmabuf was memory with pages, for which the kernel accepts both. The crate does not.
        let may_be_accepted = is_memory && ["5.10", "6.1"].contains(&lab::kernel().as_str());
        let refused = |outcome| match outcome {
            Outcome::Refused { errno: libc::EINVAL | libc::EFAULT, .. } => true,
            Outcome::Hazard(Hazard::UnknownBacking) => may_be_accepted,
            _ => false,
        };
        for (strategy, _) in BY_ADDRESS {
            let failed = window.duplicate(Placement::Anywhere.only(strategy)).unwrap_err();
            let kinds = [ErrorKind::Refused, ErrorKind::Hazard];
            assert!(kinds[..1 + usize::from(may_be_accepted)].contains(&failed.kind()), "{failed}");
        }
        let (duplicate, report) = window.duplicate(Placement::Anywhere).unwrap();
        assert_eq!((report.strategy, report.source), (Strategy::MapAgain, Source::Warm), "{name}");
        let tried: Vec<_> = report.attempts.iter().map(|it| it.strategy).collect();
        assert_eq!(tried, BY_ADDRESS.map(|(strategy, _)| strategy), "{name}");
        assert!(report.attempts.iter().all(|it| refused(it.outcome)), "{name}: {report}");
        for window in [&window, &duplicate] {
            assert_eq!(window.register::<u32>(4).unwrap().read(), wanted, "{name}");
        }
        let shown = maps_line(&window);
        assert_eq!(shown.contains("/dmabuf:"), is_memory, "{shown}");
    }
}

/// The line of a window in `/proc/self/maps`.
fn maps_line(window: &Window) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let start = format!("{:x}-", window.addresses().start);
    maps.lines().find(|line| line.starts_with(&start)).unwrap().to_owned()
}

/// A part of a BAR that another process delegates by a dma-buf is such a file.
#[test]
fn a_window_over_a_dma_buf_is_revoked_and_relocated() {
    leftovers::none_of(|| {
        let Some(file) = udmabuf() else {
            return lab::skipped("this kernel has no /dev/udmabuf");
        };
        let mut window = FileDevice::window(file, 0, 2 * 4096);
        window.register::<u32>(4096).unwrap().write(7);
        let old = window.addresses();
        let relocation = window.relocate(Placement::Anywhere).unwrap();
        assert_eq!(relocation.report.source, Source::Released);
        assert_eq!(relocation.old.unwrap().range(), old);
        assert_eq!(window.register::<u32>(4096).unwrap().read(), 7);
        window.revoke().unwrap();
        assert_eq!(window.register::<u32>(4096).unwrap().read(), u32::MAX);
        window.restore().unwrap();
        assert_eq!(window.register::<u32>(4096).unwrap().read(), 7);
        assert!(maps_line(&window).contains("/dmabuf:"));
    });
}
