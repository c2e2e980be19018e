//! Keeps one member's row at the shard's primary, and with it its lease.
//!
//! Invariant: the lease runs from the moment the primary was *asked*; a member that is put out serves for at most its lease after
//! that commit, and whoever put it out waits so long before it counts on that. A row leaves the table only when nothing of
//! that proxy's is under way that others do not know of.
//!
//! Who joins serves only when everybody in the table announces to it, and when those who died are proven to have nothing under way:
//! members that serve have kept their announcements in mind and pass them on; where there is none, the server processes
//! that a dead proxy may have left behind at work are waited for.

mod silence;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::{Client, GenericClient, Row, Statement};

use self::silence::Silence;
use super::Fleet;
use super::member::{Member, Standing, now_us};
use crate::clock::Identity;
use crate::config::PeersMode;
use crate::control::{MAKE_SCHEMA, OpenError, Target};
use crate::database::Shard;

/// Longest wait for a connection or an answer. The lease runs out earlier.
const PATIENCE: Duration = Duration::from_secs(3);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// Clocks of two machines may differ in speed by so much (a hundredth), and timers fire late.
const DRIFT: u32 = 100;
const SLACK: Duration = Duration::from_millis(20);

const TABLES: &str = "
CREATE TABLE IF NOT EXISTS weir.member_epoch (one boolean PRIMARY KEY DEFAULT true CHECK (one), epoch bigint NOT NULL);
INSERT INTO weir.member_epoch (epoch) VALUES (1) ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS weir.member (
    id           bigint PRIMARY KEY,
    address      text NOT NULL,
    lease_us     bigint NOT NULL,
    joined       bigint NOT NULL,
    keeper_pid   integer NOT NULL,
    keeper_since timestamptz,
    client       inet,
    out_since    timestamptz);
ALTER TABLE weir.member ADD COLUMN IF NOT EXISTS mode text NOT NULL DEFAULT 'leased';";
const FOUND: &str = "
SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('weir.member') AND attname = 'mode' AND NOT attisdropped)";

/// A keeper whose machine is gone is noticed by the server within seconds, not hours; and membership need not survive a crash
/// of the server, after which everybody joins anew.
const SETTINGS: &str = "SET synchronous_commit = local; SET tcp_keepalives_idle = 3; SET tcp_keepalives_interval = 1; \
    SET tcp_keepalives_count = 3; SET lock_timeout = '2s'; SET statement_timeout = '3s'";

const STEP: &str = "UPDATE weir.member_epoch SET epoch = epoch + 1 RETURNING epoch";
const JOIN: &str = "
INSERT INTO weir.member (id, address, lease_us, joined, mode, keeper_pid, keeper_since, client)
SELECT $1, $2, $3, $4, $5, pid, backend_start, client_addr FROM pg_stat_activity WHERE pid = pg_backend_pid()
ON CONFLICT (id) DO UPDATE SET joined = excluded.joined, keeper_pid = excluded.keeper_pid,
    keeper_since = excluded.keeper_since, client = excluded.client, out_since = NULL";
/// A member that lives and hears of writes in another way.
const OTHER_MODE: &str = "
SELECT address, mode FROM weir.member m WHERE mode <> $1 AND EXISTS (SELECT FROM pg_stat_activity a
    WHERE a.pid = m.keeper_pid AND a.backend_start IS NOT DISTINCT FROM m.keeper_since) LIMIT 1";
const RENEW: &str = "
SELECT epoch, EXISTS (SELECT FROM weir.member WHERE id = $1 AND out_since IS NULL) FROM weir.member_epoch";
const OTHERS: &str = "
SELECT id, address, lease_us, joined, out_since IS NOT NULL, a.pid IS NOT NULL,
    a.pid IS NOT NULL AND coalesce(a.query_start > now() - lease_us * interval '2 microseconds', true)
FROM weir.member LEFT JOIN pg_stat_activity a
    ON a.pid = keeper_pid AND a.backend_start IS NOT DISTINCT FROM keeper_since
WHERE id <> $1 ORDER BY id";
const PUT_OUT: &str = "UPDATE weir.member SET out_since = now() WHERE id = $1 AND out_since IS NULL";
const FORGET: &str = "DELETE FROM weir.member WHERE id = $1 AND out_since IS NOT NULL";
const LEAVE: &str = "DELETE FROM weir.member WHERE id = $1";
/// Server processes at work that a proxy put out may have left behind.
const AT_WORK: &str = "
SELECT a.pid, a.backend_start::text, a.xact_start::text FROM pg_stat_activity a, weir.member m
WHERE m.id = $1 AND a.client_addr IS NOT DISTINCT FROM m.client AND a.pid <> pg_backend_pid()
    AND a.backend_type IS NOT DISTINCT FROM 'client backend'
    AND (a.state IS NULL OR a.state = ANY($2))
    AND (a.backend_start IS NULL OR a.backend_start < m.out_since)";
const AT_WORK_STATES: [&str; 3] = ["active", "fastpath function call", "idle in transaction"];

#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error(transparent)]
    Server(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Unreached(#[from] OpenError),
    #[error("another server has become the primary")]
    Replaced,
    #[error("no answer in time")]
    Slow(#[from] tokio::time::error::Elapsed),
    #[error(
        "[peers] mode is {own} here and {mode} at {address}; all proxies in front of the same servers need the same"
    )]
    OtherMode { own: &'static str, address: String, mode: String },
    #[error("others have put this proxy out, because it did not hear them")]
    PutOut,
}

/// Joins again and again, until the process leaves.
pub async fn run(fleet: Arc<Fleet>, shard: Arc<Shard>, server: Target) {
    let mut retry = RETRY_MIN;
    while !fleet.is_leaving() {
        let ended = serve(&fleet, &shard, &server, &mut retry).await;
        shard.member.stand(Standing::Out);
        match ended {
            Ok(()) => break,
            Err(error) => tracing::warn!(shard = %shard.name, "not among the proxies here for now: {error}"),
        }
        server.pause(retry.mul_f64(rand::random_range(0.5..1.0))).await;
        retry = (retry * 2).min(RETRY_MAX);
    }
    shard.member.stand(Standing::Left);
    fleet.left.notify_one();
}

/// Errors: another proxy at `server` hears of writes in another way than this one. A server that cannot be asked is no error: the
/// question comes again with joining.
pub async fn agrees(server: &Target, mode: PeersMode) -> anyhow::Result<()> {
    let asked = async {
        let client = server.open().await?;
        let is_found: bool = client.query_one(FOUND, &[]).await?.try_get(0)?;
        if is_found { agree(&client, mode).await } else { Ok(()) }
    };
    match timeout(PATIENCE, asked).await {
        Ok(Err(error @ Lost::OtherMode { .. })) => Err(error.into()),
        Ok(_) | Err(_) => Ok(()),
    }
}

async fn agree(client: &impl GenericClient, mode: PeersMode) -> Result<(), Lost> {
    let own = mode.as_str();
    match client.query_opt(OTHER_MODE, &[&own]).await? {
        None => Ok(()),
        Some(row) => Err(Lost::OtherMode { own, address: row.try_get(0)?, mode: row.try_get(1)? }),
    }
}

/// From joining until something fails; `Ok`: it has left.
async fn serve(fleet: &Arc<Fleet>, shard: &Arc<Shard>, server: &Target, retry: &mut Duration) -> Result<(), Lost> {
    let mut tenure = server.tenure();
    let client = timeout(PATIENCE, server.open()).await??;
    let mut keeper = timeout(PATIENCE, Keeper::join(fleet, shard, (client, tenure.number()))).await??;
    keeper.promoted = server.promoted();
    *retry = RETRY_MIN;
    let every = fleet.lease / 3;
    loop {
        if fleet.is_leaving() {
            shard.member.stand(Standing::Left);
            if shard.member.is_through() {
                timeout(PATIENCE, keeper.leave()).await??;
            }
            return Ok(());
        }
        timeout(PATIENCE, keeper.tick()).await??;
        // Woken by what peers say, by writes that were not heard, and by attempts to attach that have ended.
        let _ = timeout(every, async {
            tokio::select! {
                () = shard.member.poked() => {}
                () = tenure.over() => {}
                Some((id, attached)) = keeper.attempts.recv() => keeper.note_attempt(id, attached),
            }
        })
        .await;
        if tenure.is_over() {
            return Err(Lost::Replaced);
        }
    }
}

/// Another row of the table.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Other {
    id: u64,
    address: String,
    lease: Duration,
    joined: u64,
    out: bool,
    /// The connection that keeps its row is there.
    keeps: bool,
    /// It has asked for its lease of late.
    lives: bool,
}

/// An attempt to attach to somebody, and whether it heard.
type Attempt = (u64, bool);

struct Keeper {
    fleet: Arc<Fleet>,
    shard: Arc<Shard>,
    client: Client,
    renew: Statement,
    others: Statement,
    /// With which this member joined, and the newest one seen.
    joined: u64,
    epoch: u64,
    known: Vec<Other>,
    /// Who was seen put out, and when that holds for sure.
    fences: BTreeMap<u64, u64>,
    attempting: BTreeSet<u64>,
    failed: BTreeSet<u64>,
    attempts: mpsc::Receiver<Attempt>,
    attempted: mpsc::Sender<Attempt>,
    /// Processes at work when a dead proxy's fence was passed, by proxy.
    at_work: BTreeMap<u64, BTreeSet<Process>>,
    /// Everybody has to hear of orphans before the row of their proxy goes.
    passing_on: bool,
    /// When this primary replaced another.
    promoted: Option<Instant>,
    /// Where others push: who does not answer, and whom nothing can be heard of any more.
    silence: Silence,
    over: BTreeSet<u64>,
}

/// Pid, its start, start of its transaction.
type Process = (i32, Option<String>, Option<String>);

impl Keeper {
    async fn join(
        fleet: &Arc<Fleet>,
        shard: &Arc<Shard>,
        (mut client, generation): (Client, u64),
    ) -> Result<Keeper, Lost> {
        client.batch_execute(SETTINGS).await?;
        if !client.query_one(FOUND, &[]).await?.try_get::<_, bool>(0)? {
            client.batch_execute(&format!("BEGIN; {MAKE_SCHEMA}; {TABLES} COMMIT")).await?;
        }
        let life = Identity::of(&client).await?;
        shard.member.begin_life(foldhash::quality::FixedState::with_seed(11).hash_one(life), generation);
        let transaction = client.transaction().await?;
        let joined: i64 = transaction.query_one(STEP, &[]).await?.try_get(0)?;
        // Under the lock of that row, as everybody joins.
        agree(&transaction, fleet.mode).await?;
        let (id, lease_us) = (shard.member.id as i64, fleet.lease.as_micros() as i64);
        transaction.execute(JOIN, &[&id, &fleet.address, &lease_us, &joined, &fleet.mode.as_str()]).await?;
        transaction.commit().await?;
        let (renew, others) = (client.prepare(RENEW).await?, client.prepare(OTHERS).await?);
        let (attempted, attempts) = mpsc::channel(64);
        Ok(Keeper {
            fleet: Arc::clone(fleet),
            shard: Arc::clone(shard),
            client,
            renew,
            others,
            joined: joined as u64,
            epoch: 0,
            known: Vec::new(),
            fences: BTreeMap::new(),
            attempting: BTreeSet::new(),
            failed: BTreeSet::new(),
            attempts,
            attempted,
            at_work: BTreeMap::new(),
            passing_on: false,
            promoted: None,
            silence: Silence::default(),
            over: BTreeSet::new(),
        })
    }

    fn member(&self) -> &Member {
        &self.shard.member
    }

    /// Asks for the lease, and does what is to be done about the others.
    async fn tick(&mut self) -> Result<(), Lost> {
        let pushes = self.member().pushes();
        let asked_us = now_us();
        if pushes {
            self.member().ping();
            let answers = self.known.iter().map(|other| (other.id, self.shard.member.heard_until_us(other.id)));
            self.silence.note(asked_us, self.fleet.lease / 4, answers.collect());
        }
        let row = self.client.query_one(&self.renew, &[&(self.member().id as i64)]).await?;
        let (epoch, in_table): (i64, bool) = (row.try_get(0)?, row.try_get(1)?);
        if !in_table {
            return Err(Lost::PutOut);
        }
        let as_before = epoch as u64 == self.epoch;
        if as_before || !pushes {
            self.member().extend(asked_us, self.fleet.lease);
        }
        let shard = Arc::clone(&self.shard);
        shard.member.settle_schema(|| self.fleet.doubt_catalogs(&shard));
        let settled = as_before && self.is_settled();
        let deaf = self.member().take_deaf();
        if settled && deaf.is_empty() {
            return Ok(());
        }
        self.epoch = epoch as u64;
        let rows = self.client.query(&self.others, &[&(self.member().id as i64)]).await?;
        self.known = rows.iter().map(read_other).collect::<Result<_, _>>()?;
        self.attach_to_all();
        self.put_out_who_is_deaf(&deaf).await?;
        self.mark_fences();
        if pushes {
            self.count_on_the_living().await?;
            // Only now is known of whose writes this proxy has to hear.
            self.member().extend(asked_us, self.fleet.lease);
        }
        self.bury().await?;
        self.stand();
        let known = self.known.iter().map(|other| (other.id, other.address.clone(), other.out));
        self.member().know(known.collect());
        Ok(())
    }

    /// Is there nothing to do until the epoch changes?
    fn is_settled(&self) -> bool {
        let all_told = self.known.iter().all(|other| {
            let heard = !self.member().pushes() || self.silence.is_heard(other.id);
            !other.out && self.member().tells(other.id, other.joined) && heard
        });
        all_told && self.member().standing() == Standing::Serves && self.attempting.is_empty()
    }

    /// Attempts run beside the lease, which must not wait for them.
    fn attach_to_all(&mut self) {
        for other in self.known.iter().filter(|other| !other.out) {
            let told = self.shard.member.tells(other.id, other.joined) && !self.passing_on;
            if told || !self.attempting.insert(other.id) {
                continue;
            }
            let (shard, link) = (Arc::clone(&self.shard), self.fleet.link(&other.address));
            let (attempted, id, joined) = (self.attempted.clone(), other.id, other.joined);
            tokio::spawn(async move {
                let attached = link.ready().await && shard.member.attach(id, joined, link, &shard.clock).await;
                // The keeper may have ended meanwhile; the next one begins anew.
                let _ = attempted.send((id, attached)).await;
            });
        }
        self.passing_on &= self.known.iter().any(|other| !other.out && !self.attempting.contains(&other.id));
    }

    fn note_attempt(&mut self, id: u64, attached: bool) {
        self.attempting.remove(&id);
        if attached {
            self.failed.remove(&id);
        } else {
            self.failed.insert(id);
        }
    }

    /// Whoever could not be reached again is put out: because a write waits for it, or because this one cannot begin otherwise.
    async fn put_out_who_is_deaf(&mut self, deaf: &BTreeSet<u64>) -> Result<(), Lost> {
        let pushes = self.member().pushes();
        let begins = self.member().standing() < if pushes { Standing::Writes } else { Standing::Serves };
        let unreachable =
            |other: &&Other| !other.out && self.failed.contains(&other.id) && (begins || deaf.contains(&other.id));
        let silent = |other: &&Other| {
            // It is connected, and yet it did not answer in time.
            !other.out && deaf.contains(&other.id) && self.shard.member.tells(other.id, other.joined)
        };
        // Whoever lives would only come back, and its writes would wait meanwhile.
        let unheard = |other: &&Other| {
            let lost = self.failed.contains(&other.id) && !other.keeps;
            pushes && !other.out && !other.lives && (lost || self.silence.is_long(other.id))
        };
        let is_gone = |other: &&Other| unreachable(other) || silent(other) || unheard(other);
        let gone: Vec<Other> = self.known.iter().filter(is_gone).cloned().collect();
        for other in gone {
            let transaction = self.client.transaction().await?;
            transaction.execute(STEP, &[]).await?;
            let row = transaction.query_one(&self.renew, &[&(self.shard.member.id as i64)]).await?;
            if !row.try_get::<_, bool>(1)? {
                return Err(Lost::PutOut);
            }
            transaction.execute(PUT_OUT, &[&(other.id as i64)]).await?;
            transaction.commit().await?;
            tracing::warn!(shard = %self.shard.name, peer = %other.address, "a proxy does not answer and is put out");
            self.failed.remove(&other.id);
            self.known.iter_mut().filter(|known| known.id == other.id).for_each(|known| known.out = true);
        }
        Ok(())
    }

    /// From one lease after its row says so, a member that is put out serves nothing, and need not be told.
    fn mark_fences(&mut self) {
        let now = now_us();
        for other in &self.known {
            if other.out {
                let lease = other.lease + other.lease / DRIFT + SLACK;
                self.fences.entry(other.id).or_insert(now + lease.as_micros() as u64);
            } else {
                // Whoever is back may die again, with other processes at work.
                self.fences.remove(&other.id);
                self.at_work.remove(&other.id);
            }
        }
        let told: BTreeSet<u64> =
            self.known.iter().filter(|other| !self.is_fenced(other.id)).map(|other| other.id).collect();
        self.member().tell_only(|id| told.contains(&id));
        for gone in self.member().heard_of() {
            // Its row is gone: it left, or somebody has seen that it is dead.
            if !self.known.iter().any(|other| other.id == gone) {
                self.member().orphan(gone, &self.shard.clock);
            }
        }
    }

    /// Where others push: in the end nothing is heard of those who were put out, and need not be.
    async fn count_on_the_living(&mut self) -> Result<(), Lost> {
        self.over.retain(|id| self.known.iter().any(|other| other.id == *id && other.out));
        let fenced = self.known.iter().filter(|other| other.out && self.is_fenced(other.id)).map(|other| other.id);
        let fenced: Vec<u64> = fenced.filter(|id| !self.over.contains(id)).collect();
        for id in fenced {
            if self.nothing_is_left_of(id).await? {
                self.over.insert(id);
            }
        }
        let counted = self.known.iter().map(|other| other.id).filter(|id| !self.over.contains(id)).collect();
        self.member().count_on(counted, &self.shard.clock);
        Ok(())
    }

    fn is_fenced(&self, id: u64) -> bool {
        self.fences.get(&id).is_some_and(|until| now_us() >= *until)
    }

    /// Removes the rows of the dead, once nothing of theirs can happen that is not known.
    async fn bury(&mut self) -> Result<(), Lost> {
        let dead: Vec<u64> = self
            .known
            .iter()
            .filter(|other| other.out && !other.keeps && self.is_fenced(other.id))
            .map(|other| other.id)
            .collect();
        for id in dead {
            let known_to_us = self.member().standing() == Standing::Serves;
            if self.member().pushes() {
                if !self.over.contains(&id) {
                    continue;
                }
            } else if known_to_us {
                // First all who join hear what it had under way.
                self.passing_on |= self.member().orphan(id, &self.shard.clock);
                if self.passing_on || !self.attempting.is_empty() {
                    continue;
                }
            } else if self.is_somebody_serving() || !self.nothing_is_left_of(id).await? {
                continue;
            }
            let transaction = self.client.transaction().await?;
            transaction.execute(STEP, &[]).await?;
            transaction.execute(FORGET, &[&(id as i64)]).await?;
            transaction.commit().await?;
            self.known.retain(|other| other.id != id);
            self.fences.remove(&id);
        }
        Ok(())
    }

    /// Has somebody attached who serves, and so knows what the dead had under way?
    fn is_somebody_serving(&self) -> bool {
        self.known.iter().any(|other| !other.out && self.member().attached(other.id, self.joined) == Some(true))
    }

    /// Have all processes ended their transactions that were at work when a dead proxy was fenced, and may have been its?
    async fn nothing_is_left_of(&mut self, id: u64) -> Result<bool, Lost> {
        // Who pushes may have announced to nobody what an open transaction of its has written.
        let states: &[&str] = match self.fleet.mode {
            PeersMode::Leased => &AT_WORK_STATES[..2],
            PeersMode::Push => &AT_WORK_STATES,
        };
        let rows = self.client.query(AT_WORK, &[&(id as i64), &states]).await?;
        let read = |row: &Row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
        let now: BTreeSet<Process> = rows.iter().map(read).collect::<Result<_, tokio_postgres::Error>>()?;
        let then = self.at_work.entry(id).or_insert_with(|| now.clone());
        then.retain(|process| now.contains(process));
        Ok(then.is_empty())
    }

    /// A primary that was promoted may never have heard of a proxy that had joined at the last one, and may serve until its lease
    /// is over: nobody writes here before.
    fn outlived_others(&self) -> bool {
        let Some(promoted) = self.promoted else { return true };
        let lease = self.known.iter().map(|other| other.lease).fold(self.fleet.lease, Duration::max);
        promoted.elapsed() > lease + lease / DRIFT + SLACK
    }

    fn stand(&mut self) {
        let told = |other: &Other| {
            if other.out { self.is_fenced(other.id) } else { self.member().tells(other.id, other.joined) }
        };
        let heard = |other: &Other| !other.out && self.member().attached(other.id, self.joined).is_some();
        let pushes = self.member().pushes();
        let standing = self.member().standing();
        if !self.outlived_others() {
            return;
        }
        // Nobody waits for what is pushed, so it must be known from the first on who hears of it.
        let may_write = |other: &Other| told(other) && (!pushes || other.out || heard(other));
        if standing < Standing::Writes && self.known.iter().all(may_write) {
            self.member().stand(Standing::Writes);
        }
        let may_serve = |other: &Other| self.over.contains(&other.id) || (told(other) && heard(other));
        let ready = standing < Standing::Serves && self.known.iter().all(may_serve);
        if ready && self.attempting.is_empty() {
            // What was read before may have been overwritten unheard.
            self.shard.clock.begin_anew();
            self.member().stand(Standing::Serves);
            tracing::info!(shard = %self.shard.name, others = self.known.len(), "serves from here on");
        }
    }

    async fn leave(&mut self) -> Result<(), Lost> {
        let transaction = self.client.transaction().await?;
        transaction.execute(STEP, &[]).await?;
        transaction.execute(LEAVE, &[&(self.shard.member.id as i64)]).await?;
        Ok(transaction.commit().await?)
    }
}

fn read_other(row: &Row) -> Result<Other, tokio_postgres::Error> {
    Ok(Other {
        id: row.try_get::<_, i64>(0)? as u64,
        address: row.try_get(1)?,
        lease: Duration::from_micros(row.try_get::<_, i64>(2)? as u64),
        joined: row.try_get::<_, i64>(3)? as u64,
        out: row.try_get(4)?,
        keeps: row.try_get(5)?,
        lives: row.try_get(6)?,
    })
}
