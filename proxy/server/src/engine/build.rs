//! One build: the servers are compared, the database made if it is missing, and its contents replaced if they differ.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hashbrown::HashMap;
use sha2::{Digest as _, Sha256};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};
use weir_core::engine::{ShardServer, Skipped, Target, reach, script};
use weir_core::id::ShardId;
use weir_core::lock::ENGINE;
use weir_core::sql::word::{quote_literal, quote_name};

use super::read::{Declared, ReadError, read};
use super::{Engine, Problem, Ready};
use crate::auth::credential::Credential;
use crate::back::connect::Login;
use crate::back::tls::ServerTlsMode;
use crate::control::{self, OpenError};
use crate::database::View;

/// Part of the digest, so that a newer weir makes anew what an older one has made.
const MAKER: &str = concat!("weir ", env!("CARGO_PKG_VERSION"));
/// How long a build waits for statements that run on the engine before it tries again later.
const LOCK_WAIT: &str = "5s";

/// What must be equal on all servers for the same statement to mean the same: strings are compared and sorted on either side.
const KIND: &str = "
SELECT current_setting('server_version_num')::int4 / 10000, pg_encoding_to_char(d.encoding)::text, d.datcollate::text, d.datctype::text,
       coalesce(to_jsonb(d) ->> 'datlocprovider', 'c'), coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale', ''),
       d.oid
FROM pg_database d WHERE d.datname = $1";
/// Since 15.
const COLLATION_VERSION: &str = "SELECT coalesce(pg_database_collation_actual_version($1), '')";

/// Nothing in it that weir would destroy.
const EMPTY: &str = "
SELECT NOT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                   WHERE n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'weir_fdw'))";

/// A database's nature, as [`KIND`] tells it.
#[derive(PartialEq, Eq, Clone, Debug)]
struct Kind {
    version: i32,
    encoding: String,
    collate: String,
    ctype: String,
    provider: String,
    locale: String,
    collation_version: String,
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error.as_db_error() {
            Some(refusal) if !matches!(refusal.code().code().get(..2), Some("57" | "08" | "53")) => {
                Problem::Unfit(format!("{}: {}", refusal.code().code(), refusal.message()))
            }
            Some(refusal) => Problem::Unreachable(refusal.message().to_owned()),
            None => Problem::Unreachable(error.to_string()),
        }
    }
}

impl From<OpenError> for Problem {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Driver(error) => error.into(),
            other => Problem::Unreachable(other.to_string()),
        }
    }
}

impl From<ReadError> for Problem {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Postgres(error) => error.into(),
            strange @ ReadError::Strangers { .. } => Problem::Unfit(strange.to_string()),
        }
    }
}

/// Brings the engine into step with `view`, and primaries of this age or later ones; true: something had to be made.
pub async fn build(engine: &Engine, (view, age): (&View, u64)) -> Result<(Ready, bool), Problem> {
    let topology = &view.topology;
    let at_home = engine.shards.of(topology.home);
    let home = open(at_home).await?;
    let kind = kind(&home, &at_home.database).await?.ok_or_else(gone)?;
    let logins: Vec<&Login> = topology.active().iter().map(|shard| engine.shards.of(*shard)).collect();
    let others = topology.active().iter().zip(&logins).filter(|(shard, _)| **shard != topology.home);
    for (_, login) in others {
        let other = open(login).await?;
        same_kind(&kind, &self::kind(&other, &login.database).await?.ok_or_else(gone)?, &login.route.endpoint().host)?;
    }
    let (hub, superuser) = hub(engine, &kind).await?;
    let declared = Declared { rules: &view.rules, catalog: &view.catalog };
    let read = read(&home, &declared).await?;
    let shards = logins.iter().map(|login| shard_server(login, engine.config.server_ca.as_deref()));
    let shards = shards.collect::<Result<Vec<_>, _>>()?;
    // Here shards are numbered as they stand among those that take part.
    let place = |shard: ShardId| ShardId(topology.active().binary_search(&shard).unwrap_or_default() as u16);
    let guests: Vec<_> = topology.active().iter().map(|shard| topology.moves.guests(*shard)).collect();
    let text = script(
        &read,
        &Target {
            database: &engine.database,
            epoch: view.topology.epoch,
            shards: &shards,
            home: usize::from(place(topology.home).0),
            slots: &view.topology.slots.renumbered(place),
            rules: &view.rules,
            guests: &guests,
            partitions: engine.config.partitions && superuser,
            superuser,
            work_mem_kib: engine.config.work_mem >> 10,
            temp_kib_max: engine.config.temp_bytes_max >> 10,
        },
    );
    let (token, made) = install(&hub, (&text, &shards), view.topology.epoch.0 as i64).await?;
    let skipped = hub.query("SELECT kind, name, shown, reason FROM weir_engine.skipped ORDER BY 1, 3", &[]).await?;
    let skipped = skipped.iter().map(|row| {
        Ok(Skipped { kind: row.try_get(0)?, name: row.try_get(1)?, shown: row.try_get(2)?, reason: row.try_get(3)? })
    });
    let skipped = skipped.collect::<Result<Vec<_>, Error>>()?;
    let ready = Ready {
        version: view.version,
        epoch: view.topology.epoch,
        age,
        token,
        skipped,
        types: same_types(&hub, &home).await?,
    };
    Ok((ready, made))
}

fn gone() -> Problem {
    Problem::Unreachable("a server has no such database any more".to_owned())
}

async fn open(login: &Login) -> Result<Client, Problem> {
    Ok(control::target(login).open().await?)
}

async fn kind(client: &Client, database: &str) -> Result<Option<Kind>, Error> {
    let Some(row) = client.query_opt(KIND, &[&database]).await? else { return Ok(None) };
    let version = row.try_get(0)?;
    let oid: u32 = row.try_get(6)?;
    let collation_version =
        if version >= 15 { client.query_one(COLLATION_VERSION, &[&oid]).await?.try_get(0)? } else { String::new() };
    Ok(Some(Kind {
        version,
        encoding: row.try_get(1)?,
        collate: row.try_get(2)?,
        ctype: row.try_get(3)?,
        provider: row.try_get(4)?,
        locale: row.try_get(5)?,
        collation_version,
    }))
}

fn same_kind(home: &Kind, other: &Kind, where_: &str) -> Result<(), Problem> {
    if home == other {
        return Ok(());
    }
    let show = |kind: &Kind| {
        format!(
            "version {}, {}, {} {}, {} {}",
            kind.version, kind.encoding, kind.collate, kind.ctype, kind.locale, kind.collation_version
        )
    };
    Err(Problem::Unfit(format!(
        "Postgres version, encoding and collation must be the same on the home shard ({}) and {where_} ({})",
        show(home),
        show(other)
    )))
}

/// A connection to the engine's database, which is made if it is missing; and whether the account is a superuser.
async fn hub(engine: &Engine, home: &Kind) -> Result<(Client, bool), Problem> {
    let server = engine.hub.open().await?;
    let superuser: bool =
        server.query_one("SELECT rolsuper FROM pg_roles WHERE rolname = current_user", &[]).await?.try_get(0)?;
    if kind(&server, &engine.database).await?.is_none() {
        make_database(&server, &engine.database, home).await?;
    }
    let own = kind(&server, &engine.database).await?.ok_or_else(gone)?;
    same_kind(home, &own, "the hub")?;
    let mut own = engine.hub.clone();
    own.config.dbname(&engine.database);
    Ok((own.open().await?, superuser))
}

async fn make_database(server: &Client, name: &str, home: &Kind) -> Result<(), Problem> {
    let [encoding, collate, ctype, locale] =
        [&home.encoding, &home.collate, &home.ctype, &home.locale].map(|text| quote_literal(text));
    let provider = match &*home.provider {
        "i" => format!(" LOCALE_PROVIDER icu ICU_LOCALE {locale}"),
        "b" => format!(" LOCALE_PROVIDER builtin BUILTIN_LOCALE {locale}"),
        _ => String::new(),
    };
    let sql = format!(
        "CREATE DATABASE {} TEMPLATE template0 ENCODING {encoding} LC_COLLATE {collate} LC_CTYPE {ctype}{provider}",
        quote_name(name)
    );
    match server.batch_execute(&sql).await {
        // Another proxy was quicker.
        Err(error) if error.code() == Some(&SqlState::DUPLICATE_DATABASE) => Ok(()),
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => Ok(()),
        made => Ok(made?),
    }
}

/// A shard as the hub's server is to log in to it.
fn shard_server(login: &Login, authority: Option<&str>) -> Result<ShardServer, Problem> {
    let (sslmode, verifies) = match login.tls.mode() {
        ServerTlsMode::Disable => ("disable", false),
        ServerTlsMode::Prefer => ("prefer", false),
        ServerTlsMode::Require => ("require", false),
        ServerTlsMode::VerifyCa => ("verify-ca", true),
        ServerTlsMode::VerifyFull => ("verify-full", true),
    };
    if verifies && authority.is_none() {
        let why = "server_tls verifies the shards' certificates; for the hub's server to do the same, engine.server_ca must name \
                   the file there that holds their authority";
        return Err(Problem::Unfit(why.to_owned()));
    }
    let password = match &*login.credential.now() {
        Credential::Password(password) => Some(password.to_string()),
        _ => None,
    };
    let endpoint = login.route.endpoint();
    Ok(ShardServer {
        host: endpoint.host.clone(),
        port: endpoint.port,
        database: login.database.to_string(),
        user: login.user.to_string(),
        password,
        sslmode,
        sslrootcert: authority.filter(|_| verifies).map(str::to_owned),
    })
}

/// Runs the text unless the database is what it would make. Gives its token.
async fn install(hub: &Client, (text, shards): (&str, &[ShardServer]), epoch: i64) -> Result<(String, bool), Problem> {
    let digest = Sha256::new().chain_update(MAKER).chain_update(text).finalize();
    let digest = STANDARD.encode(digest);
    hub.batch_execute(&format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL lock_timeout = '{LOCK_WAIT}'; SELECT pg_advisory_xact_lock({ENGINE})")).await?;
    let known: bool = hub.query_one("SELECT to_regclass('weir_engine.state') IS NOT NULL", &[]).await?.try_get(0)?;
    let state =
        if known { hub.query_opt("SELECT token, digest, epoch FROM weir_engine.state", &[]).await? } else { None };
    if let Some(state) = state {
        let (token, found, theirs): (String, String, i64) = (state.try_get(0)?, state.try_get(1)?, state.try_get(2)?);
        if theirs > epoch {
            return Err(Problem::Building);
        }
        if found == digest {
            hub.batch_execute("COMMIT").await?;
            return Ok((token, false));
        }
    }
    if !known && !hub.query_one(EMPTY, &[]).await?.try_get::<_, bool>(0)? {
        return Err(Problem::Unfit(
            "its database on the hub holds other things already; name another in [engine] database".to_owned(),
        ));
    }
    // Whatever the server logs of statements, these hold passwords.
    let quiet = "SELECT set_config(name, value, true) FROM (VALUES ('log_statement', 'none'), ('log_min_error_statement', 'panic'), \
                 ('log_min_duration_statement', '-1')) AS v(name, value) \
                 WHERE (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)";
    hub.batch_execute(quiet).await?;
    hub.batch_execute(text).await?;
    for (number, shard) in shards.iter().enumerate().filter(|(_, shard)| shard.sslrootcert.is_some()) {
        let sql = format!("SELECT FROM {} LIMIT 1", reach(number));
        hub.batch_execute(&sql).await.map_err(|error| out_of_reach(shard, &error))?;
    }
    let token = format!("{:032x}", rand::random::<u128>());
    hub.execute("INSERT INTO weir_engine.state (token, digest, epoch) VALUES ($1, $2, $3)", &[&token, &digest, &epoch])
        .await?;
    hub.batch_execute("COMMIT").await?;
    Ok((token, true))
}

/// The hub's server cannot log in to a shard with what it has been told.
fn out_of_reach(shard: &ShardServer, error: &Error) -> Problem {
    let Some(refusal) = error.as_db_error() else { return Problem::Unreachable(error.to_string()) };
    let why = refusal.detail().unwrap_or(refusal.message()).replace('\n', "; ");
    Problem::Unfit(format!("the hub's server cannot log in to {}:{}: {why}", shard.host, shard.port))
}

/// Types made by users have another OID on each server.
async fn same_types(hub: &Client, home: &Client) -> Result<HashMap<u32, u32>, Error> {
    const TYPES: &str = "
SELECT n.nspname || '.' || t.typname, t.oid FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
WHERE t.oid >= 16384";
    let theirs: HashMap<String, u32> = home
        .query(TYPES, &[])
        .await?
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<_, Error>>()?;
    let mut same = HashMap::new();
    for row in hub.query(TYPES, &[]).await? {
        if let Some(there) = theirs.get(row.try_get::<_, &str>(0)?) {
            same.insert(row.try_get(1)?, *there);
        }
    }
    Ok(same)
}
