//! Filling a session's statements with numbers from sequences, and answering what it has drawn.
//!
//! Invariant: `currval()` and `lastval()` answer by what this session has drawn, as Postgres does, wherever the numbers came from: what weir drew
//! is known here, what a server drew the server knows, and the last of both counts for `lastval()`.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::plan::{Drawing, Filling, Plan, RouteReason, Sequence};
use weir_core::sql::lex::TokenKind;
use weir_core::topology::catalog::RelationName;
use weir_wire::frontend::Bind;

use super::batch::Op;
use super::session::{Session, malformed};
use crate::database::View;
use crate::statements::{Prepared, Shape, Understood, relex};

/// What weir has drawn for one session.
#[derive(Default)]
pub struct Drawn {
    current: HashMap<RelationName, i64>,
    /// The last number, unless a server has drawn since.
    last: Option<i64>,
}

impl Session {
    /// The values of a filling. `None`: the servers know the answer.
    pub async fn draw(&mut self, filling: &Filling) -> Result<Option<Vec<i64>>, UserError> {
        if filling.drawings.contains(&Drawing::Last) && self.drawn.as_ref().is_none_or(|drawn| drawn.last.is_none()) {
            return Ok(None);
        }
        let mut wanted: Vec<(&Sequence, usize)> = Vec::new();
        for drawing in &filling.drawings {
            let Drawing::Next(sequence) = drawing else { continue };
            match wanted.iter_mut().find(|(known, _)| known.name == sequence.name) {
                Some((_, count)) => *count += 1,
                None => wanted.push((sequence, 1)),
            }
        }
        let block = self.app.config().limits.sequence_block;
        let mut numbers = HashMap::new();
        for (sequence, count) in wanted {
            let drawn = self.db.sequences.draw(sequence, count, block).await?;
            numbers.insert(&sequence.name, drawn.into_iter());
        }
        let mut values = Vec::with_capacity(filling.drawings.len());
        for drawing in &filling.drawings {
            if let Drawing::Set { sequence, value, drawn } = drawing {
                self.db.sequences.set(sequence, *value, *drawn).await?;
            }
            if let Drawing::Seen(sequence) = drawing {
                values.push(self.db.sequences.next(sequence).await?);
                continue;
            }
            let state = self.drawn.get_or_insert_default();
            values.push(match drawing {
                Drawing::Next(sequence) => {
                    let next = numbers.get_mut(&sequence.name).and_then(Iterator::next);
                    let next = next.ok_or_else(|| not_yet(&sequence.name.1))?;
                    state.current.insert(sequence.name.clone(), next);
                    state.last = Some(next);
                    next
                }
                Drawing::Current(sequence) => {
                    *state.current.get(&sequence.name).ok_or_else(|| not_yet(&sequence.name.1))?
                }
                Drawing::Last => state.last.unwrap_or_default(),
                Drawing::Seen(sequence) => sequence.rule.start,
                Drawing::Set { sequence, value, drawn } => {
                    if *drawn {
                        state.current.insert(sequence.name.clone(), *value);
                    }
                    *value
                }
            });
        }
        Ok(Some(values))
    }

    /// The text with its values; `None`: it stays as it is.
    pub async fn filled_text(
        &mut self,
        sql: &str,
        filling: &Arc<Filling>,
    ) -> Result<Option<(String, Understood)>, UserError> {
        let Some(values) = self.draw(filling).await? else { return Ok(None) };
        relex(sql, &mut self.scratch);
        let text = filling.apply(sql, &self.scratch.tokens, |number| format!("{}::bigint", values[number]));
        let view = self.view();
        let understood = self.db.statements.understand(&text, &view, &mut self.scratch);
        Ok(Some((text, understood)))
    }

    /// A Bind with the values its statement needs beside the client's; what the statement is then is left in `filled`.
    pub async fn filled_bind(&mut self, op: Op, view: &View) -> Result<Op, UserError> {
        let Op::Bind { portal, statement, body } = op else { return Ok(op) };
        let op = |body| Op::Bind { portal, statement: statement.clone(), body };
        let failed = self.txn.as_ref().is_some_and(|txn| txn.failed);
        // What is wrong with the name is said where it is looked up for good.
        let Ok(prepared) = self.current(&statement, view) else { return Ok(op(body)) };
        let Some(filling) = prepared.template.filling().filter(|_| !failed) else { return Ok(op(body)) };
        let bind = Bind::read(&body).map_err(|_| malformed())?;
        if bind.parameters + filling.drawings.len() > usize::from(u16::MAX) {
            return Err(too_many_parameters(filling.drawings.len()));
        }
        let Some(values) = self.draw(filling).await? else { return Ok(op(body)) };
        let filled = self.filled_statement(&prepared, filling, view);
        let body = bind.with_numbers(&values).freeze();
        self.not_gone(&filled, &body, view)?;
        self.filled = Some(filled);
        Ok(op(body))
    }

    /// The statement with a further parameter for each value, made once.
    pub fn filled_statement(&mut self, prepared: &Prepared, filling: &Filling, view: &View) -> Arc<Prepared> {
        if let Some(filled) = prepared.filled.get() {
            return Arc::clone(filled);
        }
        let sql = std::str::from_utf8(&prepared.sql).unwrap_or_default();
        relex(sql, &mut self.scratch);
        let own = self.scratch.tokens.iter().map(|token| match token.kind {
            TokenKind::Param(number) => usize::from(number),
            _ => 0,
        });
        let own = own.max().unwrap_or(0);
        let text = filling.apply(sql, &self.scratch.tokens, |number| format!("${}::bigint", own + 1 + number));
        let filled = self.prepare((&Bytes::from(text), &prepared.types), view);
        Arc::clone(prepared.filled.get_or_init(|| filled))
    }

    /// Before a statement runs as it is: a server may draw for it, and then knows what was drawn last.
    pub fn note_draws(&mut self, shape: &Shape, plan: &Plan) {
        if let Some(drawn) = &mut self.drawn
            && (shape.effects.draws || plan.reason == RouteReason::GlobalTable && shape.draws())
        {
            drawn.last = None;
        }
    }
}

/// As currval_oid says it (src/backend/commands/sequence.c).
fn not_yet(sequence: &str) -> UserError {
    let message = format!("currval of sequence \"{sequence}\" is not yet defined in this session");
    UserError::new(Blame::Client, "55000", message)
}

fn too_many_parameters(numbers: usize) -> UserError {
    UserError::new(Blame::Client, sqlstate::TOO_COMPLEX, "too many parameters")
        .detail(format!("weir adds {numbers} numbers from sequences as parameters, and a statement has at most 65535."))
        .hint("Insert fewer rows at a time.")
}
