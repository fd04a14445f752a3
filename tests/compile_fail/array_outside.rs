use vfio_remap::register_block;

register_block! {
    Small[0x10] {
        ARRAY(u32)[3, stride = 8] @ 0x00;
    }
}

fn main() {}
