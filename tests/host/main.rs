//! The tests that need neither a guest nor an optimised build.
//!
//! They are threads of one process. A test that forks, counts or fills what its process has, or changes
//! what a process has one of is [`alone`](support::alone::alone).

mod common;
mod support;

#[cfg(feature = "emulated")]
mod async_interrupts;
#[cfg(feature = "emulated")]
mod children;
mod dma;
mod dma_arena;
mod dma_bufs;
#[cfg(feature = "emulated")]
mod drivers;
#[cfg(feature = "emulated")]
mod emulated;
#[cfg(feature = "emulated")]
mod emulated_igb;
#[cfg(feature = "emulated")]
mod emulated_nvme;
mod guards;
#[cfg(all(feature = "emulated", feature = "vm-memory"))]
mod guest_memory;
mod invalid_arguments;
mod layers;
#[cfg(feature = "emulated")]
mod liveness;
#[cfg(all(feature = "emulated", feature = "passthrough"))]
mod passthrough;
mod pci;
mod properties;
mod refusals;
mod regions;
mod register_blocks;
mod relocation_under_contention;
mod reservation_pool;
#[cfg(feature = "emulated")]
mod returned_on_failure;
mod revocation;
mod transport;
#[cfg(feature = "emulated")]
mod vectors;
#[cfg(feature = "emulated")]
mod vfio_user;
