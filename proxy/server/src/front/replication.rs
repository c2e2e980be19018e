//! Replication connections: passed through, byte for byte, to one named primary.
//!
//! Invariant: such a connection has a server connection of its own, logged in as the client's user, never pooled and closed
//! with the client. It goes to the home shard, or to the one that the client names by `options=-c weir.shard=NAME`
//! (`DATABASE/NAME` where no database was named): WAL positions, slots and backups belong to one server, so weir never
//! chooses among several. Non-goals: replicas as a source, and looking into what is replicated.

use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::session::startup::parse_options;
use weir_wire::backend::{AUTHENTICATION_OK, Status, put_backend_key, put_parameter_status, put_ready};

use super::cancel::Registration;
use super::client::Client;
use crate::app::App;
use crate::back::conn::Backend;
use crate::back::connect::{Login, connect_as};
use crate::config::Config;
use crate::database::Database;
use crate::seats::Seats;
use crate::stats::{Entry, SessionStats};

/// The setting by which a client names the shard it wants.
const SHARD_SETTING: &str = "weir.shard";
/// What waits to be sent to either side, at most, plus one read.
const OUT_BYTES: usize = 256 * 1024;
/// How long the server's last words may take to reach the client.
const FAREWELL_MAX: Duration = Duration::from_secs(5);

/// What the startup parameter `replication` asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// An ordinary session.
    Off,
    /// WAL as it is, backups; of a whole server.
    Physical,
    /// Decoded changes of one database; SQL too.
    Logical,
}

impl Mode {
    /// ProcessStartupPacket in src/backend/tcop/backend_startup.c. Errors: 22023 as Postgres has it.
    pub fn read(value: Option<&str>) -> Result<Mode, UserError> {
        let Some(value) = value else { return Ok(Mode::Off) };
        let word = value.to_ascii_lowercase();
        // parse_bool: any unambiguous beginning of a word.
        let begins = |full: &str, least: usize| word.len() >= least && full.starts_with(&word);
        if value == "database" {
            Ok(Mode::Logical)
        } else if begins("true", 1) || begins("yes", 1) || word == "on" || word == "1" {
            Ok(Mode::Physical)
        } else if begins("false", 1) || begins("no", 1) || begins("off", 2) || word == "0" {
            Ok(Mode::Off)
        } else {
            Err(UserError::new(
                Blame::Client,
                sqlstate::INVALID_PARAMETER_VALUE,
                format!("invalid value for parameter \"replication\": \"{value}\""),
            )
            .hint("Valid values are: \"false\", 0, \"true\", 1, \"database\"."))
        }
    }
}

/// Where a replication connection goes and with which startup parameters.
pub struct Wanted {
    pub db: Arc<Database>,
    pub shard: ShardId,
    seats: Seats,
    parameters: Vec<(String, String)>,
}

impl Wanted {
    /// `parameters`: all of the client's StartupMessage; `database`: the name in it, if there is one.
    pub async fn read(
        app: &App,
        mode: Mode,
        user: &str,
        parameters: &[(String, String)],
        database: Option<&str>,
    ) -> Result<Wanted, UserError> {
        let mut wanted_shard = None;
        let mut forwarded = Vec::new();
        for (name, value) in parameters {
            match name.as_str() {
                "user" | "database" => {}
                "options" => {
                    for (name, value) in parse_options(value)? {
                        if name == SHARD_SETTING {
                            wanted_shard = Some(value);
                        } else {
                            forwarded.push((name, value));
                        }
                    }
                }
                SHARD_SETTING => wanted_shard = Some(value.clone()),
                _ if name.starts_with("_pq_.") => {}
                _ => forwarded.push((name.clone(), value.clone())),
            }
        }
        let (named_database, shard) = match wanted_shard.as_deref() {
            Some(text) => match text.split_once('/') {
                Some((database, shard)) => (Some(database), Some(shard)),
                None => (None, Some(text)),
            },
            None => (None, None),
        };
        // The rules (HBA) were asked about the database of the startup packet, so no other may be reached by the side door.
        if mode == Mode::Logical && named_database.is_some_and(|named| named != database.unwrap_or(user)) {
            let message = format!("{SHARD_SETTING} names another database than the connection");
            return Err(UserError::new(Blame::Client, sqlstate::INVALID_PARAMETER_VALUE, message)
                .hint("Connect to that database, and name the shard alone."));
        }
        let config = app.config();
        let database = choose_database(&config, mode, named_database.or(database))?;
        let (db, seats) = app.databases.enter(&config, &database, user).await?;
        let shard = choose_shard(&db, shard)?;
        if mode == Mode::Logical {
            forwarded.push(("database".to_owned(), db.config.server_database.clone()));
        }
        Ok(Wanted { db, seats, shard, parameters: forwarded })
    }
}

/// A physical connection is to a server, and its tools name no database, or "replication": then there must be only one.
fn choose_database(config: &Config, mode: Mode, name: Option<&str>) -> Result<String, UserError> {
    let named = |name: &str| config.databases.iter().any(|database| database.name == name);
    match (name, config.databases.as_slice(), &config.wildcard) {
        (Some(name), ..) if named(name) => Ok(name.to_owned()),
        (Some(name), _, Some(_)) if mode == Mode::Logical => Ok(name.to_owned()),
        (_, [only], None) if mode == Mode::Physical => Ok(only.name.clone()),
        (_, [], Some(wildcard)) if mode == Mode::Physical => Ok(wildcard.server_database.clone()),
        _ => Err(UserError::new(
            Blame::Client,
            sqlstate::UNKNOWN_DATABASE,
            format!("database \"{}\" does not exist", name.unwrap_or_default()),
        )
        .detail("A replication connection goes to one server of one database.")
        .hint(format!(
            "Name them: options='-c {SHARD_SETTING}=DATABASE/SHARD'. SHOW SHARDS in the admin database lists them."
        ))),
    }
}

fn choose_shard(db: &Database, name: Option<&str>) -> Result<ShardId, UserError> {
    let Some(name) = name else { return Ok(db.view().topology.home) };
    let place = db.shards.iter().position(|shard| &*shard.name == name);
    place.map(|place| ShardId(place as u16)).ok_or_else(|| {
        let names: Vec<&str> = db.shards.iter().map(|shard| &*shard.name).collect();
        UserError::new(
            Blame::Client,
            sqlstate::INVALID_PARAMETER_VALUE,
            format!("invalid value for parameter \"{SHARD_SETTING}\": \"{name}\""),
        )
        .hint(format!("Database \"{}\" has the shards: {}.", db.name, names.join(", ")))
    })
}

/// A client's replication connection with its server connection.
pub struct Replication {
    client: Client,
    backend: Backend,
    db: Arc<Database>,
    stats: Arc<SessionStats>,
    /// Cancel requests reach the server connection as long as this lives.
    _cancel: Registration,
}

impl Replication {
    /// Logs in to the server and greets the client. `None`: refused, and the client has been told.
    pub async fn open(
        mut client: Client,
        wanted: Wanted,
        login: &Login,
        cancel: Registration,
    ) -> io::Result<Option<Replication>> {
        let text = |(name, value): &'_ (String, String)| (name.clone(), value.clone());
        let mut parameters: Vec<(String, String)> = vec![("user".to_owned(), login.user.to_string())];
        parameters.extend(wanted.parameters.iter().map(text));
        let (backend, reported) = match connect_as(login, &parameters).await {
            Ok(connected) => connected,
            Err(error) => {
                client.put_error(&error.fatal());
                client.send().await?;
                return Ok(None);
            }
        };
        client.out.extend_from_slice(AUTHENTICATION_OK);
        for (name, value) in &reported {
            put_parameter_status(&mut client.out, name, value);
        }
        put_backend_key(&mut client.out, cancel.process, cancel.secret());
        put_ready(&mut client.out, Status::Idle);
        cancel.slot.begin(&backend.cancel_key);
        let application_name = wanted.parameters.into_iter().rfind(|(name, _)| name == "application_name");
        let application_name = application_name.map(|(_, value)| value).unwrap_or_default();
        let db = wanted.db;
        let entry =
            Entry { seats: wanted.seats, mode: weir_core::pool::Mode::Session, cancel: Arc::clone(&cancel.slot) };
        let stats = db.stats.open(Arc::clone(&login.user), &client, application_name, entry);
        Ok(Some(Replication { client, backend, db, stats, _cancel: cancel }))
    }

    /// Passes bytes on in both directions until either side is gone.
    pub async fn run(mut self) {
        let server_gone = self.pass().await;
        self.stats.end(&self.client, false, false);
        self.db.stats.close(&self.stats);
        if server_gone {
            let _ = tokio::time::timeout(FAREWELL_MAX, self.client.send()).await;
        }
    }

    /// True: the server ended it, and what it said last is in `client.out`.
    async fn pass(&mut self) -> bool {
        let (client, backend) = (&mut self.client, &mut self.backend);
        loop {
            client.out.extend_from_slice(&backend.inbuf);
            backend.inbuf.clear();
            backend.out.extend_from_slice(&client.inbuf);
            client.inbuf.clear();
            let ended = std::future::poll_fn(|cx| {
                if let Poll::Ready(Err(_)) = client.poll_send(cx) {
                    return Poll::Ready(Some(false));
                }
                if let Poll::Ready(Err(_)) = backend.poll_send(cx) {
                    return Poll::Ready(Some(true));
                }
                let mut moved = false;
                if client.out.len() < OUT_BYTES
                    && let Poll::Ready(received) = backend.poll_receive(cx)
                {
                    match received {
                        Ok(()) => moved = true,
                        Err(_) => return Poll::Ready(Some(true)),
                    }
                }
                if backend.out.len() < OUT_BYTES
                    && let Poll::Ready(received) = client.poll_receive(cx)
                {
                    match received {
                        Ok(0) | Err(_) => return Poll::Ready(Some(false)),
                        Ok(_) => moved = true,
                    }
                }
                if moved { Poll::Ready(None) } else { Poll::Pending }
            })
            .await;
            if let Some(server_gone) = ended {
                return server_gone;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_read_as_postgres_reads_it() {
        for (value, mode) in [
            ("true", Mode::Physical),
            ("ON", Mode::Physical),
            ("1", Mode::Physical),
            ("y", Mode::Physical),
            ("database", Mode::Logical),
            ("of", Mode::Off),
            ("0", Mode::Off),
            ("F", Mode::Off),
        ] {
            assert_eq!(Mode::read(Some(value)), Ok(mode), "{value}");
        }
        assert_eq!(Mode::read(None), Ok(Mode::Off));
        for bad in ["o", "Database", "maybe", ""] {
            assert_eq!(Mode::read(Some(bad)).expect_err(bad).sqlstate, "22023");
        }
    }
}
