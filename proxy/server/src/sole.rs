//! Does anybody else write in a shard's database, of whose writes this process does not hear? A second weir without `[peers]`, most
//! likely by mistake.
//!
//! Invariant: while one weir sees another's sign on the primary, neither of the two answers from its cache or replicas, and what was read
//! before counts no more afterwards. Who starts beside another one lets no client in before that one must have seen it.
//!
//! A sign lives as long as the connection of the LSN clock ([`crate::clock`]); one that has lost its connection is not seen until it
//! is back. So this guards against a mistake, and is no replacement for `[peers]`. Non-goal: deciding who is company
//! ([`weir_core::fresh::sign`]).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_postgres::{Client, Row, Statement};
use weir_core::fresh::sign::{Company, Raised, Scope, Sign, company};

use crate::config::OtherWeirs;
use crate::fleet::member::now_us;

/// How long nobody is presumed to be there after a look. As long as the clock waits for an answer: a server that is slow to answer
/// must not cost the cache for that alone.
const LEASE: Duration = Duration::from_secs(5);
/// Between two looks; and while company may be leaving, or is waited for.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK_SOON: Duration = Duration::from_millis(100);
/// Longest wait of a start: for a connection, and for those that were there before.
const SETTLE_MAX: Duration = Duration::from_secs(8);

const RAISE: &str = "SELECT pg_catalog.pg_try_advisory_lock_shared($1, $2)";
const LOOK: &str = "
SELECT pid = pg_catalog.pg_backend_pid(), database::bigint, classid::bigint, objid::bigint FROM pg_catalog.pg_locks
WHERE locktype = 'advisory' AND objsubid = 2 AND granted";

/// One weir at one shard.
pub struct Sole {
    sign: Sign,
    others: OtherWeirs,
    /// Nobody else is presumed to be there until then.
    until_us: AtomicU64,
    /// When nobody else was last seen; 0: not yet.
    alone_us: AtomicU64,
    seen: Mutex<Option<Company>>,
    settled: watch::Sender<Settled>,
}

/// How a start stands with those that were there before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Settled {
    NotYet,
    /// They must have seen it by then.
    At(u64),
    /// There is nobody, or the server cannot be asked.
    Yes,
}

/// What a look means for what was read before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    Counts,
    /// Somebody may have overwritten it unheard.
    IsVoid,
}

/// A sign that is raised, on the connection that holds it.
pub struct Look(Statement);

impl Look {
    /// Who has raised a sign on that server.
    async fn at(&self, client: &Client) -> Result<Vec<Raised>, tokio_postgres::Error> {
        let rows = client.query(&self.0, &[]).await?;
        let raised = rows.iter().map(raised).collect::<Result<Vec<_>, tokio_postgres::Error>>()?;
        Ok(raised.into_iter().flatten().collect())
    }
}

fn raised(row: &Row) -> Result<Option<Raised>, tokio_postgres::Error> {
    let number = |column| row.try_get::<_, i64>(column).map(|oid| oid as u32);
    let (is_own, database) = (row.try_get(0)?, number(1)?);
    Ok(Sign::of_keys(number(2)?, number(3)?).map(|sign| Raised { is_own, database, sign }))
}

impl Sole {
    pub fn new(sign: Sign, others: OtherWeirs) -> Arc<Self> {
        Arc::new(Sole {
            sign,
            others,
            until_us: AtomicU64::new(0),
            alone_us: AtomicU64::new(0),
            seen: Mutex::default(),
            settled: watch::Sender::new(Settled::NotYet),
        })
    }

    /// What this process writes in there.
    pub fn scope(&self) -> Scope {
        self.sign.scope
    }

    /// Is nobody there, as far as is known? Ask after the words were looked at.
    pub fn may_serve(&self) -> bool {
        self.others == OtherWeirs::Ignore || now_us() < self.until_us.load(SeqCst)
    }

    /// Is somebody known to be there?
    pub fn has_company(&self) -> bool {
        self.others == OtherWeirs::Check && self.seen.lock().is_some()
    }

    /// Raises the sign on a connection to the primary, for as long as that lasts.
    pub async fn raise(&self, client: &Client) -> Result<Look, tokio_postgres::Error> {
        let (first, second) = self.sign.keys();
        client.query_one(RAISE, &[&first, &second]).await?;
        Ok(Look(client.prepare(LOOK).await?))
    }

    /// Looks once. `Ok`: what the look means, to be acted upon before [`Sole::extend`] makes it count.
    pub async fn look(&self, look: &Look, client: &Client) -> Result<Before, tokio_postgres::Error> {
        if self.others == OtherWeirs::Ignore {
            self.settled.send_replace(Settled::Yes);
            return Ok(Before::Counts);
        }
        let asked_us = now_us();
        let found = company(&look.at(client).await?);
        let last = std::mem::replace(&mut *self.seen.lock(), found);
        self.settle(found, asked_us);
        if let Some(found) = found {
            self.until_us.store(0, SeqCst);
            if last != Some(found) {
                tracing::warn!(
                    "neither the cache nor replicas answer: {found}. Give all of them [peers], stop one, or see other_weirs in [cache]"
                );
            }
            return Ok(Before::Counts);
        }
        if last.is_some() {
            tracing::info!("no other weir is in front of the database any more");
        }
        let alone_us = self.alone_us.swap(asked_us, SeqCst);
        let lapsed = alone_us != 0 && asked_us - alone_us >= LEASE.as_micros() as u64;
        Ok(if last.is_some() || lapsed { Before::IsVoid } else { Before::Counts })
    }

    /// What the last look has found counts from here on. How long until the next one.
    pub fn extend(&self) -> Duration {
        if self.others == OtherWeirs::Check && self.has_company() {
            return LOOK_SOON;
        }
        self.until_us.store(self.alone_us.load(SeqCst) + LEASE.as_micros() as u64, SeqCst);
        LOOK_EVERY
    }

    /// The connection is gone, and with it the sign.
    pub fn lost(&self) {
        self.until_us.store(0, SeqCst);
        self.settled.send_if_modified(|now| {
            let waits = *now == Settled::NotYet;
            if waits {
                *now = Settled::Yes;
            }
            waits
        });
    }

    fn settle(&self, found: Option<Company>, asked_us: u64) {
        let next = match (found, *self.settled.borrow()) {
            (_, Settled::Yes) => return,
            (None | Some(Company::Unseen), _) => Settled::Yes,
            // They looked at the latest just before this sign was raised.
            (Some(_), Settled::NotYet) => Settled::At(asked_us + LEASE.as_micros() as u64),
            (Some(_), Settled::At(then)) if asked_us >= then => Settled::Yes,
            (Some(_), Settled::At(_)) => return,
        };
        self.settled.send_replace(next);
    }

    /// Waits, before anything is written, until those that were there before must have seen the sign. Bounded.
    pub async fn settled(&self) {
        let mut settled = self.settled.subscribe();
        let done = settled.wait_for(|now| *now == Settled::Yes);
        if tokio::time::timeout(SETTLE_MAX, done).await.is_err() {
            tracing::warn!("it is not known whether another weir is in front of the same database");
        }
    }
}
