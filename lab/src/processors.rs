//! This machine's processors, and who uses them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

/// What they are, and how many.
pub fn description() -> Result<String> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("an unknown processor", |(_, model)| model);
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    Ok(format!("{count} × {model}"))
}

/// The processor time of each thread of a process since the thread began.
#[derive(Clone, Debug, Default)]
pub struct Threads(BTreeMap<u32, Thread>);

#[derive(Clone, Debug)]
struct Thread {
    name: String,
    time: Duration,
    /// How often it has begun to wait for something else than a processor.
    sleeps: u64,
}

impl Threads {
    /// Reads the times of a process (Linux, `Documentation/scheduler/sched-stats.rst`:
    /// `/proc/PID/task/TID/schedstat`). They do not contain the time in which a thread waited
    /// for a processor.
    pub fn of(process: u32) -> Result<Self> {
        let mut threads = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{process}/task"))? {
            let path = entry?.path();
            // One that has ended meanwhile is left out.
            if let (Some(number), Ok(Some(thread))) = (number(&path), Thread::read(&path)) {
                threads.insert(number, thread);
            }
        }
        Ok(Self(threads))
    }

    /// How often threads whose name is of interest have gone to sleep since an earlier reading.
    pub fn sleeps_since(&self, earlier: &Self, is_of_interest: impl Fn(&str) -> bool) -> u64 {
        let threads = self.0.iter().filter(|(_, thread)| is_of_interest(&thread.name));
        threads
            .map(|(number, thread)| {
                let before = earlier.0.get(number).map_or(0, |thread| thread.sleeps);
                thread.sleeps.saturating_sub(before)
            })
            .sum()
    }

    /// The time since an earlier reading, of those threads whose name is of interest.
    pub fn since(&self, earlier: &Self, is_of_interest: impl Fn(&str) -> bool) -> Duration {
        let threads = self.0.iter().filter(|(_, thread)| is_of_interest(&thread.name));
        threads
            .map(|(number, thread)| {
                let before = earlier.0.get(number).map_or(Duration::ZERO, |thread| thread.time);
                thread.time.saturating_sub(before)
            })
            .sum()
    }
}

/// Gives a process that leads a session the highest priority, so that other programs disturb it little. Returns
/// whether this process may do so: root may.
///
/// The nice values of threads count among those of a session. Between sessions, that of the session does (sched(7),
/// "The autogroup feature").
pub fn prefer(process: u32) -> Result<bool> {
    let threads = Threads::of(process)?;
    let mut command = Command::new("renice");
    command.args(["-n", "-20", "-p"]).args(threads.0.keys().map(u32::to_string));
    let is_preferred = command.output()?.status.success();
    let group = format!("/proc/{process}/autogroup");
    // A kernel without the feature has no such file.
    let is_group_preferred = !Path::new(&group).exists() || fs::write(&group, "-20").is_ok();
    Ok(is_preferred && is_group_preferred)
}

fn number(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.parse().ok()
}

impl Thread {
    fn read(path: &Path) -> Result<Option<Self>> {
        let name = fs::read_to_string(path.join("comm"))?.trim_end().to_owned();
        let time = first_number(&fs::read_to_string(path.join("schedstat"))?);
        let status = fs::read_to_string(path.join("status"))?;
        let sleeps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let sleeps = sleeps.and_then(first_number).unwrap_or(0);
        Ok(time.map(|time| Self { name, time: Duration::from_nanos(time), sleeps }))
    }
}

fn first_number(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// How long this machine's processors have worked for anybody, as the sum of all, in steps of
/// 10 ms (proc_stat(5)).
pub fn busy() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat")?;
    parse_busy(&stat).context("/proc/stat does not begin with the times of all processors")
}

fn parse_busy(stat: &str) -> Option<Duration> {
    const TICK_MS: u64 = 10;
    let times = stat.lines().next()?.strip_prefix("cpu ")?;
    let times: Vec<u64> =
        times.split_ascii_whitespace().map(|time| time.parse().ok()).collect::<Option<_>>()?;
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are in the first two.
    let [user, nice, system, _, _, irq, softirq, ..] = times[..] else { return None };
    Some(Duration::from_millis(TICK_MS * (user + nice + system + irq + softirq)))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_thread_that_works_uses_processor_time() {
        let before = Threads::of(std::process::id()).unwrap();
        let name = "worker-of-test";
        let worker = std::thread::Builder::new().name(name.to_owned());
        let used = std::thread::scope(|scope| {
            let worker = worker.spawn_scoped(scope, || {
                let started = Instant::now();
                let mut used = Duration::ZERO;
                while used < Duration::from_millis(20) {
                    assert!(started.elapsed() < Duration::from_secs(60), "it gets no time");
                    used = Threads::of(std::process::id())
                        .unwrap()
                        .since(&before, |found| found == name);
                }
                used
            });
            worker.unwrap().join().unwrap()
        });
        assert!(used < Duration::from_secs(60));
        let after = Threads::of(std::process::id()).unwrap();
        assert_eq!(after.since(&before, |found| found == name), Duration::ZERO, "it has ended");
    }

    #[test]
    fn a_preferred_session_has_the_highest_priority() {
        let mut child = Command::new("setsid").args(["sleep", "600"]).spawn().unwrap();
        let file = |name| fs::read_to_string(format!("/proc/{}/{name}", child.id())).unwrap();
        let started = Instant::now();
        while file("comm") != "sleep\n" {
            assert!(started.elapsed() < Duration::from_secs(60), "it does not start");
        }
        let is_preferred = prefer(child.id()).unwrap();
        let group = fs::read_to_string(format!("/proc/{}/autogroup", child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        if is_preferred && let Ok(group) = group {
            assert!(group.ends_with("nice -20\n"), "{group}");
        }
    }

    #[test]
    fn idle_time_is_not_busy() {
        let stat = "cpu  1 2 3 1000 2000 4 5 600 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(parse_busy(stat), Some(Duration::from_millis(150)));
        assert_eq!(parse_busy("intr 1 2 3 4 5 6 7"), None);
        assert!(busy().unwrap() > Duration::ZERO);
    }
}
