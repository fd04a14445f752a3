//! What a block of registers consists of: its size, and where in it a register, an array of them, or
//! another block lies.
//!
//! A place is checked once, where it is declared, and carries its offset privately from then on. Whoever
//! holds a [`RegisterAt`] of a layout holds the proof that its bytes lie in a block of that layout.

use std::fmt;
use std::marker::PhantomData;

use super::register::{Mode, ReadWrite, Width};

/// What a place is about, of which it has nothing. Invariant: where one layout is a subtype of another, as
/// function pointers of different lifetimes are, a place in one is no place in the other.
pub(super) type About<T> = PhantomData<fn(T) -> T>;

/// The layout of a block of registers: implemented by [`register_block!`](crate::register_block) for the
/// type that it declares.
///
/// Nothing is taken on trust: places that do not fit a layout do not compile, and a block is checked
/// against its window when it is made.
pub trait BlockLayout: 'static {
    /// How errors name a block of it.
    const NAME: &'static str;
    /// The size in bytes.
    const SIZE: usize;
    /// What the first byte's address is a multiple of: the width of its widest register, in bytes.
    const ALIGN: usize;
}

/// Where a register lies in a block of layout `L`: as wide as `R`, read and written as `T`.
///
/// [`register_block!`](crate::register_block) declares them.
pub struct RegisterAt<L, R, T = R, M = ReadWrite> {
    offset: usize,
    _what: About<(L, R, T, M)>,
}

/// Where `count` registers lie in a block of layout `L`, `stride` bytes apart.
pub struct RegisterArrayAt<L, R, T = R, M = ReadWrite> {
    first: RegisterAt<L, R, T, M>,
    stride: usize,
    count: usize,
}

/// Where a block of layout `B` lies in a block of layout `L`.
pub struct BlockAt<L, B> {
    offset: usize,
    _what: About<(L, B)>,
}

/// Where `count` blocks of layout `B` lie in a block of layout `L`, `stride` bytes apart.
pub struct BlockArrayAt<L, B> {
    first: BlockAt<L, B>,
    stride: usize,
    count: usize,
}

impl<L: BlockLayout, R: Width, T, M: Mode> RegisterAt<L, R, T, M> {
    /// The register at `offset` bytes into the block.
    ///
    /// # Panics
    /// Where it leaves the block or is not naturally aligned: when compiled, in a constant.
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
    /// The register at an offset that was checked.
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
    /// `count` registers from `offset` on, `stride` bytes apart.
    ///
    /// # Panics
    /// Where one of them leaves the block or is not naturally aligned, where they overlap, or there is
    /// none: when compiled, in a constant.
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
    /// How many there are.
    pub const fn count(self) -> usize {
        self.count
    }

    /// The register at `index`.
    ///
    /// # Panics
    /// Where `index` is past the last, as slices do.
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
    /// The block at `offset` bytes into the other.
    ///
    /// # Panics
    /// Where it leaves the other or is not aligned: when compiled, in a constant.
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
    pub const fn registers<R, T, M>(
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
    pub const fn blocks<C>(self, at: BlockArrayAt<B, C>) -> BlockArrayAt<L, C> {
        let BlockArrayAt { first, stride, count } = at;
        BlockArrayAt { first: self.block(first), stride, count }
    }
}

impl<L: BlockLayout, B: BlockLayout> BlockArrayAt<L, B> {
    /// `count` blocks from `offset` on, `stride` bytes apart.
    ///
    /// # Panics
    /// Where one of them leaves the other block or is not aligned, where they overlap, or there is none:
    /// when compiled, in a constant.
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
    /// How many there are.
    pub const fn count(self) -> usize {
        self.count
    }

    /// The block at `index`.
    ///
    /// # Panics
    /// Where `index` is past the last, as slices do.
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

/// Whether `count` times `size` bytes, the first at `offset`, lie in `all` bytes.
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

/// Copies, whatever the parameters are: they say what lies there, and are not kept.
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
