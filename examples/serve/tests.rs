use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use vfio_remap::transport::{Transport, VfioUser};

use super::namespace::{Source, Spec};
use super::{Options, serve};

const ARGUMENTS: &str = "VFIO_REMAP_TEST_SERVE";
const AMPLE: Duration = Duration::from_secs(60);

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("vfio-remap-serve-{}-{name}", std::process::id()))
}

/// The program in a process of its own: this test binary, whose test `serves` is it.
fn start(arguments: &[&str]) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "tests::serves", "--nocapture"])
        .env(ARGUMENTS, arguments.join("\n"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
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
        let begin = Instant::now();
        let client = loop {
            match VfioUser::connect(socket) {
                Ok(client) => break client,
                Err(error) => assert!(begin.elapsed() < AMPLE, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(client.info().name, format!("vfio-user:{socket}"));
        assert!(fs::metadata(socket).unwrap().file_type().is_socket());
        // While a client is served.
        let id = program.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
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
    fs::remove_file(short).unwrap();
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
