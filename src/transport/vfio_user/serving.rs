//! The commands of the server: it asks for memory that is mapped for DMA.
//!
//! An exchange serves the commands that come meanwhile. A thread serves the others: on the twin socket if there
//! is one, and otherwise on the socket of the exchanges, between them. There it releases the socket after each
//! message, and an exchange goes first. So a server that sends commands without pause delays an exchange by one
//! message.

use std::os::fd::AsFd;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::{Connection, unexpected, without_fds};
use super::protocol::channel::{Deadline, Fault, Message, Sender};
use super::protocol::dma::{self, Rights};
use super::protocol::version::MAX_TRANSFER;
use super::protocol::wire::{DmaAccess, command};

/// How long the thread leaves the socket alone after the reply to an exchange has woken it: an exchange then
/// costs no second wake-up. A server that has a file for all memory rarely asks, and may wait that long.
const NAP: Duration = Duration::from_millis(1);

impl Connection {
    /// Answers the server's own command.
    pub(super) fn serve(
        &self,
        sender: &mut Sender,
        message: &mut Message,
        deadline: &mut Deadline,
    ) -> std::result::Result<(), Fault> {
        without_fds(message)?;
        let Message { header, body, .. } = message;
        let answer = match header.command {
            command::DMA_READ => self.read_memory(body),
            command::DMA_WRITE => self.write_memory(body),
            _ => Err(Errno::EOPNOTSUPP),
        };
        if !header.wants_reply() {
            return Ok(());
        }
        match answer {
            Ok((access, data)) => {
                let access = access.encode();
                let reply = header.reply(access.len() + data.len());
                sender.send(reply, [&access, &data], &[], deadline)
            }
            Err(errno) => sender.send(header.failure(errno), [&[], &[]], &[], deadline),
        }
    }

    fn read_memory(&self, body: &[u8]) -> std::result::Result<(DmaAccess, Vec<u8>), Errno> {
        let (access, _) = DmaAccess::decode(body).ok_or(Errno::EINVAL)?;
        let count = usize::try_from(access.count).map_err(|_| Errno::E2BIG)?;
        if count > MAX_TRANSFER {
            return Err(Errno::E2BIG);
        }
        // The lock is held while copying: memory is out of reach once it is unmapped.
        let memory = self.memory();
        let mut data = vec![0; count];
        for piece in memory.find(access.address, count, Rights::READ)? {
            dma::read(&piece.target, piece.offset, &mut data[piece.range])?;
        }
        Ok((access, data))
    }

    fn write_memory(&self, body: &[u8]) -> std::result::Result<(DmaAccess, Vec<u8>), Errno> {
        let (access, data) = DmaAccess::decode(body).ok_or(Errno::EINVAL)?;
        if access.count != data.len() as u64 {
            return Err(Errno::EINVAL);
        }
        let memory = self.memory();
        for piece in memory.find(access.address, data.len(), Rights::WRITE)? {
            dma::write(&piece.target, piece.offset, &data[piece.range])?;
        }
        Ok((access, Vec::new()))
    }

    /// Serves the server's commands until the connection ends.
    pub(super) fn listen(&self) {
        self.serve_all();
        self.free_late();
    }

    fn serve_all(&self) {
        let twin = self.twin.get();
        let stream = twin.map_or(&self.stream, |twin| &twin.stream);
        loop {
            let events = PollFlags::POLLIN | PollFlags::POLLPRI;
            let mut socket = [PollFd::new(stream.as_fd(), events)];
            match poll(&mut socket, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return log::error!("{}: {errno}", self.name()),
            }
            // The socket stays ready, and there is nothing to read.
            if socket[0].revents().is_some_and(|events| events.contains(PollFlags::POLLPRI)) {
                let reason = "the server sent a byte out of band".to_owned();
                return self.fail(Fault::Malformed(reason));
            }
            loop {
                if twin.is_none() && self.wanted.load(Ordering::Relaxed) {
                    // Until that exchange ends, which serves the commands that come meanwhile.
                    drop(self.turn());
                }
                let served = self.serve_next();
                // A late answer may have freed memory.
                self.drop_freed();
                match served {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(fault) => self.fail(fault),
                }
                if self.has_failed() {
                    return;
                }
            }
            if twin.is_none() && !self.unshared.load(Ordering::Relaxed) {
                thread::sleep(NAP);
            }
        }
    }

    /// Serves one message, if one has arrived.
    fn serve_next(&self) -> std::result::Result<bool, Fault> {
        let deadline = || Deadline::new(self.limits.answer).by_poll();
        let Some(twin) = self.twin.get() else {
            let mut inner = self.inner();
            let Some(message) = inner.receiver.receive_now()? else { return Ok(false) };
            self.arrived(&mut inner, message, &mut deadline())?;
            return Ok(true);
        };
        let mut channel = twin.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let (sender, receiver) = &mut *channel;
        let Some(mut message) = receiver.receive_now()? else { return Ok(false) };
        if !message.header.is_command() {
            return Err(unexpected());
        }
        self.serve(sender, &mut message, &mut deadline())?;
        Ok(true)
    }
}
