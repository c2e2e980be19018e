//! Ten thousand clients who come at 2,000 a second, ask something all at once, and stay idle, over 50 server connections.
//!
//! Log-ins are open-loop: each has its time, and what it waits counts from then. Memory is the proxy's whole resident set
//! less what it had before the first client, so pools, maps and what the allocator keeps are in it.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinSet;

use crate::cost::{resident_bytes, usage};
use crate::raw::{Account, Raw};
use crate::stage::{Pooler, Stage};

/// Log-ins that begin per second.
pub const LOGINS_PER_SECOND: u32 = 2_000;
/// Server connections of each proxy.
pub const SERVER_CONNECTIONS: u32 = 50;
/// Longest wait for one client's log-in or answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// For the proxy to put away what it needed for a moment.
const SETTLE: Duration = Duration::from_secs(2);

/// What one proxy did.
#[derive(Clone, Debug)]
pub struct CrowdSample {
    pub pooler: Pooler,
    pub clients: usize,
    /// From the first log-in's time to the last one's end.
    pub logins_per_second: f64,
    pub login_p50_ms: f64,
    pub login_p99_ms: f64,
    /// Processor time of the proxy per log-in.
    pub login_cpu_us: f64,
    pub refused: usize,
    /// Resident memory per client that has logged in and never asked.
    pub connected_bytes: f64,
    /// The same after each has asked once, all at the same time.
    pub asked_bytes: f64,
    /// From the first question to the last answer.
    pub asked_ms: f64,
    pub unanswered: usize,
}

impl fmt::Display for CrowdSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} clients, {}: {:.0} log-ins/s, {:.1} KiB per idle client, {} unserved",
            self.clients,
            self.pooler.name(),
            self.logins_per_second,
            self.asked_bytes / 1024.0,
            self.refused + self.unanswered
        )
    }
}

/// Measures one proxy of its own, started for this.
pub async fn run(stage: &Stage, pooler: Pooler, clients: usize) -> Result<CrowdSample> {
    let crowded = stage.crowded(pooler, clients + 100).await?;
    let account = stage.account(crowded.port, "bench");
    // The first log-in and query make what is made once.
    Raw::login(&account).await.context("the first client")?.query("SELECT 1").await?;
    tokio::time::sleep(SETTLE).await;
    let (empty, before) = (resident_bytes(crowded.pid()), usage(crowded.pid()));
    let mut storm = storm(&account, clients).await;
    let cpu = usage(crowded.pid()).since(before).cpu;
    ensure!(!storm.clients.is_empty(), "{}: nobody could log in", pooler.name());
    tokio::time::sleep(SETTLE).await;
    let connected = resident_bytes(crowded.pid());
    let asked = ask_all(std::mem::take(&mut storm.clients)).await;
    tokio::time::sleep(SETTLE).await;
    let idle = resident_bytes(crowded.pid());
    storm.millis.sort_by(f64::total_cmp);
    let at = |share: f64| storm.millis[((storm.millis.len() - 1) as f64 * share) as usize];
    let per_client = |bytes: u64| bytes.saturating_sub(empty) as f64 / asked.clients.len().max(1) as f64;
    Ok(CrowdSample {
        pooler,
        clients,
        logins_per_second: storm.millis.len() as f64 / storm.took.as_secs_f64(),
        login_p50_ms: at(0.5),
        login_p99_ms: at(0.99),
        login_cpu_us: cpu.as_secs_f64() * 1e6 / storm.millis.len() as f64,
        refused: clients - storm.millis.len(),
        connected_bytes: per_client(connected),
        asked_bytes: per_client(idle),
        asked_ms: asked.took.as_secs_f64() * 1e3,
        unanswered: asked.unanswered,
    })
}

struct Storm {
    clients: Vec<Raw>,
    /// From each log-in's time to its end.
    millis: Vec<f64>,
    took: Duration,
}

/// Clients come one by one, [`LOGINS_PER_SECOND`], whether those before them are done or not.
async fn storm(account: &Account, clients: usize) -> Storm {
    let started = Instant::now();
    let mut logins = JoinSet::new();
    for number in 0..clients {
        let due = started + Duration::from_secs(1) * number as u32 / LOGINS_PER_SECOND;
        if due > Instant::now() {
            tokio::time::sleep_until(due.into()).await;
        }
        let account = account.clone();
        logins.spawn(async move {
            let client = tokio::time::timeout(PATIENCE, Raw::login(&account)).await;
            (client, due.elapsed())
        });
    }
    let mut storm = Storm { clients: Vec::with_capacity(clients), millis: Vec::new(), took: Duration::ZERO };
    while let Some(login) = logins.join_next().await {
        if let Ok((Ok(Ok(client)), took)) = login {
            storm.clients.push(client);
            storm.millis.push(took.as_secs_f64() * 1e3);
        }
    }
    storm.took = started.elapsed();
    storm
}

struct Asked {
    /// Still connected.
    clients: Vec<Raw>,
    took: Duration,
    unanswered: usize,
}

/// Everyone asks at the same time.
async fn ask_all(clients: Vec<Raw>) -> Asked {
    let started = Instant::now();
    let mut questions = JoinSet::new();
    for mut client in clients {
        questions.spawn(async move {
            let answer = tokio::time::timeout(PATIENCE, client.query("SELECT 1")).await;
            (client, matches!(answer, Ok(Ok(()))))
        });
    }
    let mut asked = Asked { clients: Vec::new(), took: Duration::ZERO, unanswered: 0 };
    while let Some(question) = questions.join_next().await {
        let Ok((client, answered)) = question else { continue };
        asked.clients.push(client);
        asked.unanswered += usize::from(!answered);
    }
    asked.took = started.elapsed();
    asked
}
