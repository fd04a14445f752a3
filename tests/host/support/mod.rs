//! What several modules of tests use.

pub mod alone;
#[cfg(feature = "emulated")]
pub mod edu;
pub mod few_mappings;
#[cfg(feature = "emulated")]
pub mod fuse;
#[cfg(feature = "emulated")]
pub mod hostile_server;
#[cfg(feature = "emulated")]
pub mod interrupts;
#[cfg(feature = "emulated")]
pub mod lingering;
pub mod logged;
#[cfg(feature = "emulated")]
pub mod memory_files;
#[cfg(feature = "emulated")]
pub mod peer;
pub mod scripted;
#[cfg(feature = "emulated")]
pub mod scripted_client;
#[cfg(feature = "emulated")]
pub mod server;
#[cfg(feature = "emulated")]
pub mod shared;
#[cfg(feature = "emulated")]
pub mod watch;
