//! A place in one layout is no place in another, though lifetimes make the one a subtype of the other.

use std::marker::PhantomData;

use vfio_remap::device::{BlockLayout, RegisterAt};

struct Tag<T>(PhantomData<T>);

type Small = Tag<fn(&'static ())>;
type Large = Tag<for<'a> fn(&'a ())>;

impl BlockLayout for Small {
    const NAME: &'static str = "Small";
    const SIZE: usize = 4;
    const ALIGN: usize = 4;
}

impl BlockLayout for Large {
    const NAME: &'static str = "Large";
    const SIZE: usize = 1 << 30;
    const ALIGN: usize = 8;
}

const FAR: RegisterAt<Large, u64> = RegisterAt::new((1 << 30) - 8);

fn main() {
    let _far: RegisterAt<Small, u64> = FAR;
}
