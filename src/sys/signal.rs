//! `sigaction(2)`.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;

use nix::errno::Errno;

type Result<T> = std::result::Result<T, Errno>;

/// A handler with `SA_SIGINFO`.
pub(crate) type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void);

/// What happens at a signal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Action {
    /// The address of a function, `SIG_DFL` or `SIG_IGN`.
    pub handler: usize,
    /// `SA_*`
    pub flags: libc::c_int,
    /// The signals that are blocked meanwhile, a bit each: signal `n` is bit `n - 1`.
    pub mask: u64,
}

impl Action {
    fn of(raw: &libc::sigaction) -> Self {
        let mask = word(&raw.sa_mask);
        Self { handler: raw.sa_sigaction, flags: raw.sa_flags, mask }
    }
}

/// The first 64 signals of a set, which is all that the kernel has.
fn word(set: &libc::sigset_t) -> u64 {
    // SAFETY: a `sigset_t` of every C library is an array of words that has at least 64 bits.
    unsafe { ptr::from_ref(set).cast::<u64>().read_unaligned() }
}

/// `sigaction(signal, NULL, &old)`
pub(crate) fn action(signal: libc::c_int) -> Result<Action> {
    let mut old = MaybeUninit::zeroed();
    // SAFETY: the C library writes `old`.
    Errno::result(unsafe { libc::sigaction(signal, ptr::null(), old.as_mut_ptr()) })?;
    // SAFETY: it succeeded; and all zeros are a value, too.
    let old = unsafe { old.assume_init() };
    Ok(Action::of(&old))
}

/// `sigaction(signal, &new, &old)` with `SA_SIGINFO|SA_ONSTACK|SA_RESTART`. All signals are blocked while the
/// handler runs, so none interrupts it. Returns what was there before.
pub(crate) fn install(signal: libc::c_int, handler: Handler) -> Result<Action> {
    // SAFETY: all zeros are a value.
    let mut new: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    new.sa_sigaction = handler as *const () as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    let mut old = MaybeUninit::zeroed();
    // SAFETY: the C library writes the set, reads `new` and writes `old`.
    Errno::result(unsafe {
        libc::sigfillset(&mut new.sa_mask);
        libc::sigaction(signal, &new, old.as_mut_ptr())
    })?;
    // SAFETY: it succeeded; and all zeros are a value, too.
    let old = unsafe { old.assume_init() };
    Ok(Action::of(&old))
}

/// `sigaction(signal, SIG_DFL)`: `man 7 signal-safety` allows it in a handler.
pub(crate) fn set_default(signal: libc::c_int) {
    // SAFETY: all zeros are a value: SIG_DFL, no flags, no signals. The C library reads it.
    let _ = unsafe {
        let new: libc::sigaction = MaybeUninit::zeroed().assume_init();
        libc::sigaction(signal, &new, ptr::null_mut())
    };
}

/// The signals that the interrupted thread had blocked.
///
/// # Safety
/// `context` is what the kernel passed to a handler with `SA_SIGINFO`.
pub(crate) unsafe fn mask_of(context: *mut c_void) -> u64 {
    // SAFETY: by the contract it is a `ucontext_t`, of whose set the kernel has written 64 bits.
    unsafe { word(&(*context.cast::<libc::ucontext_t>()).uc_sigmask) }
}
