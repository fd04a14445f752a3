#![expect(unsafe_code, reason = "addresses are owned by convention")]
use std::sync::Arc;

use super::*;
use crate::space::fixture::{
    MIB, PAGE, backing, map, read, secluded, shared, state, unmap_and_let_in, write,
};
use crate::space::{BackingKind, Hazard, KernelVersion, Placement};
use crate::sys::spy::{self, Call};

fn is_fixed(call: Call) -> bool {
    matches!(
        call,
        Call::MapFixed { .. }
            | Call::DontUnmapFixed { .. }
            | Call::OldLenZeroFixed { .. }
            | Call::MoveFixed { .. }
    )
}

/// Runs `f` as on a kernel that refuses an old length of 0, as stock kernels do for a BAR.
fn without_old_len_zero<T>(f: impl FnOnce() -> T) -> T {
    let refuse = |call| matches!(call, Call::OldLenZero | Call::OldLenZeroFixed { .. });
    spy::refuse(Errno::EFAULT, refuse, f)
}

const DUPLICATING: [Strategy; 3] = [Strategy::DontUnmap, Strategy::OldLenZero, Strategy::MapAgain];

#[test]
fn both_sides_of_a_duplicate_show_the_same_bytes() {
    for strategy in DUPLICATING {
        for len in [PAGE, 4 * MIB] {
            let source = shared(len);
            write(&source, len - 4, 1);
            let request = Placement::Anywhere.only(strategy);
            let (duplicate, report) = source.duplicate(Access::ReadWrite, request).unwrap();
            assert_eq!((report.strategy, report.attempts.len()), (strategy, 0));
            assert_eq!((report.from, report.to), (source.range(), duplicate.range()));
            let cold = strategy == Strategy::DontUnmap;
            assert_eq!(report.source, if cold { Source::Cold } else { Source::Warm });
            assert_eq!(read(&duplicate, len - 4), 1);
            write(&duplicate, 0, 2);
            assert_eq!(read(&source, 0), 2);
        }
    }
}

#[test]
fn a_relocation_leaves_a_reservation_that_reaches_nothing() {
    for strategy in [Strategy::DontUnmap, Strategy::MapAgain, Strategy::Move] {
        for placed in [false, true] {
            let len = 2 * MIB;
            let backing = Arc::new(backing(len, BackingKind::SharedMemory));
            let start = Placement::In(secluded(len));
            let mut mapping = Mapping::new(backing, 0, len, Access::ReadWrite, start).unwrap();
            write(&mapping, 8, 3);
            let old = mapping.range();
            let placement = match placed {
                false => Placement::Anywhere,
                true => Placement::In(Reservation::aligned(len, 2 * MIB).unwrap()),
            };
            let Relocation { old: left, report } =
                mapping.relocate(placement.only(strategy)).unwrap();
            assert_eq!(left.as_ref().unwrap().range(), old);
            assert_eq!(state(&old), (0, len), "{strategy}");
            assert_eq!((report.from, report.to), (old, mapping.range()));
            assert_eq!(read(&mapping, 8), 3);
            let gap = strategy == Strategy::Move;
            let source = if gap { Source::ReleasedWithGap } else { Source::Released };
            assert_eq!(report.source, source);
        }
    }
}

#[test]
fn dropping_a_mapping_in_a_piece_leaves_the_reservation_whole() {
    let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
    let whole = secluded(3 * PAGE);
    let range = whole.range();
    let (first, rest) = whole.split_at(PAGE).unwrap();
    let (middle, last) = rest.split_at(PAGE).unwrap();
    let placement = Placement::In(middle);
    let mapping = Mapping::new(backing, 0, PAGE, Access::ReadWrite, placement).unwrap();
    assert_eq!(state(&range), (PAGE, 2 * PAGE));
    drop(mapping);
    assert_eq!(state(&range), (0, 3 * PAGE));
    drop((first, last));
    assert_eq!(state(&range), (0, 0), "the last piece unmaps all of it");
}

#[test]
fn each_use_of_mremap_is_probed_once_for_each_backing() {
    let backing = Arc::new(backing(MIB, BackingKind::SharedMemory));
    let windows: Vec<_> = (0..3).map(|_| map(&backing, MIB)).collect();
    let refuse = |call| match call {
        Call::DontUnmap => Some(Errno::EINVAL),
        Call::OldLenZero => Some(Errno::EFAULT),
        _ => None,
    };
    let (reports, calls) = spy::record(|| {
        spy::script(refuse, || {
            let duplicate = |window: &Mapping| {
                window.duplicate(Access::ReadWrite, Placement::Anywhere.into()).unwrap().1
            };
            [&windows[0], &windows[1], &windows[2], &windows[0]].map(duplicate)
        })
    });
    for probe in [Call::DontUnmap, Call::OldLenZero] {
        assert_eq!(calls.iter().filter(|call| **call == probe).count(), 1);
    }
    for (index, report) in reports.iter().enumerate() {
        assert_eq!(report.strategy, Strategy::MapAgain);
        let refused = |strategy, errno| {
            let outcome = Outcome::Refused { errno, remembered: index > 0 };
            Attempt { strategy, outcome }
        };
        let dont_unmap = refused(Strategy::DontUnmap, libc::EINVAL);
        assert_eq!(*report.attempts, [dont_unmap, refused(Strategy::OldLenZero, libc::EFAULT)]);
    }
}

#[test]
fn only_lasting_results_of_a_probe_are_remembered() {
    let window = shared(PAGE);
    let by_dont_unmap =
        || window.duplicate(Access::ReadWrite, Placement::Anywhere.only(Strategy::DontUnmap));
    let is_probe = |call| call == Call::DontUnmap;
    let refused = spy::refuse(Errno::EINVAL, is_probe, by_dont_unmap).unwrap_err();
    assert_eq!((refused.kind(), refused.error().errno()), (ErrorKind::Refused, Some(libc::EINVAL)));
    assert!(by_dont_unmap().is_ok(), "asked again");
    let passing = shared(PAGE);
    let any = || passing.duplicate(Access::ReadWrite, Placement::Anywhere.into()).unwrap().1;
    assert_eq!(spy::refuse(Errno::ENOMEM, is_probe, any).strategy, Strategy::OldLenZero);
    assert_eq!(any().strategy, Strategy::DontUnmap, "ENOMEM was not remembered");
}

#[test]
fn no_fixed_call_comes_before_an_acceptance_without_fixed() {
    for kind in [BackingKind::SharedMemory, BackingKind::VfioPci, BackingKind::Other] {
        let all = [Strategy::DEFAULT_ORDER, &[Strategy::MapAgain], &[Strategy::OldLenZero]];
        for strategies in all.into_iter().chain([&[Strategy::Move][..]]) {
            let backing = Arc::new(backing(4 * MIB, kind));
            let ((), calls) = spy::record(|| {
                let mut window = map(&backing, 4 * MIB);
                let place = Placement::In(Reservation::aligned(4 * MIB, 2 * MIB).unwrap());
                let _ = window.duplicate(Access::ReadOnly, Placement::Anywhere.by(strategies));
                let aside = Placement::In(Reservation::aligned(4 * MIB, 2 * MIB).unwrap());
                let _ = window.duplicate(Access::ReadOnly, aside.by(strategies));
                let _ = window.relocate(place.by(strategies));
            });
            let first = |matches: fn(&Call) -> bool| calls.iter().position(matches);
            let fixed_map =
                first(|call| matches!(call, Call::MapFixed { .. } | Call::MoveFixed { .. }));
            assert!(first(|call| matches!(call, Call::Map { .. })) < fixed_map, "{calls:?}");
            if let Some(fixed) = first(|call| matches!(call, Call::DontUnmapFixed { .. })) {
                assert!(first(|call| *call == Call::DontUnmap).is_some_and(|probe| probe < fixed));
            }
            if let Some(fixed) = first(|call| matches!(call, Call::OldLenZeroFixed { .. })) {
                assert!(first(|call| *call == Call::OldLenZero).is_some_and(|probe| probe < fixed));
            }
        }
    }
}

#[test]
fn a_refused_fixed_call_never_costs_the_caller_its_reservation() {
    type Refuse = fn(Errno, fn(Call) -> bool, &mut dyn FnMut());
    let kept: Refuse = |errno, matches, f| spy::refuse(errno, matches, f);
    let destroyed: Refuse = |errno, matches, f| spy::refuse_destructively(errno, matches, f);
    for refuse in [kept, destroyed] {
        for strategy in [Strategy::DontUnmap, Strategy::MapAgain, Strategy::Move] {
            let mut window = shared(2 * MIB);
            write(&window, 0, 7);
            let at = window.range();
            let place = secluded(2 * MIB);
            let range = place.range();
            let mut request = Some(Placement::In(place).only(strategy));
            let mut result = None;
            refuse(Errno::EIO, is_fixed, &mut || {
                result = request.take().map(|request| window.relocate(request));
            });
            let failed = result.unwrap().unwrap_err();
            assert_eq!(
                (failed.kind(), failed.error().errno()),
                (ErrorKind::Refused, Some(libc::EIO))
            );
            assert_eq!(failed.into_reservation().unwrap().range(), range);
            assert_eq!((window.range(), read(&window, 0)), (at, 7), "the window is where it was");
        }
    }
}

#[test]
fn a_destination_that_a_refusal_unmapped_is_used_again() {
    let window = shared(2 * MIB);
    let place = secluded(2 * MIB);
    let range = place.range();
    let (duplicate, report) = spy::refuse_destructively(
        Errno::EINVAL,
        |call| matches!(call, Call::DontUnmapFixed { .. }),
        || window.duplicate(Access::ReadWrite, Placement::In(place).into()).unwrap(),
    );
    assert_eq!((report.strategy, duplicate.range()), (Strategy::OldLenZero, range));
    write(&duplicate, 4, 9);
    assert_eq!(read(&window, 4), 9);
}

#[test]
fn a_reservation_that_other_code_took_is_left_alone() {
    let mut window = shared(2 * MIB);
    let at = window.range();
    let place = secluded(2 * MIB);
    let range = place.range();
    let failed = spy::script(
        move |call| match call {
            Call::MapFixed { address, len } => {
                // SAFETY: the reservation is the caller's to replace.
                unsafe { unmap_and_let_in(address..address + len, None) };
                Some(Errno::EIO)
            }
            _ => None,
        },
        || window.relocate(Placement::In(place).only(Strategy::MapAgain)).unwrap_err(),
    );
    assert_eq!(failed.kind(), ErrorKind::ReservationLost);
    assert!(failed.into_reservation().is_none());
    assert_eq!(state(&range), (2 * MIB, 0), "the other mapping stays");
    assert_eq!((window.range(), read(&window, 0)), (at, 0));
}

#[test]
fn when_the_old_side_cannot_be_covered_nothing_has_changed() {
    for strategy in [Strategy::DontUnmap, Strategy::MapAgain] {
        let mut window = shared(2 * MIB);
        write(&window, 0, 5);
        let at = window.range();
        let place = secluded(2 * MIB);
        let range = place.range();
        let mut covers = 0;
        let failed = spy::script(
            move |call| match call {
                Call::Cover { .. } => {
                    covers += 1;
                    (covers == 1).then_some(Errno::ENOMEM)
                }
                _ => None,
            },
            || window.relocate(Placement::In(place).only(strategy)).unwrap_err(),
        );
        assert_eq!(failed.error().errno(), Some(libc::ENOMEM));
        assert!(failed.to_string().contains("nothing has changed"), "{failed}");
        assert_eq!(failed.into_reservation().unwrap().range(), range);
        assert_eq!(state(&range), (0, 0), "the new side is gone, and the reservation dropped");
        assert_eq!((window.range(), read(&window, 0)), (at, 5));
    }
}

#[test]
fn a_cover_that_fails_after_unmapping_is_reported_as_a_gap() {
    for placed in [false, true] {
        let backing = Arc::new(backing(2 * MIB, BackingKind::SharedMemory));
        let (home, rest) = secluded(4 * MIB).split_at(2 * MIB).unwrap();
        let placement = if placed { Placement::In(home) } else { Placement::Anywhere };
        let mut window = Mapping::new(backing, 0, 2 * MIB, Access::ReadWrite, placement).unwrap();
        write(&window, 0, 6);
        let from = window.range();
        let place = secluded(2 * MIB);
        let relocation = spy::refuse_destructively(
            Errno::ENOMEM,
            |call| matches!(call, Call::Cover { .. }),
            || window.relocate(Placement::In(place).into()).unwrap(),
        );
        assert_eq!(read(&window, 0), 6);
        match relocation.report.source {
            Source::ReleasedWithGap => {
                let old = relocation.old.unwrap();
                assert_eq!((old.range(), state(&from)), (from.clone(), (0, 2 * MIB)));
            }
            // The kernel may have given the hole to a test that runs at the same time.
            Source::Lost => assert!(!placed && relocation.old.is_none()),
            other => panic!("{other:?}"),
        }
        drop(rest);
    }
}

#[test]
fn if_nothing_can_be_covered_the_reservation_is_given_back() {
    let mut window = shared(2 * MIB);
    write(&window, 0, 8);
    let at = window.range();
    let place = secluded(2 * MIB);
    let range = place.range();
    let failed = spy::refuse(
        Errno::ENOMEM,
        |call| matches!(call, Call::Cover { .. }),
        || window.relocate(Placement::In(place).into()).unwrap_err(),
    );
    let given_back = failed.into_reservation().unwrap();
    assert_eq!((given_back.range(), state(&range)), (range.clone(), (0, 2 * MIB)));
    assert_eq!((window.range(), read(&window, 0)), (at, 8));
}

#[test]
fn a_dropped_mapping_that_cannot_be_covered_is_unmapped() {
    let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
    let (home, rest) = secluded(2 * PAGE).split_at(PAGE).unwrap();
    let range = home.range();
    let placement = Placement::In(home);
    let window = Mapping::new(backing, 0, PAGE, Access::ReadWrite, placement).unwrap();
    spy::refuse(Errno::ENOMEM, |call| matches!(call, Call::Cover { .. }), || drop(window));
    assert_eq!(state(&range), (0, PAGE), "reserved, and not mapped to the file");
    drop(rest);
    assert_eq!(state(&range), (0, 0));
}

#[test]
fn what_cannot_be_finished_is_undone() {
    let window = shared(PAGE);
    let protecting = |call| call == Call::Protect;
    let advising = |call| call == Call::Advise;
    let unfinished = [
        (Strategy::DontUnmap, protecting as fn(Call) -> bool),
        (Strategy::OldLenZero, protecting),
        (Strategy::MapAgain, advising),
    ];
    for (strategy, step) in unfinished {
        for placed in [false, true] {
            let place = Reservation::new(PAGE).unwrap();
            let range = place.range();
            let placement = if placed { Placement::In(place) } else { Placement::Anywhere };
            let request = placement.only(strategy);
            let (failed, calls) = spy::record(|| {
                spy::refuse(Errno::ENOMEM, step, || window.duplicate(Access::ReadOnly, request))
            });
            let reservation = failed.unwrap_err().into_reservation();
            assert_eq!(reservation.is_some(), placed);
            if let Some(reservation) = reservation {
                assert_eq!((reservation.range(), state(&range)), (range.clone(), (0, PAGE)));
            }
            let undo =
                if placed { Call::Cover { address: range.start, len: PAGE } } else { Call::Unmap };
            assert_eq!(calls.last(), Some(&undo));
        }
    }
}

#[test]
fn a_read_only_duplicate_cannot_be_written_by_any_strategy() {
    for strategy in DUPLICATING {
        let window = shared(PAGE);
        let request = Placement::Anywhere.only(strategy);
        let (duplicate, _) = window.duplicate(Access::ReadOnly, request).unwrap();
        write(&window, 0, 11);
        assert_eq!((duplicate.access(), read(&duplicate, 0)), (Access::ReadOnly, 11));
        let line = std::fs::read_to_string("/proc/self/maps").unwrap();
        let start = format!("{:x}-", duplicate.range().start);
        let line = line.lines().find(|line| line.starts_with(&start)).unwrap();
        assert!(line.contains(" r--s "), "{line}");
    }
}

#[test]
fn a_hazard_forbids_dont_unmap_that_the_kernel_accepts() {
    let gib = 1 << 30;
    let cases = [
        (BackingKind::VfioPci, (6, 1), PAGE, Some(Hazard::SourceMaySpin)),
        (BackingKind::VfioPci, (6, 11), PAGE, Some(Hazard::SourceMaySpin)),
        (BackingKind::VfioPci, (6, 12), PAGE, None),
        (BackingKind::VfioPci, (7, 3), gib, Some(Hazard::OneGibEntry)),
        (BackingKind::SharedMemory, (5, 13), gib, None),
        (BackingKind::Other, (7, 3), PAGE, Some(Hazard::UnknownBacking)),
    ];
    for (kind, (major, minor), len, hazard) in cases {
        let backing = backing(len, kind).on_kernel(KernelVersion::new(major, minor));
        let window = map(&Arc::new(backing), len);
        let duplicate = || window.duplicate(Access::ReadWrite, Placement::Anywhere.into()).unwrap();
        let (_, report) = without_old_len_zero(duplicate);
        match hazard {
            Some(hazard) => {
                let outcome = Outcome::Hazard(hazard);
                assert_eq!(report.attempts[0], Attempt { strategy: Strategy::DontUnmap, outcome });
                assert_eq!(report.strategy, Strategy::MapAgain);
                let pinned = Placement::Anywhere.only(Strategy::DontUnmap);
                let failed = window.duplicate(Access::ReadWrite, pinned).unwrap_err();
                assert_eq!(failed.kind(), ErrorKind::Hazard, "pinning does not make it safe");
            }
            None => assert_eq!(report.strategy, Strategy::DontUnmap),
        }
    }
}

#[test]
fn gib_entries_are_moved_where_an_old_length_of_0_is_accepted() {
    for (kind, strategy) in
        [(BackingKind::VfioPci, Strategy::DontUnmap), (BackingKind::Other, Strategy::MapAgain)]
    {
        let backing = backing(1 << 30, kind).on_kernel(KernelVersion::new(7, 3));
        let window = map(&Arc::new(backing), 1 << 30);
        let (_, report) = window.duplicate(Access::ReadWrite, Placement::Anywhere.into()).unwrap();
        assert_eq!(report.strategy, strategy, "{report}");
    }
}

#[test]
fn an_old_length_of_0_of_an_unknown_backing_is_not_used() {
    let window = map(&Arc::new(backing(PAGE, BackingKind::Other)), PAGE);
    let pinned = Placement::Anywhere.only(Strategy::OldLenZero);
    let failed = window.duplicate(Access::ReadWrite, pinned).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Hazard, "{failed}");
}

#[test]
fn an_old_length_of_0_does_not_relocate() {
    let mut window = shared(PAGE);
    let at = window.range();
    let place = Reservation::new(PAGE).unwrap();
    let range = place.range();
    let pinned = Placement::In(place).only(Strategy::OldLenZero);
    let failed = window.relocate(pinned).unwrap_err();
    assert!(failed.to_string().contains("OldLenZero cannot relocate"), "{failed}");
    assert_eq!(failed.into_reservation().unwrap().range(), range);
    assert_eq!((window.range(), state(&range)), (at, (0, 0)), "the reservation is dropped");
}

#[test]
fn a_refused_old_length_of_0_leaves_all_as_it_was() {
    for destructive in [false, true] {
        let window = shared(2 * MIB);
        write(&window, 0, 7);
        let place = secluded(2 * MIB);
        let range = place.range();
        let request = Placement::In(place).only(Strategy::OldLenZero);
        let refuse = if destructive { spy::refuse_destructively } else { spy::refuse };
        let failed =
            refuse(Errno::ENOMEM, is_fixed, || window.duplicate(Access::ReadWrite, request))
                .unwrap_err();
        let given_back = failed.into_reservation().unwrap();
        assert_eq!((given_back.range(), state(&range)), (range.clone(), (0, 2 * MIB)));
        assert_eq!(read(&window, 0), 7);
    }
}

#[test]
fn a_move_with_a_hazard_is_never_made() {
    use BackingKind::{Other, VfioPci};
    for (kind, (major, minor), len, hazard) in [
        (VfioPci, (6, 1), PAGE, Hazard::MoveEscapesRevocation),
        (Other, (6, 1), PAGE, Hazard::MoveEscapesRevocation),
        (VfioPci, (7, 3), 1 << 30, Hazard::OneGibEntry),
        (Other, (7, 3), 1 << 30, Hazard::OneGibEntry),
    ] {
        let backing = backing(len, kind).on_kernel(KernelVersion::new(major, minor));
        let mut window = map(&Arc::new(backing), len);
        let (failed, calls) =
            spy::record(|| window.relocate(Placement::Anywhere.only(Strategy::Move)).unwrap_err());
        assert_eq!(failed.kind(), ErrorKind::Hazard);
        assert!(failed.to_string().contains(&hazard.to_string()), "{failed}");
        assert!(!calls.iter().any(|call| matches!(call, Call::MoveFixed { .. })));
    }
}

#[test]
fn an_unsuitable_placement_is_refused_and_given_back() {
    let window = shared(4 * MIB);
    let too_small = Reservation::aligned(2 * MIB, 2 * MIB).unwrap();
    let incongruent = Reservation::congruent(4 * MIB, 2 * MIB, PAGE as u64).unwrap();
    for (place, word) in [(too_small, "larger"), (incongruent, "congruent")] {
        let range = place.range();
        let failed = window.duplicate(Access::ReadWrite, Placement::In(place).into()).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::UnsuitablePlacement);
        assert!(failed.to_string().contains(word), "{failed}");
        assert_eq!(failed.into_reservation().unwrap().range(), range);
    }
    let taken = Placement::At(window.range().start);
    let failed = window.duplicate(Access::ReadWrite, taken.into()).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::AddressTaken);
    assert!(failed.to_string().contains("vfio-remap-test"), "{failed}");
    let named = window.duplicate(Access::ReadWrite, Placement::Anywhere.by(&[])).unwrap_err();
    assert_eq!(named.error().object(), "bar 0 of test, 0x0..0x400000");
    assert_eq!(named.kind(), ErrorKind::Refused, "nothing was allowed");
    assert_eq!(named.error().reason(), "no strategy is allowed");
}

#[test]
fn large_mappings_are_congruent_wherever_they_go() {
    let backing = Arc::new(backing(8 * MIB, BackingKind::SharedMemory));
    let offset = 2 * MIB as u64 + PAGE as u64;
    let place = Placement::Anywhere;
    let mut window = Mapping::new(backing, offset, 4 * MIB, Access::ReadWrite, place).unwrap();
    let residue = |mapping: &Mapping| mapping.range().start % (2 * MIB);
    assert_eq!(residue(&window), PAGE);
    assert_eq!(window.offset(), offset);
    window.relocate(Placement::Anywhere.into()).unwrap();
    assert_eq!(residue(&window), PAGE);
    let (duplicate, _) = window.duplicate(Access::ReadWrite, Placement::Anywhere.into()).unwrap();
    assert_eq!(residue(&duplicate), PAGE);
}

#[test]
fn a_fixed_mapping_of_an_unknown_backing_is_checked_first() {
    let window = map(&Arc::new(backing(4 * PAGE, BackingKind::Other)), 4 * PAGE);
    let ((), calls) = spy::record(|| {
        for _ in 0..3 {
            let place = Placement::In(Reservation::new(4 * PAGE).unwrap());
            window.duplicate(Access::ReadWrite, place.only(Strategy::MapAgain)).unwrap();
        }
    });
    let maps = calls.iter().filter_map(|call| match *call {
        Call::Map { len } => Some((len, false)),
        Call::MapFixed { len, .. } => Some((len, true)),
        _ => None,
    });
    let len = 4 * PAGE;
    assert_eq!(maps.collect::<Vec<_>>(), [(len, false), (len, true)].repeat(3), "{calls:?}");
}

#[test]
fn a_mapping_without_gib_entries_is_moved_on_request() {
    for kind in [BackingKind::VfioPci, BackingKind::Other] {
        for len in [PAGE, 4 * MIB] {
            let mut window =
                map(&Arc::new(backing(len, kind).on_kernel(KernelVersion::new(7, 3))), len);
            write(&window, 0, 5);
            let relocation = window.relocate(Placement::Anywhere.only(Strategy::Move)).unwrap();
            assert_eq!((relocation.report.strategy, read(&window, 0)), (Strategy::Move, 5));
        }
    }
}

#[test]
fn an_acceptance_is_remembered_too() {
    let window = shared(PAGE);
    let asked = [2, 1, 1].map(|_| {
        let anywhere = || window.duplicate(Access::ReadWrite, Placement::Anywhere.into());
        let (made, calls) = spy::record(anywhere);
        assert_eq!(made.unwrap().1.strategy, Strategy::DontUnmap);
        calls.iter().filter(|call| **call == Call::DontUnmap).count()
    });
    assert_eq!(asked, [2, 1, 1], "the probe, and the duplicates");
}

#[test]
fn the_error_advises_map_again_if_it_was_not_allowed() {
    let window = map(&Arc::new(backing(PAGE, BackingKind::Other)), PAGE);
    let duplicate = |strategies: &[Strategy]| {
        let request = Placement::Anywhere.by(strategies);
        let any = |call| matches!(call, Call::Map { .. });
        spy::refuse(Errno::EIO, any, || window.duplicate(Access::ReadWrite, request).unwrap_err())
    };
    let all = duplicate(Strategy::DEFAULT_ORDER);
    assert_eq!((all.kind(), all.error().errno()), (ErrorKind::Refused, Some(libc::EIO)), "{all}");
    assert!(!all.error().advice().contains("MapAgain"), "{all}");
    let first = duplicate(&[Strategy::DontUnmap]);
    assert!(first.error().advice().contains("allow MapAgain"), "{first}");
}

#[test]
fn a_known_backing_is_checked_once_for_each_access() {
    let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
    let kept = Mapping::new(backing.clone(), 0, PAGE, Access::ReadOnly, Placement::Anywhere);
    let tries = [Access::ReadOnly, Access::ReadWrite, Access::ReadWrite].map(|access| {
        let place = Placement::In(Reservation::new(PAGE).unwrap());
        let (made, calls) =
            spy::record(|| Mapping::new(backing.clone(), 0, PAGE, access, place).map(drop));
        made.unwrap();
        calls.iter().filter(|call| matches!(call, Call::Map { .. })).count()
    });
    assert_eq!(tries, [0, 1, 0]);
    drop(kept);
    assert_eq!(format!("{backing:?}"), "Backing(bar 0 of test, SharedMemory)");
}

#[test]
fn a_gib_is_congruent_modulo_a_gib() {
    const GIB: usize = 1 << 30;
    let backing = Arc::new(backing(2 * GIB, BackingKind::SharedMemory));
    let all = [GIB, GIB + 4 * MIB].map(|len| {
        let place = Placement::Anywhere;
        Mapping::new(backing.clone(), PAGE as u64, len, Access::ReadOnly, place).unwrap()
    });
    assert_eq!(all.map(|window| window.range().start % GIB), [PAGE, PAGE]);
}
