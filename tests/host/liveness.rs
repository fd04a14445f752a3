//! What a peer shares with us, it cannot use to hold us up: eventfds, sockets, descriptors.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{read, write};
use vfio_remap::device::{Growth, Interrupt};
use vfio_remap::emulated::{ClientLimits, Edu, Emulated, Server};
use vfio_remap::space::Access;
use vfio_remap::transport::{Transport, VfioUser, irq_index};
use vfio_remap::{Device, ErrorKind};

use crate::support::alone::alone;
use crate::support::hostile_server::{READ, REGION, Reply, serve, serve_among};
use crate::support::interrupts::{FULL, Interrupts, spoil};
use crate::support::watch::in_time;
use crate::support::{edu, shared, watch};

/// How long a peer is waited for that does not answer.
const TIME: Duration = Duration::from_millis(200);
/// How long one may take that does.
const AMPLE: Duration = Duration::from_secs(60);
/// How long a race is tried to be met.
const TRIED: Duration = Duration::from_secs(10);

#[test]
fn waiting_for_a_vector_ends_on_a_blocking_eventfd() {
    in_time(|| {
        let device = Device::new(Arc::new(Interrupts::spoiled(0)));
        let vectors = device.vectors(Interrupt::MsiX, 2).unwrap();
        assert_eq!(vectors.take(0).unwrap(), None);
        let error = vectors.wait(1, TIME).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    });
}

#[test]
fn waiting_for_events_ends_on_a_blocking_eventfd() {
    in_time(|| {
        let device = Device::new(Arc::new(Interrupts::spoiled(0)));
        let events = device.events().unwrap();
        assert_eq!(events.take().unwrap(), None);
        let error = events.wait(TIME).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    });
}

#[test]
fn growing_ends_where_every_eventfd_is_full() {
    in_time(|| {
        let device = Device::new(Arc::new(Interrupts::spoiled(FULL).with_noresize(true)));
        let mut vectors = device.vectors(Interrupt::MsiX, 1).unwrap();
        assert_eq!(vectors.grow(2).unwrap(), Growth::Reenabled);
        assert!(vectors.take(0).unwrap() >= Some(FULL));
    });
}

#[test]
fn a_full_eventfd_does_not_hold_up_an_emulated_device() {
    in_time(|| {
        let device = Emulated::new(Edu::new()).unwrap();
        let event = edu::event();
        spoil(&event, FULL);
        device.set_irqs(irq_index::MSI, 0, &[Some(event.as_fd())]).unwrap();
        device.trigger_irqs(irq_index::MSI, 0..1).unwrap();
        device.trigger_irqs(irq_index::MSI, 0..1).unwrap();
        assert!(device.irq(irq_index::MSI).unwrap().count > 0);
        device.set_irqs(irq_index::MSI, 0, &[]).unwrap();
    });
}

/// Two threads of the client's fill the eventfd whenever it is empty, and empty it once for each
/// interrupt: so it may be full at any instant, and stay so.
#[test]
fn a_client_that_fills_its_eventfd_does_not_hold_up_the_server() {
    in_time(|| {
        let device = Emulated::new(Edu::new()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn({
            let device = device.clone();
            move || Server::serve_stream(&device, theirs, AMPLE)
        });
        let client = VfioUser::from_stream(ours, AMPLE).unwrap();
        let event = Arc::new(OwnedFd::from(edu::event()));
        client.set_irqs(irq_index::MSI, 0, &[Some(event.as_fd())]).unwrap();
        spoil(&*event, 0);
        let stop = Arc::new(AtomicBool::new(false));
        let filler = thread::spawn({
            let (event, stop) = (event.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = write(&*event, &FULL.to_ne_bytes());
                }
            }
        });
        let (empty, asked) = sync_channel::<()>(1);
        let emptier = thread::spawn({
            let event = event.clone();
            move || {
                for () in asked {
                    let _ = read(&*event, &mut [0; 8]);
                }
            }
        });
        let start = Instant::now();
        for _ in 0..10_000 {
            // Not while it is at it still: it must be full most of the time.
            let _ = empty.try_send(());
            client.trigger_irqs(irq_index::MSI, 0..1).unwrap();
            if start.elapsed() > TRIED {
                break;
            }
        }
        drop(client);
        server.join().unwrap().unwrap();
        assert!(device.irq(irq_index::MSI).unwrap().count > 0);
        // The threads wait in the kernel, the one for an empty counter, the other for one that is not.
        stop.store(true, Ordering::Relaxed);
        drop(empty);
        fcntl(&*event, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        while !filler.is_finished() || !emptier.is_finished() {
            let _ = read(&*event, &mut [0; 8]);
            let _ = write(&*event, &1u64.to_ne_bytes());
            thread::sleep(Duration::from_millis(1));
        }
        filler.join().unwrap();
        emptier.join().unwrap();
    });
}

/// A command of the server's own: `DMA_READ` of `count` bytes at 0.
fn dma_read(count: u64, wants_reply: bool) -> Vec<u8> {
    let mut command = vec![0; 32];
    (command[2], command[4]) = (11, 32);
    command[8] = if wants_reply { 0 } else { 0x10 };
    command[24..].copy_from_slice(&count.to_ne_bytes());
    command
}

/// It answers as well; its commands keep the client's listener busy all the time.
#[test]
fn a_server_that_commands_without_pause_does_not_starve_reads() {
    in_time(|| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let lock = Arc::new(Mutex::new(()));
        let sent = Arc::new(AtomicU32::new(0));
        let mut flood = theirs.try_clone().unwrap();
        let server = thread::spawn({
            let lock = lock.clone();
            move || serve_among(theirs, &lock, u16::MAX, |_| {})
        });
        let client = VfioUser::from_stream(ours, AMPLE).unwrap();
        let memory = shared::memory(1 << 20, false);
        client.dma_map(0, &memory, Access::ReadWrite).unwrap();
        let flooding = thread::spawn({
            let (sent, commands) = (sent.clone(), dma_read(1 << 20, false).repeat(64));
            move || {
                loop {
                    let whole = lock.lock().unwrap();
                    if flood.write_all(&commands).is_err() {
                        return;
                    }
                    drop(whole);
                    sent.fetch_add(64, Ordering::Relaxed);
                    thread::yield_now();
                }
            }
        });
        watch::until("it floods", || sent.load(Ordering::Relaxed) > 1_000);
        for _ in 0..3 {
            let mut data = [0; 4];
            client.read_at(0, 8, &mut data).unwrap();
            assert_eq!(data, [7; 4]);
        }
        drop(client);
        flooding.join().unwrap();
        server.join().unwrap();
    });
}

/// Each reply of the client's is taken well within the time, a hundred times over; the answer that the
/// client waits for never comes.
#[test]
fn commands_of_the_server_do_not_prolong_an_exchange() {
    in_time(|| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let commanding = theirs.try_clone().unwrap();
        let (rounds, done) = (100, Arc::new(AtomicU32::new(0)));
        let server = thread::spawn({
            let done = done.clone();
            move || {
                serve(theirs, READ, move |reply: &mut Reply| {
                    reply.silent = true;
                    let commands = dma_read(1 << 20, true).repeat(rounds as usize);
                    let mut answer = vec![0; 32 + (1 << 20)];
                    // All at once: the client finds each without waiting for it.
                    if Write::write_all(&mut &commanding, &commands).is_err() {
                        return;
                    }
                    for _ in 0..rounds {
                        thread::sleep(TIME / 2);
                        if Read::read_exact(&mut &commanding, &mut answer).is_err() {
                            return;
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            }
        });
        let client = VfioUser::from_stream(ours, TIME).unwrap();
        let memory = shared::memory(1 << 20, false);
        client.dma_map(0, &memory, Access::ReadWrite).unwrap();
        let error = client.read_at(0, 8, &mut [0; 4]).unwrap_err();
        // In the middle of an answer to the server, or between two.
        let kinds = [ErrorKind::Gone, ErrorKind::TimedOut];
        assert!(kinds.contains(&error.kind()), "{error}");
        drop(client);
        server.join().unwrap();
        let done = done.load(Ordering::Relaxed);
        assert!(done < rounds, "all {done} commands were waited for");
    });
}

/// A client maps what it likes and leaves: what the program itself has is as it was.
#[test]
fn a_client_that_leaves_takes_only_what_was_its_own() {
    in_time(|| {
        let emulated = Emulated::new(Edu::new()).unwrap();
        let device = Device::new(Arc::new(emulated.clone()));
        let vectors = device.vectors(Interrupt::Msi, 1).unwrap();
        let buffer = device.dma().unwrap().buffer(4096).unwrap();
        let iova = buffer.iova().0;

        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn({
            let emulated = emulated.clone();
            move || Server::serve_stream(&emulated, theirs, AMPLE)
        });
        let client = VfioUser::from_stream(ours, AMPLE).unwrap();
        let event = edu::event();
        client.set_irqs(irq_index::INTX, 0, &[Some(event.as_fd())]).unwrap();
        let memory = shared::memory(4096, true);
        let far = iova ^ (1 << 30);
        client.dma_map(far, &memory, Access::ReadWrite).unwrap();
        let taken = client.dma_map(iova, &memory, Access::ReadWrite).unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::AddressTaken, "{taken}");
        let foreign = client.dma_unmap(iova, 4096).unwrap_err();
        assert_eq!(foreign.errno(), Some(libc::ENOENT), "{foreign}");
        drop(client);
        server.join().unwrap().unwrap();

        // What the client had is free, and what the program has works.
        emulated.dma_map(far, &memory, Access::ReadWrite).unwrap();
        emulated.dma_unmap(far, 4096).unwrap();
        vectors.trigger(0).unwrap();
        assert_eq!(vectors.wait(0, AMPLE).unwrap(), 1);
        drop((buffer, vectors));
        device.close().unwrap();
    });
}

/// Each mapping that comes with a file costs the server a descriptor.
#[test]
fn a_client_can_have_the_server_open_only_so_many_files() {
    in_time(|| {
        let device = Emulated::new(Edu::new()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut limits = ClientLimits::from(AMPLE);
        limits.files = 4;
        let server = thread::spawn(move || Server::serve_stream(&device, theirs, limits));
        let client = VfioUser::from_stream(ours, AMPLE).unwrap();
        let (file, none) = (shared::memory(4096, true), shared::memory(4096, false));
        let map = |page: u64, memory| client.dma_map(page << 12, memory, Access::ReadWrite);
        for page in 0..4 {
            map(page, &file).unwrap();
        }
        let error = map(4, &file).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooManyMappings, "{error}");
        assert_eq!(error.errno(), Some(libc::EMFILE), "{error}");
        assert!(error.advice().contains("ClientLimits::files"), "{error}");
        // What comes without a file costs none, and what is unmapped is given back.
        map(5, &none).unwrap();
        client.dma_unmap(0, 4096).unwrap();
        map(4, &file).unwrap();
        map(6, &file).unwrap_err();
        drop(client);
        server.join().unwrap().unwrap();
    });
}

#[test]
fn the_limit_of_files_follows_that_of_the_process() {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert_eq!(u64::from(ClientLimits::default().files), (soft / 2).min(16384));
}

extern "C" fn nothing(_: libc::c_int) {}

/// Signals come, again and again, to the thread that waits.
#[test]
fn signals_do_not_prolong_an_exchange() {
    // What becomes of a signal is for all threads of a process.
    alone(|| {
        in_time(|| {
            // SAFETY: the handler does nothing.
            unsafe { libc::signal(libc::SIGUSR1, nothing as *const () as libc::sighandler_t) };
            let (ours, theirs) = UnixStream::pair().unwrap();
            let server = thread::spawn(move || serve(theirs, READ, |reply| reply.silent = true));
            let client = VfioUser::from_stream(ours, AMPLE / 30).unwrap();
            let (name, waits) = sync_channel(1);
            let waiting = thread::spawn(move || {
                // SAFETY: names this thread, which is signalled while it is joined.
                name.send(unsafe { libc::pthread_self() }).unwrap();
                let error = client.read_at(0, 8, &mut [0; 4]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
            });
            let thread = waits.recv().unwrap();
            while !waiting.is_finished() {
                // SAFETY: the thread has not been joined.
                unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                thread::sleep(Duration::from_millis(20));
            }
            waiting.join().unwrap();
            server.join().unwrap();
        });
    });
}

/// It asks for room, again and again, and for a byte more each time.
#[test]
fn a_server_that_always_wants_more_room_is_given_up() {
    in_time(|| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let asked = Arc::new(AtomicU32::new(0));
        let server = thread::spawn({
            let asked = asked.clone();
            move || {
                serve(theirs, REGION, move |reply| {
                    let more = 257 + asked.fetch_add(1, Ordering::Relaxed);
                    reply.fds.clear();
                    reply.set_u32(16, more);
                })
            }
        });
        let error = VfioUser::from_stream(ours, AMPLE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
        server.join().unwrap();
        let asked = asked.load(Ordering::Relaxed);
        assert!(asked <= 4, "it was asked {asked} times");
    });
}

/// A client takes its own interrupt out of use; that of the program goes on.
#[test]
fn a_client_disconnects_its_own_vectors_only() {
    in_time(|| {
        let emulated = Emulated::new(Edu::new()).unwrap();
        let device = Device::new(Arc::new(emulated.clone()));
        let vectors = device.vectors(Interrupt::Msi, 1).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn({
            let emulated = emulated.clone();
            move || Server::serve_stream(&emulated, theirs, AMPLE)
        });
        let client = VfioUser::from_stream(ours, AMPLE).unwrap();
        client.set_irqs(irq_index::MSI, 0, &[]).unwrap();
        vectors.trigger(0).unwrap();
        assert_eq!(vectors.wait(0, AMPLE).unwrap(), 1);
        drop(client);
        server.join().unwrap().unwrap();
    });
}

/// The client answers each question for its memory well in time, a few bytes at a time, and for ever.
#[test]
fn a_client_that_gives_memory_slowly_does_not_stop_a_device() {
    in_time(|| {
        let device = Emulated::new(Edu::new()).unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn({
            let device = device.clone();
            move || Server::serve_stream(&device, theirs, TIME)
        });
        let mut id = 0;
        let mut tell = |stream: &mut UnixStream, command: u16, body: &[u8]| {
            id += 1;
            let mut bytes = [id, command].map(u16::to_ne_bytes).concat();
            bytes.extend([16 + body.len() as u32, 0, 0].map(u32::to_ne_bytes).concat());
            bytes.extend(body);
            stream.write_all(&bytes).unwrap();
        };
        let answer = |stream: &mut UnixStream| -> std::io::Result<([u8; 16], Vec<u8>)> {
            let mut header = [0; 16];
            stream.read_exact(&mut header)?;
            let size = u32::from_ne_bytes(header[4..8].try_into().unwrap()) as usize;
            let mut body = vec![0; size - 16];
            stream.read_exact(&mut body)?;
            Ok((header, body))
        };
        let version = b"\0\0\x01\0{\"capabilities\":{\"max_data_xfer_size\":8}}\0";
        tell(&mut ours, 1, version);
        answer(&mut ours).unwrap();
        // 4 KiB at 0, for reading, of which the server has no file.
        let map = [32u32, 1, 0, 0, 0, 0, 4096, 0].map(u32::to_ne_bytes).concat();
        tell(&mut ours, 2, &map);
        answer(&mut ours).unwrap();
        // The driver is the program itself: from memory to the device, 4 KiB.
        device.write_at(7, 4, &4u16.to_le_bytes()).unwrap();
        for (offset, value) in [(0x80, 0), (0x88, 0x4_0000), (0x90, 4096), (0x98, 1u64)] {
            device.write_at(0, offset, &value.to_le_bytes()).unwrap();
        }
        let mut asked = 0;
        while let Ok((header, body)) = answer(&mut ours) {
            asked += 1;
            thread::sleep(TIME / 4);
            let mut reply = header.to_vec();
            reply[4..8].copy_from_slice(&(16 + 16 + 8u32).to_ne_bytes());
            reply[8] = 1;
            reply.extend(&body[..16]);
            reply.extend([0; 8]);
            if ours.write_all(&reply).is_err() {
                break;
            }
        }
        // All of it would be 512, in 26 seconds.
        assert!((1..512).contains(&asked), "it was asked {asked} times");
        drop(ours);
        let _ = server.join().unwrap();
        watch::until("the device goes on", || edu::read(&device, 0x98) & 1 == 0);
    });
}
