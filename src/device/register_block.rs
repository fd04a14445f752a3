//! Blocks of registers: one pointer, one proof, and one reference count for all registers of a device.
//!
//! `unsafe` is here because a register of a block is reached by a raw pointer. The proof has two halves. First:
//! when the block was made, its `SIZE` bytes lay in the window, aligned to `ALIGN`; the block shares ownership
//! of the window, which therefore neither moves nor is unmapped while the block lives. Second: a [`RegisterAt`]
//! of the block's layout lies within `SIZE` and needs no more alignment than `ALIGN`, as was checked at its
//! declaration.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

use super::register::{Mode, ReadOnly, ReadWrite, Readable, Register, Width, Writable};
use super::register_layout::{BlockAt, BlockLayout, Invariant, RegisterAt};
use super::window::{self, Window};
use super::{Holder, Inner, Trapped};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;

/// A block of registers in a window, with the layout `L`: see [`register_block!`](crate::register_block).
///
/// Reading and writing cost one load or store, and cannot fail: width, alignment and bounds were checked when
/// the layout was compiled and when the block was made. A block keeps its window in place: while it lives,
/// [`Window::relocate`] returns `InUse` and names it. Clones are the same block. Inner blocks share its
/// reference count.
pub struct RegisterBlock<L, M: Mode = ReadWrite> {
    at: NonNull<u8>,
    hold: Arc<WindowHold>,
    /// Invariant, as [`RegisterAt`] is.
    _what: Invariant<(L, M)>,
}

// SAFETY: a block only loads and stores whole values by single instructions, which the device serializes, and
// no reference to its memory is ever made.
unsafe impl<L, M: Mode> Send for RegisterBlock<L, M> {}
// SAFETY: as above.
unsafe impl<L, M: Mode> Sync for RegisterBlock<L, M> {}

impl<L: BlockLayout, M: Mode> RegisterBlock<L, M> {
    fn new(window: &Window, offset: usize) -> Result<Self> {
        let at = window.place_aligned(offset, L::SIZE, L::ALIGN, M::ACCESS)?;
        let hold = Arc::new(WindowHold::new(window, L::NAME));
        Ok(Self { at, hold, _what: PhantomData })
    }

    /// Reads a register. Later accesses to memory happen after it.
    #[inline(always)]
    pub fn read<R: Width, T: From<R>, A: Readable>(&self, at: RegisterAt<L, R, T, A>) -> T {
        // SAFETY: in bounds and aligned, as the head of the file proves; readable, as all windows are; mapped
        // while `hold` lives.
        T::from(unsafe { R::load(self.pointer(at)) })
    }

    /// Reads a register, as [`read`](Self::read), and says if the value is not the device's: one comparison more,
    /// unless the value is all ones.
    ///
    /// # Errors
    /// As [`Register::try_read`].
    #[inline(always)]
    pub fn try_read<R: Width, T: From<R>, A: Readable>(
        &self,
        at: RegisterAt<L, R, T, A>,
    ) -> Result<T> {
        // SAFETY: as `read`.
        let value = unsafe { R::load(self.pointer(at)) };
        if value.is_all_ones() {
            return self.hold.window.check(value).map(T::from);
        }
        Ok(T::from(value))
    }

    /// Reads a register, unordered with accesses to memory, in order with other registers.
    #[inline(always)]
    pub fn read_relaxed<R: Width, T: From<R>, A: Readable>(&self, at: RegisterAt<L, R, T, A>) -> T {
        // SAFETY: as `read`.
        T::from(unsafe { R::load_relaxed(self.pointer(at)) })
    }

    /// An inner block, as an object of its own. It shares the reference count of this one.
    pub fn block<B: BlockLayout>(&self, at: BlockAt<L, B>) -> RegisterBlock<B, M> {
        // SAFETY: a `BlockAt` of this layout lies within it, and `self.at` has `L::SIZE` bytes behind it.
        let at = unsafe { self.at.byte_add(at.offset()) };
        RegisterBlock { at, hold: self.hold.clone(), _what: PhantomData }
    }

    /// Writes the layout's name and the block's address.
    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:p}", L::NAME, self.at)
    }

    #[inline(always)]
    fn pointer<R: Width, T, A>(&self, at: RegisterAt<L, R, T, A>) -> *mut R {
        // SAFETY: a `RegisterAt` of this layout lies within it, and `self.at` has `L::SIZE` bytes behind it.
        unsafe { self.at.byte_add(at.offset()).cast().as_ptr() }
    }
}

impl<L: BlockLayout> RegisterBlock<L> {
    /// Writes a register. Earlier accesses to memory happen before it, so a device that is notified of work
    /// finds it in DMA memory.
    #[inline(always)]
    pub fn write<R: Width + From<T>, T, A: Writable>(&self, at: RegisterAt<L, R, T, A>, value: T) {
        // SAFETY: in bounds and aligned, as the head of the file proves; writable, as `new` checked; mapped
        // while `hold` lives.
        unsafe { R::store(self.pointer(at), R::from(value)) }
    }

    /// Writes a register, unordered with accesses to memory, in order with other registers.
    #[inline(always)]
    pub fn write_relaxed<R: Width + From<T>, T, A: Writable>(
        &self,
        at: RegisterAt<L, R, T, A>,
        value: T,
    ) {
        // SAFETY: as `write`.
        unsafe { R::store_relaxed(self.pointer(at), R::from(value)) }
    }

    /// Reads a register, changes the value by `change`, and writes it. What the device or another thread writes
    /// in between is lost.
    #[inline(always)]
    pub fn update<R: Width + From<T>, T: From<R>>(
        &self,
        at: RegisterAt<L, R, T>,
        change: impl FnOnce(T) -> T,
    ) {
        self.write(at, change(self.read(at)));
    }

    /// One register, as an object of its own. It keeps the window mapped and in place, too.
    pub fn register<R: Width, T, A: Mode>(&self, at: RegisterAt<L, R, T, A>) -> Register<R, A> {
        // SAFETY: a `RegisterAt` of this layout lies within it, and `self.at` has `L::SIZE` bytes behind it,
        // which can be read and written, as `new` checked.
        let at = unsafe { self.at.byte_add(at.offset()) }.cast();
        // SAFETY: in bounds and aligned, as the head of the file proves; mapped while the window lives.
        unsafe { Register::within(at, self.hold.window.clone()) }
    }
}

impl<L: BlockLayout> RegisterBlock<L, ReadOnly> {
    /// One register, as an object of its own, for reading. It keeps the window mapped and in place, too.
    pub fn register<R: Width, T, A: Readable>(
        &self,
        at: RegisterAt<L, R, T, A>,
    ) -> Register<R, ReadOnly> {
        // SAFETY: a `RegisterAt` of this layout lies within it, and `self.at` has `L::SIZE` bytes behind it,
        // which can be read, as `new` checked.
        let at = unsafe { self.at.byte_add(at.offset()) }.cast();
        // SAFETY: in bounds and aligned, as the head of the file proves; mapped while the window lives.
        unsafe { Register::within(at, self.hold.window.clone()) }
    }
}

impl<L, M: Mode> Clone for RegisterBlock<L, M> {
    fn clone(&self) -> Self {
        Self { at: self.at, hold: self.hold.clone(), _what: PhantomData }
    }
}

impl<L: BlockLayout, M: Mode> fmt::Debug for RegisterBlock<L, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegisterBlock(")?;
        self.describe(f)?;
        f.write_str(")")
    }
}

/// Keeps a window mapped and in place, and names the block in the window's list of holders.
struct WindowHold {
    window: Arc<window::Inner>,
    slot: usize,
}

impl WindowHold {
    fn new(window: &Window, name: &'static str) -> Self {
        let window = window.inner.clone();
        let slot = window.blocks().insert(name);
        Self { window, slot }
    }
}

impl Drop for WindowHold {
    fn drop(&mut self) {
        if self.window.mapping.is_inherited() {
            // A thread of the parent may have held the lock at the time of fork.
            return;
        }
        self.window.blocks().try_remove(self.slot);
    }
}

impl Window {
    /// The block of registers at `offset` bytes into the window.
    ///
    /// ```
    /// # use vfio_remap::{Device, Placement, register_block, transport::MemoryDevice};
    /// # let device = Device::new(std::sync::Arc::new(MemoryDevice::new(0x4000)?));
    /// register_block! {
    ///     Uart[0x10] {
    ///         DATA(u32) @ 0x00;
    ///         STATUS(ro u32) @ 0x04;
    ///     }
    /// }
    ///
    /// let window = device.bar(0)?.map(.., Placement::Anywhere)?;
    /// let uart = window.block::<Uart>(0x1000)?;
    /// uart.write(Uart::DATA, 0x55);
    /// assert_eq!(uart.read(Uart::STATUS), 0);
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    ///
    /// # Errors
    /// `OutOfRange` if the block leaves the window, `Unaligned` if its registers would not be naturally
    /// aligned, `ReadOnly` for a read-only window.
    pub fn block<L: BlockLayout>(&self, offset: usize) -> Result<RegisterBlock<L>> {
        RegisterBlock::new(self, offset)
    }

    /// The block of registers at `offset` bytes into the window, read-only.
    ///
    /// # Errors
    /// As [`block`](Self::block).
    pub fn read_only_block<L: BlockLayout>(
        &self,
        offset: usize,
    ) -> Result<RegisterBlock<L, ReadOnly>> {
        RegisterBlock::new(self, offset)
    }
}

/// A block of registers that is mapped (reached through a window) or trapped (reached by reads and writes of
/// the device's file). Only trapped accesses can fail.
///
/// [`Region::block`](super::Region::block) makes a mapped one if the region allows it, and a trapped one
/// otherwise. [`Region::trapped_block`](super::Region::trapped_block) makes a trapped one,
/// `From<RegisterBlock>` a mapped one.
///
/// ```
/// # use std::sync::Arc;
/// # use vfio_remap::emulated::{Edu, Emulated};
/// # use vfio_remap::{Device, register_block};
/// register_block! {
///     EduRegisters[0x100] {
///         ID(ro u32) @ 0x00;
///         LIVENESS(u32) @ 0x04;
///     }
/// }
///
/// # let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
/// let edu = device.bar(0)?.block::<EduRegisters>(0)?;
/// assert!(!edu.is_mapped(), "QEMU's edu traps them");
/// edu.write(EduRegisters::LIVENESS, 1)?;
/// assert_eq!(edu.read(EduRegisters::LIVENESS)?, !1);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
pub struct IoRegisterBlock<L>(Route<L>);

enum Route<L> {
    Mapped(RegisterBlock<L>),
    Trapped {
        hold: Arc<TrappedHold>,
        /// The offset of this block in the outermost one, in bytes.
        offset: u64,
    },
}

/// Keeps a device open, and names the block among the holders of the device.
struct TrappedHold {
    /// The first byte of the block.
    first: Trapped,
    slot: usize,
    /// The process that made it: see [`fork::generation`].
    generation: u32,
}

impl Drop for TrappedHold {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        self.first.device.holders().try_remove(self.slot);
    }
}

impl<L: BlockLayout> IoRegisterBlock<L> {
    pub(super) fn trapped(device: Arc<Inner>, region: u32, offset: u64, size: u64) -> Result<Self> {
        let end = offset.checked_add(L::SIZE as u64);
        let object = || format!("{} at {offset:#x} of {}", L::NAME, device.region_name(region));
        let Some(end) = end.filter(|end| *end <= size) else {
            return Err(Error::new(ErrorKind::OutOfRange, "find", object())
                .with_reason(format!("the block has {:#x} bytes, the region {size:#x}", L::SIZE))
                .with_advice("count offsets from the first byte of the region, not of a window"));
        };
        if !offset.is_multiple_of(L::ALIGN as u64) {
            return Err(Error::new(ErrorKind::Unaligned, "find", object())
                .with_reason(format!("its widest register has {} bytes", L::ALIGN))
                .with_advice(format!("place the block at a multiple of {}", L::ALIGN)));
        }
        let slot =
            device.holders().insert(Holder::Block { name: L::NAME, region, range: offset..end });
        let first = Trapped { device, region, offset };
        let hold = TrappedHold { first, slot, generation: fork::generation() };
        Ok(Self(Route::Trapped { hold: Arc::new(hold), offset: 0 }))
    }

    /// Whether the block is mapped.
    pub fn is_mapped(&self) -> bool {
        matches!(self.0, Route::Mapped(_))
    }

    /// The mapped block; `None` if it is trapped.
    pub fn mapped(&self) -> Option<&RegisterBlock<L>> {
        match &self.0 {
            Route::Mapped(block) => Some(block),
            Route::Trapped { .. } => None,
        }
    }

    /// Reads a register, as [`RegisterBlock::read`].
    ///
    /// # Errors
    /// The transport's error.
    #[inline]
    pub fn read<R: Width, T: From<R>, A: Readable>(&self, at: RegisterAt<L, R, T, A>) -> Result<T> {
        match &self.0 {
            Route::Mapped(block) => Ok(block.read(at)),
            Route::Trapped { hold, offset } => {
                hold.first.read::<R>(offset + at.offset() as u64).map(T::from)
            }
        }
    }

    /// Reads a register, as [`RegisterBlock::try_read`] if it is mapped.
    ///
    /// # Errors
    /// `Revoked` if it is mapped; the transport's error if it is trapped.
    #[inline]
    pub fn try_read<R: Width, T: From<R>, A: Readable>(
        &self,
        at: RegisterAt<L, R, T, A>,
    ) -> Result<T> {
        match &self.0 {
            Route::Mapped(block) => block.try_read(at),
            Route::Trapped { hold, offset } => {
                hold.first.read::<R>(offset + at.offset() as u64).map(T::from)
            }
        }
    }

    /// Writes a register, as [`RegisterBlock::write`].
    ///
    /// # Errors
    /// The transport's error.
    #[inline]
    pub fn write<R: Width + From<T>, T, A: Writable>(
        &self,
        at: RegisterAt<L, R, T, A>,
        value: T,
    ) -> Result<()> {
        match &self.0 {
            Route::Mapped(block) => {
                block.write(at, value);
                Ok(())
            }
            Route::Trapped { hold, offset } => {
                hold.first.write(offset + at.offset() as u64, R::from(value))
            }
        }
    }

    /// Reads a register, changes the value by `change`, and writes it. What the device or another thread writes
    /// in between is lost.
    ///
    /// # Errors
    /// The transport's error. If the read failed, nothing was written.
    #[inline]
    pub fn update<R: Width + From<T>, T: From<R>>(
        &self,
        at: RegisterAt<L, R, T>,
        change: impl FnOnce(T) -> T,
    ) -> Result<()> {
        let value = self.read(at)?;
        self.write(at, change(value))
    }

    /// An inner block, as an object of its own. It shares the reference count of this one.
    pub fn block<B: BlockLayout>(&self, at: BlockAt<L, B>) -> IoRegisterBlock<B> {
        IoRegisterBlock(match &self.0 {
            Route::Mapped(block) => Route::Mapped(block.block(at)),
            Route::Trapped { hold, offset } => {
                Route::Trapped { hold: hold.clone(), offset: offset + at.offset() as u64 }
            }
        })
    }
}

impl<L> From<RegisterBlock<L>> for IoRegisterBlock<L> {
    fn from(block: RegisterBlock<L>) -> Self {
        Self(Route::Mapped(block))
    }
}

impl<L> Clone for IoRegisterBlock<L> {
    fn clone(&self) -> Self {
        Self(match &self.0 {
            Route::Mapped(block) => Route::Mapped(block.clone()),
            Route::Trapped { hold, offset } => {
                Route::Trapped { hold: hold.clone(), offset: *offset }
            }
        })
    }
}

impl<L: BlockLayout> fmt::Debug for IoRegisterBlock<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IoRegisterBlock(")?;
        match &self.0 {
            Route::Mapped(block) => block.describe(f)?,
            Route::Trapped { hold, offset } => {
                let Trapped { device, region, offset: start } = &hold.first;
                let region = device.region_name(*region);
                write!(f, "{} at {:#x} of {region}, trapped", L::NAME, start + offset)?;
            }
        }
        f.write_str(")")
    }
}
