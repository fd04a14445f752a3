//! One access to a device: exactly one load or store of the declared width.
//!
//! On known machines this is inline assembly. The documentation of volatile accesses does not exclude that one
//! is torn or widened, and a volatile access that traps is undefined behaviour; an instruction in assembly is
//! exactly that instruction. PCI is little-endian; values are converted here.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

/// The types that a register can have: `u8`, `u16`, `u32`, `u64`.
pub trait Width: Copy + Send + Sync + sealed::Access + 'static {}

pub(super) mod sealed {
    pub trait Access: Sized {
        /// Loads a value. Later accesses to memory happen after it.
        ///
        /// # Safety
        /// `from` is mapped for reading and aligned.
        unsafe fn load(from: *const Self) -> Self;
        /// Loads word number `WORD` of an entry, as `load` does. The offset is a part of the instruction.
        ///
        /// # Safety
        /// That word is mapped for reading and aligned.
        #[inline(always)]
        unsafe fn load_word<const WORD: usize>(entry: *const Self) -> Self {
            // SAFETY: the caller keeps the same contract.
            unsafe { Self::load(entry.wrapping_add(WORD)) }
        }
        /// Loads a value, without an order that costs a barrier.
        ///
        /// # Safety
        /// As `load`.
        #[inline(always)]
        unsafe fn load_relaxed(from: *const Self) -> Self {
            // SAFETY: the caller keeps the same contract.
            unsafe { Self::load(from) }
        }
        /// Stores a value. Earlier accesses to memory happen before it.
        ///
        /// # Safety
        /// `to` is mapped for writing and aligned.
        unsafe fn store(to: *mut Self, value: Self);
        /// Stores a value, without an order that costs a barrier.
        ///
        /// # Safety
        /// As `store`.
        #[inline(always)]
        unsafe fn store_relaxed(to: *mut Self, value: Self) {
            // SAFETY: the caller keeps the same contract.
            unsafe { Self::store(to, value) }
        }
        /// Stores word number `WORD` of an entry, as `store_relaxed` does. The offset is a part of the
        /// instruction.
        ///
        /// # Safety
        /// That word is mapped for writing and aligned.
        #[inline(always)]
        unsafe fn store_word<const WORD: usize>(entry: *mut Self, value: Self) {
            // SAFETY: the caller keeps the same contract.
            unsafe { Self::store_relaxed(entry.wrapping_add(WORD), value) }
        }

        /// Whether all bits are 1.
        fn is_all_ones(&self) -> bool;
        fn from_bytes(bytes: &[u8]) -> Option<Self>;
        fn with_bytes<T>(self, f: impl FnOnce(&[u8]) -> T) -> T;
    }
}

/// The bytes of a value in PCI's byte order, for accesses through the transport.
macro_rules! bytes {
    ($type:ty) => {
        #[inline(always)]
        fn is_all_ones(&self) -> bool {
            *self == <$type>::MAX
        }

        fn from_bytes(bytes: &[u8]) -> Option<Self> {
            Some(<$type>::from_le_bytes(bytes.try_into().ok()?))
        }

        fn with_bytes<T>(self, f: impl FnOnce(&[u8]) -> T) -> T {
            f(&self.to_le_bytes())
        }
    };
}

/// x86 keeps loads and stores of uncacheable and write-back memory in program order, as far as drivers can see
/// (Intel SDM vol. 3 §9.2). Only the compiler must not reorder, and an `asm!` that may access memory prevents
/// that. Relaxed accesses would be no cheaper.
#[cfg(target_arch = "x86_64")]
macro_rules! access {
    ($type:ty, $load:literal, $store:literal, $register:ident) => {
        impl Width for $type {}

        impl sealed::Access for $type {
            #[inline(always)]
            unsafe fn load(from: *const Self) -> Self {
                // SAFETY: the caller keeps the same contract.
                unsafe { Self::load_word::<0>(from) }
            }

            #[inline(always)]
            unsafe fn load_word<const WORD: usize>(entry: *const Self) -> Self {
                let value: Self;
                // SAFETY: one load from a mapped, aligned address, as the caller guarantees.
                unsafe {
                    std::arch::asm!($load, v = out($register) value, p = in(reg) entry,
                        o = const WORD * size_of::<Self>(), options(nostack, preserves_flags));
                }
                value
            }

            #[inline(always)]
            unsafe fn store(to: *mut Self, value: Self) {
                // SAFETY: the caller keeps the same contract.
                unsafe { Self::store_word::<0>(to, value) }
            }

            #[inline(always)]
            unsafe fn store_word<const WORD: usize>(entry: *mut Self, value: Self) {
                // SAFETY: one store to a mapped, aligned address, as the caller guarantees.
                unsafe {
                    std::arch::asm!($store, v = in($register) value, p = in(reg) entry,
                        o = const WORD * size_of::<Self>(), options(nostack, preserves_flags));
                }
            }

            bytes!($type);
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{Width, sealed};

    access!(u8, "mov {v}, byte ptr [{p} + {o}]", "mov byte ptr [{p} + {o}], {v}", reg_byte);
    access!(u16, "mov {v:x}, word ptr [{p} + {o}]", "mov word ptr [{p} + {o}], {v:x}", reg);
    access!(u32, "mov {v:e}, dword ptr [{p} + {o}]", "mov dword ptr [{p} + {o}], {v:e}", reg);
    access!(u64, "mov {v}, qword ptr [{p} + {o}]", "mov qword ptr [{p} + {o}], {v}", reg);
}

/// aarch64 needs barriers between accesses to a device and to its DMA memory: `dmb oshld` after a load, as in
/// `readl` of Linux; `dmb osh` before a store, so that earlier loads happen before it, too.
#[cfg(target_arch = "aarch64")]
macro_rules! access {
    ($type:ty, $load:literal, $store:literal) => {
        impl Width for $type {}

        impl sealed::Access for $type {
            #[inline(always)]
            unsafe fn load(from: *const Self) -> Self {
                // SAFETY: the caller keeps the same contract.
                unsafe { Self::load_word::<0>(from) }
            }

            #[inline(always)]
            unsafe fn load_word<const WORD: usize>(entry: *const Self) -> Self {
                let value: Self;
                // SAFETY: one load from a mapped, aligned address, as the caller guarantees.
                unsafe {
                    std::arch::asm!($load, "dmb oshld", v = out(reg) value, p = in(reg) entry,
                        o = const WORD * size_of::<Self>(), options(nostack, preserves_flags));
                }
                Self::from_le(value)
            }

            #[inline(always)]
            unsafe fn load_relaxed(from: *const Self) -> Self {
                let value: Self;
                // SAFETY: as `load`.
                unsafe {
                    std::arch::asm!($load, v = out(reg) value, p = in(reg) from, o = const 0,
                        options(nostack, preserves_flags));
                }
                Self::from_le(value)
            }

            #[inline(always)]
            unsafe fn store(to: *mut Self, value: Self) {
                // SAFETY: one store to a mapped, aligned address, as the caller guarantees.
                unsafe {
                    std::arch::asm!("dmb osh", $store, v = in(reg) value.to_le(), p = in(reg) to,
                        o = const 0, options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn store_relaxed(to: *mut Self, value: Self) {
                // SAFETY: the caller keeps the same contract.
                unsafe { Self::store_word::<0>(to, value) }
            }

            #[inline(always)]
            unsafe fn store_word<const WORD: usize>(entry: *mut Self, value: Self) {
                // SAFETY: as `store`.
                unsafe {
                    std::arch::asm!($store, v = in(reg) value.to_le(), p = in(reg) entry,
                        o = const WORD * size_of::<Self>(), options(nostack, preserves_flags));
                }
            }

            bytes!($type);
        }
    };
}

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use super::{Width, sealed};

    access!(u8, "ldrb {v:w}, [{p}, {o}]", "strb {v:w}, [{p}, {o}]");
    access!(u16, "ldrh {v:w}, [{p}, {o}]", "strh {v:w}, [{p}, {o}]");
    access!(u32, "ldr {v:w}, [{p}, {o}]", "str {v:w}, [{p}, {o}]");
    access!(u64, "ldr {v:x}, [{p}, {o}]", "str {v:x}, [{p}, {o}]");
}

/// Other machines use volatile accesses, which today's compilers turn into one instruction for these types, and
/// full fences.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
macro_rules! access {
    ($type:ty) => {
        impl Width for $type {}

        impl sealed::Access for $type {
            unsafe fn load(from: *const Self) -> Self {
                // SAFETY: the caller keeps the same contract.
                let value = unsafe { Self::load_relaxed(from) };
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                value
            }

            unsafe fn load_relaxed(from: *const Self) -> Self {
                // SAFETY: mapped and aligned, as the caller guarantees.
                Self::from_le(unsafe { from.read_volatile() })
            }

            unsafe fn store(to: *mut Self, value: Self) {
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                // SAFETY: the caller keeps the same contract.
                unsafe { Self::store_relaxed(to, value) }
            }

            unsafe fn store_relaxed(to: *mut Self, value: Self) {
                // SAFETY: mapped and aligned, as the caller guarantees.
                unsafe { to.write_volatile(value.to_le()) }
            }

            bytes!($type);
        }
    };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod elsewhere {
    use super::{Width, sealed};

    access!(u8);
    access!(u16);
    access!(u32);
    // With smaller processor registers this would be two accesses.
    #[cfg(target_pointer_width = "64")]
    access!(u64);
}
