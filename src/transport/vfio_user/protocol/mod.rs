//! The vfio-user protocol, version 0.1: what client and server share.
//!
//! The `vfio_user` crate is not used: its client ignores errors and waits without limits.

#![cfg_attr(not(feature = "emulated"), expect(dead_code, reason = "the server alone uses it"))]

pub(crate) mod channel;
pub(crate) mod dma;
pub(crate) mod version;
pub(crate) mod wire;
