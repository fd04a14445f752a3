//! Whole messages over a stream socket. Each wait has a deadline, and the peer is not trusted.

use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;

use super::version::{MAX_FDS, MAX_TRANSFER};
use super::wire::Header;
use crate::sys::socket::{self, Received};
use crate::sys::stream::Stream;

/// The longest message that is accepted: the most data, and the fields before them.
const MAX_MESSAGE: usize = MAX_TRANSFER + 4096;

/// A message that has arrived.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    /// The descriptors that came with it.
    pub(crate) fds: Descriptors,
}

/// Descriptors that a peer has sent. What is left of them is [discarded](discard).
#[derive(Debug, Default)]
pub(crate) struct Descriptors(Vec<OwnedFd>);

impl Descriptors {
    pub(crate) fn take(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.0)
    }
}

impl Deref for Descriptors {
    type Target = Vec<OwnedFd>;

    fn deref(&self) -> &Vec<OwnedFd> {
        &self.0
    }
}

impl DerefMut for Descriptors {
    fn deref_mut(&mut self) -> &mut Vec<OwnedFd> {
        &mut self.0
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        discard(self.take());
    }
}

/// Why a channel cannot be used any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The peer has closed the socket, possibly in the middle of a message.
    Closed { cut_short: bool },
    /// The peer has not taken or sent a message in time.
    Silent(Duration),
    /// The peer has sent something that breaks the protocol.
    Malformed(String),
    /// The socket failed.
    Os(Errno),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { cut_short: false } => f.write_str("the peer has closed the connection"),
            Self::Closed { cut_short: true } => {
                f.write_str("the peer has closed the connection in the middle of a message")
            }
            Self::Silent(time) => write!(f, "the peer did not answer within {time:?}"),
            Self::Malformed(what) => f.write_str(what),
            Self::Os(errno) => f.write_str(&crate::error::describe(*errno)),
        }
    }
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EPIPE | Errno::ECONNRESET => Self::Closed { cut_short: false },
            errno => Self::Os(errno),
        }
    }
}

/// Closes descriptors that a peer has sent and nobody wants. A thread does it: closing a file may wait for the
/// process that serves its file system (FUSE).
pub(crate) fn discard(fds: Vec<OwnedFd>) {
    if !fds.is_empty() {
        let thread = thread::Builder::new().name("vfio-user discard".to_owned());
        if let Err(error) = thread.spawn(move || drop(fds)) {
            log::debug!("descriptors were closed here: {error}");
        }
    }
}

/// A time limit that sockets and clocks accept. A socket takes zero for no limit, and a clock cannot add more
/// than some centuries.
pub(crate) fn within_reason(time: Duration) -> Duration {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    time.clamp(Duration::from_millis(1), CENTURY)
}

/// When an exchange must end, whatever happens in it. The first wait for a message is the socket's own
/// (`SO_RCVTIMEO`), which costs no system call, unless the exchange has waited before.
#[derive(Debug)]
pub(crate) struct Deadline {
    until: Instant,
    time: Duration,
    waited: bool,
}

impl Deadline {
    /// For an exchange that begins now and may take `time`, which is also the socket's receive timeout.
    pub(crate) fn new(time: Duration) -> Self {
        Self { until: Instant::now() + time, time, waited: false }
    }

    /// The same for a socket with another receive timeout, or after a wait: all waits are by `poll(2)`.
    pub(crate) fn by_poll(self) -> Self {
        Self { waited: true, ..self }
    }

    /// How much time is left.
    pub(crate) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// `Silent` once the time is over.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        if self.left().is_zero() { Err(Fault::Silent(self.time)) } else { Ok(()) }
    }

    /// Waits until the socket is ready; `Silent` at the deadline.
    fn wait(&mut self, stream: &Stream, events: PollFlags) -> Result<(), Fault> {
        self.waited = true;
        loop {
            self.check()?;
            // Rounded up, so that the last millisecond is not spent in a loop.
            let left = self.left().saturating_add(Duration::from_micros(999));
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(stream.as_fd(), events)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Fault::Os(errno)),
            }
        }
    }
}

/// The sending side.
#[derive(Debug)]
pub(crate) struct Sender {
    stream: Arc<Stream>,
}

impl Sender {
    /// Sends a message whole; the descriptors go with its first byte.
    pub(crate) fn send(
        &mut self,
        header: Header,
        parts: [&[u8]; 2],
        fds: &[BorrowedFd<'_>],
        deadline: &mut Deadline,
    ) -> Result<(), Fault> {
        let header = header.encode();
        let mut slices = [IoSlice::new(&header), IoSlice::new(parts[0]), IoSlice::new(parts[1])];
        let mut rest = &mut slices[..];
        let mut fds = fds;
        loop {
            match socket::send(&self.stream, rest, fds) {
                Ok(count) => {
                    IoSlice::advance_slices(&mut rest, count);
                    if rest.iter().all(|part| part.is_empty()) {
                        return Ok(());
                    }
                    fds = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => deadline.wait(&self.stream, PollFlags::POLLOUT)?,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// The receiving side: the bytes and descriptors that have arrived.
#[derive(Debug)]
pub(crate) struct Receiver {
    stream: Arc<Stream>,
    buffer: Vec<u8>,
    /// How much of the buffer is filled.
    filled: usize,
    /// Descriptors, each with the index in the buffer of the last byte that came with it.
    fds: Arriving,
}

/// Descriptors, each with an index. What is left of them is [discarded](discard).
#[derive(Debug, Default)]
struct Arriving(VecDeque<(usize, OwnedFd)>);

impl Arriving {
    /// Takes the first `count`.
    fn take(&mut self, count: usize) -> Vec<OwnedFd> {
        self.0.drain(..count).map(|(_, fd)| fd).collect()
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        discard(self.take(self.0.len()));
    }
}

/// Splits a connected socket into its two sides. `time` becomes its receive timeout.
pub(crate) fn split(stream: UnixStream, time: Duration) -> std::io::Result<(Sender, Receiver)> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(time))?;
    let stream = Arc::new(Stream::new(stream));
    let receiver = Receiver {
        stream: stream.clone(),
        buffer: vec![0; 16 << 10],
        filled: 0,
        fds: Arriving::default(),
    };
    Ok((Sender { stream }, receiver))
}

impl Receiver {
    /// The socket, for waiting on it and for shutting it down.
    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// The descriptors that came, and are not with a message that was taken.
    #[cfg(feature = "emulated")]
    pub(crate) fn take_fds(&mut self) -> Vec<OwnedFd> {
        self.fds.take(self.fds.0.len())
    }

    /// The socket back, if nobody else has it and nothing has come by it.
    #[cfg(feature = "emulated")]
    pub(crate) fn into_idle_stream(self) -> Option<UnixStream> {
        let is_idle = self.filled == 0 && self.fds.0.is_empty();
        Arc::into_inner(self.stream).filter(|_| is_idle).map(Stream::into_inner)
    }

    /// Waits for the next message until the deadline.
    pub(crate) fn receive(&mut self, deadline: &mut Deadline) -> Result<Message, Fault> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(message);
            }
            if std::mem::replace(&mut deadline.waited, true) {
                deadline.wait(&self.stream, PollFlags::POLLIN)?;
                // A socket may be ready without a byte to read (MSG_OOB): the call must not wait for one.
                self.fill(MsgFlags::MSG_DONTWAIT, deadline.time)?;
            } else {
                self.fill(MsgFlags::empty(), deadline.time)?;
            }
        }
    }

    /// Waits for the next message without a limit, on a socket without a receive timeout. Once its first byte
    /// has arrived, the rest may take `time`.
    #[cfg(feature = "emulated")]
    pub(crate) fn receive_idle(&mut self, time: Duration) -> Result<Message, Fault> {
        if let Some(message) = self.take()? {
            return Ok(message);
        }
        while self.filled == 0 {
            self.fill(MsgFlags::empty(), time)?;
        }
        self.receive(&mut Deadline::new(time).by_poll())
    }

    /// The next message if all of it has arrived. Does not wait.
    pub(crate) fn receive_now(&mut self) -> Result<Option<Message>, Fault> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            let before = self.filled;
            self.fill(MsgFlags::MSG_DONTWAIT, Duration::ZERO)?;
            if self.filled == before {
                return Ok(None);
            }
        }
    }

    /// The first message of the buffer, if all of it has arrived.
    pub(crate) fn take(&mut self) -> Result<Option<Message>, Fault> {
        let Some((header, _)) = Header::decode(&self.buffer[..self.filled]) else {
            return Ok(None);
        };
        let size = header.size as usize;
        if !(Header::SIZE..=MAX_MESSAGE).contains(&size) {
            return Err(Fault::Malformed(format!(
                "the peer sent a message of {size} bytes; {} to {MAX_MESSAGE} are allowed",
                Header::SIZE
            )));
        }
        if self.buffer.len() < size {
            self.buffer.resize(size, 0);
        }
        if self.filled < size {
            return Ok(None);
        }
        let body = self.buffer[Header::SIZE..size].to_vec();
        self.buffer.copy_within(size..self.filled, 0);
        self.filled -= size;
        // The kernel ends a read behind the bytes that descriptors were sent with. So descriptors that came
        // with this message's bytes are this message's.
        let ours = self.fds.0.partition_point(|(last, _)| *last < size);
        let fds = Descriptors(self.fds.take(ours));
        self.fds.0.iter_mut().for_each(|(last, _)| *last -= size);
        Ok(Some(Message { header, body, fds }))
    }

    /// Reads what has arrived. Without `MSG_DONTWAIT` it waits once, until the socket's receive timeout or a
    /// signal. The buffer has room whenever it holds no whole message.
    fn fill(&mut self, flags: MsgFlags, time: Duration) -> Result<(), Fault> {
        let buffer = &mut self.buffer[self.filled..];
        match socket::receive(&self.stream, buffer, flags) {
            // The deadline bounds the next wait: signals do not extend it.
            Err(Errno::EINTR) => Ok(()),
            Err(Errno::EAGAIN) if flags.contains(MsgFlags::MSG_DONTWAIT) => Ok(()),
            Err(Errno::EAGAIN) => Err(Fault::Silent(time)),
            other => self.arrived(other?),
        }
    }

    fn arrived(&mut self, received: Received) -> Result<(), Fault> {
        if received.bytes == 0 {
            return Err(Fault::Closed { cut_short: self.filled > 0 });
        }
        self.filled += received.bytes;
        let last = self.filled - 1;
        self.fds.0.extend(received.fds.into_iter().map(|fd| (last, fd)));
        if received.truncated {
            return Err(Fault::Malformed(
                "the peer sent more file descriptors than this process may have".to_owned(),
            ));
        }
        if self.fds.0.len() > MAX_FDS {
            return Err(Fault::Malformed(format!(
                "the peer sent {} file descriptors at once; {MAX_FDS} are allowed",
                self.fds.0.len()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::transport::vfio_user::protocol::wire::command;

    /// The time limit for a silent peer.
    const TIME: Duration = Duration::from_millis(200);
    /// The time limit for an honest peer on a busy machine.
    const AMPLE: Duration = Duration::from_secs(120);

    fn pair(time: Duration) -> (UnixStream, Sender, Receiver) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let (sender, receiver) = split(ours, time).unwrap();
        (theirs, sender, receiver)
    }

    fn message(id: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Header::command(id, command::REGION_READ, body.len()).encode().to_vec();
        bytes.extend(body);
        bytes
    }

    fn receive(receiver: &mut Receiver) -> Result<Message, Fault> {
        receiver.receive(&mut Deadline::new(AMPLE))
    }

    fn send(sender: &mut Sender, id: u16, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = Header::command(id, command::DMA_MAP, body.len());
        sender.send(header, [body, &[]], fds, &mut Deadline::new(AMPLE)).unwrap();
    }

    #[test]
    fn messages_come_whole_however_they_are_cut() {
        let (mut theirs, _sender, mut receiver) = pair(AMPLE);
        let large = vec![7; MAX_TRANSFER];
        let mut bytes = message(1, b"one");
        bytes.extend(message(2, b""));
        bytes.extend(message(3, &large));
        let writer = std::thread::spawn(move || {
            for part in bytes[..60].chunks(1).chain(bytes[60..].chunks(100_001)) {
                theirs.write_all(part).unwrap();
            }
            theirs
        });
        for (id, body) in [(1, &b"one"[..]), (2, b""), (3, &large)] {
            let message = receive(&mut receiver).unwrap();
            assert_eq!((message.header.id, &message.body[..]), (id, body));
        }
        drop(writer.join().unwrap());
        assert_eq!(receive(&mut receiver).unwrap_err(), Fault::Closed { cut_short: false });
    }

    #[test]
    fn descriptors_stay_with_the_message_that_they_came_with() {
        let (theirs, _sender, mut receiver) = pair(AMPLE);
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut sender = split(theirs, AMPLE).unwrap().0;
        for (id, fds) in [(1, 0), (2, 2), (3, 0), (4, 1), (5, 0)] {
            send(&mut sender, id, b"abc", &vec![null.as_fd(); fds]);
        }
        let counts: Vec<usize> =
            (0..5).map(|_| receive(&mut receiver).unwrap().fds.len()).collect();
        assert_eq!(counts, [0, 2, 0, 1, 0]);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for size in [0, 15, MAX_MESSAGE as u32 + 1, u32::MAX] {
            let (mut theirs, _sender, mut receiver) = pair(AMPLE);
            let header = Header { size, ..Header::command(1, command::VERSION, 0) };
            theirs.write_all(&header.encode()).unwrap();
            let fault = receive(&mut receiver).unwrap_err();
            assert!(matches!(fault, Fault::Malformed(_)), "{fault}");
        }
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (theirs, _sender, mut receiver) = pair(AMPLE);
        let (reader, writer) = std::io::pipe().unwrap();
        let mut sender = split(theirs, AMPLE).unwrap().0;
        send(&mut sender, 1, &[], &vec![writer.as_fd(); MAX_FDS + 1]);
        let fault = receive(&mut receiver).unwrap_err();
        assert!(fault.to_string().contains("65 file descriptors"), "{fault}");
        drop((receiver, writer));
        // With every writing end closed, the pipe is at its end.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
    }

    /// One byte after the other: the socket's own timeout never ends.
    #[test]
    fn a_peer_that_trickles_is_given_up_in_time() {
        let (mut theirs, _sender, mut receiver) = pair(TIME);
        let writer = std::thread::spawn(move || {
            for byte in message(1, &[0; 4000]) {
                std::thread::sleep(TIME / 20);
                if theirs.write_all(&[byte]).is_err() {
                    return false;
                }
            }
            true
        });
        let fault = receiver.receive(&mut Deadline::new(TIME)).unwrap_err();
        assert_eq!(fault, Fault::Silent(TIME));
        drop((receiver, _sender));
        // The rest would take twenty seconds more.
        assert!(!writer.join().unwrap(), "all of it was waited for");
    }

    #[test]
    fn a_peer_that_does_not_take_is_given_up_in_time() {
        let (_theirs, mut sender, _receiver) = pair(TIME);
        let body = vec![0; MAX_TRANSFER];
        let header = Header::command(1, command::REGION_WRITE, body.len());
        let fault = (0..4)
            .find_map(|_| sender.send(header, [&body, &[]], &[], &mut Deadline::new(TIME)).err());
        assert_eq!(fault, Some(Fault::Silent(TIME)));
    }

    /// All waits of an exchange share one deadline.
    #[test]
    fn the_waits_of_an_exchange_share_its_time() {
        let (mut theirs, mut sender, mut receiver) = pair(TIME);
        let mut deadline = Deadline::new(TIME);
        let writer = std::thread::spawn(move || {
            // Each message arrives in time. All of them take a hundred times as long.
            (0..200).all(|id| {
                std::thread::sleep(TIME / 2);
                theirs.write_all(&message(id, b"")).is_ok()
            })
        });
        let fault = loop {
            let served = receiver.receive(&mut deadline).and_then(|message| {
                sender.send(message.header.reply(0), [&[], &[]], &[], &mut deadline)
            });
            if let Err(fault) = served {
                break fault;
            }
        };
        assert_eq!(fault, Fault::Silent(TIME));
        drop((receiver, sender));
        assert!(!writer.join().unwrap(), "each message had a time of its own");
    }

    /// A byte out of band makes the socket ready with nothing to read.
    #[test]
    fn a_byte_out_of_band_does_not_take_the_deadline_away() {
        let (theirs, _sender, mut receiver) = pair(AMPLE);
        receiver.stream().set_read_timeout(None).unwrap();
        nix::sys::socket::send(theirs.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let fault = receiver.receive(&mut Deadline::new(TIME).by_poll()).map(drop);
            done.send(fault).unwrap();
        });
        assert_eq!(ended.recv_timeout(AMPLE), Ok(Err(Fault::Silent(TIME))));
    }

    #[test]
    fn a_part_of_a_message_is_not_waited_for() {
        let (mut theirs, _sender, mut receiver) = pair(AMPLE);
        assert!(receiver.receive_now().unwrap().is_none());
        let bytes = message(1, b"body");
        theirs.write_all(&bytes[..18]).unwrap();
        assert!(receiver.receive_now().unwrap().is_none());
        theirs.write_all(&bytes[18..]).unwrap();
        assert_eq!(receiver.receive_now().unwrap().unwrap().body, b"body");
    }
}
