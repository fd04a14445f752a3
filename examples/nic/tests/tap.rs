//! A wire to this machine's own network. It requires CAP_NET_ADMIN, `/dev/net/tun` and `ip`; without them, the
//! tests say so and pass.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::Instant;

use vfio_remap::ErrorKind;
use vfio_remap::emulated::igb::Packets;

use super::{AMPLE, Scratch, fails, object, printed, run, start};

/// A TAP interface with an address, removed with this.
struct Tap(String);

impl Tap {
    /// In the network 198.18.`net`.0/24, which is for tests of networks (RFC 2544, RFC 6890).
    fn new(net: u8) -> Option<Self> {
        let name = format!("nic{net}-{}", std::process::id());
        let this = Self(name.clone());
        let address = format!("198.18.{net}.1/24");
        let done = ip(&["tuntap", "add", "dev", &name, "mode", "tap"])
            && ip(&["addr", "add", &address, "dev", &name])
            && ip(&["link", "set", &name, "up"]);
        if !done {
            eprintln!("not tested: there is no TAP interface here");
        }
        done.then_some(this)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        ip(&["link", "del", &self.0]);
    }
}

fn ip(words: &[&str]) -> bool {
    Command::new("ip").args(words).output().is_ok_and(|output| output.status.success())
}

#[test]
fn the_kernel_answers_pings_of_a_card_at_a_tap_interface() {
    let Some(tap) = Tap::new(40) else { return };
    let address = ["--tap", &tap.0, "--address", "198.18.40.2/24"];
    for size in ["56", "1472", "4000"] {
        let words = [&["ping", "198.18.40.1", "--count", "2", "--size", size], &address[..]];
        let pinged = printed(&words.concat());
        assert_eq!((&pinged["received"], &pinged["wrong"]), (&2.into(), &0.into()), "{pinged}");
    }
    // Nobody is there.
    let words = [&["ping", "198.18.40.3", "--count", "1", "--timeout", "1"], &address[..]].concat();
    fails(&words, ErrorKind::TimedOut, &["198.18.40.3"]);
}

#[test]
fn a_client_of_the_kernel_gets_what_is_served_at_a_tap_interface() {
    let Some(tap) = Tap::new(41) else { return };
    let scratch = Scratch::new("tap");
    let content: Vec<u8> = (0..3_000_000u32).map(|at| (at / 7) as u8).collect();
    fs::write(scratch.file("file"), &content).unwrap();
    let directory = scratch.path().to_str().unwrap();
    let words = ["--json", "serve", directory, "--requests", "2", "--tap", &tap.0];
    let program = start(&[&words[..], &["--address", "198.18.41.2/24"]].concat());
    let begin = Instant::now();
    let mut client = loop {
        match TcpStream::connect("198.18.41.2:80") {
            Ok(client) => break client,
            Err(error) => assert!(begin.elapsed() < AMPLE, "{error}"),
        }
    };
    client.set_read_timeout(Some(AMPLE)).unwrap();
    // One that is not done keeps others from nothing.
    client.write_all(b"GET /fi").unwrap();
    let mut got = Vec::new();
    let mut other = TcpStream::connect("198.18.41.2:80").unwrap();
    other.write_all(b"GET /../file HTTP/1.1\r\n\r\n").unwrap();
    other.read_to_end(&mut got).unwrap();
    assert!(got.starts_with(b"HTTP/1.1 403 Forbidden\r\n"));
    got.clear();
    client.write_all(b"le HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    client.read_to_end(&mut got).unwrap();
    assert!(got.ends_with(&content), "{} bytes", got.len());
    let served = object(&program.wait_with_output().unwrap());
    assert_eq!((&served["requests"], &served["failed"]), (&2.into(), &1.into()), "{served}");
}

#[test]
fn a_card_at_a_tap_interface_gets_from_a_server_of_the_kernel() {
    let Some(tap) = Tap::new(42) else { return };
    let listener = std::net::TcpListener::bind("198.18.42.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let server = thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let len = client.read(&mut request).unwrap();
        assert!(request[..len].starts_with(b"GET / HTTP/1.1\r\n"));
        client.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
        for _ in 0..200 {
            client.write_all(b"2710\r\n").unwrap();
            client.write_all(&[b'x'; 10_000]).unwrap();
            client.write_all(b"\r\n").unwrap();
        }
        client.write_all(b"0\r\n\r\n").unwrap();
    });
    let got = printed(&["get", &url, "--tap", &tap.0, "--address", "198.18.42.2/24"]);
    assert_eq!(got["bytes"], 2_000_000);
    server.join().unwrap();
}

#[test]
fn a_tap_interface_that_cannot_be_used_is_named() {
    let long = ["info", "--tap", "sixteen-letters-"];
    if !fs::exists("/dev/net/tun").unwrap() {
        fails(&long, ErrorKind::NotFound, &["/dev/net/tun", "modprobe tun"]);
        return;
    }
    fails(&long, ErrorKind::InvalidInput, &["sixteen-letters-", "1 to 15 bytes"]);
    // One that is no TAP interface: EINVAL, or EPERM without CAP_NET_ADMIN.
    assert!(run(&["info", "--tap", "lo"]).is_err());
    let Some(tap) = Tap::new(43) else { return };
    let wire = Packets::tap(&tap.0).unwrap();
    fails(&["info", "--tap", &tap.0], ErrorKind::InUse, &[&tap.0, "another program"]);
    drop(wire);
    run(&["info", "--tap", &tap.0]).unwrap();
}
