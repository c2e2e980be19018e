//! The database as the shop sees it: a pool of connections, each with the statements it has prepared.
//!
//! Invariant: a connection whose state is in doubt (closed, timed out, or dropped inside a transaction) never goes back to
//! the pool. Every wait is bounded: `WAIT_MAX` for a connection, `STATEMENT_MAX` for a statement.
//! Non-goals: TLS to the database, and knowing what answers at the DATABASE_URL.

pub mod cart;
pub mod catalog;
pub mod numeric;
pub mod orders;
pub mod outbox;
pub mod report;
pub mod schema;
pub mod sql;
pub mod stock;
pub mod users;

use std::collections::HashMap;
use std::pin::pin;
use std::str::FromStr as _;
use std::time::Duration;

use bb8::{ManageConnection, PooledConnection};
use futures_util::TryStreamExt as _;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Row, Statement};

/// Parameters of a statement.
pub type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

const WAIT_MAX: Duration = Duration::from_secs(3);
const STATEMENT_MAX: Duration = Duration::from_secs(15);
const LIFETIME_MAX: Duration = Duration::from_secs(30 * 60);

/// Why the database gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nobody answers, the connection broke, or the server asked to come back later.
    #[error("the database is not available: {0}")]
    Unavailable(String),
    /// The server refused the statement.
    #[error("the database refused a statement: {0}")]
    Refused(#[source] tokio_postgres::Error),
    /// The rows are not those the statement promises.
    #[error("unexpected rows: {0}")]
    Shape(#[source] tokio_postgres::Error),
}

impl StoreError {
    fn of(error: tokio_postgres::Error) -> Self {
        match error.code() {
            Some(code) if is_outage(code) => Self::Unavailable(full(&error)),
            Some(_) => Self::Refused(error),
            None if error.is_closed() || is_broken(&error) => Self::Unavailable(full(&error)),
            // A parameter that does not fit, or an answer that cannot be read: a fault of this program.
            None => Self::Shape(error),
        }
    }

    /// The SQLSTATE, where the server gave one.
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            Self::Refused(error) => error.code(),
            Self::Unavailable(_) | Self::Shape(_) => None,
        }
    }

    /// Whether the statement surely had no effect because its prepared form was gone.
    fn is_stale_statement(&self) -> bool {
        match self.code() {
            Some(code) if *code == SqlState::INVALID_SQL_STATEMENT_NAME => true,
            Some(code) if *code == SqlState::FEATURE_NOT_SUPPORTED => {
                matches!(self, Self::Refused(error) if full(error).contains("cached plan"))
            }
            _ => false,
        }
    }
}

/// Connection exceptions, an administrator's command, a server that starts, stops or is full.
fn is_outage(code: &SqlState) -> bool {
    let code = code.code();
    code.starts_with("08") || code.starts_with("57P") || code.starts_with("53")
}

/// Whether the network is to blame.
fn is_broken(error: &tokio_postgres::Error) -> bool {
    std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<std::io::Error>)
}

/// The message with its causes: tokio-postgres alone says "db error".
fn full(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// One connection and its prepared statements; bounded by the number of constants in `sql`.
pub struct Connection {
    client: Client,
    statements: HashMap<&'static str, Statement>,
    suspect: bool,
}

/// What a statement brought: its rows, and how many rows it read or changed.
struct Answer {
    rows: Vec<Row>,
    changed: u64,
}

impl Connection {
    async fn run(&mut self, sql: &'static str, params: Params<'_>) -> Result<Answer, StoreError> {
        // Suspect until the answer is complete, so that a cancelled request leaves nothing half-read in the pool.
        let before = std::mem::replace(&mut self.suspect, true);
        match tokio::time::timeout(STATEMENT_MAX, self.ask(sql, params)).await {
            Ok(Ok(answer)) => {
                self.suspect = before;
                Ok(answer)
            }
            Ok(Err(error)) => {
                let error = StoreError::of(error);
                let answered = matches!(&error, StoreError::Refused(_)) && !self.client.is_closed();
                self.suspect = before || !answered || error.is_stale_statement();
                Err(error)
            }
            Err(_) => Err(StoreError::Unavailable(format!("no answer within {} s", STATEMENT_MAX.as_secs()))),
        }
    }

    async fn ask(&mut self, sql: &'static str, params: Params<'_>) -> Result<Answer, tokio_postgres::Error> {
        let statement = match self.statements.get(sql) {
            Some(statement) => statement.clone(),
            None => {
                let statement = self.client.prepare(sql).await?;
                self.statements.insert(sql, statement.clone());
                statement
            }
        };
        let mut stream = pin!(self.client.query_raw(&statement, params.iter().copied()).await?);
        let mut rows = Vec::new();
        while let Some(row) = stream.try_next().await? {
            rows.push(row);
        }
        Ok(Answer { rows, changed: stream.rows_affected().unwrap_or(0) })
    }

    async fn command(&mut self, sql: &str) -> Result<(), StoreError> {
        match tokio::time::timeout(STATEMENT_MAX, self.client.batch_execute(sql)).await {
            Ok(done) => done.map_err(StoreError::of),
            Err(_) => Err(StoreError::Unavailable(format!("no answer within {} s", STATEMENT_MAX.as_secs()))),
        }
    }
}

/// Makes connections for the pool.
pub struct Connector {
    config: tokio_postgres::Config,
}

impl ManageConnection for Connector {
    type Connection = Connection;
    type Error = StoreError;

    async fn connect(&self) -> Result<Connection, StoreError> {
        let connected = self.config.connect(NoTls).await;
        let (client, driver) = connected.map_err(|error| StoreError::Unavailable(full(&error)))?;
        tokio::spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!(error = full(&error), "a database connection ended");
            }
        });
        Ok(Connection { client, statements: HashMap::new(), suspect: false })
    }

    // Not asked: a round trip per check-out would cost more than the retry of `Db::read`.
    async fn is_valid(&self, _: &mut Connection) -> Result<(), StoreError> {
        Ok(())
    }

    fn has_broken(&self, connection: &mut Connection) -> bool {
        connection.suspect || connection.client.is_closed()
    }
}

/// The pool.
#[derive(Clone)]
pub struct Db {
    pool: bb8::Pool<Connector>,
}

impl Db {
    /// A pool of at most `size` connections to `url`; connects when first used.
    pub fn new(url: &str, size: u32) -> anyhow::Result<Self> {
        let mut config = tokio_postgres::Config::from_str(url)
            .map_err(|error| anyhow::anyhow!("DATABASE_URL is not a Postgres address: {error}"))?;
        config.connect_timeout(WAIT_MAX);
        if config.get_application_name().is_none() {
            config.application_name("storefront");
        }
        let pool = bb8::Pool::builder()
            .max_size(size)
            .connection_timeout(WAIT_MAX)
            .max_lifetime(LIFETIME_MAX)
            .test_on_check_out(false)
            .retry_connection(true)
            .build_unchecked(Connector { config });
        Ok(Self { pool })
    }

    async fn get(&self) -> Result<PooledConnection<'_, Connector>, StoreError> {
        // After a failover every idle connection is dead: pass over those that are known to be. Each one passed over
        // leaves the pool, which bounds the loop.
        loop {
            let connection = self.pool.get().await.map_err(|error| match error {
                bb8::RunError::User(error) => error,
                bb8::RunError::TimedOut => {
                    StoreError::Unavailable(format!("no connection within {} s", WAIT_MAX.as_secs()))
                }
            })?;
            if !connection.client.is_closed() {
                return Ok(connection);
            }
        }
    }

    /// Runs a read. It is repeated once, on another connection, if the first was lost under it.
    pub async fn read(&self, sql: &'static str, params: Params<'_>) -> Result<Vec<Row>, StoreError> {
        // Not repeated if there is no connection to be had: the pool has tried for `WAIT_MAX` already.
        let mut connection = self.get().await?;
        match connection.run(sql, params).await {
            Err(error) if matches!(error, StoreError::Unavailable(_)) || error.is_stale_statement() => {
                tracing::debug!(%error, "a read is tried once more");
                drop(connection);
                Ok(self.get().await?.run(sql, params).await?.rows)
            }
            done => Ok(done?.rows),
        }
    }

    /// The first row of a read, if there is one.
    pub async fn read_opt(&self, sql: &'static str, params: Params<'_>) -> Result<Option<Row>, StoreError> {
        Ok(self.read(sql, params).await?.into_iter().next())
    }

    /// Runs one writing statement as its own transaction. Repeated only if it surely had no effect.
    pub async fn write(&self, sql: &'static str, params: Params<'_>) -> Result<Vec<Row>, StoreError> {
        match self.once(sql, params).await {
            Err(error) if error.is_stale_statement() => self.once(sql, params).await,
            done => done,
        }
    }

    async fn once(&self, sql: &'static str, params: Params<'_>) -> Result<Vec<Row>, StoreError> {
        Ok(self.get().await?.run(sql, params).await?.rows)
    }

    /// Runs one statement and tells how many rows it changed.
    pub async fn change(&self, sql: &'static str, params: Params<'_>) -> Result<u64, StoreError> {
        Ok(self.get().await?.run(sql, params).await?.changed)
    }

    /// Opens a transaction. It must stay with the rows of one key.
    pub async fn begin(&self) -> Result<Tx<'_>, StoreError> {
        let mut connection = self.get().await?;
        connection.suspect = true;
        if let Err(error) = connection.command("BEGIN").await {
            // The pooled connection was idle and may have died meanwhile; nothing has happened yet.
            tracing::debug!(%error, "BEGIN is tried once more");
            drop(connection);
            connection = self.get().await?;
            connection.suspect = true;
            connection.command("BEGIN").await?;
        }
        Ok(Tx { connection })
    }

    /// A connection of its own, outside the pool, for bulk work.
    pub async fn dedicated(&self) -> Result<Client, StoreError> {
        Ok(self.pool.dedicated_connection().await?.client)
    }
}

/// An open transaction. Dropped without an end, it takes its connection with it, which makes the server roll back.
pub struct Tx<'a> {
    connection: PooledConnection<'a, Connector>,
}

impl Tx<'_> {
    /// Runs a statement that returns rows.
    pub async fn query(&mut self, sql: &'static str, params: Params<'_>) -> Result<Vec<Row>, StoreError> {
        Ok(self.connection.run(sql, params).await?.rows)
    }

    /// Runs a statement and tells how many rows it changed.
    pub async fn change(&mut self, sql: &'static str, params: Params<'_>) -> Result<u64, StoreError> {
        Ok(self.connection.run(sql, params).await?.changed)
    }

    /// Commits.
    pub async fn commit(mut self) -> Result<(), StoreError> {
        self.connection.command("COMMIT").await?;
        self.connection.suspect = false;
        Ok(())
    }

    /// Rolls back and returns the connection to the pool.
    pub async fn rollback(mut self) -> Result<(), StoreError> {
        self.connection.command("ROLLBACK").await?;
        self.connection.suspect = false;
        Ok(())
    }
}
