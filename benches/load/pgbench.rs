//! One run of `pgbench -S` over one path.
//!
//! Figures are taken between its first and its last progress line, so that logging in is not part of them: a pooler's
//! SCRAM log-ins cost as much as thousands of transactions.

use std::fmt;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::time::timeout;

use crate::cost::{Usage, usage};
use crate::stage::{Path, Stage};

/// How pgbench sends its statement.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, clap::ValueEnum)]
pub enum Mode {
    Simple,
    Extended,
    Prepared,
}

impl Mode {
    pub const ALL: [Mode; 3] = [Mode::Simple, Mode::Extended, Mode::Prepared];

    pub fn name(self) -> &'static str {
        match self {
            Mode::Simple => "simple",
            Mode::Extended => "extended",
            Mode::Prepared => "prepared",
        }
    }
}

/// What one run measured.
#[derive(Clone, Debug)]
pub struct TxSample {
    pub path: Path,
    pub mode: Mode,
    /// Transactions per second.
    pub tps: f64,
    /// Mean, in milliseconds.
    pub latency_ms: f64,
    /// Processor time of the proxy per transaction, in microseconds; zero on the direct path.
    pub proxy_us: f64,
    /// Context switches of the proxy per transaction.
    pub proxy_switches: f64,
}

impl fmt::Display for TxSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mode, path) = (self.mode.name(), self.path.name());
        write!(f, "pgbench -S {mode}, {path}: {:.0} tps, proxy {:.1} µs/tx", self.tps, self.proxy_us)
    }
}

/// A progress line, with what the proxy had used when it was printed.
struct Progress {
    seconds: f64,
    tps: f64,
    latency_ms: f64,
    used: Usage,
}

impl Progress {
    /// `progress: 1.0 s, 38123.4 tps, lat 0.419 ms stddev 0.120, 0 failed`
    fn parse(line: &str, used: Usage) -> Option<Progress> {
        let mut parts = line.strip_prefix("progress: ")?.split(", ");
        let mut number = |unit: &str| -> Option<f64> {
            let part = parts.next()?;
            let words: Vec<&str> = part.split(' ').collect();
            let at = words.iter().position(|word| *word == unit)?;
            words.get(at.checked_sub(1)?)?.parse().ok()
        };
        Some(Progress { seconds: number("s")?, tps: number("tps")?, latency_ms: number("ms")?, used })
    }
}

/// Runs pgbench for `secs` and one second more, which is not counted.
pub async fn run(stage: &Stage, path: Path, mode: Mode, clients: u32, secs: u64) -> Result<TxSample> {
    let (port, database) = stage.address(path, Some(mode));
    let what = format!("pgbench -S {} on path {}", mode.name(), path.name());
    let mut command = tokio::process::Command::from(stage.pgbench(port));
    command.args(["-n", "-S", "-P", "1", "-j", "1", "-M", mode.name()]);
    command.args(["-c", &clients.to_string(), "-T", &(secs + 1).to_string(), database]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().context("cannot run pgbench")?;
    let mut lines = BufReader::new(child.stderr.take().context("pgbench's standard error")?).lines();
    let (mut progress, mut said) = (Vec::new(), Vec::new());
    let read = async {
        while let Some(line) = lines.next_line().await? {
            let used = stage.proxy_pid(path).map(usage).unwrap_or_default();
            match Progress::parse(&line, used) {
                Some(line) => progress.push(line),
                None => said.push(line),
            }
        }
        child.wait().await
    };
    let status = timeout(Duration::from_secs(secs + 30), read).await.with_context(|| format!("{what} hangs"))??;
    if !status.success() {
        bail!("{what} failed ({status}):\n{}", said.join("\n"));
    }
    measured(path, mode, &progress).with_context(|| format!("{what} printed too little progress: {said:?}"))
}

/// Everything after the first line.
fn measured(path: Path, mode: Mode, progress: &[Progress]) -> Option<TxSample> {
    let (first, rest) = progress.split_first()?;
    let last = rest.last()?;
    let (mut transactions, mut waited, mut before) = (0.0, 0.0, first.seconds);
    for line in rest {
        let done = line.tps * (line.seconds - before);
        transactions += done;
        waited += done * line.latency_ms;
        before = line.seconds;
    }
    let used = last.used.since(first.used);
    let per_transaction = |total: f64| if transactions > 0.0 { total / transactions } else { 0.0 };
    Some(TxSample {
        path,
        mode,
        tps: transactions / (last.seconds - first.seconds),
        latency_ms: per_transaction(waited),
        proxy_us: per_transaction(used.cpu.as_secs_f64() * 1e6),
        proxy_switches: per_transaction(used.switches as f64),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logging_in_is_not_measured() {
        let used = |ms: u64| Usage { cpu: Duration::from_millis(ms), switches: ms };
        let lines = [
            Progress::parse("progress: 1.0 s, 100.0 tps, lat 9.000 ms stddev 0.1, 0 failed", used(500)),
            Progress::parse("progress: 2.0 s, 1000.0 tps, lat 1.000 ms stddev 0.1, 0 failed", used(510)),
            Progress::parse("progress: 3.0 s, 3000.0 tps, lat 2.000 ms stddev 0.1", used(540)),
        ];
        let lines: Vec<Progress> = lines.into_iter().map(|line| line.expect("a progress line")).collect();
        let sample = measured(Path::Weir, Mode::Simple, &lines).expect("two seconds");
        assert!((sample.tps - 2000.0).abs() < 0.01, "{sample:?}");
        assert!((sample.latency_ms - 1.75).abs() < 0.01, "{sample:?}");
        assert!((sample.proxy_us - 10.0).abs() < 0.01, "{sample:?}");
        assert!(Progress::parse("pgbench: error: connection failed", used(0)).is_none());
    }
}
