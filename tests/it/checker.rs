//! The freshness checker: registers that are written and read through three proxies, with replicas and Redis, while everything
//! that can be disturbed is. No read may show less than was acknowledged, or than anybody had read, before it was asked; and
//! when all is still, every register is what its primary has. Registers that are written beside weir need only the latter.
//!
//! `make test` looks for some seconds; `make checker` also prints which naive variants of the protocol the checker catches.
//! docs/freshness-checker.md says what is done and what a long run is told by.

mod desk;
pub mod disturbance;
mod naive;
mod own_rows;
mod traffic;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use tokio::time::{sleep, timeout};

use self::desk::{Answered, Desk, PATIENCE, Violation};
use self::disturbance::Disturbance;
use crate::differential::Dice;

/// Reads that are checked unless more are asked for.
const READS: u64 = 6_000;
/// How often a run says how far it has come.
const PROGRESS: Duration = Duration::from_secs(10);

/// What a run is like.
pub struct Settings {
    seed: u64,
    /// It ends when so many reads were checked and each disturbance has happened once, ...
    reads: u64,
    /// ... or after so long.
    longest: Option<Duration>,
    shards: u32,
    /// Per shard.
    replicas: u32,
    registers: usize,
    /// Each has its own registers, as many as the others have.
    writers: usize,
    /// Are registers written beside weir as well?
    beside: bool,
    /// Percent of statements; otherwise 5 to 50 take turns.
    writes: Option<u64>,
    /// About how long a disturbance lasts, and how long it is calm in between.
    moment: Duration,
    calm: Duration,
    disturbances: Vec<Disturbance>,
    /// Disturbances between two comparisons of everything.
    rest_every: u64,
    /// Within which writes beside weir must be seen.
    beside_max: Option<Duration>,
    weir: Option<PathBuf>,
    /// Of the proxies.
    environment: Vec<(String, String)>,
    /// TOML.
    config: String,
}

/// What a run has seen.
struct Report {
    found: Option<Violation>,
    reads: u64,
    right_after: u64,
    disturbances: u64,
    elapsed: Duration,
    lost_commits: u64,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

impl Settings {
    /// Short, unless the environment asks for more.
    fn asked_for() -> Result<Settings> {
        let random = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
        let reads = number("WEIR_CHECKER_READS").unwrap_or(READS);
        let long = reads > READS;
        Ok(Settings {
            seed: number("WEIR_CHECKER_SEED").unwrap_or(random),
            reads,
            longest: None,
            shards: 2,
            replicas: if long { 3 } else { 1 },
            registers: if long { 400 } else { 80 },
            writers: if long { 8 } else { 4 },
            beside: true,
            writes: number("WEIR_CHECKER_WRITES"),
            moment: Duration::from_millis(if long { 1500 } else { 300 }),
            calm: Duration::from_millis(if long { 4000 } else { 200 }),
            disturbances: Disturbance::ALL.to_vec(),
            rest_every: 5,
            beside_max: None,
            weir: None,
            environment: Vec::new(),
            // Nothing heals by growing old.
            config: "[cache]\nmax_age = \"12h\"".to_owned(),
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_checker_finds_nothing_stale_whatever_is_disturbed() -> Result<()> {
    let settings = Settings::asked_for()?;
    eprintln!("checker: {} reads, seed {}", settings.reads, settings.seed);
    let report = run(settings).await?;
    if let Some(Violation { what, text, reads, after }) = report.found {
        anyhow::bail!("{what} after {reads} reads and {after:?}: {text}");
    }
    // How many there are depends on how fast writes are, which wait for what is disturbed.
    ensure!(report.right_after * 100 >= report.reads, "too few reads right after a write");
    Ok(())
}

async fn run(settings: Settings) -> Result<Report> {
    let seed = settings.seed;
    let desk = Arc::new(Desk::set_up(settings).await?);
    let mut workers = traffic::begin(&desk, seed);
    workers.spawn(tell_progress(Arc::clone(&desk)));
    let disturbed = disturb(&desk, Dice::new(seed ^ 0x4d)).await;
    let compared = if desk.found().is_none() && disturbed.is_ok() { desk.last_rest().await } else { Ok(()) };
    desk.close();
    while let Some(ended) = workers.join_next().await {
        let ended = ended?;
        if desk.found().is_none() {
            ended?;
        }
    }
    for proxy in desk.proxies() {
        desk.count_answers(proxy).await;
    }
    let figure = |count: &AtomicU64| count.load(SeqCst);
    let report = Report {
        found: desk.found(),
        reads: figure(&desk.figures.reads),
        right_after: figure(&desk.figures.right_after),
        disturbances: figure(&desk.figures.disturbances),
        elapsed: desk.elapsed(),
        lost_commits: figure(&desk.figures.lost_commits),
    };
    tell(&desk, &report);
    if report.found.is_none() {
        disturbed?;
        compared?;
    }
    Ok(report)
}

/// Until the run ends: one line each time.
async fn tell_progress(desk: Arc<Desk>) -> Result<()> {
    let figure = |count: &AtomicU64| count.load(SeqCst);
    let mut told = (0, desk.elapsed());
    while !desk.is_closed() {
        sleep(Duration::from_millis(200)).await;
        let (reads, elapsed) = (figure(&desk.figures.reads), desk.elapsed());
        if elapsed < told.1 + PROGRESS {
            continue;
        }
        let rate = (reads - told.0) as f64 / elapsed.saturating_sub(told.1).as_secs_f64();
        told = (reads, elapsed);
        eprintln!(
            "checker: {elapsed:.0?}: {reads} of {} reads ({rate:.0}/s), {} writes, {} statements failed, {} disturbances, \
            {} times all compared, violations: {}",
            if desk.settings.reads == u64::MAX { "any number of".to_owned() } else { desk.settings.reads.to_string() },
            figure(&desk.figures.writes),
            figure(&desk.figures.failed),
            figure(&desk.figures.disturbances),
            figure(&desk.figures.rests),
            u8::from(desk.found().is_some()),
        );
    }
    Ok(())
}

fn tell(desk: &Desk, report: &Report) {
    let figure = |count: &AtomicU64| count.load(SeqCst);
    let figures = &desk.figures;
    let asked = (report.reads + figure(&figures.reads_beside)).max(1);
    let Answered { memory, redis, replicas } = desk.answered();
    let share = |count: i64| count as f64 * 100.0 / asked as f64;
    eprintln!(
        "checker: {} reads in {:.0?}, {} of them right after a write on another connection, {} writes, {} statements failed, \
        {} disturbances, {} times all compared; beside weir {} writes, {} reads; {} commits lost on purpose; answered by memory \
        {:.1} %, Redis {:.1} %, replicas {:.1} %, else the primary",
        report.reads,
        report.elapsed,
        report.right_after,
        figure(&figures.writes),
        figure(&figures.failed),
        report.disturbances,
        figure(&figures.rests),
        figure(&figures.writes_beside),
        figure(&figures.reads_beside),
        report.lost_commits,
        share(memory),
        share(redis),
        share(replicas),
    );
}

/// Until enough was read: one disturbance after the other, each at another place.
async fn disturb(desk: &Desk, mut dice: Dice) -> Result<()> {
    let settings = &desk.settings;
    // At least one of each kind, in the order the dice give, however soon enough was read.
    let mut left = settings.disturbances.clone();
    let enough = || desk.figures.reads.load(SeqCst) >= settings.reads;
    while !desk.is_closed() && (!enough() || !left.is_empty()) {
        if settings.longest.is_some_and(|longest| desk.elapsed() > longest) {
            break;
        }
        sleep(settings.calm.mul_f64(0.5 + dice.roll(100) as f64 / 100.0)).await;
        if desk.is_closed() {
            break;
        }
        let kind = match left.len() {
            0 if settings.disturbances.is_empty() => None,
            0 => Some(dice.pick(&settings.disturbances)),
            some => Some(left.swap_remove(dice.roll(some))),
        };
        if let Some(kind) = kind {
            eprintln!("checker: after {:.1?}, {kind:?}", desk.elapsed());
            let happened = timeout(4 * PATIENCE, kind.happen(desk, &mut dice)).await;
            happened.with_context(|| format!("{kind:?} never ends"))?.with_context(|| format!("{kind:?}"))?;
        }
        let disturbances = desk.figures.disturbances.fetch_add(1, SeqCst) + 1;
        desk.next_pace();
        if disturbances.is_multiple_of(settings.rest_every) {
            desk.rest().await?;
        }
    }
    Ok(())
}
