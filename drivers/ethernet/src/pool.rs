//! Buffers for frames, and frames.

use std::fmt;

use vfio_remap::device::{BufferRequest, DmaBuffer, DmaSpace, Iova, IovaPlacement};
use vfio_remap::transport::AddressSpaceId;
use vfio_remap::{Error, ErrorKind, Result};

use super::descriptors::{Checksums, Received};
use super::nic::Nic;
use super::offload::Request;

/// Buffers of one size, for one thread: what a [`Receiver`](super::Receiver) fills its ring from, and where
/// a [`Transmitter`](super::Transmitter) puts them when they are sent.
///
/// They are parts of one piece of DMA memory. Taking and putting back moves a buffer, and neither
/// allocates nor copies, unless the pool is given more buffers than it was made with. A buffer may come
/// back to another pool than it was taken from: that of the thread that sends.
///
/// All buffers of a pool are in one address space for DMA. Cards that share it use each other's pools and
/// frames: what one has received, the other sends, without a copy. Open the second card
/// [beside](vfio_remap::Device::open_beside) the first for that. A card in another address space does not reach
/// the buffers, and its queues refuse them.
pub struct Pool {
    space: AddressSpaceId,
    frames: Vec<Frame>,
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
        // The last page has a rest that is no buffer.
        let buffers = memory.slice(..all)?.chunks(size);
        let mut frames = Vec::with_capacity(count);
        frames.extend(buffers.map(|buffer| Frame::whole(buffer, 0)));
        // The first is taken first.
        frames.reverse();
        Ok(Self { space: space.address_space(), frames, size })
    }

    /// The address space that its buffers are mapped in.
    #[inline]
    pub fn address_space(&self) -> AddressSpaceId {
        self.space
    }

    /// How many bytes a buffer has, at least.
    #[inline]
    pub fn buffer_size(&self) -> usize {
        self.size
    }

    /// How many buffers are here now.
    #[inline]
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether all buffers are elsewhere.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Puts a frame's buffer back.
    ///
    /// # Errors
    /// The frame, if its buffer is smaller than those of this pool, or in another address space.
    #[inline]
    pub fn put(&mut self, frame: Frame) -> std::result::Result<(), Frame> {
        if frame.0.buffer.size() < self.size || frame.0.space != self.space {
            return Err(frame);
        }
        self.frames.push(frame);
        Ok(())
    }

    /// A frame of `len` bytes, which hold anything; `None` if there is no buffer, or none as large.
    #[inline]
    pub fn frame(&mut self, len: usize) -> Option<Frame> {
        if len > self.size {
            return None;
        }
        let mut frame = self.take()?;
        let Inner { len: length, received, hash, request, .. } = &mut *frame.0;
        (*length, *received, *hash, *request) = (len as u32, Received(0), 0, Request::default());
        Some(frame)
    }

    /// Takes as many buffers as there are, `count` at most, as frames that are what they were last.
    #[inline]
    pub(crate) fn take_some(&mut self, count: usize) -> impl Iterator<Item = Frame> {
        let left = self.frames.len().saturating_sub(count);
        self.frames.drain(left..)
    }

    fn take(&mut self) -> Option<Frame> {
        self.frames.pop()
    }

    /// A frame with these bytes, which are copied; `None` as of [`frame`](Self::frame).
    pub fn frame_of(&mut self, bytes: &[u8]) -> Option<Frame> {
        let frame = self.frame(bytes.len())?;
        frame.buffer().write(0, bytes);
        Some(frame)
    }

    /// Takes back what is no longer in use, of a card in the pool's address space; what is too small for the pool
    /// is released.
    #[inline]
    pub(crate) fn reclaim(&mut self, frame: Frame) {
        debug_assert_eq!(frame.0.space, self.space);
        if frame.0.buffer.size() < self.size {
            return release(frame);
        }
        self.frames.push(frame);
    }

    /// Takes back what a queue had; what is not for the pool is released.
    pub(crate) fn take_back(&mut self, frames: Vec<Frame>) {
        for frame in frames {
            if let Err(frame) = self.put(frame) {
                release(frame);
            }
        }
    }
}

/// The error for a pool or a packet that a card does not reach.
#[cold]
pub fn foreign(operation: &'static str, what: &str, nic: &Nic) -> Error {
    let name = nic.name();
    Error::new(ErrorKind::Unsupported, operation, format!("{what} by {name}"))
        .with_reason(format!("a buffer, or the pool, is in an address space that {name} does not reach"))
        .with_advice(
            "open the cards in one address space (Device::open_beside, Emulated::beside), or copy the frame: \
             Pool::frame_of",
        )
}

#[cold]
#[inline(never)]
fn release(frame: Frame) {
    drop(frame);
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} buffers of {:#x} bytes are here)", self.frames.len(), self.size)
    }
}

/// A frame: the beginning of a buffer, without the checksum of Ethernet, which the card appends and removes.
///
/// It moves as one pointer.
#[derive(Debug)]
#[must_use]
pub struct Frame(pub(crate) Box<Inner>);

#[derive(Debug)]
pub struct Inner {
    /// The buffer's.
    pub iova: Iova,
    /// The buffer's.
    pub space: AddressSpaceId,
    pub len: u32,
    /// How many bytes all of its packet has, once the packet is about to be sent.
    pub packet: u32,
    pub received: Received,
    /// The first word of the descriptor: kinds, and the hash.
    pub hash: u64,
    pub request: Request,
    pub buffer: DmaBuffer,
}

impl Frame {
    /// The buffer has room for `len` bytes.
    fn whole(buffer: DmaBuffer, len: usize) -> Self {
        Self(Box::new(Inner {
            iova: buffer.iova(),
            space: buffer.address_space(),
            len: len as u32,
            packet: 0,
            received: Received(0),
            hash: 0,
            request: Request::default(),
            buffer,
        }))
    }

    /// A frame of `len` bytes of a buffer that is no pool's. It is allocated.
    ///
    /// # Errors
    /// The buffer, if it is shorter.
    pub fn new(buffer: DmaBuffer, len: usize) -> std::result::Result<Self, DmaBuffer> {
        if len > buffer.size() || len > u32::MAX as usize {
            return Err(buffer);
        }
        Ok(Self::whole(buffer, len))
    }

    /// How many bytes it has.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a frame has a header at least")]
    pub fn len(&self) -> usize {
        self.0.len as usize
    }

    /// Makes it shorter or longer; `false` if its buffer has no room for that, and nothing changes.
    #[must_use]
    #[inline]
    pub fn set_len(&mut self, len: usize) -> bool {
        let fits = len <= self.0.buffer.size() && len <= u32::MAX as usize;
        if fits {
            self.0.len = len as u32;
        }
        fits
    }

    /// The buffer, of which the frame is the beginning.
    #[inline]
    pub fn buffer(&self) -> &DmaBuffer {
        &self.0.buffer
    }

    /// The buffer, without what is known of the frame.
    #[inline]
    pub fn into_buffer(self) -> DmaBuffer {
        self.0.buffer
    }

    /// What the card says of the checksums of a frame that was received.
    pub fn checksums(&self) -> Checksums {
        self.0.received.checksums()
    }

    /// The hash by which a frame that was received was told to its queue (82576 datasheet §7.1.1.7, 82574
    /// datasheet §7.1); `None` if there was none, as of what is not IP.
    #[inline]
    pub fn hash(&self) -> Option<u32> {
        (self.0.hash & 0xf != 0).then_some((self.0.hash >> 32) as u32)
    }

    /// Copies bytes out, from `offset` on; how many there were.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let len = self.len().saturating_sub(offset).min(bytes.len());
        if len > 0 {
            self.0.buffer.read(offset, &mut bytes[..len]);
        }
        len
    }

    /// All of its bytes, copied.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.read(0, &mut bytes);
        bytes
    }
}
