//! Who may connect: how many clients a user and a database have, against their limits.
//!
//! Invariant: a [`Seats`] is counted as long as it lives, and a database that is [`SeatCount::close`]d had nobody and gets
//! nobody. Non-goal: the number of sockets as a whole, which is known before anybody says who they are
//! ([`crate::stats::ClientCount`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use parking_lot::Mutex;
use weir_core::error::{Blame, UserError, sqlstate};

/// Clients of one database.
#[derive(Debug)]
pub struct SeatCount(Mutex<Taken>);

#[derive(Debug)]
struct Taken {
    now: usize,
    /// Since when nobody is there, if nobody is.
    empty_since: Instant,
    closed: bool,
}

/// Clients of every user who has any.
#[derive(Debug, Default)]
pub struct UserSeats(Mutex<HashMap<Arc<str>, usize>>);

/// One client's place with its user and its database. Given back when dropped.
#[derive(Debug)]
pub struct Seats {
    database: Arc<SeatCount>,
    users: Arc<UserSeats>,
    user: Arc<str>,
}

/// Why there is no place.
#[derive(Debug)]
pub enum NoSeat {
    /// The database has just been taken down: look it up again.
    Closed,
    Refused(UserError),
}

/// Limits of one login.
#[derive(Clone, Copy, Debug)]
pub struct SeatLimits {
    pub database: Option<usize>,
    pub user: Option<usize>,
}

impl SeatCount {
    pub fn new() -> Arc<Self> {
        Arc::new(SeatCount(Mutex::new(Taken { now: 0, empty_since: Instant::now(), closed: false })))
    }

    pub fn now(&self) -> usize {
        self.0.lock().now
    }

    /// How long nobody has been there; `None` while somebody is.
    pub fn empty_for(&self, now: Instant) -> Option<Duration> {
        let taken = self.0.lock();
        (taken.now == 0).then(|| now.saturating_duration_since(taken.empty_since))
    }

    /// Lets nobody in any more. False: somebody is there.
    pub fn close(&self) -> bool {
        let mut taken = self.0.lock();
        taken.closed |= taken.now == 0;
        taken.closed
    }
}

impl Seats {
    /// Counts a client in, if both limits allow it. Errors as Postgres words them (src/backend/utils/init/postinit.c).
    pub fn take(
        database: &Arc<SeatCount>,
        users: &Arc<UserSeats>,
        (user, database_name): (&str, &str),
        limits: SeatLimits,
    ) -> Result<Seats, NoSeat> {
        let mut taken = database.0.lock();
        if taken.closed {
            return Err(NoSeat::Closed);
        }
        if limits.database.is_some_and(|max| taken.now >= max) {
            return Err(full("database", database_name, taken.now));
        }
        let mut counts = users.0.lock();
        let user: Arc<str> = user.into();
        let count = counts.entry(Arc::clone(&user)).or_default();
        if limits.user.is_some_and(|max| *count >= max) {
            return Err(full("role", &user, *count));
        }
        *count += 1;
        taken.now += 1;
        drop(counts);
        drop(taken);
        Ok(Seats { database: Arc::clone(database), users: Arc::clone(users), user })
    }
}

impl Drop for Seats {
    fn drop(&mut self) {
        let mut taken = self.database.0.lock();
        taken.now -= 1;
        if taken.now == 0 {
            taken.empty_since = Instant::now();
        }
        drop(taken);
        let mut counts = self.users.0.lock();
        if let Some(count) = counts.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.user);
            }
        }
    }
}

fn full(what: &str, name: &str, now: usize) -> NoSeat {
    let key = if what == "role" { "user" } else { what };
    NoSeat::Refused(
        UserError::new(
            Blame::Proxy,
            sqlstate::TOO_MANY_CONNECTIONS,
            format!("too many connections for {what} \"{name}\""),
        )
        .detail(format!("{now} client connections of this {key} are open in weir, and that is its limit."))
        .hint(format!(
            "Raise connections_max of [{key}.\"{name}\"] or limits.{key}_connections_max, or close idle connections."
        ))
        .fatal(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_counted_and_given_back() {
        let (database, users) = (SeatCount::new(), Arc::new(UserSeats::default()));
        let take = |user, limits| Seats::take(&database, &users, (user, "db"), limits);
        let limits = SeatLimits { database: Some(2), user: Some(1) };
        let first = take("a", limits).expect("room");
        let Err(NoSeat::Refused(error)) = take("a", limits) else { panic!("one per user") };
        assert_eq!((error.sqlstate, &*error.message), ("53300", "too many connections for role \"a\""));
        let second = take("b", limits).expect("room");
        let Err(NoSeat::Refused(error)) = take("c", limits) else { panic!("two per database") };
        assert_eq!(&*error.message, "too many connections for database \"db\"");
        assert!(!database.close(), "somebody is there");
        drop((first, second));
        assert!(users.0.lock().is_empty() && database.empty_for(Instant::now()).is_some());
        assert!(database.close());
        assert!(matches!(take("a", limits), Err(NoSeat::Closed)));
    }
}
