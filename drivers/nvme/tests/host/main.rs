//! The driver on models in this process.

mod address_spaces;
mod bad_input;
mod commands;
mod fault_worker;
mod faults;
mod lost_windows;
mod mappings;
mod registers;
mod scripted;
mod waiting;
