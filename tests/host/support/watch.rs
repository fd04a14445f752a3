//! Bounds for what must come to an end: generous, so that a busy machine does not reach them.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Far more than anything here takes.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs `f` in a thread, and fails if it does not come to an end.
#[track_caller]
pub fn in_time(f: impl FnOnce() + Send + 'static) {
    let (done, ended) = channel::<()>();
    let thread = thread::spawn(move || {
        let _done = done;
        f();
    });
    match ended.recv_timeout(LIMIT) {
        Err(RecvTimeoutError::Timeout) => panic!("it did not come to an end in {LIMIT:?}"),
        _ => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}

/// Waits until something holds.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}
