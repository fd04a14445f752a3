//! Devices in other processes, by the vfio-user protocol.
//!
//! The protocol is spoken here rather than by the `vfio_user` crate, whose client ignores errors and
//! waits without end; `wire`, `version` and `channel` serve our server, too.

// Part of it is the server's alone.
#![cfg_attr(not(feature = "emulated"), allow(dead_code))]

pub(crate) mod channel;
mod client;
mod connection;
pub(crate) mod dma;
mod regions;
pub(crate) mod version;
pub(crate) mod wire;

pub use client::VfioUser;
