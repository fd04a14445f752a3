//! What the compiler makes of a register access: one access to the device, no branch, no call.
//!
//! Read from the code of this very program, so it needs an optimised build:
//! `cargo test --release --test codegen`.

#![cfg(target_arch = "x86_64")]

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess,
    Register as Cpu,
};
use vfio_remap::Register;

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

/// The instructions of a function up to its `ret`.
fn instructions(address: usize) -> Vec<Instruction> {
    // SAFETY: code of this program, which is mapped readable; a function is followed by others or by
    // padding, and 64 bytes are far less than what follows the last.
    let code = unsafe { std::slice::from_raw_parts(address as *const u8, 64) };
    let mut list = Vec::new();
    for instruction in Decoder::with_ip(64, code, address as u64, DecoderOptions::NONE) {
        list.push(instruction);
        if instruction.flow_control() != FlowControl::Next {
            return list;
        }
    }
    panic!("no end within {} instructions", list.len());
}

#[test]
#[cfg_attr(debug_assertions, ignore = "needs an optimised build: --release")]
fn a_register_access_is_one_access_to_the_device_with_no_branch_and_no_call() {
    for (name, address, bytes, writes) in accessors() {
        let list = instructions(address);
        let last = list.last().unwrap();
        assert_eq!(last.flow_control(), FlowControl::Return, "{name}: {last:?}");
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
        let expected = if writes { OpAccess::Write } else { OpAccess::Read };
        assert_eq!(device, [(expected, bytes)], "{name}");
        println!("{name:<18} {} instructions, one {}-byte access", list.len(), bytes);
    }
}
