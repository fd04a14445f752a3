//! A thread in the handler while another one drops, restores or relocates the window.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use vfio_remap::space::{FaultGuard, FaultScope};
use vfio_remap::{ErrorKind, Placement, Reservation, Strategy};

use super::guard::rounds;
use super::truncatable::{StopAtEnd, device, set_there};
use crate::support::alone::alone;

/// A thread makes faults in one window, with the scope of the device, so that its handler revokes all others,
/// too, while this one drops, restores and relocates those.
fn while_handlers_run(act: impl Fn(usize) + Sync, faults: &(impl Fn() + Sync)) {
    let (stop, handled) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                faults();
                handled.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut round = 0;
        while round < rounds(3_400) || handled.load(Ordering::Relaxed) < 100 {
            act(round);
            round += 1;
        }
    });
}

#[test]
fn a_window_is_dropped_while_handlers_revoke_it() {
    alone(|| {
        FaultGuard::install(FaultScope::WholeDevice).unwrap();
        let (device, [file, _]) = device();
        let culprit = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        set_there(&file, false);
        let register = culprit.register::<u32>(0).unwrap();
        let bar = device.bar(1).unwrap();
        while_handlers_run(
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
        while_handlers_run(
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
        while_handlers_run(
            |round| {
                let mut window = window.lock().unwrap();
                window.restore().unwrap();
                let by = Placement::Anywhere.only(strategies[round % strategies.len()]);
                match window.relocate(by) {
                    Ok(relocation) => {
                        let old = relocation.old.unwrap();
                        assert_eq!(crate::common::probe::load(old.address()), None);
                    }
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
