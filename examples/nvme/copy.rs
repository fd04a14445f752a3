//! `nvme read` and `nvme write`: copies between blocks and a file.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use serde_json::json;
use vfio_remap::{Error, ErrorKind, Result};

use crate::guard;
use crate::mover::Mover;
use crate::options::{Copy, Options};
use crate::progress::Progress;
use crate::session::Session;
use vfio_remap_nvme::{Namespace, Settings};

/// The amount of data, in bytes, after which the namespace is flushed.
const SEGMENT: u64 = 16 << 20;

/// Copies blocks to a file.
pub fn read(options: &Options, copy: &Copy) -> Result<()> {
    let session = Session::open(&options.common, Settings::default())?;
    let block_shift = session.namespace.block_shift();
    let length = copy.length.unwrap_or(session.namespace.size().saturating_sub(copy.offset));
    let blocks = blocks(&session.namespace, copy.offset, length)?;
    let failed = |error| about(copy, "write", &error);
    let file =
        open(File::options().write(true).create(true).truncate(true), copy).map_err(failed)?;
    let start = Instant::now();
    let progress = Progress::new(&options.common, "reading", length);
    Mover::new(&session)?.read(blocks, |block, bytes| {
        file.write_all_at(bytes, (block << block_shift) - copy.offset).map_err(failed)?;
        progress.add(bytes.len() as u64);
        Ok(())
    })?;
    file.sync_all().map_err(failed)?;
    progress.done();
    report(options, "read", length, start);
    session.close()
}

/// Copies a file to blocks.
pub fn write(options: &Options, copy: &Copy) -> Result<()> {
    let session = Session::open(&options.common, Settings::default())?;
    let failed = |error| about(copy, "read", &error);
    let file = open(File::options().read(true), copy).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let there = metadata.len();
    if !metadata.is_file() || there == 0 {
        let reason = if metadata.is_file() { "it is empty" } else { "it is no regular file" };
        return Err(Error::new(ErrorKind::InvalidInput, "copy", copy.file.display())
            .with_reason(reason)
            .with_advice("name a file that has whole blocks"));
    }
    let length = copy.length.unwrap_or(there);
    if length > there {
        return Err(Error::new(ErrorKind::OutOfRange, "read", copy.file.display())
            .with_reason(format!("it has {there} bytes, but {length} were requested")));
    }
    let all = blocks(&session.namespace, copy.offset, length)?;
    let mut mover = Mover::new(&session)?;
    guard::permit(&options.common, &session, &mut mover)?;
    let start = Instant::now();
    let progress = Progress::new(&options.common, "writing", length);
    let shift = session.namespace.block_shift();
    for part in segments(all, SEGMENT >> shift) {
        let end = (part.end << shift) - copy.offset;
        mover.write(part, |block, bytes| {
            file.read_exact_at(bytes, (block << shift) - copy.offset).map_err(failed)
        })?;
        progress.set(end);
    }
    progress.done();
    report(options, "written", length, start);
    drop(mover);
    session.close()
}

/// Opens the file. A FIFO without another end does not block.
fn open(options: &mut OpenOptions, copy: &Copy) -> std::io::Result<File> {
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&copy.file)
}

/// Splits a run of blocks into parts of at most `size` blocks.
pub fn segments(blocks: Range<u64>, size: u64) -> impl Iterator<Item = Range<u64>> {
    let (start, end, size) = (blocks.start, blocks.end, size.max(1));
    (0..(end - start).div_ceil(size)).map(move |index| {
        let from = start + index * size;
        from..(from + size).min(end)
    })
}

/// The blocks of the `length` bytes at `offset`.
fn blocks(namespace: &Namespace, offset: u64, length: u64) -> Result<Range<u64>> {
    let size = namespace.block_size() as u64;
    let object = || format!("{length} bytes at {offset} of namespace {}", namespace.id());
    if !offset.is_multiple_of(size) || !length.is_multiple_of(size) {
        return Err(Error::new(ErrorKind::Unaligned, "copy", object())
            .with_reason(format!("a block has {size} bytes"))
            .with_advice("use multiples of that for --offset and --length, or pad the file"));
    }
    match offset.checked_add(length) {
        Some(end) if end <= namespace.size() && length > 0 => Ok(offset / size..end / size),
        _ => Err(Error::new(ErrorKind::OutOfRange, "copy", object())
            .with_reason(format!("it has {} bytes", namespace.size()))),
    }
}

fn report(options: &Options, what: &str, bytes: u64, start: Instant) {
    let seconds = start.elapsed().as_secs_f64();
    if options.common.json {
        say!("{}", json!({"bytes": bytes, "seconds": seconds}));
    } else {
        let rate = bytes as f64 / 1e6 / seconds;
        say!("{bytes} bytes {what} in {seconds:.2} s, {rate:.0} MB/s");
    }
}

fn about(copy: &Copy, operation: &'static str, error: &std::io::Error) -> Error {
    let object = copy.file.display();
    match error.raw_os_error() {
        Some(errno) => Error::from_errno(errno, operation, object),
        None => Error::new(ErrorKind::Os, operation, object).with_reason(error.to_string()),
    }
}
