//! How many commands the emulator's block devices have completed: counted by the device, so in
//! the same way for all drivers in the guest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The socket of the emulator's monitor (QMP) in its working directory.
pub const SOCKET: &str = "statistics";

/// How long the emulator may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to the monitor.
pub struct BlockStats {
    stream: BufReader<UnixStream>,
}

impl BlockStats {
    /// Connects to the emulator that is this process.
    pub fn of(process: u32) -> Result<Self> {
        let stream = UnixStream::connect(format!("/proc/{process}/cwd/{SOCKET}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut stats = Self { stream: BufReader::new(stream) };
        stats.execute("qmp_capabilities")?;
        Ok(stats)
    }

    /// The reads and writes that a block node has completed.
    pub fn completed(&mut self, node: &str) -> Result<u64> {
        let answer = self.execute("query-blockstats")?;
        completed(&answer, node).with_context(|| format!("the emulator has no node {node}"))
    }

    /// Executes a command. Events and the greeting come in between.
    fn execute(&mut self, command: &str) -> Result<Value> {
        writeln!(self.stream.get_mut(), "{{\"execute\": \"{command}\"}}")?;
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                bail!("the emulator has closed its monitor");
            }
            let answer: Value = serde_json::from_str(&line)?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("the emulator refuses {command}: {error}");
            }
        }
    }
}

fn completed(answer: &Value, node: &str) -> Option<u64> {
    let device = answer.as_array()?.iter().find(|device| device["node-name"] == node)?;
    let count = |name: &str| device["stats"][name].as_u64();
    Some(count("rd_operations")? + count("wr_operations")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_of_the_named_node_count() {
        let answer = serde_json::json!([
            { "node-name": "other", "stats": { "rd_operations": 1, "wr_operations": 2 } },
            { "node-name": "disk", "stats": { "rd_operations": 30, "wr_operations": 4 } },
            { "stats": {} },
        ]);
        assert_eq!(completed(&answer, "disk"), Some(34));
        assert_eq!(completed(&answer, "none"), None);
    }
}
