//! Capture files in the format of libpcap, tcpdump and Wireshark
//! (draft-ietf-opsawg-pcap §4, §5).

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::thread::Thread;
use std::time::{SystemTime, UNIX_EPOCH};

use super::wire::{MAX_FRAME, Wire};
use crate::error::{Error, Result};

/// Times in microseconds.
const MAGIC: u32 = 0xa1b2_c3d4;
const VERSION: u32 = 2 | 4 << 16;
const ETHERNET: u32 = 1;

/// A wire that also writes the frames of both directions to a capture file.
///
/// ```no_run
/// use vfio_remap::emulated::igb::{Capture, Igb, Port};
///
/// let (port, network) = Port::pair();
/// let card = Igb::new([2, 0, 0, 0, 0, 1]).with_wire(Capture::create(port, "frames.pcap")?);
/// # drop((card, network));
/// # Ok::<(), vfio_remap::Error>(())
/// ```
pub struct Capture<W> {
    wire: W,
    /// `None` after an error.
    file: Option<Box<dyn Write + Send>>,
    record: Vec<u8>,
}

impl<W: Wire> Capture<W> {
    /// Captures to a new file. An existing file is replaced.
    ///
    /// # Errors
    /// `Os` if the file cannot be created or written.
    pub fn create(wire: W, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |error| Error::io(&error, "create", path.display());
        Self::start(wire, File::create(path).map_err(failed)?).map_err(failed)
    }

    /// Captures to `writer`, with one write for each frame.
    ///
    /// # Errors
    /// `Os` if it cannot be written.
    pub fn new(wire: W, writer: impl Write + Send + 'static) -> Result<Self> {
        let failed = |error| Error::io(&error, "write", "a capture of frames");
        Self::start(wire, writer).map_err(failed)
    }

    fn start(wire: W, mut writer: impl Write + Send + 'static) -> std::io::Result<Self> {
        let header = [MAGIC, VERSION, 0, 0, MAX_FRAME as u32, ETHERNET];
        writer.write_all(header.map(u32::to_le_bytes).as_flattened())?;
        Ok(Self { wire, file: Some(Box::new(writer)), record: Vec::new() })
    }
}

/// Writes a frame. An error is logged, and ends the capture.
fn record(file: &mut Option<Box<dyn Write + Send>>, record: &mut Vec<u8>, frame: &[u8]) {
    let Some(writer) = file else { return };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let len = frame.len() as u32;
    record.clear();
    for word in [now.as_secs() as u32, now.subsec_micros(), len, len] {
        record.extend_from_slice(&word.to_le_bytes());
    }
    record.extend_from_slice(frame);
    if let Err(error) = writer.write_all(record) {
        log::error!("igb: the capture ends: {error}");
        *file = None;
    }
}

impl<W: Wire> Wire for Capture<W> {
    fn send(&mut self, frame: &[u8]) {
        record(&mut self.file, &mut self.record, frame);
        self.wire.send(frame);
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        let received = self.wire.receive(frame);
        if received {
            record(&mut self.file, &mut self.record, frame);
        }
        received
    }

    fn is_up(&self) -> bool {
        self.wire.is_up()
    }

    fn missed(&mut self) -> u32 {
        self.wire.missed()
    }

    fn watch(&mut self, reader: Thread) {
        self.wire.watch(reader);
    }
}

impl<W: fmt::Debug> fmt::Debug for Capture<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("wire", &self.wire).finish_non_exhaustive()
    }
}
