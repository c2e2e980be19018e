//! A client that never prepares the same text twice: a million texts, and memory must not follow.
//!
//! Each text is parsed, bound, executed, and closed again, a hundred to a pipeline. The baseline is Postgres itself, which
//! keeps nothing of a statement that is closed.

use std::fmt;
use std::time::Instant;

use anyhow::{Context as _, Result};
use weir_wire::frontend::{self, Execute, Object, Parse, Target, put_sync};

use crate::bulk::Watch;
use crate::cost::resident_bytes;
use crate::raw::Raw;
use crate::stage::{Path, Stage};

/// Texts per pipeline.
const PIPELINED: usize = 100;
/// Memory at the start is taken when the caches are full.
const WARM_UP: usize = 50_000;

/// What one path measured.
#[derive(Clone, Debug)]
pub struct PreparedSample {
    pub path: Path,
    pub texts: usize,
    pub per_second: f64,
    /// Resident memory of the proxy when its caches were full, and at most until the end.
    pub full_bytes: u64,
    pub max_bytes: u64,
}

impl fmt::Display for PreparedSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grown = self.max_bytes.saturating_sub(self.full_bytes) as f64 / 1e6;
        write!(
            f,
            "{} distinct texts, {}: {:.0}/s, grew by {grown:.1} MB",
            self.texts,
            self.path.name(),
            self.per_second
        )
    }
}

/// Prepares `texts` texts over one connection, after a warm-up of 50,000 that is not measured.
pub async fn run(stage: &Stage, path: Path, texts: usize) -> Result<PreparedSample> {
    let (port, database) = stage.address(path, None);
    let mut client = Raw::login(&stage.account(port, database)).await?;
    let what = || format!("distinct statements over {}", path.name());
    let mut number = 0;
    while number < WARM_UP {
        number = pipeline(&mut client, number).await.with_context(what)?;
    }
    let pid = stage.proxy_pid(path);
    let full_bytes = pid.map_or(0, resident_bytes);
    let (watch, started) = (Watch::start(pid), Instant::now());
    while number < WARM_UP + texts {
        number = pipeline(&mut client, number).await.with_context(what)?;
    }
    let per_second = texts as f64 / started.elapsed().as_secs_f64();
    Ok(PreparedSample { path, texts, per_second, full_bytes, max_bytes: watch.stop().max(full_bytes) })
}

/// One pipeline of texts that have not been sent before; gives the next number.
async fn pipeline(client: &mut Raw, from: usize) -> Result<usize> {
    for number in from..from + PIPELINED {
        let (name, sql) = (format!("s{number}"), format!("SELECT 1 AS c{number}"));
        let out = &mut client.out;
        Parse { name: name.as_bytes(), sql: sql.as_bytes(), types: b"" }.put(out);
        weir_wire::frame::put(out, frontend::tag::BIND, |out| {
            weir_wire::frame::put_cstr(out, b"");
            weir_wire::frame::put_cstr(out, name.as_bytes());
            out.extend_from_slice(&[0; 6]);
        });
        Execute { portal: b"", rows_max: 0 }.put(out);
        Target { object: Object::Statement, name: name.as_bytes() }.put(frontend::tag::CLOSE, out);
    }
    put_sync(&mut client.out);
    client.until_ready().await?;
    Ok(from + PIPELINED)
}
