//! `weir-bench`: weir beside direct Postgres, PgBouncer and Redis, in one run on one machine.
//!
//! Paths are measured in turn, round after round, and medians are compared: what else the machine does hits all alike, so
//! the ratios are worth more than the figures. Reading order: [`stage`] starts the servers, [`pgbench`] and [`hits`] put load
//! on them, [`cost`] reads what it cost from /proc, [`report`] prints.
//! Non-goals: an open-loop load, several machines, any judgement (the exit code only says whether all of it ran).

mod cost;
mod hits;
mod pgbench;
mod report;
mod stage;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;

use hits::{HitSample, Reader};
use pgbench::{Mode, TxSample};
use report::{Machine, Report};
use stage::{Path, Stage};

/// Compares weir with direct Postgres, PgBouncer and Redis.
#[derive(Parser)]
#[command(version, about)]
struct Args {
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
    /// Clients of pgbench.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=200))]
    clients: u32,
    /// pgbench's scale: 100,000 rows each.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    scale: u32,
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
    if args.quick {
        (args.secs, args.rounds, args.scale) = (2, 1, 1);
    }
    let machine_before = cost::load_average();
    eprintln!("starting PostgreSQL, PgBouncer, Redis and weir …");
    let stage = Stage::start(args.scale).await?;
    let transactions = transactions(&stage, &args).await?;
    let hits = hits_everywhere(&stage, &args).await?;
    let machine = Machine::describe(&stage, machine_before);
    let report = Report { machine, secs: args.secs, rounds: args.rounds, clients: args.clients, transactions, hits };
    if args.json {
        eprintln!("{}", report.markdown());
        println!("{}", report.json());
    } else {
        println!("{}", report.markdown());
    }
    Ok(())
}

/// pgbench -S in every mode on every path, interleaved.
async fn transactions(stage: &Stage, args: &Args) -> Result<Vec<TxSample>> {
    let mut samples = Vec::new();
    for round in 1..=args.rounds {
        for &mode in &args.protocols {
            for path in Path::ALL {
                if mode == Mode::Prepared && path == Path::PgBouncer && !stage.pgbouncer.has_prepared_statements() {
                    continue;
                }
                let sample = pgbench::run(stage, path, mode, args.clients, args.secs).await?;
                eprintln!("round {round}/{}: {sample}", args.rounds);
                samples.push(sample);
            }
        }
    }
    Ok(samples)
}

/// Repeated reads of one 512-byte value from weir's cache, from Redis, and from Postgres itself.
async fn hits_everywhere(stage: &Stage, args: &Args) -> Result<Vec<HitSample>> {
    let mut samples = Vec::new();
    for round in 1..=args.rounds {
        for connections in [16, 64] {
            for reader in Reader::ALL {
                let sample = hits::run(stage, reader, connections, Duration::from_secs(args.secs)).await?;
                eprintln!("round {round}/{}: {sample}", args.rounds);
                samples.push(sample);
            }
        }
    }
    Ok(samples)
}
