//! Signals a user's eventfds without waiting.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::write;

use crate::sys::eventfd;

/// The time limit for the end of a thread that is stuck, in milliseconds.
const END_LIMIT_MS: u32 = 1000;

/// Signals the eventfds of one user.
///
/// It signals directly ([`eventfd::signal`]). If the kernel does not offer that, a thread writes them. A user
/// can make a write block by filling the counter. So each user has its own thread, which holds no lock while it
/// writes, and each eventfd is in its queue at most once.
pub(super) struct Signaller {
    direct: fn(&OwnedFd) -> Result<(), Errno>,
    writer: OnceLock<Option<Writer>>,
}

struct Writer {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pending: Vec<Arc<OwnedFd>>,
    writing: Option<Arc<OwnedFd>>,
    ended: bool,
}

impl Signaller {
    pub(super) fn new() -> Self {
        Self::with(|eventfd| eventfd::signal(eventfd))
    }

    fn with(direct: fn(&OwnedFd) -> Result<(), Errno>) -> Self {
        Self { direct, writer: OnceLock::new() }
    }

    pub(super) fn signal(&self, eventfd: &Arc<OwnedFd>) {
        let Err(errno) = (self.direct)(eventfd) else { return };
        let writer = self.writer.get_or_init(|| {
            log::debug!("eventfds are signalled by a thread: {errno}");
            Writer::start()
        });
        match writer {
            Some(writer) => writer.queue.add(eventfd),
            None => log::debug!("an interrupt was lost: there is no thread for it"),
        }
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, eventfd: &Arc<OwnedFd>) {
        let mut state = self.state();
        if !state.pending.iter().any(|pending| Arc::ptr_eq(pending, eventfd)) {
            state.pending.push(eventfd.clone());
            self.changed.notify_one();
        }
    }

    /// Writes pending eventfds until the queue ends.
    fn work(&self) {
        let mut state = self.state();
        loop {
            match state.pending.pop() {
                Some(eventfd) => {
                    state.writing = Some(eventfd.clone());
                    drop(state);
                    if let Err(errno) = write(&*eventfd, &1u64.to_ne_bytes()) {
                        log::debug!("an interrupt was lost: {errno}");
                    }
                    state = self.state();
                    state.writing = None;
                }
                None if state.ended => return,
                None => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

impl Writer {
    fn start() -> Option<Self> {
        let queue = Arc::new(Queue::default());
        let thread = thread::Builder::new().name("vfio-remap signal".to_owned());
        let thread = thread.spawn({
            let queue = queue.clone();
            move || queue.work()
        });
        Some(Self { queue, thread: Some(thread.ok()?) })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        {
            let mut state = self.queue.state();
            state.ended = true;
            state.pending.clear();
            self.queue.changed.notify_one();
        }
        // Reading the counter unblocks the write. The user has left or is leaving, so the counter's value does
        // not matter.
        for _ in 0..END_LIMIT_MS {
            if thread.is_finished() {
                return drop(thread.join());
            }
            if let Some(eventfd) = &self.queue.state().writing {
                // The value does not matter.
                let _ = eventfd::take(eventfd);
            }
            thread::sleep(Duration::from_millis(1));
        }
        log::warn!(
            "a peer keeps an eventfd full, and a thread that writes to it cannot end; the thread is left behind"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const ENOUGH: Duration = Duration::from_secs(60);

    fn indirect() -> Signaller {
        Signaller::with(|_| Err(Errno::ENOSYS))
    }

    fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < ENOUGH, "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn without_aio_a_thread_signals() {
        let signaller = indirect();
        let events: [_; 2] = std::array::from_fn(|_| Arc::new(eventfd::new().unwrap()));
        for _ in 0..3 {
            events.iter().for_each(|event| signaller.signal(event));
            for event in &events {
                until("it was not signalled", || eventfd::take(event).unwrap() > 0);
            }
        }
    }

    /// The user made the eventfd blocking and filled its counter.
    #[test]
    fn a_full_eventfd_blocks_no_caller_and_its_thread_ends() {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let signaller = indirect();
        let full = Arc::new(eventfd::new().unwrap());
        fcntl(&*full, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        write(&*full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        for _ in 0..100_000 {
            signaller.signal(&full);
        }
        let queue = signaller.writer.get().unwrap().as_ref().unwrap().queue.clone();
        until("it writes", || queue.state().writing.is_some());
        assert!(queue.state().pending.len() <= 1);
        drop(signaller);
        // The thread has ended and dropped its reference.
        assert_eq!(Arc::strong_count(&queue), 1);
    }
}
