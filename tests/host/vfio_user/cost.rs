//! What a trapped access over the socket costs, against a bare round trip of the same bytes.
//!
//! `cargo test --release --test host vfio_user::cost -- --ignored --nocapture`

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::support::{edu, server};

/// Few enough that some rounds go by without the machine doing anything else.
const ACCESSES: u32 = 500;
const ROUNDS: u32 = 400;
const REQUEST: usize = 32;
const REPLY: usize = 36;

/// Nanoseconds for each round.
fn each(mut round: impl FnMut()) -> f64 {
    let start = Instant::now();
    (0..ACCESSES).for_each(|_| round());
    start.elapsed().as_nanos() as f64 / f64::from(ACCESSES)
}

#[test]
#[ignore = "a measurement: needs an optimised build and a machine that does nothing else"]
fn a_trapped_access_costs_at_most_a_fifth_over_a_round_trip() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let echo = std::thread::spawn(move || {
        let mut request = [0; REQUEST];
        while theirs.read_exact(&mut request).is_ok() {
            theirs.write_all(&[7; REPLY]).unwrap();
        }
    });
    let mut reply = [0; REPLY];
    server::with_edu(|client| {
        // Taking turns, so that both see the same machine; the best of each.
        let (mut bare, mut access) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..ROUNDS {
            bare = bare.min(each(|| {
                ours.write_all(&[1; REQUEST]).unwrap();
                ours.read_exact(&mut reply).unwrap();
            }));
            access = access.min(each(|| assert_eq!(edu::read(&client, 0), 0x0100_00ed)));
        }
        println!("bare {bare:.0} ns, access {access:.0} ns: {:.2} times", access / bare);
        assert!(access <= 1.2 * bare);
    });
    drop(ours);
    echo.join().unwrap();
}
