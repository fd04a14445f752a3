//! Revoke, restore and seal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vfio_remap::device::Revoked;
use vfio_remap::space::{Reservation, WindowState, revocable_size, set_revocable_size};
use vfio_remap::transport::MemoryDevice;
use vfio_remap::{Device, ErrorKind, Placement, Strategy};

use super::truncatable::{PAGE, SIZE, StopAtEnd, Truncatable, aliases, device};
use crate::support::alone::alone;

#[test]
fn a_revoked_window_reads_ones_and_drops_writes() {
    let (device, [file, _]) = device();
    let windows = aliases(&device, 0);
    let at = PAGE + 8;
    for (index, window) in windows.iter().enumerate() {
        let register = window.register::<u32>(at).unwrap();
        register.write(7 + index as u32);
        let report = window.revoke().unwrap();
        assert_eq!(report.after, WindowState::Revoked { reads_ones: true });
        assert!(report.has_changed() && report.addresses == window.addresses());
        assert_eq!((register.read(), window.is_revoked()), (u32::MAX, true));
        assert_eq!(window.revoked(), Some(Revoked::Requested));
        let error = register.try_read().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Revoked, "{error}");
        register.write(99);
        let mut there = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut there, at as u64).unwrap();
        assert_eq!(u32::from_le_bytes(there), 7 + index as u32, "the write has reached it");
        assert!(window.gone());
        let report = window.restore().unwrap();
        assert_eq!(report.after, WindowState::Live);
        assert_eq!(register.read(), 7 + index as u32);
        assert_eq!(register.try_read().unwrap(), 7 + index as u32);
        register.write(u32::MAX);
        assert_eq!(register.try_read().unwrap(), u32::MAX, "it is the device's");
        assert_eq!(window.revoked(), None);
        // Both are verbs that may come twice.
        assert!(!window.restore().unwrap().has_changed());
        window.revoke().unwrap();
        assert!(!window.revoke().unwrap().has_changed());
        window.restore().unwrap();
    }
}

#[test]
fn writes_to_a_revoked_window_are_seen_by_no_other() {
    let (device, _files) = device();
    let [one, other, _] = aliases(&device, 0);
    one.revoke().unwrap();
    other.revoke().unwrap();
    one.register::<u32>(0).unwrap().write(1);
    assert_eq!(other.register::<u32>(0).unwrap().read(), u32::MAX);
    one.restore().unwrap();
    one.revoke().unwrap();
    assert_eq!(one.register::<u32>(0).unwrap().read(), u32::MAX, "the write was kept");
}

#[test]
fn a_bar_and_a_device_are_revoked_as_a_whole() {
    let (device, _files) = device();
    let [first, second] = [0, 1].map(|bar| aliases(&device, bar));
    let part = device.bar(0).unwrap().map(16..32, Placement::Anywhere).unwrap();
    let changes = device.bar(0).unwrap().revoke();
    assert_eq!((changes.changed(), changes.errors.len()), (4, 0), "{changes}");
    assert!(first.iter().chain([&part]).all(|window| window.is_revoked()));
    assert!(!second.iter().any(|window| window.is_revoked()));
    let changes = device.revoke();
    assert_eq!((changes.changed(), changes.reports.len()), (3, 7), "{changes}");
    assert_eq!(device.restore().changed(), 7);
    let all = first.iter().chain(&second).chain([&part]);
    assert!(all.clone().all(|window| !window.is_revoked()));
    all.for_each(|window| assert_eq!(window.register::<u32>(0).unwrap().read(), 0));
}

#[test]
fn windows_that_end_meanwhile_are_no_errors() {
    let (device, _files) = device();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
                drop(window.into_reservation().unwrap());
            }
        });
        for _ in 0..5000 {
            for changes in [device.revoke(), device.restore()] {
                assert!(changes.errors.is_empty(), "{changes}");
            }
        }
    });
}

#[test]
fn verbs_on_a_revoked_window_answer_that_it_is() {
    let (device, _files) = device();
    let mut window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    window.revoke().unwrap();
    let place = Reservation::new(SIZE).unwrap();
    let range = place.range();
    let failed = window.duplicate(Placement::In(place)).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Revoked, "{failed}");
    let place = failed.into_reservation().unwrap();
    assert_eq!(place.range(), range);
    let failed = window.relocate(Placement::In(place)).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Revoked, "{failed}");
    let place = failed.into_reservation().unwrap();
    window.restore().unwrap();
    window.relocate(Placement::In(place)).unwrap();
    // It can be revoked and restored where it is now, and given up while it is revoked.
    window.register::<u32>(0).unwrap().write(5);
    window.revoke().unwrap();
    window.restore().unwrap();
    assert_eq!(window.register::<u32>(0).unwrap().read(), 5);
    window.revoke().unwrap();
    let place = window.into_reservation().unwrap();
    assert_eq!(place.range(), range);
    assert!(device.revoke().reports.is_empty());
}

#[test]
fn a_revoked_window_leaves_its_reservation_when_dropped() {
    let (device, _files) = device();
    let whole = Reservation::new(2 * SIZE).unwrap();
    let range = whole.range();
    let (first, rest) = whole.split_at(SIZE).unwrap();
    let window = device.bar(0).unwrap().map(.., Placement::In(first)).unwrap();
    window.revoke().unwrap();
    drop(window);
    let taken = Reservation::at(range.start, SIZE).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AddressTaken, "it is a hole");
    drop(rest);
    drop(Reservation::at(range.start, 2 * SIZE).unwrap());
    device.close().unwrap();
}

#[test]
fn a_read_only_window_is_revoked_and_restored() {
    let (device, _files) = device();
    let [window, ..] = aliases(&device, 0);
    window.register::<u32>(4).unwrap().write(3);
    let (read_only, _) = window.duplicate_read_only(Placement::Anywhere).unwrap();
    let register = read_only.read_only_register::<u32>(4).unwrap();
    read_only.revoke().unwrap();
    assert_eq!(register.read(), u32::MAX);
    read_only.restore().unwrap();
    assert_eq!(register.read(), 3);
}

#[test]
fn threads_use_a_window_that_comes_and_goes() {
    let (device, _files) = device();
    let windows = aliases(&device, 0);
    windows[0].register::<u32>(0).unwrap().write(0x1234);
    let (stop, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        for window in &windows {
            let (stop, reads) = (&stop, &reads);
            scope.spawn(move || {
                let (read, write) = (window.register::<u32>(0), window.register::<u32>(64));
                let (read, write) = (read.unwrap(), write.unwrap());
                while !stop.load(Ordering::Relaxed) {
                    let value = read.read();
                    assert!([0x1234, u32::MAX].contains(&value), "{value:#x}");
                    write.write(value);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut rounds = 0;
        while rounds < 200 || reads.load(Ordering::Relaxed) < 200 {
            device.revoke().into_result().unwrap();
            windows[rounds % 3].restore().unwrap();
            device.restore().into_result().unwrap();
            rounds += 1;
        }
    });
}

#[test]
fn a_large_window_reads_zeros_when_it_is_revoked() {
    alone(|| {
        assert_eq!(revocable_size(), 64 << 20);
        set_revocable_size(2 * PAGE);
        let device = Device::new(Arc::new(MemoryDevice::new(SIZE as u64).unwrap()));
        let bar = device.bar(0).unwrap();
        let small = bar.map(..2 * PAGE as u64, Placement::Anywhere).unwrap();
        let large = bar.map(.., Placement::Anywhere).unwrap();
        assert!(small.reads_ones_when_revoked() && !large.reads_ones_when_revoked());
        large.register::<u64>(8).unwrap().write(9);
        for (window, value) in [(&small, u64::MAX), (&large, 0)] {
            let report = window.revoke().unwrap();
            assert_eq!(report.after, WindowState::Revoked { reads_ones: value != 0 });
            let register = window.register::<u64>(8).unwrap();
            assert_eq!(register.read(), value);
            register.write(1);
            window.restore().unwrap();
            assert_eq!(register.read(), 9);
        }
        set_revocable_size(SIZE);
        let again = bar.map(.., Placement::Anywhere).unwrap();
        assert!(again.reads_ones_when_revoked());
    });
}

#[test]
fn a_sealed_window_stays_until_the_process_ends() {
    alone(|| {
        let (device, _files) = device();
        let [window, other, _relocated] = aliases(&device, 0);
        other.revoke().unwrap();
        let failed = other.seal().unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Revoked, "{failed}");
        let clone = window.clone();
        let range = window.addresses();
        let (sealed, report) = match window.seal() {
            Ok(sealed) => sealed,
            Err(failed) => {
                // A kernel without mseal: nothing has changed.
                assert_eq!(failed.kind(), ErrorKind::Unsupported, "{failed}");
                assert!(failed.to_string().contains("Linux 6.10"), "{failed}");
                let window = failed.into_window();
                window.revoke().unwrap();
                return;
            }
        };
        assert_eq!(report.after, WindowState::Sealed);
        for error in [clone.revoke().unwrap_err(), clone.clone().seal().unwrap_err().into()] {
            assert_eq!(error.kind(), ErrorKind::Sealed, "{error}");
        }
        // It reaches its device, which is all that a restore is for.
        let report = clone.restore().unwrap();
        assert_eq!((report.after, report.addresses), (WindowState::Sealed, range.clone()));
        assert_eq!(device.restore().errors.len(), 0);
        // SAFETY: the kernel refuses it.
        let unmapped = unsafe { libc::munmap(range.start as *mut _, range.len()) };
        assert_eq!(unmapped, -1);
        let (copy, _) = sealed.duplicate(Placement::Anywhere.only(Strategy::MapAgain)).unwrap();
        copy.revoke().unwrap();
        sealed.register::<u32>(0).unwrap().write(4);
        // The others of the device are revoked all the same.
        let changes = device.revoke();
        assert_eq!(changes.errors.len(), 1, "{changes}");
        assert_eq!(changes.errors[0].kind(), ErrorKind::Sealed);
        let outage = device.reset().unwrap();
        assert!(!outage.is_over() && outage.to_string().contains("sealed"), "{outage}");
        let register = sealed.register::<u32>(0).unwrap();
        drop((sealed, clone, copy));
        assert_eq!(register.read(), 4);
        drop(register);
        let still = device.close().unwrap_err();
        for part in ["a sealed window over bar 0", "stays until the process ends"] {
            assert!(still.to_string().contains(part), "{still}");
        }
    });
}

#[test]
fn a_reset_restores_what_it_has_revoked_and_no_more() {
    let (device, _files) = device();
    let [one, other, third] = aliases(&device, 0);
    other.revoke().unwrap();
    one.register::<u32>(0).unwrap().write(6);
    let outage = device.reset().unwrap();
    assert_eq!((outage.revoked.changed(), outage.restored.changed()), (2, 2), "{outage}");
    assert!(outage.is_over());
    assert_eq!((one.is_revoked(), other.is_revoked(), third.is_revoked()), (false, true, false));
    assert_eq!(one.register::<u32>(0).unwrap().read(), 6);
}

#[test]
fn a_file_without_a_byte_of_the_window_is_not_restored() {
    let transport = Truncatable::new();
    let file = transport.file(0);
    let device = Device::new(Arc::new(transport));
    let window = device.bar(0).unwrap().map((PAGE as u64).., Placement::Anywhere).unwrap();
    window.revoke().unwrap();
    file.set_len(PAGE as u64).unwrap();
    let error = window.restore().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    assert!(window.is_revoked());
    // As far as it is there.
    file.set_len(2 * PAGE as u64).unwrap();
    window.restore().unwrap();
    assert_eq!(window.register::<u32>(0).unwrap().read(), 0);
}
