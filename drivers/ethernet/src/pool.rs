//! Buffers for frames, and frames.

use std::fmt;

use vfio_remap::device::{BufferRequest, DmaBuffer, DmaSpace, IovaPlacement};
use vfio_remap::{Error, ErrorKind, Result};

use super::descriptors::{Checksums, Received};
use super::offload::Request;

/// Buffers of one size, for one thread: what a [`Receiver`](super::Receiver) fills its ring from, and where
/// a [`Transmitter`](super::Transmitter) puts them when they are sent.
///
/// They are parts of one piece of DMA memory. Taking and putting back moves a buffer, and neither
/// allocates nor copies, unless the pool is given more buffers than it was made with. A buffer may come
/// back to another pool than it was taken from: that of the thread that sends.
pub struct Pool {
    buffers: Vec<DmaBuffer>,
    size: usize,
}

impl Pool {
    /// `count` buffers of `size` bytes.
    pub(crate) fn new(space: &DmaSpace, count: usize, size: usize) -> Result<Self> {
        let refused = || {
            Error::new(
                ErrorKind::OutOfRange,
                "allocate",
                format!("{count} buffers of {size:#x} bytes"),
            )
            .with_reason("a pool has one buffer at least, and fits into memory")
            .with_advice("ask for another number")
        };
        let all = count.checked_mul(size).filter(|all| *all > 0).ok_or_else(refused)?;
        let placement = IovaPlacement::default().aligned(4096);
        let memory = space.buffer_with(BufferRequest::new(all).placement(placement))?;
        let mut buffers = Vec::with_capacity(count);
        // The last page has a rest that is no buffer.
        buffers.extend(memory.slice(..all)?.chunks(size));
        // The first is taken first.
        buffers.reverse();
        Ok(Self { buffers, size })
    }

    /// How many bytes a buffer has, at least.
    #[inline]
    pub fn buffer_size(&self) -> usize {
        self.size
    }

    /// How many buffers are here now.
    #[inline]
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Whether all buffers are elsewhere.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// Takes a buffer, if there is one.
    #[inline]
    pub fn take(&mut self) -> Option<DmaBuffer> {
        self.buffers.pop()
    }

    /// Puts a buffer back.
    ///
    /// # Errors
    /// The buffer, if it is smaller than those of this pool.
    #[inline]
    pub fn put(&mut self, buffer: DmaBuffer) -> std::result::Result<(), DmaBuffer> {
        if buffer.size() < self.size {
            return Err(buffer);
        }
        self.buffers.push(buffer);
        Ok(())
    }

    /// A frame of `len` bytes, which hold anything; `None` if there is no buffer, or none as large.
    #[inline]
    pub fn frame(&mut self, len: usize) -> Option<Frame> {
        if len > self.size {
            return None;
        }
        Some(Frame::whole(self.take()?, len))
    }

    /// A frame with these bytes, which are copied; `None` as of [`frame`](Self::frame).
    pub fn frame_of(&mut self, bytes: &[u8]) -> Option<Frame> {
        let frame = self.frame(bytes.len())?;
        frame.buffer.write(0, bytes);
        Some(frame)
    }

    /// Takes back what is no longer in use; what is too small for the pool goes.
    #[inline]
    pub(crate) fn reclaim(&mut self, buffer: DmaBuffer) {
        drop(self.put(buffer));
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} buffers of {:#x} bytes are here)", self.buffers.len(), self.size)
    }
}

/// A frame: the beginning of a buffer, without the checksum of Ethernet, which the card appends and removes.
#[derive(Debug)]
#[must_use]
pub struct Frame {
    pub(crate) buffer: DmaBuffer,
    pub(crate) len: usize,
    pub(crate) received: Received,
    /// The first word of the descriptor: kinds, and the hash.
    pub(crate) hash: u64,
    pub(crate) request: Request,
    /// How many bytes all of its packet has, once the packet is about to be sent.
    pub(crate) packet: u32,
}

impl Frame {
    fn whole(buffer: DmaBuffer, len: usize) -> Self {
        let request = Request::default();
        Self { buffer, len, received: Received(0), hash: 0, request, packet: 0 }
    }

    /// A frame of `len` bytes of a buffer.
    ///
    /// # Errors
    /// The buffer, if it is shorter.
    pub fn new(buffer: DmaBuffer, len: usize) -> std::result::Result<Self, DmaBuffer> {
        if len > buffer.size() {
            return Err(buffer);
        }
        Ok(Self::whole(buffer, len))
    }

    /// How many bytes it has.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a frame has a header at least")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Makes it shorter or longer; `false` if its buffer has no room for that, and nothing changes.
    #[must_use]
    #[inline]
    pub fn set_len(&mut self, len: usize) -> bool {
        let fits = len <= self.buffer.size();
        if fits {
            self.len = len;
        }
        fits
    }

    /// The buffer, of which the frame is the beginning.
    #[inline]
    pub fn buffer(&self) -> &DmaBuffer {
        &self.buffer
    }

    /// The buffer, for a [`Pool`].
    #[inline]
    pub fn into_buffer(self) -> DmaBuffer {
        self.buffer
    }

    /// What the card says of the checksums of a frame that was received.
    pub fn checksums(&self) -> Checksums {
        self.received.checksums()
    }

    /// The hash by which a frame that was received was told to its queue (82576 datasheet §7.1.1.7, 82574
    /// datasheet §7.1.11); `None` if there was none, as of what is not IP.
    #[inline]
    pub fn hash(&self) -> Option<u32> {
        (self.hash & 0xf != 0).then_some((self.hash >> 32) as u32)
    }

    /// Copies bytes out, from `offset` on; how many there were.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let len = self.len.saturating_sub(offset).min(bytes.len());
        if len > 0 {
            self.buffer.read(offset, &mut bytes[..len]);
        }
        len
    }

    /// All of its bytes, copied.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }
}
