//! What the compiler makes of a register access: one access to the device, no branch, no call.
//!
//! Read from the code of this very program, which needs an optimised build, and so is one of its own:
//! `cargo test --release --test codegen`.

#![cfg(target_arch = "x86_64")]

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess,
    Register as Cpu,
};
use vfio_remap::device::{Descriptors, DmaRing};
use vfio_remap::{Register, RegisterBlock, register_block};

/// Functions that do one access and nothing else; `extern "C"`, so that arguments are in RDI and RSI.
macro_rules! accessors {
    ($($type:ty: $read:ident $write:ident $read_relaxed:ident $write_relaxed:ident),*) => {
        $(
            #[inline(never)]
            extern "C" fn $read(register: &Register<$type>) -> $type { register.read() }
            #[inline(never)]
            extern "C" fn $read_relaxed(register: &Register<$type>) -> $type { register.read_relaxed() }
            #[inline(never)]
            extern "C" fn $write(register: &Register<$type>, value: $type) { register.write(value) }
            #[inline(never)]
            extern "C" fn $write_relaxed(register: &Register<$type>, value: $type) {
                register.write_relaxed(value)
            }
        )*

        fn accessors() -> Vec<(String, usize, usize, bool)> {
            let mut all = Vec::new();
            $(
                let bytes = size_of::<$type>();
                let name = stringify!($type);
                all.push((format!("read {name}"), $read as *const () as usize, bytes, false));
                all.push((format!("read_relaxed {name}"), $read_relaxed as *const () as usize, bytes, false));
                all.push((format!("write {name}"), $write as *const () as usize, bytes, true));
                all.push((format!("write_relaxed {name}"), $write_relaxed as *const () as usize, bytes, true));
            )*
            all
        }
    };
}

accessors!(
    u8: read8 write8 read_relaxed8 write_relaxed8,
    u16: read16 write16 read_relaxed16 write_relaxed16,
    u32: read32 write32 read_relaxed32 write_relaxed32,
    u64: read64 write64 read_relaxed64 write_relaxed64
);

register_block! {
    Block[0x1000] {
        BYTE(u8) @ 0x01;
        HALF(u16) @ 0x02;
        WORD(u32 => Fields) @ 0x04 {
            pub on: bool,
            #[bits(31)]
            pub rest: u32,
        }
        LONG(u64) @ 0x08;
        WORDS(ro u32)[4] @ 0x10;
        DOORBELLS(wo u32)[64, stride = 8] @ 0x100;
        RINGS(block Ring)[4, stride = 0x40] @ 0x400;
    }

    Ring[0x20] {
        TAIL(u32) @ 0x18;
    }
}

/// As above, through a block. What is read is returned in RAX, so that it is used.
macro_rules! block_accessors {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty = $device:expr, $access:expr;)*) => {
        $(
            #[inline(never)]
            extern "C" fn $name(block: &RegisterBlock<Block>, $($argument: $type),*) -> $result {
                ($access)(block, $($argument),*)
            }
        )*

        fn block_accessors() -> Vec<(&'static str, usize, Vec<(OpAccess, usize)>)> {
            vec![$((stringify!($name), $name as *const () as usize, $device.to_vec())),*]
        }
    };
}

type Here<'a> = &'a RegisterBlock<Block>;
const READ: OpAccess = OpAccess::Read;
const WRITE: OpAccess = OpAccess::Write;

block_accessors! {
    block_read8() -> u8 = [(READ, 1)], |block: Here<'_>| block.read(Block::BYTE);
    block_read16() -> u16 = [(READ, 2)], |block: Here<'_>| block.read(Block::HALF);
    block_read32() -> u32 = [(READ, 4)], |block: Here<'_>| block.read(Block::WORD).rest();
    block_read64() -> u64 = [(READ, 8)], |block: Here<'_>| block.read(Block::LONG);
    block_read_relaxed() -> u64 = [(READ, 8)], |block: Here<'_>| block.read_relaxed(Block::LONG);
    block_read_element() -> u32 = [(READ, 4)], |block: Here<'_>| block.read(Block::WORDS.at(3));
    block_write8(value: u8) -> () = [(WRITE, 1)], |block: Here<'_>, value| block.write(Block::BYTE, value);
    block_write16(value: u16) -> () = [(WRITE, 2)], |block: Here<'_>, value| block.write(Block::HALF, value);
    block_write32(value: bool) -> () = [(WRITE, 4)], |block: Here<'_>, value| {
        block.write(Block::WORD, Fields::new().with_on(value));
    };
    block_write64(value: u64) -> () = [(WRITE, 8)], |block: Here<'_>, value| block.write(Block::LONG, value);
    block_write_relaxed(value: u64) -> () = [(WRITE, 8)], |block: Here<'_>, value| {
        block.write_relaxed(Block::LONG, value);
    };
    block_write_element(value: u32) -> () = [(WRITE, 4)], |block: Here<'_>, value| {
        block.write(Block::DOORBELLS.at(63), value);
    };
    block_write_inner(value: u32) -> () = [(WRITE, 4)], |block: Here<'_>, value| {
        block.write(Block::RINGS.at(2).register(Ring::TAIL), value);
    };
    block_update() -> () = [(READ, 4), (WRITE, 4)], |block: Here<'_>| {
        block.update(Block::WORD, |word| word.with_on(true));
    };
}

/// A descriptor of two words.
#[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct Descriptor {
    address: u64,
    length: u32,
    status: u32,
}

type Ring64 = Descriptors<Descriptor>;

#[inline(never)]
extern "C" fn store_descriptor(ring: &Ring64, index: usize, address: u64, length: u32) {
    ring.store(index, Descriptor { address, length, status: 1 });
}

#[inline(never)]
extern "C" fn release_descriptor(ring: &Ring64, index: usize, address: u64, length: u32) {
    ring.store_release(index, Descriptor { address, length, status: 1 });
}

#[inline(never)]
extern "C" fn load_descriptor(ring: &Ring64, index: usize) -> u64 {
    let Descriptor { address, length, status } = ring.load(index);
    address ^ u64::from(length) ^ u64::from(status)
}

#[inline(never)]
extern "C" fn store_at_position(ring: &DmaRing<u64, 4>, value: u64) {
    let entry = ring.entry();
    entry.store::<1>(value);
    entry.store::<3>(value);
}

/// The instructions of a function up to its `ret`; a conditional branch, to the panic of a check, is not taken.
fn instructions(address: usize) -> Vec<Instruction> {
    // SAFETY: code of this program, which is mapped readable; a function is followed by others or by
    // padding, and 256 bytes are far less than what follows the last.
    let code = unsafe { std::slice::from_raw_parts(address as *const u8, 256) };
    let mut list = Vec::new();
    for instruction in Decoder::with_ip(64, code, address as u64, DecoderOptions::NONE) {
        list.push(instruction);
        let flow = instruction.flow_control();
        if flow != FlowControl::Next && flow != FlowControl::ConditionalBranch {
            return list;
        }
    }
    panic!("no end within {} instructions", list.len());
}

/// Which accesses a function makes to the device, and how many instructions it has. It has no branch and
/// no call.
fn device_accesses(name: &str, address: usize) -> (Vec<(OpAccess, usize)>, usize) {
    let list = instructions(address);
    let last = list.last().unwrap();
    assert_eq!(last.flow_control(), FlowControl::Return, "{name}: {last:?}");
    let branches = list.iter().any(|one| one.flow_control() == FlowControl::ConditionalBranch);
    assert!(!branches, "{name}");
    let mut factory = InstructionInfoFactory::new();
    let mut device = Vec::new();
    for instruction in &list[..list.len() - 1] {
        for access in factory.info(instruction).used_memory() {
            // The register's own pointer is loaded from behind the argument.
            if access.base() == Cpu::RDI {
                assert_eq!(access.access(), OpAccess::Read, "{name}");
            } else {
                device.push((access.access(), access.memory_size().size()));
            }
        }
    }
    (device, list.len())
}

#[test]
#[cfg_attr(debug_assertions, ignore = "needs an optimised build: --release")]
fn a_register_access_is_one_access_with_no_branch_and_no_call() {
    for (name, address, bytes, writes) in accessors() {
        let expected = if writes { OpAccess::Write } else { OpAccess::Read };
        let (device, instructions) = device_accesses(&name, address);
        assert_eq!(device, [(expected, bytes)], "{name}");
        println!("{name:<20} {instructions} instructions, one {bytes}-byte access");
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "needs an optimised build: --release")]
fn an_access_through_a_block_is_one_access_to_the_device() {
    for (name, address, expected) in block_accessors() {
        let (device, instructions) = device_accesses(name, address);
        assert_eq!(device, expected, "{name}");
        println!("{name:<20} {instructions} instructions");
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "needs an optimised build: --release")]
fn a_descriptor_is_one_access_for_each_word() {
    for (name, address, access, words, most) in [
        ("store", store_descriptor as *const () as usize, WRITE, 2, usize::MAX),
        ("store_release", release_descriptor as *const () as usize, WRITE, 2, usize::MAX),
        ("load", load_descriptor as *const () as usize, READ, 2, usize::MAX),
        // The offsets are parts of the instructions, so these are a pointer and the return.
        ("store_at_position", store_at_position as *const () as usize, WRITE, 2, 2 + 2),
    ] {
        let list = instructions(address);
        assert_eq!(list.last().unwrap().flow_control(), FlowControl::Return, "{name}");
        let mut factory = InstructionInfoFactory::new();
        let mut device = Vec::new();
        for instruction in &list[..list.len() - 1] {
            for used in factory.info(instruction).used_memory() {
                // The ring's own fields lie behind the argument.
                if used.base() != Cpu::RDI && used.base() != Cpu::RSP {
                    // An address that is computed only is no access.
                    if used.access() != OpAccess::NoMemAccess {
                        device.push((used.access(), used.memory_size().size()));
                    }
                }
            }
        }
        assert_eq!(device, vec![(access, 8); words], "{name}");
        println!("{name:<20} {} instructions", list.len());
        assert!(list.len() <= most, "{name}: {list:?}");
    }
}
