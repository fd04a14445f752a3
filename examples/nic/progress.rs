//! Progress and tables on a terminal.

use indicatif::{ProgressBar, ProgressStyle};

use vfio_remap::Result;

use crate::options::Common;
use crate::say;

/// What is shown on standard error while a command runs, if that is a terminal. Hidden with `--json`.
pub struct Progress {
    bar: ProgressBar,
    /// Whether standard output is for one JSON object.
    json: bool,
}

impl Progress {
    /// Text of some lines.
    pub fn table(common: &Common) -> Self {
        Self::new(common, "{msg}")
    }

    /// Bytes; how many there are becomes known later.
    pub fn bytes(common: &Common) -> Self {
        Self::new(common, "{bytes}, {bytes_per_sec}")
    }

    fn new(common: &Common, template: &str) -> Self {
        let bar = if common.json { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        let this = Self { bar, json: common.json };
        this.style(template);
        this
    }

    fn style(&self, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
    }

    /// There are so many bytes.
    pub fn set_length(&self, bytes: u64) {
        if self.bar.length() != Some(bytes) {
            self.bar.set_length(bytes);
            self.style("{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
        }
    }

    pub fn set(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    /// Shows a text in place of the last one.
    pub fn show(&self, text: String) {
        self.bar.set_message(text);
    }

    /// Prints a line that stays, on standard output, unless that is for JSON.
    ///
    /// # Errors
    /// Why lines are lost.
    pub fn line(&self, text: &str) -> Result<()> {
        if !self.json {
            self.bar.suspend(|| say!("{text}"));
        }
        say::check()
    }

    pub fn done(&self) {
        self.bar.finish_and_clear();
    }
}
