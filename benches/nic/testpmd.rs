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
/// What it says.
const OUTPUT: &str = "/tmp/testpmd";
const TELEMETRY: &str = "/var/run/dpdk/bench/dpdk_telemetry.v2";
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
        Self::new(&[card], "txonly", "start\n")
    }

    /// It sends four bursts at each card, and forwards what comes at the other.
    pub fn forwarding([a, b]: &[PciDevice; 2]) -> Result<Self> {
        Self::new(&[a, b], "io", "start tx_first 4\n")
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
        let telemetry = connected(&mut child)?;
        let mut testpmd = Self { child, commands, telemetry, ports: cards.len(), start };
        for port in 0..testpmd.ports {
            testpmd.wait_for_link(port)?;
        }
        Ok(testpmd)
    }

    /// Asks for something of a port, such as `stats`.
    fn ask(&mut self, what: &str, port: usize) -> Result<serde_json::Value> {
        let question = format!("/ethdev/{what}");
        self.telemetry.write_all(format!("{question},{port}").as_bytes())?;
        let mut answer: serde_json::Value = serde_json::from_slice(&message(&mut self.telemetry)?)?;
        Ok(answer[question].take())
    }

    fn wait_for_link(&mut self, port: usize) -> Result<()> {
        wait_until("testpmd's card has a link", || {
            Ok(self.ask("link_status", port)?["status"] == "UP")
        })
    }

    /// Frames that its ports have sent.
    fn sent(&mut self) -> Result<u64> {
        (0..self.ports).try_fold(0, |sum, port| {
            let stats = self.ask("stats", port)?;
            let sent = stats["opackets"].as_u64();
            Ok(sum + sent.ok_or_else(|| format!("testpmd does not tell what it sent: {stats}"))?)
        })
    }
}

/// Waits until it answers.
fn connected(child: &mut Child) -> Result<File> {
    let address = UnixAddr::new(Path::new(TELEMETRY))?;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    wait_until("testpmd answers", || {
        if let Some(status) = child.try_wait()? {
            let said = fs::read_to_string(OUTPUT)?;
            return Err(format!("testpmd ended, {status}: {said}").into());
        }
        Ok(connect(socket.as_raw_fd(), &address).is_ok())
    })?;
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
        self.commands.write_all(self.start.as_bytes())?;
        measure(&mut || self.sent())?;
        self.commands.write_all(b"stop\n")?;
        let mut before = None;
        wait_until("testpmd stops", || {
            let now = Some(self.sent()?);
            Ok(std::mem::replace(&mut before, now) == now)
        })
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // It closes its cards.
        let _ = self.commands.write_all(b"quit\n");
        if wait_until("testpmd ends", || Ok(self.child.try_wait()?.is_some())).is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
