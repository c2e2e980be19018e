//! Large results: a COPY of 1 GB, a SELECT of ten million rows, and a reader who takes 1 MB a second.
//!
//! The client only counts bytes, so what is measured is the server and the way. Memory is sampled while the bytes flow.

use std::fmt;
use std::io::{Read, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use weir_wire::frontend;

use crate::cost::{resident_bytes, usage};
use crate::raw::Raw;
use crate::stage::{Path, Stage};

/// How fast the slow reader reads.
const SLOW_BYTES_PER_SECOND: usize = 1_000_000;
const SAMPLE_EVERY: Duration = Duration::from_millis(20);
/// Longest wait for the next byte.
const PATIENCE: Duration = Duration::from_secs(60);

/// A result to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Load {
    CopyOut,
    SelectRows,
}

impl Load {
    pub const ALL: [Load; 2] = [Load::CopyOut, Load::SelectRows];

    pub fn name(self) -> &'static str {
        match self {
            Load::CopyOut => "COPY out, 1 KB rows",
            Load::SelectRows => "SELECT, small rows",
        }
    }

    /// A statement with `millions` of rows, or thousands of kilobytes for COPY, made by the server out of nothing.
    fn sql(self, size: usize) -> String {
        match self {
            Load::CopyOut => format!("COPY (SELECT repeat('x', 999) FROM generate_series(1, {size})) TO STDOUT"),
            Load::SelectRows => format!("SELECT generate_series(1, {})", size * 10),
        }
    }
}

/// What one transfer measured.
#[derive(Clone, Debug)]
pub struct BulkSample {
    pub load: Load,
    pub path: Path,
    pub bytes: u64,
    pub seconds: f64,
    /// Processor time of the proxy.
    pub proxy_seconds: f64,
    /// Resident memory of the proxy, before and at most.
    pub before_bytes: u64,
    pub max_bytes: u64,
}

impl BulkSample {
    pub fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.seconds
    }
}

impl fmt::Display for BulkSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: {:.0} MB/s", self.load.name(), self.path.name(), self.megabytes_per_second())
    }
}

/// Transfers `load` once, as fast as it goes. `size`: kilobytes of COPY, tens of rows of SELECT.
pub async fn run(stage: &Stage, load: Load, path: Path, size: usize) -> Result<BulkSample> {
    transfer(stage, load, path, size, None).await
}

/// A COPY of 1 GB, of which the client reads for `length` and slowly.
pub async fn run_slowly(stage: &Stage, path: Path, length: Duration) -> Result<BulkSample> {
    transfer(stage, Load::CopyOut, path, 1_000_000, Some(length)).await
}

async fn transfer(stage: &Stage, load: Load, path: Path, size: usize, slow: Option<Duration>) -> Result<BulkSample> {
    let (port, database) = stage.address(path, None);
    let mut client = Raw::login(&stage.account(port, database)).await?;
    client.query("SELECT 1").await?;
    let mut request = bytes::BytesMut::new();
    frontend::put_query(&mut request, &load.sql(size));
    let stream = client.stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let pid = stage.proxy_pid(path);
    let before = pid.map_or(0, resident_bytes);
    let used = pid.map(usage).unwrap_or_default();
    let watch = Watch::start(pid);
    let started = Instant::now();
    let reader = tokio::task::spawn_blocking(move || {
        let mut stream = stream;
        stream.write_all(&request)?;
        match slow {
            None => drain(&mut stream),
            Some(length) => sip(&mut stream, length),
        }
    });
    let bytes = reader.await?.with_context(|| format!("{} over {}", load.name(), path.name()))?;
    Ok(BulkSample {
        load,
        path,
        bytes,
        seconds: started.elapsed().as_secs_f64(),
        proxy_seconds: pid.map(usage).unwrap_or_default().since(used).cpu.as_secs_f64(),
        before_bytes: before,
        max_bytes: watch.stop().max(before),
    })
}

/// Reads to the ReadyForQuery that ends everything.
fn drain(stream: &mut impl Read) -> Result<u64> {
    const READY: &[u8] = b"Z\0\0\0\x05I";
    let mut buffer = vec![0; 256 * 1024];
    let (mut bytes, mut tail) = (0, Vec::new());
    loop {
        let read = stream.read(&mut buffer)?;
        ensure!(read > 0, "closed after {bytes} bytes");
        bytes += read as u64;
        let kept = read.min(READY.len());
        tail.extend_from_slice(&buffer[read - kept..read]);
        tail.drain(..tail.len().saturating_sub(READY.len()));
        if tail == READY {
            return Ok(bytes);
        }
    }
}

/// Reads a little every tenth of a second for `length`.
fn sip(stream: &mut impl Read, length: Duration) -> Result<u64> {
    let mut buffer = vec![0; SLOW_BYTES_PER_SECOND / 10];
    let (mut bytes, started) = (0, Instant::now());
    while started.elapsed() < length {
        stream.read_exact(&mut buffer)?;
        bytes += buffer.len() as u64;
        let due = Duration::from_secs_f64(bytes as f64 / SLOW_BYTES_PER_SECOND as f64);
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
    Ok(bytes)
}

/// The largest resident memory of a process while this is running.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Watch {
    pub fn start(pid: Option<u32>) -> Watch {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut max = 0;
            while let Some(pid) = pid.filter(|_| !stopped.load(Relaxed)) {
                max = resident_bytes(pid).max(max);
                std::thread::sleep(SAMPLE_EVERY);
            }
            max
        });
        Watch { stop, thread }
    }

    pub fn stop(self) -> u64 {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_ends_with_ready_for_query() {
        let mut all = vec![b'Z'; 300_000];
        all.extend_from_slice(b"Z\0\0\0\x05I");
        assert_eq!(drain(&mut all.as_slice()).expect("ends"), 300_006);
        assert!(drain(&mut &all[..300_003]).is_err());
    }
}
