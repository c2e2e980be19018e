//! The `weir` command.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use weir::app::{ConfigSource, Running};
use weir::config::{Config, Flags};

/// A Postgres-wire data-tier proxy and cache.
#[derive(Parser)]
#[command(name = "weir", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve clients: in front of one server with --upstream alone, or as a config file says. Flags win over the file.
    Run {
        /// The config file [default: weir.toml, where there is no --upstream]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        #[command(flatten)]
        flags: Box<Flags>,
    },
    /// Check a config file; exit 2 and say where if it is wrong.
    Check {
        #[arg(value_name = "FILE", default_value = USUAL_FILE)]
        config: PathBuf,
        /// Also ask the shards, and compare their schemas; exit 2 if they differ
        #[arg(long)]
        connect: bool,
    },
    /// Say where a running weir would send a statement, and why, without running it.
    Explain(weir::explain::ExplainArgs),
    /// Propose which tables of a database to shard, and by which keys, from the statements it gets. Changes nothing.
    Advise(weir::advise::AdviseArgs),
    /// Find what interrupted moves have left on the shards, and rows that lie where they do not belong.
    Doctor(weir::doctor::DoctorArgs),
    /// Move slots between shards while clients go on: plan, start, watch, hand over, go back.
    Reshard(weir::reshard::cli::ReshardArgs),
    /// Fill a running weir's cache before its clients come.
    Cache(weir::warm::CacheArgs),
    /// Start a whole throw-away tier on this machine: shards, replicas, hub, Redis, weir, storefront.
    Dev(weir::dev::DevArgs),
}

/// `weir dev` has servers to start and watch besides serving.
const DEV_WORKERS: usize = 2;

/// What `weir run` reads when nobody says otherwise.
const USUAL_FILE: &str = "weir.toml";

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Check { config, connect } => match weir::config::check(&config) {
            Ok(summary) => {
                println!("{summary}");
                return if connect { compare_shards(&config) } else { ExitCode::SUCCESS };
            }
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::from(2);
            }
        },
        Command::Run { config, flags } => {
            match source(config, *flags).and_then(|source| Ok((source.read()?, source))) {
                Ok((config, source)) => run(config, source),
                Err(error) => {
                    eprintln!("{error:#}");
                    return ExitCode::from(2);
                }
            }
        }
        Command::Explain(arguments) => say(weir::explain::run(arguments)),
        Command::Advise(arguments) => say(weir::advise::run(arguments)),
        Command::Reshard(arguments) => say(weir::reshard::cli::run(arguments)),
        Command::Doctor(arguments) => say(weir::doctor::run(arguments)),
        Command::Cache(arguments) => say(weir::warm::run(arguments)),
        Command::Dev(arguments) => runtime(DEV_WORKERS).and_then(|runtime| runtime.block_on(weir::dev::run(arguments))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weir: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what a command has found out.
fn say(answer: impl Future<Output = Result<String>>) -> Result<()> {
    print!("{}", runtime(1)?.block_on(answer)?);
    Ok(())
}

/// `weir check --connect`: prints where the shards differ.
fn compare_shards(config: &Path) -> ExitCode {
    let compared = Config::load(config).map_err(anyhow::Error::from).and_then(|config| {
        let differences = runtime(1)?.block_on(weir::app::differences(&config))?;
        for line in &differences {
            println!("{line}");
        }
        Ok(differences.is_empty())
    });
    match compared {
        Ok(true) => {
            println!("the shards' schemas are the same");
            ExitCode::SUCCESS
        }
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(2)
        }
    }
}

/// The file that was named; else none if there is an upstream; else the usual one.
fn source(file: Option<PathBuf>, flags: Flags) -> Result<ConfigSource> {
    let file = match file {
        Some(file) => Some(file),
        None if flags.upstream.is_some() => None,
        None if std::fs::exists(USUAL_FILE).unwrap_or(true) => Some(USUAL_FILE.into()),
        None => bail!(
            "there is no {USUAL_FILE} here and no --upstream, so weir does not know which server to serve. Either\n  \
             weir run --upstream postgres://admin@db.example.com:5432\nfor every database of one server, or\n  \
             weir run --config /etc/weir/weir.toml\nfor everything else"
        ),
    };
    Ok(ConfigSource { file, flags, log_level: None })
}

fn runtime(workers: usize) -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?)
}

fn run(config: Config, mut source: ConfigSource) -> Result<()> {
    source.log_level = Some(weir::log::start(&config.log));
    #[cfg(feature = "unsound")]
    weir::unsound::warn();
    if let (Some(file), given) = (&source.file, source.flags.given())
        && !given.is_empty()
    {
        tracing::info!("the command line wins over {} for {}", file.display(), given.join(", "));
    }
    raise_open_files();
    runtime(config.workers)?.block_on(async {
        let running = Running::start(config, source).await?;
        println!("{}", running.introduction()?);
        running.serve(stop_signal()).await
    })
}

/// Every connection is a file. The soft limit is often 1024, for the sake of programs that use select(2).
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(limit = ?limit.current, "cannot raise the limit of open files: {error}");
    }
}

/// SIGINT or SIGTERM.
async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    // Both are cancel-safe: a signal that is not taken here ends the process anyway.
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
