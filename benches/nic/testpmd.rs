//! testpmd of DPDK, which is controlled by its standard input and observed by its telemetry
//! (doc.dpdk.org: Testpmd Application User Guide; Telemetry User Guide).

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike};
use vfio_remap::transport::PciDevice;

use super::frame::BURST;
use super::guest::Result;
use super::{Contender, Count, TIME_LIMIT, wait_until};

/// Pages of 2 MiB, and how many MiB of them it takes.
const HUGE_PAGES: u32 = 160;
const MEMORY: u32 = 192;
/// What it says: at once that it takes a command, and the rest when there is much of it, or at its end.
const OUTPUT: &str = "/tmp/testpmd";
const PROMPT: &str = "testpmd> ";
const TELEMETRY: &str = "/var/run/dpdk/bench/dpdk_telemetry.v2";
const STATS: &str = "/ethdev/stats";
/// The most bytes of an answer of the telemetry.
const MOST: usize = 16 << 10;

/// Has what testpmd needs in a guest.
pub fn prepare() -> Result<()> {
    fs::create_dir_all("/var/run")?;
    fs::create_dir_all("/dev/hugepages")?;
    let huge = "hugetlbfs";
    mount(Some(huge), "/dev/hugepages", Some(huge), MsFlags::empty(), None::<&str>)?;
    let count = "/proc/sys/vm/nr_hugepages";
    fs::write(count, HUGE_PAGES.to_string())?;
    let reserved = fs::read_to_string(count)?;
    if reserved.trim() != HUGE_PAGES.to_string() {
        return Err(
            format!("the guest has {} huge pages, not {HUGE_PAGES}", reserved.trim()).into()
        );
    }
    Ok(())
}

/// testpmd, which waits for commands.
pub struct Testpmd {
    child: Child,
    commands: ChildStdin,
    telemetry: File,
    ports: usize,
    /// The command that starts it.
    start: &'static str,
}

impl Testpmd {
    /// It sends frames.
    pub fn sending(card: &PciDevice) -> Result<Self> {
        Self::new(&[card], "txonly", "start")
    }

    /// It sends four bursts at each card, and forwards what comes at the other.
    pub fn forwarding([a, b]: &[PciDevice; 2]) -> Result<Self> {
        Self::new(&[a, b], "io", "start tx_first 4")
    }

    fn new(cards: &[&PciDevice], mode: &str, start: &'static str) -> Result<Self> {
        let output = File::create(OUTPUT)?;
        let mut command = Command::new("dpdk-testpmd");
        command
            .args(["-l", "0,1", "-n", "1", "--file-prefix", "bench", "--iova-mode", "va"])
            .args(["-m", &MEMORY.to_string()])
            .args(["-d", "librte_mempool_ring.so.23", "-d", "librte_net_e1000.so.23"]);
        for card in cards {
            command.args(["-a", &card.address().to_string()]);
        }
        command
            .args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384", "--rxd=256", "--txd=256"])
            .arg(format!("--burst={BURST}"))
            .arg(format!("--forward-mode={mode}"))
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output);
        let mut child = command.spawn().map_err(|error| format!("cannot run testpmd: {error}"))?;
        let commands = child.stdin.take().ok_or("its standard input is a pipe")?;
        // Until then it sets its cards up, which questions about them would disturb.
        wait_until("testpmd takes commands", || Ok(prompts(&mut child)? > 0))?;
        let telemetry = connected()?;
        Ok(Self { child, commands, telemetry, ports: cards.len(), start })
    }

    /// Has it execute a command.
    fn execute(&mut self, command: &str) -> Result<()> {
        let before = prompts(&mut self.child)?;
        writeln!(self.commands, "{command}")?;
        wait_until("testpmd executes a command", || Ok(prompts(&mut self.child)? > before))
    }

    /// Ends it.
    fn quit(&mut self) {
        // It closes its cards.
        let _ = writeln!(self.commands, "quit");
        if wait_until("testpmd ends", || Ok(self.child.try_wait()?.is_some())).is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// Starts it, lets `measure` count its frames, and stops it.
    fn take_turn(&mut self, measure: &mut dyn FnMut(Count) -> Result<()>) -> Result<()> {
        self.execute(self.start)?;
        measure(&mut || self.sent())?;
        self.execute("stop")
    }

    /// Frames that its ports have sent.
    fn sent(&mut self) -> Result<u64> {
        (0..self.ports).try_fold(0, |sum, port| {
            self.telemetry.write_all(format!("{STATS},{port}").as_bytes())?;
            let answer: serde_json::Value = serde_json::from_slice(&message(&mut self.telemetry)?)?;
            let sent = answer[STATS]["opackets"].as_u64();
            Ok(sum + sent.ok_or_else(|| format!("testpmd does not tell what it sent: {answer}"))?)
        })
    }
}

/// How often it has said that it takes a command.
fn prompts(child: &mut Child) -> Result<usize> {
    let said = String::from_utf8_lossy(&fs::read(OUTPUT)?).into_owned();
    if let Some(status) = child.try_wait()? {
        return Err(format!("testpmd ended, {status}: {said}").into());
    }
    Ok(said.matches(PROMPT).count())
}

fn connected() -> Result<File> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(Path::new(TELEMETRY))?)?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(TIME_LIMIT.as_secs() as i64))?;
    let mut telemetry = File::from(socket);
    // It says first who it is.
    message(&mut telemetry)?;
    Ok(telemetry)
}

/// The next message.
fn message(telemetry: &mut File) -> Result<Vec<u8>> {
    let mut bytes = vec![0; MOST];
    let len = telemetry.read(&mut bytes)?;
    if len == 0 {
        let said = fs::read_to_string(OUTPUT)?;
        return Err(format!("testpmd does not answer any more: {said}").into());
    }
    bytes.truncate(len);
    Ok(bytes)
}

impl Contender for Testpmd {
    fn name(&self) -> &'static str {
        "dpdk"
    }

    fn run(&mut self, measure: &mut dyn FnMut(Count) -> Result<()>) -> Result<()> {
        self.take_turn(measure).map_err(|error| {
            self.quit();
            let said = fs::read(OUTPUT).unwrap_or_default();
            format!("{error}\n{}", String::from_utf8_lossy(&said)).into()
        })
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        self.quit();
    }
}
