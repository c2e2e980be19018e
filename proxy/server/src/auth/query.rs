//! Who a user is according to the servers: `auth_query`, run on a connection of weir's own.
//!
//! Invariant: the user's name travels as a parameter, never as text, and names inside the query are looked up in
//! pg_catalog alone: the connection's search_path is set by weir at login, which beats what `ALTER ROLE` or `ALTER DATABASE` say.
//! At most [`ASKED_AT_ONCE`] questions are open, each for [`PATIENCE`] at most; at most [`KEPT`] answers are kept.
//! By default every login asks, so that a change of password counts at once; answers kept longer bridge outages only.
//!
//! Source: get_role_password in src/backend/libpq/crypt.c for what the answer means.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Mutex, Semaphore};
use tokio_postgres::types::{FromSql, Type};
use tokio_postgres::{Client, Row, Statement};
use weir_core::error::{Blame, UserError, sqlstate};

use super::secret::Stored;
use crate::control::{OpenError, Target};
use crate::roles::Roles;

/// Longest wait for a connection and an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest wait for one server before the next is tried.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// How long a server is asked that is not the first, before the first is tried again.
const SUBSTITUTE_MAX: Duration = Duration::from_secs(30);
const ASKED_AT_ONCE: usize = 64;
const KEPT: usize = 10_000;
/// How old an answer may be while no server can be asked.
const OUTAGE_MAX: Duration = Duration::from_secs(600);
/// A role's name has at most so many bytes (NAMEDATALEN); no longer one can exist.
const NAME_BYTES_MAX: usize = 63;
/// Names in the query are found here and nowhere else; temporary objects come last.
const PINNED: &str = "-c search_path=pg_catalog,pg_temp";
/// Seconds from the Unix epoch to the one of Postgres.
const POSTGRES_EPOCH: u64 = 946_684_800;

/// The query with its connection and its answers.
pub struct AuthQuery {
    sql: Box<str>,
    /// Whoever is the primary then.
    primary: Target,
    /// While there is none, of these those that have what it had.
    servers: Vec<Target>,
    roles: Arc<Roles>,
    /// An answer this young is used again.
    age_max: Duration,
    open: Mutex<Option<Arc<Connection>>>,
    permits: Semaphore,
    answers: quick_cache::sync::Cache<Box<str>, Answer>,
}

/// What the servers keep of a user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Role {
    /// `None`: no password, or one in a form that weir does not know.
    pub stored: Option<Stored>,
    /// VALID UNTIL, in microseconds since 2000, as Postgres counts.
    pub valid_until: Option<i64>,
}

#[derive(Clone)]
struct Answer {
    role: Option<Arc<Role>>,
    at: Instant,
    /// A proof has failed against it.
    doubted: bool,
}

struct Connection {
    client: Client,
    statement: Statement,
    since: Instant,
    /// To a server that stands in for the first one.
    substitute: bool,
}

impl AuthQuery {
    /// `primary` and `servers`, in their order, lead to those of `roles`.
    pub fn new(sql: &str, primary: Target, servers: Vec<Target>, roles: Arc<Roles>, age_max: Duration) -> Self {
        let pinned = |mut server: Target| {
            server.config.options(PINNED).application_name("weir auth_query").connect_timeout(CONNECT_MAX);
            server
        };
        AuthQuery {
            sql: sql.into(),
            primary: pinned(primary),
            servers: servers.into_iter().map(pinned).collect(),
            roles,
            age_max,
            open: Mutex::new(None),
            permits: Semaphore::new(ASKED_AT_ONCE),
            answers: quick_cache::sync::Cache::new(KEPT),
        }
    }

    /// The role of that name, if it may log in. Errors: 08001 when no server can be asked and nothing is remembered.
    pub async fn role(&self, user: &str) -> Result<Option<Arc<Role>>, UserError> {
        if user.len() > NAME_BYTES_MAX || user.contains('\0') {
            return Ok(None);
        }
        let known = self.answers.get(user);
        if let Some(answer) = &known
            && !answer.doubted
            && answer.at.elapsed() < self.age_max
        {
            return Ok(answer.role.clone());
        }
        let at = Instant::now();
        let asked = tokio::time::timeout(PATIENCE, self.ask(user)).await.unwrap_or_else(|_| {
            // It may be dead without having said so.
            if let Ok(mut open) = self.open.try_lock() {
                *open = None;
            }
            Err(Failure::Unreachable(format!("no answer within {}s", PATIENCE.as_secs())))
        });
        match asked {
            Ok(role) => {
                let role = role.map(Arc::new);
                self.answers.insert(user.into(), Answer { role: role.clone(), at, doubted: false });
                Ok(role)
            }
            Err(Failure::Unreachable(why)) => match known {
                Some(answer) if answer.at.elapsed() < OUTAGE_MAX => Ok(answer.role),
                _ => Err(unanswered(&why)),
            },
            Err(Failure::Query(why)) => {
                tracing::error!("auth_query: {why}");
                Err(unanswered(&why))
            }
        }
    }

    /// A proof has failed: the next login asks again, however young the answer is.
    pub fn doubt(&self, user: &str) {
        if let Some(answer) = self.answers.get(user)
            && !answer.doubted
        {
            self.answers.insert(user.into(), Answer { doubted: true, ..answer });
        }
    }

    async fn ask(&self, user: &str) -> Result<Option<Role>, Failure> {
        // The semaphore is never closed; an error would mean that nobody may ask.
        let _permit = self.permits.acquire().await.map_err(|_| Failure::Unreachable("shutting down".to_owned()))?;
        let connection = self.connection().await?;
        let rows = connection.client.query(&connection.statement, &[&user]).await;
        let rows = match rows {
            // Lost while idle, for example by a restart of the server: once more on a new one.
            Err(error) if error.is_closed() || connection.client.is_closed() => {
                let connection = self.connection().await?;
                connection.client.query(&connection.statement, &[&user]).await.map_err(|error| failure(&error))?
            }
            rows => rows.map_err(|error| failure(&error))?,
        };
        match rows.as_slice() {
            [] => Ok(None),
            [row] => read(row, user),
            _ => Err(Failure::Query(format!("more than one row for user \"{user}\""))),
        }
    }

    /// The open connection, or a new one. Everybody else waits meanwhile, so that a storm of logins opens one.
    async fn connection(&self) -> Result<Arc<Connection>, Failure> {
        let mut open = self.open.lock().await;
        if let Some(connection) = open.as_ref().filter(|connection| connection.is_good()) {
            return Ok(Arc::clone(connection));
        }
        *open = None;
        // One that was a primary and came back may not know what has changed since.
        let standing_in = self.servers.iter().enumerate().filter(|(number, _)| self.roles.may_stand_in(*number));
        let replicas = standing_in.map(|(_, server)| server);
        let mut why = Failure::Unreachable("no server was asked".to_owned());
        for (number, server) in std::iter::once(&self.primary).chain(replicas).enumerate() {
            match server.open().await {
                Ok(client) => {
                    let connection = Arc::new(prepare(client, &self.sql, number > 0).await?);
                    *open = Some(Arc::clone(&connection));
                    return Ok(connection);
                }
                Err(OpenError::Driver(error)) => why = Failure::Unreachable(sentence(&error)),
                Err(error) => why = Failure::Unreachable(error.to_string()),
            }
        }
        Err(why)
    }
}

impl Connection {
    fn is_good(&self) -> bool {
        let overdue = self.substitute && self.since.elapsed() > SUBSTITUTE_MAX;
        !overdue && !self.client.is_closed()
    }
}

async fn prepare(client: Client, sql: &str, substitute: bool) -> Result<Connection, Failure> {
    let statement = client.prepare(sql).await.map_err(|error| failure(&error))?;
    let columns = statement.columns().len();
    if statement.params().len() != 1 || !(2..=3).contains(&columns) {
        return Err(Failure::Query(
            "it must have one parameter, $1, and return the user's name, its password as pg_authid stores it, and, if wanted, until when it is valid".to_owned(),
        ));
    }
    Ok(Connection { client, statement, since: Instant::now(), substitute })
}

fn read(row: &Row, user: &str) -> Result<Option<Role>, Failure> {
    let bad = |error: tokio_postgres::Error| Failure::Query(sentence(&error));
    let name: Option<String> = row.try_get(0).map_err(bad)?;
    // A query that does not look at its parameter would let everybody in as somebody else.
    if name.as_deref() != Some(user) {
        return Ok(None);
    }
    let stored: Option<String> = row.try_get(1).map_err(bad)?;
    let valid_until = match row.len() {
        2 => None,
        _ => row.try_get::<_, Option<Timestamp>>(2).map_err(bad)?.map(|Timestamp(at)| at),
    };
    Ok(Some(Role { stored: stored.and_then(|text| Stored::parse(&text)), valid_until }))
}

impl Role {
    /// Is the password still valid at this moment?
    pub fn is_valid(&self, now: SystemTime) -> bool {
        let since = now.duration_since(UNIX_EPOCH + Duration::from_secs(POSTGRES_EPOCH)).unwrap_or_default();
        // Postgres: vuntil < GetCurrentTimestamp() is expired; infinity is the largest and smallest number.
        self.valid_until.is_none_or(|until| until >= i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }
}

/// timestamptz as it is on the wire, infinities included.
struct Timestamp(i64);

impl<'a> FromSql<'a> for Timestamp {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Timestamp(i64::from_be_bytes(raw.try_into()?)))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }
}

enum Failure {
    Unreachable(String),
    /// The query itself is wrong.
    Query(String),
}

fn failure(error: &tokio_postgres::Error) -> Failure {
    match error.as_db_error() {
        Some(_) => Failure::Query(sentence(error)),
        None => Failure::Unreachable(sentence(error)),
    }
}

/// The error with its causes: tokio-postgres alone would say "db error".
fn sentence(error: &tokio_postgres::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// The same for every user, known or not.
fn unanswered(why: &str) -> UserError {
    tracing::debug!("auth_query: {why}");
    UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT, "weir cannot ask the servers who may log in")
        .hint("Check [auth_query] and [server_auth] of weir's configuration; weir's log says what went wrong.")
        .fatal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_expire_as_in_postgres() {
        let now = UNIX_EPOCH + Duration::from_secs(POSTGRES_EPOCH + 10);
        let role = |valid_until| Role { stored: None, valid_until };
        for (until, valid) in [
            (None, true),
            (Some(10_000_000), true),
            (Some(9_999_999), false),
            (Some(i64::MAX), true),
            (Some(i64::MIN), false),
        ] {
            assert_eq!(role(until).is_valid(now), valid, "{until:?}");
        }
    }

    #[tokio::test]
    async fn nobody_is_asked_about_impossible_names_and_nobody_is_let_in_without_an_answer() {
        let nowhere = crate::probe::EndpointView::new(crate::config::Endpoint { host: "127.0.0.1".into(), port: 1 });
        let roles = Roles::new("shard0", vec![nowhere]);
        let route = crate::roles::Route::Primary(Arc::clone(&roles));
        let primary = Target::routed(tokio_postgres::Config::new(), route, crate::back::tls::ServerTls::default());
        let query = AuthQuery::new("SELECT 1", primary, Vec::new(), roles, Duration::ZERO);
        assert_eq!(query.role(&"x".repeat(64)).await, Ok(None));
        assert_eq!(query.role("ann").await.expect_err("no server").sqlstate, sqlstate::CANNOT_CONNECT);
        let role = Arc::new(Role::default());
        let answer = |at| Answer { role: Some(Arc::clone(&role)), at, doubted: true };
        query.answers.insert("ann".into(), answer(Instant::now()));
        assert_eq!(query.role("ann").await, Ok(Some(Arc::clone(&role))), "an outage is bridged");
        if let Some(long_ago) = Instant::now().checked_sub(OUTAGE_MAX) {
            query.answers.insert("ann".into(), answer(long_ago));
            assert!(query.role("ann").await.is_err(), "for a while");
        }
    }
}
