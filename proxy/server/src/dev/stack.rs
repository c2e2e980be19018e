//! What `weir dev` starts, in the order in which one needs the other: Postgres and Redis, weir, the catalogue, the shop.
//!
//! Invariant: fields are dropped top to bottom, so a server outlives everything that talks to it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use weir_local::{
    ConfigSpec, Leftovers, Run, Storefront, StorefrontSpec, Tier, TierSpec, TierState, Weir, port_or_free,
};

use super::DevArgs;
use super::progress::Progress;

/// Ports people remember, taken when they are free.
const WEIR_PORT: u16 = 6432;
const HTTP_PORT: u16 = 9187;
const STOREFRONT_PORT: u16 = 8080;
/// Names the catalogue a kept database holds.
const LOADED_FILE: &str = "catalogue.loaded";

/// Everything that runs.
pub(super) struct Stack {
    pub(super) storefront: Option<Storefront>,
    pub(super) weir: Weir,
    pub(super) port: u16,
    pub(super) http_port: u16,
    /// What the shop sells, in words.
    pub(super) catalogue: Option<String>,
    pub(super) tier: Tier,
}

/// Where the products come from.
enum Catalogue {
    File(PathBuf),
    Generated,
}

impl Stack {
    /// Starts everything. Dropping the future stops what it had started.
    pub(super) async fn start(args: &DevArgs, progress: &Progress) -> Result<Self> {
        let storefront_binary = if args.no_storefront { None } else { Some(beside_ourselves("storefront")?) };
        let catalogue_given = args.catalogue.as_deref().map(checked_catalogue).transpose()?;
        let run = open_run(args, progress)?;
        let tier = start_tier(&run, args, progress).await?;
        let (weir, port, http_port) = start_weir(&tier, args, progress).await?;
        let mut stack = Self { storefront: None, weir, port, http_port, catalogue: None, tier };
        if let Some(binary) = storefront_binary {
            let catalogue = catalogue_given.unwrap_or_else(|| found_catalogue(&run));
            stack.catalogue = Some(stack.load(&binary, catalogue, progress).await?);
            stack.storefront = Some(stack.open_shop(binary, progress).await?);
        }
        stack.save_ports()?;
        Ok(stack)
    }

    /// The URL applications use.
    pub(super) fn weir_dsn(&self, database: &str) -> String {
        format!("postgres://shop:{}@127.0.0.1:{}/{database}", self.tier.state.shop_password, self.port)
    }

    pub(super) fn directory(&self) -> &Path {
        self.tier.run.path()
    }

    /// The name and log of a child that ended by itself, if any did.
    pub(super) fn first_dead(&self) -> Option<(String, String)> {
        // From the bottom up: a shard's death may be what ended those above it.
        let dead = self.tier.first_dead();
        let dead = dead.or_else(|| self.weir.exited().map(|_| ("weir".to_owned(), self.weir.log_tail())));
        dead.or_else(|| {
            let storefront = self.storefront.as_ref()?;
            storefront.exited().map(|_| ("the storefront".to_owned(), storefront.log_tail()))
        })
    }

    /// Whether the data outlives this run.
    pub(super) fn is_kept(&self) -> bool {
        self.tier.run.leftovers() == Leftovers::Keep
    }

    /// Stops everything; kept data in an order that leaves nothing to recover. Blocks.
    pub(super) fn stop(self) {
        if self.is_kept() {
            if let Some(storefront) = &self.storefront {
                storefront.stop();
            }
            self.weir.stop();
            self.tier.stop_cleanly();
        }
    }

    /// Makes the tables and loads the products through weir; gives in words what was loaded.
    async fn load(&self, binary: &Path, catalogue: Catalogue, progress: &Progress) -> Result<String> {
        let words = match &catalogue {
            Catalogue::File(path) => format!("the products of {}", path.display()),
            Catalogue::Generated => "300 generated products".to_owned(),
        };
        let marker = self.directory().join(LOADED_FILE);
        if std::fs::read_to_string(&marker).is_ok_and(|loaded| loaded == words) {
            return Ok(words);
        }
        let stage = progress.stage(&format!("loading {words} through weir"));
        let begun = Instant::now();
        let dsn = self.weir_dsn("shop");
        let failed = || format!("through weir, whose log ends with:\n{}", self.weir.log_tail());
        Storefront::command(binary, &["migrate"], &dsn).await.with_context(failed)?;
        match &catalogue {
            Catalogue::File(path) => {
                let path = path.to_str().context("the path of the catalogue is not UTF-8")?;
                Storefront::command(binary, &["load", "--catalogue", path], &dsn).await.with_context(failed)?;
            }
            Catalogue::Generated => {
                Storefront::command(binary, &["load", "--generated"], &dsn).await.with_context(failed)?;
            }
        }
        std::fs::write(&marker, &words)?;
        stage.done(&format!("loaded {words} through weir in {:.1} s", begun.elapsed().as_secs_f32()));
        Ok(words)
    }

    async fn open_shop(&self, binary: PathBuf, progress: &Progress) -> Result<Storefront> {
        let stage = progress.stage("starting the storefront");
        let state = &self.tier.state;
        let spec = StorefrontSpec {
            label: "storefront".to_owned(),
            binary,
            database_url: self.weir_dsn("shop"),
            port: port_or_free(preferred(state, "storefront", STOREFRONT_PORT))?,
            environment: vec![("STOREFRONT_SECRET".to_owned(), state.storefront_secret.clone())],
        };
        let storefront = Storefront::start(&self.tier.run, &spec).await?;
        stage.done("the storefront is open");
        Ok(storefront)
    }

    /// Remembers the ports, so that a later start on this directory is found where this one was.
    fn save_ports(&mut self) -> Result<()> {
        let storefront = self.storefront.as_ref().and_then(|shop| shop.url().rsplit(':').next()?.parse().ok());
        let ports = &mut self.tier.state.ports;
        ports.extend([("weir".to_owned(), self.port), ("http".to_owned(), self.http_port)]);
        ports.extend(storefront.map(|port| ("storefront".to_owned(), port)));
        self.tier.state.save(&self.tier.run)
    }
}

/// The directory of this run: the one asked for; else the usual place if data is or will be kept there; else a new one.
fn open_run(args: &DevArgs, progress: &Progress) -> Result<Arc<Run>> {
    let usual = Run::usual_place("dev")?;
    let leftovers = if args.keep { Leftovers::Keep } else { Leftovers::Remove };
    let chosen = match &args.state_dir {
        Some(path) => Some(path),
        None => (args.keep || Run::is_kept(&usual)).then_some(&usual),
    };
    let goes_on = chosen.is_some_and(|path| Run::is_kept(path));
    let run = match chosen {
        Some(path) => Run::at(path, leftovers)?,
        None => Run::temporary("dev")?,
    };
    if goes_on {
        progress.note(&format!(
            "going on with the data kept in {0}; remove that directory to start afresh",
            run.path().display()
        ));
    }
    if let Some(name) = run.account().name() {
        progress.note(&format!("running as root, so Postgres and Redis run as user {name}"));
    }
    Ok(run)
}

async fn start_tier(run: &Arc<Run>, args: &DevArgs, progress: &Progress) -> Result<Tier> {
    let redis = run.binaries().redis_server.is_some();
    if !redis {
        progress.note(
            "redis-server is not installed: weir caches in its own memory alone (apt-get install redis-server adds it)",
        );
    }
    let spec = TierSpec { shards: args.shards, replicas: args.replicas, hub_replicas: 0, redis, log_statements: false };
    let total = args.shards * (1 + args.replicas) + 1 + u32::from(redis);
    let what = format!("Postgres {}{}", run.binaries().postgres_version, if redis { " and Redis" } else { "" });
    let stage = progress.stage(&format!("starting {what}: {total} servers"));
    let (begun, ready, told) = (Instant::now(), AtomicU32::new(0), stage.clone());
    let shown = what.clone();
    let on_start = move |name: &str| {
        let ready = ready.fetch_add(1, Ordering::Relaxed) + 1;
        told.update(&format!("starting {shown}: {ready} of {total} ({name})"));
    };
    let tier = Tier::start(run, &spec, Arc::new(on_start)).await?;
    stage.done(&format!("{what}: {total} servers in {:.1} s", begun.elapsed().as_secs_f32()));
    Ok(tier)
}

async fn start_weir(tier: &Tier, args: &DevArgs, progress: &Progress) -> Result<(Weir, u16, u16)> {
    let stage = progress.stage("starting weir");
    let port = choose_port(args.weir_port, preferred(&tier.state, "weir", WEIR_PORT))?;
    let http_port = choose_port(args.http_port, preferred(&tier.state, "http", HTTP_PORT))?;
    let config = tier.write_config(&ConfigSpec { port, http_port, extra: String::new() })?;
    let ourselves = std::env::current_exe().context("the path of this program")?;
    let weir = Weir::start(&tier.run, &ourselves, &config, http_port).await?;
    stage.done(&format!("weir is ready on port {port}"));
    Ok((weir, port, http_port))
}

/// The port of the last start on this directory, else the usual one.
fn preferred(state: &TierState, name: &str, usual: u16) -> u16 {
    match state.port(name) {
        0 => usual,
        port => port,
    }
}

/// A port that was asked for must be had; one that was not may be another.
fn choose_port(asked: Option<u16>, preferred: u16) -> Result<u16> {
    let Some(asked) = asked else { return port_or_free(preferred) };
    let port = port_or_free(asked)?;
    if asked != 0 && port != asked {
        bail!("port {asked} is in use by another process");
    }
    Ok(port)
}

fn beside_ourselves(name: &str) -> Result<PathBuf> {
    let path = std::env::current_exe().context("the path of this program")?.with_file_name(name);
    if !path.is_file() {
        bail!(
            "{} is not there. Build it (cargo build -p storefront, with --release if weir was), or start with --no-storefront",
            path.display()
        );
    }
    Ok(path)
}

fn checked_catalogue(path: &Path) -> Result<Catalogue> {
    // Absolute, because it also names what a kept database holds.
    let path = path.canonicalize().with_context(|| format!("cannot read the catalogue {}", path.display()))?;
    Ok(Catalogue::File(path))
}

fn found_catalogue(run: &Run) -> Catalogue {
    let path = run.path().join("catalogue.csv");
    if path.is_file() { Catalogue::File(path) } else { Catalogue::Generated }
}
