//! The network card's model, by a driver of registers and descriptors.

mod driver;
mod faults;
mod receive;
mod registers;
mod transmit;
mod wires;
