//! Waiting for what takes milliseconds.
//!
//! A fuzzer has the driver wait in vain some thousand times a second. In its build (`--cfg=fuzzing`) no time
//! passes: what is not so at the first look is not so in time.

use std::thread;
use std::time::{Duration, Instant};

use vfio_remap::Result;

/// How long a thread waits for a card before it sees whether the card is well.
pub const WATCH: Duration = limit(Duration::from_millis(50));

/// Between two looks.
const PAUSE: Duration = Duration::from_micros(500);

/// How long is waited at most.
pub const fn limit(time: Duration) -> Duration {
    if cfg!(fuzzing) { Duration::ZERO } else { time }
}

/// Gives the card time.
pub fn pause(time: Duration) {
    if !cfg!(fuzzing) {
        thread::sleep(time);
    }
}

/// Looks until `look` has found something; `None` if it has not in time. There is one look at least,
/// and one after the time is over.
pub fn until<T>(
    timeout: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<Option<T>> {
    let deadline = Instant::now().checked_add(limit(timeout));
    loop {
        let over = deadline.is_some_and(|deadline| deadline <= Instant::now());
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        if over {
            return Ok(None);
        }
        thread::sleep(PAUSE);
    }
}
