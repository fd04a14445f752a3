//! Waiting for what takes milliseconds.

use std::thread;
use std::time::{Duration, Instant};

use vfio_remap::Result;

/// Between two looks.
const PAUSE: Duration = Duration::from_micros(500);

/// Looks until `look` has found something; `None` if it has not in time. There is one look at least,
/// and one after the time is over.
pub fn until<T>(
    timeout: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<Option<T>> {
    let deadline = Instant::now().checked_add(timeout);
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
