use vfio_remap::register_block;

register_block! {
    Small[0x0c] {
        STRADDLING(u64) @ 0x08;
    }
}

fn main() {}
