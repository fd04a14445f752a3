//! The vfio-user protocol, version 0.1: what its client and its server share.
//!
//! It is spoken here rather than by the `vfio_user` crate, whose client ignores errors and waits without
//! end.

// Part of it is the server's alone.
#![cfg_attr(not(feature = "emulated"), allow(dead_code))]

pub(crate) mod channel;
pub(crate) mod dma;
pub(crate) mod version;
pub(crate) mod wire;
