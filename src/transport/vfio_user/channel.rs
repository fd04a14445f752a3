//! Whole messages over a stream socket, with deadlines, and no trust in who sends them.

use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::version::{MAX_FDS, MAX_TRANSFER};
use super::wire::Header;
use crate::sys::socket;

/// The longest message that is believed: data, and what is said of them.
const MAX_MESSAGE: usize = MAX_TRANSFER + 4096;

/// A message that has arrived.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    /// What came with it; closed where nobody takes it.
    pub(crate) fds: Vec<OwnedFd>,
}

/// Why a channel is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The peer has closed the socket; whether in the middle of a message.
    Closed { cut_short: bool },
    /// The peer has not taken or sent a message in time.
    Silent(Duration),
    /// The peer has sent what makes no sense.
    Nonsense(String),
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
            Self::Nonsense(what) => f.write_str(what),
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

/// A time limit as sockets and clocks can hold it: of no time at all sockets think that it is without end,
/// and what is longer than a century, clocks cannot add.
pub(crate) fn within_reason(time: Duration) -> Duration {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    time.clamp(Duration::from_millis(1), CENTURY)
}

/// Until when an exchange may last. Its first wait is the socket's own, by `SO_RCVTIMEO`, which costs
/// no system call; only later ones are measured.
#[derive(Debug)]
pub(crate) struct Patience {
    until: Instant,
    time: Duration,
    waited: bool,
}

impl Patience {
    pub(crate) fn new(time: Duration) -> Self {
        Self { until: Instant::now() + time, time, waited: false }
    }

    /// Until a certain instant, on a socket without a time of its own.
    #[cfg(feature = "emulated")]
    pub(crate) fn until(until: Instant) -> Self {
        Self { until, time: until.saturating_duration_since(Instant::now()), waited: true }
    }

    /// Waits until the socket is ready, or no longer than it may.
    fn wait(&self, stream: &UnixStream, events: PollFlags) -> Result<(), Fault> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Fault::Silent(self.time));
            }
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
    stream: Arc<UnixStream>,
    time: Duration,
}

impl Sender {
    /// Sends a message whole; the descriptors go with its first byte.
    pub(crate) fn send(
        &mut self,
        header: Header,
        parts: [&[u8]; 2],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Fault> {
        let header = header.encode();
        let mut slices = [IoSlice::new(&header), IoSlice::new(parts[0]), IoSlice::new(parts[1])];
        let mut rest = &mut slices[..];
        let mut fds = fds;
        let mut patience = None;
        loop {
            match socket::send(&self.stream, rest, fds) {
                Ok(count) => {
                    IoSlice::advance_slices(&mut rest, count);
                    if rest.iter().all(|part| part.is_empty()) {
                        return Ok(());
                    }
                    fds = &[];
                    let patience = patience.get_or_insert_with(|| Patience::new(self.time));
                    patience.wait(&self.stream, PollFlags::POLLOUT)?;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(Fault::Silent(self.time)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// The receiving side: bytes that have arrived, and what of them is whole.
#[derive(Debug)]
pub(crate) struct Receiver {
    stream: Arc<UnixStream>,
    buffer: Vec<u8>,
    /// How much of the buffer is filled.
    filled: usize,
    /// Descriptors, each with the place in the buffer of the last byte that came with it.
    fds: VecDeque<(usize, OwnedFd)>,
}

/// A connected socket as its two sides. `time` bounds how long the peer may take to take a message;
/// `idle` how long the first byte of one may take to come, if it is bounded.
pub(crate) fn split(
    stream: UnixStream,
    time: Duration,
    idle: Option<Duration>,
) -> std::io::Result<(Sender, Receiver)> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(time))?;
    stream.set_read_timeout(idle)?;
    let stream = Arc::new(stream);
    let receiver = Receiver {
        stream: stream.clone(),
        buffer: vec![0; 16 << 10],
        filled: 0,
        fds: VecDeque::new(),
    };
    Ok((Sender { stream, time }, receiver))
}

impl Receiver {
    /// The socket, for waiting on it and for shutting it down.
    pub(crate) fn stream(&self) -> &Arc<UnixStream> {
        &self.stream
    }

    /// The next message; waits for it as long as the exchange may last.
    pub(crate) fn receive(&mut self, patience: &mut Patience) -> Result<Message, Fault> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(message);
            }
            if std::mem::replace(&mut patience.waited, true) {
                patience.wait(&self.stream, PollFlags::POLLIN)?;
            }
            self.fill(patience.time)?;
        }
    }

    /// The next message, whenever it comes; once it has begun, the rest may take `time`.
    pub(crate) fn receive_idle(&mut self, time: Duration) -> Result<Message, Fault> {
        if let Some(message) = self.take()? {
            return Ok(message);
        }
        if self.filled == 0 {
            self.fill(time)?;
        }
        let mut patience = Patience { waited: true, ..Patience::new(time) };
        self.receive(&mut patience)
    }

    /// The next message if it is there, or has begun to be; `None` where there is nothing.
    pub(crate) fn receive_now(&mut self, time: Duration) -> Result<Option<Message>, Fault> {
        if self.filled == 0 {
            let mut socket = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut socket, PollTimeout::ZERO) {
                Ok(0) | Err(Errno::EINTR) => return Ok(None),
                Ok(_) => {}
                Err(errno) => return Err(Fault::Os(errno)),
            }
        }
        self.receive_idle(time).map(Some)
    }

    /// The first message of the buffer, if all of it has arrived.
    pub(crate) fn take(&mut self) -> Result<Option<Message>, Fault> {
        let Some((header, _)) = Header::decode(&self.buffer[..self.filled]) else {
            return Ok(None);
        };
        let size = header.size as usize;
        if !(Header::SIZE..=MAX_MESSAGE).contains(&size) {
            return Err(Fault::Nonsense(format!(
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
        // What came with bytes up to this message's last came with this message: the kernel ends a
        // read behind the bytes that descriptors were sent with.
        let ours = self.fds.partition_point(|(last, _)| *last < size);
        let fds = self.fds.drain(..ours).map(|(_, fd)| fd).collect();
        self.fds.iter_mut().for_each(|(last, _)| *last -= size);
        Ok(Some(Message { header, body, fds }))
    }

    /// Reads what has arrived, or waits for it. The buffer has room whenever no whole message is in it.
    fn fill(&mut self, time: Duration) -> Result<(), Fault> {
        let received = loop {
            match socket::receive(&self.stream, &mut self.buffer[self.filled..]) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(Fault::Silent(time)),
                other => break other?,
            }
        };
        if received.bytes == 0 {
            return Err(Fault::Closed { cut_short: self.filled > 0 });
        }
        self.filled += received.bytes;
        if received.truncated {
            return Err(Fault::Nonsense(
                "the peer sent more file descriptors than this process may have".to_owned(),
            ));
        }
        let last = self.filled - 1;
        self.fds.extend(received.fds.into_iter().map(|fd| (last, fd)));
        if self.fds.len() > MAX_FDS {
            return Err(Fault::Nonsense(format!(
                "the peer sent {} file descriptors at once; {MAX_FDS} are allowed",
                self.fds.len()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::transport::vfio_user::wire::command;

    const TIME: Duration = Duration::from_millis(200);

    fn pair() -> (UnixStream, Sender, Receiver) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let (sender, receiver) = split(ours, TIME, Some(TIME)).unwrap();
        (theirs, sender, receiver)
    }

    fn message(id: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Header::command(id, command::REGION_READ, body.len()).encode().to_vec();
        bytes.extend(body);
        bytes
    }

    fn receive(receiver: &mut Receiver) -> Result<Message, Fault> {
        receiver.receive(&mut Patience::new(TIME))
    }

    #[test]
    fn messages_come_whole_however_they_are_cut() {
        let (mut theirs, _sender, mut receiver) = pair();
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
        let (theirs, _sender, mut receiver) = pair();
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut sender = split(theirs, TIME, None).unwrap().0;
        for (id, fds) in [(1, 0), (2, 2), (3, 0), (4, 1), (5, 0)] {
            let fds = vec![null.as_fd(); fds];
            sender.send(Header::command(id, command::DMA_MAP, 3), [b"ab", b"c"], &fds).unwrap();
        }
        let counts: Vec<usize> =
            (0..5).map(|_| receive(&mut receiver).unwrap().fds.len()).collect();
        assert_eq!(counts, [0, 2, 0, 1, 0]);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for size in [0, 15, MAX_MESSAGE as u32 + 1, u32::MAX] {
            let (mut theirs, _sender, mut receiver) = pair();
            let header = Header { size, ..Header::command(1, command::VERSION, 0) };
            theirs.write_all(&header.encode()).unwrap();
            let fault = receive(&mut receiver).unwrap_err();
            assert!(matches!(fault, Fault::Nonsense(_)), "{fault}");
        }
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (theirs, _sender, mut receiver) = pair();
        let (reader, writer) = std::io::pipe().unwrap();
        let mut sender = split(theirs, TIME, None).unwrap().0;
        let fds = vec![writer.as_fd(); MAX_FDS + 1];
        sender.send(Header::command(1, command::DMA_MAP, 0), [&[], &[]], &fds).unwrap();
        let fault = receive(&mut receiver).unwrap_err();
        assert!(fault.to_string().contains("65 file descriptors"), "{fault}");
        drop((receiver, writer));
        // With every writing end closed, the pipe is at its end.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
    }

    #[test]
    fn a_peer_that_trickles_is_given_up_in_time() {
        let (mut theirs, _sender, mut receiver) = pair();
        let writer = std::thread::spawn(move || {
            for byte in message(1, &[0; 200]) {
                std::thread::sleep(TIME / 20);
                if theirs.write_all(&[byte]).is_err() {
                    return;
                }
            }
        });
        let start = Instant::now();
        assert_eq!(receive(&mut receiver).unwrap_err(), Fault::Silent(TIME));
        assert!(start.elapsed() < 2 * TIME);
        drop((receiver, _sender));
        writer.join().unwrap();
    }

    #[test]
    fn a_peer_that_does_not_take_is_given_up_in_time() {
        let (_theirs, mut sender, _receiver) = pair();
        let body = vec![0; MAX_TRANSFER];
        let start = Instant::now();
        let fault = (0..4)
            .find_map(|id| {
                let header = Header::command(id, command::REGION_WRITE, body.len());
                sender.send(header, [&body, &[]], &[]).err()
            })
            .unwrap();
        assert_eq!(fault, Fault::Silent(TIME));
        assert!(start.elapsed() < 4 * TIME);
    }
}
