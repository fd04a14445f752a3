//! I/O commands for a namespace (NVMe Base 1.4 §6).

use vfio_remap::device::DmaBuffer;
use vfio_remap::{Error, ErrorKind};

use super::command::{Command, io};
use super::identify::Namespace;
use super::pair::SubmitError;
use super::queue::IoQueue;

type Submitted = std::result::Result<(), SubmitError>;

/// Attributes of the Dataset Management command: the ranges are deallocated.
const DEALLOCATE: u32 = 1 << 2;
/// The size of a range for that command, in bytes.
const RANGE: usize = 16;
/// Most blocks of a command that has no data.
const MOST_BLOCKS: u64 = 1 << 16;

impl IoQueue {
    /// Reads blocks into the buffer, as many as fit, starting with `block`.
    ///
    /// # Errors
    /// `Unaligned` if the buffer is not a whole number of blocks or does not begin at a multiple of four bytes;
    /// `OutOfRange` if the blocks leave the namespace or exceed the largest transfer; `Unsupported` if the buffer is
    /// in an address space that the controller does not reach ([`DmaBuffer::address_space`]); `InUse` if the queue
    /// is full; the error that made the queue fail. The error returns the buffer.
    #[inline(always)]
    pub fn read(&mut self, of: &Namespace, block: u64, buffer: DmaBuffer, tag: u64) -> Submitted {
        self.transfer(io::READ, of, block, buffer, tag)
    }

    /// Writes the whole buffer to the blocks that start with `block`. A completed write may not be durable: see
    /// [`flush`](Self::flush).
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[inline(always)]
    pub fn write(&mut self, to: &Namespace, block: u64, buffer: DmaBuffer, tag: u64) -> Submitted {
        self.transfer(io::WRITE, to, block, buffer, tag)
    }

    /// Submits a read or write. This and [`pop`](Self::pop) are always inlined, because a call would double their
    /// cost: it saves registers, and passes buffers and results through memory. What is rare is out of line.
    #[inline(always)]
    fn transfer(
        &mut self,
        opcode: u8,
        namespace: &Namespace,
        block: u64,
        buffer: DmaBuffer,
        tag: u64,
    ) -> Submitted {
        let (iova, size) = (buffer.iova().0, buffer.size());
        // One less than the bytes and than the blocks, if the size is right.
        let last_byte = size.wrapping_sub(1);
        let more = (last_byte >> namespace.block_shift()) as u64;
        let is_usual = last_byte < self.max_transfer
            && size & (namespace.block_size() - 1) == 0
            && namespace.block_count().checked_sub(block).is_some_and(|left| more < left)
            && buffer.address_space() == self.space
            && self.pair.is_ready(iova, size);
        if !is_usual {
            return self.transfer_checked(opcode, namespace, block, buffer, tag);
        }
        let command = Command::new(opcode, namespace.id()).blocks(block, more);
        self.pair.put_next(command, buffer, tag);
        Ok(())
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// `InUse` if the queue is full; the error that made the queue fail.
    pub fn flush(&mut self, namespace: &Namespace, tag: u64) -> Submitted {
        self.submit(Command::new(io::FLUSH, namespace.id()), None, tag)
    }

    /// Makes blocks read as zeros, without a transfer.
    ///
    /// # Errors
    /// `Unsupported` if the controller does not offer it; `OutOfRange` if the blocks leave the namespace, or
    /// are none or more than 65536; as [`flush`](Self::flush).
    pub fn write_zeroes(&mut self, of: &Namespace, block: u64, count: u64, tag: u64) -> Submitted {
        if !self.controller.identity().has_write_zeroes {
            return Err(unsupported("write zeroes to", of, None));
        }
        if !within(of, block, count) || count > MOST_BLOCKS {
            return Err(SubmitError {
                error: outside("write zeroes to", of, block, count),
                buffer: None,
            });
        }
        self.submit(Command::new(io::WRITE_ZEROES, of.id()).blocks(block, count - 1), None, tag)
    }

    /// Tells the controller that the data of blocks is not needed any more. They then read as zeros, ones, or
    /// the old data. `scratch` is memory for the command, at least 16 bytes.
    ///
    /// # Errors
    /// As [`write_zeroes`](Self::write_zeroes), but for up to 2^32 - 1 blocks; `OutOfRange` if `scratch` is too
    /// small; `Unsupported` if it is in an address space that the controller does not reach.
    pub fn deallocate(
        &mut self,
        of: &Namespace,
        block: u64,
        count: u64,
        scratch: DmaBuffer,
        tag: u64,
    ) -> Submitted {
        if !self.controller.identity().has_deallocate {
            return Err(unsupported("deallocate blocks of", of, Some(scratch)));
        }
        if scratch.address_space() != self.space {
            let error = self.foreign("deallocate blocks of", format!("namespace {}", of.id()));
            return Err(SubmitError { error, buffer: Some(scratch) });
        }
        let fits = scratch.size() >= RANGE && scratch.iova().0 & 3 == 0;
        let (true, true, Ok(len)) = (fits, within(of, block, count), u32::try_from(count)) else {
            let error = outside("deallocate blocks of", of, block, count);
            return Err(SubmitError { error, buffer: Some(scratch) });
        };
        // Attributes of the range, its length, its first block.
        for (at, word) in [0, len, block as u32, (block >> 32) as u32].into_iter().enumerate() {
            scratch.write(4 * at, &word.to_le_bytes());
        }
        // One range; the count is zero-based.
        let command = Command::new(io::DATASET_MANAGEMENT, of.id()).dwords_10(0, DEALLOCATE);
        self.submit(command, Some(scratch), tag)
    }

    fn submit(&mut self, command: Command, buffer: Option<DmaBuffer>, tag: u64) -> Submitted {
        self.recreate_if_failed();
        self.pair.submit(command, buffer, tag).map_err(|refused| match &self.failed {
            Some(error) => SubmitError { error: error.clone(), ..refused },
            None => refused,
        })
    }

    /// Creates a failed queue again if the controller could be reset, and a broken queue in any case. Its
    /// outstanding commands end then.
    fn recreate_if_failed(&mut self) {
        if self.failed.is_some() || self.pair.is_broken() {
            self.check();
        }
    }

    /// As [`transfer`](Self::transfer), in all cases: it creates a failed queue again, and makes the error of a
    /// transfer that is not possible.
    #[inline(never)]
    fn transfer_checked(
        &mut self,
        opcode: u8,
        namespace: &Namespace,
        block: u64,
        buffer: DmaBuffer,
        tag: u64,
    ) -> Submitted {
        self.recreate_if_failed();
        let (size, block_size) = (buffer.size(), namespace.block_size());
        let count = (size / block_size) as u64;
        let fits = within(namespace, block, count) && size <= self.max_transfer;
        let aligned = size.is_multiple_of(block_size) && buffer.iova().0 & 3 == 0;
        let is_ours = buffer.address_space() == self.space;
        if fits && aligned && is_ours && self.pair.has_room() {
            let command = Command::new(opcode, namespace.id()).blocks(block, count - 1);
            self.pair.put(command, Some(buffer), tag);
            return Ok(());
        }
        let error = self.refusal(opcode, namespace, block, &buffer);
        Err(SubmitError { error, buffer: Some(buffer) })
    }

    /// Why a transfer is not possible.
    #[cold]
    fn refusal(&self, opcode: u8, namespace: &Namespace, block: u64, buffer: &DmaBuffer) -> Error {
        let operation = if opcode == io::READ { "read" } else { "write" };
        let (size, block_size) = (buffer.size(), namespace.block_size());
        let object = || format!("{size} bytes at block {block} of namespace {}", namespace.id());
        let error =
            |kind, reason: String| Error::new(kind, operation, object()).with_reason(reason);
        let count = (size / block_size) as u64;
        if !size.is_multiple_of(block_size) {
            error(ErrorKind::Unaligned, format!("a block has {block_size} bytes"))
        } else if size > self.max_transfer {
            let most = self.max_transfer;
            error(ErrorKind::OutOfRange, format!("a command transfers at most {most} bytes"))
        } else if !within(namespace, block, count) {
            outside(operation, namespace, block, count)
        } else if buffer.iova().0 & 3 != 0 {
            error(ErrorKind::Unaligned, "its address is not a multiple of four".to_owned())
        } else if buffer.address_space() != self.space {
            self.foreign(operation, object())
        } else {
            match &self.failed {
                Some(error) => error.clone(),
                None => error(ErrorKind::InUse, "the queue is full".to_owned())
                    .with_advice("take completions first"),
            }
        }
    }

    /// The error for a buffer that the controller does not reach.
    #[cold]
    fn foreign(&self, operation: &'static str, object: String) -> Error {
        let name = self.controller.name();
        Error::new(ErrorKind::Unsupported, operation, object)
            .with_reason(format!("the buffer is in an address space that {name} does not reach"))
            .with_advice(
                "use a buffer of this controller (Controller::buffer), or open the devices in one address space \
                 (Device::open_beside, Emulated::beside)",
            )
    }
}

fn within(namespace: &Namespace, block: u64, count: u64) -> bool {
    count > 0 && block.checked_add(count).is_some_and(|end| end <= namespace.block_count())
}

fn outside(operation: &'static str, namespace: &Namespace, block: u64, count: u64) -> Error {
    let object = format!("{count} blocks from {block} of namespace {}", namespace.id());
    Error::new(ErrorKind::OutOfRange, operation, object)
        .with_reason(format!("it has {} blocks", namespace.block_count()))
}

fn unsupported(
    operation: &'static str,
    namespace: &Namespace,
    buffer: Option<DmaBuffer>,
) -> SubmitError {
    let error =
        Error::new(ErrorKind::Unsupported, operation, format!("namespace {}", namespace.id()))
            .with_reason("the controller does not offer it (ONCS)");
    SubmitError { error, buffer }
}
