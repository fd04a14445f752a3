//! The table at the end of `cargo lab test`.

use std::fmt::Write as _;

use crate::boot::{Attempt, Ending, Outcome, TAIL};
use crate::klog::tail;
use crate::libtest::Counts;

/// One line of the table.
pub struct Row {
    /// The kernel's name and the variant of this boot.
    pub label: String,
    pub result: Result,
}

pub enum Result {
    Ran {
        version: String,
        outcome: Outcome,
        proof: Proof,
    },
    /// Why it was not run.
    Skipped(String),
    /// Why it could not be run.
    Failed(String),
}

/// How a payload shows that it has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A test binary prints how many tests it has run.
    Counts,
    /// An example has only an exit status.
    Status,
}

impl Row {
    pub fn ran(&self) -> bool {
        matches!(self.result, Result::Ran { .. })
    }

    /// Whether it has passed. A skipped row counts as passed.
    pub fn passed(&self) -> bool {
        match &self.result {
            Result::Ran { outcome, proof, .. } => {
                matches!(outcome.ending, Ending::Exited(0))
                    && (*proof == Proof::Status || Counts::find(&outcome.output).is_some())
                    && outcome.log.offences().is_empty()
            }
            Result::Skipped(_) => true,
            Result::Failed(_) => false,
        }
    }
}

/// The whole table, followed by a description of what failed.
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
                writeln!(table, "{:<24}skipped: {reason}", row.label)
                    .expect("writing to a string succeeds");
            }
            Result::Failed(reason) => {
                let reason = reason.lines().next().unwrap_or_default();
                writeln!(table, "{:<24}FAILED: {reason}", row.label)
                    .expect("writing to a string succeeds");
            }
            Result::Ran { version, outcome, proof } => {
                line(&mut table, &row.label, version, outcome);
                explain(&mut details, &row.label, outcome, *proof);
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
    .expect("writing to a string succeeds");
}

fn explain(details: &mut String, label: &str, outcome: &Outcome, proof: Proof) {
    for Attempt { ending, log_path } in &outcome.given_up {
        writeln!(details, "\n{label} was booted again: {ending}; see {}", log_path.display())
            .expect("writing to a string succeeds");
    }
    let mut complaints = outcome.complaints();
    match (&outcome.ending, Counts::find(&outcome.output)) {
        (Ending::Exited(0), None) if proof == Proof::Status => {}
        (Ending::Exited(_), None) if proof == Proof::Status => {
            complaints += &format!("{}\n{}\n", outcome.ending, tail(&outcome.output, TAIL));
        }
        (Ending::Exited(_), None) => {
            complaints += &format!("no test result, but {}\n", outcome.ending);
        }
        (Ending::Exited(1..), Some(Counts { failed: 0, .. })) => {
            complaints += &format!("no test failed, but {}\n", outcome.ending);
        }
        _ => {}
    }
    if !complaints.is_empty() {
        write!(details, "\n{label}: {complaints}").expect("writing to a string succeeds");
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;
    use crate::klog::KernelLog;

    fn row(proof: Proof, status: u8, output: &str, log: &str) -> Row {
        let log = KernelLog::new(format!("lab: payload starts\n{log}").as_bytes());
        let outcome = Outcome {
            ending: Ending::Exited(status),
            log,
            log_path: PathBuf::from("log"),
            output: output.to_owned(),
            took: Duration::ZERO,
            given_up: Vec::new(),
        };
        let result = Result::Ran { version: "6.1".to_owned(), outcome, proof };
        Row { label: "6.1".to_owned(), result }
    }

    #[test]
    fn an_example_passes_by_its_status_and_a_clean_log() {
        assert!(row(Proof::Status, 0, "all is well", "").passed());
        assert!(!row(Proof::Status, 1, "all is well", "").passed());
        assert!(!row(Proof::Status, 0, "all is well", "BUG: x").passed());
        let told = table(&[row(Proof::Status, 1, "tour: no such device", "")]);
        assert!(told.contains("\n6.1: exit status 1\ntour: no such device"), "{told}");
    }

    #[test]
    fn a_test_binary_without_a_result_has_not_passed() {
        assert!(!row(Proof::Counts, 0, "all is well", "").passed());
        let result = "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured";
        assert!(row(Proof::Counts, 0, result, "").passed());
    }

    #[test]
    fn a_kernel_that_could_not_be_fetched_has_not_passed() {
        let row = |result| Row { label: "6.1".to_owned(), result };
        let failed = row(Result::Failed("no network\nE: refused".to_owned()));
        assert!(!failed.ran() && !failed.passed());
        assert!(table(&[failed]).contains("6.1                     FAILED: no network\n"));
        let skipped = row(Result::Skipped("not on the mirror".to_owned()));
        assert!(!skipped.ran() && skipped.passed());
    }

    #[test]
    fn a_repeated_boot_is_reported() {
        let mut again = row(Proof::Status, 0, "", "");
        let Result::Ran { outcome, .. } = &mut again.result else { panic!("it ran") };
        outcome.given_up.push(Attempt {
            ending: Ending::Crashed { signal: 6, qemu_said: "assertion failed".to_owned() },
            log_path: PathBuf::from("6.1.attempt-1.kernel.log"),
        });
        let told = table(&[again]);
        assert!(told.contains("     2   0.0 s  clean"), "{told}");
        assert!(told.contains("died of signal 6: assertion failed; see 6.1.attempt-1"), "{told}");
    }
}
