//! The layout of a register block: its size, and the offsets of registers, arrays and inner blocks.
//!
//! An offset is checked once, at its declaration, and is private afterwards. So a value of [`RegisterAt`] is
//! the proof that its bytes lie in a block of its layout.

use std::fmt;
use std::marker::PhantomData;

use super::register::{Mode, ReadWrite, Width};

/// Type parameters without a value of them, invariant. If one layout is a subtype of another, as function
/// pointers of different lifetimes are, an offset in one must not become an offset in the other.
pub(super) type Invariant<T> = PhantomData<fn(T) -> T>;

/// The layout of a block of registers: implemented by [`register_block!`](crate::register_block) for the
/// type that it declares.
///
/// Implementing it is safe: an offset that does not fit the layout does not compile, and a block is checked
/// against its window when it is made.
pub trait BlockLayout: 'static {
    /// The name of the block in errors.
    const NAME: &'static str;
    /// The size in bytes.
    const SIZE: usize;
    /// The alignment of the first byte's address: the width of the widest register, in bytes.
    const ALIGN: usize;
}

/// The offset of a register in a block of layout `L`. The register has the width of `R`; its value is a `T`.
///
/// [`register_block!`](crate::register_block) declares them.
pub struct RegisterAt<L, R, T = R, M = ReadWrite> {
    offset: usize,
    _what: Invariant<(L, R, T, M)>,
}

/// The offsets of `count` registers in a block of layout `L`, `stride` bytes apart.
pub struct RegisterArrayAt<L, R, T = R, M = ReadWrite> {
    first: RegisterAt<L, R, T, M>,
    stride: usize,
    count: usize,
}

/// The offset of a block of layout `B` in a block of layout `L`.
pub struct BlockAt<L, B> {
    offset: usize,
    _what: Invariant<(L, B)>,
}

/// The offsets of `count` blocks of layout `B` in a block of layout `L`, `stride` bytes apart.
pub struct BlockArrayAt<L, B> {
    first: BlockAt<L, B>,
    stride: usize,
    count: usize,
}

impl<L: BlockLayout, R: Width, T, M: Mode> RegisterAt<L, R, T, M> {
    /// The register at `offset` bytes into the block.
    ///
    /// # Panics
    /// If it leaves the block or is not naturally aligned. In a constant this is a compile error.
    #[track_caller]
    pub const fn new(offset: usize) -> Self {
        assert!(L::ALIGN.is_power_of_two(), "a block's alignment is a power of two");
        assert!(size_of::<R>() <= L::ALIGN, "a register is wider than its block is aligned");
        assert!(offset.is_multiple_of(size_of::<R>()), "a register is not naturally aligned");
        assert!(fits(offset, size_of::<R>(), L::SIZE), "a register leaves its block");
        Self::proven(offset)
    }
}

impl<L, R, T, M> RegisterAt<L, R, T, M> {
    /// The register at a checked offset.
    const fn proven(offset: usize) -> Self {
        Self { offset, _what: PhantomData }
    }

    /// The offset from the block's first byte, in bytes.
    #[inline(always)]
    pub const fn offset(self) -> usize {
        self.offset
    }
}

impl<L: BlockLayout, R: Width, T, M: Mode> RegisterArrayAt<L, R, T, M> {
    /// `count` registers, `stride` bytes apart, the first at `offset`.
    ///
    /// # Panics
    /// If one of them leaves the block or is not naturally aligned, if they overlap, or if the count is 0. In a
    /// constant this is a compile error.
    #[track_caller]
    pub const fn new(offset: usize, stride: usize, count: usize) -> Self {
        let width = size_of::<R>();
        assert!(count > 0, "an array has no registers");
        assert!(stride >= width, "the registers of an array overlap");
        assert!(
            stride.is_multiple_of(width),
            "the registers of an array are not naturally aligned"
        );
        let first = RegisterAt::new(offset);
        assert!(
            fit(offset, stride, count, width, L::SIZE),
            "an array of registers leaves its block"
        );
        Self { first, stride, count }
    }
}

impl<L, R, T, M> RegisterArrayAt<L, R, T, M> {
    /// How many elements there are.
    pub const fn count(self) -> usize {
        self.count
    }

    /// The register at `index`.
    ///
    /// # Panics
    /// If `index` is past the last, as for slices.
    #[inline(always)]
    #[track_caller]
    pub const fn at(self, index: usize) -> RegisterAt<L, R, T, M> {
        assert!(index < self.count, "the index is past the last register");
        RegisterAt::proven(self.first.offset + index * self.stride)
    }

    /// The register at `index`; `None` past the last.
    #[inline(always)]
    pub const fn try_at(self, index: usize) -> Option<RegisterAt<L, R, T, M>> {
        if index < self.count { Some(self.at(index)) } else { None }
    }
}

impl<L: BlockLayout, B: BlockLayout> BlockAt<L, B> {
    /// The inner block at `offset` bytes into the outer one.
    ///
    /// # Panics
    /// If it leaves the outer block or is not aligned. In a constant this is a compile error.
    #[track_caller]
    pub const fn new(offset: usize) -> Self {
        assert!(L::ALIGN.is_power_of_two(), "a block's alignment is a power of two");
        assert!(B::ALIGN.is_power_of_two(), "a block's alignment is a power of two");
        assert!(B::ALIGN <= L::ALIGN, "a block is aligned more strictly than the one around it");
        assert!(offset.is_multiple_of(B::ALIGN), "a block is not aligned as its registers are");
        assert!(fits(offset, B::SIZE, L::SIZE), "a block leaves the one around it");
        Self::proven(offset)
    }
}

impl<L, B> BlockAt<L, B> {
    const fn proven(offset: usize) -> Self {
        Self { offset, _what: PhantomData }
    }

    /// The offset from the outer block's first byte, in bytes.
    #[inline(always)]
    pub const fn offset(self) -> usize {
        self.offset
    }

    /// A register of this block, as one of the outer block.
    #[inline(always)]
    pub const fn register<R, T, M>(self, at: RegisterAt<B, R, T, M>) -> RegisterAt<L, R, T, M> {
        RegisterAt::proven(self.offset + at.offset)
    }

    /// An array of registers of this block, as one of the outer block.
    #[inline(always)]
    pub const fn register_array<R, T, M>(
        self,
        at: RegisterArrayAt<B, R, T, M>,
    ) -> RegisterArrayAt<L, R, T, M> {
        let RegisterArrayAt { first, stride, count } = at;
        RegisterArrayAt { first: self.register(first), stride, count }
    }

    /// A block in this block, as one of the outer block.
    #[inline(always)]
    pub const fn block<C>(self, at: BlockAt<B, C>) -> BlockAt<L, C> {
        BlockAt::proven(self.offset + at.offset)
    }

    /// An array of blocks in this block, as one of the outer block.
    #[inline(always)]
    pub const fn block_array<C>(self, at: BlockArrayAt<B, C>) -> BlockArrayAt<L, C> {
        let BlockArrayAt { first, stride, count } = at;
        BlockArrayAt { first: self.block(first), stride, count }
    }
}

impl<L: BlockLayout, B: BlockLayout> BlockArrayAt<L, B> {
    /// `count` blocks, `stride` bytes apart, the first at `offset`.
    ///
    /// # Panics
    /// If one of them leaves the outer block or is not aligned, if they overlap, or if the count is 0. In a
    /// constant this is a compile error.
    #[track_caller]
    pub const fn new(offset: usize, stride: usize, count: usize) -> Self {
        assert!(count > 0, "an array has no blocks");
        assert!(stride >= B::SIZE, "the blocks of an array overlap");
        assert!(stride.is_multiple_of(B::ALIGN), "a block is not aligned as its registers are");
        let first = BlockAt::new(offset);
        assert!(
            fit(offset, stride, count, B::SIZE, L::SIZE),
            "an array of blocks leaves its block"
        );
        Self { first, stride, count }
    }
}

impl<L, B> BlockArrayAt<L, B> {
    /// How many elements there are.
    pub const fn count(self) -> usize {
        self.count
    }

    /// The block at `index`.
    ///
    /// # Panics
    /// If `index` is past the last, as for slices.
    #[inline(always)]
    #[track_caller]
    pub const fn at(self, index: usize) -> BlockAt<L, B> {
        assert!(index < self.count, "the index is past the last block");
        BlockAt::proven(self.first.offset + index * self.stride)
    }

    /// The block at `index`; `None` past the last.
    #[inline(always)]
    pub const fn try_at(self, index: usize) -> Option<BlockAt<L, B>> {
        if index < self.count { Some(self.at(index)) } else { None }
    }
}

/// Whether `size` bytes at `offset` lie in `all` bytes.
const fn fits(offset: usize, size: usize, all: usize) -> bool {
    matches!(offset.checked_add(size), Some(end) if end <= all)
}

/// Whether `count` pieces of `size` bytes, `stride` apart, the first at `offset`, lie in `all` bytes.
const fn fit(offset: usize, stride: usize, count: usize, size: usize, all: usize) -> bool {
    let Some(last) = (count - 1).checked_mul(stride) else { return false };
    let Some(last) = last.checked_add(offset) else { return false };
    fits(last, size, all)
}

/// The largest of some alignments, and 1.
#[doc(hidden)]
pub const fn max_align(alignments: &[usize]) -> usize {
    let (mut max, mut index) = (1, 0);
    while index < alignments.len() {
        if alignments[index] > max {
            max = alignments[index];
        }
        index += 1;
    }
    max
}

/// Implements `Copy` for all parameters: no value of them is stored.
macro_rules! place {
    ($place:ident<$($parameter:ident),+>) => {
        impl<$($parameter),+> Clone for $place<$($parameter),+> {
            #[inline(always)]
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<$($parameter),+> Copy for $place<$($parameter),+> {}
    };
}

place!(RegisterAt<L, R, T, M>);
place!(RegisterArrayAt<L, R, T, M>);
place!(BlockAt<L, B>);
place!(BlockArrayAt<L, B>);

impl<L, R, T, M> fmt::Debug for RegisterAt<L, R, T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bits at {:#x}", 8 * size_of::<R>(), self.offset)
    }
}

impl<L, R, T, M> fmt::Debug for RegisterArrayAt<L, R, T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {:?}, {:#x} bytes apart", self.count, self.first, self.stride)
    }
}

impl<L, B: BlockLayout> fmt::Debug for BlockAt<L, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}", B::NAME, self.offset)
    }
}

impl<L, B: BlockLayout> fmt::Debug for BlockArrayAt<L, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {:?}, {:#x} bytes apart", self.count, self.first, self.stride)
    }
}
