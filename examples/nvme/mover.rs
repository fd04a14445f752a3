//! Copies long runs of blocks, with several requests at a time, even if the controller is reset meanwhile.

use std::ops::Range;

use vfio_remap::device::DmaBuffer;
use vfio_remap::{Error, ErrorKind, Result};

use crate::session::Session;
use vfio_remap_nvme::{Completion, IoQueue, Namespace};

/// How many requests are outstanding, and their size if the controller allows it.
const DEPTH: usize = 16;
const CHUNK: usize = 128 << 10;
/// How often in a row all outstanding requests may be undecided before this fails.
const RETRIES: usize = 16;

/// A queue, and buffers for its requests.
pub struct Mover {
    queue: IoQueue,
    namespace: Namespace,
    /// Each has the size of a chunk.
    buffers: Vec<DmaBuffer>,
    chunk_blocks: u64,
    /// The data for the caller's function.
    bytes: Vec<u8>,
    /// How many requests in a row were undecided.
    undecided: usize,
}

/// The caller's function: it takes the data of a chunk that was read, or fills in data to write.
enum Work<'a> {
    Read(&'a mut dyn FnMut(u64, &[u8]) -> Result<()>),
    Write(&'a mut dyn FnMut(u64, &mut [u8]) -> Result<()>),
}

impl Work<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::Read(_) => "read",
            Self::Write(_) => "write",
        }
    }
}

impl Mover {
    pub fn new(session: &Session) -> Result<Self> {
        let namespace = session.namespace;
        let queue = session.controller.queue()?;
        let most = session.controller.identity().max_transfer;
        let chunk = CHUNK.min(most).max(namespace.block_size());
        let buffers = (0..DEPTH.min(queue.depth())).map(|_| buffer(&queue, chunk));
        Ok(Self {
            buffers: buffers.collect::<Result<_>>()?,
            queue,
            namespace,
            chunk_blocks: (chunk >> namespace.block_shift()) as u64,
            bytes: vec![0; chunk],
            undecided: 0,
        })
    }

    /// Reads blocks. Passes each chunk and the number of its first block to `take`, in any order.
    pub fn read(
        &mut self,
        blocks: Range<u64>,
        mut take: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.run(blocks, &mut Work::Read(&mut take))
    }

    /// Writes blocks and makes them durable. `fill` gets the number of a chunk's first block and fills in its
    /// data. It may be called again for a chunk, because a reset of the controller may lose data that was not
    /// flushed.
    pub fn write(
        &mut self,
        blocks: Range<u64>,
        mut fill: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        for _ in 0..RETRIES {
            let generation = self.queue.generation();
            self.run(blocks.clone(), &mut Work::Write(&mut fill))?;
            if self.flush()? && self.queue.generation() == generation {
                return Ok(());
            }
        }
        Err(self.gave_up())
    }

    /// Processes blocks, as many at once as there are buffers.
    fn run(&mut self, blocks: Range<u64>, work: &mut Work<'_>) -> Result<()> {
        let mut next = blocks.start;
        loop {
            while let Some((part, buffer)) = self.next(&mut next, blocks.end)? {
                if let Work::Write(fill) = work {
                    let bytes = &mut self.bytes[..buffer.size()];
                    fill(part, bytes)?;
                    buffer.write(0, bytes);
                }
                self.submit(work, part, buffer)?;
            }
            let Some(Completion { tag: block, status, buffer, .. }) = self.queue.wait() else {
                if next == blocks.end {
                    return Ok(());
                }
                self.restart()?;
                continue;
            };
            let buffer = buffer.ok_or_else(|| self.lost())?;
            if status.is_undecided() {
                self.retry()?;
                self.submit(work, block, buffer)?;
                continue;
            }
            status.check(work.name(), || self.place(block))?;
            if let Work::Read(take) = work {
                let bytes = &mut self.bytes[..buffer.size()];
                buffer.read(0, bytes);
                take(block, bytes)?;
            }
            self.give_back(buffer);
        }
    }

    /// Submits a request for the blocks in a buffer, starting with `block`.
    fn submit(&mut self, work: &Work<'_>, block: u64, buffer: DmaBuffer) -> Result<()> {
        match work {
            Work::Read(_) => self.queue.read(&self.namespace, block, buffer, block)?,
            Work::Write(_) => self.queue.write(&self.namespace, block, buffer, block)?,
        }
        Ok(())
    }

    /// Flushes the namespace. `false` if a reset has ended the command.
    fn flush(&mut self) -> Result<bool> {
        self.queue.flush(&self.namespace, 0)?;
        let Some(Completion { status, .. }) = self.queue.wait() else { return Ok(false) };
        if status.is_undecided() {
            return Ok(false);
        }
        status.check("flush", || format!("namespace {}", self.namespace.id()))?;
        Ok(true)
    }

    /// The next part of a run, at most a chunk, and a buffer for it. `None` if there is no more, or if a
    /// request has to complete first.
    fn next(&mut self, next: &mut u64, end: u64) -> Result<Option<(u64, DmaBuffer)>> {
        let blocks = (end - *next).min(self.chunk_blocks);
        if blocks == 0 || self.queue.room() == 0 {
            return Ok(None);
        }
        let buffer = if blocks == self.chunk_blocks {
            self.buffers.pop()
        } else {
            Some(buffer(&self.queue, (blocks as usize) << self.namespace.block_shift())?)
        };
        let Some(buffer) = buffer else { return Ok(None) };
        let part = *next;
        *next += blocks;
        Ok(Some((part, buffer)))
    }

    /// Takes a buffer back after a success.
    fn give_back(&mut self, buffer: DmaBuffer) {
        self.undecided = 0;
        if buffer.size() == self.bytes.len() {
            self.buffers.push(buffer);
        }
    }

    /// Handles an empty queue before the end of the run: the queue was created again, or has failed.
    fn restart(&mut self) -> Result<()> {
        if self.queue.room() == 0 { Err(self.lost()) } else { self.retry() }
    }

    fn retry(&mut self) -> Result<()> {
        self.undecided += 1;
        if self.undecided > RETRIES * DEPTH { Err(self.gave_up()) } else { Ok(()) }
    }

    fn gave_up(&self) -> Error {
        Error::new(ErrorKind::Os, "use", self.queue.controller().name()).with_reason(format!(
            "it was reset {RETRIES} times in a row before the requests completed"
        ))
    }

    fn lost(&self) -> Error {
        Error::new(ErrorKind::Gone, "use", self.queue.controller().name())
            .with_reason("it has failed, and cannot be initialized again")
    }

    fn place(&self, block: u64) -> String {
        format!("block {block} of namespace {}", self.namespace.id())
    }
}

/// A buffer of exactly `size` bytes.
fn buffer(queue: &IoQueue, size: usize) -> Result<DmaBuffer> {
    let buffer = queue.controller().buffer(size)?;
    Ok(buffer.split_at(size).map_or_else(|whole| whole.into_buffer(), |(part, _)| part))
}

#[cfg(test)]
mod tests {
    use vfio_remap::emulated::Nvme;
    use vfio_remap::emulated::nvme::Namespace as Storage;
    use vfio_remap::emulated::nvme::{Fault, Faults};

    use super::*;

    #[test]
    fn no_block_is_skipped_after_a_spurious_completion() {
        // Writes begin after the eleven commands that initialize the controller and create the queue. Reads
        // follow.
        for command in (11..40).step_by(4) {
            let faults = Faults::new([(command, Fault::SpuriousCompletion)]);
            let storage = Storage::memory(2 << 20, 512).unwrap();
            let session = Session::with(Nvme::new(vec![storage]).with_faults(&faults));
            let mut mover = Mover::new(&session).unwrap();
            let last = 4096;
            mover
                .write(0..last, |block, bytes| {
                    let parts = bytes.chunks_exact_mut(512).zip(block..);
                    parts.for_each(|(part, block)| part.fill((block % 251) as u8 + 1));
                    Ok(())
                })
                .unwrap();
            let mut seen = 0;
            mover
                .read(0..last, |block, bytes| {
                    for (part, block) in bytes.chunks_exact(512).zip(block..) {
                        assert!(part.iter().all(|byte| *byte == (block % 251) as u8 + 1));
                        seen += 1;
                    }
                    Ok(())
                })
                .unwrap();
            assert_eq!((seen, faults.remaining()), (last, 0), "command {command}");
            assert_eq!(session.controller.generation(), 1, "command {command}");
            drop(mover);
            session.close().unwrap();
        }
    }

    #[test]
    fn a_run_is_durable_despite_a_power_loss_in_its_middle() {
        let nvme = Nvme::new(vec![Storage::memory(4 << 20, 512).unwrap()]);
        let power = nvme.power();
        let session = Session::with(nvme);
        let mut mover = Mover::new(&session).unwrap();
        // The run does not begin or end at a chunk.
        let (first, last) = (3, 4099);
        let content = |block: u64| (block % 251) as u8;
        let mut chunks = 0;
        mover
            .write(first..last, |block, bytes| {
                chunks += 1;
                if chunks == 10 {
                    power.cycle();
                }
                let parts = bytes.chunks_exact_mut(512).zip(block..);
                parts.for_each(|(part, block)| part.fill(content(block)));
                Ok(())
            })
            .unwrap();
        power.cycle();
        let mut seen = vec![false; last as usize];
        mover
            .read(first..last, |block, bytes| {
                for (part, block) in bytes.chunks_exact(512).zip(block..) {
                    assert!(part.iter().all(|byte| *byte == content(block)), "block {block}");
                    seen[block as usize] = true;
                }
                Ok(())
            })
            .unwrap();
        assert!(seen[first as usize..].iter().all(|seen| *seen));
        drop(mover);
        session.close().unwrap();
    }
}
