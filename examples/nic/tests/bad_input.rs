//! What cannot be done: the error has the cause and advice.

use std::fs;

use vfio_remap::ErrorKind;

use super::{Scratch, fails, run, start};

#[test]
fn what_is_no_card_is_named() {
    fails(&["info", "--device", "igb"], ErrorKind::InvalidInput, &["\"igb\"", "emulated:igb"]);
    fails(&["info", "--device", "emulated:e1000"], ErrorKind::NotFound, &["e1000", "emulated:igb"]);
    fails(&["info", "--device", "0000:ff:1f.7"], ErrorKind::NotFound, &["0000:ff:1f.7", "lspci"]);
    let missing = "vfio-user:/nowhere/socket";
    fails(&["info", "--device", missing], ErrorKind::NotFound, &["/nowhere/socket"]);
    let words = ["info", "--device", "0000:ff:1f.7", "--tap", "tap0"];
    fails(&words, ErrorKind::Unsupported, &["not emulated", "leave --tap out"]);
}

/// Each device of this machine that is none of these cards is left where it is.
#[test]
fn a_pci_device_of_another_kind_is_named() {
    let Ok(devices) = vfio_remap::transport::Sysfs::default().devices() else { return };
    for device in devices {
        let address = device.address().to_string();
        let (vendor, id) = (device.vendor_id().unwrap(), device.device_id().unwrap());
        if vendor == 0x8086 && [0x10c9, 0x10d3].contains(&id) {
            continue;
        }
        let driver = device.driver();
        let words = ["info", "--device", &address, "--yes-take-it"];
        let ids = format!("{vendor:04x}:{id:04x}");
        fails(&words, ErrorKind::Unsupported, &[&address, &ids, "8086:10c9"]);
        assert_eq!(device.driver(), driver);
    }
}

#[test]
fn more_than_the_card_has_is_refused_with_the_limit() {
    let refused = |words: &[&str], says: &[&str]| fails(words, ErrorKind::OutOfRange, says);
    refused(&["generate", "--queues", "17"], &["17 queues", "has 16"]);
    refused(&["generate", "--queues", "0"], &["0 queues", "1 to 16"]);
    refused(&["info", "--mtu", "9001"], &["9001", "68 to 9000"]);
    refused(&["get", "--mtu", "0"], &["68 to 9000"]);
    refused(&["generate", "--sizes", "63"], &["64 to 1518", "--sizes"]);
    refused(&["generate", "--sizes", "1519"], &["64 to 1518", "--mtu"]);
    refused(&["generate", "--bursts", "257"], &["1 to 256"]);
    refused(&["ping", "--size", "4001"], &["at most 4000"]);
}

#[test]
fn a_station_that_does_not_answer_is_named() {
    use ErrorKind::{InvalidInput, NotFound, Refused, TimedOut};
    let ping = ["ping", "10.0.2.99", "--count", "1", "--timeout", "1"];
    fails(&ping, TimedOut, &["10.0.2.99", "none of 1 pings", "look whether"]);
    let get = ["get", "http://10.0.2.99/", "--timeout", "2"];
    fails(&get, TimedOut, &["10.0.2.99 did not answer for 2 s", "nic ping"]);
    fails(&["get", "http://10.0.2.2:81/"], Refused, &["does not listen on port 81"]);
    fails(&["get", "http://10.0.2.2/none"], Refused, &["404 Not Found"]);
    fails(&["get", "http://10.0.2.2/%2e%2e/"], Refused, &["403 Forbidden"]);
    fails(&["get", "http://nowhere.test/"], NotFound, &["nowhere.test", "10.0.2.2 knows no"]);
    let long = format!("http://{}.test/", "n".repeat(64));
    fails(&["get", &long], InvalidInput, &["correct its name"]);
    // Another network, and no router to it.
    let alone = ["--address", "10.0.2.77/24"];
    let other = ["get", "http://192.0.2.1/", "--timeout", "1"];
    fails(&[&other[..], &alone].concat(), TimedOut, &["192.0.2.1 did not answer"]);
    fails(&[&["get", "http://server.test/"], &alone[..]].concat(), NotFound, &["no DNS", "--dns"]);
    fails(&[&["ping"], &alone[..]].concat(), InvalidInput, &["no router"]);
}

#[test]
fn a_url_that_is_none_is_refused_with_an_example() {
    for url in ["", "server.test", "http://", "https://server.test/", "file:///etc/passwd"] {
        let error = run(&["get", url]).unwrap_err().to_string();
        assert!(error.contains("http://"), "{url:?}: {error}");
    }
}

#[test]
fn a_file_that_cannot_be_written_is_named() {
    let scratch = Scratch::new("unwritable");
    let there = scratch.file("none/frames.pcap");
    let capture = |file: &str, kind, says: &[&str]| fails(&["capture", file], kind, says);
    capture(&there, ErrorKind::NotFound, &[&there, "ENOENT", "name a file"]);
    capture("/dev/full", ErrorKind::Os, &["/dev/full", "ENOSPC", "make room"]);
    capture(scratch.path().to_str().unwrap(), ErrorKind::Os, &["EISDIR"]);
    let get = |file: &str, says| fails(&["get", "--output", file], ErrorKind::Os, says);
    get("/dev/full", &["/dev/full", "ENOSPC", "make room"]);
}

#[test]
fn what_cannot_be_served_is_named() {
    let scratch = Scratch::new("unserved");
    let file = scratch.file("file");
    fails(&["serve", &file], ErrorKind::NotFound, &[&file]);
    fs::write(&file, "").unwrap();
    fails(&["serve", &file], ErrorKind::InvalidInput, &[&file, "no directory"]);
}

/// As the shell sees it.
#[test]
fn an_error_is_exit_status_1_and_a_line() {
    for words in [&["get", "nourl"][..], &["info", "--mtu", "9001"], &["ping", "--size", "9999"]] {
        let output = start(words).wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.starts_with("nic: cannot ") && said.lines().count() == 1, "{said}");
    }
    // A command line that is none has clap's status.
    let output = start(&["get", "--address", "10.0.2.15", "http://a/"]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("such as 10.0.2.15/24"));
}

#[test]
fn an_address_that_no_station_has_is_refused() {
    let network = ["--address", "10.0.2.15/24"];
    for address in ["224.0.0.1", "255.255.255.255", "0.0.0.0"] {
        for words in [
            &[&["--gateway", address], &network[..]].concat()[..],
            &["--dns", address],
            &["--address", &format!("{address}/24")],
        ] {
            let output = start(&[&["ping"], words].concat()).wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(2), "{words:?}");
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(said.contains("a station has no such address"), "{words:?}: {said}");
        }
        // There may be names of such.
        let ping = ["ping", address, "--count", "1", "--timeout", "1"];
        fails(&ping, ErrorKind::TimedOut, &[address, "none of 1 pings"]);
        assert!(run(&["get", &format!("http://{address}/"), "--timeout", "1"]).is_err());
    }
}
