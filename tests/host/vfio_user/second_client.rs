//! A client that comes while another one is served.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vfio_remap::ErrorKind;
use vfio_remap::emulated::{Edu, Emulated, Server};
use vfio_remap::transport::VfioUser;

use crate::support::alone::alone;
use crate::support::lingering::lingering;
use crate::support::scripted_client::{AMPLE, Client, GET_INFO, VERSION, version, words};
use crate::support::watch;

/// How long a client may be silent.
const TIME: Duration = Duration::from_millis(200);

fn path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("vfio-remap-busy-{}-{number}", std::process::id()))
}

fn server(time: Duration) -> (PathBuf, Server) {
    let path = path();
    let device = Emulated::new(Edu::new()).unwrap();
    let server = Server::bind(&path, device).unwrap().with_limits(time);
    (path, server)
}

/// Serves so many clients, one after another.
fn serve(server: Server, count: u32) -> JoinHandle<()> {
    thread::spawn(move || (0..count).for_each(|_| server.serve().unwrap()))
}

fn greeted(path: &Path) -> Client {
    let mut client = Client::connect(path);
    client.greet("{}");
    client
}

fn is_refused(client: &mut Client) {
    assert_eq!(client.ask(VERSION, &version("{}\0"), &[]).err(), Some(libc::EBUSY));
    assert!(client.is_closed());
}

#[test]
fn a_second_client_is_told_that_the_device_is_busy() {
    let (path, server) = server(AMPLE);
    let server = serve(server, 2);
    let mut first = greeted(&path);
    // One may leave without a command. The server has seen that when it has refused those after it.
    drop(Client::connect(&path));
    for _ in 0..3 {
        is_refused(&mut Client::connect(&path));
    }
    let error = VfioUser::connect(&path).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::InUse, Some(libc::EBUSY)), "{error}");
    // Any first command is refused.
    let mut client = Client::connect(&path);
    assert_eq!(client.ask(GET_INFO, &[], &[]).err(), Some(libc::EBUSY));
    first.edu_copies(0, 8, false);
    drop(first);
    greeted(&path);
    server.join().unwrap();
}

#[test]
fn a_client_that_comes_when_another_one_has_left_is_served() {
    let (path, server) = server(AMPLE);
    let rounds = 300;
    let server = serve(server, rounds);
    for _ in 0..rounds {
        greeted(&path);
    }
    server.join().unwrap();
}

#[test]
fn a_silent_client_is_served_when_the_device_is_free() {
    let (path, server) = server(AMPLE);
    let server = serve(server, 3);
    let first = greeted(&path);
    // Both are accepted before the one that is refused.
    let mut silent = [Client::connect(&path), Client::connect(&path)];
    is_refused(&mut Client::connect(&path));
    drop(first);
    for client in &mut silent {
        client.greet("{}");
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    server.join().unwrap();
}

#[test]
fn silent_clients_are_given_up_and_block_nobody() {
    let (path, server) = server(TIME);
    let server = serve(server, 1);
    let mut first = greeted(&path);
    let mut silent: Vec<_> = (0..40).map(|_| Client::connect(&path)).collect();
    is_refused(&mut Client::connect(&path));
    for client in &mut silent {
        assert!(client.is_closed());
    }
    assert_eq!(first.read(0, 0, 4), 0x0100_00edu32.to_ne_bytes());
    drop(first);
    server.join().unwrap();
}

#[test]
fn with_a_queue_clients_wait_for_their_turn() {
    let (path, server) = server(AMPLE);
    let server = serve(server.with_queue(), 3);
    let mut first = greeted(&path);
    let mut others = [0; 2].map(|_| {
        let mut client = Client::connect(&path);
        client.send(VERSION, &version("{}\0"), &[]);
        client
    });
    assert_eq!(first.read(0, 0, 4), 0x0100_00edu32.to_ne_bytes());
    assert!(others.iter_mut().all(|client| !client.has_message()));
    drop(first);
    for client in &mut others {
        assert_eq!(client.receive().error, None);
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    server.join().unwrap();
}

/// Two threads serve: two clients have the device, and a third is refused.
#[test]
fn as_many_clients_are_served_as_threads_serve() {
    let (path, server) = server(AMPLE);
    let server = Arc::new(server);
    let threads = [0; 2].map(|_| {
        let server = server.clone();
        thread::spawn(move || server.serve().unwrap())
    });
    let first = greeted(&path);
    // Refused until the second thread serves.
    let second = loop {
        let mut client = Client::connect(&path);
        match client.ask(VERSION, &version("{}\0"), &[]) {
            Ok(_) => break client,
            Err(error) => assert_eq!(error, libc::EBUSY),
        }
    };
    let clients = [first, second];
    is_refused(&mut Client::connect(&path));
    drop(clients);
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_server_that_is_stopped_waits_for_no_client() {
    watch::in_time(|| {
        let (path, server) = server(AMPLE);
        let server = Arc::new(server);
        let threads = [0; 3].map(|_| {
            let server = server.clone();
            thread::spawn(move || server.serve())
        });
        let mut served = greeted(&path);
        server.stop();
        let refused = UnixStream::connect(&path).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        served.ask(GET_INFO, &words(&[16, 0, 0, 0]), &[]).unwrap();
        drop(served);
        let mut results = threads.map(|thread| thread.join().unwrap().map_err(|it| it.kind()));
        results.sort_by_key(Result::is_ok);
        assert_eq!(results, [Err(ErrorKind::Gone), Err(ErrorKind::Gone), Ok(())]);
        assert_eq!(server.serve().unwrap_err().kind(), ErrorKind::Gone);
    });
}

/// A client that cannot be accepted is asked for ten times a second, and not as often as the processor can.
#[test]
fn a_client_that_cannot_be_accepted_takes_no_time() {
    alone(|| {
        let (path, server) = server(AMPLE);
        let _client = Client::connect(&path);
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
        let start = Instant::now();
        let errors = [0; 3].map(|_| server.serve().unwrap_err());
        let took = start.elapsed();
        assert_eq!(errors.map(|error| error.errno()), [Some(libc::EMFILE); 3]);
        assert!(took >= Duration::from_millis(300), "{took:?}");
    });
}

#[test]
fn a_server_listens_where_clients_find_it() {
    let device = Emulated::new(Edu::new()).unwrap();
    assert_eq!(Server::bind("", device).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn descriptors_of_a_refused_client_are_closed() {
    let (path, server) = server(AMPLE);
    let server = serve(server, 1);
    let first = greeted(&path);
    let (mut reader, writer) = std::io::pipe().unwrap();
    for _ in 0..20 {
        let mut client = Client::connect(&path);
        client.send(VERSION, &version("{}\0"), &[writer.as_fd(); 8]);
        assert_eq!(client.receive().error, Some(libc::EBUSY));
    }
    drop(writer);
    // With every writing end closed, the pipe is at its end.
    watch::in_time(move || assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0));
    drop(first);
    server.join().unwrap();
}

/// The first one of them has to be waited for, and the others behind it.
#[test]
fn descriptors_that_cannot_be_closed_do_not_pile_up() {
    watch::in_time(|| {
        let (path, server) = server(AMPLE);
        let mut first = Client::connect(&path);
        let (fd, peer) = lingering();
        let mut refused = Client::connect(&path);
        refused.send(VERSION, &version("{}\0"), &[fd.as_fd()]);
        // Before the server closes it: the last one waits.
        drop(fd);
        let server = serve(server, 1);
        first.greet("{}");
        assert_eq!(refused.receive().error, Some(libc::EBUSY));
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut others = Vec::new();
        let is_refused_soon = |client: &mut Client| {
            (0..500).any(|_| {
                thread::sleep(Duration::from_millis(2));
                client.has_message()
            })
        };
        loop {
            let mut client = Client::connect(&path);
            client.send(VERSION, &version("{}\0"), &[null.as_fd(); 8]);
            others.push(client);
            assert!(others.len() < 64, "all of them are open");
            if !is_refused_soon(others.last_mut().unwrap()) {
                break;
            }
        }
        drop(peer);
        for client in &mut others {
            assert_eq!(client.receive().error, Some(libc::EBUSY));
        }
        drop(first);
        server.join().unwrap();
    });
}
