//! Spreading a SELECT over shards: what each shard is sent, and how its rows are joined, so that the result is provably the
//! one a single Postgres would give. Everything else is refused with the reason.
//!
//! Two modes. *Plain*: every result row comes from one shard (no aggregates, or groups that hold the shard key), so shards
//! sort and limit themselves and rows are merged. *Folded*: groups span shards; shards send partial aggregates, and order,
//! limit and offset are applied after folding.

mod compute;

use std::ops::Range;

use super::clauses::{Clauses, Listed, item_expression, order_expression, same_tokens};
use super::formula::{Blueprint, closed};
use super::rewrite::{Edit, Piece, Rewrite};
use crate::merge::{Fold, FoldKind, GroupSpec, OrderKey};
use crate::sql::facts::{Aggregate, ColumnFacts, Expression, Formula, ItemKind, Limit, Literal, SelectShape, Term};
use crate::sql::lex::{Token, TokenKind};

/// A merge whose limits are still terms.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadScatter {
    pub rewrite: Rewrite,
    pub hidden: usize,
    /// Columns of a shard's row, where the merge depends on their number.
    pub columns: Option<usize>,
    pub group: Option<GroupSpec>,
    /// Columns that are computed from folded ones, and HAVING.
    pub computed: Vec<(usize, Blueprint)>,
    pub having: Option<Blueprint>,
    pub distinct: bool,
    /// DISTINCT ON: the columns of which only the first row of equal ones is shown; a prefix of the order.
    pub distinct_on: Vec<usize>,
    pub order: Vec<OrderKey>,
    pub limit: Option<Term>,
    pub offset: Option<Term>,
    /// Rows that sort like the last one of the limit are returned too.
    pub ties: bool,
    /// Did the comparison of expressions look at literals of the select list?
    pub compared_literals: bool,
}

impl ReadScatter {
    /// Are the shards' rows, asked with the text as it is, the rows of the answer in some order?
    pub fn concatenates(&self) -> bool {
        self.rewrite.is_empty()
            && self.hidden == 0
            && self.group.is_none()
            && self.computed.is_empty()
            && !self.ties
            && !self.distinct
            && self.order.is_empty()
            && self.limit.is_none()
            && self.offset.is_none()
    }
}

/// The text a merge is planned for.
#[derive(Clone, Copy)]
pub struct Text<'t> {
    pub sql: &'t str,
    pub tokens: &'t [Token],
    pub clauses: &'t Clauses,
}

/// A column of the shards' rows.
struct Visible<'s> {
    name: Option<&'s str>,
    /// The name is not known, so that it may be any.
    unsure: bool,
    column: Option<&'s ColumnFacts>,
    expression: Option<&'s Expression>,
    tokens: Option<Range<usize>>,
}

struct Builder<'s> {
    shape: &'s SelectShape,
    text: Text<'s>,
    visible: Vec<Visible<'s>>,
    /// All columns of the select list are known.
    complete: bool,
    hidden: Vec<Vec<Piece>>,
    /// Group keys by column, and which expression each is.
    keys: Vec<(usize, &'s Expression, Option<Range<usize>>)>,
    folds: Vec<Fold>,
    computed: Vec<(usize, Blueprint)>,
    having: Option<Blueprint>,
    compared: bool,
}

/// Plans the merge; `Err` says why it is not possible.
pub fn read_scatter(shape: &SelectShape, text: Text<'_>) -> Result<ReadScatter, String> {
    check_counts(shape, text.clauses)?;
    let everything = shape.items.iter().filter_map(|item| match &item.kind {
        ItemKind::Expression(expression) => Some(expression),
        ItemKind::Wildcard(_) => None,
    });
    let everything: Vec<&Expression> =
        everything.chain(&shape.group).chain(shape.order.iter().map(|order| &order.expression)).collect();
    if everything.iter().any(|expression| expression.has_window && !expression.windows_stay) {
        return Err("a window function looks at rows of all shards".into());
    }
    let windows = everything.iter().any(|expression| expression.has_window);
    let aggregated = everything.iter().any(|expression| expression.has_aggregate);
    let mut builder = Builder::new(shape, text);
    let grouped = aggregated || !shape.group.is_empty() || shape.having;
    let folded = grouped && !builder.groups_stay()?;
    if folded && (windows || shape.distinct_on > 0) {
        return Err("a window function or DISTINCT ON needs whole groups, and they span shards".into());
    }
    if folded { builder.folded() } else { builder.plain() }
}

/// The tokens and the parser must agree on what the clauses are.
fn check_counts(shape: &SelectShape, clauses: &Clauses) -> Result<(), String> {
    let listed = |clause: &Option<Listed>| clause.as_ref().map_or(0, |clause| clause.items.len());
    let agrees = clauses.items.len() == shape.items.len()
        && listed(&clauses.group) == shape.group.len()
        && listed(&clauses.order) == shape.order.len()
        && (shape.limit == Limit::None || clauses.limit.is_some())
        && clauses.offset.is_some() == (shape.offset != Limit::None);
    if !agrees {
        return Err("weir cannot tell its clauses apart".into());
    }
    if shape.limit == Limit::Computed || shape.offset == Limit::Computed {
        return Err("its LIMIT or OFFSET is an expression".into());
    }
    if shape.limit == Limit::None && clauses.limit.is_some() && clauses.offset.is_some() {
        return Err("it has LIMIT ALL together with OFFSET".into());
    }
    Ok(())
}

impl<'s> Builder<'s> {
    fn new(shape: &'s SelectShape, text: Text<'s>) -> Self {
        let mut visible = Vec::new();
        let mut complete = true;
        for (item, tokens) in shape.items.iter().zip(&text.clauses.items) {
            match &item.kind {
                ItemKind::Wildcard(Some(columns)) => visible.extend(columns.iter().map(|wildcard| Visible {
                    name: Some(&wildcard.name),
                    unsure: false,
                    column: wildcard.column.as_ref(),
                    expression: None,
                    tokens: None,
                })),
                ItemKind::Wildcard(None) => complete = false,
                ItemKind::Expression(expression) => visible.push(Visible {
                    name: item.name.as_deref(),
                    unsure: item.name_unsure,
                    column: expression.column.as_ref(),
                    expression: Some(expression),
                    tokens: Some(item_expression(text.sql, text.tokens, tokens, item.aliased)),
                }),
            }
        }
        Builder {
            shape,
            text,
            visible,
            complete,
            hidden: Vec::new(),
            keys: Vec::new(),
            folds: Vec::new(),
            computed: Vec::new(),
            having: None,
            compared: false,
        }
    }

    fn width(&self) -> usize {
        self.visible.len() + self.hidden.len()
    }

    /// Adds a hidden column; returns its position.
    fn hide(&mut self, pieces: Vec<Piece>) -> usize {
        self.hidden.push(pieces);
        self.width() - 1
    }

    /// The column an ordinal (`ORDER BY 2`) stands for; `None`: the expression is no ordinal.
    fn ordinal(&self, expression: &Expression) -> Result<Option<usize>, String> {
        let Some(value) = &expression.value else { return Ok(None) };
        let number = match value {
            Term::Literal(Literal::Number(text)) => text.parse::<usize>().ok(),
            _ => None,
        };
        match number {
            Some(number) if (1..=self.visible.len()).contains(&number) && self.complete => Ok(Some(number - 1)),
            _ => Err("it orders or groups by a constant".into()),
        }
    }

    /// The select-list column that is this expression, by column or by spelling.
    fn same_item(&mut self, expression: &Expression, tokens: &Range<usize>) -> Option<usize> {
        if let Some(column) = &expression.column {
            return self.visible.iter().position(|visible| {
                visible.column.is_some_and(|other| other.owner == column.owner && other.name == column.name)
            });
        }
        self.compared = true;
        self.visible.iter().position(|visible| {
            visible.tokens.as_ref().is_some_and(|other| same_tokens(self.text.sql, self.text.tokens, other, tokens))
        })
    }

    /// Does a grouping expression hold the shard key, so that no group spans shards?
    fn groups_stay(&mut self) -> Result<bool, String> {
        let shape = self.shape;
        let Some(clause) = &self.text.clauses.group else { return Ok(false) };
        let mut stay = false;
        for (expression, tokens) in shape.group.iter().zip(&clause.items) {
            if let Some(index) = self.ordinal(expression)? {
                let visible = &self.visible[index];
                stay |= visible.column.is_some_and(|column| column.is_key);
                self.keys.push((index, visible.expression.unwrap_or(expression), visible.tokens.clone()));
                continue;
            }
            // In GROUP BY a bare name is a column first, an output name second.
            if expression.column.is_none()
                && let Some(name) = &expression.bare_name
            {
                if !shape.names_complete {
                    return Err(format!("weir cannot tell what \"{name}\" in GROUP BY is"));
                }
                let Some(index) = self.named(name)? else { return Err(format!("\"{name}\" in GROUP BY is not known")) };
                let visible = &self.visible[index];
                stay |= visible.column.is_some_and(|column| column.is_key);
                self.keys.push((index, visible.expression.unwrap_or(expression), visible.tokens.clone()));
                continue;
            }
            stay |= expression.column.as_ref().is_some_and(|column| column.is_key);
            let index = match self.same_item(expression, tokens) {
                Some(index) => index,
                None => usize::MAX,
            };
            self.keys.push((index, expression, Some(tokens.clone())));
        }
        Ok(stay)
    }

    /// The output column of that name, if any.
    fn named(&self, name: &str) -> Result<Option<usize>, String> {
        if !self.complete || self.visible.iter().any(|visible| visible.unsure) {
            return Err(format!("weir cannot tell which output column \"{name}\" is"));
        }
        Ok(self.visible.iter().position(|visible| visible.name == Some(name)))
    }

    /// The column an ORDER BY item sorts by, if it is in the select list.
    fn ordered_item(&mut self, expression: &Expression, tokens: &Range<usize>) -> Result<Option<usize>, String> {
        if let Some(index) = self.ordinal(expression)? {
            return Ok(Some(index));
        }
        // In ORDER BY a bare name is an output name first, a column second.
        if let Some(name) = &expression.bare_name
            && let Some(index) = self.named(name)?
        {
            return Ok(Some(index));
        }
        Ok(self.same_item(expression, tokens))
    }

    fn order_key(&self, index: usize, order: &crate::sql::facts::Ordering) -> Result<OrderKey, String> {
        let visible = self.visible.get(index);
        let item = visible.and_then(|visible| visible.expression);
        let source = item.unwrap_or(&order.expression);
        if source.foreign_collation || order.expression.foreign_collation {
            return Err("it orders by a collation that is not byte order".into());
        }
        let byte_order = match visible {
            Some(visible) => visible.column.map_or(source.byte_order, |column| column.byte_order),
            None => order.expression.byte_order,
        };
        Ok(OrderKey { column: index, descending: order.descending, nulls_first: order.nulls_first, byte_order })
    }

    /// Rows, or groups that live on one shard each: the shards sort and limit, the merge does it again.
    fn plain(mut self) -> Result<ReadScatter, String> {
        let shape = self.shape;
        let mut order = Vec::new();
        if let Some(clause) = &self.text.clauses.order {
            for (item, tokens) in shape.order.iter().zip(&clause.items) {
                let tokens = order_expression(self.text.sql, self.text.tokens, tokens);
                let index = match self.ordered_item(&item.expression, &tokens)? {
                    Some(index) => index,
                    None if shape.distinct => return Err("DISTINCT is ordered by what it does not select".into()),
                    None => self.hide(vec![Piece::Tokens(tokens)]),
                };
                order.push(self.order_key(index, item)?);
            }
        }
        if !self.complete && !order.is_empty() {
            return Err("weir does not know the columns of * in it".into());
        }
        let distinct_on: Vec<usize> = order.iter().take(shape.distinct_on).map(|key| key.column).collect();
        let repeated = |at: usize| distinct_on[..at].contains(&distinct_on[at]);
        if distinct_on.len() < shape.distinct_on || (0..distinct_on.len()).any(repeated) {
            return Err("weir cannot tell by which of its ORDER BY its DISTINCT ON goes".into());
        }
        let mut edits = self.plain_limit();
        self.hidden_edit(&mut edits);
        Ok(ReadScatter { distinct_on, ..self.finish(edits, None, order) })
    }

    /// LIMIT l OFFSET o: every shard may own any of the first l + o rows.
    fn plain_limit(&self) -> Vec<Edit> {
        let clauses = self.text.clauses;
        let Some(offset) = &clauses.offset else { return Vec::new() };
        let sum = |limit: Option<&Range<usize>>| {
            // Summed as numeric and capped, so that a huge LIMIT does not overflow; a NULL LIMIT is no limit either way.
            let (head, tail) = if self.shape.ties { ("FETCH FIRST (", ") ROWS WITH TIES") } else { ("LIMIT (", ")") };
            let mut pieces = vec![Piece::Text(format!("{head}least(").into())];
            pieces.push(match limit {
                None => Piece::Text("NULL".into()),
                Some(one) if one.is_empty() => Piece::Text("1".into()),
                Some(limit) => Piece::Tokens(limit.clone()),
            });
            pieces.push(Piece::Text("::int8::numeric + ".into()));
            pieces.push(Piece::Tokens(offset.value.clone()));
            pieces.push(Piece::Text(format!("::int8, 9223372036854775807)::int8{tail}").into()));
            pieces
        };
        match &clauses.limit {
            Some(limit) => vec![
                Edit { range: limit.whole.clone(), pieces: sum(Some(&limit.value)) },
                Edit { range: offset.whole.clone(), pieces: Vec::new() },
            ],
            // A parameter must stay in the text, or the server could not tell its type.
            None if self.has_param(&offset.whole) => vec![Edit { range: offset.whole.clone(), pieces: sum(None) }],
            None => vec![Edit { range: offset.whole.clone(), pieces: Vec::new() }],
        }
    }

    fn has_param(&self, range: &Range<usize>) -> bool {
        range.clone().any(|index| matches!(self.text.tokens[index].kind, TokenKind::Param(_)))
    }

    /// Groups that span shards.
    fn folded(mut self) -> Result<ReadScatter, String> {
        let shape = self.shape;
        if !self.complete {
            return Err("weir does not know the columns of * in it".into());
        }
        let formulas = self.fold_items()?;
        self.hide_keys()?;
        let mut edits = Vec::new();
        for (index, formula) in formulas {
            edits.push(self.compute_item(index, formula)?);
        }
        edits.extend(self.fold_having()?);
        let mut order = Vec::new();
        if let Some(clause) = &self.text.clauses.order {
            for (item, tokens) in shape.order.iter().zip(&clause.items) {
                let tokens = order_expression(self.text.sql, self.text.tokens, tokens);
                let index = match self.ordered_item(&item.expression, &tokens)? {
                    Some(index) => index,
                    None if shape.distinct => return Err("DISTINCT is ordered by what it does not select".into()),
                    None => self.ordered_beyond(&item.expression, &tokens)?,
                };
                order.push(self.order_key(index, item)?);
            }
        }
        edits.extend(self.folded_tail());
        self.hidden_edit(&mut edits);
        let mut keys: Vec<usize> = self.keys.iter().map(|key| key.0).collect();
        keys.sort_unstable();
        keys.dedup();
        let mut folds = std::mem::take(&mut self.folds);
        folds.sort_by_key(|fold| fold.column);
        Ok(self.finish(edits, Some(GroupSpec { keys, folds, ..GroupSpec::default() }), order))
    }

    /// Every select item must be a group key, an aggregate that can be put together from parts, or made of such; those
    /// that have to be computed are returned.
    fn fold_items(&mut self) -> Result<Vec<(usize, &'s Formula)>, String> {
        let mut formulas = Vec::new();
        for index in 0..self.visible.len() {
            if self.is_group_key(index) {
                continue;
            }
            let Some(expression) = self.visible[index].expression else {
                return Err("it selects a column that it neither groups by nor aggregates".into());
            };
            let tokens = self.visible[index].tokens.clone().unwrap_or_default();
            match (&expression.aggregate, &expression.formula) {
                (Some(aggregate), _) => self.fold(index, aggregate, &tokens)?,
                (None, Some(formula)) => formulas.push((index, formula)),
                (None, None) if expression.has_aggregate => {
                    return Err("an aggregate stands inside a larger expression, and its groups span shards".into());
                }
                (None, None) if expression.has_subquery => {
                    return Err("it selects a sub-query, and its groups span shards".into());
                }
                // Without an aggregate it is made of group keys and constants (or Postgres refuses it), and nothing in it
                // is volatile: every shard has the same for a group, and the merge shows the first.
                (None, None) => {}
            }
        }
        Ok(formulas)
    }

    fn is_group_key(&mut self, index: usize) -> bool {
        let visible = &self.visible[index];
        self.keys.iter().any(|(key, expression, _)| {
            *key == index
                || matches!((&expression.column, visible.column), (Some(left), Some(right))
                    if left.owner == right.owner && left.name == right.name)
        }) && {
            // The same column selected twice is a key both times.
            if !self.keys.iter().any(|key| key.0 == index)
                && let Some(expression) = self.visible[index].expression
            {
                self.keys.push((index, expression, None));
            }
            true
        }
    }

    fn hide_keys(&mut self) -> Result<(), String> {
        for at in 0..self.keys.len() {
            if self.keys[at].0 == usize::MAX {
                let Some(tokens) = self.keys[at].2.clone() else { return Err("a group key is not known".into()) };
                self.keys[at].0 = self.hide(vec![Piece::Tokens(tokens)]);
            }
        }
        Ok(())
    }

    fn fold(&mut self, column: usize, aggregate: &Aggregate, tokens: &Range<usize>) -> Result<(), String> {
        if aggregate.ordered {
            return Err(format!("{}() of several shards cannot be put together", aggregate.name));
        }
        let adds_by_key = &*aggregate.name == "count" && aggregate.distinct && aggregate.argument_is_key;
        // The smallest of the distinct values is the smallest of the values.
        let indifferent = matches!(&*aggregate.name, "min" | "max");
        if aggregate.distinct && !adds_by_key && !indifferent {
            return Err(format!("{}(DISTINCT …) counts a value once even if it is on several shards", aggregate.name));
        }
        let kind = match &*aggregate.name {
            "count" => FoldKind::Count,
            "sum" => FoldKind::Sum,
            "min" => FoldKind::Min { byte_order: aggregate.argument_byte_order },
            "max" => FoldKind::Max { byte_order: aggregate.argument_byte_order },
            "bool_and" | "every" => FoldKind::And,
            "bool_or" => FoldKind::Or,
            "avg" => return self.fold_avg(column, aggregate, tokens),
            name => return Err(format!("{name}() of several shards cannot be put together")),
        };
        self.folds.push(Fold { column, kind });
        Ok(())
    }

    /// avg is recomposed from hidden sum and count over the same arguments.
    fn fold_avg(&mut self, column: usize, aggregate: &Aggregate, tokens: &Range<usize>) -> Result<(), String> {
        const FLOAT4: u32 = 700;
        if !aggregate.plain_name {
            return Err("avg is written with a schema".into());
        }
        let arguments = tokens.start + 1..tokens.end;
        let mut sum = vec![Piece::Text("sum".into()), Piece::Tokens(arguments.clone())];
        if aggregate.argument_type == FLOAT4 {
            // avg adds in double precision, sum would not.
            let end = closed(self.text.tokens, arguments.start, arguments.end).ok_or("weir cannot tell avg's end")? - 1;
            let inside = Piece::Tokens(arguments.start..end);
            let cast = Piece::Text("::pg_catalog.float8".into());
            sum = vec![Piece::Text("sum".into()), inside, cast, Piece::Tokens(end..arguments.end)];
        }
        let sum = self.hide(sum);
        let count = self.hide(vec![Piece::Text("count".into()), Piece::Tokens(arguments)]);
        self.folds.push(Fold { column, kind: FoldKind::Avg { sum, count } });
        self.folds.push(Fold { column: sum, kind: FoldKind::Sum });
        self.folds.push(Fold { column: count, kind: FoldKind::Count });
        Ok(())
    }

    /// ORDER BY what is not selected: a group key, or an aggregate of its own.
    fn ordered_beyond(&mut self, expression: &Expression, tokens: &Range<usize>) -> Result<usize, String> {
        let key = self.keys.iter().find(|(_, key, key_tokens)| match (&expression.column, &key.column) {
            (Some(left), Some(right)) => left.owner == right.owner && left.name == right.name,
            (None, None) => {
                key_tokens.as_ref().is_some_and(|other| same_tokens(self.text.sql, self.text.tokens, other, tokens))
            }
            _ => false,
        });
        if let Some((index, ..)) = key {
            return Ok(*index);
        }
        let Some(aggregate) = &expression.aggregate else {
            return Err("it orders groups that span shards by an expression it does not select".into());
        };
        let column = self.hide(vec![Piece::Tokens(tokens.clone())]);
        self.fold(column, aggregate, tokens)?;
        Ok(column)
    }

    /// ORDER BY, LIMIT and OFFSET are applied after folding; client parameters in them stay in the text.
    fn folded_tail(&self) -> Vec<Edit> {
        let clauses = self.text.clauses;
        let mut edits = Vec::new();
        if let Some(order) = &clauses.order
            && !self.has_param(&order.whole)
        {
            edits.push(Edit { range: order.whole.clone(), pieces: Vec::new() });
        }
        let mut kept = Vec::new();
        let counts: Vec<_> = clauses.limit.iter().chain(&clauses.offset).collect();
        for valued in &counts {
            if self.has_param(&valued.whole) {
                kept.push(Piece::Text(" + ".into()));
                kept.push(Piece::Tokens(valued.value.clone()));
                kept.push(Piece::Text("::int8".into()));
            }
        }
        for (index, valued) in counts.iter().enumerate() {
            let mut pieces = Vec::new();
            if index == 0 && !kept.is_empty() {
                pieces.push(Piece::Text("LIMIT (NULL::int8".into()));
                pieces.append(&mut kept);
                pieces.push(Piece::Text(")".into()));
            }
            edits.push(Edit { range: valued.whole.clone(), pieces });
        }
        edits
    }

    fn hidden_edit(&self, edits: &mut Vec<Edit>) {
        let Some(last) = self.text.clauses.items.last() else { return };
        if self.hidden.is_empty() {
            return;
        }
        let mut pieces = Vec::new();
        for (number, hidden) in self.hidden.iter().enumerate() {
            pieces.push(Piece::Text(", ".into()));
            pieces.extend(hidden.iter().cloned());
            pieces.push(Piece::Text(format!(" AS weir_hidden_{}", number + 1).into()));
        }
        edits.push(Edit { range: last.end..last.end, pieces });
    }

    fn finish(self, edits: Vec<Edit>, group: Option<GroupSpec>, order: Vec<OrderKey>) -> ReadScatter {
        let term = |limit: &Limit| match limit {
            Limit::Term(term) => Some(term.clone()),
            Limit::None | Limit::Computed => None,
        };
        let depends = !self.hidden.is_empty() || group.is_some() || !order.is_empty();
        ReadScatter {
            rewrite: Rewrite::new(edits),
            hidden: self.hidden.len(),
            columns: depends.then_some(self.visible.len() + self.hidden.len()),
            group,
            computed: self.computed,
            having: self.having,
            distinct: self.shape.distinct,
            distinct_on: Vec::new(),
            order,
            limit: term(&self.shape.limit),
            offset: term(&self.shape.offset),
            ties: self.shape.ties,
            compared_literals: self.compared,
        }
    }
}
