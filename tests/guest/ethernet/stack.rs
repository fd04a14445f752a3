//! smoltcp on top of the driver: DHCP, pings, and TCP with stations of QEMU's user network and with its host.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use smoltcp::wire::{Ipv4Address, Ipv4Cidr};
use vfio_remap_ethernet::Settings;

use super::host::{Host, OURS};
use super::on_both;
use crate::machine::Machine;
use crate::{lab, leftovers};

/// What is served, and got, in bytes.
const SIZE: usize = 8 << 20;

#[test]
fn a_stack_has_an_address_pings_and_transfers() {
    const ECHOED: usize = 2 << 20;
    let numbers: String = (1_000_000..=2_048_575).map(|number| format!("{number}\n")).collect();
    assert_eq!(numbers.len(), SIZE);
    let data: Vec<u8> = (0..ECHOED).map(|at| (at * 13 + (at >> 9)) as u8).collect();
    leftovers::none_of(|| {
        on_both(|name, _| {
            for interrupts in [true, false] {
                let mut host = Host::new(name, Settings::DEFAULT.with_interrupts(interrupts));
                // Where the kernel has device files, the card is reached by its own.
                assert_eq!(is_open("/dev/iommu"), lab::kernel() == "patched");
                assert_eq!(is_open("/dev/vfio/vfio"), lab::kernel() != "patched");
                let address = host.configure();
                assert_eq!(address, Ipv4Cidr::new(Ipv4Address::new(10, 0, 2, 15), 24));
                for (sequence, len) in [(1, 56), (2, 1472), (3, 4000)] {
                    host.ping(sequence, len);
                }
                if interrupts {
                    let answer = host.get(50_000);
                    let header =
                        answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
                    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"));
                    assert!(answer[header..] == *numbers.as_bytes(), "{} bytes", answer.len());
                } else {
                    host.echo(50_001, &data);
                }
                let counts = host.device.counts();
                assert!(counts.received_bytes + counts.sent_bytes > ECHOED as u64, "{counts:?}");
                assert_eq!(counts.dropped, 0, "{counts:?}");
                host.stop();
            }
        });
    });
}

#[test]
fn the_host_gets_from_a_server_by_a_forwarded_port() {
    let machine = Mutex::new(Machine::open());
    let say = |command: String| machine.lock().unwrap().say(&command);
    let body: Vec<u8> = (0..SIZE).map(|at| (at * 29 + (at >> 7) + (at >> 15)) as u8).collect();
    let expected = sha256(&body);
    leftovers::none_of(|| {
        on_both(|name, _| {
            let mut host = Host::new(name, Settings::DEFAULT.with_interrupts(true));
            host.configure();
            // The host's kernel chooses a port: other guests may run at the same time.
            let to_us = format!("10.0.2.15:{OURS}");
            let network = format!("net-{name}");
            assert_eq!(say(format!("hostfwd_add {network} tcp:127.0.0.1:0-{to_us}")), "");
            let port = forwarded(&say("info usernet".to_owned()), &network);
            let found = host.served(port, &body);
            let removed = say(format!("hostfwd_remove {network} tcp:127.0.0.1:{port}"));
            assert!(removed.ends_with("removed"), "{removed}");
            assert_eq!(found, expected, "{name}: {:?}", host.device.counts());
            let counts = host.device.counts();
            assert!(counts.sent_bytes > SIZE as u64, "{counts:?}");
            assert_eq!(counts.dropped, 0, "{counts:?}");
            host.stop();
        });
    });
}

/// The port of the host that leads to a network's guest, from QEMU's table of the networks' connections.
fn forwarded(table: &str, network: &str) -> u16 {
    let of_network = table.lines().skip_while(|line| !line.contains(&format!("({network})")));
    let mut row = of_network.skip(1).take_while(|line| !line.starts_with("Hub"));
    let row = row.find(|line| line.contains("[HOST_FORWARD]"));
    let port = row.and_then(|row| row.split_whitespace().nth(3)?.parse().ok());
    port.unwrap_or_else(|| panic!("no port leads to the guest of {network}: {table}"))
}

/// The SHA-256 of bytes, by the guest's own program.
fn sha256(bytes: &[u8]) -> String {
    let mut program = Command::new("sha256sum");
    let mut child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

/// Whether this process has a file open.
fn is_open(path: &str) -> bool {
    let files = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    files
        .filter_map(|file| std::fs::read_link(file.path()).ok())
        .any(|file| file.as_os_str() == path)
}
