//! What tests in guests use, too: all of it.

pub mod contention;
#[cfg(all(feature = "emulated", feature = "vm-memory"))]
pub mod guest_memory;
#[cfg(feature = "emulated")]
pub mod interrupts_in_turn;
#[cfg(feature = "emulated")]
pub mod leftovers;
pub mod probe;
