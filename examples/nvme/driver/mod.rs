//! A driver for NVMe controllers (NVM Express Base 1.4), in safe Rust.
//!
//! From the bottom: [`registers`] and [`doorbells`] are what the controller shows, [`command`], [`status`],
//! [`identify`] and [`log_page`] the layouts of what is exchanged; [`pair`] is a pair of queues and the path
//! that every request takes, [`admin`] the one by which the controller is managed; [`controller`] brings a
//! controller up, resets it and shuts it down, [`queue`] is what a thread does its I/O with.

#![forbid(unsafe_code)]
// The example's commands, and each test, use a part of it.
#![allow(dead_code, unused_imports)]

mod admin;
mod bring_up;
mod command;
mod controller;
mod doorbells;
mod events;
mod identify;
mod log_page;
mod pair;
mod queue;
mod registers;
mod request;
mod status;

pub use controller::{Controller, Settings};
pub use events::AsyncEvent;
pub use identify::{Identity, Namespace};
pub use log_page::{ErrorEntry, Health};
pub use pair::{Done, Refused};
pub use queue::IoQueue;
pub use status::Status;
