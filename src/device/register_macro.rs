//! The macro that declares layouts of register blocks.

/// Declares blocks of registers: the size of each block, and the name, width, access and offset of each
/// register.
///
/// The syntax is close to that of the `register!` macro of Linux (`rust/kernel/io/register.rs`, Linux 7.1): a
/// name, its type, and its offset after an `@`.
///
/// ```
/// vfio_remap::register_block! {
///     /// The registers of a timer.
///     pub Timer[0x100] {
///         /// Identification.
///         ID(ro u32) @ 0x00;
///         /// Enables and configures the timer.
///         CONTROL(u32 => Control) @ 0x04 {
///             pub enabled: bool,
///             pub periodic: bool,
///             #[bits(6)]
///             __: u8,
///             pub prescaler: u8,
///             __: u16,
///         }
///         RELOAD(u32) @ 0x08;
///         ACKNOWLEDGE(wo u32) @ 0x0c;
///         COUNT(ro u64) @ 0x10;
///         /// Four words, one after the other.
///         SCRATCH(u32)[4] @ 0x20;
///         /// Two words, four bytes apart.
///         LIMIT(u16)[2, stride = 4] @ 0x30;
///         /// Channels, 0x40 bytes apart.
///         CHANNEL(block Channel)[2, stride = 0x40] @ 0x80;
///     }
///
///     /// A channel of a [`Timer`].
///     pub Channel[0x10] {
///         MATCH(u32) @ 0x0;
///         CAPTURED(ro u32) @ 0x4;
///     }
/// }
///
/// # use vfio_remap::{Device, Placement, RegisterBlock, transport::MemoryDevice};
/// # let device = Device::new(std::sync::Arc::new(MemoryDevice::new(0x4000)?));
/// let window = device.bar(0)?.map(.., Placement::Anywhere)?;
/// let timer: RegisterBlock<Timer> = window.block(0)?;
///
/// timer.write(Timer::RELOAD, 1000);
/// timer.update(Timer::CONTROL, |control| control.with_enabled(true).with_prescaler(7));
/// assert_eq!(timer.read(Timer::CONTROL).prescaler(), 7);
///
/// // Elements of arrays and registers of inner blocks are used as other registers.
/// timer.write(Timer::SCRATCH.at(3), 0xffff_ffff);
/// timer.write(Timer::CHANNEL.at(1).register(Channel::MATCH), 500);
///
/// // An inner block on its own, for code that needs no more.
/// let channel: RegisterBlock<Channel> = timer.block(Timer::CHANNEL.at(1));
/// assert_eq!(channel.read(Channel::MATCH), 500);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
///
/// # Registers
/// `NAME(type) @ offset;` declares an associated constant of the block, a
/// [`RegisterAt`](crate::device::RegisterAt). It has the visibility of the block. An offset is in bytes: a
/// literal, a constant, or an expression in parentheses.
///
/// | type | |
/// |---|---|
/// | `u32` | a register of 32 bits that can be read and written; `u8`, `u16` and `u64` likewise |
/// | `ro u32` | one that can be read only |
/// | `wo u32` | one that can be written only |
/// | `u32 => Type` | one whose value is a `Type`: anything that is `From<u32>`, if it can be read, and for which `u32` is `From<Type>`, if it can be written |
/// | `block Other` | not a register but a block of layout `Other`: a [`BlockAt`](crate::device::BlockAt) |
///
/// `[count]` after the type makes an array of it, whose elements touch; with `[count, stride = bytes]` they
/// lie further apart. [`at`](crate::device::RegisterArrayAt::at) names an element.
///
/// A register that has `#[cfg(...)]` is there only under that condition.
///
/// # Bit fields
/// `Type` may be a type of yours: an enumeration, a number with a unit. Fields in braces after the offset
/// declare `Type` here, by the crate [bitfield-struct](https://docs.rs/bitfield-struct) and in its syntax: from
/// the lowest bit to the highest, with `__` for reserved bits. Fields are private unless they are `pub`. `Type`
/// is `Copy`, `Debug`, `Default` (all bits 0) and `Eq`; for a field `enabled` it has `enabled()`,
/// `with_enabled()` and `set_enabled()`.
///
/// # What does not compile
/// A register that leaves its block, or is not naturally aligned in it:
///
/// ```compile_fail,E0080
/// vfio_remap::register_block! {
///     Small[0x10] {
///         OUTSIDE(u32) @ 0x10;
///     }
/// }
/// ```
///
/// A write to a register that can be read only, a read of one that can be written only, and a register of
/// another block.
#[macro_export]
macro_rules! register_block {
    ($(
        $(#[$attribute:meta])*
        $visibility:vis $block:ident [$size:expr] {
            $(
                $(#[$($meta:tt)*])*
                $name:ident $type:tt $([$($array:tt)+])? @ $offset:tt
                $({ $($fields:tt)* })? $(;)?
            )*
        }
    )+) => {$(
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug)]
        $visibility enum $block {}

        impl $crate::device::BlockLayout for $block {
            const NAME: &'static str = stringify!($block);
            const SIZE: usize = $size;
            const ALIGN: usize = $crate::__register_block::max_align(
                &[$($crate::__register_block!(@cfg (align $type) [] [$(#[$($meta)*])*])),*]
            );
        }

        impl $block {
            $(
                $crate::__register_block! {
                    @place [$(#[$($meta)*])*] [$visibility] $block $name $type [$($($array)+)?] $offset
                }
            )*
        }

        // Checks every declared offset, used or not.
        $($crate::__register_block! { @cfg (check $block $name) [] [$(#[$($meta)*])*] })*

        $($crate::__register_block! {
            @cfg (type [$visibility] $block $name $type $({$($fields)*})?) [] [$(#[$($meta)*])*]
        })*
    )+};
}

/// The expansion of one register of [`register_block!`].
#[doc(hidden)]
#[macro_export]
macro_rules! __register_block {
    // Of the attributes of a register, only `cfg` is for everything that belongs to the register.
    (@cfg $then:tt [$($kept:tt)*] [#[cfg $condition:tt] $($rest:tt)*]) => {
        $crate::__register_block! { @cfg $then [$($kept)* #[cfg $condition]] [$($rest)*] }
    };
    (@cfg $then:tt $kept:tt [#[$($other:tt)*] $($rest:tt)*]) => {
        $crate::__register_block! { @cfg $then $kept [$($rest)*] }
    };
    (@cfg (align $type:tt) [$($cfg:tt)*] []) => {
        $crate::__register_block::max_align(&[$($cfg)* $crate::__register_block!(@align $type)])
    };
    (@cfg (check $block:ident $name:ident) [$($cfg:tt)*] []) => {
        $($cfg)*
        const _: () = { let _ = $block::$name; };
    };
    (@cfg (type $visibility:tt $block:ident $name:ident $type:tt) $cfg:tt []) => {};
    (@cfg (type $visibility:tt $block:ident $name:ident $type:tt $fields:tt) $cfg:tt []) => {
        $crate::__register_block! { @type $cfg $visibility $block $name $type $fields }
    };

    (@align (ro $raw:ident $($rest:tt)*)) => { ::core::mem::size_of::<$raw>() };
    (@align (wo $raw:ident $($rest:tt)*)) => { ::core::mem::size_of::<$raw>() };
    (@align (block $block:ty)) => { <$block as $crate::device::BlockLayout>::ALIGN };
    (@align ($raw:ident $($rest:tt)*)) => { ::core::mem::size_of::<$raw>() };

    (@place $meta:tt $visibility:tt $block:ident $name:ident (block $inner:ty) $array:tt $offset:tt) => {
        $crate::__register_block! { @block $meta $visibility $block $name ($inner) $array $offset }
    };
    (@place $meta:tt $visibility:tt $block:ident $name:ident (ro $raw:ident) $array:tt $offset:tt) => {
        $crate::__register_block! {
            @register $meta $visibility $block $name ($raw, $raw, ReadOnly) $array $offset
        }
    };
    (@place $meta:tt $visibility:tt $block:ident $name:ident (wo $raw:ident) $array:tt $offset:tt) => {
        $crate::__register_block! {
            @register $meta $visibility $block $name ($raw, $raw, WriteOnly) $array $offset
        }
    };
    (@place $meta:tt $visibility:tt $block:ident $name:ident ($raw:ident) $array:tt $offset:tt) => {
        $crate::__register_block! {
            @register $meta $visibility $block $name ($raw, $raw, ReadWrite) $array $offset
        }
    };
    (
        @place $meta:tt $visibility:tt $block:ident $name:ident (ro $raw:ident => $type:ty)
        $array:tt $offset:tt
    ) => {
        $crate::__register_block! {
            @register $meta $visibility $block $name ($raw, $type, ReadOnly) $array $offset
        }
    };
    (
        @place $meta:tt $visibility:tt $block:ident $name:ident (wo $raw:ident => $type:ty)
        $array:tt $offset:tt
    ) => {
        $crate::__register_block! {
            @register $meta $visibility $block $name ($raw, $type, WriteOnly) $array $offset
        }
    };
    (
        @place $meta:tt $visibility:tt $block:ident $name:ident ($raw:ident => $type:ty)
        $array:tt $offset:tt
    ) => {
        $crate::__register_block! {
            @register $meta $visibility $block $name ($raw, $type, ReadWrite) $array $offset
        }
    };

    (
        @register [$($meta:tt)*] [$visibility:vis] $block:ident $name:ident
        ($raw:ty, $type:ty, $mode:ident) [] $offset:tt
    ) => {
        $($meta)*
        $visibility const $name: $crate::device::RegisterAt<$block, $raw, $type, $crate::device::$mode> =
            $crate::device::RegisterAt::new($offset);
    };
    (
        @register $meta:tt $visibility:tt $block:ident $name:ident ($raw:ty, $type:ty, $mode:ident)
        [$count:expr] $offset:tt
    ) => {
        $crate::__register_block! {
            @register $meta $visibility $block $name ($raw, $type, $mode)
            [$count, stride = ::core::mem::size_of::<$raw>()] $offset
        }
    };
    (
        @register [$($meta:tt)*] [$visibility:vis] $block:ident $name:ident
        ($raw:ty, $type:ty, $mode:ident) [$count:expr, stride = $stride:expr] $offset:tt
    ) => {
        $($meta)*
        $visibility const $name:
            $crate::device::RegisterArrayAt<$block, $raw, $type, $crate::device::$mode> =
            $crate::device::RegisterArrayAt::new($offset, $stride, $count);
    };

    (
        @block [$($meta:tt)*] [$visibility:vis] $block:ident $name:ident ($inner:ty) [] $offset:tt
    ) => {
        $($meta)*
        $visibility const $name: $crate::device::BlockAt<$block, $inner> =
            $crate::device::BlockAt::new($offset);
    };
    (
        @block $meta:tt $visibility:tt $block:ident $name:ident ($inner:ty) [$count:expr] $offset:tt
    ) => {
        $crate::__register_block! {
            @block $meta $visibility $block $name ($inner)
            [$count, stride = <$inner as $crate::device::BlockLayout>::SIZE] $offset
        }
    };
    (
        @block [$($meta:tt)*] [$visibility:vis] $block:ident $name:ident ($inner:ty)
        [$count:expr, stride = $stride:expr] $offset:tt
    ) => {
        $($meta)*
        $visibility const $name: $crate::device::BlockArrayAt<$block, $inner> =
            $crate::device::BlockArrayAt::new($offset, $stride, $count);
    };

    (
        @type $cfg:tt $visibility:tt $block:ident $name:ident (ro $raw:ident => $type:ident) $fields:tt
    ) => {
        $crate::__register_block! { @type $cfg $visibility $block $name ($raw => $type) $fields }
    };
    (
        @type $cfg:tt $visibility:tt $block:ident $name:ident (wo $raw:ident => $type:ident) $fields:tt
    ) => {
        $crate::__register_block! { @type $cfg $visibility $block $name ($raw => $type) $fields }
    };
    (
        @type [$($cfg:tt)*] [$visibility:vis] $block:ident $name:ident ($raw:ident => $type:ident)
        {$($fields:tt)*}
    ) => {
        $($cfg)*
        #[doc = concat!("What [`", stringify!($block), "::", stringify!($name), "`] holds.")]
        #[$crate::__register_block::bitfield($raw)]
        #[derive(PartialEq, Eq)]
        $visibility struct $type {
            $($fields)*
        }
    };
}
