//! What ALTER ROLE … SET and ALTER DATABASE … SET have changed: seen on each primary, so that new sessions begin with it as they would there.
//!
//! A server applies such settings when a connection logs in, and pooled ones live long. So the clock's connection looks every second
//! whether they are the same, and each database replaces its Backends, at their next idle moment, once they are not. Sessions that exist
//! then get the new values with their next Backend, unless they have set them themselves; with Postgres alone they would keep the old ones.
//!
//! Non-goals: settings of the whole server, which it tells its connections itself.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_core::fresh::sign::Scope;

/// A replica has replayed them some time after the primary shows them: Backends are replaced once more then.
const REPLAYED: Duration = Duration::from_secs(10);

const ALL: &str = "
SELECT pg_catalog.md5(pg_catalog.string_agg(pg_catalog.concat_ws(' ', setdatabase, setrole, setconfig), ',' ORDER BY setdatabase, setrole))
FROM pg_catalog.pg_db_role_setting";
const OF_DATABASE: &str = " WHERE setdatabase IN
(0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))";

/// As one server has them.
pub struct ServerSettings {
    scope: Scope,
    /// Digest of what was seen last.
    seen: Mutex<Option<String>>,
    /// How often that has changed.
    changes: AtomicU64,
}

/// What a database has made of them.
#[derive(Debug, Default)]
pub struct Followed {
    /// Of all shards.
    changes: u64,
    again_at: Option<Instant>,
}

impl ServerSettings {
    /// `scope`: the settings of one database, or of all.
    pub fn new(scope: Scope) -> Self {
        ServerSettings { scope, seen: Mutex::default(), changes: AtomicU64::new(0) }
    }

    /// Looks once.
    pub async fn look(&self, client: &Client) -> Result<(), tokio_postgres::Error> {
        let of = if self.scope == Scope::Database { OF_DATABASE } else { "" };
        let answer = client.simple_query(&format!("{ALL}{of}")).await?;
        let found = answer.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
            _ => None,
        });
        let last = std::mem::replace(&mut *self.seen.lock(), found.clone());
        if last.is_some() && last != found {
            self.changes.fetch_add(1, SeqCst);
        }
        Ok(())
    }

    pub fn changes(&self) -> u64 {
        self.changes.load(SeqCst)
    }
}

impl Followed {
    /// Must Backends be replaced now? `changes`: of all shards, in sum.
    pub fn follow(&mut self, changes: u64, now: Instant) -> bool {
        if changes != self.changes {
            *self = Followed { changes, again_at: Some(now + REPLAYED) };
            return true;
        }
        self.again_at.take_if(|again_at| now >= *again_at).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_replaces_backends_twice() {
        let (mut followed, start) = (Followed::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(!followed.follow(0, start));
        assert!(followed.follow(1, after(1)) && !followed.follow(1, after(2)));
        assert!(followed.follow(1, after(11)) && !followed.follow(1, after(60)));
        assert!(followed.follow(3, after(61)) && followed.follow(4, after(62)));
        assert!(!followed.follow(4, after(71)) && followed.follow(4, after(72)), "from the last change on");
    }
}
