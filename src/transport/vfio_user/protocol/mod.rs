//! The vfio-user protocol, version 0.1: what client and server share.
//!
//! The `vfio_user` crate is not used: its client ignores errors and waits without limits.

// The server alone uses some of it.
#![cfg_attr(not(feature = "emulated"), allow(dead_code))]

pub(crate) mod channel;
pub(crate) mod dma;
pub(crate) mod version;
pub(crate) mod wire;
