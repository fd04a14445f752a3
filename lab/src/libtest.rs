//! Reads the output of a libtest binary.

/// The counts in libtest's last line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub passed: u32,
    pub failed: u32,
    pub ignored: u32,
}

impl Counts {
    /// Finds the result line in a test binary's output. `None` if it died
    /// before printing one.
    pub fn find(output: &str) -> Option<Self> {
        let line = output.lines().rev().find_map(|line| line.strip_prefix("test result: "))?;
        let count = |what: &str| {
            line.split([';', '.'])
                .find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
            ignored: count("ignored")?,
        })
    }
}

/// Whether the output, which may be incomplete, shows that a test has failed.
pub fn has_failed(output: &str) -> bool {
    output.lines().any(|line| {
        line.ends_with("... FAILED")
            || line.starts_with("test result: FAILED")
            || line.contains("panicked at")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_line_gives_the_counts() {
        let output = "\nrunning 3 tests\ntest a ... ok\n\ntest result: FAILED. 12 passed; 1 failed; \
                      2 ignored; 0 measured; 4 filtered out; finished in 0.31s\n\n";
        let counts = Counts { passed: 12, failed: 1, ignored: 2 };
        assert_eq!(Counts::find(output), Some(counts));
    }

    #[test]
    fn a_failure_is_found_before_the_end() {
        assert!(has_failed("test a ... ok\ntest b ... FAILED\ntest c ... "));
        assert!(has_failed("test a ... \nthread 'a' (42) panicked at tests/a.rs:1:5:\nno\n"));
        assert!(has_failed("test result: FAILED. 0 passed; 1 failed; 0 ignored\n"));
        assert!(!has_failed("test a_write_that_FAILED ... ok\ntest b ... "));
    }

    #[test]
    fn a_binary_that_died_has_no_counts() {
        assert_eq!(Counts::find("running 3 tests\ntest a ... "), None);
    }
}
