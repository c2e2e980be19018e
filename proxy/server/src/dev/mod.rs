//! `weir dev`: the whole tier on this machine, from nothing, in one command.
//!
//! Reading order: [`run`] (start, say, watch, stop) → `stack` (what is started, in which order) → `say` (what is printed)
//! → `tour` (three statements and where they go) → `progress`.
//!
//! Invariant: whatever way it ends, everything it started ends with it; unless it is kept, its directory is gone too.
//! Non-goals: durability, other machines, anything an operator should copy into production.

mod progress;
mod say;
mod stack;
mod tour;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

use progress::Progress;
use stack::Stack;

/// How often children are looked after.
const WATCH_EVERY: Duration = Duration::from_millis(200);

/// Arguments of `weir dev`.
#[derive(Clone, Debug, clap::Args)]
pub struct DevArgs {
    /// Shards, each a Postgres primary of its own.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub shards: u32,
    /// Streaming replicas of each shard.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=4))]
    pub replicas: u32,
    /// Keep the data: the next start goes on with it, and it stays until you remove the directory.
    #[arg(long)]
    pub keep: bool,
    /// Print one line of JSON when everything is ready, and nothing else, on standard output.
    #[arg(long)]
    pub json: bool,
    /// Where everything is put. Without it: a directory under the system's temporary directory.
    #[arg(long, value_name = "DIRECTORY")]
    pub state_dir: Option<PathBuf>,
    /// Start no storefront and load no catalogue: an empty database.
    #[arg(long)]
    pub no_storefront: bool,
    /// Products to load: category,sku,name,brand,price_cents,stock. Without it: catalogue.csv in the state directory, else
    /// generated ones.
    #[arg(long, value_name = "CSV", env = "WEIR_DEV_CATALOGUE")]
    pub catalogue: Option<PathBuf>,
    /// weir's port for Postgres clients. Without it: 6432, or a free one.
    #[arg(long, value_name = "PORT")]
    pub weir_port: Option<u16>,
    /// weir's port for HTTP. Without it: 9187, or a free one.
    #[arg(long, value_name = "PORT")]
    pub http_port: Option<u16>,
}

/// Starts the tier, says how to use it, and keeps it up until it is told to stop. An error if anything of it died.
pub async fn run(args: DevArgs) -> Result<()> {
    let mut stop = StopSignals::listen()?;
    let progress = Progress::new();
    let stack = tokio::select! {
        started = Stack::start(&args, &progress) => started?,
        // Cancel-safe: whatever had been started is owned by the future that is dropped here.
        () = stop.wait() => {
            progress.clear();
            progress.note("stopped before it was ready");
            return Ok(());
        }
    };
    progress.finish();
    let died = tokio::select! {
        died = tell_and_watch(&stack, &args) => died,
        () = stop.wait() => Ok(()),
    };
    let (kept, directory) = (stack.is_kept(), stack.directory().to_owned());
    progress.note(if kept { "stopping all servers" } else { "stopping all servers and removing what they wrote" });
    // Stopping waits for processes: not on a thread that drives tasks.
    tokio::task::spawn_blocking(move || stack.stop()).await?;
    if kept {
        progress
            .note(&format!("the data is kept in {0}; weir dev --state-dir {0} goes on with it", directory.display()));
    }
    died
}

/// Prints what there is, then returns only when a child has died, naming it.
async fn tell_and_watch(stack: &Stack, args: &DevArgs) -> Result<()> {
    let text = if args.json {
        serde_json::to_string(&say::endpoints(stack))? + "\n"
    } else {
        say::page(stack, &tour::take(stack).await)
    };
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("writing to standard output")?;
    drop(out);
    loop {
        if let Some((name, log_tail)) = stack.first_dead() {
            bail!("{name} has died. Its log ends with:\n{log_tail}");
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// Ctrl-C, a polite kill, and the terminal going away.
struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl StopSignals {
    fn listen() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Cancel-safe: a signal that arrives between two waits is seen by the second.
    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use weir_local::{ConfigSpec, Run, Tier, TierSpec};

    #[tokio::test]
    async fn weir_accepts_the_configuration_that_is_written_for_it() {
        let run = Run::temporary("devtest").expect("a run");
        let spec = TierSpec { shards: 1, replicas: 1, hub_replicas: 0, redis: true, log_statements: false };
        let tier = Tier::start(&run, &spec, Arc::new(|_| {})).await.expect("starts");
        let path = tier.write_config(&ConfigSpec { port: 1, http_port: 2, extra: String::new() }).expect("written");
        let config = crate::config::Config::load(&path).expect("accepted");
        assert_eq!(config.databases.len(), 1);
        assert_eq!(config.databases[0].shards[0].replicas.len(), 1);
        assert_eq!(config.databases[0].tables.len(), 15, "13 sharded and 2 reference tables");
    }
}
