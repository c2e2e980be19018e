//! All databases that clients can connect to: those of the config file, and those of the wildcard entry, set up when somebody
//! asks for them and taken down when nobody has for a while.
//!
//! Invariant: a name leads to one [`Database`] at a time, and one with clients is never taken down. Whether a database of the
//! wildcard exists is the server's word, asked again whenever weir had no connection to it. Looking one up costs a login a
//! hash look-up; statements never come here.
//!
//! All databases of the wildcard share the servers' probes, clocks, dependency words and the cache: a word that two of them
//! share only invalidates more than it had to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::Result;
use arc_swap::ArcSwap;
use hashbrown::HashMap;
use parking_lot::Mutex;
use weir_core::error::{Blame, UserError, sqlstate};

use crate::app::{Basis, primary_login, start_database};
use crate::back::connect::Login;
use crate::config::{Config, DatabaseConfig};
use crate::database::Database;
use crate::seats::{NoSeat, SeatLimits, Seats, UserSeats};

/// Longest name of a database (NAMEDATALEN - 1 in Postgres); it cuts longer ones off, and so are they here.
const NAME_BYTES_MAX: usize = 63;
/// Attempts to enter a database that is taken down at the same moment.
const ATTEMPTS: u32 = 3;
/// Longest wait for the server to say whether a database exists.
const ASK_MAX: Duration = Duration::from_secs(10);

type Map = HashMap<Arc<str>, Arc<Database>>;

pub struct Databases {
    served: ArcSwap<Map>,
    wildcard: Option<Basis>,
    /// Names that are being set up: whoever asks meanwhile waits for the first.
    coming: Mutex<HashMap<Arc<str>, Arc<tokio::sync::Mutex<()>>>>,
    users: Arc<UserSeats>,
    /// What is set up from now on is paused as well.
    paused: AtomicBool,
}

impl Databases {
    pub fn new(named: Vec<Arc<Database>>, wildcard: Option<Basis>) -> Self {
        let served = named.into_iter().map(|db| (Arc::clone(&db.name), db)).collect();
        Databases {
            served: ArcSwap::from_pointee(served),
            wildcard,
            coming: Mutex::default(),
            users: Arc::default(),
            paused: AtomicBool::new(false),
        }
    }

    /// A database that is set up.
    pub fn get(&self, name: &str) -> Option<Arc<Database>> {
        self.served.load().get(name).cloned()
    }

    /// All that are set up, in order of name.
    pub fn all(&self) -> Vec<Arc<Database>> {
        let mut all: Vec<Arc<Database>> = self.served.load().values().cloned().collect();
        all.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        all
    }

    pub fn wildcard(&self) -> Option<&Basis> {
        self.wildcard.as_ref()
    }

    /// Lets a client in that has said who it is. Errors: 3D000 and whatever else the server says of the name; 53300.
    pub async fn enter(&self, config: &Config, name: &str, user: &str) -> Result<(Arc<Database>, Seats), UserError> {
        for _ in 0..ATTEMPTS {
            let db = self.open(config, name).await?;
            let limits = SeatLimits {
                database: config.database_connections_max(&db.name),
                user: config.user_connections_max(user),
            };
            match Seats::take(&db.seats, &self.users, (user, &db.name), limits) {
                Ok(seats) => return Ok((db, seats)),
                Err(NoSeat::Refused(error)) => return Err(error),
                Err(NoSeat::Closed) => self.forget(&db),
            }
        }
        Err(UserError::new(Blame::Proxy, sqlstate::CANNOT_CONNECT, format!("database \"{name}\" is being taken down"))
            .hint("Connect again."))
    }

    async fn open(&self, config: &Config, name: &str) -> Result<Arc<Database>, UserError> {
        let name = cut(name);
        if let Some(db) = self.get(name) {
            if db.is_suspect()
                && let Err(error) = db.verify().await
            {
                // What was made for it goes, unless others are still looking at it.
                self.take_down(&db);
                return Err(error);
            }
            return Ok(db);
        }
        let Some(wildcard) = &self.wildcard else { return Err(self.unknown(name)) };
        let coming = Arc::clone(self.coming.lock().entry(name.into()).or_default());
        let made = {
            let _first = coming.lock().await;
            match self.get(name) {
                Some(db) => Ok(db),
                None => self.set_up(config, wildcard, name).await,
            }
        };
        // The last one out; somebody who comes in between makes an entry of his own.
        self.coming.lock().retain(|other, waiting| other.as_ref() != name || Arc::strong_count(waiting) > 2);
        made
    }

    async fn set_up(&self, config: &Config, wildcard: &Basis, name: &str) -> Result<Arc<Database>, UserError> {
        self.make_room(config)?;
        let database =
            DatabaseConfig { name: name.to_owned(), server_database: name.to_owned(), ..wildcard.config.clone() };
        // On several shards it must be there on each.
        for shard in &wildcard.shards {
            number_of(&primary_login(config, &database, &shard.roles)).await?;
        }
        let made = async {
            let (basis, map) = wildcard.on_demand(&database).await?;
            start_database(config, &basis, map).await
        };
        let made = made.await.map_err(|error| {
            UserError::new(Blame::Proxy, sqlstate::CANNOT_CONNECT, format!("cannot set up database \"{name}\""))
                .detail(format!("{error:#}"))
                .hint("weir's own user must be able to connect to it.")
        })?;
        made.verify().await?;
        if self.paused.load(Relaxed) {
            made.pause();
        }
        self.served.rcu(|served| {
            let mut served = Map::clone(served);
            served.insert(Arc::clone(&made.name), Arc::clone(&made));
            served
        });
        tracing::info!(database = %made.name, "set up on demand");
        Ok(made)
    }

    /// Takes the one down that has been unused for longest, if there are too many.
    fn make_room(&self, config: &Config) -> Result<(), UserError> {
        let now = Instant::now();
        let max = config.limits.wildcard_databases_max;
        let on_demand: Vec<Arc<Database>> = self.all().into_iter().filter(|db| db.on_demand).collect();
        if on_demand.len() < max {
            return Ok(());
        }
        let unused = on_demand.iter().filter_map(|db| Some((db.seats.empty_for(now)?, db)));
        if unused.max_by_key(|(unused, _)| *unused).is_some_and(|(_, db)| self.take_down(db)) {
            return Ok(());
        }
        Err(UserError::new(Blame::Proxy, sqlstate::TOO_MANY_CONNECTIONS, "too many databases are in use")
            .detail(format!(
                "{} databases of the wildcard entry have clients, and {max} is the limit.",
                on_demand.len()
            ))
            .hint("Raise limits.wildcard_databases_max."))
    }

    /// Takes down what nobody has used for long, and looks after the rest. Call every second.
    pub fn upkeep(&self, config: &Config, now: Instant) {
        for db in self.all() {
            db.upkeep(now);
            let unused = db.seats.empty_for(now).is_some_and(|unused| unused > config.limits.wildcard_idle_max);
            if db.on_demand && unused {
                self.take_down(&db);
            }
        }
    }

    /// False: it has clients.
    fn take_down(&self, db: &Arc<Database>) -> bool {
        let closed = db.on_demand && db.seats.close();
        if closed {
            self.forget(db);
        }
        closed
    }

    fn forget(&self, db: &Arc<Database>) {
        db.shut_down();
        self.served.rcu(|served| {
            let mut served = Map::clone(served);
            if served.get(&db.name).is_some_and(|now| Arc::ptr_eq(now, db)) {
                served.remove(&db.name);
            }
            served
        });
    }

    /// For PAUSE and RESUME of everything: counts for what is set up later, too.
    pub fn note_pause(&self, paused: bool) {
        self.paused.store(paused, Relaxed);
    }

    /// Somebody is about to drop, rename or copy these databases: weir's own idle connections to them go.
    pub fn let_go<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        for db in names.into_iter().filter_map(|name| self.get(cut(name))) {
            let closed = db.close_idle();
            tracing::debug!(database = %db.name, closed, "closed idle connections for a statement about the database");
        }
    }

    fn unknown(&self, name: &str) -> UserError {
        let all = self.all();
        let names: Vec<&str> = all.iter().map(|db| &*db.name).collect();
        UserError::new(Blame::Client, sqlstate::UNKNOWN_DATABASE, format!("database \"{name}\" does not exist"))
            .hint(format!("weir serves: {}, and the admin console as \"weir\".", names.join(", ")))
    }
}

/// As Postgres does with an identifier: at a character's border.
fn cut(name: &str) -> &str {
    let mut end = name.len().min(NAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

/// The OID of the database that a login leads to. Errors: the server's refusal in its own words, or 08001.
pub async fn number_of(login: &Login) -> Result<u32, UserError> {
    let unreachable = |why: String| {
        let server = format!("cannot connect to server {}", login.route.endpoint());
        UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT, server)
            .detail(why)
            .hint("Check that this Postgres server is running and reachable from weir.")
    };
    let ask = async {
        let client = crate::control::connect(login).await?;
        let sql = "SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()";
        Ok::<u32, anyhow::Error>(client.query_one(sql, &[]).await?.try_get(0)?)
    };
    let error = match tokio::time::timeout(ASK_MAX, ask).await {
        Ok(Ok(number)) => return Ok(number),
        Ok(Err(error)) => error,
        Err(_) => return Err(unreachable(format!("no answer within {ASK_MAX:?}"))),
    };
    let refusal = error.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::as_db_error);
    let told = refusal.and_then(|refusal| passed_on(refusal.code().code(), refusal.message()));
    Err(told.unwrap_or_else(|| unreachable(format!("{error:#}"))))
}

/// A server's refusal of a login that is about the database, or the server's own state, as the client would read it from the
/// server. `None`: it is about weir's log-in, and none of the client's business.
pub fn passed_on(code: &str, message: &str) -> Option<UserError> {
    let code =
        [sqlstate::UNKNOWN_DATABASE, "42501", "53300", "55000", "57P03"].into_iter().find(|known| *known == code)?;
    Some(UserError::new(Blame::Server, code, message.to_owned()))
}
