//! The servers under load: two Postgres clusters with the same rows, PgBouncer, Redis, and two weirs.
//!
//! One weir has its cache off and serves two databases: `bench` (one shard: pooling and relaying alone) and `routed` (two
//! shards: every statement is routed by its key). The other has its cache on. Everything listens on 127.0.0.1, asks for
//! SCRAM, and is gone when [`Stage`] is dropped.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pgbench::Mode;
use crate::raw::Account;
use anyhow::{Context as _, Result, bail};
use weir_local::{Cluster, ClusterSpec, Database, Process, Redis, Run, StopSignal, Weir, free_port, password};

/// Server connections of each pooler: PgBouncer's and weir's default alike.
const POOL_SIZE: u32 = 20;
/// Lengths of the values that cache hits can be measured with, which are their keys as well.
pub const VALUE_BYTES: [usize; 3] = [64, 512, 4096];
const USER: &str = "bench";
/// PgBouncer's name for the database in session mode.
const SESSION_MODE: &str = "bench_session";
const NO_CACHE: &str = "[cache]\nenabled = false\n";
const PGBOUNCER_WAIT: Duration = Duration::from_secs(10);

/// A way from the client to the rows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Path {
    Direct,
    PgBouncer,
    Weir,
    WeirRouted,
}

impl Path {
    pub const ALL: [Path; 4] = [Path::Direct, Path::PgBouncer, Path::Weir, Path::WeirRouted];

    pub fn name(self) -> &'static str {
        match self {
            Path::Direct => "direct",
            Path::PgBouncer => "PgBouncer",
            Path::Weir => "weir",
            Path::WeirRouted => "weir, routed over 2 shards",
        }
    }
}

/// A proxy that can be crowded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pooler {
    PgBouncer,
    Weir,
}

impl Pooler {
    pub const ALL: [Pooler; 2] = [Pooler::PgBouncer, Pooler::Weir];

    pub fn name(self) -> &'static str {
        match self {
            Pooler::PgBouncer => "PgBouncer",
            Pooler::Weir => "weir",
        }
    }
}

/// A proxy of its own, for one measurement.
pub struct Crowded {
    process: CrowdedProcess,
    pub port: u16,
}

enum CrowdedProcess {
    PgBouncer(PgBouncer),
    Weir(Weir),
}

impl Crowded {
    pub fn pid(&self) -> u32 {
        match &self.process {
            CrowdedProcess::PgBouncer(bouncer) => bouncer.process.pid(),
            CrowdedProcess::Weir(weir) => weir.pid().unwrap_or(u32::MAX),
        }
    }
}

/// What differs between the proxies of one run.
#[derive(Clone, Copy)]
struct Size {
    server_connections: u32,
    clients: usize,
}

const SMALL: Size = Size { server_connections: POOL_SIZE, clients: 1000 };

/// Everything that runs. Fields are dropped in order: programs before the servers they talk to.
pub struct Stage {
    weir: Weir,
    weir_port: u16,
    cached: Weir,
    cached_port: u16,
    pub cached_http_port: u16,
    pub pgbouncer: PgBouncer,
    pub redis: Redis,
    pub cluster: Cluster,
    second: Cluster,
    password: String,
    binary: PathBuf,
    pub run: Arc<Run>,
}

pub struct PgBouncer {
    process: Process,
    port: u16,
    /// As it prints it, for example 1.18.0.
    pub version: String,
}

impl PgBouncer {
    pub fn has_prepared_statements(&self) -> bool {
        has_prepared_statements(&self.version)
    }
}

/// Since 1.21 PgBouncer follows protocol-level prepared statements in transaction mode.
fn has_prepared_statements(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (1, 21)
}

impl Drop for Stage {
    /// A weir that counts for profile-guided optimisation writes its counts when it ends, so it is asked to.
    fn drop(&mut self) {
        self.weir.stop();
        self.cached.stop();
    }
}

impl Stage {
    /// Starts all of it and fills both clusters. `binary`: the weir to start, if it is not the one beside us.
    pub async fn start(scale: u32, binary: Option<PathBuf>) -> Result<Self> {
        let beside = std::env::current_exe()?.parent().map(|dir| dir.join("weir"));
        let binary = binary.or(beside).context("an executable is in a directory")?;
        let run = Run::temporary("bench")?;
        let password = password();
        let cluster = Cluster::start(&run, spec("shard0", &password)).await?;
        let second = Cluster::start(&run, spec("shard1", &password)).await?;
        for cluster in [&cluster, &second] {
            fill(&run, cluster, &password, scale).await?;
        }
        let redis = Redis::start(&run).await?;
        let pgbouncer = start_pgbouncer(&run, "pgbouncer", &cluster, &password, SMALL).await?;
        let files =
            Files { run: &run, password: &password, binary: &binary, clusters: [&cluster, &second], size: SMALL };
        let (weir, weir_port, _) = start_weir(&files, "plain", NO_CACHE).await?;
        let cache = format!("[cache]\nenabled = true\nother_weirs = \"ignore\"\nredis = \"{}\"\n", redis.url());
        let (cached, cached_port, cached_http_port) = start_weir(&files, "cached", &cache).await?;
        Ok(Stage {
            weir,
            weir_port,
            cached,
            cached_port,
            cached_http_port,
            pgbouncer,
            redis,
            cluster,
            second,
            password,
            binary,
            run,
        })
    }

    /// A proxy of its own for `clients` clients over 50 server connections.
    pub async fn crowded(&self, pooler: Pooler, clients: usize) -> Result<Crowded> {
        let size = Size { server_connections: crate::crowd::SERVER_CONNECTIONS, clients };
        let (process, port) = match pooler {
            Pooler::PgBouncer => {
                let bouncer =
                    start_pgbouncer(&self.run, "crowded-pgbouncer", &self.cluster, &self.password, size).await?;
                let port = bouncer.port;
                (CrowdedProcess::PgBouncer(bouncer), port)
            }
            Pooler::Weir => {
                let clusters = [&self.cluster, &self.second];
                let (run, password, binary) = (&self.run, self.password.as_str(), self.binary.as_path());
                let files = Files { run, password, binary, clusters, size };
                let (weir, port, _) = start_weir(&files, "crowded", NO_CACHE).await?;
                (CrowdedProcess::Weir(weir), port)
            }
        };
        Ok(Crowded { process, port })
    }

    /// Who logs in, for [`crate::raw`].
    pub fn account(&self, port: u16, database: &'static str) -> Account {
        Account::new(port, USER, database, &self.password)
    }

    /// Port and database of a path. Where PgBouncer cannot prepare in transaction mode it does in session mode.
    pub fn address(&self, path: Path, mode: Option<Mode>) -> (u16, &'static str) {
        match path {
            Path::Direct => (self.cluster.port(), "bench"),
            Path::PgBouncer if mode == Some(Mode::Prepared) && !self.pgbouncer.has_prepared_statements() => {
                (self.pgbouncer.port, SESSION_MODE)
            }
            Path::PgBouncer => (self.pgbouncer.port, "bench"),
            Path::Weir => (self.weir_port, "bench"),
            Path::WeirRouted => (self.weir_port, "routed"),
        }
    }

    /// The process that stands between client and server on a path.
    pub fn proxy_pid(&self, path: Path) -> Option<u32> {
        match path {
            Path::Direct => None,
            Path::PgBouncer => Some(self.pgbouncer.process.pid()),
            Path::Weir | Path::WeirRouted => self.weir.pid(),
        }
    }

    pub fn cached_weir_pid(&self) -> Option<u32> {
        self.cached.pid()
    }

    /// Logs in to the weir whose cache is on.
    pub fn cached_dsn(&self) -> String {
        format!("postgres://{USER}:{}@127.0.0.1:{}/bench", self.password, self.cached_port)
    }

    pub fn direct_dsn(&self) -> String {
        self.cluster.dsn("bench", USER)
    }

    /// pgbench of the same installation as the servers, with the password in its environment.
    pub fn pgbench(&self, port: u16) -> Command {
        pgbench(&self.run, &self.password, port)
    }
}

fn pgbench(run: &Run, password: &str, port: u16) -> Command {
    let mut command = Command::new(run.binaries().postgres("pgbench"));
    command.env("PGPASSWORD", password).args(["-h", "127.0.0.1", "-U", USER, "-p", &port.to_string()]);
    command
}

/// As a small server would be set: the rows fit into shared memory, so that the server costs little and the way shows.
fn spec(name: &str, password: &str) -> ClusterSpec {
    let mut spec = ClusterSpec::new(name, password)
        .database("bench", USER, password)
        .setting("shared_buffers", "256MB")
        .setting("max_connections", "300");
    spec.databases.push(Database { name: "weir_hub".to_owned(), owner: "weir_admin".to_owned() });
    spec
}

async fn fill(run: &Run, cluster: &Cluster, password: &str, scale: u32) -> Result<()> {
    let mut command = tokio::process::Command::from(pgbench(run, password, cluster.port()));
    command.args(["-i", "-q", "-s", &scale.to_string(), "bench"]).kill_on_drop(true);
    let said = command.output().await.context("cannot run pgbench")?;
    if !said.status.success() {
        bail!("pgbench -i failed:\n{}", String::from_utf8_lossy(&said.stderr));
    }
    let client = weir_harness::connect(&cluster.dsn("bench", USER)).await?;
    client.batch_execute("CREATE TABLE bench_value(id int PRIMARY KEY, body text NOT NULL)").await?;
    let sizes = VALUE_BYTES.map(|bytes| bytes as i32);
    client.execute("INSERT INTO bench_value SELECT n, repeat('v', n) FROM unnest($1::int[]) n", &[&&sizes[..]]).await?;
    client.batch_execute("ANALYZE bench_value").await?;
    Ok(())
}

/// PgBouncer checks clients against the server's own verifiers, as with `auth_query`: from a plain password it would make a
/// new verifier, 4096 rounds, at each log-in.
async fn start_pgbouncer(
    run: &Arc<Run>,
    label: &str,
    cluster: &Cluster,
    password: &str,
    size: Size,
) -> Result<PgBouncer> {
    let binary = pgbouncer_binary()?;
    let version = crate::cost::first_line(Command::new(&binary).arg("--version"));
    let version = version.trim_start_matches("PgBouncer ").to_owned();
    let port = free_port()?;
    let dir = run.path().join(label);
    run.account().create_dir(&dir)?;
    let users = dir.join("userlist.txt");
    let admin = weir_harness::connect(&cluster.admin_dsn("bench")).await?;
    let row = admin.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = $1", &[&USER]).await?;
    write_private(&users, &format!("\"{USER}\" \"{}\"\n", row.try_get::<_, &str>(0)?))?;
    let prepared = if has_prepared_statements(&version) { "max_prepared_statements = 200\n" } else { "" };
    let config = format!(
        "[databases]\nbench = host=127.0.0.1 port={server} dbname=bench\n{SESSION_MODE} = host=127.0.0.1 port={server} \
         dbname=bench pool_mode=session\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
         auth_type = scram-sha-256\nauth_file = {users}\npool_mode = transaction\ndefault_pool_size = {}\n\
         max_client_conn = {}\nlisten_backlog = 4096\nignore_startup_parameters = extra_float_digits\n{prepared}",
        size.server_connections,
        size.clients,
        server = cluster.port(),
        users = users.display()
    );
    let file = dir.join("pgbouncer.ini");
    write_private(&file, &config)?;
    for path in [&users, &file] {
        run.account().own(path)?;
    }
    let mut command = Command::new(binary);
    command.arg(&file).current_dir(&dir);
    run.account().apply(&mut command);
    let mut bouncer = PgBouncer { process: run.spawn(label, StopSignal::Kill, command)?, port, version };
    let dsn = format!("postgres://{USER}:{password}@127.0.0.1:{port}/bench");
    let deadline = Instant::now() + PGBOUNCER_WAIT;
    while let Err(error) = weir_harness::connect(&dsn).await {
        if bouncer.process.exited().is_some() || Instant::now() > deadline {
            bail!("PgBouncer does not answer ({error:#}). Its log ends with:\n{}", bouncer.process.log_tail());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(bouncer)
}

/// Debian installs it into sbin, which is not in everyone's PATH.
fn pgbouncer_binary() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")]);
    let mut candidates = dirs.map(|dir| dir.join("pgbouncer"));
    candidates.find(|file| file.is_file()).context("no pgbouncer found. Install it with: make bench")
}

/// What a weir is started from.
struct Files<'a> {
    run: &'a Arc<Run>,
    password: &'a str,
    binary: &'a std::path::Path,
    clusters: [&'a Cluster; 2],
    size: Size,
}

impl Files<'_> {
    /// Writes weir.toml with what it names into a directory of its own.
    fn write(&self, name: &str, ports: (u16, u16), cache: &str) -> Result<PathBuf> {
        let dir = self.run.path().join(format!("weir-{name}"));
        std::fs::create_dir_all(&dir)?;
        let [first, second] = self.clusters;
        let (listen, http) = ports;
        let mut text = format!(
            "listen = \"127.0.0.1:{listen}\"\nhttp_listen = \"127.0.0.1:{http}\"\nusers_file = \"users.toml\"\n\
             admin_users = [\"{USER}\"]\n\n[hub]\ndsn = \"{}\"\n\n[server_auth]\nuser = \"weir_admin\"\n\
             password_file = \"admin.pw\"\n\n[pool]\nsize = {}\n\n[limits]\nclient_connections_max = {}\n\n\
             {cache}\n[log]\nlevel = \"warn\"\n",
            first.admin_dsn("weir_hub"),
            self.size.server_connections,
            self.size.clients
        );
        for (database, shards) in [("bench", &[first][..]), ("routed", &[first, second][..])] {
            let _ = writeln!(text, "\n[database.{database}]\nserver_database = \"bench\"");
            for (index, shard) in shards.iter().enumerate() {
                let _ = writeln!(
                    text,
                    "\n[[database.{database}.shard]]\nname = \"shard{index}\"\nprimary = \"{}\"",
                    shard.address()
                );
            }
        }
        text.push_str("\n[[database.routed.table]]\nname = \"pgbench_accounts\"\nkind = \"sharded\"\n");
        text.push_str("key = \"aid\"\ntype = \"integer\"\n");
        write_private(&dir.join("users.toml"), &format!("[user.{USER}]\npassword = \"{}\"\n", self.password))?;
        write_private(&dir.join("admin.pw"), &format!("{}\n", self.password))?;
        let path = dir.join("weir.toml");
        write_private(&path, &text)?;
        Ok(path)
    }
}

/// Gives its ports for clients and for HTTP.
async fn start_weir(files: &Files<'_>, name: &str, cache: &str) -> Result<(Weir, u16, u16)> {
    let ports = (free_port()?, free_port()?);
    let config = files.write(name, ports, cache)?;
    let weir =
        Weir::start(files.run, files.binary, &config, ports.1).await.with_context(|| format!("weir ({name})"))?;
    Ok((weir, ports.0, ports.1))
}

/// A file that only we can read, from its first byte on.
fn write_private(path: &std::path::Path, text: &str) -> Result<()> {
    let mut file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(file.write_all(text.as_bytes())?)
}
