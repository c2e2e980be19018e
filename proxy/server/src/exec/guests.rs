//! What shards with guests are asked instead of what all are asked: the same text, with the guests left out.
//!
//! Invariant: what is left out are the guests of the topology that the plan was bound to, whatever is in force by now; else a
//! row could be missing on the shard it came from and on the one it goes to. Non-goal: where in a text they are left out
//! ([`weir_core::plan::WithoutGuests`]).

use weir_core::error::UserError;
use weir_core::id::ShardId;
use weir_core::plan::{Plan, Template};

use super::fan::{Form, Question};
use crate::front::session::{Failure, Session};
use crate::statements::Shape;

/// A question with the texts of shards that are asked by another one.
pub struct Guarded<'a> {
    question: Question<'a>,
    texts: Vec<(ShardId, String)>,
    /// Columns that the texts have beyond those the client knows.
    hidden: usize,
}

impl<'a> Guarded<'a> {
    /// What all other shards are asked.
    pub fn question(&self) -> Question<'a> {
        self.question
    }

    pub fn of(&'a self, shard: ShardId) -> Question<'a> {
        let Some((_, sql)) = self.texts.iter().find(|(of, _)| *of == shard) else { return self.question };
        let hidden = self.hidden;
        match self.question {
            Question::Portal { prepared, bind, .. } => Question::Once { sql, types: &prepared.types, bind, hidden },
            Question::Once { types, bind, .. } => Question::Once { sql, types, bind, hidden },
            Question::Opened { prepared, bind, portal, .. } => {
                Question::Opened { prepared, bind, portal, sql: Some(sql) }
            }
            Question::Text(_) => Question::Text(sql),
            Question::Described(_) | Question::Guarded(_) => self.question,
        }
    }
}

impl Session {
    /// As [`Session::spread`], with guests left out. `sql`: the text that the template was made for.
    pub async fn spread_guarded(
        &mut self,
        shards: &[ShardId],
        (question, sql, template): (Question<'_>, &str, &Template),
        shape: &Shape,
        plan: &Plan,
        form: Form,
    ) -> Result<(), Failure> {
        let guarded = self.guarded(question, (sql, template), plan)?;
        let question = guarded.as_ref().map_or(question, Question::Guarded);
        self.spread(shards, question, shape, plan, form).await
    }

    /// The question for the shards of a plan, if some of them must be asked by a text of their own.
    pub fn guarded<'a>(
        &mut self,
        question: Question<'a>,
        (sql, template): (&str, &Template),
        plan: &Plan,
    ) -> Result<Option<Guarded<'a>>, UserError> {
        let Some(guests) = &plan.guests else { return Ok(None) };
        let view = self.view();
        let found = self.db.statements.without_guests(sql, template, &view, &mut self.scratch)?;
        if found.is_empty() {
            return Ok(None);
        }
        let merged = template.rewrite().filter(|_| plan.merge.is_some());
        let hidden = if merged.is_some() { template.hidden_columns() } else { 0 };
        let asked = (sql, self.scratch.tokens.as_slice());
        let texts = guests.iter().map(|(shard, foreign)| (*shard, found.text(asked, merged, foreign))).collect();
        Ok(Some(Guarded { question, texts, hidden }))
    }
}
