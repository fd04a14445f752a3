//! Capture files for Wireshark and tcpdump (draft-ietf-opsawg-pcap §4, §5).

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vfio_remap::{Error, Result};

/// Times have nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
const VERSION: u32 = 2 | 4 << 16;
const ETHERNET: u32 = 1;

/// A file of frames.
pub struct Pcap<W: Write = BufWriter<File>> {
    path: PathBuf,
    writer: W,
    snapshot_length: u32,
}

impl Pcap {
    /// Makes a file, in place of an existing one.
    ///
    /// # Errors
    /// Why it cannot be made.
    pub fn create(path: &Path, snapshot_length: u32) -> Result<Self> {
        let file = File::create(path).map_err(|error| failed(error, "create", path))?;
        Self::new(path, BufWriter::new(file), snapshot_length)
    }
}

impl<W: Write> Pcap<W> {
    fn new(path: &Path, writer: W, snapshot_length: u32) -> Result<Self> {
        let mut this = Self { path: path.to_owned(), writer, snapshot_length };
        let header = [MAGIC, VERSION, 0, 0, snapshot_length, ETHERNET];
        this.put(&[header.map(u32::to_le_bytes).as_flattened()])?;
        // A file that cannot be written is told before there are frames.
        this.flush()?;
        Ok(this)
    }

    /// Writes a frame, as far as the snapshot length goes.
    ///
    /// # Errors
    /// Why it cannot be written.
    pub fn write(&mut self, time: SystemTime, frame: &[u8]) -> Result<()> {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let kept = &frame[..frame.len().min(self.snapshot_length as usize)];
        let header =
            [since.as_secs() as u32, since.subsec_nanos(), kept.len() as u32, frame.len() as u32];
        self.put(&[header.map(u32::to_le_bytes).as_flattened(), kept])
    }

    /// Has the kernel know all frames.
    ///
    /// # Errors
    /// Why they cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        self.writer.flush().map_err(|error| failed(error, "write", &self.path))
    }

    fn put(&mut self, parts: &[&[u8]]) -> Result<()> {
        parts
            .iter()
            .try_for_each(|part| self.writer.write_all(part))
            .map_err(|error| failed(error, "write", &self.path))
    }
}

fn failed(error: io::Error, operation: &'static str, path: &Path) -> Error {
    Error::from_io(error, operation, path.display())
        .with_advice("make room, or name a file in a directory that you may write to")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_as_the_format_says() {
        let mut bytes = Vec::new();
        let mut pcap = Pcap::new(Path::new("file"), &mut bytes, 4).unwrap();
        let time = UNIX_EPOCH + Duration::new(0x0102_0304, 5);
        pcap.write(time, &[1, 2, 3]).unwrap();
        pcap.write(time, &[1, 2, 3, 4, 5]).unwrap();
        let header: &[&[u8]] = &[
            &[0x4d, 0x3c, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0],
            &[4, 3, 2, 1, 5, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3],
            &[4, 3, 2, 1, 5, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 1, 2, 3, 4],
        ];
        assert_eq!(bytes, header.concat());
    }
}
