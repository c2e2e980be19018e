//! EXPLAIN of a statement on several shards: what weir does with it, then each shard's own plan.
//!
//! Invariant: one column and one set of rows, described as Postgres describes it. Non-goal: what weir would do with statements that
//! are not run (`ROUTE` in the console).

use bytes::{BufMut, BytesMut};
use weir_core::id::ShardId;
use weir_core::plan::{ExplainFormat, Plan};
use weir_wire::backend::tag;
use weir_wire::frame;
use weir_wire::row;

use super::failures::unexpected;
use super::fan::{Form, Question};
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
        let name = |shard: &ShardId| view.topology.shards.get(usize::from(shard.0)).map_or("", |name| &**name);
        let told: Vec<(&str, Vec<String>)> = shards.iter().map(name).zip(told).collect();
        for line in format.join(plan, &view.topology, &told) {
            put_row(&mut self.client.out, line.as_bytes());
        }
        self.put_tag("EXPLAIN");
        Ok(())
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
