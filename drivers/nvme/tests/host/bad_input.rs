//! The driver, given controllers that make no sense.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vfio_remap::emulated::{Edu, Emulated};
use vfio_remap::transport::Transport;
use vfio_remap::{Device, ErrorKind, Result};
use vfio_remap_nvme::{Completion, Controller, Settings, Status, SubmitError};

use crate::scripted::{HONEST, Script, ScriptedController};

/// Patient: what must succeed has time to, on whatever machine.
const SETTINGS: Settings = Settings::DEFAULT
    .with_queues(2)
    .with_entries(32)
    .with_timeout(Duration::from_secs(20))
    .with_grace(Duration::from_secs(20))
    .with_admin_timeout(Duration::from_secs(20));

/// For commands in I/O queues that are never answered.
const NO_ANSWER: Settings =
    SETTINGS.with_timeout(Duration::from_millis(200)).with_grace(Duration::from_millis(100));
/// For those of the admin queue.
const NO_ADMIN: Settings = SETTINGS.with_admin_timeout(Duration::from_millis(500));

/// For what does not become ready, or does not cease to be: CAP.TO, with half a second.
const IMPATIENT: u64 = HONEST.capabilities & !(0xff << 24) | 1 << 24;

/// A scripted controller, and what can be changed and seen from outside.
struct Subject {
    device: Emulated,
    script: Arc<Mutex<Script>>,
    logs: Arc<Mutex<Vec<u8>>>,
}

impl Subject {
    fn new(script: Script) -> Self {
        let (script, logs) = (Arc::new(Mutex::new(script)), Arc::default());
        Self {
            device: Emulated::new(ScriptedController::new(&script, &logs)).unwrap(),
            script,
            logs,
        }
    }

    fn open(&self) -> Result<Arc<Controller>> {
        self.open_with(SETTINGS)
    }

    fn open_with(&self, settings: Settings) -> Result<Arc<Controller>> {
        Controller::new(Device::new(Arc::new(self.device.clone())), settings)
    }

    fn say(&self, script: Script) {
        *self.script.lock().unwrap() = script;
    }

    /// Disabled, and without leave to start accesses.
    fn is_quiet(&self) -> bool {
        let [mut command, mut configuration] = [[0; 4]; 2];
        self.device.read_at(7, 4, &mut command[..2]).unwrap();
        self.device.read_at(0, 0x14, &mut configuration).unwrap();
        command[0] & 4 == 0 && configuration[0] & 1 == 0
    }
}

fn error<T>(result: Result<T>, kind: ErrorKind, words: &str) {
    let Err(error) = result else { panic!("it should say: {words}") };
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn a_controller_that_is_refused_is_named_and_left_quiet() {
    let with = |change: fn(&mut Script)| {
        let mut script = HONEST;
        change(&mut script);
        script
    };
    let cases: [(Script, ErrorKind, &str); 15] = [
        (with(|script| script.capabilities = u64::MAX), ErrorKind::Gone, "read all ones"),
        // Other command sets than NVM, and none at all.
        (with(|script| script.capabilities += 1 << 37), ErrorKind::Unsupported, "CAP.CSS"),
        (with(|script| script.capabilities += 0x7f << 37), ErrorKind::Unsupported, "CAP.CSS"),
        (with(|script| script.capabilities |= 9 << 48), ErrorKind::Unsupported, "CAP.MPSMIN"),
        (with(|script| script.capabilities &= !0xffff), ErrorKind::Malformed, "CAP.MQES"),
        // The admin queue's, and those of the first queue for I/O.
        (with(|script| script.capabilities |= 15 << 32), ErrorKind::Malformed, "CAP.DSTRD"),
        (with(|script| script.capabilities |= 9 << 32), ErrorKind::Malformed, "CAP.DSTRD"),
        (
            with(|script| (script.becomes_ready, script.capabilities) = (false, IMPATIENT)),
            ErrorKind::TimedOut,
            "did not become ready within the 0.5",
        ),
        (
            with(|script| (script.stays_ready, script.capabilities) = (true, IMPATIENT)),
            ErrorKind::TimedOut,
            "did not cease to be ready",
        ),
        (with(|script| script.fatal = true), ErrorKind::Os, "CSTS.CFS"),
        (with(|script| script.controller = |data| data[512] = 0x77), ErrorKind::Malformed, "2^7"),
        (
            with(|script| script.controller = |data| data[513] = 0x33),
            ErrorKind::Malformed,
            "completion",
        ),
        (with(|script| script.queues = u32::MAX), ErrorKind::Malformed, "not counts of queues"),
        (with(|script| script.silent = Some(0x06)), ErrorKind::TimedOut, "no answer within 500ms"),
        (with(|script| script.id = 1), ErrorKind::Os, "malformed completion"),
    ];
    for (script, kind, words) in cases {
        let subject = Subject::new(script);
        let settings = if script.silent.is_some() { NO_ADMIN } else { SETTINGS };
        error(subject.open_with(settings), kind, words);
        assert!(subject.is_quiet(), "{words}");
        subject.say(HONEST);
        subject.open().unwrap().close().unwrap();
        assert!(subject.is_quiet(), "{words}");
    }
    let subject = Subject::new(with(|script| script.class = 0x02_0000));
    error(subject.open(), ErrorKind::Unsupported, "not an NVMe controller: its class is 0x020000");
    assert!(subject.is_quiet());
    let edu = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    error(Controller::new(edu, SETTINGS), ErrorKind::Unsupported, "not an NVMe controller");
}

#[test]
fn a_namespace_that_makes_no_sense_is_refused_alone() {
    let subject = Subject::new(HONEST);
    let controller = subject.open().unwrap();
    type Change = fn(&mut [u8]);
    let cases: [(Change, ErrorKind, &str); 10] = [
        (|data| data[130] = 0, ErrorKind::Malformed, "2^0 bytes"),
        (|data| data[130] = 8, ErrorKind::Malformed, "2^8 bytes"),
        (|data| data[130] = 63, ErrorKind::Malformed, "2^63 bytes"),
        (|data| data[130] = 255, ErrorKind::Malformed, "2^255 bytes"),
        (|data| data[..8].fill(0xff), ErrorKind::Malformed, "are impossible"),
        (|data| data[..8].fill(0), ErrorKind::NotFound, "it has no blocks"),
        (|data| data[26] = 1, ErrorKind::Malformed, "zero-based number 1, but there are 1"),
        (|data| data[130] = 25, ErrorKind::Unsupported, "a transfer has at most 1048576"),
        (|data| data[128] = 8, ErrorKind::Unsupported, "8 bytes of metadata"),
        (|data| data[29] = 1, ErrorKind::Unsupported, "protection information"),
    ];
    for (namespace, kind, words) in cases {
        subject.say(Script { namespace, ..HONEST });
        error(controller.namespace(1), kind, words);
    }
    subject.say(HONEST);
    assert_eq!(controller.namespace(1).unwrap().block_size(), 512);
    error(controller.namespace(0), ErrorKind::NotFound, "there are [1]");
    error(controller.namespace(u32::MAX), ErrorKind::NotFound, "there are [1]");
    controller.close().unwrap();
}

#[test]
fn a_command_without_answer_ends_in_time_with_its_buffer() {
    let subject = Subject::new(HONEST);
    let controller = subject.open_with(NO_ANSWER).unwrap();
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    for round in 1..=2 {
        let buffer = controller.buffer(4096).unwrap();
        let iova = buffer.iova();
        queue.read(&namespace, 0, buffer, 5).unwrap();
        let start = Instant::now();
        let Completion { tag, status, buffer, .. } = queue.wait().unwrap();
        assert!(start.elapsed() >= Duration::from_millis(300), "limit and grace were waited for");
        assert_eq!((tag, status), (5, Status::ABORTED_BY_HOST));
        assert_eq!(buffer.unwrap().iova(), iova, "the controller is disabled: it cannot reach it");
        assert_eq!((queue.generation(), controller.generation()), (round, round));
    }
    drop(queue);
    controller.close().unwrap();
}

#[test]
fn a_buffer_stays_where_the_controller_may_still_reach_it() {
    let subject = Subject::new(Script { capabilities: IMPATIENT, ..HONEST });
    let controller = subject.open_with(NO_ANSWER).unwrap();
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    let buffer = controller.buffer(4096).unwrap();
    let iova = buffer.iova();
    queue.read(&namespace, 0, buffer, 5).unwrap();
    // It cannot be disabled any more, by whatever reset.
    subject.say(Script { stays_ready: true, ..HONEST });
    let Completion { status, buffer, .. } = queue.wait().unwrap();
    assert_eq!((status, buffer.is_none()), (Status::ABORTED_BY_HOST, true));
    assert!(queue.wait().is_none());
    let buffers = || (0..64).map(|_| controller.buffer(4096).unwrap()).collect::<Vec<_>>();
    let reused = || buffers().iter().any(|buffer| buffer.iova() == iova);
    assert!(!reused(), "the controller may still write there");
    let refused = queue.read(&namespace, 0, controller.buffer(4096).unwrap(), 6).unwrap_err();
    let as_error: &dyn std::error::Error = &refused;
    assert_eq!(as_error.to_string(), refused.error.to_string());
    let SubmitError { error: reason, buffer, .. } = refused;
    assert!(buffer.is_some());
    drop(buffer);
    error(Err::<(), _>(reason), ErrorKind::TimedOut, "did not cease to be ready");
    error(controller.namespace(1), ErrorKind::TimedOut, "did not cease to be ready");
    error(controller.reset(), ErrorKind::TimedOut, "did not cease to be ready");
    // It comes to its senses, and so does the queue.
    subject.say(HONEST);
    controller.reset().unwrap();
    // The queue notices.
    queue.read(&namespace, 0, controller.buffer(4096).unwrap(), 7).unwrap();
    assert!(reused(), "nothing is lost for good");
    assert_eq!(queue.outstanding(), 1);
    drop(queue);
    controller.close().unwrap();
    assert!(subject.is_quiet());
}

#[test]
fn memory_of_a_queue_not_deleted_is_kept_until_a_reset() {
    // Deletion of its submission queue is never answered, or creation of a completion queue.
    for silent in [0x00, 0x05] {
        let subject = Subject::new(Script { capabilities: IMPATIENT, ..HONEST });
        let controller = subject.open_with(NO_ADMIN).unwrap();
        let namespace = controller.namespace(1).unwrap();
        let mut queue = controller.queue().unwrap();
        let buffer = controller.buffer(4096).unwrap();
        let iova = buffer.iova();
        queue.read(&namespace, 0, buffer, 5).unwrap();
        queue.ring();
        let doomed = Script { silent: Some(silent), stays_ready: true, ..HONEST };
        if silent == 0x05 {
            subject.say(doomed);
            error(controller.queue().map(drop), ErrorKind::TimedOut, "no answer");
        }
        subject.say(doomed);
        drop(queue);
        let buffers = || (0..64).map(|_| controller.buffer(4096).unwrap()).collect::<Vec<_>>();
        let reused = || buffers().iter().any(|buffer| buffer.iova() == iova);
        assert!(!reused(), "the controller may still write there");
        error(controller.queue().map(drop), ErrorKind::TimedOut, "did not cease to be ready");
        subject.say(HONEST);
        controller.reset().unwrap();
        assert!(reused(), "nothing is lost for good");
        drop([controller.queue().unwrap(), controller.queue().unwrap()]);
        controller.close().unwrap();
    }
}

/// Log pages, Identify.
#[test]
fn the_page_of_an_unanswered_admin_command_is_not_reused() {
    for silent in [0x02, 0x06] {
        let subject = Subject::new(HONEST);
        let controller = subject.open_with(NO_ADMIN).unwrap();
        subject.say(Script { silent: Some(silent), ..HONEST });
        let asked = if silent == 0x02 {
            controller.health().map(drop)
        } else {
            controller.namespace(1).map(drop)
        };
        error(asked, ErrorKind::TimedOut, "no answer");
        let page = subject.script.lock().unwrap().unanswered;
        assert_ne!(page, 0);
        let buffers = || (0..64).map(|_| controller.buffer(4096).unwrap()).collect::<Vec<_>>();
        let reused = buffers().iter().any(|buffer| buffer.iova().0 == page);
        assert!(!reused, "the controller may still write there");
        subject.say(HONEST);
        controller.reset().unwrap();
        controller.namespace(1).unwrap();
        controller.close().unwrap();
        assert!(subject.is_quiet());
    }
}

#[test]
fn smallest_queues_and_longest_shutdown_are_taken_at_their_word() {
    let mut script = HONEST;
    // CAP.MQES: two entries, which limits no admin queue. RTD3E: the most there is.
    script.capabilities = script.capabilities & !0xffff | 1;
    script.controller = |data| data[88..92].fill(0xff);
    let subject = Subject::new(script);
    let controller = subject.open().unwrap();
    assert_eq!(controller.identity().shutdown_time, Duration::from_micros(u32::MAX.into()));
    let mut sizes = [0; 4];
    subject.device.read_at(0, 0x24, &mut sizes).unwrap();
    assert_eq!(u32::from_le_bytes(sizes), 31 << 16 | 31, "AQA");
    assert_eq!(controller.queue().unwrap().depth(), 1);
    controller.close().unwrap();
}

#[test]
fn a_controller_that_is_still_becoming_ready_is_not_cut_short() {
    let subject = Subject::new(Script { slowness: 5, ..HONEST });
    // Whoever had it before has just enabled it.
    subject.device.write_at(0, 0x14, &1u32.to_le_bytes()).unwrap();
    subject.open().unwrap().close().unwrap();
    assert!(!subject.script.lock().unwrap().cut_short);
    assert!(subject.is_quiet());
}

#[test]
fn events_are_told_once_and_asked_for_again() {
    let subject = Subject::new(HONEST);
    let controller = subject.open().unwrap();
    assert_eq!(controller.events().unwrap(), []);
    for _ in 0..10 {
        // Its temperature; log page 2.
        subject.say(Script { event: Some(0x02_0101), ..HONEST });
        let start = Instant::now();
        let events = loop {
            let events = controller.events().unwrap();
            if !events.is_empty() {
                break events;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "no event");
        };
        assert_eq!(events.len(), 1);
        assert!(events[0].to_string().contains("temperature"), "{}", events[0]);
        assert_eq!(
            std::mem::take(&mut *subject.logs.lock().unwrap()),
            [2],
            "that lets the next come"
        );
    }
    controller.close().unwrap();
}

/// Opens, and finds namespace 1.
fn usable(script: Script) -> Subject {
    let subject = Subject::new(script);
    let controller = subject.open().unwrap();
    assert_eq!(controller.namespaces().unwrap(), [1]);
    assert_eq!(controller.namespace(1).unwrap().block_count(), 1000);
    controller.close().unwrap();
    subject
}

#[test]
fn no_command_sets_means_the_nvm_command_set() {
    usable(Script { capabilities: HONEST.capabilities & !(0xff << 37), ..HONEST });
}

#[test]
fn pages_of_64_kib_and_no_ready_time_are_usable() {
    let subject = Subject::new(Script { capabilities: HONEST.capabilities | 4 << 48, ..HONEST });
    let controller = subject.open().unwrap();
    let mut configuration = [0; 4];
    subject.device.read_at(0, 0x14, &mut configuration).unwrap();
    assert_eq!(u32::from_le_bytes(configuration) >> 7 & 0xf, 4, "CC.MPS");
    controller.close().unwrap();
    usable(Script { capabilities: HONEST.capabilities & !(0xff << 24), ..HONEST });
}

#[test]
fn a_transfer_has_at_most_65536_blocks() {
    // MDTS: 2^15 pages of 128 KiB.
    let mut script = Script { capabilities: HONEST.capabilities | 5 << 48, ..HONEST };
    script.controller = |data| data[77] = 15;
    let controller = Subject::new(script).open().unwrap();
    assert_eq!(controller.identity().max_transfer, 65536 * 512);
    controller.close().unwrap();
}

#[test]
fn without_a_list_namespaces_are_tried_one_by_one() {
    const THERE: &[u32] = &[1, 3];
    let honest = Script { there: THERE, controller: |data| data[516] = 4, ..HONEST };
    let cases: [(&str, Script); 9] = [
        ("VS 1.0", Script { version: 0x0001_0000, list: |data| data.fill(0x55), ..honest }),
        ("no VS", Script { version: 0, list: |data| data.fill(0x55), ..honest }),
        ("invalid field", Script { refused: Some((2, 0x02)), ..honest }),
        ("invalid opcode", Script { refused: Some((2, 0x01)), ..honest }),
        ("invalid namespace", Script { refused: Some((2, 0x0b)), ..honest }),
        ("empty", Script { list: |data| data.fill(0), ..honest }),
        (
            "not in order",
            Script { list: |data| data[..8].copy_from_slice(&[3, 0, 0, 0, 1, 0, 0, 0]), ..honest },
        ),
        ("too high", Script { list: |data| data[4] = 5, ..honest }),
        ("not only a list", Script { list: |data| data[128] = 9, ..honest }),
    ];
    for (what, script) in cases {
        let controller = Subject::new(script).open().unwrap();
        assert_eq!(controller.namespaces().unwrap(), THERE, "{what}");
        assert_eq!(controller.namespace(3).unwrap().block_count(), 1000, "{what}");
        error(controller.namespace(2), ErrorKind::NotFound, "there are [1, 3]");
        error(controller.namespace(5), ErrorKind::NotFound, "there are [1, 3]");
        controller.close().unwrap();
    }
    // As many as there may be, of which one is there; and none.
    let most = |data: &mut [u8]| data[516..520].copy_from_slice(&[0xfe, 0xff, 0xff, 0xff]);
    let script = Script { version: 0, there: &[1, 0xffff_fffe], controller: most, ..HONEST };
    let controller = Subject::new(script).open().unwrap();
    assert_eq!(controller.namespaces().unwrap(), [1], "of those up to 1024");
    assert_eq!(controller.namespace(0xffff_fffe).unwrap().block_count(), 1000);
    controller.close().unwrap();
    let controller = Subject::new(Script { there: &[], ..HONEST }).open().unwrap();
    assert!(controller.namespaces().unwrap().is_empty());
    error(controller.namespace(1), ErrorKind::NotFound, "there are []");
    controller.close().unwrap();
    // Another refusal is an error.
    let controller = Subject::new(Script { refused: Some((2, 0x06)), ..HONEST }).open().unwrap();
    error(controller.namespaces(), ErrorKind::Os, "internal error");
    controller.close().unwrap();
}

#[test]
fn a_list_of_namespaces_without_end_is_refused() {
    fn endless(data: &mut [u8]) {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        for word in data.chunks_mut(4) {
            word.copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        }
    }
    let script = Script { list: endless, controller: |data| data[516..520].fill(0xff), ..HONEST };
    let controller = Subject::new(script).open().unwrap();
    error(controller.namespaces(), ErrorKind::Unsupported, "more than 65536 namespaces");
    controller.close().unwrap();
}

#[test]
fn unreadable_registers_after_a_disable_are_waited_for() {
    let subject = Subject::new(Script { blind: 50, ..HONEST });
    // Whoever had it before leaves it enabled.
    subject.device.write_at(0, 0x14, &1u32.to_le_bytes()).unwrap();
    for _ in 0..3 {
        let controller = subject.open().unwrap();
        controller.reset().unwrap();
        assert_eq!(controller.namespaces().unwrap(), [1]);
        controller.close().unwrap();
    }
    assert!(subject.is_quiet());
}

#[test]
fn registers_unreadable_for_longer_than_cap_to_have_gone() {
    let subject = Subject::new(Script { capabilities: IMPATIENT, ..HONEST });
    let controller = subject.open().unwrap();
    subject.say(Script { blind: u32::MAX, ..HONEST });
    let start = Instant::now();
    error(controller.reset(), ErrorKind::Gone, "read all ones");
    assert!(start.elapsed() >= Duration::from_millis(500));
}

#[test]
fn registers_are_left_alone_for_the_time_in_settings() {
    let delay = Duration::from_millis(150);
    let subject = Subject::new(Script { deaf: delay, ..HONEST });
    // Whoever had it before leaves it enabled.
    subject.device.write_at(0, 0x14, &1u32.to_le_bytes()).unwrap();
    let controller = subject.open_with(SETTINGS.with_disable_delay(delay)).unwrap();
    controller.reset().unwrap();
    controller.close().unwrap();
    assert!(!subject.script.lock().unwrap().disturbed);
}

#[test]
fn an_open_just_after_a_disable_waits_for_registers() {
    let subject = Subject::new(Script { blind: 2, ..HONEST });
    // Somebody else has just disabled it.
    for value in [1u32, 0] {
        subject.device.write_at(0, 0x14, &value.to_le_bytes()).unwrap();
    }
    let settings = SETTINGS.with_disable_delay(Duration::from_secs(1));
    subject.open_with(settings).unwrap().close().unwrap();
}

#[test]
fn a_ready_time_longer_than_cap_to_says_is_waited_for() {
    // CAP.CRMS, and CRTO.CRWMT in half seconds.
    let capabilities = IMPATIENT | 1 << 59;
    let script = Script { capabilities, ready_timeouts: 80, slowness: 300, ..HONEST };
    let start = Instant::now();
    usable(script);
    assert!(start.elapsed() > Duration::from_millis(500), "it took longer than CAP.TO");
}

#[test]
fn interrupts_without_vectors_are_refused() {
    let subject = Subject::new(HONEST);
    let settings = SETTINGS.with_interrupts(true);
    error(subject.open_with(settings), ErrorKind::Unsupported, "no MSI-X vectors");
    assert!(subject.is_quiet());
    subject.open().unwrap().close().unwrap();
}

#[test]
fn a_device_whose_configuration_space_reads_all_ones_has_gone() {
    // But for its identifiers, which Linux VFIO keeps.
    let subject = Subject::new(Script { class: 0xff_ffff, ..HONEST });
    error(subject.open(), ErrorKind::Gone, "all ones");
}
