//! Tests the emulated network card with Linux's igb driver.
//!
//! `examples/serve` serves the card, whose wire leads to the user network of a second QEMU that
//! has no guest. The guest's `lab/guest/network` pings, gets and echoes. At the end the
//! statistics of the driver, which are the card's registers, are compared with what the server
//! has counted on the wire.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Guest, Memory, Server};
use crate::boot::Lab;
use crate::cache::{self, Store};
use crate::command;
use crate::cpio::Archive;
use crate::kernels::{Image, Kernel};
use crate::machine;
use crate::modules;
use crate::program::{ETHTOOL, Program};
use crate::root::Root;
use crate::ui;

const INIT: &str = include_str!("../../guest/network");
/// What the guest gets by HTTP, as the host makes it: see [`machine`].
const SERVED: &str = "seq 1000000 2048575 | sha256sum";
/// The longest frame, in bytes, of the guest's MTU of 1,500 bytes.
const LONGEST: u64 = 1514;
/// The bytes of the check sequence, which the card counts.
const CRC: u64 = 4;

/// Boots the guest once. Whether it went well, or there is no QEMU for it.
pub fn test(lab: &Lab, store: &Store, kernel: &'static Kernel) -> Result<bool> {
    let guest = Guest::new(lab, store, kernel, |image| initramfs(image, lab, store))?;
    let Some(guest) = guest else { return Ok(true) };
    let work = cache::work_directory(&lab.logs, "boot-of-")?;
    // In /tmp: a socket's path is short.
    let short = tempfile::tempdir()?;
    let socket = short.path().join("igb");
    let (ours, theirs) = wire()?;
    let said = work.path().join("network");
    let network = Network::start(&lab.root, theirs, fs::File::create(&said)?)?;
    let arguments = ["--wire", "stdin", "--json"];
    let server = Server::start(&guest.program, "igb", &socket, &arguments, ours.into())?;
    let sum = command::output(Command::new("sh").args(["-c", SERVED]))?;
    let sum = sum.split_whitespace().next().context("sha256sum prints a sum")?;
    // The network has no IPv6: nobody would answer.
    let more = format!("lab.sum={sum} ipv6.disable=1");
    let output = guest.boot(Memory::Memfd, work.path(), &socket, "network", &more)?;
    let counts = server.end(&socket)?;
    drop(network);
    let Some(output) = output else {
        let said = fs::read_to_string(said)?;
        ui::error(&format!("vfio-user: the QEMU of the user network has said: {}", said.trim()));
        return Ok(false);
    };
    let counts = counts.parse().context("the server prints counts as JSON")?;
    let differences = differences(&statistics(&output), &counts);
    if !differences.is_empty() {
        let text = differences.join("\n");
        ui::error(&format!(
            "vfio-user: the driver's statistics are not those of the wire:\n{text}"
        ));
    }
    Ok(differences.is_empty())
}

/// Two sockets that are connected to each other. A datagram is a frame. Those of UDP have more
/// room than those of a Unix domain, which lose what comes after ten.
fn wire() -> Result<(OwnedFd, OwnedFd)> {
    let one = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    one.connect(other.local_addr()?)?;
    other.connect(one.local_addr()?)?;
    Ok((one.into(), other.into()))
}

/// A user network at a wire. Dropping this ends it.
struct Network(Child);

impl Network {
    /// `errors` is for what it says.
    fn start(root: &Root, wire: OwnedFd, errors: fs::File) -> Result<Self> {
        let child = root
            .qemu()
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-M", "none"])
            .args(["-netdev", machine::SILENT_USER_NETWORK])
            // Descriptor 0: its standard input.
            .args(["-netdev", "dgram,id=wire,local.type=fd,local.str=0"])
            .args(["-netdev", "hubport,id=port-0,hubid=0,netdev=user"])
            .args(["-netdev", "hubport,id=port-1,hubid=0,netdev=wire"])
            .stdin(Stdio::from(wire))
            .stderr(errors)
            .spawn()
            .context("cannot run setpriv (package util-linux)")?;
        Ok(Self(child))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Both fail only for a child that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn initramfs(image: &Image, lab: &Lab, store: &Store) -> Result<Vec<u8>> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "lab", "lab/modules", "proc", "sys", "tmp"] {
        archive.directory(directory);
    }
    archive.file("init", INIT.as_bytes());
    archive.file("bin/busybox", &read(&lab.busybox)?);
    for (path, file) in Program::ensure(store, &ETHTOOL)?.files()? {
        archive.file_in_directories(&path, &read(&file)?);
    }
    for module in image.modules(&modules::NETWORK)? {
        let name = module.file_name().context("a module is a file")?.to_string_lossy();
        archive.file(&format!("lab/modules/{name}"), &read(&module)?);
    }
    Ok(archive.finish())
}

/// What `ethtool -S` has printed: names and numbers.
fn statistics(output: &str) -> BTreeMap<&str, u64> {
    let lines = output.lines().filter_map(|line| line.trim().split_once(": "));
    lines.filter_map(|(name, value)| Some((name, value.trim().parse().ok()?))).collect()
}

/// What is wrong with the statistics of a driver that was to send and receive all that has
/// passed the wire.
fn differences(statistics: &BTreeMap<&str, u64>, counts: &Value) -> Vec<String> {
    let mut differences = Vec::new();
    let mut check =
        |name: &str, wanted: &str, is_right: &dyn Fn(u64) -> bool| match statistics.get(name) {
            None => differences.push(format!("there is no {name}")),
            Some(value) if !is_right(*value) => {
                differences.push(format!("{name} is {value}, and not {wanted}"));
            }
            Some(_) => {}
        };
    for (prefix, direction) in [("rx", "received"), ("tx", "sent")] {
        // No count is nothing that a statistic could be.
        let count = |name: &str| counts[direction][name].as_u64().unwrap_or(u64::MAX);
        let octets = count("bytes").wrapping_add(CRC.wrapping_mul(count("frames")));
        for (name, wanted) in [
            ("packets", count("frames")),
            ("bytes", octets),
            ("broadcast", count("broadcast")),
            ("multicast", count("multicast")),
        ] {
            let name = format!("{prefix}_{name}");
            check(&name, &wanted.to_string(), &|value| value == wanted);
        }
    }
    for name in ["rx_errors", "tx_errors", "tx_dropped", "rx_missed_errors"] {
        check(name, "0", &|value| value == 0);
    }
    // The card has made segments, each of which is a frame.
    check("tx_tcp_seg_good", "more than 0", &|value| value > 0);
    let longest = counts["sent"]["longest"].as_u64();
    if longest.is_none_or(|longest| longest > LONGEST) {
        differences.push(format!("the longest frame sent has {longest:?} bytes"));
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = "+ ethtool -S eth0\nNIC statistics:\n     rx_packets: 2\n     rx_bytes: 138\n\
        rx_broadcast: 0\nrx_multicast: 0\ntx_packets: 3\ntx_bytes: 1700\ntx_broadcast: 1\n\
        tx_multicast: 0\nrx_errors: 0\ntx_errors: 0\ntx_dropped: 0\nrx_missed_errors: 0\n\
        tx_tcp_seg_good: 1\n";

    fn counts(sent_bytes: u64, longest: u64) -> Value {
        serde_json::json!({
            "sent": { "frames": 3, "bytes": sent_bytes, "broadcast": 1, "multicast": 0,
                      "longest": longest },
            "received": { "frames": 2, "bytes": 130, "broadcast": 0, "multicast": 0, "longest": 70 },
        })
    }

    #[test]
    fn statistics_that_are_those_of_the_wire_differ_in_nothing() {
        let found = differences(&statistics(PRINTED), &counts(1688, 1514));
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn what_differs_or_is_missing_is_named() {
        let found = differences(&statistics(PRINTED), &counts(1689, 1515));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("tx_bytes is 1700, and not 1701"), "{found:?}");
        assert!(found[1].contains("1515"), "{found:?}");
        let missing = PRINTED.replace("rx_errors: 0", "rx_errors: 1").replace("tx_errors: 0", "");
        let found = differences(&statistics(&missing), &counts(1688, 1514));
        assert_eq!(found, ["rx_errors is 1, and not 0", "there is no tx_errors"]);
        assert!(!differences(&statistics(PRINTED), &Value::Null).is_empty());
    }
}
