//! What commands do on an emulated card.

use std::fs;
use std::io::Read;

use serde_json::json;
use vfio_remap::ErrorKind;

use super::{Scratch, fails, printed, run};
use crate::capture::hello;
use crate::pattern::Pattern;

const CHECKSUM: &str = "fffbd2b9d0196749b49a8acb5bfda88626cc338a7832cc0a09a0a4e411d38801";

#[test]
fn get_alone_gets_sixteen_mebibytes() {
    let got = printed(&["get"]);
    assert_eq!(got["bytes"], 16 << 20, "{got}");
    assert_eq!(got["sha256"], CHECKSUM, "{got}");
    assert_eq!(got["url"], "http://server.test/16MiB");
    assert!(got["seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn what_is_got_is_what_the_server_has() {
    let scratch = Scratch::new("get");
    let output = scratch.file("output");
    let mut expected = Vec::new();
    Pattern::new(300_000).read_to_end(&mut expected).unwrap();
    for path in ["300000", "chunked/300000"] {
        let url = format!("http://server.test/{path}");
        run(&["get", &url, "--output", &output]).unwrap();
        assert!(fs::read(&output).unwrap() == expected, "{path}");
    }
    // Without DHCP, and without DNS.
    let address = ["--address", "10.0.2.77/24"];
    run(&[&["get", "http://10.0.2.2/1000", "--output", &output], &address[..]].concat()).unwrap();
    assert!(fs::read(&output).unwrap() == expected[..1000]);
    let dns = ["--dns", "10.0.2.2", "--gateway", "10.0.2.2"];
    run(&[&["get", "http://server.test/0"], &address[..], &dns].concat()).unwrap();
}

#[test]
fn another_checksum_is_an_error() {
    let other = "0".repeat(64);
    let words = ["get", "http://server.test/1000", "--sha256", &other];
    fails(&words, ErrorKind::Malformed, &["its checksum is", &other, "get it again"]);
    let upper = CHECKSUM.to_uppercase();
    run(&["get", "--sha256", &upper]).unwrap();
}

#[test]
fn pings_of_all_sizes_are_answered() {
    for size in ["0", "56", "1472", "1473", "4000"] {
        let words = ["ping", "--size", size, "--count", "2", "--interval", "10"];
        let pinged = printed(&words);
        let expected = json!({"address": "10.0.2.2", "sent": 2, "received": 2, "wrong": 0});
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&pinged[key], value, "{size}: {pinged}");
        }
        assert!(pinged["min_ms"].as_f64() <= pinged["max_ms"].as_f64(), "{pinged}");
    }
    run(&["ping", "server.test", "--count", "1", "--mtu", "9000"]).unwrap();
}

#[test]
fn pings_in_fragments_that_come_at_once_are_all_answered() {
    let pinged = printed(&["ping", "--size", "4000", "--count", "10", "--interval", "0"]);
    assert_eq!(pinged["received"], 10, "{pinged}");
    assert_eq!(pinged["wrong"], 0, "{pinged}");
}

#[test]
fn a_station_gets_each_file_that_is_served() {
    let scratch = Scratch::new("serve");
    fs::create_dir(scratch.path().join("a b")).unwrap();
    fs::write(scratch.file("empty"), "").unwrap();
    fs::write(scratch.file("a b/c%d"), "text").unwrap();
    fs::write(scratch.file("large"), vec![7; 2_000_000]).unwrap();
    let served = printed(&["serve", scratch.path().to_str().unwrap(), "--port", "8080"]);
    assert_eq!(served["requests"], 3, "{served}");
    assert_eq!(served["bytes"], 2_000_004, "{served}");
    assert_eq!(served["failed"], 0, "{served}");
}

#[test]
fn frames_are_forwarded_both_ways_and_none_is_lost() {
    let forwarded = printed(&["forward", "--seconds", "1"]);
    let directions = forwarded["directions"].as_array().unwrap();
    assert_eq!(directions.len(), 2);
    assert_eq!(forwarded["copied"], false, "{forwarded}");
    for direction in directions {
        assert!(direction["arrived"].as_u64().unwrap() > 0, "{forwarded}");
        assert_eq!(direction["lost"], 0, "{forwarded}");
        assert_eq!(direction["dropped"], 0, "{forwarded}");
        assert!(direction["frames"].as_u64() >= direction["arrived"].as_u64(), "{forwarded}");
    }
}

#[test]
fn each_size_and_burst_is_measured() {
    let words = ["generate", "--milliseconds", "50", "--sizes", "64,1518", "--bursts", "1,256"];
    for queues in ["1", "2"] {
        let generated = printed(&[&words[..], &["--queues", queues]].concat());
        let rates = generated["rates"].as_array().unwrap();
        let cells: Vec<_> = rates.iter().map(|rate| (&rate["size"], &rate["burst"])).collect();
        let expected = [(64, 1), (64, 256), (1518, 1), (1518, 256)];
        assert_eq!(cells.len(), expected.len(), "{generated}");
        for ((size, burst), expected) in cells.into_iter().zip(expected) {
            assert_eq!((size, burst), (&json!(expected.0), &json!(expected.1)));
        }
        for rate in rates {
            assert!(rate["frames_per_second"].as_f64().unwrap() > 0.0, "{generated}");
        }
    }
}

#[test]
fn captured_frames_are_in_the_file() {
    let scratch = Scratch::new("capture");
    let file = scratch.file("frames.pcap");
    let captured = printed(&["capture", &file, "--count", "20"]);
    assert_eq!((&captured["frames"], &captured["missed"]), (&json!(20), &json!(0)));
    let frames = frames(&fs::read(&file).unwrap());
    assert_eq!(frames.len(), 20);
    let text = |frame: &[u8]| String::from_utf8_lossy(&frame[42..]).into_owned();
    let number = |frame: &[u8]| text(frame).split(' ').nth(1).unwrap().parse::<u64>().unwrap();
    let first = number(&frames[0]);
    for (frame, expected) in frames.iter().zip(first..) {
        assert_eq!(frame, &hello(expected));
    }
    // As far as the snapshot goes.
    run(&["capture", &file, "--count", "1", "--snapshot-length", "14"]).unwrap();
    assert_eq!(fs::read(&file).unwrap().len(), 24 + 16 + 14);
}

/// It is no limit.
#[test]
fn a_time_that_no_clock_counts_is_taken() {
    let scratch = Scratch::new("for ever");
    let file = scratch.file("frames.pcap");
    let most = &u64::MAX.to_string()[..];
    let limits = ["--link-timeout", most, "--timeout", most];
    run(&[&["capture", &file, "--count", "1", "--seconds", most], &limits[..]].concat()).unwrap();
    run(&[&["get", "http://server.test/1000"], &limits[..]].concat()).unwrap();
    run(&[&["ping", "--count", "1", "--interval", most], &limits[..]].concat()).unwrap();
}

/// The frames of a capture file.
pub fn frames(file: &[u8]) -> Vec<Vec<u8>> {
    let (mut rest, mut frames) = (&file[24..], Vec::new());
    while let Some((header, after)) = rest.split_at_checked(16) {
        let len = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
        frames.push(after[..len].to_vec());
        rest = &after[len..];
    }
    frames
}

#[test]
fn info_shows_the_card_and_its_link() {
    let info = printed(&["info", "--mtu", "9000"]);
    assert_eq!(info["model"], "Intel 82576");
    assert_eq!(info["mac"], "02:00:00:00:00:01");
    assert_eq!(info["link"], json!({"speed": 1000, "full_duplex": true}));
    assert_eq!((&info["queues"], &info["mtu"]), (&json!(16), &json!(9000)));
    assert_eq!(info["statistics"]["received"], 0);
    // For people.
    crate::perform(&clap::Parser::parse_from(["nic", "info"]), &crate::stop::Stop::default())
        .unwrap();
}
