//! Which proxies there are, and whether any of them may still work by an older map.
//!
//! Invariant: a proxy is passed over only if it has no connection left to the hub and to both servers, or if the epoch it has missed has
//! been written on both of them for longer than its right to an older one can last. So a proxy that is dead, stopped or cut off holds
//! nobody up for long, and none that might answer by an old map is forgotten.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use hashbrown::HashMap;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use tokio_postgres::types::Type;
use weir_core::id::Epoch;

use super::reach::Reach;
use super::sql;
use crate::database::lease::{ASKS, LEASE};
use crate::hub::moves::Driving;

/// How long it takes at most until nobody works by an older map, where no statement takes longer.
pub(super) const SETTLED_MAX: Duration = Duration::from_secs(30);
/// Beyond the lease, for clocks that do not run alike.
const MARGIN: Duration = Duration::from_millis(500);
/// How often it is asked who works by which epoch.
const LOOK: Duration = Duration::from_millis(2);
const LOOK_MAX: Duration = Duration::from_millis(4);
/// Whoever is there and well has answered by then; looking for connections burdens servers whose statements wait. Also the pause between
/// two such looks.
const THERE_AFTER: Duration = Duration::from_millis(50);

const SESSIONS: &str = "SELECT DISTINCT substr(application_name, length($1) + 1) FROM pg_stat_activity \
                        WHERE starts_with(application_name, $1)";

/// What is known of the proxies from look to look.
#[derive(Default)]
pub(super) struct Census {
    /// Source and target.
    servers: Vec<Client>,
    written: Epoch,
    /// Proxies that have not said that they work by an epoch, which was written on the servers then.
    missed: HashMap<String, (Epoch, Instant)>,
}

impl Census {
    /// Waits until no proxy works by an older epoch. Those that still may after `longest`.
    pub(super) async fn settled(
        &mut self,
        (driving, servers): (&Driving, [&Reach; 2]),
        epoch: Epoch,
        longest: Duration,
    ) -> Result<Vec<String>> {
        let begun = Instant::now();
        self.write((driving, servers), epoch).await?;
        self.wait(driving, epoch, (begun, longest)).await
    }

    /// The same as [`Census::settled`] for an epoch that follows one that was written, where statements wait: who is well says so
    /// before the servers could be told. Whoever calls must write it on both of them before another one owns the slots, for proxies
    /// that nobody knows of.
    pub(super) async fn settled_soon(
        &mut self,
        (driving, servers): (&Driving, [&Reach; 2]),
        epoch: Epoch,
        longest: Duration,
    ) -> Result<Vec<String>> {
        let begun = Instant::now();
        while begun.elapsed() < THERE_AFTER {
            if self.behind(driving, epoch).await?.is_empty() {
                return Ok(Vec::new());
            }
            sleep(LOOK).await;
        }
        self.write((driving, servers), epoch).await?;
        self.wait(driving, epoch, (begun, longest)).await
    }

    /// Once the epoch is written.
    async fn wait(
        &mut self,
        driving: &Driving,
        epoch: Epoch,
        (begun, longest): (Instant, Duration),
    ) -> Result<Vec<String>> {
        let (written, mut look, mut next_there) = (Instant::now(), LOOK, begun + THERE_AFTER);
        let mut behind = self.behind(driving, epoch).await?;
        loop {
            for id in &behind {
                self.missed.entry_ref(id.as_str()).or_insert((epoch, written));
            }
            self.missed.retain(|id, _| behind.contains(id));
            behind.retain(|id| self.missed.get(id).is_none_or(|(_, since)| since.elapsed() < LEASE + MARGIN));
            if behind.is_empty() || begun.elapsed() >= longest {
                return Ok(behind);
            }
            sleep(look).await;
            look = (look * 2).min(LOOK_MAX);
            behind = self.behind(driving, epoch).await?;
            if Instant::now() >= next_there {
                self.keep_those_there(driving, &mut behind).await?;
                next_there = Instant::now() + THERE_AFTER;
            }
        }
    }

    /// Proxies that are there and have not said that they work by nothing older, however long ago they lost the right to: one that
    /// stands still may go on in the midst of what it had begun. To be asked after [`Census::settled`].
    pub(super) async fn lingering(&mut self, driving: &Driving, epoch: Epoch) -> Result<Vec<String>> {
        let mut behind = self.behind(driving, epoch).await?;
        self.keep_those_there(driving, &mut behind).await?;
        Ok(behind)
    }

    async fn keep_those_there(&mut self, driving: &Driving, behind: &mut Vec<String>) -> Result<()> {
        if !behind.is_empty() {
            let there = self.there(driving).await?;
            behind.retain(|id| there.contains(id));
        }
        Ok(())
    }

    async fn behind(&mut self, driving: &Driving, epoch: Epoch) -> Result<Vec<String>> {
        let proxies = driving.proxies().await?;
        for (id, at) in &proxies {
            // What it had missed it has heard of since.
            if self.missed.get(id).is_some_and(|(missed, _)| at >= missed) {
                self.missed.remove(id);
            }
        }
        Ok(proxies.into_iter().filter(|(_, at)| *at < epoch).map(|(id, _)| id).collect())
    }

    /// From here on a proxy that asks one of the servers learns that its map is old. Errors: the hub has forgotten a later one.
    pub(super) async fn write(
        &mut self,
        (driving, [source, target]): (&Driving, [&Reach; 2]),
        epoch: Epoch,
    ) -> Result<()> {
        if self.servers.iter().any(Client::is_closed) {
            self.servers.clear();
            self.written = Epoch(0);
        }
        if self.servers.is_empty() {
            self.servers = vec![sql::plain(source).await?, sql::plain(target).await?];
        }
        if self.written < epoch {
            let write = write_epoch(epoch);
            // Statements may be waiting: both at once.
            let rows = self.servers.iter().map(async |server| server.query_typed_one(&write, &[]).await);
            for row in try_join_all(rows).await.context("the map's epoch")? {
                let written = Epoch(row.try_get::<_, i64>(0)? as u64);
                // Another move may have come further; the hub cannot have.
                ensure!(
                    written <= epoch || written <= driving.epoch().await?,
                    "a server knows of epoch {written}, which the hub has forgotten: it was restored, or promoted without its last transactions"
                );
            }
            self.written = epoch;
        }
        Ok(())
    }

    /// Proxies that have a connection to the hub or to one of the servers.
    async fn there(&self, driving: &Driving) -> Result<Vec<String>> {
        let mut there = driving.connected(SESSIONS).await?;
        let asked = self.servers.iter().map(async |server| server.query_typed(SESSIONS, &[(&ASKS, Type::TEXT)]).await);
        for row in try_join_all(asked).await?.into_iter().flatten() {
            there.push(row.try_get(0)?);
        }
        Ok(there)
    }
}

/// Tells one server of an epoch. Gives the one that it knows of then.
pub(super) fn write_epoch(epoch: Epoch) -> String {
    format!("UPDATE weir.map SET epoch = greatest(epoch, {epoch}) RETURNING epoch")
}
