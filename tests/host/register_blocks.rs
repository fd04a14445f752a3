//! Blocks of registers: what their layouts say is what the device sees, mapped and trapped.

use std::sync::Arc;

use vfio_remap::device::{BlockLayout, IoRegisterBlock};
use vfio_remap::transport::MemoryDevice;
use vfio_remap::{
    Device, ErrorKind, Placement, Region, RegisterBlock, Reservation, Window, register_block,
};

register_block! {
    /// A peripheral of ten registers.
    Peripheral[0x100] {
        ID(ro u32) @ 0x00;
        CONTROL(u32 => Control) @ 0x04 {
            pub enabled: bool,
            #[bits(3)]
            pub mode: u8,
            #[bits(28)]
            __: u32,
        }
        STATUS(ro u32 => Status) @ 0x08;
        ACKNOWLEDGE(wo u32) @ 0x0c;
        ADDRESS(u64) @ 0x10;
        LENGTH(u16) @ 0x18;
        COMMAND(u8) @ 0x1a;
        SCRATCH(u32)[4] @ 0x20;
        SPREAD(u16)[3, stride = 8] @ 0x40;
        CHANNEL(block Channel)[2, stride = 0x40] @ 0x80;
    }

    Channel[0x20] {
        BASE(u64) @ 0x00;
        COUNTERS(ro u32)[2] @ 0x08;
        INNER(block Inner) @ 0x10;
    }

    Inner[0x08] {
        BYTES(u8)[8] @ 0x00;
    }
}

register_block! {
    /// Two revisions of a device.
    Revisions[0x10] {
        ID(ro u32) @ 0x00;
        /// This one is wider than the others, and leaves the block.
        #[cfg(any())]
        OLD(u64 => Mode) @ 0x10 {
            pub fast: bool,
            #[bits(63)]
            __: u64,
        }
        /// The same name at another place.
        #[cfg(all())]
        OLD(u32 => Mode) @ 0x08 {
            pub fast: bool,
            #[bits(31)]
            __: u32,
        }
        #[cfg(any())]
        #[doc(alias = "missing")]
        GONE(ro u64)[2] @ 0x00;
    }
}

#[test]
fn a_register_under_a_false_condition_is_not_there() {
    assert_eq!((Revisions::OLD.offset(), Revisions::ALIGN), (8, 4));
    let device = device();
    let block = window(&device).block::<Revisions>(4).unwrap();
    block.write(Revisions::OLD, Mode::new().with_fast(true));
    assert_eq!(bytes(&device.bar(0).unwrap(), 12), [1, 0, 0, 0]);
    assert_eq!(block.read(Revisions::ID), 0);
}

/// A type of the driver's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Idle,
    Busy,
    Unknown(u32),
}

impl From<u32> for Status {
    fn from(value: u32) -> Self {
        match value {
            0 => Self::Idle,
            1 => Self::Busy,
            other => Self::Unknown(other),
        }
    }
}

fn device() -> Device {
    Device::new(Arc::new(MemoryDevice::new(0x4000).unwrap()))
}

fn window(device: &Device) -> Window {
    device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap()
}

/// The bytes of the device, by another way than the block's.
fn bytes<const N: usize>(bar: &Region<'_>, offset: u64) -> [u8; N] {
    std::array::from_fn(|at| {
        bar.trapped_register::<u8>(offset + at as u64).unwrap().read().unwrap()
    })
}

#[test]
fn registers_lie_where_the_layout_says() {
    let device = device();
    let bar = device.bar(0).unwrap();
    let block = window(&device).block::<Peripheral>(0x1000).unwrap();
    block.write(Peripheral::ADDRESS, 0x1122_3344_5566_7788);
    block.write(Peripheral::LENGTH, 0x99aa);
    block.write_relaxed(Peripheral::COMMAND, 0xbb);
    assert_eq!(
        bytes(&bar, 0x1010),
        [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xaa, 0x99, 0xbb, 0]
    );
    block.write(Peripheral::ACKNOWLEDGE, 0x0102_0304);
    assert_eq!(bytes(&bar, 0x100c), [4, 3, 2, 1]);
    bar.trapped_register::<u32>(0x1000).unwrap().write(0xed).unwrap();
    assert_eq!(block.read(Peripheral::ID), 0xed);
    assert_eq!(block.read_relaxed(Peripheral::LENGTH), 0x99aa);
}

#[test]
fn values_have_the_register_s_type() {
    let device = device();
    let bar = device.bar(0).unwrap();
    let block = window(&device).block::<Peripheral>(0).unwrap();
    block.write(Peripheral::CONTROL, Control::new().with_mode(5));
    block.update(Peripheral::CONTROL, |control| control.with_enabled(true));
    assert_eq!(bytes(&bar, 4), [0b1011, 0, 0, 0]);
    let control = block.read(Peripheral::CONTROL);
    assert_eq!((control.enabled(), control.mode()), (true, 5));
    let status = bar.trapped_register::<u32>(8).unwrap();
    for (value, expected) in [(0, Status::Idle), (1, Status::Busy), (7, Status::Unknown(7))] {
        status.write(value).unwrap();
        assert_eq!(block.read(Peripheral::STATUS), expected);
    }
}

#[test]
fn arrays_and_inner_blocks_have_their_strides() {
    let device = device();
    let bar = device.bar(0).unwrap();
    let block = window(&device).block::<Peripheral>(0).unwrap();
    for index in 0..Peripheral::SCRATCH.count() {
        block.write(Peripheral::SCRATCH.at(index), 1 + index as u32);
    }
    assert_eq!(bytes(&bar, 0x20), [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
    block.write(Peripheral::SPREAD.at(2), 0x1234);
    assert_eq!(bytes(&bar, 0x50), [0x34, 0x12]);
    assert!(Peripheral::SPREAD.try_at(3).is_none() && Peripheral::SPREAD.try_at(2).is_some());

    block.write(Peripheral::CHANNEL.at(1).register(Channel::BASE), 0x55);
    assert_eq!(bytes(&bar, 0xc0), [0x55]);
    let inner = Peripheral::CHANNEL.at(1).block(Channel::INNER);
    block.write(inner.register_array(Inner::BYTES).at(7), 0x66);
    assert_eq!(bytes(&bar, 0xc0 + 0x17), [0x66]);
    let channel: RegisterBlock<Channel> = block.block(Peripheral::CHANNEL.at(1));
    drop(block);
    assert_eq!(channel.read(Channel::BASE), 0x55);
    assert_eq!(channel.read(Channel::INNER.register_array(Inner::BYTES).at(7)), 0x66);
    assert_eq!(channel.block(Channel::INNER).read(Inner::BYTES.at(7)), 0x66);
}

#[test]
#[should_panic = "past the last register"]
fn an_index_past_the_last_register_panics() {
    let _ = Peripheral::SCRATCH.at(4);
}

#[test]
#[should_panic = "past the last block"]
fn an_index_past_the_last_block_panics() {
    let _ = Peripheral::CHANNEL.at(usize::MAX);
}

#[test]
fn a_trapped_block_is_the_same_block() {
    let device = device();
    let bar = device.bar(0).unwrap();
    let mapped: IoRegisterBlock<Peripheral> =
        window(&device).block::<Peripheral>(0x2000).unwrap().into();
    let trapped = bar.trapped_block::<Peripheral>(0x2000).unwrap();
    assert!(mapped.is_mapped() && !trapped.is_mapped());
    for (one, other) in [(&mapped, &trapped), (&trapped, &mapped)] {
        one.write(Peripheral::ADDRESS, 0x1122_3344_5566_7788).unwrap();
        assert_eq!(other.read(Peripheral::ADDRESS).unwrap(), 0x1122_3344_5566_7788);
        one.update(Peripheral::ADDRESS, |address| address + 1).unwrap();
        assert_eq!(other.read(Peripheral::ADDRESS).unwrap(), 0x1122_3344_5566_7789);
        let (one, other) = (one.block(Peripheral::CHANNEL.at(1)), other);
        one.write(Channel::BASE, 7).unwrap();
        let base = Peripheral::CHANNEL.at(1).register(Channel::BASE);
        assert_eq!(other.read(base).unwrap(), 7);
        one.write(Channel::BASE, 0).unwrap();
    }
}

#[test]
fn a_block_that_leaves_its_window_is_refused() {
    let device = device();
    let bar = device.bar(0).unwrap();
    let window = bar.map(0x1000..0x1180, Placement::Anywhere).unwrap();
    window.block::<Peripheral>(0x80).unwrap();
    for offset in [0x88, 0x180, usize::MAX - 0xff, usize::MAX] {
        let error = window.block::<Peripheral>(offset).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    }
    let error = window.block::<Peripheral>(0x44).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unaligned, "{error}");
    window.block::<Inner>(0x41).unwrap();
    bar.trapped_block::<Peripheral>(0x3f00).unwrap();
    for offset in [0x3f08, u64::MAX - 7] {
        let error = bar.trapped_block::<Peripheral>(offset).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    }
    let error = bar.trapped_block::<Peripheral>(4).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unaligned, "{error}");
}

#[test]
fn a_read_only_window_has_read_only_blocks() {
    let device = device();
    let (window, _) = window(&device).duplicate_read_only(Placement::Anywhere).unwrap();
    let error = window.block::<Peripheral>(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    let block = window.read_only_block::<Peripheral>(0).unwrap();
    assert_eq!(block.read(Peripheral::ID), 0);
    let length = block.register(Peripheral::LENGTH);
    device.bar(0).unwrap().trapped_register::<u16>(0x18).unwrap().write(0x1234).unwrap();
    assert_eq!(length.read(), 0x1234);
}

#[test]
fn relocating_under_a_block_is_in_use_by_name() {
    let device = device();
    let mut window = window(&device);
    let block = window.block::<Peripheral>(0).unwrap();
    let clone = block.clone();
    let channel = block.block(Peripheral::CHANNEL.at(0));
    let register = block.register(Peripheral::LENGTH);
    let reservation = Reservation::new(window.addresses().len()).unwrap();
    let failed = window.relocate(Placement::In(reservation)).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::InUse);
    let text = failed.to_string();
    assert!(
        text.contains("the register block Peripheral, 1 registers, clones or DMA mappings"),
        "{text}"
    );

    drop((block, clone, register));
    let failed = window.relocate(Placement::Anywhere).unwrap_err();
    let text = failed.to_string();
    assert!(text.contains("it is held by the register block Peripheral;"), "{text}");

    drop(channel);
    let register = window.register::<u32>(0).unwrap();
    let failed = window.relocate(Placement::Anywhere).unwrap_err();
    let text = failed.to_string();
    assert!(
        text.contains("it is held by 1 registers, clones or DMA mappings of the window;"),
        "{text}"
    );

    drop(register);
    window.relocate(Placement::Anywhere).unwrap();
    assert_eq!(window.block::<Peripheral>(0).unwrap().read(Peripheral::ID), 0);
}

#[test]
fn close_names_a_trapped_block() {
    let device = device();
    let block = device.bar(0).unwrap().trapped_block::<Peripheral>(0x1000).unwrap();
    let channel = block.block(Peripheral::CHANNEL.at(1));
    drop(block);
    let still = device.close().unwrap_err();
    assert_eq!(still.error().kind(), ErrorKind::InUse);
    let text = still.to_string();
    assert!(
        text.contains("the register block Peripheral, bar 0 of memory, 0x1000..0x1100"),
        "{text}"
    );
    drop(channel);
    still.into_device().close().unwrap();
}

/// What must not compile does not, and for its own reason.
#[test]
fn what_a_layout_forbids_does_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
