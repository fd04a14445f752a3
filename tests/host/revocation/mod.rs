//! Windows are revoked and restored, and faults in them are contained.

mod guard;
mod other_handlers;
mod races;
mod truncatable;
mod verbs;
