//! Requests: what can be asked of a namespace (NVMe Base 1.4 §6).

use vfio_remap::device::DmaBuffer;
use vfio_remap::{Error, ErrorKind};

use super::command::{Command, io};
use super::identify::Namespace;
use super::pair::Refused;
use super::queue::IoQueue;

type Submitted = std::result::Result<(), Refused>;

/// Attributes of the Dataset Management command: the ranges are deallocated.
const DEALLOCATE: u32 = 1 << 2;
/// Bytes of a range for that command.
const RANGE: usize = 16;
/// Most blocks of a command that has no data.
const MOST_BLOCKS: u64 = 1 << 16;

impl IoQueue {
    /// Reads blocks from `block` on, as many as the buffer has room for.
    ///
    /// # Errors
    /// `Unaligned` where that is no whole number of blocks, or the buffer does not begin at a multiple of
    /// four bytes; `OutOfRange` where they leave the namespace, or are more than one command transfers;
    /// `InUse` where the queue is full; why the queue does not work any more. The buffer comes back.
    #[inline]
    pub fn read(&mut self, of: &Namespace, block: u64, buffer: DmaBuffer, tag: u64) -> Submitted {
        self.transfer(io::READ, of, block, buffer, tag)
    }

    /// Writes all of the buffer to the blocks from `block` on. Done does not mean that it lasts: see
    /// [`flush`](Self::flush).
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[inline]
    pub fn write(&mut self, to: &Namespace, block: u64, buffer: DmaBuffer, tag: u64) -> Submitted {
        self.transfer(io::WRITE, to, block, buffer, tag)
    }

    #[inline]
    fn transfer(
        &mut self,
        opcode: u8,
        namespace: &Namespace,
        block: u64,
        buffer: DmaBuffer,
        tag: u64,
    ) -> Submitted {
        let size = buffer.size();
        let count = (size >> namespace.block_shift) as u64;
        let fits = size & (namespace.block_size() - 1) == 0
            && size.wrapping_sub(1) < self.max_transfer
            && buffer.iova().0 & 3 == 0
            && count <= namespace.blocks
            && block <= namespace.blocks - count
            && self.pair.room() > 0;
        if !fits {
            return self.refuse(opcode, namespace, block, buffer, tag);
        }
        let command = Command::new(opcode, namespace.id).blocks(block, count);
        self.pair.put(command, Some(buffer), tag);
        Ok(())
    }

    /// Makes all that was written, and done, before last.
    ///
    /// # Errors
    /// `InUse` where the queue is full; why it does not work any more.
    pub fn flush(&mut self, namespace: &Namespace, tag: u64) -> Submitted {
        self.submit(Command::new(io::FLUSH, namespace.id), None, tag)
    }

    /// Makes blocks read zeros, without a transfer.
    ///
    /// # Errors
    /// `Unsupported` where the controller does not offer it; `OutOfRange` for blocks that leave the
    /// namespace, none, or more than 65536; as [`flush`](Self::flush).
    pub fn write_zeroes(&mut self, of: &Namespace, block: u64, count: u64, tag: u64) -> Submitted {
        if !self.controller.identity().has_write_zeroes {
            return Err(unsupported("write zeroes to", of, None));
        }
        if !within(of, block, count) || count > MOST_BLOCKS {
            return Err(Refused {
                error: outside("write zeroes to", of, block, count),
                buffer: None,
            });
        }
        self.submit(Command::new(io::WRITE_ZEROES, of.id).blocks(block, count), None, tag)
    }

    /// Tells the controller that blocks hold nothing of worth any more. What they then read is zeros, ones,
    /// or what was there. `scrap` is 16 bytes at least for the command to point to.
    ///
    /// # Errors
    /// As [`write_zeroes`](Self::write_zeroes), of up to 2^32 - 1 blocks; `OutOfRange` for a scrap that is
    /// too small.
    pub fn deallocate(
        &mut self,
        of: &Namespace,
        block: u64,
        count: u64,
        scrap: DmaBuffer,
        tag: u64,
    ) -> Submitted {
        if !self.controller.identity().has_deallocate {
            return Err(unsupported("deallocate blocks of", of, Some(scrap)));
        }
        let fits = scrap.size() >= RANGE && scrap.iova().0 & 3 == 0;
        let (true, true, Ok(len)) = (fits, within(of, block, count), u32::try_from(count)) else {
            let error = outside("deallocate blocks of", of, block, count);
            return Err(Refused { error, buffer: Some(scrap) });
        };
        // Attributes of the range, its length, its first block.
        for (at, word) in [0, len, block as u32, (block >> 32) as u32].into_iter().enumerate() {
            scrap.write(4 * at, &word.to_le_bytes());
        }
        // One range, counted from zero.
        let command = Command::new(io::DATASET_MANAGEMENT, of.id).dwords_10(0, DEALLOCATE);
        self.submit(command, Some(scrap), tag)
    }

    fn submit(&mut self, command: Command, buffer: Option<DmaBuffer>, tag: u64) -> Submitted {
        self.revive();
        self.pair.submit(command, buffer, tag).map_err(|refused| match &self.failed {
            Some(error) => Refused { error: error.clone(), ..refused },
            None => refused,
        })
    }

    /// A queue that failed is created again if the controller could be reset; one that is
    /// broken in any case: what it still takes to be outstanding ends then.
    fn revive(&mut self) {
        if self.failed.is_some() || self.pair.is_broken() {
            self.look();
        }
    }

    /// Says what is wrong with a transfer, or makes it after all where the queue has come back to life.
    #[cold]
    #[inline(never)]
    fn refuse(
        &mut self,
        opcode: u8,
        namespace: &Namespace,
        block: u64,
        buffer: DmaBuffer,
        tag: u64,
    ) -> Submitted {
        self.revive();
        let operation = if opcode == io::READ { "read" } else { "write" };
        let (size, block_size) = (buffer.size(), namespace.block_size());
        let object = || format!("{size} bytes at block {block} of namespace {}", namespace.id);
        let error = |kind, reason: String| Error::new(kind, operation, object()).because(reason);
        let count = (size / block_size) as u64;
        let fits = within(namespace, block, count) && size <= self.max_transfer;
        let aligned = size.is_multiple_of(block_size) && buffer.iova().0 & 3 == 0;
        if fits && aligned && self.pair.room() > 0 {
            return self.transfer(opcode, namespace, block, buffer, tag);
        }
        let error = if !size.is_multiple_of(block_size) {
            error(ErrorKind::Unaligned, format!("a block has {block_size} bytes"))
        } else if size > self.max_transfer {
            let most = self.max_transfer;
            error(ErrorKind::OutOfRange, format!("a command transfers {most} bytes at most"))
        } else if !within(namespace, block, count) {
            outside(operation, namespace, block, count)
        } else if buffer.iova().0 & 3 != 0 {
            error(ErrorKind::Unaligned, "data begin at a multiple of four bytes".to_owned())
        } else {
            match &self.failed {
                Some(error) => error.clone(),
                None => error(ErrorKind::InUse, "the queue is full".to_owned())
                    .remedy("take completions first"),
            }
        };
        Err(Refused { error, buffer: Some(buffer) })
    }
}

fn within(namespace: &Namespace, block: u64, count: u64) -> bool {
    count > 0 && block.checked_add(count).is_some_and(|end| end <= namespace.blocks)
}

fn outside(operation: &'static str, namespace: &Namespace, block: u64, count: u64) -> Error {
    let Namespace { id, blocks, .. } = namespace;
    let object = format!("{count} blocks from {block} of namespace {id}");
    Error::new(ErrorKind::OutOfRange, operation, object).because(format!("it has {blocks} blocks"))
}

fn unsupported(
    operation: &'static str,
    namespace: &Namespace,
    buffer: Option<DmaBuffer>,
) -> Refused {
    let error =
        Error::new(ErrorKind::Unsupported, operation, format!("namespace {}", namespace.id))
            .because("the controller does not offer it (ONCS)");
    Refused { error, buffer }
}
