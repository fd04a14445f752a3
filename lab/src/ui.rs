//! Telling the user what goes on, in cargo's style, on standard error.

use std::io::{self, Write};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use console::style;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The lines that move. Hidden where standard error is no terminal.
static MOVING: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// One line: a verb and its object.
pub fn status(verb: &str, what: &str) {
    write(&format!("{:>12} {what}", style(verb).green().bold().for_stderr()));
}

/// Something that the user should know but that stops nothing.
pub fn warning(what: &str) {
    write(&format!("{}: {what}", style("warning").yellow().bold().for_stderr()));
}

/// What makes the lab stop.
pub fn error(what: &str) {
    write(&format!("{}: {what}", style("error").red().bold().for_stderr()));
}

/// Lines that stay, above those that move.
fn write(lines: &str) {
    MOVING.suspend(|| eprintln!("{lines}"));
}

/// What a guest has written, under a line that says whose it is; for standard output, and in
/// one piece, whatever else is written at the same time.
pub fn output(verb: &str, what: &str, bytes: &[u8]) -> io::Result<()> {
    MOVING.suspend(|| {
        eprintln!("{:>12} {what}", style(verb).green().bold().for_stderr());
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        stdout.flush()
    })
}

/// Something that takes a while: a line that moves on a terminal and stands
/// still elsewhere.
pub struct Stage {
    bar: ProgressBar,
    verb: &'static str,
    started: Instant,
    /// When a line was last written that stands still.
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

    /// Replaces the moving line by one that stays.
    pub fn done(self, verb: &str, what: &str) {
        self.clear();
        let seconds = self.started.elapsed().as_secs_f32();
        status(verb, &format!("{what} in {seconds:.1} s"));
    }

    /// Says how far it has come; where the line does not move, now and then.
    pub fn progress(&mut self, what: &str) {
        const PATIENCE: Duration = Duration::from_secs(60);
        if !self.bar.is_hidden() {
            self.bar.set_message(what.to_owned());
        } else if self.told.elapsed() > PATIENCE {
            self.told = Instant::now();
            status(self.verb, what);
        }
    }

    /// Clears the way for other output.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.clear();
    }
}
