//! A server becomes a shard: it gets the schema, then what all shards have, and then takes part.
//!
//! Invariant: it takes part only when it has every row of the reference tables and every definition that the home shard has, but for
//! indexes of tables that it has no rows of yet ([`crate::reshard::late`]). While that is
//! looked at and copied, nobody changes either: statements that would wait at every proxy, and transactions that have are waited for.
//! Until then a failure leaves a server that no statement goes to.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio_postgres::Client;
use weir_core::id::Epoch;
use weir_core::reshard::script::MovedTable;
use weir_core::topology::{ShardState, Width};

use super::census::{Census, SETTLED_MAX};
use super::reach::Reach;
use super::sql;
use crate::app::{App, primary_login};
use crate::database::Database;
use crate::hub::Hub;
use crate::hub::moves::Driving;
use crate::reshard::schema::{self, Had, Section};

/// Longest wait for transactions that have changed reference tables.
const LOCK_WAIT: &str = "5s";

/// Longest wait for statements of before, while others wait for the new shard: those give up later.
const ENTERED_MAX: Duration = Duration::from_secs(4);

/// What joins.
pub(super) struct Joiner<'a> {
    pub(super) app: &'a App,
    pub(super) db: &'a Database,
    pub(super) hub: &'a Hub,
    pub(super) driving: &'a Arc<Driving>,
    pub(super) shard: &'a str,
}

impl Joiner<'_> {
    /// Nothing, if it takes part already.
    pub(super) async fn join(&self) -> Result<()> {
        let view = self.db.view_arc();
        let found = self.db.shards.by_shard().find(|(_, shard)| *shard.name == *self.shard);
        let (id, shard) = found.with_context(|| format!("shard {} is not known here yet", self.shard))?;
        match view.topology.roster.state(id) {
            Some(ShardState::Active) => return Ok(()),
            Some(ShardState::Joining) => {}
            // Somebody has died at it.
            Some(ShardState::Entering) => self.hub.entered(&self.db.name, self.shard, false).await?,
            Some(ShardState::Retired) | None => return Err(anyhow!("shard {} has been retired", self.shard)),
        }
        let config = self.app.config();
        let home = self.db.primaries.of(view.topology.home).clone();
        let target = primary_login(&config, &self.db.config, &shard.roles);
        // Who was at it before may hold the reference tables still, and would make up its mind too late.
        let servers = Reach::new(self.driving, "join", [home.clone(), target.clone()]);
        for server in &servers {
            server.be_alone().await?;
        }
        for section in [Section::PreData, Section::PostData] {
            for left in schema::make(&home, &target, (section, &view.rules)).await? {
                tracing::warn!(database = %self.db.name, shard = self.shard, "{left}");
            }
        }
        let mut census = Census::default();
        if view.width == Width::Lone {
            // Also transactions end by the map they began by: until then some sessions settle nothing and draw from the server.
            self.settled(&mut census, &servers, (view.topology.epoch, SETTLED_MAX)).await?;
        }
        if let Some(unique) = &self.db.unique {
            const WHAT: &str = "columns that are unique over all shards";
            if view.width == Width::Lone {
                unique.begin(self.db).await.context(WHAT)?;
            }
            unique.equip(id).await.context(WHAT)?;
        }
        let epoch = self.hub.enter(&self.db.name, self.shard).await?;
        let given = async {
            self.settled(&mut census, &servers, (epoch, ENTERED_MAX)).await?;
            self.give(&servers).await
        };
        let given = given.await;
        if given.is_err() {
            self.hub.entered(&self.db.name, self.shard, false).await?;
        }
        given
    }

    /// Errors: somebody works by an older map for longer.
    async fn settled(
        &self,
        census: &mut Census,
        servers: &[Reach; 2],
        (epoch, longest): (Epoch, Duration),
    ) -> Result<()> {
        let behind = census.settled((self.driving, servers.each_ref()), epoch, longest).await?;
        ensure!(
            behind.is_empty(),
            "waits for proxies where statements or transactions are under way by an older map: {}",
            behind.join(", ")
        );
        Ok(())
    }

    /// Copies the reference tables under a lock that keeps writers out, and lets it take part before the lock is gone.
    async fn give(&self, [from, to]: &[Reach; 2]) -> Result<()> {
        let (home, target) = (sql::plain(from).await?, sql::as_replica(to).await?);
        let tables = sql::reference_tables(&home, &self.db.view().rules).await?;
        home.batch_execute(&format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_WAIT}'")).await?;
        for table in &tables {
            let lock = format!("LOCK TABLE ONLY {} IN SHARE MODE", table.quoted());
            home.batch_execute(&lock).await.with_context(|| format!("{} is being written", table.quoted()))?;
        }
        let looks = crate::control::connect(from.login()).await?;
        let had = schema::had(&looks, &crate::control::connect(to.login()).await?, &self.db.view().rules).await?;
        ensure!(matches!(had, Had::All), "the schema has changed since it was made there; it is compared again");
        target.batch_execute("BEGIN").await?;
        for table in &tables {
            copy_whole(&home, &target, table).await.with_context(|| table.quoted())?;
        }
        target.batch_execute("COMMIT").await?;
        self.hub.entered(&self.db.name, self.shard, true).await?;
        // Writers go on by the new map: who has waited waited for that.
        home.batch_execute("COMMIT").await?;
        tracing::info!(database = %self.db.name, shard = self.shard, "the shard takes part");
        Ok(())
    }
}

async fn copy_whole(home: &Client, target: &Client, table: &MovedTable) -> Result<()> {
    target.batch_execute(&format!("DELETE FROM {}", table.quoted())).await?;
    let rows = home.copy_out(&table.copy_all()).await?;
    let sink = target.copy_in::<_, Bytes>(&table.copy_in()).await?;
    tokio::pin!(rows, sink);
    while let Some(piece) = rows.next().await {
        sink.feed(piece?).await?;
    }
    sink.finish().await?;
    Ok(())
}
