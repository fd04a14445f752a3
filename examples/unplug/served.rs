//! A device that this program serves to itself, in another process: a BAR of plain memory that is not sealed,
//! so that the server can truncate it. The server does not touch the memory afterwards.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::mkdtemp;
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_remap::transport::VfioUser;
use vfio_remap::{Device, Error, Result};
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};

/// The argument with which this program starts itself as the server.
const SERVE: &str = "--serve-memory";
/// The environment variable that names the server's socket.
const SOCKET: &str = "VFIO_REMAP_UNPLUG_SOCKET";
const SIZE: u64 = 0x4000;
const CONFIG_SIZE: u64 = 256;
const CONFIG: u32 = 7;

/// The server process. Dropping this ends it.
pub struct Served {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    directory: Directory,
}

/// A directory that only this user can enter, for the socket. Dropping this removes it.
pub struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Self> {
        let parent = std::env::temp_dir();
        let made = mkdtemp(&parent.join(format!("{}XXXXXX", Self::prefix())));
        made.map(Self).map_err(|errno| {
            Error::from_errno(errno as i32, "create a directory in", parent.display())
                .with_advice("name one that you may write to: TMPDIR")
        })
    }

    /// What its name begins with; the rest nobody can guess.
    pub fn prefix() -> String {
        format!("vfio-remap-unplug-{}-", std::process::id())
    }

    fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let _ = std::fs::remove_dir(&self.0);
    }
}

impl Served {
    pub fn truncate(&mut self) -> Result<()> {
        self.order("truncate")
    }

    pub fn restore(&mut self) -> Result<()> {
        self.order("restore")
    }

    fn order(&mut self, order: &str) -> Result<()> {
        writeln!(self.orders, "{order}").map_err(|error| failed(&error))?;
        let mut answer = String::new();
        while answer.trim() != order {
            answer.clear();
            match self.answers.read_line(&mut answer) {
                Ok(0) => return Err(failed(&io::Error::other("it has ended"))),
                Ok(_) => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn failed(error: &io::Error) -> Error {
    Error::new(vfio_remap::ErrorKind::Os, "use", "the server of this program's own device")
        .with_reason(error.to_string())
}

/// This program, to be started as the server.
pub fn program() -> Result<Command> {
    let mut program = Command::new(std::env::current_exe().map_err(|error| failed(&error))?);
    program.arg(SERVE);
    Ok(program)
}

/// Starts the server, and connects to it.
pub fn start(mut program: Command) -> Result<(Device, Served)> {
    let directory = Directory::new()?;
    let start = || -> io::Result<Served> {
        program.env(SOCKET, directory.socket()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = program.spawn()?;
        let (orders, answers) = (child.stdin.take(), child.stdout.take());
        let pipes = orders.zip(answers).ok_or_else(|| io::Error::other("it has no pipes"))?;
        let answers = BufReader::new(pipes.1);
        Ok(Served { child, orders: pipes.0, answers, directory })
    };
    let mut served = start().map_err(|error| failed(&error))?;
    // It answers once it listens.
    served.restore()?;
    let device = Device::new(Arc::new(VfioUser::connect(served.directory.socket())?));
    Ok((device, served))
}

/// If this process was started as the server, serves one client, and does as it is told by its parent.
pub fn serve() -> Option<ExitCode> {
    if std::env::args_os().nth(1).as_deref() != Some(OsStr::new(SERVE)) {
        return None;
    }
    Some(match serve_at_socket() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "unplug, serving: {error}");
            ExitCode::FAILURE
        }
    })
}

/// Serves at the socket that the environment names; nothing if it names none.
pub fn serve_at_socket() -> io::Result<()> {
    std::env::var_os(SOCKET).map_or(Ok(()), |socket| serve_at(Path::new(&socket)))
}

fn serve_at(socket: &Path) -> io::Result<()> {
    let memory = File::from(memfd_create("unplug-bar", MFdFlags::MFD_CLOEXEC)?);
    memory.set_len(SIZE)?;
    let region = |index: u32| match index {
        0 => region(index, SIZE, Some(&memory)),
        CONFIG => region(index, CONFIG_SIZE, None),
        _ => region(index, 0, None),
    };
    let irqs = (0..5).map(|index| IrqInfo { index, flags: 0, count: 0 }).collect();
    let server = Server::new(socket, true, irqs, (0..9).map(region).collect())
        .map_err(|error| io::Error::other(error.to_string()))?;
    std::thread::spawn(move || {
        // It ends when the client leaves.
        let _ = server.run(&mut Backend::new());
    });
    for order in io::stdin().lines() {
        let order = order?;
        memory.set_len(if order == "truncate" { 0 } else { SIZE })?;
        writeln!(io::stdout(), "{order}")?;
        io::stdout().flush()?;
    }
    Ok(())
}

fn region(index: u32, size: u64, memory: Option<&File>) -> ServerRegion {
    let mut flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    let mut sparse_areas = Vec::new();
    if memory.is_some() {
        flags |= VFIO_REGION_INFO_FLAG_MMAP;
        sparse_areas.push(SparseArea { area: vfio_region_sparse_mmap_area { offset: 0, size } });
    }
    let argsz = size_of::<vfio_region_info>() as u32;
    let region_info = vfio_region_info { argsz, flags, index, size, ..Default::default() };
    ServerRegion { region_info, sparse_areas, mmap_fd: memory.map(AsRawFd::as_raw_fd) }
}

/// Configuration space: identifiers, and a command register that can be written.
struct Backend {
    config: [u8; CONFIG_SIZE as usize],
}

impl Backend {
    fn new() -> Self {
        let mut config = [0; CONFIG_SIZE as usize];
        // The vendor of QEMU's own devices, and a number that none of them has.
        config[..4].copy_from_slice(&0x11f0_1234u32.to_le_bytes());
        Self { config }
    }

    fn part(&mut self, region: u32, offset: u64, len: usize) -> io::Result<&mut [u8]> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(len).filter(|_| region == CONFIG);
        let part = end.and_then(|end| self.config.get_mut(start..end));
        part.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(self.part(region, offset, data.len())?);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.part(region, offset, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        _: u64,
        _: u64,
        _: u64,
        _: Option<File>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<File>) -> io::Result<()> {
        Ok(())
    }
}
