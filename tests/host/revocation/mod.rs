//! Windows are revoked and restored, and faults in them are contained.

mod config_writes;
mod guard;
mod other_handlers;
mod peers;
mod races;
#[cfg(feature = "emulated")]
mod server_gone;
mod truncatable;
mod verbs;
