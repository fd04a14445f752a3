//! A card that another process has, or that this process serves: it is left quiet, and usable by the next.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use clap::Parser;
use vfio_remap::ErrorKind;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap::emulated::{Edu, Emulated, Server};

use super::commands::frames;
use super::{AMPLE, Scratch, fails, run};
use crate::capture;
use crate::card::{Card, settings};
use crate::files::Files;
use crate::forward;
use crate::options::{Common, Options, Task};
use crate::pcap::Pcap;
use crate::peer::{OFFERED, Peer};
use crate::server as http;
use crate::stack::Stack;
use crate::stop::Stop;
use crate::url::Url;

/// A device that is served to one client after another.
struct Served {
    scratch: Scratch,
    device: Emulated,
}

impl Served {
    fn new(device: Emulated) -> Self {
        Self { scratch: Scratch::new("served"), device }
    }

    /// A card, and the far end of its wire.
    fn card() -> (Self, Port) {
        let (near, far) = Port::pair();
        let card = Emulated::new(Igb::new([2, 0, 0, 0, 0, 1]).with_wire(near)).unwrap();
        (Self::new(card), far)
    }

    fn name(&self) -> String {
        format!("vfio-user:{}", self.scratch.file("socket"))
    }

    /// Serves the next client.
    fn serve(&self) -> JoinHandle<()> {
        let server = Server::bind(self.scratch.path().join("socket"), self.device.clone()).unwrap();
        thread::spawn(move || server.serve().unwrap())
    }

    fn run(&self, words: &[&str]) -> vfio_remap::Result<()> {
        let server = self.serve();
        let done = run(&[words, &["--device", &self.name()]].concat());
        server.join().unwrap();
        done
    }
}

fn options(words: &[&str]) -> Options {
    Options::parse_from(["nic"].iter().chain(words))
}

#[test]
fn a_card_of_a_server_is_usable_after_a_command_has_failed() {
    let (served, far) = Served::card();
    let peer = Peer::start(far, settings(&options(&["info"]).common)).unwrap();
    let error = served.run(&["get", "http://10.0.2.2/none"]).unwrap_err();
    assert!(error.to_string().contains("404"), "{error}");
    // Nothing was connected to: there is no default for a card that is not emulated here.
    let words = ["get", "--device", &served.name()];
    fails(&words, ErrorKind::InvalidInput, &["pass a URL"]);
    let error = served.run(&["info", "--mtu", "9001"]).unwrap_err();
    assert!(error.to_string().contains("9001"), "{error}");
    served.run(&["get", "http://server.test/300000"]).unwrap();
    served.run(&["ping", "--count", "1", "--size", "4000"]).unwrap();
    served.run(&["info"]).unwrap();
    drop(peer);
}

#[test]
fn what_is_served_and_no_card_is_named() {
    let served = Served::new(Emulated::new(Edu::new()).unwrap());
    let error = served.run(&["info"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("1234:11e8"), "{error}");
}

#[test]
fn a_card_that_another_program_has_is_in_use() {
    let (served, _far) = Served::card();
    let server = served.serve();
    let name = served.name();
    let client = vfio_remap::transport::VfioUser::connect(name.strip_prefix("vfio-user:").unwrap());
    let client = client.unwrap();
    fails(&["info", "--device", &name], ErrorKind::InUse, &["socket"]);
    drop(client);
    server.join().unwrap();
    served.run(&["info"]).unwrap();
}

#[test]
fn without_a_link_a_card_is_waited_for_and_then_given_up() {
    let (served, far) = Served::card();
    far.set_up(false);
    let error = served.run(&["ping", "--link-timeout", "1"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    for text in ["no link for 1 s", "cable", "--link-timeout"] {
        assert!(error.to_string().contains(text), "{error}");
    }
    // That is no error for those who look.
    served.run(&["info", "--link-timeout", "1"]).unwrap();
    far.set_up(true);
    // Now there is a link, and no DHCP server.
    let error = served.run(&["ping", "--link-timeout", "5"]).unwrap_err();
    for text in ["by DHCP", "within 5 s", "--address"] {
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn a_tag_of_a_vlan_is_captured_where_it_was() {
    let mut tagged = vec![0xff; 12];
    tagged.extend_from_slice(&[0x81, 0, 0x20, 5, 0x88, 0xb5]);
    tagged.extend(0..50);
    let mut plain = tagged.clone();
    plain.drain(12..16);
    for frame in [tagged, plain] {
        assert!(captured(&frame).contains(&frame));
    }
}

/// What is captured while a frame is sent once more and once more.
fn captured(frame: &[u8]) -> Vec<Vec<u8>> {
    let scratch = Scratch::new("captured");
    let file = scratch.file("frames.pcap");
    let options = options(&["capture", &file, "--count", "1", "--seconds", "60"]);
    let Task::Capture(task) = &options.task else { panic!("it is a capture") };
    let mut pcap = Pcap::create(&task.file, task.snapshot_length).unwrap();
    let stop = Stop::default();
    let done = card(&options.common).run(|card| {
        card.link(&options.common, &stop)?;
        let wire = card.wire.take().unwrap();
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    wire.send(frame);
                    thread::yield_now();
                }
            });
            let done = capture::receive(&options.common, task, &card.nic, &mut pcap, &stop);
            is_over.store(true, Relaxed);
            done
        })
    });
    assert_eq!(done.unwrap().frames, 1);
    frames(&std::fs::read(&file).unwrap())
}

#[test]
fn tagged_frames_go_through_with_and_without_copies() {
    let mut tagged = vec![2; 12];
    tagged.extend_from_slice(&[0x81, 0, 0x20, 5, 0x88, 0xb5]);
    tagged.extend(0..50);
    let options = options(&["forward", "--seconds", "60"]);
    let Task::Forward(task) = &options.task else { panic!("it is to forward") };
    let common = &options.common;
    for copied in [false, true] {
        let (served, far) = Served::card();
        let server = copied.then(|| served.serve());
        let name = if copied { &served.name() } else { "emulated:igb" };
        let settings = settings(common);
        let [first, second] = Card::open_two(common, [name, "emulated:igb"], settings).unwrap();
        let stop = Stop::default();
        let passed = first.run(|first| {
            let left = first.wire.take().unwrap_or(far);
            second.run(|second| {
                let right = second.wire.take().unwrap();
                thread::scope(|scope| {
                    scope.spawn(|| {
                        for (from, to) in [(&left, &right), (&right, &left)] {
                            goes_through(from, to, &tagged);
                        }
                        stop.set();
                    });
                    forward::between(common, task, [&first.nic, &second.nic], None, &stop)
                })
            })
        });
        assert_eq!(passed.unwrap().copied, copied);
        server.into_iter().for_each(|server| server.join().unwrap());
    }
}

/// Sends a frame once more and once more, until it is at the other end.
fn goes_through(from: &Port, to: &Port, frame: &[u8]) {
    let begin = Instant::now();
    loop {
        from.send(frame);
        match to.receive() {
            Some(arrived) => return assert_eq!(arrived, frame),
            None => assert!(begin.elapsed() < AMPLE),
        }
        thread::yield_now();
    }
}

/// A card whose wire is the test's.
fn card(common: &Common) -> Card {
    Card::open(common, settings(common)).unwrap()
}

#[test]
fn a_server_answers_bad_requests_and_goes_on() {
    let scratch = Scratch::new("server");
    std::fs::write(scratch.file("file"), "text").unwrap();
    let (options, stop) = (options(&["info"]), Stop::default());
    let paths = ["/file", "/../file", "/%2e%2e/file", &format!("/{}", "n".repeat(9000)), "/file"];
    let statuses = [200, 403, 403, 431, 200];
    let common = &options.common;
    let (answers, served) = card(common)
        .run(|card| {
            let peer = card.connect(common, &stop)?.unwrap();
            let mut stack = Stack::new(&card.nic, &stop)?;
            stack.configure(common)?;
            let mut server = http::Server::new(&mut stack, 80, Files::open(scratch.path())?);
            for path in paths {
                let path = path.to_owned();
                peer.want(Url { host: OFFERED.to_string(), port: 80, path });
            }
            let (mut answers, mut served) = (Vec::new(), Vec::new());
            stack.run(Some(AMPLE), |stack| {
                served.extend(server.poll(&mut stack.sockets)?);
                answers.extend(peer.fetched());
                Ok((answers.len() == paths.len()).then_some(()))
            })?;
            stack.close()?;
            Ok((answers, served))
        })
        .unwrap();
    assert_eq!(served.iter().map(|served| served.status).collect::<Vec<_>>(), statuses);
    assert_eq!(answers.len(), statuses.len());
    for (answer, status) in answers.into_iter().zip(statuses) {
        match answer {
            Ok(fetched) => assert_eq!((fetched.bytes, status), (4, 200)),
            Err(error) => assert!(error.to_string().contains(&status.to_string()), "{error}"),
        }
    }
}
