//! Time-outs of clients: one sweep over all sessions instead of a timer for each statement.
//!
//! A session notes when a request begins and how many have ended, which it does anyway. The sweep compares what it sees with
//! what it saw before: a session that has not moved since then has been idle, or in its transaction, for at least that
//! long. So nobody is ended early, and late by two sweeps at most. What runs too long is cancelled on the server as a client
//! would; what waits too long gets an [`Order`], which the session obeys when it next waits for its client.
//!
//! Non-goal: the wait for a server connection, which the pool bounds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use weir_core::error::{Blame, UserError, sqlstate};

use crate::app::App;
use crate::config::LimitsConfig;
use crate::stats::{Glance, SessionStats};

/// How often the configuration is asked whether any time-out is on.
const ASLEEP: Duration = Duration::from_secs(1);
const SWEEP_MIN: Duration = Duration::from_millis(10);
const REASON_BITS: u32 = 3;

/// A session is to end, for a reason that must still hold when it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Nothing received beyond this many bytes.
    IdleClient(u64),
    IdleInTransaction(u64),
    /// Still the transaction after this many rests.
    TransactionTime(u64),
    /// KILL.
    Killed,
}

impl Order {
    pub fn packed(self) -> u64 {
        let (reason, value) = match self {
            Order::IdleClient(received) => (1, received),
            Order::IdleInTransaction(received) => (2, received),
            Order::TransactionTime(rests) => (3, rests),
            Order::Killed => (4, 0),
        };
        value << REASON_BITS | reason
    }

    pub fn unpacked(packed: u64) -> Option<Order> {
        let value = packed >> REASON_BITS;
        match packed & ((1 << REASON_BITS) - 1) {
            1 => Some(Order::IdleClient(value)),
            2 => Some(Order::IdleInTransaction(value)),
            3 => Some(Order::TransactionTime(value)),
            4 => Some(Order::Killed),
            _ => None,
        }
    }

    pub fn holds(self, received_now: u64, rests_now: u64) -> bool {
        match self {
            Order::IdleClient(received) | Order::IdleInTransaction(received) => received == received_now,
            Order::TransactionTime(rests) => rests == rests_now,
            Order::Killed => true,
        }
    }

    /// What the client reads; words and codes of Postgres (src/backend/tcop/postgres.c).
    pub fn error(self) -> UserError {
        let (code, message, hint) = match self {
            Order::IdleClient(_) => (
                sqlstate::IDLE_SESSION_TIMEOUT,
                "terminating connection due to idle-session timeout",
                "limits.idle_client_max of weir bounds how long a client may ask nothing.",
            ),
            Order::IdleInTransaction(_) => (
                sqlstate::IDLE_IN_TRANSACTION_TIMEOUT,
                "terminating connection due to idle-in-transaction timeout",
                "limits.idle_in_transaction_max of weir bounds how long a transaction may wait for its client.",
            ),
            Order::TransactionTime(_) => (
                sqlstate::TRANSACTION_TIMEOUT,
                "terminating connection due to transaction timeout",
                "limits.transaction_time_max of weir bounds how long a transaction may last.",
            ),
            Order::Killed => {
                (sqlstate::ADMIN_SHUTDOWN, "terminating connection due to administrator command", "Connect again.")
            }
        };
        UserError::new(Blame::Client, code, message).hint(hint).fatal()
    }
}

/// What an earlier sweep saw of a session, and when it saw it first.
struct Seen {
    glance: Glance,
    idle_since: Instant,
    transaction_since: Instant,
    /// Its running request has been cancelled already.
    cancelled: bool,
}

/// What is to be done about a session.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Leave,
    Cancel,
    End(Order),
    CancelAndEnd(Order),
}

/// Sweeps for ever.
pub async fn run(app: Arc<App>) {
    let mut seen: HashMap<u64, Seen> = HashMap::new();
    loop {
        let limits = app.config().limits.clone();
        let Some(shortest) = limits.shortest_time_out() else {
            seen.clear();
            tokio::time::sleep(ASLEEP).await;
            continue;
        };
        tokio::time::sleep((shortest / 8).clamp(SWEEP_MIN, ASLEEP)).await;
        let now = Instant::now();
        let mut kept = HashMap::with_capacity(seen.len());
        for db in app.databases() {
            for session in db.stats.live() {
                let mut state = renewed(seen.remove(&session.id), session.glance(), now);
                state.cancelled |= carry_out(judge(&state, &limits, now), &session);
                kept.insert(session.id, state);
            }
        }
        seen = kept;
    }
}

/// What was seen before and now, put together.
fn renewed(before: Option<Seen>, glance: Glance, now: Instant) -> Seen {
    let Some(before) = before else {
        return Seen { glance, idle_since: now, transaction_since: now, cancelled: false };
    };
    let still_idle = glance.busy_for.is_none()
        && before.glance.busy_for.is_none()
        && glance.received_bytes == before.glance.received_bytes;
    let in_one = |glance: &Glance| glance.busy_for.is_some() || glance.in_transaction;
    let same_transaction = glance.rests == before.glance.rests && in_one(&glance) && in_one(&before.glance);
    Seen {
        idle_since: if still_idle { before.idle_since } else { now },
        transaction_since: if same_transaction { before.transaction_since } else { now },
        cancelled: before.cancelled && glance.busy_for >= before.glance.busy_for,
        glance,
    }
}

fn judge(seen: &Seen, limits: &LimitsConfig, now: Instant) -> Verdict {
    let over = |since: Instant, max: Option<Duration>| max.is_some_and(|max| now.duration_since(since) >= max);
    let Glance { busy_for, received_bytes, rests, in_transaction } = seen.glance;
    if (busy_for.is_some() || in_transaction) && over(seen.transaction_since, limits.transaction_time_max) {
        let order = Order::TransactionTime(rests);
        return if busy_for.is_some() && !seen.cancelled { Verdict::CancelAndEnd(order) } else { Verdict::End(order) };
    }
    if let Some(busy_for) = busy_for {
        let late = limits.query_time_max.is_some_and(|max| busy_for >= max);
        return if late && !seen.cancelled { Verdict::Cancel } else { Verdict::Leave };
    }
    if in_transaction && over(seen.idle_since, limits.idle_in_transaction_max) {
        return Verdict::End(Order::IdleInTransaction(received_bytes));
    }
    if !in_transaction && over(seen.idle_since, limits.idle_client_max) {
        return Verdict::End(Order::IdleClient(received_bytes));
    }
    Verdict::Leave
}

/// True: a cancel is on its way.
fn carry_out(verdict: Verdict, session: &Arc<SessionStats>) -> bool {
    let cancel = match verdict {
        Verdict::Leave => false,
        Verdict::Cancel => true,
        Verdict::End(order) => {
            session.order(order);
            false
        }
        Verdict::CancelAndEnd(order) => {
            session.order(order);
            true
        }
    };
    // While it waits for a server connection there is nothing to cancel yet; the next sweep asks again.
    cancel && session.cancel_running()
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Glance = Glance { busy_for: None, received_bytes: 7, rests: 3, in_transaction: false };
    const SECOND: Duration = Duration::from_secs(1);

    fn limits() -> LimitsConfig {
        let file = crate::config::LimitsConfig::default();
        LimitsConfig {
            idle_client_max: Some(4 * SECOND),
            idle_in_transaction_max: Some(2 * SECOND),
            query_time_max: Some(3 * SECOND),
            transaction_time_max: Some(5 * SECOND),
            ..file
        }
    }

    /// What becomes of a session that is seen so, a second apart.
    fn fate(glances: &[Glance]) -> Vec<Verdict> {
        let start = Instant::now();
        let mut seen = None;
        let mut verdicts = Vec::new();
        for (second, glance) in glances.iter().enumerate() {
            let now = start + SECOND * second as u32;
            let state = renewed(seen.take(), *glance, now);
            verdicts.push(judge(&state, &limits(), now));
            seen = Some(state);
        }
        verdicts
    }

    #[test]
    fn only_who_stays_idle_is_ended() {
        assert_eq!(fate(&[IDLE; 5]).last(), Some(&Verdict::End(Order::IdleClient(7))));
        let moved = Glance { received_bytes: 8, ..IDLE };
        assert_eq!(fate(&[IDLE, IDLE, IDLE, moved, moved, moved]).last(), Some(&Verdict::Leave));
        let open = Glance { in_transaction: true, ..IDLE };
        assert_eq!(fate(&[open; 3]).last(), Some(&Verdict::End(Order::IdleInTransaction(7))));
    }

    #[test]
    fn long_statements_are_cancelled_and_long_transactions_end() {
        let busy = |seconds, rests| Glance { busy_for: Some(SECOND * seconds), rests, ..IDLE };
        assert_eq!(fate(&[busy(2, 1), busy(3, 1)]), [Verdict::Leave, Verdict::Cancel]);
        // Always busy, but with another statement each time.
        assert!(
            fate(&[busy(1, 1), busy(1, 2), busy(1, 3), busy(1, 4), busy(1, 5), busy(1, 6), busy(1, 7)])
                .iter()
                .all(|verdict| *verdict == Verdict::Leave)
        );
        let step = |received_bytes| Glance { in_transaction: true, received_bytes, ..IDLE };
        let fate = fate(&[step(1), step(2), step(3), step(4), step(5), step(6)]);
        assert_eq!(fate.last(), Some(&Verdict::End(Order::TransactionTime(3))));
    }

    #[test]
    fn orders_survive_packing_and_hold_only_for_what_they_were_given_for() {
        for order in [Order::IdleClient(9), Order::IdleInTransaction(1 << 40), Order::TransactionTime(5), Order::Killed]
        {
            assert_eq!(Order::unpacked(order.packed()), Some(order));
        }
        assert_eq!(Order::unpacked(0), None);
        assert!(Order::IdleClient(9).holds(9, 1) && !Order::IdleClient(9).holds(10, 1));
        assert!(Order::TransactionTime(5).holds(0, 5) && !Order::TransactionTime(5).holds(0, 6));
    }
}
