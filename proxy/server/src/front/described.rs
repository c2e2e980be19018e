//! Statements whose columns the client has been told, when the schema changes under them.
//!
//! Invariant: a client that reads rows by an earlier description never gets rows of another shape: it gets Postgres's own
//! error instead (RevalidateCachedQuery in src/backend/utils/cache/plancache.c). Where the columns are still the same, or
//! the client describes each portal, the statement goes on working, which is more than Postgres promises.

use std::sync::Arc;

use bytes::Bytes;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_wire::frontend::Object;

use super::batch::{Batch, Ending, Op};
use super::extended::Step;
use super::names::Known;
use super::session::{End, Failure, Session};
use super::stepwise::columns_in;

impl Session {
    /// A batch that has failed before any of its messages was looked at.
    pub fn give_up_batch(&mut self, failure: Failure, ending: Ending) -> Result<(), End> {
        match failure {
            Failure::End(end) => return Err(end),
            Failure::Refused(error) => self.fail(&error),
            Failure::Reported => {}
        }
        self.skipping = ending == Ending::Flush;
        if ending == Ending::Sync {
            self.put_ready();
            self.release();
        }
        Ok(())
    }

    /// Looks again at the columns of what this batch binds and the client has seen described under another view.
    pub async fn check_columns(&mut self, batch: &Batch) -> Result<(), Failure> {
        let mut doubtful: Vec<Bytes> = Vec::new();
        for op in &batch.ops {
            let name = match op {
                Op::Bind { statement: name, .. } | Op::Describe { object: Object::Statement, name } => name,
                // From here on names may stand for something else.
                Op::Parse { .. } | Op::Close { .. } => break,
                _ => continue,
            };
            let known = self.names.statement(name);
            if known.is_ok_and(|known| self.is_doubtful(known)) && !doubtful.contains(name) {
                doubtful.push(name.clone());
            }
        }
        for name in doubtful {
            Box::pin(self.check_columns_of(&name)).await?;
        }
        Ok(())
    }

    fn is_doubtful(&self, known: &Known) -> bool {
        let version = self.view().version;
        known.columns.is_some()
            && known.prepared.view_version != version
            && known.changed_in != Some(version)
            && !self.server_checks(known)
    }

    /// Will the server itself find out whether the columns have changed? It does where it has prepared this very statement.
    pub fn server_checks(&self, known: &Known) -> bool {
        known.columns.is_some()
            && self.view().topology.is_single()
            && self.held.first().is_some_and(|held| held.lease.is_prepared(known.prepared.id))
    }

    async fn check_columns_of(&mut self, name: &Bytes) -> Result<(), Failure> {
        // A pipeline that is under way cannot be interrupted; its server has not seen this statement.
        if self.pipelining().is_some() {
            return Ok(());
        }
        let Ok(known) = self.names.statement(name).cloned() else { return Ok(()) };
        let view = self.view();
        let old = &known.prepared;
        let fresh = self.prepare((&old.sql, &old.types), &view);
        let description = self.describe_statement(&fresh, true).await?;
        self.release();
        if known.columns == Some(columns_in(&description)) {
            self.names.refresh(name, Arc::clone(&fresh));
        } else {
            self.names.changed(name, view.version);
        }
        Ok(())
    }

    /// Remembers what the client has just been told of its statements' columns.
    pub fn note_columns(&mut self, steps: &[Step], columns: &[u64]) {
        let described = steps.iter().filter_map(|step| match step {
            Step::DescribeStatement { name, .. } => Some(name),
            _ => None,
        });
        for (name, columns) in described.zip(columns) {
            self.names.described(name, *columns);
        }
    }
}

pub fn changed() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "cached plan must not change result type")
        .routine("RevalidateCachedQuery")
}
