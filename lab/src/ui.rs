//! Status messages for the user, in cargo's style, on standard error.

use std::io::{self, Write};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use console::style;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The progress lines. Hidden if standard error is not a terminal.
static MOVING: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Prints one line: a verb and its object.
pub fn status(verb: &str, what: &str) {
    write(&format!("{:>12} {what}", style(verb).green().bold().for_stderr()));
}

/// Prints a warning. The lab continues.
pub fn warning(what: &str) {
    write(&format!("{}: {what}", style("warning").yellow().bold().for_stderr()));
}

/// Prints an error.
pub fn error(what: &str) {
    write(&format!("{}: {what}", style("error").red().bold().for_stderr()));
}

/// Prints lines above the progress lines.
fn write(lines: &str) {
    MOVING.suspend(|| eprintln!("{lines}"));
}

/// Writes a guest's output to standard output, after a line that names the guest. Other
/// output does not interrupt it.
pub fn output(verb: &str, what: &str, bytes: &[u8]) -> io::Result<()> {
    MOVING.suspend(|| {
        eprintln!("{:>12} {what}", style(verb).green().bold().for_stderr());
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        stdout.flush()
    })
}

/// A task that takes a while: a progress line on a terminal, and plain lines elsewhere.
pub struct Stage {
    bar: ProgressBar,
    verb: &'static str,
    started: Instant,
    /// When the last plain line was written.
    told: Instant,
}

impl Stage {
    pub fn new(verb: &'static str, what: &str) -> Self {
        let bar = MOVING.add(ProgressBar::new_spinner());
        if bar.is_hidden() {
            status(verb, what);
        }
        let template = "{prefix:>12.green.bold} {wide_msg} {spinner} {elapsed}";
        bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
        bar.set_prefix(verb);
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        let now = Instant::now();
        Self { bar, verb, started: now, told: now }
    }

    /// Replaces the progress line by a line that stays.
    pub fn done(self, verb: &str, what: &str) {
        self.clear();
        let seconds = self.started.elapsed().as_secs_f32();
        status(verb, &format!("{what} in {seconds:.1} s"));
    }

    /// Shows the progress. Without a terminal, prints a line once a minute.
    pub fn progress(&mut self, what: &str) {
        const INTERVAL: Duration = Duration::from_secs(60);
        if !self.bar.is_hidden() {
            self.bar.set_message(what.to_owned());
        } else if self.told.elapsed() > INTERVAL {
            self.told = Instant::now();
            status(self.verb, what);
        }
    }

    /// Removes the progress line, for other output.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.clear();
    }
}
