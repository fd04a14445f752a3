//! On two processors, one revokes the mapping of a BAR while the other changes it. The kernel log is a
//! part of the result.

use std::time::Duration;

use crate::race::{self, Length};

#[test]
fn moves_against_revocation() {
    let length = Length { time: Duration::from_secs(15), rounds: 1_000 };
    println!("{}", race::moves(&length));
}

#[test]
fn duplicates_against_revocation() {
    let length = Length { time: Duration::from_secs(10), rounds: 500 };
    println!("{}", race::duplicates(&length));
}

#[test]
fn splits_against_revocation() {
    let length = Length { time: Duration::from_secs(5), rounds: 100 };
    println!("{}", race::splits(&length));
}

#[test]
#[ignore = "takes a minute: cargo lab soak, or cargo lab test --kernel patched -- --ignored a_minute"]
fn duplicates_against_revocation_for_a_minute() {
    let length = Length { time: Duration::from_secs(60), rounds: 10_000 };
    println!("{}", race::duplicates(&length));
}

#[test]
#[ignore = "takes a minute: cargo lab soak, or cargo lab test --kernel patched -- --ignored a_minute"]
fn moves_against_revocation_for_a_minute() {
    let length = Length { time: Duration::from_secs(60), rounds: 20_000 };
    println!("{}", race::moves(&length));
}
