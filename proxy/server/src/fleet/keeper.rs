//! Keeps one member's row at the shard's primary, and with it its lease.
//!
//! Invariant: the lease runs from the moment the primary was *asked*; a member that is put out serves for at most its lease after
//! that commit, and whoever put it out waits so long before it counts on that. What is to be done about the others is decided by
//! [`Roster`]; here it is asked and done.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::{Client, GenericClient, Statement};
use weir_core::fresh::fleet::{Burial, Process, Roster, Row, Standing, Tie};
use weir_core::lock::MAKE_SCHEMA;

use super::Fleet;
use super::member::{Member, now_us};
use crate::clock::Identity;
use crate::config::PeersMode;
use crate::control::{OpenError, Target};
use crate::database::Shard;

/// Longest wait for a connection or an answer. The lease runs out earlier.
const PATIENCE: Duration = Duration::from_secs(3);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);

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
                Some((id, attached)) = keeper.attempts.recv() => keeper.roster.end_attempt(id, attached),
            }
        })
        .await;
        if tenure.is_over() {
            return Err(Lost::Replaced);
        }
    }
}

/// An attempt to attach to somebody, and whether it heard.
type Attempt = (u64, bool);

struct Keeper {
    fleet: Arc<Fleet>,
    shard: Arc<Shard>,
    client: Client,
    renew: Statement,
    others: Statement,
    roster: Roster,
    /// By member.
    addresses: BTreeMap<u64, String>,
    attempts: mpsc::Receiver<Attempt>,
    attempted: mpsc::Sender<Attempt>,
    /// When this primary replaced another.
    promoted: Option<Instant>,
}

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
            roster: Roster::new(fleet.hearing(), fleet.lease_us(), joined as u64),
            addresses: BTreeMap::new(),
            attempts,
            attempted,
            promoted: None,
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
            self.roster.note_silence(asked_us, |id| self.shard.member.heard_until_us(id));
        }
        let epoch = renewed(&self.client.query_one(&self.renew, &[&(self.member().id as i64)]).await?)?;
        if self.roster.is_lease_good_at(epoch) {
            self.member().extend(asked_us, self.fleet.lease);
        }
        let shard = Arc::clone(&self.shard);
        shard.member.settle_schema(|| self.fleet.doubt_catalogs(&shard));
        let (standing, writers) = (shard.member.standing(), shard.member.heard_of());
        let settled = self.roster.is_settled(epoch, standing, writers, &self.ties());
        let deaf = shard.member.take_deaf();
        if settled && deaf.is_empty() {
            return Ok(());
        }
        self.read(epoch).await?;
        self.attach_to_all();
        self.put_out_who_is_gone(&deaf).await?;
        self.mark_fences();
        if pushes {
            self.count_on_the_living().await?;
            // Only now is known of whose writes this proxy has to hear.
            shard.member.extend(asked_us, self.fleet.lease);
        }
        self.bury().await?;
        self.stand();
        let known = self.roster.rows().iter().map(|row| (row.id, self.addresses[&row.id].clone(), row.out));
        shard.member.know(known.collect());
        Ok(())
    }

    async fn read(&mut self, epoch: u64) -> Result<(), Lost> {
        let rows = self.client.query(&self.others, &[&(self.member().id as i64)]).await?;
        let others: Vec<(Row, String)> = rows.iter().map(read_other).collect::<Result<_, _>>()?;
        self.addresses = others.iter().map(|(row, address)| (row.id, address.clone())).collect();
        self.roster.read(epoch, others.into_iter().map(|(row, _)| row).collect());
        Ok(())
    }

    fn ties(&self) -> impl Fn(&Row) -> Tie + use<> {
        let (shard, joined) = (Arc::clone(&self.shard), self.roster.joined());
        move |row| shard.member.tie(row, joined)
    }

    /// Attempts run beside the lease, which must not wait for them.
    fn attach_to_all(&mut self) {
        let ties = self.ties();
        let begun = self.roster.begin_attempts(&ties);
        for row in self.roster.rows().iter().filter(|row| begun.contains(&row.id)) {
            let (shard, link) = (Arc::clone(&self.shard), self.fleet.link(&self.addresses[&row.id]));
            let (attempted, id, joined) = (self.attempted.clone(), row.id, row.joined);
            tokio::spawn(async move {
                let attached = link.ready().await && shard.member.attach(id, joined, link, &shard.clock).await;
                // The keeper may have ended meanwhile; the next one begins anew.
                let _ = attempted.send((id, attached)).await;
            });
        }
    }

    async fn put_out_who_is_gone(&mut self, deaf: &BTreeSet<u64>) -> Result<(), Lost> {
        for id in self.roster.gone(self.member().standing(), deaf, &self.ties()) {
            let transaction = self.client.transaction().await?;
            transaction.execute(STEP, &[]).await?;
            renewed(&transaction.query_one(&self.renew, &[&(self.shard.member.id as i64)]).await?)?;
            transaction.execute(PUT_OUT, &[&(id as i64)]).await?;
            transaction.commit().await?;
            let peer = &self.addresses[&id];
            tracing::warn!(shard = %self.shard.name, %peer, "a proxy does not answer and is put out");
            self.roster.put_out(id);
        }
        Ok(())
    }

    fn mark_fences(&mut self) {
        self.roster.mark_fences(now_us());
        let told = self.roster.to_tell(now_us());
        self.member().tell_only(|id| told.contains(&id));
        for gone in self.roster.vanished(self.member().heard_of()) {
            self.member().orphan(gone, &self.shard.clock);
        }
    }

    /// Where others push: in the end nothing is heard of those who were put out, and need not be.
    async fn count_on_the_living(&mut self) -> Result<(), Lost> {
        for id in self.roster.to_prove(now_us()) {
            if self.nothing_is_left_of(id).await? {
                self.roster.is_over(id);
            }
        }
        self.member().count_on(self.roster.counted(), &self.shard.clock);
        Ok(())
    }

    /// Removes the rows of the dead, once nothing of theirs can happen that is not known.
    async fn bury(&mut self) -> Result<(), Lost> {
        for id in self.roster.dead(now_us()) {
            let ready = match self.roster.burial(id, self.member().standing(), &self.ties()) {
                Burial::Later => false,
                Burial::PassOn => {
                    let any = self.member().orphan(id, &self.shard.clock);
                    self.roster.passes_on(any)
                }
                Burial::Prove => self.nothing_is_left_of(id).await?,
                Burial::Remove => true,
            };
            if !ready {
                continue;
            }
            let transaction = self.client.transaction().await?;
            transaction.execute(STEP, &[]).await?;
            transaction.execute(FORGET, &[&(id as i64)]).await?;
            transaction.commit().await?;
            self.roster.buried(id);
        }
        Ok(())
    }

    async fn nothing_is_left_of(&mut self, id: u64) -> Result<bool, Lost> {
        // Who pushes may have announced to nobody what an open transaction of its has written.
        let states: &[&str] = match self.fleet.mode {
            PeersMode::Leased => &AT_WORK_STATES[..2],
            PeersMode::Push => &AT_WORK_STATES,
        };
        let rows = self.client.query(AT_WORK, &[&(id as i64), &states]).await?;
        let read = |row: &tokio_postgres::Row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
        let now: BTreeSet<Process> = rows.iter().map(read).collect::<Result<_, tokio_postgres::Error>>()?;
        Ok(self.roster.is_nothing_left(id, &now))
    }

    fn stand(&mut self) {
        let ago_us = self.promoted.map(|promoted| promoted.elapsed().as_micros() as u64);
        if ago_us.is_some_and(|ago_us| !self.roster.has_outlived_others(ago_us)) {
            return;
        }
        let Some(reached) = self.roster.reached(self.member().standing(), now_us(), &self.ties()) else { return };
        if reached == Standing::Serves {
            self.shard.clock.begin_anew();
            tracing::info!(shard = %self.shard.name, others = self.roster.rows().len(), "serves from here on");
        }
        self.member().stand(reached);
    }

    async fn leave(&mut self) -> Result<(), Lost> {
        let transaction = self.client.transaction().await?;
        transaction.execute(STEP, &[]).await?;
        transaction.execute(LEAVE, &[&(self.shard.member.id as i64)]).await?;
        Ok(transaction.commit().await?)
    }
}

/// Of the answer to [`RENEW`]: the epoch.
fn renewed(row: &tokio_postgres::Row) -> Result<u64, Lost> {
    let (epoch, in_table): (i64, bool) = (row.try_get(0)?, row.try_get(1)?);
    if in_table { Ok(epoch as u64) } else { Err(Lost::PutOut) }
}

/// A row, and its address.
fn read_other(row: &tokio_postgres::Row) -> Result<(Row, String), tokio_postgres::Error> {
    let other = Row {
        id: row.try_get::<_, i64>(0)? as u64,
        lease_us: row.try_get::<_, i64>(2)? as u64,
        joined: row.try_get::<_, i64>(3)? as u64,
        out: row.try_get(4)?,
        keeps: row.try_get(5)?,
        lives: row.try_get(6)?,
    };
    Ok((other, row.try_get(1)?))
}
