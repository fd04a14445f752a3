//! The thread of a contender: on the processor that testpmd's is on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::guest::Result;

/// The processor of the thread that sends and receives, whosever it is.
pub const PROCESSOR: usize = 1;

/// Calls what `prepare` returns again and again in a thread of its own, until `measure` returns.
pub fn work_during<W: FnMut() -> vfio_remap::Result<()>>(
    prepare: impl FnOnce() -> W + Send,
    measure: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let worker = scope.spawn(|| -> std::result::Result<(), String> {
            let mut processors = CpuSet::new();
            processors.set(PROCESSOR).map_err(|error| error.to_string())?;
            sched_setaffinity(Pid::from_raw(0), &processors).map_err(|error| error.to_string())?;
            let mut work = prepare();
            while !stop.load(Ordering::Relaxed) {
                work().map_err(|error| error.to_string())?;
            }
            Ok(())
        });
        let measured = measure();
        stop.store(true, Ordering::Relaxed);
        worker.join().map_err(|_| "its thread panicked")??;
        measured
    })
}
