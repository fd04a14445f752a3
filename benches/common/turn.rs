//! Turns of programs that are compared: the lab measures the processor time between their marks.

use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::termios::tcdrain;

use super::guest::Result;

/// Numbers the turns of a run.
#[derive(Default)]
pub struct Turns {
    count: u32,
}

impl Turns {
    /// Lets what runs go on for a while, and prints what `count` has counted meanwhile, as a row for the lab:
    /// the number of the turn, what runs, the count, and nanoseconds.
    pub fn measure(
        &mut self,
        what: &[&str],
        time: Duration,
        mut count: impl FnMut() -> Result<u64>,
    ) -> Result<()> {
        self.count += 1;
        let number = self.count;
        mark(number, "begins")?;
        let (before, started) = (count()?, Instant::now());
        thread::sleep(time);
        mark(number, "ends")?;
        let (after, elapsed) = (count()?, started.elapsed());
        let what = what.join("\t");
        println!("row\t{number}\t{what}\t{}\t{}", after.saturating_sub(before), elapsed.as_nanos());
        Ok(())
    }
}

/// Tells the lab, and returns when it was told.
fn mark(number: u32, what: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "turn\t{number}\t{what}")?;
    out.flush()?;
    // Something that is no terminal has it already.
    let _ = tcdrain(&out);
    Ok(())
}
