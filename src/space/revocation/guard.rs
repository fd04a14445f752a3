//! The SIGBUS guard: a fault in a window revokes the window, and the access completes.
//!
//! The handler is async-signal-safe by construction: it reads atomics and values that are never freed, makes
//! raw system calls, and takes no lock.

#![expect(unsafe_code, reason = "signal handlers, and addresses that are owned by convention")]

use std::ffi::c_void;
use std::mem;
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};

use nix::errno::Errno;

use super::absent::{self, Left, Refused};
use super::registry::{Pin, State};
use super::{Group, current};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::mmap_lock::MmapLock;
use crate::sys::signal::{self, Action};
use crate::sys::{async_safe, fork};

/// Which windows a fault revokes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultScope {
    /// The one in which the access was.
    WindowOnly,
    /// All of the same device.
    WholeDevice,
}

/// The guard of this process: a handler of SIGBUS that contains faults in windows.
///
/// An access to a window of a device that does not answer raises SIGBUS, which ends the process: memory
/// decoding was switched off by another holder of the device, or the device sleeps; a vfio-user server has
/// truncated the file behind the window. With the guard, the window is revoked instead
/// ([`Window::revoke`](crate::Window::revoke)), and the access is repeated: a load answers all ones, a store
/// goes nowhere. The program finds out by [`Window::gone`](crate::Window::gone),
/// [`Register::try_read`](crate::Register::try_read) or the eventfd of
/// [`Device::contained_faults`](crate::Device::contained_faults), and may call
/// [`Window::restore`](crate::Window::restore) later.
///
/// An access to a register costs the same with the guard and without it.
///
/// # Other handlers
/// Any other SIGBUS goes to the handler that was there before, with its signal mask; or to the default action,
/// which ends the process. A handler that is installed later gets every SIGBUS first. If it passes on those
/// that it does not know, as this one does, windows stay guarded. The later handler must have `SA_SIGINFO`.
///
/// # What it does not contain
/// - A fault while a later handler of SIGBUS does not pass it on. [`is_installed`](Self::is_installed) is
///   false then; [`install`](Self::install) installs the guard over it.
/// - A fault in a thread that blocks SIGBUS: the kernel ends the process (`man 2 sigprocmask`).
/// - A fault in a thread whose alternate stack (`man 2 sigaltstack`) is too small: the handler runs on it if
///   there is one. It needs [`STACK`](Self::STACK) bytes beyond `AT_MINSIGSTKSZ` (`man 3 getauxval`).
/// - A fault in a sealed window, or in memory that is not a window: DMA buffers, the program's own mappings.
/// - An access by unaligned pointers, which is an error of the program (`BUS_ADRALN`).
/// - A fault when the kernel has no memory for the pages, or refuses them for a limit (RLIMIT_DATA counts
///   them).
/// - After `fork(2)`, a fault in the child: it has no windows of its parent.
///
/// # A fault from before
/// A thread that had a fault may get to the handler late, after another one has reset the device or restored the
/// window. The handler cannot tell, and revokes the window again. Restore it once more.
#[derive(Debug)]
pub struct FaultGuard(());

/// How often the guard can be installed over a later handler.
const LEVELS: usize = 4;

static INSTALLED: AtomicUsize = AtomicUsize::new(0);
pub(super) static WHOLE_DEVICE: AtomicBool = AtomicBool::new(false);

/// What was there before each of our handlers. Each has its own, because a handler in between may call the
/// one before it.
static BEFORE: [Before; LEVELS] = [const { Before::none() }; LEVELS];

const HANDLERS: [signal::Handler; LEVELS] = [handle::<0>, handle::<1>, handle::<2>, handle::<3>];

/// An [`Action`] that a signal handler reads.
struct Before {
    handler: AtomicUsize,
    flags: AtomicI32,
    mask: AtomicU64,
}

impl Before {
    const fn none() -> Self {
        Self {
            handler: AtomicUsize::new(libc::SIG_DFL),
            flags: AtomicI32::new(0),
            mask: AtomicU64::new(0),
        }
    }

    fn set(&self, action: Action) {
        self.flags.store(action.flags, Ordering::Relaxed);
        self.mask.store(action.mask, Ordering::Relaxed);
        self.handler.store(action.handler, Ordering::Release);
    }

    /// The action for a signal that is passed to it. A handler with `SA_RESETHAND` is passed one only.
    fn take(&self) -> Action {
        let handler = self.handler.load(Ordering::Acquire);
        let flags = self.flags.load(Ordering::Relaxed);
        let action = Action { handler, flags, mask: self.mask.load(Ordering::Relaxed) };
        if flags & libc::SA_RESETHAND == 0 || handler == libc::SIG_IGN {
            return action;
        }
        let (taken, fail) = (Ordering::AcqRel, Ordering::Acquire);
        match self.handler.compare_exchange(handler, libc::SIG_DFL, taken, fail) {
            Ok(_) => action,
            Err(handler) => Action { handler, ..action },
        }
    }
}

fn is_ours(handler: usize) -> bool {
    HANDLERS.iter().any(|ours| *ours as *const () as usize == handler)
}

impl FaultGuard {
    /// How many bytes of a stack the handler needs beyond the frame that the kernel makes
    /// (`AT_MINSIGSTKSZ`). The handler that was there before comes on top, if the fault is passed to it.
    pub const STACK: usize = 4096;

    /// Installs the guard, for the process and until it ends. Calling it again changes the scope, and
    /// installs it over a handler that was installed later.
    ///
    /// # Errors
    /// `InUse` if it was installed over later handlers too often (4 times); `Os` if the kernel refuses.
    pub fn install(scope: FaultScope) -> Result<()> {
        let failed = |errno| Error::os(errno, "install", "the handler of SIGBUS");
        // Observes fork, which a handler cannot begin to do.
        fork::generation();
        WHOLE_DEVICE.store(scope == FaultScope::WholeDevice, Ordering::Relaxed);
        let _lock = MmapLock::take();
        let present = signal::action(libc::SIGBUS).map_err(failed)?;
        if is_ours(present.handler) {
            return Ok(());
        }
        let installed = INSTALLED.load(Ordering::Relaxed);
        // After the default action was set, nobody is left who passes a signal to the last handler for another one.
        let level = installed - usize::from(installed > 0 && present.handler == libc::SIG_DFL);
        let (Some(before), Some(handler)) = (BEFORE.get(level), HANDLERS.get(level)) else {
            return Err(Error::new(ErrorKind::InUse, "install", "the handler of SIGBUS")
                .with_reason(format!("it was installed {LEVELS} times, each time over another one"))
                .with_advice(
                    "let the handler that is installed last pass on what it does not know",
                ));
        };
        // Stored before as well: a fault may come before the call returns what it replaced.
        before.set(present);
        before.set(signal::install(libc::SIGBUS, *handler).map_err(failed)?);
        INSTALLED.store(level + 1, Ordering::Relaxed);
        Ok(())
    }

    /// Whether SIGBUS goes to the guard first. False, too, if a handler was installed later that may pass on
    /// what it does not know.
    pub fn is_installed() -> bool {
        signal::action(libc::SIGBUS).is_ok_and(|action| is_ours(action.handler))
    }
}

/// The handler. Each level is a function of its own, with its own handler before it.
extern "C" fn handle<const LEVEL: usize>(
    number: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    let errno = Errno::last_raw();
    // A later handler may leave signals unblocked. One that interrupts this and has a fault in the same window would
    // wait for this one for ever.
    let mask = async_safe::block_signals(!0);
    // SAFETY: the kernel, or a later handler as the documentation demands, passes a valid pointer.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    let contained = is_fault(code) && contain(address, code);
    async_safe::block_signals(mask);
    Errno::set_raw(errno);
    if !contained {
        pass_on(LEVEL, code, number, info, context);
    }
}

/// Codes of `man 2 sigaction`: an access at an address that nothing answers, an error of the hardware (an
/// external abort on arm64), and a page of memory that has failed.
fn is_fault(code: i32) -> bool {
    matches!(code, libc::BUS_ADRERR | libc::BUS_OBJERR | libc::BUS_MCEERR_AR)
}

/// Whether a fault at `address` was in a window, which is revoked now, so that the access can be repeated.
pub(super) fn contain(address: usize, code: i32) -> bool {
    let Some(registry) = current() else { return false };
    let Some(pin) = registry.find(address) else { return false };
    let is_changing = match pin.state() {
        State::Live => match revoke(&pin) {
            Ok(is_first) => !is_first,
            Err(_) => return false,
        },
        // Its pages have failed: repeating the access would not end.
        State::Revoked if code == libc::BUS_MCEERR_AR => return false,
        // An access from before is repeated. While it is pinned, the window shows no device.
        State::Revoked => return async_safe::is_readable(address),
        // It may be this thread's verb, which cannot go on before this returns.
        State::RevokingByVerb if !absent::moves_pages() => {
            return revoke_for_verb(&pin).is_ok();
        }
        State::Revoking
        | State::RevokingByVerb
        | State::Undecided
        | State::Busy
        | State::Restoring => true,
        State::Dead => return false,
    };
    if is_changing {
        // Who changes it may wait for the pin, or for this processor.
        drop(pin);
        async_safe::nap();
        return true;
    }
    let group = group_of(&pin);
    if WHOLE_DEVICE.load(Ordering::Relaxed) {
        group.sweeps.sweep(|| {
            for sibling in registry.each() {
                if sibling.state() == State::Live && ptr::eq(group_of(&sibling), group) {
                    match revoke(&sibling) {
                        // One that cannot be revoked now has its own fault later.
                        Ok(_) | Err(Refused { left: Left::Untouched | Left::Plugged, .. }) => {}
                        // It may be another thread's mapping, which registers would reach.
                        Err(Refused { left: Left::Unknown | Left::Hole, .. }) => process::abort(),
                    }
                }
            }
        });
    }
    let fd = group.fd.load(Ordering::Acquire);
    if fd >= 0 {
        async_safe::signal_eventfd(fd);
    }
    true
}

fn group_of<'a>(pin: &'a Pin<'_>) -> &'a Group {
    let group: *const Group = ptr::with_exposed_provenance(pin.note() & !Group::OTHERS);
    // SAFETY: `Group::note` exposed it, and the window's backing holds it while the entry is not dead. The pin
    // keeps it from becoming so.
    unsafe { &*group }
}

/// Revokes a window that is live; false if it no longer is.
///
/// # Errors
/// The kernel's, if it refuses the pages. The window is live if it is what it was, or that is unknown. If it is
/// inaccessible, it counts as revoked.
pub(super) fn revoke(pin: &Pin<'_>) -> std::result::Result<bool, Refused> {
    if !pin.mark() {
        return Ok(false);
    }
    let (is_revoked, result) = replace(pin);
    pin.has_revoked(is_revoked);
    result.map(|()| true)
}

/// Revokes a window that a verb has marked, for the verb. That may replace it, too, before or after.
///
/// # Errors
/// The kernel's, if it refuses the pages; what the window is then, the verb finds out.
fn revoke_for_verb(pin: &Pin<'_>) -> std::result::Result<(), Refused> {
    let (is_revoked, result) = replace(pin);
    if is_revoked {
        pin.has_revoked_for_verb();
    }
    result
}

/// Replaces a window by its pages. Returns whether it counts as revoked, too.
fn replace(pin: &Pin<'_>) -> (bool, std::result::Result<(), Refused>) {
    let range = pin.range();
    let (access, pages) = Group::of_note(pin.note());
    // SAFETY: the window stays mapped at its range while its entry is pinned: whoever unmaps, relocates or
    // restores it changes the state first, and waits for the pin.
    let result = unsafe { absent::replace(range.start, range.len(), access, pages) };
    let is_revoked = match result {
        Ok(()) | Err(Refused { left: Left::Plugged, .. }) => true,
        Err(Refused { left: Left::Untouched | Left::Unknown, .. }) => false,
        // Other code would be mapped there next, and registers would reach it.
        Err(Refused { left: Left::Hole, .. }) => process::abort(),
    };
    (is_revoked, result)
}

/// Does with the signal what would have been done without the guard.
fn pass_on(
    level: usize,
    code: i32,
    number: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    let action = BEFORE[level].take();
    // A fault that the kernel has found, and not a signal that somebody sent: it comes again when the
    // handler returns.
    let comes_again = is_fault(code) || code == libc::BUS_ADRALN;
    match action.handler {
        // A fault ends a process that ignores it, too.
        libc::SIG_IGN if !comes_again => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            signal::set_default(number);
            if !comes_again {
                async_safe::raise(number);
            }
        }
        handler => {
            let own = if action.flags & libc::SA_NODEFER != 0 { 0 } else { 1 << (number - 1) };
            // SAFETY: the kernel passes the context of the interrupted thread.
            let interrupted = unsafe { signal::mask_of(context) };
            let mask = async_safe::block_signals(interrupted | action.mask | own);
            // SAFETY: the program installed this handler for this signal. The kernel passes three arguments
            // to one without SA_SIGINFO, too.
            unsafe { mem::transmute::<usize, signal::Handler>(handler)(number, info, context) };
            async_safe::block_signals(mask);
            if !comes_again {
                stay(level, number);
            }
        }
    }
}

/// Installs the handler again if the one before it has set the default action. The standard library's does so for a
/// signal that it does not know, and returns. If a signal is pending, that one is to end the process.
fn stay(level: usize, number: libc::c_int) {
    let is_default = signal::action(number).is_ok_and(|action| action.handler == libc::SIG_DFL);
    if is_default && !async_safe::is_pending(number) {
        let _ = signal::install(number, HANDLERS[level]);
    }
}
