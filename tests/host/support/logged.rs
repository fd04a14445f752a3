//! Warnings and errors that the crate has logged. For a test that is [alone](super::alone): a process has one log.

use std::sync::Mutex;

struct Log(Mutex<Vec<String>>);

static LOG: Log = Log(Mutex::new(Vec::new()));

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// From now on they are kept.
pub fn watch() {
    log::set_logger(&LOG).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
}

/// Those since the last call.
pub fn take() -> Vec<String> {
    std::mem::take(&mut LOG.0.lock().unwrap())
}
