//! One statement on several shards: reads are merged row by row, writes commit everywhere or nowhere.
//!
//! Invariant: the client sees one reply, in the form one Postgres would have given; if any shard fails, the first failure
//! is the reply, and every Backend has been read to its ReadyForQuery before the session goes on. Rows are held only as
//! far as the merge needs, within its limits.

mod question;
pub mod rows;

use std::task::Poll;

use bytes::{BufMut, Bytes, BytesMut};
use weir_core::id::ShardId;
use weir_core::merge::{MergeLimits, MergeSpec, Merger, ResultColumn, Wants, strip_row_description};
use weir_core::plan::{Combine, Plan, Template, Wrap};
use weir_core::session::replies::{Replies, Verdict};
use weir_core::sql::class::Class;
use weir_wire::backend::{Status, command_rows, command_tag, report_field, tag};
use weir_wire::frame;
use weir_wire::row;

pub use self::question::put_question;
use self::rows::Whole;
use super::carry::Carried;
use super::failures::{lost_shard, no_common_snapshot, stale_catalogue, unexpected};
use super::guests::Guarded;
use crate::front::session::{End, Failure, Session, Transaction};
use crate::statements::{Prepared, Understood};

/// The client is sent what has gathered whenever it is more than this.
pub const OUT_BYTES: usize = 64 * 1024;

/// What every shard is asked.
#[derive(Clone, Copy)]
pub enum Question<'a> {
    Text(&'a str),
    /// `merged`: ask with the text whose answers are made to be merged.
    Portal {
        prepared: &'a Prepared,
        bind: &'a Bytes,
        merged: bool,
    },
    /// A text made for this one execution; `hidden`: columns that it has beyond those the client knows.
    Once {
        sql: &'a str,
        types: &'a [u8],
        bind: &'a Bytes,
        hidden: usize,
    },
    /// Only bind it, under this name, and describe the portal. `sql`: another text for it.
    Opened {
        prepared: &'a Prepared,
        bind: &'a Bytes,
        portal: &'a [u8],
        sql: Option<&'a str>,
    },
    /// Describe a portal that is there.
    Described(&'a [u8]),
    /// Some shards are asked by texts of their own.
    Guarded(&'a Guarded<'a>),
}

const FLOATS: [u32; 2] = [700, 701];

impl<'a> Question<'a> {
    /// The client's text.
    pub fn sql(&self) -> &'a str {
        match *self {
            Question::Portal { prepared, .. } => std::str::from_utf8(&prepared.sql).unwrap_or_default(),
            Question::Text(sql) | Question::Once { sql, .. } => sql,
            Question::Opened { .. } | Question::Described(_) => "",
            Question::Guarded(guarded) => guarded.question().sql(),
        }
    }

    /// What shards without guests are asked.
    #[must_use]
    pub fn plain(self) -> Self {
        if let Question::Guarded(guarded) = self { guarded.question() } else { self }
    }

    /// What this shard is asked.
    fn of(self, shard: ShardId) -> Self {
        if let Question::Guarded(guarded) = self { guarded.of(shard) } else { self }
    }
}

/// How much of the reply the client asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Send the RowDescription.
    pub description: bool,
    /// Columns a merged row must have; another count means that the catalogue is out of date.
    pub columns: Option<usize>,
}

/// One shard's reply, as far as it has been read.
pub struct Source {
    pub index: usize,
    pub replies: Replies,
    /// ReadyForQuery has come.
    pub done: bool,
    /// ErrorResponse body, if it failed.
    pub failed: Option<Bytes>,
    /// The tag of its CommandComplete.
    pub command: Option<Bytes>,
}

impl Session {
    /// A simple statement for several shards.
    pub async fn spread_text(
        &mut self,
        shards: &[ShardId],
        sql: &str,
        understood: &Understood,
        plan: &Plan,
    ) -> Result<(), Failure> {
        let rewritten = self.text_to_merge(sql, &understood.template, plan);
        let question = Question::Text(rewritten.as_deref().unwrap_or(sql));
        let form = Form { description: true, columns: understood.template.merged_columns() };
        self.spread_guarded(shards, (question, sql, &understood.template), &understood.shape, plan, form).await
    }

    /// The text that shards are asked with when their answers are merged, if it is another than the client's.
    pub fn text_to_merge(&mut self, sql: &str, template: &Template, plan: &Plan) -> Option<String> {
        let rewrite = template.rewrite().filter(|_| plan.merge.is_some())?;
        crate::statements::relex(sql, &mut self.scratch);
        Some(rewrite.apply(sql, &self.scratch.tokens))
    }

    /// A statement that all shards are asked alike.
    pub async fn spread(
        &mut self,
        shards: &[ShardId],
        question: Question<'_>,
        shape: &crate::statements::Shape,
        plan: &Plan,
        form: Form,
    ) -> Result<(), Failure> {
        if let (Some(dealt), Wrap::None) = (&plan.dealt, &plan.wrap) {
            let whole = Whole { question, plan, dealt, description: form.description };
            return self.deal_rows(shards, whole).await;
        }
        if let Wrap::Carry(carry) = &plan.wrap {
            let carried = Carried { question, plan, carry, shape, description: form.description };
            return Box::pin(self.carry_rows(carried)).await;
        }
        match (&plan.wrap, &plan.merge) {
            (Wrap::CopyOut(options), _) => self.copy_out(shards, question, options).await,
            (Wrap::Explain(format), _) => self.explain_shards(shards, question, (*format, plan), form).await,
            (Wrap::Cursor, Some(spec)) => self.declare_cursor(shards, question, shape, spec, form).await,
            (_, Some(spec)) => self.merged_read(shards, question, (**spec).clone(), form).await,
            (_, None) => self.spread_write(shards, question, shape, plan, form).await,
        }
    }

    /// A read whose rows come from several shards.
    pub async fn merged_read(
        &mut self,
        shards: &[ShardId],
        question: Question<'_>,
        spec: MergeSpec,
        form: Form,
    ) -> Result<(), Failure> {
        if self.txn.as_ref().is_some_and(Transaction::keeps_one_shard) {
            return Err(no_common_snapshot().into());
        }
        let mut sources = self.ask(shards, question).await?;
        let outcome = self.merge(&mut sources, spec, form).await;
        // Whatever happened, every Backend is read to its end: the next statement finds them clean.
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        // Weir's own refusal goes before what a shard made of its part.
        let rows = outcome?;
        if let Some(body) = sources.iter_mut().find_map(|source| source.failed.take()) {
            return Err(self.report(&body));
        }
        self.put_tag(&format!("SELECT {rows}"));
        Ok(())
    }

    async fn merge(&mut self, sources: &mut [Source], spec: MergeSpec, form: Form) -> Result<u64, Failure> {
        let mut description = None;
        for source in sources.iter_mut() {
            while !source.done && source.failed.is_none() {
                let (kind, body) = self.next_frame(source).await?;
                if kind == tag::ROW_DESCRIPTION {
                    description.get_or_insert(body);
                    break;
                }
            }
        }
        if sources.iter().any(|source| source.failed.is_some()) {
            return Ok(0);
        }
        let (mut merger, description) = self.merger(description, spec, sources.len(), form)?;
        if form.description {
            self.client.out.unsplit(description);
        }
        while !merger.done() {
            let ready = match merger.wants() {
                Wants::One(number) => Some(number),
                Wants::All => Some(self.any_ready(sources).await),
                Wants::Nothing => None,
            };
            if let Some(number) = ready {
                self.feed(&mut merger, sources, number).await?;
                if sources[number].failed.is_some() {
                    return Ok(0);
                }
            }
            merger.poll(&mut self.client.out)?;
            if self.client.out.len() > OUT_BYTES {
                self.client.send().await.map_err(|_| End::ClientGone)?;
            }
        }
        Ok(merger.rows())
    }

    /// A merger for the rows that a shard has described, and the RowDescription frame that the client gets.
    pub fn merger(
        &self,
        description: Option<Bytes>,
        spec: MergeSpec,
        sources: usize,
        form: Form,
    ) -> Result<(Merger, BytesMut), Failure> {
        let Some(description) = description else { return Err(unexpected("no RowDescription")) };
        let fields = row::fields(&description).map_err(|_| unexpected("a malformed RowDescription"))?;
        if form.columns.is_some_and(|columns| columns != fields.len()) {
            return Err(stale_catalogue().into());
        }
        let is_float = |field: &row::Field<'_>| FLOATS.contains(&field.type_oid) && !field.binary;
        let rounded = fields.iter().any(is_float) && self.rounds_floats();
        let columns = fields
            .iter()
            .map(|field| ResultColumn {
                type_oid: field.type_oid,
                type_modifier: field.type_modifier,
                binary: field.binary,
                rounded,
            })
            .collect();
        let config = self.app.config();
        let limits = MergeLimits {
            buffered_bytes_max: config.limits.merge_bytes_max,
            groups_max: config.limits.merge_groups_max,
        };
        let mut framed = BytesMut::new();
        frame::put(&mut framed, tag::ROW_DESCRIPTION, |out| strip_row_description(&description, spec.hidden, out));
        Ok((Merger::new(spec, columns, sources, limits)?, framed))
    }

    /// May the shards send this session floats as text with fewer digits than tell one from another?
    fn rounds_floats(&self) -> bool {
        const SETTING: &str = "extra_float_digits";
        let says = |sql: &str| sql.to_ascii_lowercase().contains(SETTING);
        if self.txn.as_ref().is_some_and(|txn| txn.prelude.iter().any(|joined| says(&joined.sql))) {
            return true;
        }
        match self.vars.current().get(SETTING) {
            Some(value) => value.trim_matches('\'').trim().parse::<i32>().map_or(true, |digits| digits < 1),
            None => self.view().catalog.floats_rounded,
        }
    }

    /// Gives the merger the next row of one source, or its end.
    async fn feed(&mut self, merger: &mut Merger, sources: &mut [Source], number: usize) -> Result<(), Failure> {
        let source = &mut sources[number];
        loop {
            let (kind, body) = self.next_frame(source).await?;
            match kind {
                tag::DATA_ROW => return Ok(merger.push(number, &body)?),
                tag::READY => {
                    merger.finish(number);
                    return Ok(());
                }
                tag::ERROR => return Ok(()),
                _ => {}
            }
        }
    }

    /// The number of an unfinished source that has a frame or an error to read.
    async fn any_ready(&mut self, sources: &[Source]) -> usize {
        let held = &mut self.held;
        std::future::poll_fn(|cx| {
            for (number, source) in sources.iter().enumerate() {
                if !source.done && held[source.index].lease.poll_has_frame(cx).is_ready() {
                    return Poll::Ready(number);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// A write for several shards. Outside a transaction it makes its own, so that it commits everywhere or nowhere.
    pub async fn spread_write(
        &mut self,
        shards: &[ShardId],
        question: Question<'_>,
        shape: &crate::statements::Shape,
        plan: &Plan,
        form: Form,
    ) -> Result<(), Failure> {
        if !shape.class.is_transactional() {
            return self.shard_by_shard(shards, question, shape, form).await;
        }
        let _turn = self.unique_turn(plan).await?;
        let own = self.txn.is_none();
        if own {
            self.begin_implicit();
        }
        // One stream of COPY data feeds all shards, so they must all be listening.
        let first = if matches!(shape.class, Class::Copy(_)) { shards.len() } else { 1 };
        let (first, rest) = shards.split_at(first);
        let result = match &plan.wrap {
            Wrap::CopyIn(layout) => self.copy_in(shards, question, plan, layout).await,
            _ => self.write_all([first, rest], question, plan, form).await,
        };
        if result.is_ok()
            && shape.class.changes_schema()
            && let Some(txn) = &mut self.txn
        {
            txn.changed_schema = true;
            txn.renews = true;
        }
        self.conclude_write(own, plan, result).await
    }

    /// Ends a write over shards, and with it the transaction that was made for it alone (`own`).
    pub async fn conclude_write(
        &mut self,
        own: bool,
        plan: &Plan,
        mut result: Result<Bytes, Failure>,
    ) -> Result<(), Failure> {
        if result.is_ok()
            && plan.settles()
            && let Err(failure) = Box::pin(self.settle_unique()).await
        {
            result = Err(failure);
        }
        match result {
            Ok(command) => {
                if own {
                    self.commit_all().await?;
                }
                frame::put(&mut self.client.out, tag::COMMAND_COMPLETE, |out| {
                    out.extend_from_slice(&command);
                    out.put_u8(0);
                });
                Ok(())
            }
            Err(failure) => {
                if own && !matches!(failure, Failure::End(_)) {
                    self.roll_back_all().await?;
                } else if let Some(txn) = &mut self.txn {
                    txn.failed = true;
                }
                Err(failure)
            }
        }
    }

    /// The first shard goes first and alone: it orders concurrent writers of the same rows, so that they cannot wait for
    /// each other in a circle that no server sees.
    async fn write_all(
        &mut self,
        rounds: [&[ShardId]; 2],
        question: Question<'_>,
        plan: &Plan,
        form: Form,
    ) -> Result<Bytes, Failure> {
        let mut command = Bytes::new();
        let mut rows = 0;
        for (round, part) in rounds.into_iter().enumerate() {
            let mut sources = self.ask(part, question).await?;
            for number in 0..sources.len() {
                let index = sources[number].index;
                self.note_write(index, plan, false).await?;
                let shown = round + number == 0 || plan.combine() == Combine::Sum;
                self.pass(&mut sources, number, shown, form.description && round + number == 0).await?;
            }
            self.drain(&mut sources).await?;
            self.follow_all(&sources);
            for source in &mut sources {
                if let Some(body) = source.failed.take() {
                    return Err(self.report(&body));
                }
                if let Some(done) = source.command.take() {
                    rows += command_rows(&done).unwrap_or(0);
                    if command.is_empty() {
                        command = done;
                    }
                }
            }
        }
        Ok(match (plan.combine(), command_rows(&command)) {
            (Combine::Sum, Some(_)) => with_rows(&command, rows),
            _ => command,
        })
    }

    /// Reads one source to its end; its rows reach the client if they are `shown`.
    pub async fn pass(
        &mut self,
        sources: &mut [Source],
        number: usize,
        shown: bool,
        description: bool,
    ) -> Result<(), Failure> {
        loop {
            if sources[number].done {
                return Ok(());
            }
            let (kind, body) = self.next_frame(&mut sources[number]).await?;
            let forward = match kind {
                tag::DATA_ROW | tag::NOTICE => shown,
                tag::ROW_DESCRIPTION => description,
                tag::COPY_IN if number == 0 => {
                    if self.all_listen(sources).await? {
                        frame::put(&mut self.client.out, kind, |out| out.extend_from_slice(&body));
                        self.copy_to_all(sources).await?;
                    } else {
                        self.call_off_copy(sources).await?;
                    }
                    continue;
                }
                tag::COPY_OUT => return Err(unexpected("COPY TO from several shards")),
                _ => false,
            };
            if forward {
                frame::put(&mut self.client.out, kind, |out| out.extend_from_slice(&body));
                if self.client.out.len() > OUT_BYTES {
                    self.client.send().await.map_err(|_| End::ClientGone)?;
                }
            }
        }
    }

    /// Sends the question to shards, in ascending order so that sessions cannot wait for each other's Backends in a circle.
    pub async fn ask(&mut self, shards: &[ShardId], question: Question<'_>) -> Result<Vec<Source>, Failure> {
        let mut sources = Vec::with_capacity(shards.len());
        for &shard in shards {
            self.hold(shard).await?;
        }
        for &shard in shards {
            let index = self.hold(shard).await?;
            let mut replies = Replies::default();
            self.prime(index, &mut replies);
            let lease = &mut self.held[index].lease;
            put_question(lease, question.of(shard), &mut replies)?;
            lease.busy = true;
            self.cancel.slot.begin(&lease.cancel_key);
            sources.push(Source { index, replies, done: false, failed: None, command: None });
        }
        for source in &sources {
            self.held[source.index].lease.send().await.map_err(|error| lost_shard(&error))?;
        }
        Ok(sources)
    }

    /// The next frame that is part of the reply. ReadyForQuery marks the source as done.
    pub async fn next_frame(&mut self, source: &mut Source) -> Result<(u8, Bytes), Failure> {
        loop {
            let lease = &mut self.held[source.index].lease;
            let (kind, body) = match lease.receive().await {
                Ok(frame) => frame,
                Err(error) => {
                    lease.doubt("lost while several shards answered");
                    return Err(lost_shard(&error));
                }
            };
            let verdict = source.replies.on_frame(kind, &body).map_err(|desync| {
                lease.doubt("desync");
                unexpected(&desync.to_string())
            })?;
            match verdict {
                Verdict::Swallow => {}
                Verdict::Ready { status, hidden } => {
                    lease.status = status;
                    if !hidden && source.replies.is_empty() {
                        lease.busy = false;
                        source.done = true;
                        return Ok((kind, body));
                    }
                }
                Verdict::HiddenFailed => {
                    lease.doubt("a statement of weir's own failed");
                    let code = report_field(&body, b'C').unwrap_or_default();
                    // Then it was not this session's state: the server is going.
                    return Err(if code.starts_with(b"57P") {
                        lost_shard(&std::io::Error::other("the server is shutting down"))
                    } else {
                        unexpected("a shard could not take over this session's state")
                    });
                }
                Verdict::Failed { .. } => {
                    source.failed = Some(body.clone());
                    return Ok((kind, body));
                }
                Verdict::Forward | Verdict::Described | Verdict::CopyIn => {
                    if kind == tag::COMMAND_COMPLETE {
                        source.command = Some(Bytes::copy_from_slice(command_tag(&body)));
                    }
                    return Ok((kind, body));
                }
            }
        }
    }

    pub async fn drain(&mut self, sources: &mut [Source]) -> Result<(), Failure> {
        for source in sources.iter_mut() {
            while !source.done {
                self.next_frame(source).await?;
            }
        }
        if !self.cancel.slot.end() && !self.cancel.slot.settle().await {
            for source in sources.iter() {
                self.held[source.index].lease.doubt("a cancel request was still on its way");
            }
        }
        Ok(())
    }

    /// A failed part fails the transaction; nothing else changes it here.
    pub fn follow_all(&mut self, sources: &[Source]) {
        let failed = sources.iter().any(|source| self.held[source.index].lease.status == Status::Failed);
        if failed && let Some(txn) = &mut self.txn {
            txn.failed = true;
        }
    }
}

/// A command tag with another row count.
pub fn with_rows(command: &[u8], rows: u64) -> Bytes {
    let text = String::from_utf8_lossy(command);
    let word = text.rsplit_once(' ').map_or(&*text, |(word, _)| word);
    Bytes::from(format!("{word} {rows}"))
}
