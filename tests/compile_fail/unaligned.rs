use vfio_remap::register_block;

register_block! {
    Small[0x10] {
        UNALIGNED(u32) @ 0x02;
    }
}

fn main() {}
