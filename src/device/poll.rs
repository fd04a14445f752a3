//! Waiting for a device that reports completion by a register or in memory, not by an interrupt.

use std::fmt::{Debug, Display};
use std::future;
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// Reads in a tight loop, before other threads are let run between two reads.
const SPINS: u32 = 128;

/// How long other threads are let run between two reads, before the thread sleeps between them.
const YIELDS: Duration = Duration::from_millis(4);

/// The longest sleep between two reads.
const SLEEP: Duration = Duration::from_millis(1);

/// Reads until `done` returns true, and returns that value. `what` names the awaited thing in the error.
///
/// The first reads are a tight loop; later ones let other threads run in between. After 4 ms the thread sleeps
/// between two reads: a sixteenth of the time that it has waited, and at most 1 ms.
///
/// The last read is after the deadline, so a thread that did not run for a while misses nothing.
///
/// ```
/// # use vfio_remap::{Device, Placement, transport::MemoryDevice};
/// # let device = Device::new(std::sync::Arc::new(MemoryDevice::new(0x4000)?));
/// use std::time::Duration;
/// use vfio_remap::{ErrorKind, poll_until, register_block};
///
/// register_block! {
///     Timer[0x10] {
///         STATUS(ro u32 => Status) @ 0x0 {
///             pub busy: bool,
///             #[bits(31)]
///             __: u32,
///         }
///     }
/// }
///
/// let timer = device.bar(0)?.map(.., Placement::Anywhere)?.block::<Timer>(0)?;
/// let second = Duration::from_secs(1);
/// let idle = poll_until("the timer", second, || timer.read(Timer::STATUS), |status| !status.busy())?;
/// assert!(!idle.busy());
///
/// let busy = poll_until("the timer", second / 100, || timer.read(Timer::STATUS), |status| status.busy());
/// let error = busy.expect_err("it does nothing");
/// assert_eq!(error.kind(), ErrorKind::TimedOut);
/// let text = error.to_string();
/// let (what, last) = text.split_once(": the last value was ").expect("it has the value");
/// assert_eq!(what, "cannot wait for the timer: timed out after 10ms");
/// assert_eq!(last, "Status { busy: false }");
/// # Ok::<(), vfio_remap::Error>(())
/// ```
///
/// # Errors
/// `TimedOut`, with the last value.
pub fn poll_until<T: Debug>(
    what: impl Display,
    timeout: Duration,
    mut read: impl FnMut() -> T,
    done: impl FnMut(&T) -> bool,
) -> Result<T> {
    try_poll_until(what, timeout, || Ok(read()), done)
}

/// [`poll_until`] for reads that can fail, such as those of trapped registers.
///
/// # Errors
/// `TimedOut`, with the last value; the error of `read`.
pub fn try_poll_until<T: Debug>(
    what: impl Display,
    timeout: Duration,
    mut read: impl FnMut() -> Result<T>,
    mut done: impl FnMut(&T) -> bool,
) -> Result<T> {
    let mut wait = Wait::new(timeout);
    loop {
        if let Some(value) = wait.read_once(&what, &mut read, &mut done)? {
            return Ok(value);
        }
        if wait.spins() {
            std::hint::spin_loop();
        } else {
            match wait.sleep() {
                Some(time) => std::thread::sleep(time),
                None => std::thread::yield_now(),
            }
        }
    }
}

/// [`try_poll_until`] for `async` programs, with any runtime: other tasks run between two reads.
///
/// It does not sleep: it asks to be polled again at once. Use it for what a device does in microseconds, and an
/// interrupt for what takes longer.
///
/// # Errors
/// As [`try_poll_until`].
pub async fn try_poll_until_async<T: Debug>(
    what: impl Display,
    timeout: Duration,
    mut read: impl FnMut() -> Result<T>,
    mut done: impl FnMut(&T) -> bool,
) -> Result<T> {
    let mut wait = Wait::new(timeout);
    future::poll_fn(|context| {
        loop {
            match wait.read_once(&what, &mut read, &mut done).transpose() {
                Some(result) => return Poll::Ready(result),
                None if wait.spins() => std::hint::spin_loop(),
                None => {
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        }
    })
    .await
}

/// The state of a wait.
struct Wait {
    begun: Instant,
    timeout: Duration,
    /// `None` if it is beyond the range of the clock.
    deadline: Option<Instant>,
    count: u32,
}

impl Wait {
    fn new(timeout: Duration) -> Self {
        let begun = Instant::now();
        Self { begun, timeout, deadline: begun.checked_add(timeout), count: 0 }
    }

    /// Whether the next read follows at once.
    fn spins(&self) -> bool {
        self.count < SPINS
    }

    /// How long to sleep before the next read; `None` in the first milliseconds.
    fn sleep(&self) -> Option<Duration> {
        let waited = self.begun.elapsed();
        let time = (waited >= YIELDS).then(|| SLEEP.min(waited / 16))?;
        Some(time.min(self.timeout.saturating_sub(waited)))
    }

    /// Reads once. `None` means: read again.
    fn read_once<T: Debug>(
        &mut self,
        what: &impl Display,
        read: &mut impl FnMut() -> Result<T>,
        done: &mut impl FnMut(&T) -> bool,
    ) -> Result<Option<T>> {
        // Taken before the read, so that the last read is after the deadline.
        let over = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        let value = read()?;
        if done(&value) {
            return Ok(Some(value));
        }
        if over {
            return Err(Error::new(ErrorKind::TimedOut, "wait for", what).with_reason(format!(
                "timed out after {:?}: the last value was {value:?}",
                self.timeout
            )));
        }
        self.count = self.count.saturating_add(1);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::{Context, Wake, Waker};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn count_up() -> impl FnMut() -> u32 {
        let mut count = 0;
        move || {
            count += 1;
            count
        }
    }

    #[test]
    fn the_value_that_was_waited_for_comes_back() {
        let wanted = 3 * SPINS;
        let value = poll_until("a count", LONG, count_up(), |count| *count >= wanted);
        assert_eq!(value.unwrap(), wanted);
    }

    #[test]
    fn a_wait_ends_in_time_and_reports_the_last_value() {
        let begun = Instant::now();
        let timeout = Duration::from_millis(5);
        let error = poll_until("a bit", timeout, || 7, |_| false).unwrap_err();
        assert!(begun.elapsed() >= timeout);
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(
            error.to_string(),
            "cannot wait for a bit: timed out after 5ms: the last value was 7"
        );
    }

    #[test]
    fn no_time_at_all_is_one_read() {
        assert_eq!(poll_until("one", Duration::ZERO, count_up(), |count| *count == 1).unwrap(), 1);
        let error = poll_until("two", Duration::ZERO, count_up(), |count| *count == 2);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn the_last_read_is_after_the_deadline() {
        // The first read takes longer than the time limit, as if the thread had not run.
        let timeout = Duration::from_millis(1);
        let mut count = count_up();
        let read = || {
            std::thread::sleep(2 * timeout);
            count()
        };
        assert_eq!(poll_until("two", timeout, read, |count| *count == 2).unwrap(), 2);
    }

    #[test]
    fn a_long_wait_sleeps() {
        let (begun, mut late) = (Instant::now(), 0);
        let read = || late += u32::from(begun.elapsed() > 4 * YIELDS);
        let timeout = 4 * YIELDS + 50 * SLEEP;
        poll_until("it", timeout, read, |()| false).unwrap_err();
        // Without sleeps there are hundreds of thousands.
        assert!((1..=100).contains(&late), "{late} reads");
    }

    #[test]
    fn an_error_of_the_read_ends_the_wait() {
        let gone = || Err::<u32, _>(Error::new(ErrorKind::Gone, "read", "a register"));
        let error = try_poll_until("it", LONG, gone, |_| true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone);
    }

    #[test]
    fn a_time_beyond_the_clock_is_no_limit() {
        let value = poll_until("a count", Duration::MAX, count_up(), |count| *count == SPINS + 2);
        assert_eq!(value.unwrap(), SPINS + 2);
    }

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls a future to its end. Returns how often it let others run.
    fn run<T>(future: impl Future<Output = T>) -> (T, u32) {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let mut future = pin!(future);
        let mut turns = 0;
        loop {
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(value) => return (value, turns),
                Poll::Pending => turns += 1,
            }
            assert_eq!(woken.0.load(Ordering::Relaxed), turns, "it asks to be polled again");
        }
    }

    #[test]
    fn an_async_wait_lets_others_run() {
        let mut count = count_up();
        let wait =
            try_poll_until_async("a count", LONG, || Ok(count()), |count| *count == SPINS + 10);
        let (value, turns) = run(wait);
        assert_eq!((value.unwrap(), turns), (SPINS + 10, 10));

        let wait = try_poll_until_async("a bit", Duration::from_millis(1), || Ok(0), |_| false);
        assert_eq!(run(wait).0.unwrap_err().kind(), ErrorKind::TimedOut);
    }
}
