//! `weir-bench`: weir beside direct Postgres, PgBouncer and Redis, in one run on one machine.
//!
//! Paths are measured in turn, round after round, and medians are compared: what else the machine does hits all alike, so
//! the ratios are worth more than the figures. Reading order: [`stage`] starts the servers; [`pgbench`], [`hits`],
//! [`crowd`], [`bulk`] and [`prepared`] put load on them ([`raw`] is their client); [`mixed`], [`shards`], [`copying`] and [`tpch`] start tiers
//! of their own,
//! as do [`replicas`] and [`reshard`], [`planning`] needs none; [`cost`] reads what it cost from /proc, [`report`] prints.
//! Non-goals: several machines, any judgement (the exit code only says whether all of it ran).

mod bulk;
mod copying;
mod cost;
mod crowd;
mod hits;
mod mixed;
mod pgbench;
mod planning;
mod prepared;
mod raw;
mod replicas;
mod report;
mod reshard;
mod shards;
mod stage;
mod tpch;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::builder::TypedValueParser as _;
use clap::{Parser, ValueEnum as _};

use bulk::{BulkSample, Load};
use crowd::CrowdSample;
use hits::{HitSample, Reader};
use mixed::Care;
use pgbench::{Mode, TxSample};
use prepared::PreparedSample;
use report::{Machine, Report};
use stage::{Path, Pooler, Stage};

/// What can be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Part {
    /// `pgbench -S` in its three protocols: throughput and processor time of the proxy.
    Pgbench,
    /// Repeated reads of one value, from weir's cache and from Redis.
    Reads,
    /// Reads and writes mixed, with the cache and without.
    Mixed,
    /// What planning a statement costs.
    Planning,
    /// 10,000 clients: how fast they get in, what they weigh when idle.
    Crowd,
    /// 1 GB of COPY, 10 million rows of SELECT, and a slow reader.
    Bulk,
    /// A million different prepared statements.
    Prepared,
    /// The same rows on 2, 4 and 8 shards: COPY in, scattered statements, merged reads.
    Shards,
    /// A table copied by a move, and by a pipe between the same servers.
    ReshardCopy,
    /// The queries of TPC-H on two shards.
    Tpch,
    /// How much a lagging replica and the cache take off the primary.
    Replicas,
    /// What clients feel of slots that move, and how many rows a fourth shard gets.
    Reshard,
}

impl Part {
    /// It is measured on servers of its own, or on none.
    fn has_own_stage(self) -> bool {
        !matches!(self, Part::Pgbench | Part::Reads | Part::Crowd | Part::Bulk | Part::Prepared)
    }
}

/// Compares weir with direct Postgres, PgBouncer and Redis.
#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// What to measure; all of it unless --quick is given, then the first three.
    #[arg(long, value_enum, value_delimiter = ',')]
    parts: Vec<Part>,
    /// Length of one measurement, in seconds.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(2..=600))]
    secs: u64,
    /// How often each path is measured; medians are shown.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// One short round: to see that everything runs, not for figures.
    #[arg(long)]
    quick: bool,
    /// Print one JSON object on standard output, and the tables on standard error.
    #[arg(long)]
    json: bool,
    /// Which of pgbench's protocols to measure.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Mode::ALL)]
    protocols: Vec<Mode>,
    /// Which weirs to put mixed reads and writes through.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Care::ALL)]
    cares: Vec<Care>,
    /// Writes among them, in percent.
    #[arg(long, value_delimiter = ',', default_values_t = mixed::WRITE_PERCENT)]
    writes: Vec<u32>,
    /// While they are measured, servers wait for the disk before they acknowledge a commit, as in service.
    #[arg(long)]
    durable: bool,
    /// Lengths of the value that is read again and again, of 64, 512 and 4096.
    #[arg(long, value_delimiter = ',', default_values_t = [512], value_parser = clap::builder::PossibleValuesParser::new(["64", "512", "4096"]).map(|bytes| bytes.parse::<usize>().unwrap_or_default()))]
    bytes: Vec<usize>,
    /// Rows of the tables whose slots move.
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 100_000, 1_000_000])]
    rows: Vec<i64>,
    /// Writes per second while they do.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(10..=100_000))]
    rate: u32,
    /// Clients of pgbench.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=200))]
    clients: u32,
    /// pgbench's scale: 100,000 rows each.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    scale: u32,
    /// Clients of the crowd. Both ends' sockets count against the limit of open files of their processes.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    crowd: u32,
    /// Megabytes of the table that a move copies.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    copy_mb: u32,
    /// The weir to measure; left out: the one beside this program.
    #[arg(long, value_name = "FILE")]
    weir: Option<std::path::PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weir-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(mut args: Args) -> Result<()> {
    const LIGHT: [Part; 3] = [Part::Pgbench, Part::Reads, Part::Planning];
    if args.quick {
        (args.secs, args.rounds, args.scale, args.crowd) = (2, 1, 1, args.crowd.min(1000));
        args.rows.truncate(1);
    }
    if args.parts.is_empty() {
        args.parts = if args.quick { LIGHT.to_vec() } else { Part::value_variants().to_vec() };
    }
    let machine_before = cost::load_average();
    let mut report = Report { secs: args.secs, rounds: args.rounds, clients: args.clients, ..Report::default() };
    if args.parts.contains(&Part::Planning) {
        report.planning = planning::run(Duration::from_millis(if args.quick { 40 } else { 150 }));
    }
    if args.parts.contains(&Part::Mixed) {
        let what = (args.cares.as_slice(), args.writes.as_slice());
        let site = (args.durable, args.weir.clone());
        report.durable = args.durable;
        report.mixed = mixed::run(Duration::from_secs(args.secs), args.rounds, what, site).await?;
    }
    if args.parts.contains(&Part::Shards) {
        let rows = if args.quick { 20_000 } else { 500_000 };
        report.spread = shards::run(rows, args.rounds, args.weir.clone()).await?;
    }
    if args.parts.contains(&Part::ReshardCopy) {
        let megabytes = if args.quick { 20 } else { args.copy_mb };
        report.copies = copying::run(megabytes as usize, args.rounds, args.weir.clone()).await?;
    }
    if args.parts.contains(&Part::Tpch) {
        let scale = if args.quick { 0.002 } else { 0.01 };
        (report.tpch_scale, report.tpch) = (scale, tpch::run(scale, args.rounds, args.weir.clone()).await?);
    }
    if args.parts.contains(&Part::Replicas) {
        report.off_primary = replicas::run(Duration::from_secs(args.secs), args.rounds, args.weir.clone()).await?;
    }
    if args.parts.contains(&Part::Reshard) {
        let (rows, rounds, rate, weir) = (args.rows.clone(), args.rounds, args.rate, args.weir.clone());
        (report.pauses, report.fourth_shard) = reshard::run(&reshard::Wanted { rows, rounds, rate, weir }).await?;
    }
    if args.parts.iter().any(|part| !part.has_own_stage()) {
        eprintln!("starting PostgreSQL, PgBouncer, Redis and weir …");
        let stage = Stage::start(args.scale, args.weir.clone()).await?;
        report.machine = Machine::describe(Some(&stage), machine_before);
        on_servers(&stage, &args, &mut report).await?;
    } else {
        report.machine = Machine::describe(None, machine_before);
    }
    report.machine.finish();
    if args.json {
        eprintln!("{}", report.markdown());
        println!("{}", report.json());
    } else {
        println!("{}", report.markdown());
    }
    Ok(())
}

/// Every part that needs servers.
async fn on_servers(stage: &Stage, args: &Args, report: &mut Report) -> Result<()> {
    for part in &args.parts {
        match part {
            Part::Pgbench => report.transactions = transactions(stage, args).await?,
            Part::Reads => report.hits = hits_everywhere(stage, args).await?,
            Part::Mixed
            | Part::Planning
            | Part::Shards
            | Part::ReshardCopy
            | Part::Tpch
            | Part::Replicas
            | Part::Reshard => {}
            Part::Crowd => report.crowds = crowds(stage, args).await?,
            Part::Bulk => (report.bulk, report.slow) = bulk_everywhere(stage, args).await?,
            Part::Prepared => report.prepared = prepared_everywhere(stage, args).await?,
        }
    }
    Ok(())
}

/// pgbench -S in every mode on every path, interleaved.
async fn transactions(stage: &Stage, args: &Args) -> Result<Vec<TxSample>> {
    let mut samples = Vec::new();
    for round in 1..=args.rounds {
        for &mode in &args.protocols {
            for path in Path::ALL {
                let sample = pgbench::run(stage, path, mode, args.clients, args.secs).await?;
                eprintln!("round {round}/{}: {sample}", args.rounds);
                samples.push(sample);
            }
        }
    }
    Ok(samples)
}

/// The same crowd for each proxy, one after the other.
async fn crowds(stage: &Stage, args: &Args) -> Result<Vec<CrowdSample>> {
    let mut samples = Vec::new();
    for pooler in Pooler::ALL {
        let sample = crowd::run(stage, pooler, args.crowd as usize).await?;
        eprintln!("{sample}");
        samples.push(sample);
    }
    Ok(samples)
}

/// Large results on every path, interleaved; then a slow reader of one.
async fn bulk_everywhere(stage: &Stage, args: &Args) -> Result<(Vec<BulkSample>, Vec<BulkSample>)> {
    let size = if args.quick { 20_000 } else { 1_000_000 };
    let mut samples = Vec::new();
    for round in 1..=args.rounds {
        for load in Load::ALL {
            for path in [Path::Direct, Path::PgBouncer, Path::Weir] {
                let sample = bulk::run(stage, load, path, size).await?;
                eprintln!("round {round}/{}: {sample}", args.rounds);
                samples.push(sample);
            }
        }
    }
    let mut slow = Vec::new();
    for path in [Path::PgBouncer, Path::Weir] {
        let sample = bulk::run_slowly(stage, path, Duration::from_secs(args.secs)).await?;
        eprintln!("slow reader: {sample}");
        slow.push(sample);
    }
    Ok((samples, slow))
}

/// Ever new prepared statements.
async fn prepared_everywhere(stage: &Stage, args: &Args) -> Result<Vec<PreparedSample>> {
    let texts = if args.quick { 20_000 } else { 1_000_000 };
    let mut samples = Vec::new();
    for path in [Path::Direct, Path::Weir] {
        let sample = prepared::run(stage, path, texts).await?;
        eprintln!("{sample}");
        samples.push(sample);
    }
    Ok(samples)
}

/// Repeated reads of one value from weir's cache, from Redis, and from Postgres itself.
async fn hits_everywhere(stage: &Stage, args: &Args) -> Result<Vec<HitSample>> {
    let mut samples = Vec::new();
    for round in 1..=args.rounds {
        for kind in args.bytes.iter().flat_map(|bytes| [16, 64, 256].map(|connections| (connections, *bytes))) {
            for reader in Reader::ALL {
                let sample = hits::run(stage, reader, kind, Duration::from_secs(args.secs)).await?;
                eprintln!("round {round}/{}: {sample}", args.rounds);
                samples.push(sample);
            }
        }
    }
    Ok(samples)
}
