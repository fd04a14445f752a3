//! Registers: values in a window that are read and written as a whole.
//!
//! `unsafe` is here because a register is a raw pointer. The proof was made once, when the register was made:
//! its bytes lay in the window and were aligned. The register shares ownership of the window, which therefore
//! neither moves nor is unmapped while the register lives.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

pub use super::register_access::Width;
use super::window::{self, Window};
use super::{Device, Inner, Trapped};
use crate::error::{Error, ErrorKind, Result};
use crate::space::Access;

/// Marks registers that can be read and written.
#[derive(Clone, Copy, Debug)]
pub enum ReadWrite {}

/// Marks registers that can be read only, such as those of a read-only window.
#[derive(Clone, Copy, Debug)]
pub enum ReadOnly {}

/// Marks registers that can be written only: a read returns no meaningful value.
#[derive(Clone, Copy, Debug)]
pub enum WriteOnly {}

mod sealed {
    pub trait Mode: Send + Sync + 'static {
        const ACCESS: crate::space::Access;
    }

    impl Mode for super::ReadWrite {
        const ACCESS: crate::space::Access = crate::space::Access::ReadWrite;
    }

    impl Mode for super::ReadOnly {
        const ACCESS: crate::space::Access = crate::space::Access::ReadOnly;
    }

    impl Mode for super::WriteOnly {
        const ACCESS: crate::space::Access = crate::space::Access::ReadWrite;
    }
}

/// [`ReadWrite`], [`ReadOnly`] or [`WriteOnly`].
pub trait Mode: sealed::Mode {}
impl Mode for ReadWrite {}
impl Mode for ReadOnly {}
impl Mode for WriteOnly {}

/// [`ReadWrite`] or [`ReadOnly`].
#[diagnostic::on_unimplemented(
    message = "a `{Self}` register cannot be read",
    label = "this register can be written only"
)]
pub trait Readable: Mode {}
impl Readable for ReadWrite {}
impl Readable for ReadOnly {}

/// [`ReadWrite`] or [`WriteOnly`].
#[diagnostic::on_unimplemented(
    message = "a `{Self}` register cannot be written",
    label = "this register can be read only"
)]
pub trait Writable: Mode {}
impl Writable for ReadWrite {}
impl Writable for WriteOnly {}

/// A register of type `T` in a window, little-endian as in PCI.
///
/// Reading and writing cost one load or store, and cannot fail: width, alignment and bounds were checked when
/// the register was made. It keeps its window in place: while a register lives, [`Window::relocate`] returns
/// `InUse`. Clones are the same register.
pub struct Register<T: Width, M: Mode = ReadWrite> {
    at: NonNull<T>,
    /// Keeps the mapping alive and in place.
    window: Arc<window::Inner>,
    _mode: PhantomData<M>,
}

// SAFETY: a register only loads and stores whole values by single instructions, which the device serializes,
// and no reference to its memory is ever made.
unsafe impl<T: Width, M: Mode> Send for Register<T, M> {}
// SAFETY: as above.
unsafe impl<T: Width, M: Mode> Sync for Register<T, M> {}

impl<T: Width, M: Mode> Register<T, M> {
    /// The register at `offset` bytes into the window.
    pub(super) fn new(window: &Window, offset: usize) -> Result<Self> {
        let at = window.place(offset, size_of::<T>(), M::ACCESS)?;
        Ok(Self { at: at.cast(), window: window.inner.clone(), _mode: PhantomData })
    }

    /// The register at an address.
    ///
    /// # Safety
    /// `at` is aligned and lies in the window. If `M` can be written, so can the window.
    pub(super) unsafe fn within(at: NonNull<T>, window: Arc<window::Inner>) -> Self {
        Self { at, window, _mode: PhantomData }
    }
}

impl<T: Width, M: Readable> Register<T, M> {
    /// Reads the register. Later accesses to memory happen after it.
    #[inline(always)]
    pub fn read(&self) -> T {
        // SAFETY: in bounds and aligned, and readable, since `new`; mapped while `window` lives.
        unsafe { T::load(self.at.as_ptr()) }
    }

    /// Reads the register, as [`read`](Self::read), and says if the value is not the device's: one comparison more,
    /// unless the value is all ones.
    ///
    /// # Errors
    /// `Revoked` if the value is all ones and the window is revoked. A window that
    /// [reads zeros](Window::reads_ones_when_revoked) when it is revoked is not noticed, nor is a value that was
    /// stored since, or a window that was restored between the access and the check.
    #[inline(always)]
    pub fn try_read(&self) -> Result<T> {
        let value = self.read();
        if value.is_all_ones() { self.window.check(value) } else { Ok(value) }
    }

    /// Reads the register, unordered with accesses to memory, in order with other registers.
    #[inline(always)]
    pub fn read_relaxed(&self) -> T {
        // SAFETY: as `read`.
        unsafe { T::load_relaxed(self.at.as_ptr()) }
    }
}

impl<T: Width, M: Writable> Register<T, M> {
    /// Writes the register. Earlier accesses to memory happen before it, so a device that is notified of work
    /// finds it in DMA memory.
    #[inline(always)]
    pub fn write(&self, value: T) {
        // SAFETY: in bounds, aligned and writable since `new`; mapped while `window` lives.
        unsafe { T::store(self.at.as_ptr(), value) }
    }

    /// Writes the register, unordered with accesses to memory, in order with other registers.
    #[inline(always)]
    pub fn write_relaxed(&self, value: T) {
        // SAFETY: as `write`.
        unsafe { T::store_relaxed(self.at.as_ptr(), value) }
    }
}

impl<T: Width> Register<T, ReadWrite> {
    /// Reads the register, changes the value by `change`, and writes it. What the device or another thread
    /// writes in between is lost.
    #[inline(always)]
    pub fn update(&self, change: impl FnOnce(T) -> T) {
        self.write(change(self.read()));
    }
}

impl<T: Width, M: Mode> Clone for Register<T, M> {
    fn clone(&self) -> Self {
        Self { at: self.at, window: self.window.clone(), _mode: PhantomData }
    }
}

impl<T: Width, M: Mode> fmt::Debug for Register<T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Register({} bits at {:p})", 8 * size_of::<T>(), self.at)
    }
}

/// `count` registers of `T`, `stride` bytes apart, such as doorbells.
pub struct RegisterArray<T: Width, M: Mode = ReadWrite> {
    first: Register<T, M>,
    stride: usize,
    count: usize,
}

impl<T: Width, M: Mode> RegisterArray<T, M> {
    pub(super) fn new(window: &Window, offset: usize, stride: usize, count: usize) -> Result<Self> {
        let refuse = |kind, reason: &'static str, advice: String| {
            let object = format!("{count} registers at {offset:#x}, {stride:#x} bytes apart");
            Err(Error::new(kind, "find", object).with_reason(reason).with_advice(advice))
        };
        let width = size_of::<T>();
        if count == 0 {
            let advice = "ask for at least one register".to_owned();
            return refuse(ErrorKind::OutOfRange, "the count is 0", advice);
        }
        if stride < width || !stride.is_multiple_of(width) {
            let advice = format!("the stride is in bytes; use a multiple of {width}");
            return refuse(ErrorKind::Unaligned, "they overlap, or are not aligned", advice);
        }
        let Some(last) = (count - 1).checked_mul(stride).and_then(|size| size.checked_add(offset))
        else {
            let advice = format!("the window has {:#x} bytes: ask for fewer", window.size());
            return refuse(ErrorKind::OutOfRange, "they wrap around", advice);
        };
        window.place(last, size_of::<T>(), M::ACCESS)?;
        Ok(Self { first: Register::new(window, offset)?, stride, count })
    }

    /// How many registers there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The register at `index`, as an object of its own; `None` past the last.
    pub fn get(&self, index: usize) -> Option<Register<T, M>> {
        (index < self.count).then(|| Register { at: self.at(index), ..self.first.clone() })
    }

    /// Reads the register at `index`, as [`Register::read`].
    ///
    /// # Panics
    /// If `index` is past the last, as for slices.
    #[inline]
    #[track_caller]
    pub fn read(&self, index: usize) -> T {
        self.check(index);
        // SAFETY: `new` checked the first and the last register, and this one is not past the last.
        unsafe { T::load(self.at(index).as_ptr()) }
    }

    #[inline]
    #[track_caller]
    fn check(&self, index: usize) {
        let count = self.count;
        assert!(index < count, "register {index} of {count}");
    }

    /// The address of the register; `index` is below the count.
    #[inline]
    fn at(&self, index: usize) -> NonNull<T> {
        // SAFETY: the first and the last register lie in one mapping, as `new` checked, and this one lies
        // between.
        unsafe { self.first.at.byte_add(index * self.stride) }
    }
}

impl<T: Width> RegisterArray<T, ReadWrite> {
    /// Writes the register at `index`, as [`Register::write`].
    ///
    /// # Panics
    /// If `index` is past the last, as for slices.
    #[inline]
    #[track_caller]
    pub fn write(&self, index: usize, value: T) {
        self.check(index);
        // SAFETY: `new` checked that the first and the last register are in bounds and writable, and this one
        // is not past the last.
        unsafe { T::store(self.at(index).as_ptr(), value) }
    }
}

impl<T: Width, M: Mode> Clone for RegisterArray<T, M> {
    fn clone(&self) -> Self {
        Self { first: self.first.clone(), stride: self.stride, count: self.count }
    }
}

impl<T: Width, M: Mode> fmt::Debug for RegisterArray<T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {:?}, {:#x} bytes apart", self.count, self.first, self.stride)
    }
}

/// A register that is mapped (reached through a window) or trapped (reached by reads and writes of the device's
/// file). Only trapped accesses can fail.
///
/// [`Region::trapped_register`](super::Region::trapped_register) makes a trapped one, `From<Register>` a mapped
/// one.
#[derive(Debug)]
pub struct IoRegister<T: Width, M: Mode = ReadWrite>(Route<T, M>);

#[derive(Debug)]
enum Route<T: Width, M: Mode> {
    Mapped(Register<T, M>),
    Trapped(Trapped),
}

impl<T: Width, M: Mode> From<Register<T, M>> for IoRegister<T, M> {
    fn from(register: Register<T, M>) -> Self {
        Self(Route::Mapped(register))
    }
}

impl<T: Width, M: Mode> Clone for IoRegister<T, M> {
    fn clone(&self) -> Self {
        Self(match &self.0 {
            Route::Mapped(register) => Route::Mapped(register.clone()),
            Route::Trapped(trapped) => Route::Trapped(trapped.clone()),
        })
    }
}

impl<T: Width, M: Mode> IoRegister<T, M> {
    pub(super) fn trapped(device: Arc<Inner>, region: u32, offset: u64, size: u64) -> Result<Self> {
        let width = size_of::<T>() as u64;
        let object = || format!("{width} bytes at {offset:#x} of {}", device.region_name(region));
        if offset.checked_add(width).is_none_or(|end| end > size) {
            return Err(Error::new(ErrorKind::OutOfRange, "find", object())
                .with_reason(format!("the region has {size:#x} bytes"))
                .with_advice("count offsets from the first byte of the region, not of a window"));
        }
        if !offset.is_multiple_of(width) {
            return Err(Error::new(ErrorKind::Unaligned, "find", object())
                .with_reason(format!("a register of {width} bytes lies at a multiple of {width}"))
                .with_advice("use a narrower register, or more than one"));
        }
        Ok(Self(Route::Trapped(Trapped { device, region, offset })))
    }

    /// Whether the register is mapped.
    pub fn is_mapped(&self) -> bool {
        matches!(self.0, Route::Mapped(_))
    }
}

impl<T: Width, M: Readable> IoRegister<T, M> {
    /// Reads the register, as [`Register::try_read`] if it is mapped.
    ///
    /// # Errors
    /// `Revoked` if it is mapped; the transport's error if it is trapped.
    pub fn try_read(&self) -> Result<T> {
        match &self.0 {
            Route::Mapped(register) => register.try_read(),
            Route::Trapped(trapped) => trapped.read(0),
        }
    }

    /// Reads the register, as [`Register::read`].
    ///
    /// # Errors
    /// The transport's error.
    pub fn read(&self) -> Result<T> {
        match &self.0 {
            Route::Mapped(register) => Ok(register.read()),
            Route::Trapped(trapped) => trapped.read(0),
        }
    }
}

impl<T: Width, M: Writable> IoRegister<T, M> {
    /// Writes the register, as [`Register::write`].
    ///
    /// # Errors
    /// The transport's error.
    pub fn write(&self, value: T) -> Result<()> {
        match &self.0 {
            Route::Mapped(register) => {
                register.write(value);
                Ok(())
            }
            Route::Trapped(trapped) => trapped.write(0, value),
        }
    }
}

impl<T: Width> IoRegister<T> {
    /// Reads the register, changes the value by `change`, and writes it. What the device or another thread
    /// writes in between is lost.
    ///
    /// # Errors
    /// The transport's error. If the read failed, nothing was written.
    pub fn update(&self, change: impl FnOnce(T) -> T) -> Result<()> {
        self.write(change(self.read()?))
    }
}

impl Trapped {
    /// Reads at `offset` bytes past the register's place.
    pub(super) fn read<T: Width>(&self, offset: u64) -> Result<T> {
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..size_of::<T>()];
        self.device.transport.read_at(self.region, self.offset + offset, bytes)?;
        T::from_bytes(bytes).ok_or_else(|| {
            Error::new(ErrorKind::Malformed, "read", self.device.region_name(self.region))
        })
    }

    /// Writes at `offset` bytes past the register's place.
    pub(super) fn write<T: Width>(&self, offset: u64, value: T) -> Result<()> {
        let offset = self.offset + offset;
        value.with_bytes(|bytes| {
            if self.device.is_config(self.region) {
                return Device { inner: self.device.clone() }.config()?.write(offset, bytes);
            }
            self.device.transport.write_at(self.region, offset, bytes)
        })
    }
}

/// Whether a window with access `window` allows a register with access `wanted`.
pub(super) fn permits(window: Access, wanted: Access) -> bool {
    window == Access::ReadWrite || wanted == Access::ReadOnly
}
