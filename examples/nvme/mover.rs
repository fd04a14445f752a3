//! Moves long runs of blocks, several requests at a time, whatever the controller goes through meanwhile.

use std::ops::Range;

use vfio_remap::device::DmaBuffer;
use vfio_remap::{Error, ErrorKind, Result};

use crate::session::Session;
use vfio_remap_nvme::{Completion, IoQueue, Namespace};

/// Requests that are with the controller at a time, and their size unless it takes less.
const DEPTH: usize = 16;
const CHUNK: usize = 128 << 10;
/// How often in a row all that is with the controller may come to nothing before that is given up.
const RETRIES: usize = 16;

/// A queue, and memory for the requests in it.
pub struct Mover {
    queue: IoQueue,
    namespace: Namespace,
    /// Of a whole chunk each.
    buffers: Vec<DmaBuffer>,
    chunk_blocks: u64,
    /// What goes to or comes from whoever uses it.
    bytes: Vec<u8>,
    /// Requests in a row that came to nothing.
    undecided: usize,
}

/// What is done with each chunk: what was read is taken, or what is to be written filled in.
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
            chunk_blocks: (chunk >> namespace.block_shift) as u64,
            bytes: vec![0; chunk],
            undecided: 0,
        })
    }

    /// Reads blocks, and gives each chunk with the number of its first block, in any order.
    pub fn read(
        &mut self,
        blocks: Range<u64>,
        mut take: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.run(blocks, &mut Work::Read(&mut take))
    }

    /// Writes blocks, and has them last: `fill` gives what each chunk holds, whose first block has this
    /// number. A chunk may be asked for again: what a controller that was reset has not flushed may be
    /// lost.
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
        Err(self.given_up())
    }

    /// Goes through blocks, as many at a time as there are buffers.
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
                self.go_on()?;
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

    /// Has the controller work on a buffer, which is a run of blocks from `block` on.
    fn submit(&mut self, work: &Work<'_>, block: u64, buffer: DmaBuffer) -> Result<()> {
        match work {
            Work::Read(_) => self.queue.read(&self.namespace, block, buffer, block)?,
            Work::Write(_) => self.queue.write(&self.namespace, block, buffer, block)?,
        }
        Ok(())
    }

    /// `false` where a reset has ended it.
    fn flush(&mut self) -> Result<bool> {
        self.queue.flush(&self.namespace, 0)?;
        let Some(Completion { status, .. }) = self.queue.wait() else { return Ok(false) };
        if status.is_undecided() {
            return Ok(false);
        }
        status.check("flush", || format!("namespace {}", self.namespace.id))?;
        Ok(true)
    }

    /// The next part of a run, as large as a chunk where there is as much, and a buffer for it. `None`
    /// where there is no more, or what is outstanding must come back first.
    fn next(&mut self, next: &mut u64, end: u64) -> Result<Option<(u64, DmaBuffer)>> {
        let blocks = (end - *next).min(self.chunk_blocks);
        if blocks == 0 || self.queue.room() == 0 {
            return Ok(None);
        }
        let buffer = if blocks == self.chunk_blocks {
            self.buffers.pop()
        } else {
            Some(buffer(&self.queue, (blocks as usize) << self.namespace.block_shift)?)
        };
        let Some(buffer) = buffer else { return Ok(None) };
        let part = *next;
        *next += blocks;
        Ok(Some((part, buffer)))
    }

    /// After a success.
    fn give_back(&mut self, buffer: DmaBuffer) {
        self.undecided = 0;
        if buffer.size() == self.bytes.len() {
            self.buffers.push(buffer);
        }
    }

    /// Nothing is outstanding, and there is more to be done: the queue was made anew, or has failed.
    fn go_on(&mut self) -> Result<()> {
        if self.queue.room() == 0 { Err(self.lost()) } else { self.retry() }
    }

    fn retry(&mut self) -> Result<()> {
        self.undecided += 1;
        if self.undecided > RETRIES * DEPTH { Err(self.given_up()) } else { Ok(()) }
    }

    fn given_up(&self) -> Error {
        Error::new(ErrorKind::Os, "use", self.queue.controller().name())
            .because(format!("it came to nothing, {RETRIES} times in a row"))
    }

    fn lost(&self) -> Error {
        Error::new(ErrorKind::Gone, "use", self.queue.controller().name())
            .because("it has failed, and cannot be brought up again")
    }

    fn place(&self, block: u64) -> String {
        format!("block {block} of namespace {}", self.namespace.id)
    }
}

/// Memory of `size` bytes, to the byte.
fn buffer(queue: &IoQueue, size: usize) -> Result<DmaBuffer> {
    let buffer = queue.controller().buffer(size)?;
    Ok(buffer.split_at(size).map_or_else(|whole| whole.into_buffer(), |(part, _)| part))
}

#[cfg(test)]
mod tests {
    use vfio_remap::emulated::Namespace as Storage;
    use vfio_remap::emulated::{Fault, Faults, Nvme};

    use super::*;

    #[test]
    fn no_block_is_skipped_though_a_completion_comes_that_nobody_waits_for() {
        // Writes begin after the eleven commands that bring controller and queue up; reads follow.
        for struck in (11..40).step_by(4) {
            let faults = Faults::new([(struck, Fault::SpuriousCompletion)]);
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
            assert_eq!((seen, faults.remaining()), (last, 0), "command {struck}");
            assert_eq!(session.controller.generation(), 1, "command {struck}");
            drop(mover);
            session.close().unwrap();
        }
    }

    #[test]
    fn a_run_lasts_though_power_is_lost_in_the_middle_of_it() {
        let nvme = Nvme::new(vec![Storage::memory(4 << 20, 512).unwrap()]);
        let power = nvme.power();
        let session = Session::with(nvme);
        let mut mover = Mover::new(&session).unwrap();
        // Not whole chunks, at either end.
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
