//! Cursors and half-read portals over several shards, as the client names them.
//!
//! Invariant: a name means what one server would take it for: a portal bound anew or closed has no rows left, and what is open
//! ends with the transaction. Non-goal: how rows are fetched ([`crate::exec::open`]).

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::Dependency;
use weir_core::id::ShardId;
use weir_core::merge::MergeSpec;
use weir_core::plan::{Values, Wrap};
use weir_core::sql::class::{Class, Target};
use weir_core::sql::fetch::forward;
use weir_wire::frontend::{Bind, put_query};

use super::control::refused;
use super::names::Portal;
use super::session::{Failure, Session};
use super::stepwise::returns_rows;
use crate::database::View;
use crate::exec::fan::{Form, Question};
use crate::exec::open::Reader;
use crate::statements::Shape;

impl Session {
    /// A portal that weir has not bound may be a cursor made by DECLARE, on the one server of the database.
    pub fn portal_of_server(&mut self, name: &Bytes, view: &View) -> Option<Portal> {
        if !self.is_single() || self.held.is_empty() || name.is_empty() {
            return None;
        }
        let sql = Bytes::from_static(b"FETCH FORWARD FROM a_cursor");
        let prepared = self.prepare((&sql, &Bytes::new()), view);
        let values = Values { params: &[], sql: "", literals: &[] };
        let plan = prepared.template.bind(&values, &view.topology).ok()?;
        Some(Portal { prepared, bind: Bytes::new(), plan: Arc::new(plan), bound_on: Some(view.topology.home) })
    }

    /// DECLARE … CURSOR of a query whose rows several shards have.
    pub async fn declare_cursor(
        &mut self,
        shards: &[ShardId],
        question: Question<'_>,
        shape: &Shape,
        spec: &MergeSpec,
        form: Form,
    ) -> Result<(), Failure> {
        let Class::Declare { name, .. } = &shape.class else { return Ok(()) };
        if self.txn.as_ref().is_none_or(|txn| txn.implicit) {
            let message = "DECLARE CURSOR can only be used in transaction blocks";
            return Err(UserError::new(Blame::Client, "25P01", message).into());
        }
        let mut sources = self.ask(shards, question).await?;
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        if let Some(body) = sources.iter_mut().find_map(|source| source.failed.take()) {
            return Err(self.report(&body));
        }
        let portal = Bytes::from(name.clone().into_bytes());
        let described = portal.clone();
        let reader = Reader::Cursor(name.clone());
        self.open_read(shards, (reader, portal), Question::Described(&described), spec.clone(), form).await?;
        self.put_tag("DECLARE CURSOR");
        Ok(())
    }

    /// The cursor over several shards that a statement is about.
    fn own_cursor(&self, class: &Class) -> Option<Reader> {
        let (Class::Fetch { name } | Class::Move { name } | Class::CloseCursor(Target::Name(name))) = class else {
            return None;
        };
        let reader = Reader::Cursor(name.clone());
        self.has_open(&reader).then_some(reader)
    }

    pub fn is_own_cursor(&self, class: &Class) -> bool {
        self.own_cursor(class).is_some()
    }

    pub fn is_own_fetch(&self, class: &Class) -> bool {
        matches!(class, Class::Fetch { .. }) && self.is_own_cursor(class)
    }

    /// FETCH, MOVE or CLOSE of a cursor over several shards; false if it is none. `described`: rows come with their description.
    pub async fn use_cursor(&mut self, sql: &str, class: &Class, described: bool) -> Result<bool, Failure> {
        if matches!(class, Class::CloseCursor(Target::All)) {
            return self.close_cursors(sql).await;
        }
        let Some(reader) = self.own_cursor(class) else { return Ok(false) };
        if matches!(class, Class::CloseCursor(_)) {
            self.close_read(&reader).await?;
            self.put_tag("CLOSE CURSOR");
            return Ok(true);
        }
        crate::statements::relex(sql, &mut self.scratch);
        let count = forward(sql, &self.scratch.tokens).map_err(|_| backward())?;
        let shown = matches!(class, Class::Fetch { .. });
        if shown && described {
            self.put_cursor_description(class);
        }
        let rows = self.fetch_rows(&reader, count, shown).await?;
        self.put_tag(&format!("{} {rows}", if shown { "FETCH" } else { "MOVE" }));
        Ok(true)
    }

    async fn close_cursors(&mut self, sql: &str) -> Result<bool, Failure> {
        let is_cursor = |reader: &Reader| matches!(reader, Reader::Cursor(_));
        if !self.open_reads.iter().any(|read| is_cursor(&read.reader)) {
            return Ok(false);
        }
        self.open_reads.retain(|read| !is_cursor(&read.reader));
        let begun: Vec<usize> = (0..self.held.len()).filter(|index| self.held[*index].begun).collect();
        self.tell_all(&begun, sql).await?;
        self.put_tag("CLOSE CURSOR ALL");
        Ok(true)
    }

    /// RowDescription of what FETCH from a cursor over several shards returns; false if it is none.
    pub fn put_cursor_description(&mut self, class: &Class) -> bool {
        let Some(reader) = self.own_cursor(class).filter(|_| matches!(class, Class::Fetch { .. })) else {
            return false;
        };
        let Some(read) = self.open_reads.iter().find(|read| read.reader == reader) else { return false };
        self.client.out.extend_from_slice(&read.description);
        true
    }

    /// Execute with a row limit of a portal whose rows several shards have, or the next Execute of one that was read in part.
    pub async fn execute_part(
        &mut self,
        name: &Bytes,
        portal: &Portal,
        rows_max: i32,
        shards: &[ShardId],
    ) -> Result<(), Failure> {
        let (Some(spec), Wrap::None) = (&portal.plan.merge, &portal.plan.wrap) else {
            return Err(partial_fetch().into());
        };
        let reader = Reader::Portal(name.clone());
        if !self.has_open(&reader) {
            self.opened += 1;
            let own = Bytes::from(format!("weir_portal_{}", self.opened));
            let prepared = &portal.prepared;
            let question = Question::Opened { prepared, bind: &portal.bind, portal: &own, sql: None };
            let sql = std::str::from_utf8(&prepared.sql).unwrap_or_default();
            let guarded = self.guarded(question, (sql, &prepared.template), &portal.plan)?;
            let question = guarded.as_ref().map_or(question, Question::Guarded);
            let form = Form { description: false, columns: prepared.template.merged_columns() };
            self.open_read(shards, (reader.clone(), own.clone()), question, (**spec).clone(), form).await?;
        }
        self.put_part(&reader, rows_max).await
    }

    /// May a row limit matter to it? Not where it returns no rows.
    pub fn reads_in_parts(&self, portal: &Portal) -> bool {
        let sql = std::str::from_utf8(&portal.prepared.sql).unwrap_or_default();
        matches!(portal.plan.wrap, Wrap::None | Wrap::Carry(_)) && returns_rows(&portal.plan, sql)
    }
}

impl Session {
    /// FETCH, MOVE and CLOSE go where the cursor is.
    pub async fn on_cursor(&mut self, sql: &str, class: &Class) -> Result<(), Failure> {
        let shard = self.cursor_shard(class)?;
        let mut request = BytesMut::new();
        put_query(&mut request, sql);
        let writes = [Dependency::Anything];
        let trail = self.run_raw(shard, &request, &writes).await?;
        if trail.failed { Err(Failure::Reported) } else { Ok(()) }
    }

    /// One shard has made a cursor in the open transaction.
    pub fn note_cursor(&mut self, class: &Class, shard: ShardId) {
        const CURSORS_MAX: usize = 256;
        if let (Class::Declare { name, .. }, Some(txn)) = (class, &mut self.txn) {
            txn.cursors.retain(|(known, _)| **known != **name);
            if txn.cursors.len() < CURSORS_MAX {
                txn.cursors.push((name.as_str().into(), shard));
            }
        }
    }

    /// Where this session's cursors are, or the one that the statement names.
    pub fn cursor_shard(&self, class: &Class) -> Result<ShardId, Failure> {
        if let Class::Fetch { name } | Class::Move { name } | Class::CloseCursor(Target::Name(name)) = class
            && let Some(txn) = &self.txn
            && let Some((_, shard)) = txn.cursors.iter().find(|(known, _)| **known == **name)
        {
            return Ok(*shard);
        }
        if self.held.len() > 1 {
            return Err(refused(
                "a cursor in a transaction over several shards",
                "the cursor lives on one of them, and weir has not seen its DECLARE",
                "Read with a plain SELECT.",
            ));
        }
        Ok(self.pinned_or_home())
    }
}

/// Does a Bind ask for any column in binary?
pub fn asks_binary(bind: &Bytes) -> bool {
    Bind::read(bind).is_ok_and(|bind| bind.result_formats.iter().any(|byte| *byte != 0))
}

fn backward() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "a cursor over several shards goes forward only")
        .detail("Its rows are merged as they are fetched, and not kept.")
        .hint("Use FETCH [FORWARD] n, NEXT or ALL, or restrict the cursor to one shard key.")
}

pub fn binary_cursor() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "rows of a cursor over several shards come as text")
        .detail("Bind asks for them in binary.")
        .hint("Ask for text, or use a portal with a row limit instead of DECLARE.")
}

pub fn partial_fetch() -> UserError {
    UserError::new(
        Blame::Client,
        sqlstate::FEATURE_NOT_SUPPORTED,
        "these rows of several shards cannot be fetched in parts",
    )
    .detail("Execute asked for a limited number of rows of a write.")
    .hint("Turn the driver's fetch size off for this statement, or add LIMIT.")
}
