//! Table `weir.sequence` of the hub: for each sequence of a sharded or reference table, the first number not yet given away.

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
)";

const TAKE: &str = "
UPDATE weir.sequence SET next = next + $4 WHERE database = $1 AND schema_name = $2 AND sequence_name = $3 RETURNING next - $4";

impl Hub {
    /// Gives the numbers from the returned one up to `span` above it away; `None`: the sequence is not known yet.
    pub async fn take_numbers(&self, database: &str, name: &RelationName, span: i64) -> Result<Option<i64>, HubError> {
        bounded(async {
            let client = self.client().await?;
            let exists = client.query_one("SELECT to_regclass('weir.sequence') IS NOT NULL", &[]).await?;
            if !exists.try_get::<_, bool>(0)? {
                return Ok(None);
            }
            let row = client.query_opt(TAKE, &[&database, &&*name.0, &&*name.1, &span]).await?;
            Ok(row.map(|row| row.try_get(0)).transpose()?)
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
