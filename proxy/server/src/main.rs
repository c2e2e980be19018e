//! The `weir` command.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use weir::app::Running;
use weir::config::{Config, LogConfig, LogFormat, LogLevel};

/// A Postgres-wire data-tier proxy and cache.
#[derive(Parser)]
#[command(name = "weir", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve clients as the config file says.
    Run {
        #[arg(long, value_name = "FILE", default_value = "weir.toml")]
        config: PathBuf,
    },
    /// Check a config file; exit 2 and say where if it is wrong.
    Check {
        #[arg(value_name = "FILE", default_value = "weir.toml")]
        config: PathBuf,
    },
    /// Start a whole throw-away tier on this machine: shards, replicas, hub, Redis, weir, storefront.
    Dev(weir::dev::DevArgs),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Check { config } => match weir::config::check(&config) {
            Ok(summary) => {
                println!("{summary}");
                return ExitCode::SUCCESS;
            }
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::from(2);
            }
        },
        Command::Run { config } => match Config::load(&config) {
            Ok(config) => run(config),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::from(2);
            }
        },
        Command::Dev(arguments) => runtime().and_then(|runtime| runtime.block_on(weir::dev::run(arguments))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weir: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

fn run(config: Config) -> Result<()> {
    start_log(&config.log);
    raise_open_files();
    runtime()?.block_on(async {
        let running = Running::start(config).await?;
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

fn start_log(log: &LogConfig) {
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(level(log.level));
    match log.format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder.init(),
    }
}

fn level(level: LogLevel) -> tracing::Level {
    match level {
        LogLevel::Error => tracing::Level::ERROR,
        LogLevel::Warn => tracing::Level::WARN,
        LogLevel::Info => tracing::Level::INFO,
        LogLevel::Debug => tracing::Level::DEBUG,
        LogLevel::Trace => tracing::Level::TRACE,
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
