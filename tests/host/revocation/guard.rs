//! Faults in windows are contained.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vfio_remap::device::{FaultCause, Revoked};
use vfio_remap::space::{FaultGuard, FaultScope};
use vfio_remap::{Device, ErrorKind, Placement, Window};

use super::truncatable::{PAGE, SIZE, StopAtEnd, Truncatable, aliases, device, set_there};
use crate::support::alone::alone;

fn is_readable(fd: std::os::fd::BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
}

#[test]
fn a_truncated_file_is_a_revoked_window() {
    alone(|| {
        let (device, [file, _]) = device();
        // Before and after the guard is installed.
        let [one, other, third] = aliases(&device, 0);
        assert!(!FaultGuard::is_installed());
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        assert!(FaultGuard::is_installed());
        let late = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        let untouched = device.bar(1).unwrap().map(.., Placement::Anywhere).unwrap();
        let faults = device.contained_faults().unwrap();
        one.register::<u32>(0).unwrap().write(1);
        set_there(&file, false);
        for (index, window) in [&one, &other, &third, &late].into_iter().enumerate() {
            assert!(!window.is_revoked() && !is_readable(faults), "{index}");
            let register = window.register::<u32>(PAGE + 4 * index).unwrap();
            if index % 2 == 0 {
                assert_eq!(register.read(), u32::MAX);
            } else {
                register.write(3);
            }
            assert!(window.is_revoked() && window.gone());
            assert_eq!(window.revoked(), Some(Revoked::Fault(FaultCause::Truncated)));
            assert!(is_readable(faults), "{index}");
            nix::unistd::read(faults, &mut [0; 8]).unwrap();
        }
        assert_eq!(
            one.register::<u32>(0).unwrap().try_read().unwrap_err().kind(),
            ErrorKind::Revoked
        );
        assert!(!untouched.is_revoked());
        let error = one.restore().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
        set_there(&file, true);
        assert!(device.restore().errors.is_empty());
        for window in [&one, &other, &third, &late] {
            let register = window.register::<u32>(0).unwrap();
            assert_eq!(window.revoked(), None);
            register.write(8);
            assert_eq!(register.read(), 8);
        }
        drop((one, other, third, late, untouched));
        device.close().unwrap();
    });
}

#[test]
fn a_fault_may_revoke_the_whole_device() {
    alone(|| {
        FaultGuard::install(FaultScope::WholeDevice).unwrap();
        let (device, [file, _]) = device();
        let (other_device, _files) = super::truncatable::device();
        let [one, ..] = &aliases(&device, 0);
        let siblings = aliases(&device, 1);
        let other = other_device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        set_there(&file, false);
        assert_eq!(one.register::<u64>(0).unwrap().read(), u64::MAX);
        assert!(siblings.iter().all(Window::is_revoked) && !other.is_revoked());
        assert_eq!(siblings[1].register::<u8>(5).unwrap().read(), u8::MAX);
        // Calling it again changes the choice.
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        set_there(&file, true);
        assert_eq!(device.restore().changed(), 6);
        set_there(&file, false);
        assert_eq!(one.register::<u16>(6).unwrap().read(), u16::MAX);
        assert!(!siblings.iter().any(Window::is_revoked));
    });
}

#[test]
fn fifty_truncations_kill_nobody() {
    alone(|| {
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        let (device, [file, _]) = device();
        let windows = aliases(&device, 0);
        let (stop, ones) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let _stop = StopAtEnd(&stop);
            for window in &windows {
                let (stop, ones) = (&stop, &ones);
                scope.spawn(move || {
                    let (read, write) = (window.register::<u32>(0), window.register::<u32>(PAGE));
                    let (read, write) = (read.unwrap(), write.unwrap());
                    while !stop.load(Ordering::Relaxed) {
                        let value = read.read();
                        assert!([0, u32::MAX].contains(&value), "{value:#x}");
                        ones.fetch_add(usize::from(value != 0), Ordering::Relaxed);
                        write.write(1);
                    }
                });
            }
            for _ in 0..rounds(50) {
                set_there(&file, false);
                let seen = ones.load(Ordering::Relaxed);
                while !windows.iter().all(Window::is_revoked)
                    || ones.load(Ordering::Relaxed) == seen
                {
                    std::thread::yield_now();
                }
                set_there(&file, true);
                device.restore().into_result().unwrap();
            }
        });
    });
}

/// How many rounds: more in a soak.
pub fn rounds(usual: usize) -> usize {
    let factor = std::env::var("VFIO_REMAP_ROUNDS").ok().and_then(|text| text.parse().ok());
    usual * factor.unwrap_or(1)
}

#[test]
fn a_part_and_a_large_window_are_contained() {
    alone(|| {
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        vfio_remap::space::set_revocable_size(1 << 20);
        const LARGE: usize = 3 << 20;
        let transport = Truncatable::of_size(LARGE);
        let file = transport.file(0);
        let device = Device::new(Arc::new(transport));
        let bar = device.bar(0).unwrap();
        let large = bar.map(.., Placement::Anywhere).unwrap();
        let part = bar.map((LARGE - 64) as u64..LARGE as u64, Placement::Anywhere).unwrap();
        file.set_len((LARGE - PAGE) as u64).unwrap();
        assert_eq!(part.register::<u32>(60).unwrap().read(), u32::MAX);
        assert_eq!(large.register::<u32>(0).unwrap().read(), 0, "its memory is still there");
        assert!(!large.is_revoked());
        assert_eq!(large.register::<u32>(LARGE - 4).unwrap().read(), 0);
        assert!(large.is_revoked() && !large.reads_ones_when_revoked());
    });
}

#[test]
fn ten_thousand_windows_are_each_found() {
    alone(|| {
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        let (device, [file, _]) = device();
        let bar = device.bar(0).unwrap();
        // All sizes and alignments that there are, and enough to make the table grow; then fewer.
        let map = |index: usize| {
            let first = index % 3 * PAGE;
            let range = first as u64..(first + 8 + index % 2 * PAGE) as u64;
            bar.map(range, Placement::Anywhere).unwrap()
        };
        let mut windows: Vec<Window> = (0..10_000).map(map).collect();
        for round in 0..3 {
            set_there(&file, false);
            for window in &windows {
                assert_eq!(window.register::<u32>(4).unwrap().read(), u32::MAX);
                assert!(window.is_revoked());
            }
            set_there(&file, true);
            assert_eq!(device.restore().changed(), windows.len());
            let mut index = 0;
            windows.retain(|_| {
                index += 1;
                index % (round + 2) != 0
            });
            windows.extend((0..500).map(map));
        }
    });
}

#[test]
fn children_of_fork_have_no_windows_to_contain() {
    alone(|| {
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        let (device, [file, _]) = device();
        let [window, ..] = aliases(&device, 0);
        let range = window.addresses();
        // SAFETY: this process has one other thread, which waits; the child ends by `_exit` or a signal.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // A file that is truncated, at the addresses that the child does not inherit.
            let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            // SAFETY: nothing is mapped there, and the child may die of the access.
            unsafe {
                libc::alarm(60);
                let at = libc::mmap(range.start as *mut _, PAGE, libc::PROT_READ, flags, fd, 0);
                if at as usize != range.start || libc::ftruncate(fd, 0) != 0 {
                    libc::_exit(1);
                }
                let value = (range.start as *const u32).read_volatile();
                libc::_exit(if value == 0 { 2 } else { 3 });
            }
        }
        let status = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).unwrap();
        let killed = matches!(
            status,
            nix::sys::wait::WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGBUS, _)
        );
        assert!(killed, "{status:?}");
        assert_eq!(window.register::<u32>(0).unwrap().read(), u32::MAX, "the parent's is");
        assert_eq!(range.len(), SIZE);
    });
}
