use vfio_remap::{RegisterBlock, register_block};

register_block! {
    Small[0x10] {
        STATUS(ro u32) @ 0x00;
        COMMAND(wo u32) @ 0x04;
        CONTROL(u32) @ 0x08;
    }
}

fn read(block: &RegisterBlock<Small>) -> u32 {
    block.read(Small::CONTROL) + block.read(Small::COMMAND)
}

fn main() {}
