//! Ending a transaction on every Backend that took part.
//!
//! With one writer a plain COMMIT decides. With several, all but one (the *anchor*) PREPARE; the anchor then commits its own
//! work together with a decision row in `weir.txlog`, and that commit is the decision. Whoever finds a prepared transaction
//! later asks the anchor ([`crate::recover`]). Protocol and its tests: research on two-phase commit, anchor variant.
//!
//! Invariant: nothing is acknowledged before the decision is durable, and COMMIT PREPARED is sent before the acknowledgement,
//! so that the next read on any connection sees all of it.

use std::fmt::Write as _;
use std::io;

use bytes::Bytes;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::Epoch;
use weir_core::plan::Noting;
use weir_core::session::replies::Replies;
use weir_wire::backend::{Status, report_field, tag};
use weir_wire::{frame, row};

use crate::auth::scram::sha256;
use crate::exec::failures::overtaken_by_recovery;
use crate::exec::relay::{Capture, Trail};
use crate::front::client::Client;
use crate::front::session::{End, Failure, Session};
use crate::front::transaction::Snapshot;

/// What a server answered to a statement of weir's own.
pub type Answer = Result<(), Bytes>;
/// The same, with a value that it gives.
type Value = Result<String, Bytes>;

impl Session {
    /// Sends one statement to several held Backends at once. The first server error is passed to the client.
    pub async fn tell_all(&mut self, indexes: &[usize], sql: &str) -> Result<(), Failure> {
        let refused = self.ask_all(indexes, sql).await?.into_iter().find_map(|(_, answer)| answer.err());
        match refused {
            None => Ok(()),
            Some(body) => {
                if let Some(txn) = &mut self.txn {
                    txn.failed = true;
                }
                Err(self.report(&body))
            }
        }
    }

    /// Sends one statement to several held Backends at once and collects what each says.
    pub async fn ask_all(&mut self, indexes: &[usize], sql: &str) -> Result<Vec<(usize, Answer)>, Failure> {
        let answers = self.ask_values(indexes, sql).await?;
        Ok(answers.into_iter().map(|(index, answer)| (index, answer.map(drop))).collect())
    }

    /// The same, with the first value of the last row that each gives; empty if it gives none.
    async fn ask_values(&mut self, indexes: &[usize], sql: &str) -> Result<Vec<(usize, Value)>, Failure> {
        for &index in indexes {
            let lease = &mut self.held[index].lease;
            lease.busy = true;
            lease.put_query(sql);
        }
        let mut answers = Vec::with_capacity(indexes.len());
        for &index in indexes {
            let Session { client, held, .. } = self;
            match value(&mut held[index].lease, client).await {
                Ok(value) => answers.push((index, value)),
                Err(error) => return Err(self.lost(index, &error)),
            }
        }
        Ok(answers)
    }

    /// Sends the transaction's prelude to Backends that are held but not in it yet.
    pub async fn begin_on_held(&mut self) -> Result<(), Failure> {
        for index in 0..self.held.len() {
            if self.held[index].begun {
                continue;
            }
            let mut replies = Replies::default();
            self.prime(index, &mut replies);
            let mut trail = Trail::default();
            self.relay_on(index, &mut replies, &mut Capture::Off, &mut trail).await?;
            self.held[index].lease.busy = false;
        }
        Ok(())
    }

    /// Passes a server's error on to the client.
    pub fn report(&mut self, body: &[u8]) -> Failure {
        self.db.stats.server_error_body(body);
        frame::put(&mut self.client.out, tag::ERROR, |out| out.extend_from_slice(body));
        Failure::Reported
    }

    fn lost(&mut self, index: usize, error: &std::io::Error) -> Failure {
        let held = &mut self.held[index];
        held.lease.doubt("lost while ending a transaction");
        let error = UserError::new(Blame::Server, sqlstate::TRANSACTION_UNKNOWN, "the server connection was lost")
            .detail(format!("{}: {error}", held.lease.pool().name))
            .hint("Whether the last statement took effect is not known; connect again and check.")
            .fatal();
        self.give_up_announced();
        Failure::End(End::Fatal(error))
    }

    /// COMMIT everywhere, all or nothing. On failure everything is rolled back and the client has the reason.
    pub async fn commit_all(&mut self) -> Result<(), Failure> {
        let Some(txn) = self.txn.clone() else { return Ok(()) };
        if txn.failed {
            return self.roll_back_all().await;
        }
        if self.held.iter().any(|held| held.noting != Noting::None)
            && let Err(failure) = Box::pin(self.settle_unique()).await
        {
            if !matches!(failure, Failure::End(_)) {
                self.roll_back_all().await?;
            }
            return Err(failure);
        }
        let begun: Vec<usize> = (0..self.held.len()).filter(|index| self.held[*index].begun).collect();
        // Of a snapshot of all shards nothing can have been written.
        let writes = !matches!(txn.snapshot, Snapshot::AllShards);
        if writes && self.held.iter().any(|held| held.wrote) {
            self.pass_gate().await;
        }
        if self.db.tracks_freshness() {
            for &index in &begun {
                let held = &self.held[index];
                let server = (held.shard, held.lease.cancel_key.process);
                if let Err(error) = self.announced.announce(&self.db, server, &held.dirty).await {
                    self.roll_back_all().await?;
                    return Err(error.into());
                }
            }
        }
        let (writers, readers): (Vec<usize>, Vec<usize>) =
            begun.iter().partition(|index| writes && self.held[**index].wrote);
        let decided = match writers.as_slice() {
            [] | [_] => self.commit_one(&readers, &writers).await,
            _ => self.commit_several(&readers, &writers).await,
        };
        self.txn = None;
        self.close_transaction(decided.is_ok());
        self.announced.publish();
        decided?;
        if txn.renews {
            self.db.renew_statements();
        }
        if txn.made_keeper {
            self.db.refresh_catalog().await;
            crate::unique::catch_up(&self.db).await;
        } else if txn.changed_schema {
            self.db.schema_changed().await;
        }
        Ok(())
    }

    async fn commit_one(&mut self, readers: &[usize], writers: &[usize]) -> Result<(), Failure> {
        for part in [readers, writers] {
            let refused = self.ask_all(part, "COMMIT").await?.into_iter().find_map(|(_, answer)| answer.err());
            if let Some(body) = refused {
                self.roll_back_open().await?;
                return Err(self.report(&body));
            }
        }
        Ok(())
    }

    async fn commit_several(&mut self, readers: &[usize], writers: &[usize]) -> Result<(), Failure> {
        let (anchor, others) = (writers[0], &writers[1..]);
        let topology = &self.view().topology;
        let ticket = Ticket::draw(&topology.shards[usize::from(self.held[anchor].shard.0)], topology.epoch);
        let gid = &ticket.gid;
        if let Err(failure) = self.commit_one(readers, &[]).await {
            self.roll_back_open().await?;
            return Err(failure);
        }
        let mut prepared = Vec::new();
        let mut parts = String::new();
        let mut refused = None;
        let prepare = format!("SELECT pg_catalog.pg_current_xact_id(); PREPARE TRANSACTION '{gid}'");
        for (index, answer) in self.ask_values(others, &prepare).await? {
            match answer {
                Ok(number) => {
                    prepared.push(index);
                    let _ = write!(parts, ",{}:{number}", self.plain_shard(index));
                }
                Err(body) => {
                    refused.get_or_insert(body);
                }
            }
        }
        let snapshots = self.db.snapshots.clone();
        let (decided, _decision) = match (refused, snapshots) {
            (Some(body), _) => (Err(self.report(&body)), None),
            (None, None) => (self.decide(anchor, &ticket, &parts).await, None),
            (None, Some(snapshots)) => {
                // Until all shards know: a snapshot of all of them waits for it.
                let decision = snapshots.decide().await;
                (self.decide(anchor, &ticket, &parts).await, Some(decision))
            }
        };
        if let Err(failure) = decided {
            if matches!(failure, Failure::End(_)) {
                return Err(failure);
            }
            self.roll_back_open().await?;
            // One that does not hear it is finished by recovery, by the decision that is missing.
            self.ask_all(&prepared, &format!("ROLLBACK PREPARED '{gid}'")).await?;
            return Err(failure);
        }
        // Decided. What fails from here on is finished by recovery, and the client is told the truth: it is committed.
        for &index in &prepared {
            let done = self.ask_all(&[index], &format!("COMMIT PREPARED '{gid}'")).await;
            if !matches!(done.as_deref(), Ok([(_, Ok(()))])) {
                tracing::warn!(%gid, shard = %self.held[index].shard, "COMMIT PREPARED failed; recovery will finish it");
                self.held[index].lease.doubt("COMMIT PREPARED failed");
            }
        }
        self.db.stats.two_phase_commits.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    /// The name of a held Backend's shard, as names of distributed transactions have it.
    fn plain_shard(&self, index: usize) -> String {
        plain_name(&self.view().topology.shards[usize::from(self.held[index].shard.0)])
    }

    /// Commits the anchor's own work together with the decision, which says which transaction of each shard takes part.
    async fn decide(&mut self, anchor: usize, ticket: &Ticket, others: &str) -> Result<(), Failure> {
        let Ticket { gid, secret } = ticket;
        let secret = format!("pg_catalog.decode('{secret:032x}', 'hex')");
        let own = format!("'{}:' || pg_catalog.pg_current_xact_id()::text || '{others}'", self.plain_shard(anchor));
        let decision = format!("INSERT INTO weir.txlog (gid, secret, parts) VALUES ('{gid}', {secret}, {own})");
        for (sql, decides) in [(&*decision, true), ("COMMIT", false)] {
            if let Some((_, Err(body))) = self.ask_all(&[anchor], sql).await?.pop() {
                // The row is there: recovery took this proxy for dead, because the shards took long to prepare.
                let overtaken = decides && report_field(&body, b'C') == Some(sqlstate::UNIQUE_VIOLATION.as_bytes());
                return Err(if overtaken { overtaken_by_recovery().into() } else { self.report(&body) });
            }
        }
        Ok(())
    }

    /// ROLLBACK everywhere.
    pub async fn roll_back_all(&mut self) -> Result<(), Failure> {
        self.roll_back_open().await?;
        self.txn = None;
        self.close_transaction(false);
        self.announced.publish();
        Ok(())
    }

    async fn roll_back_open(&mut self) -> Result<(), Failure> {
        let open: Vec<usize> =
            (0..self.held.len()).filter(|index| self.held[*index].lease.status != Status::Idle).collect();
        self.ask_all(&open, "ROLLBACK").await?;
        Ok(())
    }

    /// Settings made inside the transaction stay or go with it.
    pub fn close_transaction(&mut self, committed: bool) {
        if committed {
            self.vars.on_commit();
        } else {
            self.vars.on_rollback();
        }
        for held in &mut self.held {
            if held.begun {
                held.lease.vars = if committed { self.vars.current().clone() } else { held.vars_before.clone() };
            }
            held.begun = false;
            held.wrote = false;
            held.changed = false;
            held.noting = Noting::None;
            held.dirty.clear();
        }
    }
}

/// Waits for the whole answer to a simple query of weir's own; rows are ignored. What the server says besides (notices of
/// deferred triggers, settings that a rollback takes back, notifications) is the client's.
pub async fn answer(lease: &mut crate::back::pool::Lease, client: &mut Client) -> std::io::Result<Answer> {
    Ok(value(lease, client).await?.map(drop))
}

async fn value(lease: &mut crate::back::pool::Lease, client: &mut Client) -> std::io::Result<Value> {
    lease.send().await?;
    let mut answer = Ok(String::new());
    loop {
        let (kind, body) = lease.receive().await?;
        match kind {
            tag::ERROR => answer = Err(body),
            tag::DATA_ROW if answer.is_ok() => {
                let values = row::values(&body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                answer =
                    Ok(String::from_utf8_lossy(values.first().copied().flatten().unwrap_or_default()).into_owned());
            }
            tag::NOTICE | tag::PARAMETER_STATUS | tag::NOTIFICATION => {
                client.put_aside(kind, &body);
            }
            tag::READY => {
                lease.status =
                    Status::read(&body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                lease.busy = false;
                return Ok(answer);
            }
            _ => {}
        }
    }
}

/// A distributed transaction's name, and what its decision is known by.
struct Ticket {
    /// `weir_<anchor shard>_<epoch>_<digest>`: all that recovery needs is in the name.
    gid: String,
    /// The digest is this number's. Names are for everyone to see while they are prepared; who does not know the number
    /// cannot decide for others.
    secret: u128,
}

impl Ticket {
    fn draw(anchor: &str, epoch: Epoch) -> Ticket {
        let secret = rand::random::<u128>();
        let digest = sha256(&secret.to_be_bytes());
        let digest = digest.iter().take(16).fold(0_u128, |number, byte| number << 8 | u128::from(*byte));
        Ticket { gid: format!("weir_{}_{epoch}_{digest:032x}", plain_name(anchor)), secret }
    }
}

/// A shard's name in letters, digits and '-'.
pub fn plain_name(shard: &str) -> String {
    shard.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect()
}
