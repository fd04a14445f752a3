//! A thread in the handler while another one drops, restores or relocates the window; and one that duplicates a window
//! while another one revokes and restores it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use vfio_remap::device::Revoked;
use vfio_remap::space::{FaultGuard, FaultScope};
use vfio_remap::{ErrorKind, Placement, Reservation, Strategy};

use super::guard::rounds;
use super::truncatable::{StopAtEnd, device, set_there};
use crate::support::alone::alone;

/// Does something in many rounds, while another thread does something else again and again.
fn while_another_thread(act: impl Fn(usize) + Sync, other: &(impl Fn() + Sync)) {
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                other();
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut round = 0;
        while round < rounds(3_400) || done.load(Ordering::Relaxed) < 100 {
            act(round);
            round += 1;
        }
    });
}

/// The other thread's handler revokes all windows of the device.
#[test]
fn a_window_is_dropped_while_handlers_revoke_it() {
    alone(|| {
        FaultGuard::install(FaultScope::WholeDevice).unwrap();
        let (device, [file, _]) = device();
        let culprit = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        set_there(&file, false);
        let register = culprit.register::<u32>(0).unwrap();
        let bar = device.bar(1).unwrap();
        while_another_thread(
            |round| {
                let window = bar.map(.., Placement::Anywhere).unwrap();
                let range = window.addresses();
                if round % 2 == 0 {
                    drop(window);
                    // If a handler still replaced it, the reservation would not be what it is.
                    if let Ok(reservation) = Reservation::at(range.start, range.len()) {
                        let probe = crate::common::probe::load(range.start);
                        assert_eq!((probe, reservation.range()), (None, range));
                    }
                } else {
                    let reservation = window.into_reservation().unwrap();
                    std::thread::yield_now();
                    assert_eq!(crate::common::probe::load(range.start), None);
                    drop(reservation);
                }
            },
            &|| {
                assert_eq!(register.read(), u32::MAX);
                set_there(&file, true);
                culprit.restore().unwrap();
                set_there(&file, false);
            },
        );
    });
}

#[test]
fn a_window_is_restored_while_handlers_revoke_it() {
    alone(|| {
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        let (device, [file, _]) = device();
        let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        let register = window.register::<u32>(0).unwrap();
        while_another_thread(
            |round| {
                let now = round % 2 == 0;
                set_there(&file, now);
                match window.restore() {
                    Ok(_) => {}
                    Err(error) => {
                        assert_eq!((error.kind(), now), (ErrorKind::Gone, false), "{error}")
                    }
                }
                if now {
                    // Nobody truncates it now: state and pages agree, once a late handler has ended.
                    window.restore().unwrap();
                    register.write(7);
                    let mut bytes = [0; 4];
                    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
                    let begun = Instant::now();
                    while u32::from_le_bytes(bytes) != 7 && !window.is_revoked() {
                        assert!(begun.elapsed() < Duration::from_secs(60), "it reaches no device");
                        std::thread::yield_now();
                    }
                }
            },
            &|| {
                let value = register.read();
                assert!([0, 7, u32::MAX].contains(&value), "{value:#x}");
            },
        );
    });
}

/// A duplicate takes no turn with the verbs of its source. It reaches the device, or is refused or revoked.
#[test]
fn a_window_is_duplicated_while_it_comes_and_goes() {
    alone(|| {
        let (device, [file, _]) = device();
        std::os::unix::fs::FileExt::write_all_at(&file, &7u32.to_le_bytes(), 0).unwrap();
        let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        let register = window.register::<u32>(0).unwrap();
        let made = AtomicUsize::new(0);
        let strategies = [Strategy::DontUnmap, Strategy::MapAgain, Strategy::OldLenZero];
        while_another_thread(
            |round| {
                let by = Placement::Anywhere.only(strategies[round % strategies.len()]);
                match window.duplicate(by) {
                    Ok((duplicate, _)) => {
                        let value = duplicate.register::<u32>(0).unwrap().read();
                        assert!(value == 7 || duplicate.is_revoked(), "{value:#x}");
                        made.fetch_add(usize::from(value == 7), Ordering::Relaxed);
                    }
                    Err(failed) => {
                        let known = [ErrorKind::Revoked, ErrorKind::Refused];
                        assert!(known.contains(&failed.kind()), "{failed}");
                    }
                }
                let value = register.read();
                assert!([7, u32::MAX].contains(&value), "{value:#x}");
            },
            &|| {
                window.revoke().unwrap();
                window.restore().unwrap();
                std::thread::yield_now();
            },
        );
        assert_ne!(made.into_inner(), 0);
        assert_eq!(register.read(), 7);
    });
}

/// It is one of them, or its source was revoked when it was made.
#[test]
fn a_duplicate_is_revoked_with_all_windows_of_its_device() {
    let (device, _files) = device();
    let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    let by = || Placement::Anywhere.only(Strategy::MapAgain);
    let mut made = 0;
    let mut round = 0;
    while round < rounds(3_400) || made < 10 {
        let barrier = std::sync::Barrier::new(2);
        let duplicate = std::thread::scope(|scope| {
            let duplicating = scope.spawn(|| {
                barrier.wait();
                window.duplicate(by())
            });
            barrier.wait();
            // In different steps of the other thread's.
            (0..round % 64 * 8).for_each(|_| std::hint::spin_loop());
            assert!(device.revoke().errors.is_empty());
            duplicating.join().unwrap()
        });
        match duplicate {
            Ok((duplicate, _)) => {
                assert_eq!(duplicate.revoked(), Some(Revoked::Requested));
                made += 1;
            }
            Err(failed) => assert_eq!(failed.kind(), ErrorKind::Revoked, "{failed}"),
        }
        assert!(device.restore().errors.is_empty());
        round += 1;
    }
}

#[test]
fn a_window_is_relocated_while_handlers_revoke_it() {
    alone(|| {
        FaultGuard::install(FaultScope::WholeDevice).unwrap();
        let (device, [file, other_file]) = device();
        let culprit = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&other_file, &7u32.to_le_bytes(), 0).unwrap();
        let window = device.bar(1).unwrap().map(.., Placement::Anywhere).unwrap();
        let window = std::sync::Mutex::new(window);
        let register = culprit.register::<u32>(0).unwrap();
        let strategies = [Strategy::DontUnmap, Strategy::MapAgain, Strategy::Move];
        while_another_thread(
            |round| {
                let mut window = window.lock().unwrap();
                window.restore().unwrap();
                let by = strategies[round % strategies.len()];
                match window.relocate(Placement::Anywhere.only(by)) {
                    Ok(relocation) => match relocation.old {
                        Some(old) => assert_eq!(crate::common::probe::load(old.address()), None),
                        // The other thread may have mapped something there meanwhile.
                        None => assert_eq!(by, Strategy::Move),
                    },
                    Err(failed) => {
                        let known = [ErrorKind::Revoked, ErrorKind::Refused];
                        assert!(known.contains(&failed.kind()), "{failed}");
                    }
                }
                let value = window.register::<u32>(0).unwrap().read();
                assert!([7, u32::MAX].contains(&value), "{value:#x}");
                let by = strategies[round % 2];
                match window.duplicate(Placement::Anywhere.only(by)) {
                    Ok((duplicate, _)) => {
                        let value = duplicate.register::<u32>(0).unwrap().read();
                        assert!(value == 7 || duplicate.is_revoked(), "{value:#x}");
                    }
                    Err(failed) => {
                        let known = [ErrorKind::Revoked, ErrorKind::Refused];
                        assert!(known.contains(&failed.kind()), "{failed}");
                    }
                }
            },
            &|| {
                set_there(&file, false);
                assert_eq!(register.read(), u32::MAX);
                set_there(&file, true);
                culprit.restore().unwrap();
            },
        );
    });
}
