//! Rows that are read first and then written where they belong: INSERT … SELECT over shards, and UPDATE of shard keys, whose rows
//! are read by deleting them.
//!
//! Invariant: the whole statement is parsed by a server first, so that what Postgres has to say of it is said by Postgres; the query
//! is read to its end before anything is written, so that it sees nothing of what the statement writes; and reading and writing are
//! one transaction. Rows are held within the merge's limit. Each shard is sent one INSERT, as Postgres would have run one.
//! Non-goals: planning, and how the form of the INSERT is made ([`weir_core::plan::Carry`]).

use std::collections::HashSet;

use bytes::{Bytes, BytesMut};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::plan::{Access, Carry, Drawing, Filling, Form, Plan, RouteReason, Target, Template, Values, Written};
use weir_core::plan::{CarriedKey, TEXT, put_value};
use weir_core::topology::Key;
use weir_wire::backend::{command_rows, tag};
use weir_wire::frame;
use weir_wire::frontend::Bind;
use weir_wire::row;

use super::fan::rows::{Gathered, Part, Whole};
use super::fan::{Form as Reply, Question, with_rows};
use crate::exec::failures::unexpected;
use crate::front::names::bind;
use crate::front::session::{Failure, Session, malformed};
use crate::front::simple::Place;
use crate::statements::{Prepared, Shape, relex};

/// What the text of values must be able to rely on. Abbreviations of time zones are not unique, few digits of a float are not its
/// value, and weir looks for quotes in UTF-8.
const SETTINGS: &str = "SELECT pg_catalog.current_setting('client_encoding') = 'UTF8' \
    AND pg_catalog.current_setting('DateStyle') LIKE 'ISO%' AND pg_catalog.current_setting('extra_float_digits')::int >= 1";

/// A statement whose rows are carried, as the client sent it.
#[derive(Clone, Copy)]
pub struct Carried<'a> {
    /// As a text or as a portal.
    pub question: Question<'a>,
    pub plan: &'a Plan,
    pub carry: &'a Carry,
    pub shape: &'a Shape,
    /// Send the RowDescription.
    pub description: bool,
}

impl<'a> Carried<'a> {
    fn sql(&self) -> &'a str {
        self.question.sql()
    }

    /// A statement of the extended protocol with its Bind message.
    fn portal(&self) -> Option<(&'a Prepared, &'a Bytes)> {
        match self.question {
            Question::Portal { prepared, bind, .. } => Some((prepared, bind)),
            _ => None,
        }
    }
}

/// Rows as they were read.
struct Load {
    types: Vec<u32>,
    /// DataRow bodies.
    rows: Vec<Bytes>,
}

/// The statement that writes them.
struct Writing {
    form: Form,
    plan: Plan,
    /// Numbers from sequences for each row, behind what was read.
    numbers: Vec<i64>,
    per_row: usize,
    written: Vec<Written>,
}

impl Writing {
    /// The INSERT with those of the rows that are wanted, and `more` behind it.
    fn text(&self, load: &Load, wanted: impl Fn(usize) -> bool, more: &str) -> Result<String, Failure> {
        let mut text = self.form.head.clone();
        let mut separator = "(";
        for (index, body) in load.rows.iter().enumerate().filter(|(index, _)| wanted(*index)) {
            text.push_str(separator);
            separator = ", (";
            let values = row::values(body).map_err(|_| unexpected("a malformed DataRow"))?;
            for (column, (value, written)) in values.iter().zip(&self.written).enumerate() {
                if column > 0 {
                    text.push_str(", ");
                }
                let value = value.map(std::str::from_utf8).transpose().map_err(|_| settings_unfit())?;
                put_value(&mut text, value, *written);
            }
            for number in &self.numbers[index * self.per_row..(index + 1) * self.per_row] {
                text.push_str(", ");
                text.push_str(&number.to_string());
                text.push_str("::bigint");
            }
            text.push(')');
        }
        text.push_str(&self.form.tail);
        text.push_str(more);
        Ok(text)
    }
}

impl Session {
    /// Runs it. Outside a transaction it makes its own, so that it commits everywhere or nowhere.
    pub async fn carry_rows(&mut self, carried: Carried<'_>) -> Result<(), Failure> {
        let _turn = self.unique_turn(carried.plan).await?;
        let home = self.view().topology.home;
        match carried.portal() {
            None => self.check_whole(home, carried.sql()).await?,
            Some((prepared, _)) => {
                self.parameter_types(home, prepared).await?;
            }
        }
        let own = self.txn.is_none();
        if own {
            self.begin_implicit();
        }
        let result = self.read_and_write(carried).await;
        self.conclude_write(own, carried.plan, result).await
    }

    async fn read_and_write(&mut self, carried: Carried<'_>) -> Result<Bytes, Failure> {
        let home = self.view().topology.home;
        let settings = self.rows_of(home, SETTINGS).await?;
        let fits = settings.rows.first().and_then(|row| row::values(row).ok()?.first().copied().flatten());
        if fits != Some(b"t") {
            return Err(settings_unfit().into());
        }
        let mut load = match carried.portal() {
            None => self.read_text(carried).await?,
            Some(portal) => self.read_portal(carried, portal).await?,
        };
        // The key that a row had is not written.
        load.types.truncate(load.types.len().saturating_sub(carried.carry.hidden()));
        let command = self.write_load(carried, load).await?;
        Ok(match carried.carry.word() {
            Some(word) => format!("{word} {}", command_rows(&command).unwrap_or(0)).into(),
            None => command,
        })
    }

    fn query_of(&mut self, carried: Carried<'_>) -> String {
        relex(carried.sql(), &mut self.scratch);
        carried.carry.query(carried.sql(), &self.scratch.tokens)
    }

    async fn read_text(&mut self, carried: Carried<'_>) -> Result<Load, Failure> {
        let sql = self.query_of(carried);
        let view = self.view();
        let understood = self.db.statements.understand(&sql, &view, &mut self.scratch);
        if understood.template.filling().is_some() {
            return Err(refusal_of(carried.plan).into());
        }
        let literals = std::mem::take(&mut self.scratch.normal.literals);
        let values = Values { params: &[], sql: &sql, literals: &literals };
        let plan = self.db.plan_of(&understood.template, &values, &view.topology)?;
        let rewritten = self.text_to_merge(&sql, &understood.template, &plan);
        let questions = [Question::Text(&sql), Question::Text(rewritten.as_deref().unwrap_or(&sql))];
        self.read_planned(questions, (&understood.template, &understood.shape), &plan).await
    }

    async fn read_portal(
        &mut self,
        carried: Carried<'_>,
        (prepared, bind_body): (&Prepared, &Bytes),
    ) -> Result<Load, Failure> {
        let sql = self.query_of(carried);
        let view = self.view();
        let types = self.parameter_types(view.topology.home, prepared).await?;
        if types.chunks_exact(4).any(|oid| oid >= &FIRST_OWN_OID.to_be_bytes()[..]) {
            return Err(own_parameter().into());
        }
        let query = self.prepare((&Bytes::from(sql), &types), &view);
        if query.template.filling().is_some() {
            return Err(refusal_of(carried.plan).into());
        }
        let body = Bind::read(bind_body).map_err(|_| malformed())?.as_text().freeze();
        let plan = bind(&self.db, &query, &body, &view.topology)?;
        let questions = [false, true].map(|merged| Question::Portal { prepared: &query, bind: &body, merged });
        self.read_planned(questions, (&query.template, &query.shape), &plan).await
    }

    /// `questions`: as it is, and as shards are asked whose answers are merged.
    async fn read_planned(
        &mut self,
        [plain, merged]: [Question<'_>; 2],
        (template, shape): (&Template, &Shape),
        plan: &Plan,
    ) -> Result<Load, Failure> {
        let bytes_max = self.app.config().limits.merge_bytes_max;
        let reply = Reply { description: true, columns: template.merged_columns() };
        let question = if plan.merge.is_some() { merged } else { plain };
        let place = self.place(&self.view().topology, plan, || 0);
        self.client.keep(bytes_max);
        let mut done = match &place {
            Place::One(shard) => {
                let done = self.read_one(*shard, question, plan).await;
                self.kept_by(*shard, shape);
                done
            }
            Place::Several(shards) => {
                let asked = (question, plain.sql(), template);
                Box::pin(self.spread_guarded(shards, asked, shape, plan, reply)).await
            }
            Place::Engine => Box::pin(self.engine_rows(plain, plan)).await,
        };
        let mut kept = self.client.take_kept();
        // A merge may turn out not to be possible before it has given a row.
        if let Err(Failure::Refused(refusal)) = &done
            && kept.as_ref().is_some_and(BytesMut::is_empty)
            && let Ok(plan) = self.db.plan_refused(template, refusal.clone())
        {
            self.client.keep(bytes_max);
            done = Box::pin(self.engine_rows(plain, &plan)).await;
            kept = self.client.take_kept();
        }
        self.load(kept, done)
    }

    /// A query that one shard answers.
    async fn read_one(&mut self, shard: ShardId, question: Question<'_>, plan: &Plan) -> Result<(), Failure> {
        let mut sources = self.ask(&[shard], question).await?;
        if plan.access == Access::Write {
            self.note_write(sources[0].index, plan, false).await?;
        }
        self.pass(&mut sources, 0, true, true).await?;
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        match sources[0].failed.take() {
            Some(body) => Err(self.report(&body)),
            None => Ok(()),
        }
    }

    /// What the statement may have left behind on a shard keeps the session there.
    fn kept_by(&mut self, shard: ShardId, shape: &Shape) {
        if let Some(index) = self.held.iter().position(|held| held.shard == shard) {
            self.pin_for(index, shape);
        }
    }

    /// Asks one shard for rows that are weir's own business.
    async fn rows_of(&mut self, shard: ShardId, sql: &str) -> Result<Load, Failure> {
        self.client.keep(self.app.config().limits.merge_bytes_max);
        let done = self.read_one(shard, Question::Text(sql), &Plan::of_weir()).await;
        let kept = self.client.take_kept();
        self.load(kept, done)
    }

    /// Takes rows out of a reply; all else in it is the client's.
    fn load(&mut self, kept: Option<BytesMut>, done: Result<(), Failure>) -> Result<Load, Failure> {
        let bytes_max = self.app.config().limits.merge_bytes_max;
        let Some(kept) = kept else {
            return match done {
                Err(Failure::End(end)) => Err(end.into()),
                _ => Err(too_many_carried(bytes_max).into()),
            };
        };
        let kept = kept.freeze();
        let mut load = Load { types: Vec::new(), rows: Vec::new() };
        let mut at = 0;
        while let Ok(Some(next)) = frame::peek(&kept[at..], usize::MAX >> 1) {
            let body = at + frame::HEADER..at + next.raw.len();
            match next.tag {
                tag::DATA_ROW => load.rows.push(kept.slice(body)),
                tag::ROW_DESCRIPTION => {
                    let fields = row::fields(next.body).map_err(|_| unexpected("a malformed RowDescription"))?;
                    load.types = fields.iter().map(|field| field.type_oid).collect();
                }
                tag::COMMAND_COMPLETE => {}
                _ => self.client.out.extend_from_slice(next.raw),
            }
            at += next.raw.len();
        }
        done.map(|()| load)
    }

    async fn write_load(&mut self, carried: Carried<'_>, load: Load) -> Result<Bytes, Failure> {
        relex(carried.sql(), &mut self.scratch);
        let width = load.types.len();
        if load.rows.is_empty() {
            let nothing = format!("SELECT {} WHERE false", vec!["NULL"; width].join(", "));
            let text = carried.carry.with(carried.sql(), &self.scratch.tokens, &nothing);
            let home = self.view().topology.home;
            return self.write_alike(&[home], carried, &Plan::of_weir(), &text).await;
        }
        if width == 0 {
            return Err(refusal_of(carried.plan).into());
        }
        let row = format!("VALUES ({})", vec!["NULL"; width].join(", "));
        let text = carried.carry.with(carried.sql(), &self.scratch.tokens, &row);
        let writing = self.writing(carried, text, &load).await?;
        match writing.plan.target.clone() {
            Target::Many(shards) => self.write_apart(&shards, carried, &writing, &load).await,
            Target::All => {
                let text = writing.text(&load, |_| true, "")?;
                let shards = self.view().topology.active().to_vec();
                self.write_alike(&shards, carried, &writing.plan, &text).await
            }
            target => {
                let view = self.view();
                let plan = Plan { target, ..writing.plan.clone() };
                let Place::One(shard) = self.place(&view.topology, &plan, || 0) else {
                    return Err(refusal_of(carried.plan).into());
                };
                let text = writing.text(&load, |_| true, "")?;
                self.write_alike(&[shard], carried, &writing.plan, &text).await
            }
        }
    }

    /// How the rows are written. `text`: the form.
    async fn writing(&mut self, carried: Carried<'_>, text: String, load: &Load) -> Result<Writing, Failure> {
        let written = carried.carry.written(&load.types)?;
        let view = self.view();
        let mut understood = self.db.statements.understand(&text, &view, &mut self.scratch);
        let (mut text, mut numbers, mut per_row) = (text, Vec::new(), 0);
        if let Some(filling) = understood.template.filling().cloned() {
            if !filling.drawings.iter().all(|drawing| matches!(drawing, Drawing::Next(_))) {
                return Err(refusal_of(carried.plan).into());
            }
            per_row = filling.drawings.len();
            let drawings = (0..load.rows.len()).flat_map(|_| filling.drawings.iter().cloned()).collect();
            let drawn = self.draw(&Filling { drawings, edits: Vec::new() }).await?;
            numbers = drawn.ok_or_else(|| refusal_of(carried.plan))?;
            relex(&text, &mut self.scratch);
            text = filling.apply(&text, &self.scratch.tokens, |number| format!("{}::bigint", numbers[number]));
            understood = self.db.statements.understand(&text, &view, &mut self.scratch);
        }
        let form = Form::of(&text).ok_or_else(|| refusal_of(carried.plan))?;
        let keys = match understood.template.carried_key() {
            Some(key) => {
                let position = form.position(&key.column, carried.carry).ok_or_else(|| refusal_of(carried.plan))?;
                let keys = keys(key, position, load, (&numbers, per_row))?;
                if carried.carry.may_meet() {
                    none_meets(key, &keys, load)?;
                }
                keys
            }
            None => Vec::new(),
        };
        let plan = understood.template.bind_rows(&keys, &view.topology)?;
        self.note_draws(carried.shape, &plan);
        Ok(Writing { form, plan, numbers, per_row, written })
    }

    /// Each shard its own rows.
    async fn write_apart(
        &mut self,
        shards: &[ShardId],
        carried: Carried<'_>,
        writing: &Writing,
        load: &Load,
    ) -> Result<Bytes, Failure> {
        let Some(dealt) = &writing.plan.dealt else { return Err(refusal_of(carried.plan).into()) };
        let Carried { question, description, .. } = carried;
        let whole = Whole { question, plan: &writing.plan, dealt, description };
        let tracked = dealt.deal.tracked();
        let mut gathered = Gathered::default();
        for &shard in shards {
            let text = writing.text(load, |row| dealt.owners[row] == shard, &tracked)?;
            let types = match carried.portal() {
                Some((prepared, _)) => self.parameter_types(shard, prepared).await?,
                None => Bytes::new(),
            };
            self.deal_to(shard, whole, &Part { text, types: &types }, &mut gathered).await?;
        }
        self.put_returned(whole, &gathered).await?;
        Ok(with_rows(&gathered.command, gathered.inserted))
    }

    /// The same on every shard, one after the other; the first one's answer stands for all.
    async fn write_alike(
        &mut self,
        shards: &[ShardId],
        carried: Carried<'_>,
        plan: &Plan,
        text: &str,
    ) -> Result<Bytes, Failure> {
        let mut command = Bytes::new();
        for (at, &shard) in shards.iter().enumerate() {
            let types = match carried.portal() {
                Some((prepared, _)) => self.parameter_types(shard, prepared).await?,
                None => Bytes::new(),
            };
            let question = match carried.portal() {
                None => Question::Text(text),
                Some((_, bind)) => Question::Once { sql: text, types: &types, bind, hidden: 0 },
            };
            let mut sources = self.ask(&[shard], question).await?;
            self.note_write(sources[0].index, plan, false).await?;
            self.pass(&mut sources, 0, at == 0, carried.description && at == 0).await?;
            self.drain(&mut sources).await?;
            self.follow_all(&sources);
            self.kept_by(shard, carried.shape);
            if let Some(body) = sources[0].failed.take() {
                return Err(self.report(&body));
            }
            if at == 0 {
                command = sources[0].command.take().unwrap_or_default();
            }
        }
        Ok(command)
    }
}

/// OIDs below are the same on every server (FirstNormalObjectId in src/include/access/transam.h).
const FIRST_OWN_OID: u32 = 16_384;

/// The keys of the rows: read ones, or numbers that were drawn for them.
fn keys<'l>(
    key: &CarriedKey,
    position: usize,
    load: &'l Load,
    (numbers, per_row): (&[i64], usize),
) -> Result<Vec<Option<Key<'l>>>, Failure> {
    if let Some(drawn) = position.checked_sub(load.types.len()) {
        let own = (0..load.rows.len()).map(|row| numbers.get(row * per_row + drawn).copied());
        return Ok(own.map(|number| number.map(Key::Int)).collect());
    }
    let from = load.types[position];
    key.check(from)?;
    let one = |body: &'l Bytes| {
        let values = row::values(body).map_err(|_| unexpected("a malformed DataRow"))?;
        Ok(values.get(position).copied().flatten().map(|value| key.read(value, from)).transpose()?)
    };
    load.rows.iter().map(one).collect()
}

/// Postgres looks at unique values row by row. Where a row takes the key that another one of the statement gives up, whether that
/// fails depends on their order.
fn none_meets(key: &CarriedKey, keys: &[Option<Key<'_>>], load: &Load) -> Result<(), Failure> {
    let mut before = Vec::with_capacity(keys.len());
    for body in &load.rows {
        let values = row::values(body).map_err(|_| unexpected("a malformed DataRow"))?;
        before.push(values.last().copied().flatten().map(|value| key.read(value, TEXT)).transpose()?);
    }
    let given_up: HashSet<&Key<'_>> = before.iter().flatten().collect();
    let meets = |(now, before): (&Option<Key<'_>>, &Option<Key<'_>>)| {
        now != before && now.as_ref().is_some_and(|now| given_up.contains(now))
    };
    if keys.iter().zip(&before).any(meets) { Err(key.meets().into()) } else { Ok(()) }
}

/// Why the statement was not planned as it is.
fn refusal_of(plan: &Plan) -> UserError {
    match &plan.reason {
        RouteReason::Carried { refusal } => UserError::clone(refusal),
        reason => {
            UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "this statement cannot run across shards")
                .detail(reason.to_string())
        }
    }
}

fn too_many_carried(bytes_max: usize) -> UserError {
    UserError::new(Blame::Client, sqlstate::TOO_COMPLEX, "the rows of this statement are too many to be carried")
        .detail(format!(
            "They do not stay on the shards they are read from, and take more than {bytes_max} bytes (merge_bytes_max)."
        ))
        .hint("Write them in parts, for example by ranges of a key, or raise limits.merge_bytes_max.")
}

fn settings_unfit() -> UserError {
    UserError::new(
        Blame::Client,
        sqlstate::FEATURE_NOT_SUPPORTED,
        "the rows of this statement cannot be carried to another shard",
    )
    .detail("They are carried as text, which says all of a value only in some settings.")
    .hint("Set client_encoding to UTF8, DateStyle to ISO and extra_float_digits to 1.")
}

fn own_parameter() -> UserError {
    UserError::new(
        Blame::Client,
        sqlstate::FEATURE_NOT_SUPPORTED,
        "the rows of this statement cannot be carried to another shard",
    )
    .detail("It has a parameter of a type of your own, which has another number on each server.")
    .hint("Cast the parameter from text in the statement.")
}
