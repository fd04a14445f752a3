//! The guard among other handlers of SIGBUS.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use vfio_remap::space::{FaultGuard, FaultScope};
use vfio_remap::{ErrorKind, Placement, Register, Window};

use super::truncatable::{PAGE, StopAtEnd, device, set_there};
use crate::support::alone::alone;

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void);

/// A page that somebody else mapped, of a file that is truncated. Accesses fault.
fn foreign() -> usize {
    let file = File::from(memfd_create("foreign", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(PAGE as u64).unwrap();
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let fd = file.as_raw_fd();
    // SAFETY: the kernel chooses the address.
    let at = unsafe { libc::mmap(ptr::null_mut(), PAGE, access, libc::MAP_SHARED, fd, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    file.set_len(0).unwrap();
    at as usize
}

fn load(address: usize) -> u32 {
    // SAFETY: a page of the test's own; a fault there is what the test is about.
    unsafe { (address as *const u32).read_volatile() }
}

/// How often [`repair`] and [`pass_on`] have been called.
static REPAIRED: AtomicUsize = AtomicUsize::new(0);
static PASSED: AtomicUsize = AtomicUsize::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(0);

/// A program's own handler: maps a page of zeros where the fault was.
extern "C" fn repair(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    REPAIRED.fetch_add(1, Ordering::Relaxed);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the kernel passes it; the page is one of `foreign`.
    unsafe {
        let page = (*info).si_addr() as usize & !(PAGE - 1);
        libc::mmap(page as *mut _, PAGE, libc::PROT_READ, flags, -1, 0);
    }
}

/// The page of [`foreign`] that [`repair_without_info`] repairs.
static BROKEN: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

extern "C" fn repair_without_info(_: i32) {
    REPAIRED.fetch_add(1, Ordering::Relaxed);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the page is one of `foreign`.
    unsafe { libc::mmap(BROKEN.load(Ordering::Relaxed), PAGE, libc::PROT_READ, flags, -1, 0) };
}

/// A handler that passes on every signal to the one before it.
extern "C" fn pass_on(number: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    PASSED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: `install` stored a handler of this type.
    let next: Handler = unsafe { std::mem::transmute(NEXT.load(Ordering::Relaxed)) };
    next(number, info, context);
}

/// Installs a handler. Returns the one before.
fn install(handler: usize, flags: i32) -> usize {
    // SAFETY: the functions above are handlers with these flags.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        (new.sa_sigaction, new.sa_flags) = (handler, flags);
        let mut old: libc::sigaction = std::mem::zeroed();
        assert_eq!(libc::sigaction(libc::SIGBUS, &new, &mut old), 0);
        old.sa_sigaction
    }
}

/// How a child ends in which `f` runs.
fn end_of(f: impl FnOnce()) -> WaitStatus {
    // SAFETY: the other thread of this process waits for this one; the child ends here.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: a timer, which ends a child that hangs.
            unsafe { libc::alarm(120) };
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_ok();
            // SAFETY: it runs none of the parent's handlers.
            unsafe { libc::_exit(if done { 0 } else { 101 }) }
        }
        child => waitpid(Pid::from_raw(child), None).unwrap(),
    }
}

fn is_killed_by(signal: Signal, f: impl FnOnce()) -> bool {
    let status = end_of(f);
    println!("{status:?}");
    matches!(status, WaitStatus::Signaled(_, by, _) if by == signal)
}

fn survives(f: impl FnOnce()) {
    let status = end_of(f);
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
}

/// A window of which each access faults, unless it is revoked, and its file.
fn broken() -> (Window, File) {
    let (device, [file, _]) = device();
    let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    set_there(&file, false);
    (window, file)
}

fn is_contained((window, file): &(Window, File)) {
    set_there(file, true);
    window.restore().unwrap();
    set_there(file, false);
    assert_eq!(window.register::<u32>(0).unwrap().read(), u32::MAX);
    assert!(window.is_revoked());
}

#[test]
fn a_foreign_sigbus_kills_as_without_the_guard() {
    alone(|| {
        for before in [None, Some(libc::SIG_DFL), Some(libc::SIG_IGN)] {
            let killed = is_killed_by(Signal::SIGBUS, || {
                if let Some(handler) = before {
                    install(handler, 0);
                }
                FaultGuard::install(FaultScope::WindowOnly).unwrap();
                is_contained(&broken());
                load(foreign());
            });
            assert!(killed, "{before:?}");
            let sent = || {
                if let Some(handler) = before {
                    install(handler, 0);
                }
                FaultGuard::install(FaultScope::WindowOnly).unwrap();
                // SAFETY: the signal is the test.
                unsafe { libc::raise(libc::SIGBUS) };
            };
            match before {
                Some(libc::SIG_DFL) => assert!(is_killed_by(Signal::SIGBUS, sent)),
                Some(_) => survives(sent),
                // The standard library's handler, which lets the first one by.
                None => {}
            }
        }
    });
}

#[test]
fn an_older_handler_gets_foreign_faults() {
    alone(|| {
        let with_info = (repair as *const () as usize, libc::SA_SIGINFO);
        let without = (repair_without_info as *const () as usize, libc::SA_NODEFER);
        // The kernel passes all arguments to this one, too.
        let silent = (repair as *const () as usize, 0);
        for (handler, flags) in [with_info, without, silent] {
            survives(|| {
                install(handler, flags);
                FaultGuard::install(FaultScope::WindowOnly).unwrap();
                let window = broken();
                for round in 1..=3 {
                    is_contained(&window);
                    assert_eq!(REPAIRED.load(Ordering::Relaxed), round - 1);
                    let page = foreign();
                    BROKEN.store(page as *mut _, Ordering::Relaxed);
                    assert_eq!(load(page), 0);
                    assert_eq!(REPAIRED.load(Ordering::Relaxed), round);
                }
            });
        }
        // A handler for one signal only is called once.
        assert!(is_killed_by(Signal::SIGBUS, || {
            install(with_info.0, libc::SA_SIGINFO | libc::SA_RESETHAND);
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            assert_eq!(load(foreign()), 0);
            is_contained(&broken());
            load(foreign());
        }));
    });
}

#[test]
fn a_later_handler_that_passes_on_keeps_windows_guarded() {
    alone(|| {
        survives(|| {
            install(repair as *const () as usize, libc::SA_SIGINFO);
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            let next = install(pass_on as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK);
            NEXT.store(next, Ordering::Relaxed);
            assert!(!FaultGuard::is_installed());
            let window = broken();
            is_contained(&window);
            assert_eq!(load(foreign()), 0);
            let count = || (PASSED.load(Ordering::Relaxed), REPAIRED.load(Ordering::Relaxed));
            assert_eq!(count(), (2, 1));
            // Over it once more: each gets what the one above it does not know.
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            assert!(FaultGuard::is_installed());
            is_contained(&window);
            assert_eq!(count(), (2, 1));
            assert_eq!(load(foreign()), 0);
            assert_eq!(count(), (3, 2));
        });
    });
}

#[test]
fn a_stray_signal_does_not_remove_the_guard() {
    alone(|| {
        // The standard library's handler sets the default action for what it does not know.
        survives(|| {
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            let window = broken();
            for _ in 0..3 {
                // SAFETY: the signal is the test.
                unsafe { libc::raise(libc::SIGBUS) };
                assert!(FaultGuard::is_installed());
                is_contained(&window);
            }
        });
        // A handler that sets it to end the process by the signal does so.
        extern "C" fn end(number: i32) {
            // SAFETY: both calls are for signal handlers.
            unsafe {
                libc::signal(number, libc::SIG_DFL);
                libc::raise(number);
            }
        }
        for flags in [0, libc::SA_NODEFER] {
            assert!(is_killed_by(Signal::SIGBUS, || {
                install(end as *const () as usize, flags);
                FaultGuard::install(FaultScope::WindowOnly).unwrap();
                // SAFETY: the signal is the test.
                unsafe { libc::raise(libc::SIGBUS) };
            }));
        }
    });
}

#[test]
fn the_guard_is_installed_after_the_default_any_number_of_times() {
    alone(|| {
        survives(|| {
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            let window = broken();
            for _ in 0..10 {
                install(libc::SIG_DFL, 0);
                FaultGuard::install(FaultScope::WindowOnly).unwrap();
                is_contained(&window);
            }
        });
        assert!(is_killed_by(Signal::SIGBUS, || {
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            install(libc::SIG_DFL, 0);
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            load(foreign());
        }));
    });
}

#[test]
fn a_later_handler_that_keeps_all_defeats_the_guard() {
    alone(|| {
        survives(|| {
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            let window = broken();
            for _ in 0..3 {
                install(repair as *const () as usize, libc::SA_SIGINFO);
                assert!(!FaultGuard::is_installed());
                FaultGuard::install(FaultScope::WindowOnly).unwrap();
                is_contained(&window);
                assert_eq!(load(foreign()), 0);
            }
            install(repair as *const () as usize, libc::SA_SIGINFO);
            let error = FaultGuard::install(FaultScope::WindowOnly).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        });
        assert!(is_killed_by(Signal::SIGBUS, || {
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            install(libc::SIG_DFL, 0);
            is_contained(&broken());
        }));
    });
}

#[test]
fn a_thread_that_blocks_sigbus_dies_of_it() {
    alone(|| {
        assert!(is_killed_by(Signal::SIGBUS, || {
            FaultGuard::install(FaultScope::WindowOnly).unwrap();
            // SAFETY: a set on the stack; this thread's mask.
            unsafe {
                let mut set = std::mem::zeroed();
                libc::sigaddset(&mut set, libc::SIGBUS);
                libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
            }
            is_contained(&broken());
        }));
    });
}

/// Makes the faults of [`is_contained`] on an alternate stack of `size` bytes, with nothing below it.
fn on_a_stack_of(size: usize) {
    FaultGuard::install(FaultScope::WindowOnly).unwrap();
    let (access, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let pages = size.next_multiple_of(PAGE);
    // SAFETY: the mapping is the test's own, and is never unmapped.
    unsafe {
        let below = libc::mmap(ptr::null_mut(), PAGE + pages, access, flags, -1, 0);
        assert_ne!(below, libc::MAP_FAILED);
        assert_eq!(libc::mprotect(below, PAGE, libc::PROT_NONE), 0);
        let stack = libc::stack_t { ss_sp: below.byte_add(PAGE), ss_flags: 0, ss_size: size };
        assert_eq!(libc::sigaltstack(&stack, ptr::null_mut()), 0);
    }
    is_contained(&broken());
}

#[test]
fn an_alternate_stack_needs_what_is_documented() {
    alone(|| {
        const AT_MINSIGSTKSZ: libc::c_ulong = 51;
        // SAFETY: it reads a value that the kernel passed to the process; 0 if it passed none (before 5.14).
        let frame = match unsafe { libc::getauxval(AT_MINSIGSTKSZ) } as usize {
            0 => libc::MINSIGSTKSZ.max(4096),
            frame => frame,
        };
        survives(|| on_a_stack_of(frame.max(libc::MINSIGSTKSZ) + FaultGuard::STACK));
        assert!(is_killed_by(Signal::SIGSEGV, || on_a_stack_of(libc::MINSIGSTKSZ)));
    });
}

/// The register that [`read_it`] reads.
static REGISTER: AtomicPtr<Register<u32>> = AtomicPtr::new(ptr::null_mut());
static READS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn read_it(_: i32) {
    // SAFETY: the test stores a register that is never dropped.
    let value = unsafe { (*REGISTER.load(Ordering::Acquire)).read() };
    READS.fetch_add(usize::from(value == u32::MAX), Ordering::Release);
}

#[test]
fn a_handler_that_interrupts_revoke_has_its_fault_contained() {
    alone(|| {
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        let (device, [file, _]) = device();
        let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        // Accesses to the second page fault, and the window can be restored all the same.
        file.set_len(PAGE as u64).unwrap();
        REGISTER.store(Box::into_raw(Box::new(window.register(PAGE).unwrap())), Ordering::Release);
        // SAFETY: the handler reads atomics and a register. A timer ends a process that hangs. The thread is this
        // one, which outlives the other.
        let this = unsafe {
            libc::signal(libc::SIGUSR1, read_it as *const () as usize);
            libc::alarm(300);
            libc::pthread_self() as usize
        };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = StopAtEnd(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seen = READS.load(Ordering::Acquire);
                    // SAFETY: as above.
                    unsafe { libc::pthread_kill(this as libc::pthread_t, libc::SIGUSR1) };
                    // Not spinning: on a loaded machine that would take the other thread's processor.
                    while READS.load(Ordering::Acquire) == seen && !stop.load(Ordering::Relaxed) {
                        std::thread::yield_now();
                    }
                }
            });
            while READS.load(Ordering::Acquire) < 2_000 {
                window.revoke().unwrap();
                window.restore().unwrap();
            }
        });
    });
}

#[test]
fn a_fault_is_contained_while_malloc_is_interrupted() {
    alone(|| {
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        let (window, file) = broken();
        set_there(&file, true);
        REGISTER.store(Box::into_raw(Box::new(window.register(0).unwrap())), Ordering::Release);
        // SAFETY: the handler reads atomics and a register.
        unsafe { libc::signal(libc::SIGUSR1, read_it as *const () as usize) };
        let stop = AtomicBool::new(false);
        let thread = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let _stop = StopAtEnd(&stop);
            scope.spawn(|| {
                // SAFETY: the own thread.
                thread.store(unsafe { libc::pthread_self() } as usize, Ordering::Release);
                let mut kept = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    kept.push(std::hint::black_box(vec![1u8; 1 + kept.len() * 37 % 3000]));
                    if kept.len() > 64 {
                        kept.clear();
                    }
                }
            });
            while thread.load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
            for round in 1..=500 {
                window.restore().unwrap();
                set_there(&file, false);
                // SAFETY: the thread runs until it is told to stop.
                let sent = unsafe {
                    libc::pthread_kill(
                        thread.load(Ordering::Acquire) as libc::pthread_t,
                        libc::SIGUSR1,
                    )
                };
                assert_eq!(sent, 0);
                while READS.load(Ordering::Acquire) < round {
                    std::thread::yield_now();
                }
                assert!(window.is_revoked());
                set_there(&file, true);
            }
        });
    });
}
