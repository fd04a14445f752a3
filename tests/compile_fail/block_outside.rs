use vfio_remap::register_block;

register_block! {
    Ring[0x40] {
        TAIL(u32) @ 0x18;
    }

    Nic[0x100] {
        RING(block Ring)[5] @ 0x00;
    }
}

fn main() {}
