//! EXPLAIN of a statement on several shards: what weir does with it, then each shard's own plan.
//!
//! Invariant: one column and one set of rows, described as Postgres describes it. Non-goal: what weir would do with statements that
//! are not run (`ROUTE` in the console).

use bytes::{BufMut, Bytes, BytesMut};
use weir_core::id::ShardId;
use weir_core::plan::{ExplainFormat, Plan, Values, explain};
use weir_core::sql::class::{Class, classify};
use weir_wire::backend::tag;
use weir_wire::frame;
use weir_wire::row;

use super::failures::unexpected;
use super::fan::{Form, Question};
use crate::database::View;
use crate::front::names;
use crate::front::session::{Failure, Session};

impl Session {
    pub async fn explain_shards(
        &mut self,
        shards: &[ShardId],
        question: Question<'_>,
        (format, plan): (ExplainFormat, &Plan),
        form: Form,
    ) -> Result<(), Failure> {
        let mut sources = self.ask(shards, question).await?;
        let mut description = None;
        let mut told = Vec::with_capacity(shards.len());
        for source in &mut sources {
            let mut lines = Vec::new();
            while !source.done {
                let (kind, body) = self.next_frame(source).await?;
                match kind {
                    tag::ROW_DESCRIPTION => {
                        description.get_or_insert(body);
                    }
                    tag::DATA_ROW => {
                        let values = row::values(&body).map_err(|_| unexpected("a malformed DataRow"))?;
                        let line = values.first().copied().flatten().unwrap_or_default();
                        lines.push(String::from_utf8_lossy(line).into_owned());
                    }
                    tag::NOTICE => self.client.put_aside(kind, &body),
                    _ => {}
                }
            }
            told.push(lines);
        }
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        if let Some(body) = sources.iter_mut().find_map(|source| source.failed.take()) {
            return Err(self.report(&body));
        }
        if let Some(description) = description.filter(|_| form.description) {
            frame::put(&mut self.client.out, tag::ROW_DESCRIPTION, |out| out.extend_from_slice(&description));
        }
        let view = self.view();
        let facts = self.explained(question.plain(), plan);
        let name = |shard: &ShardId| view.topology.shards.get(usize::from(shard.0)).map_or("", |name| &**name);
        let told: Vec<(&str, Vec<String>)> = shards.iter().map(name).zip(told).collect();
        for line in format.join(&facts, &told) {
            put_row(&mut self.client.out, line.as_bytes());
        }
        self.put_tag("EXPLAIN");
        Ok(())
    }
}

impl Session {
    /// What weir would do with the statement inside an EXPLAIN whose plan is `outer`.
    fn explained(&mut self, question: Question<'_>, outer: &Plan) -> Vec<(String, String)> {
        let view = self.view();
        let sql = question.sql();
        let hint = self.hint_around(sql);
        let inner = match classify(sql, &self.scratch.tokens) {
            Class::Explain { inner, .. } => self.scratch.tokens.get(inner).map(|token| token.start as usize),
            _ => None,
        };
        let planned = inner.and_then(|start| self.plan_within(question, &sql[start..], &view));
        let plan = planned.as_ref().filter(|plan| plan.target == outer.target).unwrap_or(outer);
        let plan = Plan { cacheable: hint.cacheable(plan.cacheable), ..plan.clone() };
        let mut facts = explain(&plan, &view.topology);
        facts.extend(self.explain_level(&plan, hint, &view.topology));
        facts
    }

    /// The plan of a part of the question's text, as if it were asked alone. `None`: it is refused.
    fn plan_within(&mut self, question: Question<'_>, sql: &str, view: &View) -> Option<Plan> {
        if let Question::Portal { prepared, bind, .. } = question {
            let sql = Bytes::copy_from_slice(sql.as_bytes());
            let part = self.prepare((&sql, &prepared.types), view);
            return names::bind(&self.db, &part, bind, &view.topology).ok();
        }
        let part = self.db.statements.understand(sql, view, &mut self.scratch);
        let values = Values { params: &[], sql, literals: &self.scratch.normal.literals };
        self.db.plan_of(&part.template, &values, &view.topology).ok()
    }
}

/// A DataRow of one value.
fn put_row(out: &mut BytesMut, value: &[u8]) {
    frame::put(out, tag::DATA_ROW, |out| {
        out.put_u16(1);
        out.put_u32(value.len() as u32);
        out.extend_from_slice(value);
    });
}
