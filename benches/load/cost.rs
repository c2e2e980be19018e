//! What a process has used, from /proc: processor time, context switches and memory.
//!
//! Source: proc(5). Times are in clock ticks (`getconf CLK_TCK`, 100 per second), so a measurement should last seconds.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// What a process and its children have used since they started.
#[derive(Clone, Copy, Default, Debug)]
pub struct Usage {
    pub cpu: Duration,
    /// Voluntary and involuntary, over all threads.
    pub switches: u64,
}

impl Usage {
    /// What was used between `earlier` and this.
    pub fn since(self, earlier: Usage) -> Usage {
        Usage { cpu: self.cpu.saturating_sub(earlier.cpu), switches: self.switches.saturating_sub(earlier.switches) }
    }
}

/// Usage of `pid` and the processes it is the parent of (Postgres: the postmaster's backends).
pub fn usage(pid: u32) -> Usage {
    let mut total = Usage::default();
    for process in processes() {
        let Some(stat) = Stat::read(process) else { continue };
        if process == pid || stat.parent == pid {
            total.cpu += stat.cpu;
            total.switches += switches(process);
        }
    }
    total
}

/// Resident memory of `pid` itself (VmRSS); zero for a process that is gone.
pub fn resident_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Processor time of this thread since it began, exact to a few milliseconds (the first figure of schedstat).
pub fn thread_cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0))
}

struct Stat {
    parent: u32,
    cpu: Duration,
}

impl Stat {
    /// Fields 4 (ppid), 14 (utime) and 15 (stime); the name in field 2 may hold spaces and parentheses.
    fn read(pid: u32) -> Option<Stat> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
        let ticks = number(11)? + number(12)?;
        Some(Stat { parent: number(1)? as u32, cpu: Duration::from_secs_f64(ticks as f64 / TICKS_PER_SECOND) })
    }
}

/// The kernel reports in USER_HZ, which is 100 on every architecture that Linux still runs on but Alpha.
const TICKS_PER_SECOND: f64 = 100.0;

fn switches(pid: u32) -> u64 {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    let of_task = |path: &Path| -> u64 {
        let text = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        let lines = text.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    };
    tasks.flatten().map(|task| of_task(&task.path())).sum()
}

fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The first figure of /proc/loadavg.
pub fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

/// The processor's name and how many of them there are.
pub fn processors() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("unknown processor", |(_, name)| name.trim());
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{count} × {model}")
}

/// The first line a command prints, or a question mark.
pub fn first_line(command: &mut Command) -> String {
    let said = command.output().map(|said| String::from_utf8_lossy(&said.stdout).into_owned()).unwrap_or_default();
    said.lines().next().unwrap_or("?").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_process_costs_time() {
        let before = usage(std::process::id());
        let started = std::time::Instant::now();
        let (mut used, mut sum) = (Usage::default(), 0_u64);
        // On a machine with much else to do, our share of a second may be small.
        while used.cpu < Duration::from_millis(50) && started.elapsed() < Duration::from_secs(20) {
            for _ in 0..1_000_000 {
                sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
            }
            used = usage(std::process::id()).since(before);
        }
        assert!(used.cpu >= Duration::from_millis(50), "{used:?}");
    }

    #[test]
    fn a_process_that_is_gone_costs_nothing() {
        assert_eq!(usage(u32::MAX).cpu, Duration::ZERO);
        assert_eq!(resident_bytes(u32::MAX), 0);
        assert!(resident_bytes(std::process::id()) > 100_000);
    }
}
