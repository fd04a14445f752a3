use vfio_remap::{RegisterBlock, register_block};

register_block! {
    Small[0x10] {
        STATUS(ro u32) @ 0x00;
        COMMAND(wo u32) @ 0x04;
        CONTROL(u32) @ 0x08;
    }
}

fn write(block: &RegisterBlock<Small, vfio_remap::device::ReadOnly>) {
    block.read(Small::CONTROL);
    block.write(Small::CONTROL, 1);
}

fn main() {}
