//! Table `weir.sequence` of the hub: for each sequence of a sharded or reference table, the first number not yet given away.
//!
//! Invariant: a block is given away once, also by a hub that was promoted or restored and has forgotten the last ones. That is known by
//! its timeline, which each row bears: on another one nothing is given away before the row is above all that the shards have, and
//! has left out as many blocks as nobody can have been given in the time that was lost ([`Rebase`]).

use weir_core::topology::catalog::RelationName;

use super::{Hub, HubError, bounded, schema};

/// Made on first use, so that a hub of an earlier version needs no other step.
const TABLE: &str = "
CREATE TABLE IF NOT EXISTS weir.sequence (
    database      text NOT NULL,
    schema_name   text NOT NULL,
    sequence_name text NOT NULL,
    next          bigint NOT NULL,
    PRIMARY KEY (database, schema_name, sequence_name)
);
ALTER TABLE weir.sequence ADD COLUMN IF NOT EXISTS timeline integer";

const IS_THERE: &str = "SELECT EXISTS (SELECT FROM pg_attribute \
    WHERE attrelid = to_regclass('weir.sequence') AND attname = 'timeline' AND NOT attisdropped)";

/// The timeline of a primary.
const NOW: &str = "('x' || substring(pg_walfile_name(pg_current_wal_insert_lsn()) for 8))::bit(32)::integer";

/// What became of an attempt to take numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Taken {
    /// From this one on.
    From(i64),
    /// The sequence is not known yet.
    Unknown,
    /// The hub is another one than when numbers were last taken: [`Hub::rebase_sequence`] first.
    Promoted,
}

/// How a row goes on at a hub that may have forgotten what it gave away.
#[derive(Clone, Copy, Debug)]
pub struct Rebase {
    /// The first number above all that the shards have.
    pub first: i64,
    /// So many are left out besides, but at most a hundredth of those that are left up to `max`. Steps of `step`.
    pub skip: i64,
    pub max: i64,
    pub step: i64,
}

impl Hub {
    /// Gives the numbers from the returned one up to `span` above it away.
    pub async fn take_numbers(&self, database: &str, name: &RelationName, span: i64) -> Result<Taken, HubError> {
        bounded(async {
            let client = self.client().await?;
            if !client.query_one(IS_THERE, &[]).await?.try_get::<_, bool>(0)? {
                return Ok(Taken::Unknown);
            }
            let take = format!(
                "UPDATE weir.sequence SET next = next + $4, timeline = {NOW} \
                 WHERE database = $1 AND schema_name = $2 AND sequence_name = $3 AND coalesce(timeline, {NOW}) = {NOW} \
                 RETURNING next - $4"
            );
            if let Some(row) = client.query_opt(&take, &[&database, &&*name.0, &&*name.1, &span]).await? {
                return Ok(Taken::From(row.try_get(0)?));
            }
            let known = "SELECT FROM weir.sequence WHERE database = $1 AND schema_name = $2 AND sequence_name = $3";
            let known = client.query_opt(known, &[&database, &&*name.0, &&*name.1]).await?;
            Ok(if known.is_some() { Taken::Promoted } else { Taken::Unknown })
        })
        .await
    }

    /// Makes a sequence known that begins with `first`, unless another proxy was quicker.
    pub async fn start_sequence(&self, database: &str, name: &RelationName, first: i64) -> Result<(), HubError> {
        bounded(async {
            let mut client = self.client().await?;
            let transaction = client.transaction().await?;
            schema::lock(&transaction).await?;
            transaction.batch_execute(TABLE).await?;
            let sql = "INSERT INTO weir.sequence (database, schema_name, sequence_name, next) VALUES ($1, $2, $3, $4) \
                       ON CONFLICT DO NOTHING";
            transaction.execute(sql, &[&database, &&*name.0, &&*name.1, &first]).await?;
            Ok(transaction.commit().await?)
        })
        .await
    }

    /// Makes a promoted hub's row ready to give numbers away, unless another proxy was quicker.
    pub async fn rebase_sequence(&self, database: &str, name: &RelationName, rebase: Rebase) -> Result<(), HubError> {
        bounded(async {
            let Rebase { first, skip, max, step } = rebase;
            let sql = format!(
                "UPDATE weir.sequence SET timeline = {NOW}, \
                 next = greatest(next, $4) + least($5, greatest(0, ($6 - greatest(next, $4)) / 100 / $7 * $7)) \
                 WHERE database = $1 AND schema_name = $2 AND sequence_name = $3 AND timeline <> {NOW}"
            );
            let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
                [&database, &&*name.0, &&*name.1, &first, &skip, &max, &step];
            self.client().await?.execute(&sql, &values).await?;
            Ok(())
        })
        .await
    }

    /// Gives everything below `next` away.
    pub async fn raise_sequence(&self, database: &str, name: &RelationName, next: i64) -> Result<(), HubError> {
        bounded(async {
            let sql = "UPDATE weir.sequence SET next = greatest(next, $4) \
                       WHERE database = $1 AND schema_name = $2 AND sequence_name = $3";
            self.client().await?.execute(sql, &[&database, &&*name.0, &&*name.1, &next]).await?;
            Ok(())
        })
        .await
    }
}
