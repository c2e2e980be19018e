//! Expressions over aggregates of groups that span shards: their aggregates become hidden columns, and the merge computes them.
//!
//! Invariant: a shard never computes such an expression or HAVING itself, since it has only a part of the group.

use std::ops::Range;

use super::Builder;
use crate::plan::formula::{Blueprint, call};
use crate::plan::rewrite::{Edit, Piece};
use crate::sql::facts::{Formula, ItemKind};

impl Builder<'_> {
    /// Hides what the formula of a visible column is made of. The shards name and type the column without computing it,
    /// since what divides by a part's sum may fail where the whole does not.
    pub(super) fn compute_item(&mut self, index: usize, formula: &Formula) -> Result<Edit, String> {
        let visible = &self.visible[index];
        let (Some(tokens), false) = (visible.tokens.clone(), visible.unsure) else {
            return Err("an aggregate stands inside an expression whose name weir cannot tell".into());
        };
        let aliased = self.shape.items.get(self.item_of(index)).is_some_and(|item| item.aliased);
        let name = visible.name.unwrap_or("?column?").replace('"', "\"\"");
        if self.has_param(&tokens) {
            return Err("an expression over aggregates has a parameter in it".into());
        }
        let mut rest = tokens.clone();
        let blueprint = self.blueprint(formula, &mut rest)?;
        self.computed.push((index, blueprint));
        let end = if aliased { " END".to_owned() } else { format!(" END AS \"{name}\"") };
        let pieces =
            vec![Piece::Text("CASE WHEN false THEN ".into()), Piece::Tokens(tokens.clone()), Piece::Text(end.into())];
        Ok(Edit { range: tokens, pieces })
    }

    /// The select item a visible column is.
    fn item_of(&self, index: usize) -> usize {
        let mut before = 0;
        for (at, item) in self.shape.items.iter().enumerate() {
            before += match &item.kind {
                ItemKind::Wildcard(columns) => columns.as_ref().map_or(0, Vec::len),
                ItemKind::Expression(_) => 1,
            };
            if index < before {
                return at;
            }
        }
        usize::MAX
    }

    /// HAVING is applied to whole groups; the shards do not see it.
    pub(super) fn fold_having(&mut self) -> Result<Option<Edit>, String> {
        if !self.shape.having {
            return Ok(None);
        }
        let (Some(formula), Some(whole)) = (&self.shape.having_formula, self.text.clauses.having.clone()) else {
            return Err("HAVING needs whole groups, and they span shards".into());
        };
        if self.has_param(&whole) {
            return Err("HAVING has a parameter in it, and its groups span shards".into());
        }
        let mut rest = whole.clone();
        self.having = Some(self.blueprint(formula, &mut rest)?);
        Ok(Some(Edit { range: whole, pieces: Vec::new() }))
    }

    /// `rest`: the tokens in which the formula's next aggregate is to be found.
    fn blueprint(&mut self, formula: &Formula, rest: &mut Range<usize>) -> Result<Blueprint, String> {
        Ok(match formula {
            Formula::Constant(term) => Blueprint::Constant(term.clone()),
            Formula::Apply(operation, parts) => {
                let parts = parts.iter().map(|part| self.blueprint(part, rest)).collect::<Result<_, _>>()?;
                Blueprint::Apply(*operation, parts)
            }
            Formula::Column(column) => {
                let key = self.keys.iter().find(|(_, key, _)| {
                    key.column.as_ref().is_some_and(|key| key.owner == column.owner && key.name == column.name)
                });
                let key = key.ok_or("an expression over aggregates has a column in it that is no group key")?;
                Blueprint::Column(key.0)
            }
            Formula::Aggregate(aggregate) => {
                let found = Some(&aggregate.name).filter(|_| aggregate.plain_name);
                let tokens = found
                    .and_then(|name| call(self.text.sql, self.text.tokens, rest, name))
                    .ok_or("weir cannot tell the aggregates of an expression apart")?;
                rest.start = tokens.end;
                let column = self.hide(vec![Piece::Tokens(tokens.clone())]);
                self.fold(column, aggregate, &tokens)?;
                Blueprint::Column(column)
            }
        })
    }
}
