//! What a guest does with a device that is passed through to it, and what such a device says of itself.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_remap_fuzz::{passthrough, start};

fuzz_target!(
    init: { start(passthrough::seeds) },
    |input: &[u8]| passthrough::drive(input)
);
