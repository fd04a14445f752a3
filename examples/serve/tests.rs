use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use vfio_remap::Device;
use vfio_remap::transport::{Transport, VfioUser};

use super::namespace::{Source, Spec};
use super::wire::{Mac, WireSpec};
use super::{Options, serve};

const ARGUMENTS: &str = "VFIO_REMAP_TEST_SERVE";
const AMPLE: Duration = Duration::from_secs(60);

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("vfio-remap-serve-{}-{name}", std::process::id()))
}

/// The program in a process of its own: this test binary, whose test `serves` is it.
fn start(arguments: &[&str]) -> Child {
    program(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn program(arguments: &[&str]) -> Command {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--ignored", "--exact", "tests::serves", "--nocapture"]);
    program.env(ARGUMENTS, arguments.join("\n"));
    program
}

/// A client of a program that is just starting.
fn connect(socket: &str) -> VfioUser {
    let begin = Instant::now();
    loop {
        match VfioUser::connect(socket) {
            Ok(client) => return client,
            Err(error) => assert!(begin.elapsed() < AMPLE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn send_signal(program: &Child, signal: &str) {
    let id = program.id().to_string();
    assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
}

#[test]
#[ignore = "the program, in a process of its own"]
fn serves() {
    let Some(arguments) = std::env::var_os(ARGUMENTS) else { return };
    let arguments = arguments.into_string().unwrap();
    let Err(error) = serve(Options::parse_from(["serve"].into_iter().chain(arguments.lines())));
    eprintln!("serve: {error}");
    std::process::exit(1);
}

#[test]
fn a_signal_removes_the_socket_and_ends_the_program_well() {
    let (socket, disk) = (path("signal"), path("disk"));
    for signal in ["TERM", "INT"] {
        let [socket, disk] = [&socket, &disk].map(|path| path.to_str().unwrap());
        let namespace = format!("file:{disk},size=1M,block=4096");
        let mut program = start(&["nvme", "--socket", socket, "--namespace", &namespace]);
        let client = connect(socket);
        assert_eq!(client.info().name, format!("vfio-user:{socket}"));
        assert!(fs::metadata(socket).unwrap().file_type().is_socket());
        // While a client is served.
        send_signal(&program, signal);
        let status = program.wait().unwrap();
        assert_eq!((status.code(), status.signal()), (Some(0), None), "{signal}");
        assert!(!fs::exists(socket).unwrap());
        assert_eq!(fs::metadata(disk).unwrap().len(), 1 << 20);
    }
    fs::remove_file(disk).unwrap();
}

#[test]
fn what_cannot_be_served_is_named() {
    let socket = path("refused");
    let socket = socket.to_str().unwrap();
    let serve = |namespace: &str| {
        let program = start(&["nvme", "--socket", socket, "--namespace", namespace]);
        let output = program.wait_with_output().unwrap();
        assert!(!output.status.success(), "{namespace}");
        assert!(!fs::exists(socket).unwrap(), "{namespace}");
        String::from_utf8(output.stderr).unwrap()
    };
    let missing = path("missing");
    let said = serve(&format!("file:{}", missing.display()));
    assert!(said.contains("cannot open") && said.contains(missing.to_str().unwrap()), "{said}");
    let short = path("short");
    fs::write(&short, [0; 1000]).unwrap();
    let said = serve(&format!("file:{}", short.display()));
    assert!(said.contains("1000 bytes"), "{said}");
    let said = serve(&format!("file:{},size=1M", short.display()));
    assert!(said.contains("it has 1000 bytes, and size=1048576 was asked for"), "{said}");
    fs::remove_file(&short).unwrap();
    // Nobody is at its other end: to open it would wait for ever.
    nix::unistd::mkfifo(&short, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for options in ["", ",read-only", ",size=1M"] {
        let said = serve(&format!("file:{}{options}", short.display()));
        assert!(said.contains("it is no regular file"), "{said}");
    }
    fs::remove_file(&short).unwrap();
    // No file is that large.
    for size in ["100", "16777215T"] {
        let said = serve(&format!("file:{},size={size}", missing.display()));
        assert!(said.contains(missing.to_str().unwrap()), "{said}");
        assert!(!missing.exists(), "{said}");
    }
    let said = serve("disk:/tmp/disk");
    assert!(said.contains("--namespace") && said.contains("\"memory:\" or \"file:\""), "{said}");
}

#[test]
fn namespaces_are_understood_or_the_mistake_is_named() {
    let spec = |source, block, read_only| Ok(Spec { source, block, read_only });
    let file = |path: &str, size| Source::File(path.into(), size);
    for (text, expected) in [
        ("memory:64M", spec(Source::Memory(64 << 20), 512, false)),
        ("memory:4096,block=4096,read-only", spec(Source::Memory(4096), 4096, true)),
        ("file:/a,b", spec(file("/a,b", None), 512, false)),
        ("file:a:b,read-only,size=2G", spec(file("a:b", Some(2 << 30)), 512, true)),
    ] {
        assert_eq!(text.parse::<Spec>(), expected, "{text}");
    }
    for (text, says) in [
        ("", "\"memory:\" or \"file:\""),
        ("64M", "\"memory:\" or \"file:\""),
        ("memory:", "\"\" is not a size"),
        ("memory:0", "\"0\" is not a size"),
        ("memory:1X", "\"1X\" is not a size"),
        ("memory:99999999999T", "is not a size"),
        ("memory:1M,block=513", "not \"513\""),
        ("memory:1M,readonly", "no option \"readonly\""),
        ("memory:1M,size=1M", "follows"),
        ("memory:1000", "1000 bytes are not a whole number of blocks of 512"),
        ("file:a,size=512,block=4096", "512 bytes are not a whole number of blocks of 4096"),
        ("file:", "path of the file is missing"),
        ("file:a,size=", "\"\" is not a size"),
    ] {
        let error = text.parse::<Spec>().unwrap_err();
        assert!(error.contains(says), "{text}: {error}");
    }
}

#[test]
fn the_examples_of_the_help_are_understood() {
    let help = super::EXAMPLES.replace("\\\n", " ");
    let examples = help.lines().filter_map(|line| line.trim().strip_prefix("serve "));
    for example in examples {
        let words = ["serve"].into_iter().chain(example.split_whitespace());
        if let Err(error) = Options::try_parse_from(words) {
            panic!("{example}: {error}");
        }
    }
}

/// Registers of the 82576: the datasheet's names.
const CTRL: u64 = 0x0;
const RCTL: u64 = 0x100;
const TCTL: u64 = 0x400;
/// The first receive queue, and the first transmit queue. In each: where its ring is, its length, its tail, its
/// control.
const QUEUES: [u64; 2] = [0xc000, 0xe000];
const RING: [u64; 5] = [0x0, 0x4, 0x8, 0x18, 0x28];
const LINK_UP: u32 = 1 << 6 | 1;
const QUEUE_ENABLED: u32 = 1 << 25;
/// Commands of a legacy transmit descriptor: the end of the frame, and its status is wanted.
const LAST: u64 = 0x09 << 24;

#[test]
fn a_card_passes_frames_by_its_wire_and_counts_them() {
    const DESCRIPTORS: usize = 8;
    let socket = path("igb");
    let socket = socket.to_str().unwrap();
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_read_timeout(Some(AMPLE)).unwrap();
    let capture = path("capture");
    let [address, file] = ["02:00:00:00:00:0A", capture.to_str().unwrap()];
    let arguments = ["igb", "--socket", socket, "--wire", "stdin", "--json"];
    let more = ["--mac", address, "--capture", file];
    let mut program = program(&[&arguments[..], &more].concat());
    let program = program.stdin(OwnedFd::from(ours)).stdout(Stdio::piped()).spawn().unwrap();
    let device = Device::new(Arc::new(connect(socket)));
    let config = device.config().unwrap();
    config.set_memory_decoding(true).unwrap();
    config.set_bus_mastering(true).unwrap();
    let bar = device.bar(0).unwrap();
    let register = |at| bar.trapped_register::<u32>(at).unwrap();
    let write = |at, value| register(at).write(value).unwrap();
    write(CTRL, LINK_UP);
    let begin = Instant::now();
    while register(0x8).read().unwrap() & 2 == 0 {
        assert!(begin.elapsed() < AMPLE, "no link");
    }
    // The address that it has from its EEPROM.
    assert_eq!(register(0x5400).read().unwrap(), 2);
    assert_eq!(register(0x5404).read().unwrap() & 0xffff, 0x0a00);

    let memory = device.dma().unwrap().buffer(0x4000).unwrap();
    let start = |queue: usize, entry: [u64; 2]| {
        let ring = 0x1000 * queue;
        memory.write(ring, entry.map(u64::to_le_bytes).as_flattened());
        let iova = memory.iova().0 + ring as u64;
        let values = [iova as u32, (iova >> 32) as u32, 16 * DESCRIPTORS as u32, 0, QUEUE_ENABLED];
        for (at, value) in RING.iter().zip(values) {
            write(QUEUES[queue] + at, value);
        }
    };
    let data = memory.iova().0 + 0x2000;
    start(0, [data, 0]);
    start(1, [data + 0x1000, LAST | 100]);
    write(RCTL, 0x0400_8022);
    write(TCTL, 0x0004_00fa);
    let outgoing: Vec<u8> = (0..100).map(|at| at as u8 | 2).collect();
    memory.write(0x3000, &outgoing);
    // One descriptor for each.
    QUEUES.iter().for_each(|queue| write(queue + 0x18, 1));
    let mut bytes = [0; 2000];
    let len = theirs.recv(&mut bytes).unwrap();
    assert_eq!(bytes[..len], outgoing);
    let incoming = [&[0xff; 6][..], &[5; 70]].concat();
    theirs.send(&incoming).unwrap();
    let mut status = [0; 1];
    while status[0] & 1 == 0 {
        assert!(begin.elapsed() < 2 * AMPLE, "no frame was received");
        memory.read(12, &mut status);
    }
    let mut found = vec![0; incoming.len()];
    memory.read(0x2000, &mut found);
    assert_eq!(found, incoming);

    send_signal(&program, "TERM");
    let output = program.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    let counts = said.lines().find(|line| line.starts_with('{')).expect("counts");
    let expected = serde_json::json!({
        "sent": { "frames": 1, "bytes": 100, "broadcast": 0, "multicast": 0, "longest": 100 },
        "received": { "frames": 1, "bytes": 76, "broadcast": 1, "multicast": 0, "longest": 76 },
    });
    assert_eq!(counts.parse::<serde_json::Value>().unwrap(), expected);
    // A header, and two frames with theirs.
    assert_eq!(fs::metadata(&capture).unwrap().len(), 24 + 2 * 16 + 100 + 76);
    fs::remove_file(capture).unwrap();
}

#[test]
fn wires_and_addresses_are_understood_or_the_mistake_is_named() {
    let udp = |ours: &str, theirs: &str| WireSpec::Udp {
        ours: ours.parse().unwrap(),
        theirs: theirs.parse().unwrap(),
    };
    let (ours, theirs) = ("127.0.0.1:5000", "[::1]:5001");
    assert_eq!(format!("udp:{ours},{theirs}").parse(), Ok(udp(ours, theirs)));
    assert_eq!("stdin".parse(), Ok(WireSpec::Stdin));
    assert_eq!("tap:a,b".parse(), Ok(WireSpec::Tap("a,b".to_owned())));
    for (text, says) in [
        ("", "begins with \"udp:\""),
        ("tap0", "begins with \"udp:\" or \"tap:\""),
        ("tap:", "name of the interface is missing"),
        ("udp:127.0.0.1:5000", "two addresses"),
        ("udp:127.0.0.1,127.0.0.1:5001", "\"127.0.0.1\" is no address with a port"),
    ] {
        let error = text.parse::<WireSpec>().unwrap_err();
        assert!(error.contains(says), "{text}: {error}");
    }
    assert_eq!("52:54:00:aB:00:ff".parse(), Ok(Mac([0x52, 0x54, 0, 0xab, 0, 0xff])));
    for text in ["", "52:54:00:12:34", "52:54:00:12:34:5", "52:54:00:12:34:+5", "5254.0012.3456"] {
        let error = text.parse::<Mac>().unwrap_err();
        assert!(error.contains("is no address of Ethernet"), "{text}: {error}");
    }
    assert!("01:00:5e:00:00:01".parse::<Mac>().unwrap_err().contains("of a group"));
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let here = taken.local_addr().unwrap();
    let error = WireSpec::Udp { ours: here, theirs: here }.open().unwrap_err().to_string();
    assert!(error.contains(&format!("cannot listen at udp:{here}")), "{error}");
    let error = WireSpec::Tap("longer-than-15-bytes".to_owned()).open().unwrap_err().to_string();
    assert!(error.contains("/dev/net/tun") || error.contains("longer-than-15-bytes"), "{error}");
}
