//! Command line of the storefront: serve, migrate, load, sandbox-pay.
//!
//! Invariant: standard output carries results only (`--ready-json`, counts); everything else goes to standard error.

use std::fs::File;
use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use storefront::app::{self, Serve};
use storefront::catalogue::{self, generated};
use storefront::keys::{Keys, Origin};
use storefront::pay::sandbox::Addresses;
use storefront::store::{Db, schema};
use storefront::web::session::PasswordCost;
use tracing_subscriber::EnvFilter;

/// First product ids: the generated catalogue and files do not share any.
const GENERATED_FROM: i64 = 1_001;
const FILE_FROM: i64 = 100_001;

/// A thin shop that knows one DATABASE_URL.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Open the shop, its workers, and the payment sandbox on a second port.
    Serve(ServeArgs),
    /// Create what is missing of the schema.
    Migrate(Database),
    /// Load a catalogue. Repeating it changes nothing.
    Load(LoadArgs),
    /// Run the payment sandbox alone.
    SandboxPay(SandboxArgs),
}

#[derive(Args)]
struct Database {
    /// postgres://user:password@host:port/database
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
}

#[derive(Args)]
struct Secret {
    /// At least 16 characters; signs order references and webhooks. Made up for this process if absent.
    #[arg(long, env = "STOREFRONT_SECRET", hide_env_values = true)]
    secret: Option<String>,
    /// A file that holds the secret.
    #[arg(long, env = "STOREFRONT_SECRET_FILE")]
    secret_file: Option<PathBuf>,
}

impl Secret {
    fn load(&self) -> anyhow::Result<(Keys, Origin)> {
        Keys::load(self.secret.as_deref(), self.secret_file.as_deref())
    }
}

#[derive(Args)]
struct ServeArgs {
    #[command(flatten)]
    database: Database,
    #[command(flatten)]
    secret: Secret,
    /// Where to listen; port 0 takes a free one.
    #[arg(long, env = "STOREFRONT_LISTEN", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Most connections to the database.
    #[arg(long, env = "STOREFRONT_CONNECTIONS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=1000))]
    connections: u32,
    /// Create what is missing of the schema first.
    #[arg(long)]
    migrate: bool,
    /// Print {"listening":…,"payments":…} when ready.
    #[arg(long)]
    ready_json: bool,
    /// The address customers use, if not the one in their Host header; https makes cookies secure.
    #[arg(long, env = "STOREFRONT_PUBLIC_URL")]
    public_url: Option<String>,
    /// Where the payment sandbox listens.
    #[arg(long, env = "STOREFRONT_PAYMENTS_LISTEN", default_value = "127.0.0.1:0")]
    payments_listen: SocketAddr,
    /// The address customers reach the payment page at.
    #[arg(long, env = "STOREFRONT_PAYMENTS_PUBLIC_URL")]
    payments_public_url: Option<String>,
    /// Use the payment provider at this address instead of starting the sandbox.
    #[arg(long, env = "STOREFRONT_PAYMENTS_URL")]
    payments_url: Option<String>,
    /// Seconds that stock is reserved for an unpaid order.
    #[arg(long, default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    hold_seconds: u64,
    /// Milliseconds between looks for background work.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(50..=60_000))]
    work_every_ms: u64,
    /// Memory of a password hash in KiB.
    #[arg(long, env = "STOREFRONT_ARGON2_KIB", default_value_t = 19_456)]
    argon2_kib: u32,
    /// Passes of a password hash.
    #[arg(long, env = "STOREFRONT_ARGON2_PASSES", default_value_t = 2)]
    argon2_passes: u32,
    /// Opens /admin/report. Without it the report is open on loopback listeners and closed on others.
    #[arg(long, env = "STOREFRONT_ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
}

#[derive(Args)]
struct LoadArgs {
    #[command(flatten)]
    database: Database,
    /// A CSV file: category,sku,name,brand,price_cents,stock
    #[arg(long, conflicts_with = "generated", required_unless_present = "generated")]
    catalogue: Option<PathBuf>,
    /// The built-in catalogue of 300 products.
    #[arg(long)]
    generated: bool,
    /// Only the first so many.
    #[arg(long)]
    limit: Option<usize>,
}

#[derive(Args)]
struct SandboxArgs {
    #[command(flatten)]
    secret: Secret,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:8081")]
    listen: SocketAddr,
    /// The address customers reach it at.
    #[arg(long, default_value = "")]
    public_url: String,
    /// Where the shop takes webhooks, http://…/webhooks/payments
    #[arg(long)]
    webhook_url: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,tokio_postgres=warn"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    match run(Cli::parse().command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("storefront: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => serve(args).await,
        Command::Migrate(database) => schema::migrate(&Db::new(&database.database_url, 2)?).await,
        Command::Load(args) => load(args).await,
        Command::SandboxPay(args) => {
            let (keys, origin) = args.secret.load()?;
            anyhow::ensure!(
                origin == Origin::Given,
                "the sandbox needs the secret of its shop: --secret or --secret-file"
            );
            let addresses = Addresses { public_url: args.public_url, webhook_url: args.webhook_url };
            app::serve_sandbox(args.listen, addresses, &keys).await
        }
    }
}

async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let keys = args.secret.load()?;
    let options = Serve {
        listen: args.listen,
        database_url: args.database.database_url,
        connections: args.connections,
        migrate: args.migrate,
        ready_json: args.ready_json,
        public_url: args.public_url,
        payments_listen: args.payments_listen,
        payments_public_url: args.payments_public_url,
        payments_url: args.payments_url,
        hold_for: Duration::from_secs(args.hold_seconds),
        work_every: Duration::from_millis(args.work_every_ms),
        password_cost: PasswordCost { memory_kib: args.argon2_kib, passes: args.argon2_passes },
        admin_token: args.admin_token,
    };
    app::serve(options, keys).await
}

async fn load(args: LoadArgs) -> anyhow::Result<()> {
    let db = Db::new(&args.database.database_url, 2)?;
    let limit = args.limit.unwrap_or(usize::MAX);
    let began = Instant::now();
    let loaded = match &args.catalogue {
        Some(path) => {
            let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
            catalogue::load(&db, catalogue::read_csv(file).take(limit), FILE_FROM).await?
        }
        None => catalogue::load(&db, generated::rows(limit).map(Ok), GENERATED_FROM).await?,
    };
    if loaded.skipped > 0 {
        tracing::warn!(skipped = loaded.skipped, "some rows have no effect: other articles have taken their ids");
    }
    println!("{} products loaded in {:.1} s", loaded.products, began.elapsed().as_secs_f64());
    Ok(())
}
