//! Reads a guest's kernel log: how the boot ended, and whether the kernel logged a
//! warning or an error.

/// Markers that `guest/init` writes to the log.
const PREFIX: &str = "lab: ";
const STARTS: &str = "payload starts";
const ENDED: &str = "payload ended with status ";
const SETUP_FAILED: &str = "setup failed: ";

/// A marker that a test writes to the log: what it expects from then on, or nothing.
const EXPECTS: &str = "lab: expects:";

/// What a kernel logs only about a fault: of itself, of its page tables, or of a device's
/// DMA.
const OFFENCES: [&str; 14] = [
    "WARNING",
    "BUG",
    "bad pud",
    "bad pmd",
    "freeing invalid memtype",
    "Oops",
    "general protection",
    "Call Trace",
    "rcu: INFO",
    "DMAR: [DMA",
    "soft lockup",
    "hung task",
    "blocked for more than",
    "Kernel panic",
];

/// A guest's kernel log, from its serial console.
pub struct KernelLog(String);

impl KernelLog {
    /// Reads the console's bytes. Lines end in CR LF.
    pub fn new(console: &[u8]) -> Self {
        Self(String::from_utf8_lossy(console).replace('\r', ""))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The payload's exit status, as a shell reports it: 128 + n if signal n killed it.
    /// `None` if it did not end.
    pub fn payload_status(&self) -> Option<u8> {
        self.marker(ENDED)?.parse().ok()
    }

    /// Why `guest/init` failed, if it did.
    pub fn setup_failure(&self) -> Option<&str> {
        self.marker(SETUP_FAILED)
    }

    pub fn panicked(&self) -> bool {
        self.0.contains("Kernel panic")
    }

    /// The lines with faults, from the payload's start on. Earlier ones concern the
    /// emulated machine and not the tests. A test that causes such a line announces it
    /// by a line in `/dev/kmsg`, and cancels that afterwards.
    pub fn offences(&self) -> Vec<&str> {
        let starts = format!("{PREFIX}{STARTS}");
        let mut expected: Option<&str> = None;
        let mut offences = Vec::new();
        for line in self.0.lines().skip_while(|line| !line.contains(&starts)) {
            if let Some((_, text)) = line.split_once(EXPECTS) {
                expected = Some(text.trim()).filter(|text| !text.is_empty());
            } else if OFFENCES.iter().any(|offence| has_word(line, offence))
                && !expected.is_some_and(|text| line.contains(text))
            {
                offences.push(line);
            }
        }
        offences
    }

    /// The last lines.
    pub fn tail(&self, lines: usize) -> String {
        tail(&self.0, lines)
    }

    fn marker(&self, marker: &str) -> Option<&str> {
        let marker = format!("{PREFIX}{marker}");
        self.0.lines().find_map(|line| Some(line.split_once(&marker)?.1.trim_end()))
    }
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Whether `line` has `word`, and not as the end of a longer word such as DEBUG.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(|before: char| before.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &[u8] = b"[    0.1] WARNING: emulated\r\n\
        [    2.0] lab: payload starts\r\n\
        [    2.1] vfio-pci 0000:00:03.0: DEBUG enabling device\r\n\
        [    2.2] BUG: Bad page map in process guest\r\n\
        [    2.3] kernel BUG at mm/memory.c:1!\r\n\
        [    2.4] DMAR: [DMA Read NO_PASID] fault addr 0x0\r\n\
        [    2.9] lab: payload ended with status 101\r\n";

    #[test]
    fn only_lines_after_the_payloads_start_count() {
        let log = KernelLog::new(LOG);
        let offences = log.offences();
        assert_eq!(offences.len(), 3, "{offences:?}");
        assert!(offences[0].ends_with("in process guest"));
    }

    #[test]
    fn the_markers_show_how_the_payload_ended() {
        assert_eq!(KernelLog::new(LOG).payload_status(), Some(101));
        let log = KernelLog::new(b"[    2.0] lab: setup failed: no device\r\n");
        assert_eq!(log.payload_status(), None);
        assert_eq!(log.setup_failure(), Some("no device"));
    }

    #[test]
    fn a_tail_longer_than_the_text_is_the_text() {
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a\nb", 5), "a\nb");
    }

    #[test]
    fn an_announced_offence_does_not_count_until_it_is_cancelled() {
        let log = KernelLog::new(
            b"lab: payload starts\nlab: expects: DMAR: [DMA\nDMAR: [DMA Read] one\nWARNING\n\
              lab: expects:\nDMAR: [DMA Read] two\n",
        );
        assert_eq!(log.offences(), ["WARNING", "DMAR: [DMA Read] two"]);
    }
}
