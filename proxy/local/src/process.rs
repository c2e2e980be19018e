//! One child process: started in its own process group, recorded on disk, stopped with everything it started.
//!
//! Invariant: when [`Process`] is dropped the child and all its descendants are gone. Descendants are found by parent
//! id, because Postgres backends leave their postmaster's process group.
//! Non-goal: processes that detach on purpose (double fork); none of ours does.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::Run;

/// How long a child may take to obey its stop signal before it is killed.
const OBEY: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// What asks a child to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// Postgres: an immediate shutdown, which leaves no shared memory behind.
    Quit,
    /// Postgres: a fast shutdown, with a checkpoint.
    Interrupt,
    /// A server that drains or saves on the way out.
    Terminate,
    /// Nothing to lose.
    Kill,
}

impl StopSignal {
    /// The name `kill -s` knows it by.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Quit => "QUIT",
            Self::Interrupt => "INT",
            Self::Terminate => "TERM",
            Self::Kill => "KILL",
        }
    }

    fn signal(self) -> Signal {
        match self {
            Self::Quit => Signal::QUIT,
            Self::Interrupt => Signal::INT,
            Self::Terminate => Signal::TERM,
            Self::Kill => Signal::KILL,
        }
    }
}

/// A running child. Made by [`Run::spawn`].
#[derive(Debug)]
pub struct Process {
    label: String,
    child: Child,
    stop: StopSignal,
    record: PathBuf,
    log: PathBuf,
    /// Keeps the directory until the last process is gone; also who made us.
    _run: Arc<Run>,
}

impl Process {
    /// Starts `command` with standard error (and output, unless `piped`) appended to `log`.
    pub(crate) fn spawn(
        run: &Arc<Run>,
        label: &str,
        stop: StopSignal,
        mut command: Command,
        piped: bool,
    ) -> Result<(Self, Option<ChildStdout>)> {
        let log = run.log_path(label);
        let out = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        command.process_group(0).env("NO_COLOR", "1").stdin(Stdio::null()).stderr(out.try_clone()?);
        command.stdout(if piped { Stdio::piped() } else { Stdio::from(out) });
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {label} ({})", command.get_program().to_string_lossy()))?;
        let stdout = child.stdout.take();
        let record = run.record(child.id(), stop, label)?;
        Ok((Self { label: label.to_owned(), child, stop, record, log, _run: Arc::clone(run) }, stdout))
    }

    /// What this process is, for messages: `shard0`, `weir`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The process id. It stays reserved until this value is dropped.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// All it has written so far.
    pub fn log(&self) -> String {
        read_log(&self.log)
    }

    /// The last lines of its log, indented, for an error message.
    pub fn log_tail(&self) -> String {
        log_tail(&self.log)
    }

    /// Asks it to end, waits, kills what is left. Returns when it and its descendants are gone.
    pub fn stop(&mut self) {
        self.stop_with(self.stop);
    }

    /// As [`Self::stop`], with another signal than the one it was started with.
    pub fn stop_with(&mut self, signal: StopSignal) {
        if self.exited().is_none() && signal != StopSignal::Kill {
            self.signal(signal.signal());
            self.signal(Signal::CONT); // A frozen process would never see the first one.
            let deadline = Instant::now() + OBEY;
            while self.exited().is_none() && Instant::now() < deadline {
                std::thread::sleep(POLL);
            }
        }
        self.kill9();
    }

    /// Kills it and its descendants as a power cut would. Returns when they are gone.
    pub fn kill9(&mut self) {
        if self.exited().is_none() {
            kill_family(self.child.id());
            let _ = self.child.wait();
        }
        let _ = std::fs::remove_file(&self.record);
    }

    /// Stops it and its descendants where they are.
    pub fn freeze(&self) {
        // Itself first, so that it starts no more children while we look for them.
        self.signal_family(Signal::STOP);
    }

    /// Lets it and its descendants go on.
    pub fn thaw(&self) {
        self.signal_family(Signal::CONT);
    }

    fn signal_family(&self, signal: Signal) {
        let root = self.child.id();
        let _ = to_pid(root).map(|pid| kill_process(pid, signal));
        for (pid, _) in descendants(root) {
            let _ = to_pid(pid).map(|pid| kill_process(pid, signal));
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = to_pid(self.child.id()) {
            let _ = kill_process_group(pid, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Kills a process and all its descendants, and waits (bounded) until none of them runs.
pub(crate) fn kill_family(pid: u32) {
    let Some(root) = to_pid(pid) else { return };
    // Stopped first, so that it starts no more children while we look for them.
    let _ = kill_process(root, Signal::STOP);
    let family = descendants(pid);
    let _ = kill_process_group(root, Signal::KILL);
    let _ = kill_process(root, Signal::KILL);
    for (child, _) in &family {
        if let Some(child) = to_pid(*child) {
            let _ = kill_process(child, Signal::KILL);
        }
    }
    let deadline = Instant::now() + OBEY;
    while family.iter().any(|(pid, mark)| start_mark(*pid).as_ref() == Some(mark)) && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
}

/// Tells a process from a later one with the same id: its start time. None if it is gone or only waits to be reaped.
///
/// Linux: field 22 of /proc/PID/stat, in clock ticks since boot. Elsewhere: what `ps` calls its start.
pub(crate) fn start_mark(pid: u32) -> Option<String> {
    if !Path::new("/proc/self/stat").exists() {
        let said = Command::new("ps").args(["-o", "lstart=", "-p", &pid.to_string()]).output().ok()?;
        let mark = String::from_utf8_lossy(&said.stdout).split_whitespace().collect::<Vec<_>>().join("_");
        return (!mark.is_empty()).then_some(mark);
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name is in parentheses and may hold anything; the fields after it are plain.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    match fields.first() {
        Some(&("Z" | "X")) | None => None,
        Some(_) => fields.get(19).map(|mark| (*mark).to_owned()),
    }
}

/// Every process below `pid`, with its start mark.
fn descendants(pid: u32) -> Vec<(u32, String)> {
    let table = parents();
    let mut found: Vec<u32> = vec![pid];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(table.iter().filter(|(_, of)| *of == parent).map(|(child, _)| *child));
        next += 1;
    }
    found.into_iter().skip(1).filter_map(|pid| Some((pid, start_mark(pid)?))).collect()
}

/// (process, its parent) for every process of this machine.
fn parents() -> Vec<(u32, u32)> {
    if let Ok(entries) = std::fs::read_dir("/proc")
        && Path::new("/proc/self/stat").exists()
    {
        return entries
            .flatten()
            .filter_map(|entry| {
                let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
                let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
                Some((pid, stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?))
            })
            .collect();
    }
    let said = Command::new("ps").args(["-A", "-o", "pid=,ppid="]).output();
    let said = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned()).unwrap_or_default();
    said.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
        })
        .collect()
}

fn to_pid(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

/// The text of a log file; servers may write bytes that are no UTF-8.
pub(crate) fn read_log(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The last 20 lines of a log file, indented, or a word that there are none.
pub fn log_tail(path: &Path) -> String {
    let log = read_log(path);
    let lines: Vec<&str> = log.lines().collect();
    let tail: Vec<String> =
        lines.iter().skip(lines.len().saturating_sub(20)).map(|line| format!("    {line}")).collect();
    if tail.is_empty() { "    (its log is empty)".to_owned() } else { tail.join("\n") }
}
