//! Statements that Postgres lets run in no transaction (CREATE INDEX CONCURRENTLY, VACUUM): one shard after the other.
//!
//! Invariant: when a shard fails, the client reads where the statement is done and where it is not, what was left behind, and how to go
//! on; a shard that was not reached is untouched.

use std::fmt::Write as _;

use bytes::{BufMut, Bytes};
use weir_core::error::{Blame, UserError};
use weir_core::fresh::{Dependencies, Dependency};
use weir_core::id::ShardId;
use weir_wire::backend::{tag, with_added_fields};
use weir_wire::frame;
use weir_wire::row;

use super::fan::{Form, Question};
use crate::front::session::{Failure, Session};
use crate::statements::Shape;

/// Indexes that CONCURRENTLY began and did not finish.
const INVALID_INDEXES: &str = "
SELECT n.nspname || '.' || c.relname FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE NOT i.indisvalid AND c.relkind = 'i' AND n.nspname !~ '^pg_' ORDER BY 1 LIMIT 5";

impl Session {
    pub async fn shard_by_shard(
        &mut self,
        shards: &[ShardId],
        question: Question<'_>,
        shape: &Shape,
        form: Form,
    ) -> Result<(), Failure> {
        if self.txn.is_some() {
            let message = format!("{} cannot run inside a transaction block", shape.class.name());
            return Err(UserError::new(Blame::Client, "25001", message).into());
        }
        let mut command = Bytes::new();
        for (done, &shard) in shards.iter().enumerate() {
            let mut sources = self.ask(&[shard], question).await?;
            let index = sources[0].index;
            self.note_write_of(index, &Dependencies::from_slice(&[Dependency::Anything]), true).await?;
            self.pass(&mut sources, 0, done == 0, form.description && done == 0).await?;
            self.announced.publish();
            if let Some(body) = sources[0].failed.take() {
                self.drain(&mut sources).await?;
                if done > 0 {
                    self.db.renew_statements();
                    self.db.schema_changed().await;
                }
                let left = self.invalid_indexes(shard).await.unwrap_or_default();
                let (detail, hint) = self.how_far(shards, done, &left);
                return Err(self.report(&with_added_fields(&body, &[(b'D', &detail), (b'H', &hint)])));
            }
            command = sources[0].command.take().unwrap_or(command);
        }
        self.db.renew_statements();
        self.db.schema_changed().await;
        frame::put(&mut self.client.out, tag::COMMAND_COMPLETE, |out| {
            out.extend_from_slice(&command);
            out.put_u8(0);
        });
        Ok(())
    }

    async fn invalid_indexes(&mut self, shard: ShardId) -> Result<Vec<String>, Failure> {
        let mut sources = self.ask(&[shard], Question::Text(INVALID_INDEXES)).await?;
        let mut names = Vec::new();
        while !sources[0].done {
            let (kind, body) = self.next_frame(&mut sources[0]).await?;
            if kind == tag::DATA_ROW
                && let Ok([Some(name)]) = row::values(&body).as_deref()
            {
                names.push(String::from_utf8_lossy(name).into_owned());
            }
        }
        self.drain(&mut sources).await?;
        Ok(names)
    }

    /// DETAIL and HINT of a failure behind the first `done` shards. `left`: invalid indexes on the shard that failed.
    fn how_far(&self, shards: &[ShardId], done: usize, left: &[String]) -> (String, String) {
        let view = self.view();
        let name = |shard: &ShardId| view.topology.shards.get(usize::from(shard.0)).map_or("", |name| &**name);
        let names = |shards: &[ShardId]| match shards {
            [] => "none".to_owned(),
            shards => shards.iter().map(name).collect::<Vec<_>>().join(", "),
        };
        let mut detail = format!(
            "It runs shard by shard. Done on: {}. Failed on: {}. Not begun on: {}.",
            names(&shards[..done]),
            name(&shards[done]),
            names(&shards[done + 1..])
        );
        if !left.is_empty() {
            let _ = write!(detail, " INVALID indexes on {}: {}.", name(&shards[done]), left.join(", "));
        }
        let drop = if left.is_empty() { "" } else { "drop the INVALID index there, and " };
        let hint = format!(
            "Remove the cause, {drop}run it again with IF [NOT] EXISTS, so that it does nothing where it is done. SHOW DRIFT in the \
             admin database shows what still differs."
        );
        (detail, hint)
    }
}
