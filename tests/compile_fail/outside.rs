use vfio_remap::register_block;

register_block! {
    Small[0x10] {
        LAST(u32) @ 0x0c;
        OUTSIDE(u32) @ 0x10;
    }
}

fn main() {}
