//! A progress bar on a terminal.

use indicatif::{ProgressBar, ProgressStyle};

use crate::options::Common;

pub struct Progress(ProgressBar);

impl Progress {
    /// A bar for `bytes` in total, on standard error if that is a terminal. Hidden with `--json`.
    pub fn new(common: &Common, what: &'static str, bytes: u64) -> Self {
        let bar = if common.json { ProgressBar::hidden() } else { ProgressBar::new(bytes) };
        let template = "{msg:>9} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what);
        Self(bar)
    }

    pub fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    pub fn set(&self, bytes: u64) {
        self.0.set_position(bytes);
    }

    pub fn done(&self) {
        self.0.finish_and_clear();
    }
}
