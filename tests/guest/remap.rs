//! Duplicate and relocate on real BARs.

use vfio_remap::space::{Attempt, Outcome, Source, Verb};
use vfio_remap::transport::MemoryDevice;
use vfio_remap::{Device, ErrorKind, Placement, Report, Reservation, Strategy, Window};

use crate::lab::{self, SUBJECTS, Subject};
use crate::{close, probe, scale};

/// Every stock kernel refuses to remap a BAR.
pub fn assert_map_again(report: &Report) {
    assert_eq!(report.strategy, Strategy::MapAgain, "{report}");
    let refused: Vec<_> = report
        .attempts
        .iter()
        .map(|Attempt { strategy, outcome, .. }| match outcome {
            Outcome::Refused { errno, .. } => (*strategy, *errno),
            _ => panic!("{report}"),
        })
        .collect();
    let both = [(Strategy::DontUnmap, libc::EINVAL), (Strategy::OldLenZero, libc::EFAULT)];
    let tried = if report.verb == Verb::Duplicate { 2 } else { 1 };
    assert_eq!(refused, both[..tried], "{report}");
    assert!(report.to_string().contains("DontUnmap was refused with EINVAL"), "{report}");
}

/// The strategy that this kernel calls for. The patched one accepts an old length of 0 for a BAR, so it is known to
/// move entries of 1 GiB, too.
fn assert_strategy(report: &Report) {
    if lab::kernel() == "patched" {
        assert_eq!((report.strategy, &report.attempts[..]), (Strategy::DontUnmap, &[][..]));
    } else {
        assert_map_again(report);
    }
}

pub fn touch(subject: &Subject, window: &Window) {
    let _ = subject.scratch(window).read();
}

/// Both windows reach the same register of the device.
pub fn assert_same_device(subject: &Subject, one: &Window, other: &Window) {
    let value = subject.scratch.1;
    for (one, other) in [(one, other), (other, one)] {
        for value in [value, 0, value] {
            subject.scratch(one).write(value);
            assert_eq!(subject.scratch(other).read(), (subject.answer)(value), "{}", subject.name);
        }
    }
}

/// Runs `f` with windows over all of each BAR and over a part of it, touched and not. One is congruent modulo 1 GiB.
pub fn for_each_window(f: impl Fn(&Subject, &Device, Window)) {
    for subject in &SUBJECTS {
        let device = lab::open(subject.name);
        {
            let bar = subject.bar(&device);
            for range in subject.ranges(&bar) {
                for touched in [false, true] {
                    let window = bar.map(range.clone(), Placement::Anywhere).unwrap();
                    if touched {
                        touch(subject, &window);
                    }
                    f(subject, &device, window);
                }
            }
        }
        close(device);
    }
}

#[test]
fn a_duplicate_reaches_the_device_and_names_its_strategy() {
    for_each_window(|subject, _, window| {
        let (duplicate, report) = window.duplicate(Placement::Anywhere).unwrap();
        assert_strategy(&report);
        let by_dont_unmap = report.strategy == Strategy::DontUnmap;
        assert_eq!(report.source, if by_dont_unmap { Source::Cold } else { Source::Warm });
        assert_ne!(duplicate.addresses(), window.addresses());
        assert_same_device(subject, &window, &duplicate);
    });
}

#[test]
fn old_addresses_of_a_relocated_window_reach_nothing() {
    for_each_window(|subject, _, mut window| {
        let size = window.addresses().len();
        let alias = window.duplicate(Placement::Anywhere).unwrap().0;
        let old = window.addresses();
        let place = Reservation::congruent(size, 1 << 30, window.region_range().start).unwrap();
        let there = place.range();
        let relocation = window.relocate(Placement::In(place)).unwrap();
        assert_strategy(&relocation.report);
        assert_eq!(relocation.report.source, Source::Released);
        assert_eq!((&window.addresses(), relocation.old.unwrap().range()), (&there, old.clone()));
        for offset in [0, size / 2, size - 4096] {
            assert_eq!(probe::load(old.start + offset), None, "{}", subject.name);
        }
        assert_same_device(subject, &window, &alias);
    });
}

#[test]
fn old_addresses_with_a_gib_entry_reach_nothing() {
    let device = lab::open("ivshmem4g");
    let mut window = lab::map_all(&device, 2);
    let old = window.addresses();
    assert_eq!(old.start % (1 << 30), 0, "1 GiB-congruent");
    // Sixteen words, four to a GiB: by 2 MiB entries that is sixteen faults, by 1 GiB entries four.
    let spread: Vec<_> =
        (0..16).map(|n| window.register::<u32>((n << 28) + 0x1234).unwrap()).collect();
    let before = scale::faults();
    spread.iter().for_each(|word| {
        word.read();
    });
    let faults = scale::faults() - before;
    println!("16 words in 4 GiB: {faults} faults");
    assert!(faults <= 8, "{faults}: not by 1 GiB entries, nor the whole mapping at once");
    drop(spread);
    let words: Vec<_> =
        (0..4).map(|gib| window.register::<u32>((gib << 30) + 0x1234).unwrap()).collect();
    for (gib, word) in words.iter().enumerate() {
        word.write(0xfeed_0000 + gib as u32);
        assert_eq!(word.read(), 0xfeed_0000 + gib as u32);
    }
    drop(words);
    let relocation = window.relocate(Placement::Anywhere).unwrap();
    assert_strategy(&relocation.report);
    // Other memory in the old place is reached, and not the device.
    let left = relocation.old.unwrap();
    assert_eq!(left.range(), old);
    for gib in 0..4 {
        assert_eq!(probe::load(old.start + (gib << 30) + 0x1234), None);
        let word = window.register::<u32>((gib << 30) + 0x1234).unwrap();
        assert_eq!(word.read(), 0xfeed_0000 + gib as u32);
    }
    drop(left);
    let other = Device::new(std::sync::Arc::new(MemoryDevice::new(4 << 30).unwrap()));
    let memory = other.bar(0).unwrap().map(.., Placement::At(old.start)).unwrap();
    for gib in 0..4usize {
        assert_eq!(memory.register::<u32>((gib << 30) + 0x1234).unwrap().read(), 0);
    }
    drop((window, memory));
    close(device);
}

#[test]
fn shared_memory_is_duplicated_by_dont_unmap_from_5_13_on() {
    let device = Device::new(std::sync::Arc::new(MemoryDevice::new(4 << 20).unwrap()));
    let mut window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    window.register::<u32>(0).unwrap().write(7);
    let (duplicate, first) = window.duplicate(Placement::Anywhere).unwrap();
    assert_eq!(duplicate.register::<u32>(0).unwrap().read(), 7);
    let second = window.relocate(Placement::Anywhere).unwrap().report;
    if lab::kernel() == "5.10" {
        assert_eq!(first.strategy, Strategy::OldLenZero, "{first}");
        assert_map_again(&second);
    } else {
        for report in [first, second] {
            assert_eq!((report.strategy, &report.attempts[..]), (Strategy::DontUnmap, &[][..]));
        }
    }
}

#[test]
fn a_refused_strategy_leaves_the_window_whole() {
    let device = lab::open("ivshmem4g");
    let mut window = lab::map_all(&device, 2);
    let at = window.addresses();
    window.register::<u32>(0).unwrap().write(42);
    // A move is not trusted with entries of 1 GiB on any kernel.
    let mut refusals = vec![(Strategy::Move, (ErrorKind::Hazard, None))];
    if lab::kernel() != "patched" {
        refusals.push((Strategy::DontUnmap, (ErrorKind::Refused, Some(libc::EINVAL))));
    }
    for (strategy, refusal) in refusals {
        let place = Reservation::aligned(window.size(), 1 << 30).unwrap();
        let there = place.range();
        let failed = window.relocate(Placement::In(place).only(strategy)).unwrap_err();
        assert_eq!((failed.kind(), failed.error().errno()), refusal, "{failed}");
        assert_eq!(failed.into_reservation().unwrap().range(), there);
        assert_eq!(window.addresses(), at);
        assert_eq!(window.register::<u32>(0).unwrap().read(), 42);
    }
    drop(window);
    close(device);
}

#[test]
fn a_move_that_would_escape_revocation_is_refused() {
    let device = lab::open("edu");
    let mut window = lab::map_all(&device, 0);
    assert_eq!(window.register::<u32>(0).unwrap().read(), lab::EDU_ID);
    let old = window.addresses();
    let result = window.relocate(Placement::Anywhere.only(Strategy::Move));
    match lab::kernel().as_str() {
        "5.10" | "6.1" => {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Hazard);
            assert_eq!(window.addresses(), old);
        }
        _ => {
            let relocation = result.unwrap();
            assert_eq!(relocation.report.source, Source::ReleasedWithGap);
            assert!(relocation.report.to_string().contains("(gap)"));
            assert_eq!(probe::load(old.start), None);
        }
    }
    assert_eq!(window.register::<u32>(0).unwrap().read(), lab::EDU_ID);
    drop(window);
    close(device);
}

#[test]
fn a_read_only_duplicate_reads_and_does_not_write() {
    let device = lab::open("edu");
    let window = lab::map_all(&device, 0);
    let (watcher, report) = window.duplicate_read_only(Placement::Anywhere).unwrap();
    assert_strategy(&report);
    window.register::<u32>(4).unwrap().write(1);
    assert_eq!(watcher.read_only_register::<u32>(4).unwrap().read(), !1);
    let refused = watcher.register::<u32>(4).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line =
        maps.lines().find(|line| line.starts_with(&format!("{:x}-", watcher.addresses().start)));
    assert!(line.unwrap().contains(" r--s "), "{line:?}");
    drop((window, watcher));
    close(device);
}

#[test]
fn registers_that_cannot_be_mapped_are_trapped() {
    let device = lab::open("nvme");
    {
        let bar = device.bar(0).unwrap();
        let text = bar.layout().to_string();
        assert!(text.contains("trapped: MSI-X table"), "{text}");
        let mapped = bar.map(0..0x1000, Placement::Anywhere).unwrap();
        let trapped = bar.trapped_register::<u32>(8).unwrap();
        assert_eq!(trapped.read().unwrap(), mapped.register::<u32>(8).unwrap().read(), "VS");
        let aqa = bar.trapped_register::<u32>(0x24).unwrap();
        aqa.write(0x7_0007).unwrap();
        assert_eq!(mapped.register::<u32>(0x24).unwrap().read(), 0x7_0007);
        let ports = lab::open("testdev");
        let text = ports.bar(1).unwrap().layout().to_string();
        assert_eq!(text, "0x0..0x100 trapped: I/O ports");
        ports.bar(1).unwrap().trapped_register::<u8>(0).unwrap().read().unwrap();
        close(ports);
    }
    close(device);
}
