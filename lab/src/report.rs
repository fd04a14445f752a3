//! The table at the end of `cargo lab test`.

use std::fmt::Write as _;

use crate::boot::{Attempt, Ending, Outcome};
use crate::libtest::Counts;

/// One line of the table.
pub struct Row {
    /// The kernel's name, and what is special about this boot.
    pub label: String,
    pub result: Result,
}

pub enum Result {
    Ran {
        version: String,
        outcome: Outcome,
    },
    /// Not run, and why.
    Skipped(String),
}

impl Row {
    pub fn ran(&self) -> bool {
        matches!(self.result, Result::Ran { .. })
    }

    /// Skipped counts as passed.
    pub fn passed(&self) -> bool {
        match &self.result {
            Result::Ran { outcome, .. } => {
                matches!(outcome.ending, Ending::Exited(0))
                    && Counts::find(&outcome.output).is_some()
                    && outcome.log.offences().is_empty()
            }
            Result::Skipped(_) => true,
        }
    }
}

/// The whole table, and beneath it what went wrong.
pub fn table(rows: &[Row]) -> String {
    let mut table = format!(
        "{:<24}{:<22}{:>6} {:>6} {:>7} {:>5} {:>7}  {:<13} {}\n",
        "kernel",
        "version",
        "passed",
        "failed",
        "ignored",
        "boots",
        "time",
        "kernel log",
        "saved as"
    );
    let mut details = String::new();
    for row in rows {
        match &row.result {
            Result::Skipped(reason) => {
                writeln!(table, "{:<24}skipped: {reason}", row.label).expect("a string takes all");
            }
            Result::Ran { version, outcome } => {
                line(&mut table, &row.label, version, outcome);
                explain(&mut details, &row.label, outcome);
            }
        }
    }
    table + &details
}

fn line(table: &mut String, label: &str, version: &str, outcome: &Outcome) {
    let counts = Counts::find(&outcome.output);
    let count =
        |of: fn(Counts) -> u32| counts.map_or("-".to_owned(), |counts| of(counts).to_string());
    let offences = outcome.log.offences().len();
    let log = match offences {
        0 => "clean".to_owned(),
        _ => format!("DIRTY ({offences})"),
    };
    writeln!(
        table,
        "{label:<24}{version:<22}{:>6} {:>6} {:>7} {:>5} {:>5.1} s  {log:<13} {}",
        count(|counts| counts.passed),
        count(|counts| counts.failed),
        count(|counts| counts.ignored),
        outcome.given_up.len() + 1,
        outcome.took.as_secs_f32(),
        outcome.log_path.display()
    )
    .expect("a string takes all");
}

fn explain(details: &mut String, label: &str, outcome: &Outcome) {
    for Attempt { ending, log_path } in &outcome.given_up {
        writeln!(details, "\n{label} was booted again: {ending}; see {}", log_path.display())
            .expect("a string takes all");
    }
    let mut complaints = outcome.complaints();
    match (&outcome.ending, Counts::find(&outcome.output)) {
        (Ending::Exited(_), None) => {
            complaints += &format!("no test result, but {}\n", outcome.ending);
        }
        (Ending::Exited(1..), Some(Counts { failed: 0, .. })) => {
            complaints += &format!("no test failed, but {}\n", outcome.ending);
        }
        _ => {}
    }
    if !complaints.is_empty() {
        write!(details, "\n{label}: {complaints}").expect("a string takes all");
    }
}
